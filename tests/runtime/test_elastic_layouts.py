"""Training of one model under many layouts, and checkpoints that go from one to another, on real processes.

Which results must agree in every bit and which up to the order of sums is that of the consistency classes: layouts that differ
in pp alone are `bitwise` here, since there is no gradient norm, no dropout, no tied embedding, and sums over dp are per tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeplan.runtime.elastic_data import sample_ids

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4 ep4": {"dp": 4, "ep": 4, "micro_batch": 3},
    "dp4 ep2": {"dp": 4, "ep": 2, "edp": 2, "micro_batch": 3},
    "pp2 dp2 ep2": {"pp": 2, "dp": 2, "ep": 2, "micro_batch": 3, "stages": [2, 1]},
    "dp3 ep3": {"dp": 3, "ep": 3, "micro_batch": 4},
    "dp3": {"dp": 3, "edp": 3, "micro_batch": 2},
    "pp3": {"pp": 3, "micro_batch": 4},
    "dp2 ep2": {"dp": 2, "ep": 2, "micro_batch": 3},
    "alone": {"micro_batch": 4},
}
STEPS, LATER = 4, 2
BASE, GO_ON = "dp4 ep4", ("dp4 ep4", "dp3", "pp3")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every layout from the start, and with the checkpoint of the base; some go on from there, or back to the base."""
    directory = tmp_path_factory.mktemp("elastic")
    runs: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        runs.append({"name": name, "layout": layout, "steps": STEPS, "after": ""})
        runs.append({"name": f"to {name}", "layout": layout, "steps": 0, "after": BASE})
        if name in GO_ON:
            runs.append({"name": f"on {name}", "layout": layout, "steps": LATER, "after": f"to {name}"})
    for name in ("dp3", "pp3"):
        runs.append({"name": f"{name} back", "layout": LAYOUTS[BASE], "steps": 0, "after": f"to {name}"})
    read = [run["name"] for run in runs if run["steps"] != LATER]
    digests = [{"name": f"digest {name}", "digest": name, "layout": {}} for name in read]
    command = [sys.executable, "-m", "tests.runtime.elastic_worker", json.dumps(runs + digests)]
    root = Path(__file__).parents[2]
    end = subprocess.run(
        [*command, str(directory)], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert end.returncode == 0, end.stderr
    found: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return found


def gap(given: list[float], wanted: list[float]) -> float:
    assert len(given) == len(wanted)
    return max(abs(a - b) / abs(b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns_the_same(results: dict[str, Any], name: str) -> None:
    alone = results["alone"]["losses"]
    assert alone[-1] < alone[0] - 0.1
    assert gap(results[name]["losses"], alone) < TOLERANCE
    for key, (_, shape, norm) in results["digest " + name].items():
        _, wanted_shape, wanted = results["digest alone"][key]
        assert shape == wanted_shape and norm == pytest.approx(wanted, rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_consumes_the_same_samples(results: dict[str, Any], name: str) -> None:
    for step, samples in enumerate(results[name]["samples"]):
        assert sorted(samples) == sorted(sample_ids(12 * step, 12, 4096, 1).tolist())


@pytest.mark.parametrize("one, other", [("dp2 ep2", "pp2 dp2 ep2"), ("alone", "pp3")])
def test_stages_alone_change_no_bit(results: dict[str, Any], one: str, other: str) -> None:
    assert results[one]["losses"] == results[other]["losses"]
    assert results["digest " + one] == results["digest " + other]


def test_other_splits_of_the_batch_change_bits(results: dict[str, Any]) -> None:
    assert results["digest dp4 ep4"] != results["digest alone"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_keeps_its_content_under_every_layout(results: dict[str, Any], name: str) -> None:
    """Each element once, moments with their weights, the counters, and names that do not depend on the layout."""
    moved = results[f"digest to {name}"]
    assert results[f"to {name}"]["begun"] == STEPS and moved == results["digest " + BASE]
    assert sum(norm > 0 for _, _, norm in moved.values()) == len(moved)


@pytest.mark.parametrize("name", ["dp3", "pp3"])
def test_there_and_back_changes_nothing(results: dict[str, Any], name: str) -> None:
    assert results[f"digest {name} back"] == results["digest " + BASE]


@pytest.mark.parametrize("name", GO_ON)
def test_training_goes_on_as_if_undisturbed(results: dict[str, Any], name: str) -> None:
    assert gap(results[f"on {name}"]["losses"], results["on " + BASE]["losses"]) < TOLERANCE
