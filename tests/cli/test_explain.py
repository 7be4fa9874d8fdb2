"""`moeplan explain`: where time and memory go, what binds, one step away."""

import json
from pathlib import Path

import pytest

from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan, question


def test_everything_about_a_plan(moeplan: Moeplan, plan_file: Path) -> None:
    end = moeplan("explain", plan_file)
    assert (end.code, end.err) == (0, "")
    for text in ("step time", "peak memory by pipeline stage", "what binds", "one step away", "tp 1 -> 2", "gap 0%"):
        assert text in end.out


def test_json(moeplan: Moeplan, plan_file: Path) -> None:
    data = json.loads(moeplan("explain", plan_file, "--json").out)
    assert data["binds"][0]["what"] == "memory"
    assert {n["verdict"] for n in data["neighbours"]} <= {"faster", "slower", "too large", "refused"}
    assert all((n["step_s"] is None) == bool(n["reason"]) for n in data["neighbours"])


def test_against_another(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    assert moeplan("solve", *question(), "--pin", "tp=2", "-o", other).code == 0
    end = moeplan("explain", plan_file, "--against", other)
    assert end.code == 0 and "step time side by side" in end.out and "peak memory" in end.out
    data = json.loads(moeplan("explain", plan_file, "--against", other, "--json").out)
    assert data["other_step_s"] == pytest.approx(load_plan(other).step_s)
    assert sum(p["this_s"] for p in data["parts"]) == pytest.approx(data["this_step_s"])
    same = moeplan("explain", plan_file, "--against", plan_file)
    assert same.code == 0 and "+0.0%" in same.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'PLAN'"),
        (["none.yaml"], 1, "plan file 'none.yaml' does not exist"),
        (["PLAN", "--against", "none.yaml"], 1, "plan file 'none.yaml' does not exist"),
        (["PLAN", "--againts", "PLAN"], 2, "Did you mean '--against'?"),
        (["PLAN", "PLAN"], 2, "unexpected extra argument"),
    ],
)
def test_wrong_use(moeplan: Moeplan, plan_file: Path, arguments: list[str], code: int, message: str) -> None:
    end = moeplan("explain", *[plan_file if a == "PLAN" else a for a in arguments])
    assert end.code == code and message in end.complaint and end.out == ""


def test_ties_are_told_with_their_deviation(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    same = moeplan("explain", plan_file, "--against", plan_file)
    assert "tie within the noise: the other takes +0.0% GPU time, sigma " in same.out and "to tell them apart: " in same.out
    assert "tie within the noise: " in moeplan("explain", plan_file).out
    found = json.loads(moeplan("explain", plan_file, "--against", plan_file, "--json").out)["comparison"]
    assert found["tie"] and found["shared"] and found["log_ratio"] == 0.0 and found["measurement"]["run"]
    around = json.loads(moeplan("explain", plan_file, "--json").out)["neighbours"]
    assert all((n["sigma"] is None) == (n["step_s"] is None) and isinstance(n["tie"], bool) for n in around)


def test_plans_of_other_machines_share_no_errors(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    assert moeplan("solve", *question(cluster="b200x8"), "-o", other).code == 0
    end = moeplan("explain", plan_file, "--against", other)
    assert end.code == 0 and "so that their errors do not cancel" in end.out and "no tie: " in end.out


def test_advice_on_checkpoints(moeplan: Moeplan, plan_file: Path) -> None:
    usual = moeplan("explain", plan_file)
    assert "checkpoints (torch_dist): every " in usual.out and "where a node fails every 154 days" in usual.out
    data = {mtbf: json.loads(moeplan("explain", plan_file, "--json", "--node-mtbf", mtbf).out) for mtbf in ("1d", "100d")}
    rare, often = data["100d"]["checkpoints"], data["1d"]["checkpoints"]
    assert often["node_mtbf_s"] == 86400.0 and often["interval_steps"] < rare["interval_steps"]
    assert often["goodput"] < rare["goodput"] < 1.0 and often["asynchronous"] and often["format"] == "torch_dist"
    slow = json.loads(moeplan("explain", plan_file, "--json", "--storage-bandwidth", "10MB/s").out)["checkpoints"]
    assert slow["persist_s"] > rare["persist_s"] and slow["interval_s"] >= slow["persist_s"]
    end = moeplan("explain", plan_file, "--node-mtbf=-1d")
    assert end.code == 2 and "--node-mtbf -1d: a time cannot be negative" in end.complaint
