"""`moeplan verify` on four gloo processes: right results of all schedules, wrong ones found, rows that calibrate reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.layers.runs import read_layer_runs
from moeplan.planner.plan import load_plan
from moeplan.planner.problem import Problem
from moeplan.planner.solve import solve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import workload_of

WORKER = Path(__file__).parent / "verify_worker.py"
SCHEDULES = "baseline,s1,s2,hierarchical,fsmoe,tutel"
SMALL = ["--tokens", "60", "--hidden", "32", "--expert-hidden", "24", "--experts", "8", "--topk", "2", "--budget", "1s"]
GROUPS = ["--mp", "2", "--esp", "2", "--ep", "2"]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of a small model with experts."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    problem = Problem(
        model=load_model("mixtral-8x7b-4l-proxy"),
        profile=nominal(load_cluster("h100x8")),
        workload=workload_of(seq_len=4096, global_batch=16),
    )
    plan = solve(problem).plans[0]
    plan.save(path)
    assert load_plan(path).problem.model.moe is not None
    return path


def ran(script: list[str], ranks: int, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """A command on several processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    end = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (end.returncode != 0) == fails, end.stdout + end.stderr
    return end


@pytest.fixture(scope="module")
def verified(plan_file: Path) -> tuple[dict[str, Any], Path, str]:
    """What one run says and writes."""
    rows = plan_file.with_name("measured.csv")
    asked = [str(plan_file), *SMALL, *GROUPS, "--schedules", SCHEDULES, "--gradient-bytes", "64KiB", "-o", str(rows), "--json"]
    end = ran(["-m", "moeplan", "verify"], 4, *asked)
    return json.loads(end.stdout), rows, end.stderr


def test_every_schedule_is_right(verified: Any) -> None:
    data, _, _ = verified
    assert [c["schedule"] for c in data["checks"]] == [
        "baseline", "s1", "s2", "hierarchical", "fsmoe 1/1", "fsmoe 2/2", "fsmoe 4/4", "tutel 1/1", "tutel 2/2", "tutel 4/4",
    ]  # fmt: skip
    for each in data["checks"]:
        assert each["right"] and each["in_order"]
        assert set(each["errors"]) == {"output", "input gradient", "gate gradient", "inner gradient", "down gradient"}
        assert all(0.0 <= error <= 1e-5 for error in each["errors"].values())


def test_tasks_and_schedules_stand_beside_their_predictions(verified: Any) -> None:
    compared = verified[0]["comparison"]
    assert {s["name"] for s in compared["schedules"]} == set(SCHEDULES.split(","))
    assert sorted(s["measured_place"] for s in compared["schedules"]) == list(range(1, 7))
    assert [s["measured_s"] for s in compared["schedules"]] == sorted(s["measured_s"] for s in compared["schedules"])
    for each in compared["runs"]:
        run = each["run"]
        assert run["measured_layer_s"] > 0.0 and each["predicted_s"] > 0.0
        assert ("R" in each["tasks"]) and (each["tasks"]["R"][0] > 0.0) == (run["direction"] == "backward")
        # What runs one after the other takes at least its tasks.
        if run["schedule"] == "hierarchical":
            assert sum(measured for _, measured in each["tasks"].values()) >= 0.5 * run["measured_layer_s"]


def test_rows_are_those_that_calibrate_reads(verified: Any) -> None:
    data, path, _ = verified
    rows = read_layer_runs(path)
    assert len(rows) == 20 == len(data["comparison"]["runs"])
    assert {(r.mp, r.esp, r.ep, r.tokens, r.hidden, r.expert_hidden, r.experts, r.topk) for r in rows} == {
        (2, 2, 2, 60, 32, 24, 8, 2)
    }
    assert {r.gradient_bytes for r in rows if r.direction == "backward"} == {65536.0}
    assert all(r.spread >= 0.0 for r in rows)


def test_what_is_not_as_in_the_plan_is_said_once(verified: Any) -> None:
    said = [line for line in verified[2].splitlines() if line.startswith("note: scaled from the plan's")]
    assert len(said) == 1 and "predictions are for" in verified[2]


def test_a_wrong_result_is_found(plan_file: Path) -> None:
    # The worker's third rank adds a little to what the combine of its chunk brings back.
    asked = [str(plan_file), *SMALL, *GROUPS, "--schedules", "hierarchical,s1", "--check-only", "--json"]
    end = ran([str(WORKER)], 4, *asked, fails=True)
    checks = {c["schedule"]: c for c in json.loads(end.stdout[: end.stdout.rindex("}") + 1])["checks"]}
    assert not checks["hierarchical"]["right"] and checks["hierarchical"]["errors"]["output"] > 1e-5
    assert checks["s1"]["right"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schedules", "lina"], "schedule 'lina' cannot be executed"),
        (["--mp", "3"], "mp = 3 does not divide"),
        (["--schedules", "hierarchical", "-o", "/nowhere/x.csv"], "there is no directory '/nowhere'"),
    ],
)
def test_bad_questions_end_alone(plan_file: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "moeplan", "verify", str(plan_file), *arguments]
    end = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert end.returncode == 1 and said in end.stderr and "Traceback" not in end.stderr
    assert end.stderr.count("error:") == 1


def test_a_layer_without_room_is_refused(plan_file: Path) -> None:
    command = [sys.executable, "-m", "moeplan", "verify", str(plan_file), "--tokens", "100000000", "--hidden", "8192"]
    end = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert end.returncode == 1 and "the layer needs about" in end.stderr
