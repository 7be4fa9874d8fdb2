"""`moeplan solve --improve`: what to change in a plan, as flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan, question


@pytest.fixture
def slow(moeplan: Moeplan, tmp_path: Path) -> Path:
    """A plan that leaves something on the table."""
    path = tmp_path / "slow.yaml"
    layout = ["--tp", 2, "--ep", 4, "--etp", 2, "--dispatcher", "allgather"]
    assert moeplan("estimate", *question(), *layout, "-o", path).code == 0
    return path


def test_edits_and_their_sum(moeplan: Moeplan, slow: Path, tmp_path: Path) -> None:
    output = tmp_path / "better.yaml"
    end = moeplan("solve", "--improve", slow, "-o", output)
    assert end.code == 0
    for text in ("as it is: TP2", "one edit alone", "one after the other", "together -", "--expert-tensor-parallel-size 1"):
        assert text in end.out
    assert load_plan(output).step_s < load_plan(slow).step_s


def test_json(moeplan: Moeplan, slow: Path) -> None:
    data = json.loads(moeplan("solve", "--improve", slow, "--json").out)
    after = data["step_s"]
    for edit in data["path"]:
        assert edit["step_s"] == pytest.approx(after * (1.0 - edit["gain"]))
        after = edit["step_s"]
        assert edit["flags"] and all(flag.startswith(("--", "drop --")) for flag in edit["flags"])
    assert data["gain"] == pytest.approx(1.0 - after / data["step_s"]) and after <= data["best_step_s"] * 1.006


def test_a_plan_that_is_the_best(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    assert moeplan("solve", *question(), "-o", path).code == 0
    end = moeplan("solve", "--improve", path)
    assert end.code == 0 and "no edit makes it faster" in end.out


@pytest.mark.parametrize("more", [["--model", "deepseek-v3"], ["--pin", "tp=2"], ["--top", "3"]])
def test_a_question_beside_the_plan_is_refused(moeplan: Moeplan, slow: Path, more: list[str]) -> None:
    end = moeplan("solve", "--improve", slow, *more)
    assert end.code == 2 and f"not from {more[0]}" in end.err and end.out == ""


def test_no_plan_file(moeplan: Moeplan, tmp_path: Path) -> None:
    end = moeplan("solve", "--improve", tmp_path / "no.yaml")
    assert end.code == 1 and "does not exist" in end.err
