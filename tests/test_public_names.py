"""The names that `import moeplan` offers, and that each of them works and is documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moeplan

NAMES = {
    "Cluster", "Layout", "Model", "Plan", "Problem", "Profile", "Workload",
    "load_cluster", "load_model", "load_plan", "nominal", "solve",
}  # fmt: skip


def test_names_are_these_and_no_others() -> None:
    assert set(moeplan.__all__) == NAMES and len(moeplan.__all__) == len(NAMES) <= 12
    assert NAMES | {"__version__"} == set(dir(moeplan))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_exists_with_a_docstring(name: str) -> None:
    value = getattr(moeplan, name)
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), "the docstring is the one that dataclass makes"
    assert value.__name__ == name


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'slove'"):
        _ = moeplan.slove


def test_a_question_in_python(tmp_path: Path) -> None:
    model = moeplan.load_model("mixtral-8x7b-4l-proxy")
    profile = moeplan.nominal(moeplan.load_cluster("h100x8"))
    from moeplan.costmodels.workload import load_era, load_precision

    workload = moeplan.Workload(seq_len=4096, global_batch=16, precision=load_precision("bf16"), era=load_era("latest"))
    solution = moeplan.solve(moeplan.Problem(model=model, profile=profile, workload=workload))
    best = solution.plans[0]
    best.save(tmp_path / "plan.yaml")
    again = moeplan.load_plan(tmp_path / "plan.yaml")
    assert again.layout == best.layout and again.step_s == pytest.approx(best.step_s)


def test_the_version_is_that_of_the_program() -> None:
    end = subprocess.run([sys.executable, "-m", "moeplan", "--version"], capture_output=True, text=True, check=True)
    assert end.stdout == f"moeplan {moeplan.__version__}\n"
