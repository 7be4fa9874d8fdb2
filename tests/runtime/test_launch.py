"""Templates, and jobs that are started, watched and ended with all that they started: here, and through a stand-in of Slurm."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import DeviceError, UsageError
from moeplan.planner.solve import solve
from moeplan.runtime import launch
from moeplan.runtime.launch import Ended, Job, Limits, LocalLauncher, end_marked, marked, parse_template, watch
from moeplan.runtime.logs import MEGATRON, Log
from moeplan.runtime.slurm import SlurmLauncher, submission
from tests.planner import tiny

STEP = "echo 'iteration 1/ 9 | elapsed time per iteration (ms): 5.0 |'"
LONG = {"steps": 100, "timeout_s": 60.0, "stall_s": 60.0}


# ---------------------------------------------------------------- templates


def test_a_template_becomes_a_command() -> None:
    template = parse_template("run -n {gpus} {dir}/go.sh {plan} ${{HOME}} t{trial}", "local")
    command = template.command(Path("/tmp/a b"), Path("/tmp/a b/plan.yaml"), 8, 3)
    assert command == "run -n 8 '/tmp/a b'/go.sh '/tmp/a b/plan.yaml' ${HOME} t3"


@pytest.mark.parametrize(
    ("text", "launcher", "message"),
    [
        ("bash run.sh", "local", "has neither {dir} nor {plan}: every trial would run the same (like --launch 'bash {dir}/"),
        ("bash run.sh {gpus}", "slurm", "like --launch 'sbatch {dir}/run_slurm.sbatch'"),
        ("bash {directory}/run.sh", "local", "unknown placeholder '{directory}'"),
        ("bash {dri}/run.sh", "local", "did you mean 'dir'"),
        ("bash {dir}/run.sh ${HOME}", "local", "braces of the shell are written twice: ${{NAME}}"),
        ("bash {dir}/run.sh {}", "local", "unknown placeholder '{}'"),
        ("bash {dir:>9}", "local", "unknown placeholder"),
        ("bash {dir", "local", "write braces of the shell twice"),
    ],
)
def test_templates_that_will_not_do(text: str, launcher: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_template(text, launcher)
    assert message in str(caught.value)


# ---------------------------------------------------------------- on this machine


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Ended, Log]]:
    """Run a shell command as a trial."""
    monkeypatch.setattr(launch, "GRACE_S", 0.5)

    def start(command: str, mark: str = "", **limits: float) -> tuple[Ended, Log]:
        mark = mark or f"test-{os.getpid()}-{tmp_path.name}"
        log = Log(tmp_path / "log.txt", MEGATRON, 64)
        job = LocalLauncher().start(command, tmp_path, log.path, mark)
        ended = watch(job, log, Limits(**{**LONG, **limits}), 0.02)  # type: ignore[arg-type]
        assert marked(mark) == []
        return ended, log

    return start


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("sh -c 'kill -11 $$'; exit $?", -11), ("no-such", 127)],
)
def test_exit_codes(run: Callable[..., tuple[Ended, Log]], command: str, code: int) -> None:
    ended, _ = run(command)
    assert (ended.why, ended.exit_code) == ("exit", code)


def test_both_streams_are_in_the_log_and_the_directory_is_the_trials(
    run: Callable[..., tuple[Ended, Log]], tmp_path: Path
) -> None:
    _, log = run("pwd; echo oh >&2; cat")
    assert log.tail(2) == [str(tmp_path), "oh"]


def test_it_ends_when_enough_steps_are_done(run: Callable[..., tuple[Ended, Log]]) -> None:
    ended, log = run(f"while true; do {STEP}; sleep 0.02; done", steps=3)
    assert ended.why == "enough" and len(log.step_s) >= 3


TREE = (
    "(trap '' TERM; setsid sh -c 'trap \"\" TERM; while true; do sleep 0.1; done' & setsid sleep 60 & sleep 60) & {} sleep 60"
)


@pytest.mark.parametrize(
    ("words", "limits", "why"),
    [(STEP + ";", {"stall_s": 0.5}, "stall"), ("while echo x; do sleep 0.05; done;", {"timeout_s": 0.5}, "timeout")],
)
def test_the_whole_tree_is_ended(run: Callable[..., tuple[Ended, Log]], words: str, limits: dict[str, float], why: str) -> None:
    """Also children in sessions of their own, and those that ignore a request to end."""
    ended, _ = run(TREE.format(words), **limits)
    assert ended.why == why  # `run` asserts that nothing is left


def test_what_an_ended_trial_left_behind_is_ended(run: Callable[..., tuple[Ended, Log]]) -> None:
    ended, _ = run("setsid sleep 60 > /dev/null 2>&1 & exit 0")
    assert ended.exit_code == 0


def test_complaints_about_being_stopped_are_not_read(run: Callable[..., tuple[Ended, Log]]) -> None:
    _, log = run("trap 'echo SignalError: stopped; exit 1' TERM; echo hello; while true; do sleep 0.05; done", stall_s=0.5)
    assert log.errors == [] and log.tail(1) == ["hello"]


def test_leftovers_of_an_earlier_tune_are_ended(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}-left"
    job = LocalLauncher().start("sleep 60 & sleep 60", tmp_path, tmp_path / "log.txt", mark)
    while not marked(mark):
        time.sleep(0.01)
    assert LocalLauncher().again(job.handle, mark) is None
    assert marked(mark) == [] and job.poll().phase == "ended"


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot start 'true'"):
        LocalLauncher().start("true", tmp_path / "none", tmp_path / "log.txt", "test-none")
    end_marked("test-none", 0.1)


# ---------------------------------------------------------------- Slurm, as a stand-in

SBATCH = """#!/bin/sh
# Runs the script at once, and notes what it was asked for.
printf '%s\\n' "$*" >> "$SLURM_STAND_IN/sbatch.calls"
for word in "$@"; do
  case "$word" in
    --output=*) out="${word#--output=}" ;;
    --job-name=*) name="${word#--job-name=}" ;;
    -*) ;;
    *) script="$word"; break ;;
  esac
done
[ -f "$script" ] || { echo "sbatch: error: Unable to open file $script" >&2; exit 1; }
id=$(($(ls "$SLURM_STAND_IN" | grep -c '^job') + 101))
echo "$name" > "$SLURM_STAND_IN/job.$id"
( sh "$script" >> "$out" 2>&1; echo $? > "$SLURM_STAND_IN/end.$id" ) > /dev/null 2>&1 &
echo $! > "$SLURM_STAND_IN/pid.$id"
echo "$id;cluster"
"""
SQUEUE = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    --name=*) for f in "$SLURM_STAND_IN"/job.*; do [ "$(cat "$f")" = "${word#--name=}" ] && echo "${f##*.}"; done; exit 0 ;;
    [0-9]*) id="$word" ;;
  esac
done
[ -f "$SLURM_STAND_IN/down" ] && { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
[ -f "$SLURM_STAND_IN/end.$id" ] && { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
[ -f "$SLURM_STAND_IN/hold" ] && { rm "$SLURM_STAND_IN/hold"; echo PENDING; exit 0; }
echo RUNNING
"""
SACCT = """#!/bin/sh
for word in "$@"; do case "$word" in [0-9]*) id="$word" ;; esac; done
code=$(cat "$SLURM_STAND_IN/end.$id")
case "$code" in 0) echo "COMPLETED|0:0" ;; oom) echo "OUT_OF_MEMORY|0:125" ;; lost) echo "NODE_FAIL|1:0" ;;
  cancelled) echo "CANCELLED by 0|0:15" ;; *) echo "FAILED|$code:0" ;; esac
"""
SCANCEL = """#!/bin/sh
kill $(cat "$SLURM_STAND_IN/pid.$1")
echo cancelled > "$SLURM_STAND_IN/end.$1"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a Slurm of one node."""
    place = tmp_path / "slurm"
    place.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("sacct", SACCT), ("scancel", SCANCEL)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(place))
    return place


def submitted(tmp_path: Path, script: str, template: str = "sbatch --partition=gpu {}") -> tuple[Job, Log]:
    (tmp_path / "run.sbatch").write_text(script)
    log = Log(tmp_path / "log.txt", MEGATRON, 64)
    return SlurmLauncher(0.02).start(template.format(tmp_path / "run.sbatch"), tmp_path, log.path, "mark-1"), log


def test_a_job_runs_to_its_end(slurm: Path, tmp_path: Path) -> None:
    (slurm / "hold").touch()
    phases: list[str] = []
    job, log = submitted(tmp_path, f"{STEP}\n{STEP}\nsleep 0.1\nexit 3\n")
    ended = watch(job, log, Limits(**LONG), 0.02, lambda phase, _, __: phases.append(phase))  # type: ignore[arg-type]
    assert (ended.why, ended.exit_code, ended.word) == ("exit", 3, "FAILED") and len(log.step_s) == 2
    assert phases[0] == "waiting" and phases[-1] == "ended" and job.handle == "101"
    asked = (slurm / "sbatch.calls").read_text()
    assert (
        f"--parsable --job-name=mark-1 --output={tmp_path}/log.txt --open-mode=append --partition=gpu {tmp_path}/run.sbatch"
        in asked
    )


@pytest.mark.parametrize(
    ("end", "word", "code"), [("0", "COMPLETED", 0), ("oom", "OUT_OF_MEMORY", -125), ("lost", "NODE_FAIL", 1)]
)
def test_how_a_job_ended(slurm: Path, tmp_path: Path, end: str, word: str, code: int) -> None:
    job, _ = submitted(tmp_path, "sleep 30\n")
    (slurm / "end.101").write_text(end)
    state = job.poll()
    assert (state.phase, state.word, state.exit_code) == ("ended", word, code) and job.poll() is state
    os.kill(int((slurm / "pid.101").read_text()), 15)


def test_without_accounting_the_log_decides(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    job, log = submitted(tmp_path, f"{STEP}\n")
    ended = watch(job, log, Limits(**LONG), 0.02)  # type: ignore[arg-type]
    assert (ended.why, ended.exit_code, ended.word) == ("exit", None, "") and len(log.step_s) == 1


def test_a_job_is_cancelled_when_it_is_silent(slurm: Path, tmp_path: Path) -> None:
    job, log = submitted(tmp_path, "echo hello\nexec sleep 30\n")
    ended = watch(job, log, Limits(**{**LONG, "stall_s": 0.4}), 0.02)  # type: ignore[arg-type]
    assert ended.why == "stall" and (slurm / "end.101").read_text() == "cancelled\n" and job.poll().word == "CANCELLED"


def test_a_job_is_found_again_by_number_and_by_name(slurm: Path, tmp_path: Path) -> None:
    job, _ = submitted(tmp_path, "sleep 30\n")
    launcher = SlurmLauncher(0.02)
    for handle in (job.handle, ""):
        found = launcher.again(handle, "mark-1")
        assert found is not None and found.handle == "101" and found.poll().phase == "running"
    assert launcher.again("", "mark-2") is None
    job.stop()
    ended = launcher.again("101", "mark-1")
    assert ended is not None and ended.poll().word == "CANCELLED"


def test_a_queue_that_does_not_answer_for_a_while(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = submitted(tmp_path, "sleep 30\n")
    (slurm / "down").touch()
    assert job.poll().phase == "running"
    monkeypatch.setattr("moeplan.runtime.slurm.PATIENCE", 3)
    job.poll()
    with pytest.raises(DeviceError, match="squeue failed 3 times in a row: .*Unable to contact"):
        job.poll()
    (slurm / "down").unlink()
    job.stop()


def test_what_slurm_refuses(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="sbatch refused 'sbatch none.sbatch': sbatch: error: Unable to open file"):
        SlurmLauncher(0.02).start("sbatch none.sbatch", tmp_path, tmp_path / "log.txt", "mark-1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="sbatch is not on this machine"):
        SlurmLauncher(0.02).start("sbatch x", tmp_path, tmp_path / "log.txt", "mark-1")


def test_options_that_a_trial_sets_itself() -> None:
    assert submission("sbatch -p gpu 'a b/run.sbatch' --output x") == ["-p", "gpu", "a b/run.sbatch", "--output", "x"]
    for text in ("sbatch --output=x run.sbatch", "-J name run.sbatch", "sbatch -p gpu --array=1-3 run.sbatch"):
        with pytest.raises(UsageError, match="is not for the template"):
            submission(text)


def test_a_tune_by_slurm(slurm: Path, tmp_path: Path) -> None:
    """The whole command, with a job that was submitted by a tune that has been killed before it wrote down the number."""
    plan = solve(tiny.problem(load_model("mixtral-8x7b-4l-proxy"), "h100x8", batch=16), keep=2).plans[0]
    plan.save(tmp_path / "plan.yaml")
    (tmp_path / "job.sh").write_text(f"{STEP}\n{STEP}\nsleep 0.2\n")
    arguments = ["--launcher", "slurm", "--launch", f"sbatch {tmp_path}/job.sh {{dir}}", "--to", "none", "--poll", "0.02"]
    command = [sys.executable, "-m", "moeplan", "tune", str(tmp_path / "plan.yaml"), "-d", str(tmp_path / "trials"), *arguments]
    command += ["--steps", "1", "--warmup", "0", "--top", "2", "--threshold", "0"]
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 0 and "trial 2: 5.00 ms a step" in end.stderr, end.stderr
    with sqlite3.connect(tmp_path / "trials" / "journal.sqlite") as base:
        base.execute("UPDATE candidates SET phase = 'running', handle = '', outcome = NULL WHERE trial = 2")
    base.close()
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 0 and "job 102 is followed again" in end.stderr and "trial 2: 5.00 ms" in end.stderr, end.stderr
    assert len((slurm / "sbatch.calls").read_text().splitlines()) == 2
