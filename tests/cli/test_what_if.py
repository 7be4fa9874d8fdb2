"""`moeplan explain --what-if`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeplan.planner import best_plans
from tests.cli.conftest import Moeplan, question


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of these tests alone, and nothing in memory."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(directory))
        patch.setattr(best_plans, "_MEMORY", {})
        yield directory


def test_table(moeplan: Moeplan, plan_file: Path, cache: Path) -> None:
    end = moeplan("explain", plan_file, "--what-if")
    assert (end.code, end.err) == (0, "")
    for text in (
        "binds",
        "what if",
        "16 GiB more per GPU",
        "twice the global batch",
        "half the GPUs (4)",
        "GPU time per token",
    ):
        assert text in end.out
    assert max(map(len, end.out.splitlines())) <= 120 and "step time" not in end.out
    assert len(list((cache / "moeplan").iterdir())) > 5
    assert moeplan("explain", plan_file, "--what-if").out == end.out


def test_json(moeplan: Moeplan, plan_file: Path) -> None:
    data = json.loads(moeplan("explain", plan_file, "--what-if", "--json").out)
    gains = [c["gpu_time_per_token"] for c in data["changes"] if c["fits"]]
    assert gains == sorted(gains) and data["best"]["step_s"] == pytest.approx(data["step_s"])
    for change in data["changes"]:
        assert change["words"].startswith(change["change"])
        if change["fits"]:
            assert change["step_s"] > 0 and change["layout"]["tp"] >= 1 and change["sigma"] >= 0
    assert set(data["binds"]) <= {c["constraint"] for c in data["changes"]}


def test_a_plan_that_is_not_the_best(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    assert moeplan("estimate", *question(), "--tp", 2, "--ep", 4, "--dispatcher", "allgather", "-o", path).code == 0
    end = moeplan("explain", path, "--what-if")
    assert end.code == 0 and "longer than the best of its question" in end.out


def test_not_with_another_plan(moeplan: Moeplan, plan_file: Path) -> None:
    end = moeplan("explain", plan_file, "--what-if", "--against", plan_file)
    assert end.code == 2 and "--what-if and --against" in end.err and end.out == ""


def test_a_plan_that_nothing_helps_but_memory(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tight.yaml"
    path.write_text(plan_file.read_text() + "limits: {memory_bytes: 3.0e+9}\n")
    end = moeplan("explain", path, "--what-if")
    assert end.code == 0 and "no plan of this question fits" in end.out and "no plan fits, " in end.out
