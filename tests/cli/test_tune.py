"""`moeplan tune`, with a shell script for a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeplan.planner.plan import load_plan
from moeplan.runtime.launch import marked
from tests.cli.conftest import Moeplan
from tests.cli.test_bad_input import refused

TRAINING = r"""
micro=$(sed -n 's/.*micro_batch: \([0-9]*\).*/\1/p' "$1" | head -1)
tp=$(sed -n 's/.*[{ ]tp: \([0-9]*\).*/\1/p' "$1" | head -1)
[ "$tp" = 2 ] && { echo "torch.OutOfMemoryError: CUDA out of memory"; exit 1; }
for i in 1 2 3 4; do
  echo " iteration $i/ 9 | elapsed time per iteration (ms): $((1000 + 100 * micro)).0 |"
  echo "step $i took $((1 + micro)) s"
done
echo "[Rank 0] (after 2 iterations) memory (MB) | allocated: 1.0 | max allocated: 5120.0 | reserved: 1.0 | max reserved: 1.0"
"""
QUICK = ("--steps", 2, "--warmup", 1, "--poll", "0.01", "--top", 6)


@pytest.fixture
def launch(tmp_path: Path) -> str:
    (tmp_path / "training.sh").write_text(TRAINING)
    return f"sh {tmp_path}/training.sh {{plan}}"


def test_it_finds_the_fastest_and_shows_all(moeplan: Moeplan, plan_file: Path, launch: str, tmp_path: Path) -> None:
    where = tmp_path / "trials"
    command = ("tune", plan_file, "--launch", launch, "-d", where, "-o", tmp_path / "winner.yaml", *QUICK)
    end = moeplan(*command)
    assert end.code == 0 and f"winner written to {tmp_path}/winner.yaml; next: moeplan export" in end.err
    assert "trial 1: " in end.err and "a step (3 steps, peak 5.0 GiB)" in end.err
    for words in ("trials of 6 candidates", "predicted", "expected", "measured", "of best", "best", "ended: ", "winner: "):
        assert words in end.out
    plan = load_plan(tmp_path / "winner.yaml")
    assert any("measured by moeplan tune: " in r for r in plan.remarks)
    assert {p.name for p in (where / "trial-01").iterdir()} >= {"plan.yaml", "log.txt", "megatron.args", "run_torchrun.sh"}
    for other in (["explain"], ["export", "-d", tmp_path / "launch"], ["estimate"]):
        assert moeplan(other[0], tmp_path / "winner.yaml", *other[1:]).code == 0
    again = moeplan(*command)
    assert again.code == 0 and "going on with" in again.err and "trial 1: " not in again.err and again.out == end.out


def test_json_own_format_and_a_journal_elsewhere(moeplan: Moeplan, plan_file: Path, launch: str, tmp_path: Path) -> None:
    end = moeplan(
        "tune", plan_file, "--launch", launch, "-d", tmp_path / "trials", "--journal", tmp_path / "j.sqlite", "--to", "none",
        "--regex", r"took (?P<step_s>\d+) s", "--threshold", "0", "--json", *QUICK,
    )  # fmt: skip
    data = json.loads(end.out)
    assert end.code == 0 and (tmp_path / "j.sqlite").exists() and not (tmp_path / "trials" / "journal.sqlite").exists()
    assert len(data["candidates"]) == 6 and data["trials"] >= 2 and data["deviations_widened"] >= 1
    ran = [c for c in data["candidates"] if c["outcome"] == "done"]
    best = next(c for c in ran if c["trial"] == data["best"])
    assert best["measured_s"] == min(c["measured_s"] for c in ran) and best["measured_s"] == int(best["measured_s"])
    assert data["winner"]["provenance"]["tune"]["measured_step_s"] == best["measured_s"]
    assert "megatron.args" not in [p.name for p in (tmp_path / "trials" / "trial-01").iterdir()]


def test_when_nothing_runs(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    common = ("--poll", "0.01", "-o", tmp_path / "winner.yaml", "--top", 3)
    full = "echo 'CUDA out of memory'; exit 1; : {plan}"
    end = moeplan("tune", plan_file, "--launch", full, "-d", tmp_path / "full", *common)
    assert end.code == 3 and "no plan ran; no winner is written" in end.err and "out of memory" in end.out
    end = moeplan("tune", plan_file, "--launch", "no-such-program {plan}", "-d", tmp_path / "none", *common)
    assert end.code == 1 and "the launch is at fault, not the plans" in end.out.replace("\n", " ")
    assert not (tmp_path / "winner.yaml").exists()


def test_a_log_without_a_step_line(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    end = moeplan(
        "tune", plan_file, "--launch", "echo hello from {plan}", "-d", tmp_path / "trials", "--log-format", "deepspeed"
    )
    assert end.code == 1 and "tells no step time: no step line" in end.err and "    hello from " in end.err
    assert "SamplesPerSec" in end.err and "hint: give --log-format or --regex" in end.err


def test_questions_that_make_no_sense(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    where = ("-d", tmp_path / "trials")
    good = ("--launch", "run {dir}")
    for arguments, code, message in (
        ((plan_file,), 2, "Missing option '--launch'"),
        ((plan_file, "--launch", "bash run.sh"), 2, "has neither {dir} nor {plan}"),
        (
            (plan_file, "--launch", "bash run.sh {gpus}", "--launcher", "slurm"),
            2,
            "like --launch 'sbatch {dir}/run_slurm.sbatch'",
        ),
        ((plan_file, "--launch", "bash {where}/run.sh"), 2, "unknown placeholder '{where}'"),
        ((plan_file, *good, "--regex", "took ("), 2, "is no regular expression"),
        ((plan_file, *good, "--regex", "(?P<step_s>.)", "--log-format", "megatron"), 2, "takes the place of --log-format"),
        ((plan_file, *good, "--timeout", "soon"), 2, "'soon' is not a duration"),
        ((plan_file, *good, "--stall", "0"), 2, "--stall is 0 s"),
        ((plan_file, *good, "--threshold", "much"), 2, "--threshold 'much' is not a share"),
        ((plan_file, *good, "--threshold", "100%"), 2, "less than 100% is needed"),
        ((plan_file, *good, "--trials", "0"), 2, "0 is not a whole number of at least 1"),
        ((plan_file, *good, "-o", tmp_path / "none" / "w.yaml"), 1, "there is no directory"),
        ((plan_file, *good, "--journal", tmp_path), 1, "it is a directory"),
        ((plan_file, *good, "--journal", plan_file), 2, "is the plan that is tuned, which would be lost"),
        ((plan_file, *good, "-o", plan_file), 2, "is the plan that is tuned, which would be lost"),
        ((plan_file, *good, "--journal", __file__), 1, "is not a journal"),
        (("none.yaml", *good), 1, "plan file 'none.yaml' does not exist"),
    ):
        refused(moeplan("tune", *arguments, *where), message, code=code)


def test_a_request_to_end_stops_the_running_trial(plan_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moeplan", "tune", str(plan_file), "--launch", "echo $MOEPLAN_TRIAL; sleep 60; : {plan}"]
    tune = subprocess.Popen(
        [*command, "-d", str(tmp_path / "trials"), "--poll", "0.05"], stderr=subprocess.PIPE, env=os.environ
    )
    log = tmp_path / "trials" / "trial-01" / "log.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert tune.poll() is None
        time.sleep(0.05)
    mark = log.read_text().strip()
    assert marked(mark)
    tune.send_signal(signal.SIGTERM)
    _, err = tune.communicate()
    assert tune.returncode == 130 and b"interrupted" in err and not marked(mark)
