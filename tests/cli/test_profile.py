"""`moeplan profile`: what it writes, how it goes on, and what it says when something is missing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeplan.cli.profile import COMMANDS
from moeplan.profiles import cases
from moeplan.profiles.cases import Case
from moeplan.profiles.profile_file import load_profile
from moeplan.profiles.samples import load_samples
from tests.cli.conftest import Moeplan, Outcome

ROOT = Path(__file__).parent.parent.parent
GRID = [(m, n, k) for m, n, k in ((16, 64, 64), (64, 64, 64), (128, 128, 64), (64, 128, 256), (256, 64, 128), (32, 256, 64))]

Measure = Callable[..., Outcome]


@pytest.fixture
def measure(moeplan: Moeplan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measure:
    """`moeplan profile` on this machine's processors with a few small products."""
    few = [Case(op="gemm", key="bf16", sizes={"m": m, "n": n, "k": k}) for m, n, k in GRID]
    few += [Case(op="gemm", key="fp8", sizes={"m": 16, "n": 16, "k": 16.5}), Case(op="launch", key="kernel", tier=1)]
    monkeypatch.setattr(cases, "kernel_cases", lambda shapes, device, memory_bytes: few)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        return moeplan("profile", "--device", "cpu", "--budget", "500ms", "-o", "p.yaml", *arguments)

    return run


def test_it_writes_a_profile_that_can_be_used(measure: Measure, moeplan: Moeplan) -> None:
    outcome = measure()
    assert outcome.code == 0, outcome.err
    assert "samples in" in outcome.out and "widest spread" in outcome.out
    assert "profile written to p.yaml" in outcome.err and "one rank: no collectives" in outcome.err
    profile, (environment, samples) = load_profile(Path("p.yaml")), load_samples(Path("p.samples.jsonl"))
    assert profile.measured_on is not None and profile.measured_on.samples == len(samples)
    assert profile.measured_on.samples_sha256 and profile.origins["gemm/bf16"].measured
    assert (environment.backend, environment.ranks) == ("cpu", 1)
    question = "--model mixtral-8x7b-4l-proxy --global-batch 16 --seq-len 512"
    priced = moeplan("solve", "--profile", "p.yaml", *question.split(), "--json")
    assert priced.code in (0, 3), priced.err


def test_json(measure: Measure) -> None:
    said = json.loads(measure("--json", "--only", "kernels").out)
    assert (said["profile"], said["samples"], said["ended"], said["left"]) == ("p.yaml", "p.samples.jsonl", "complete", 0)
    assert said["measured"] >= len(GRID) and said["resumed"] == 0 and said["seconds"] > 0
    assert all({"op", "key", "reason"} <= set(each) for each in said["skipped"])


def test_resume_measures_what_is_lacking(measure: Measure) -> None:
    assert measure().code == 0
    path = Path("p.samples.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"launch"' not in line]
    path.write_text("".join(kept) + lines[-1][:20])  # the last line was cut short
    said = json.loads(measure("--resume", "--json").out)
    assert said["resumed"] == len(kept) - 1
    added = load_samples(path)[1][len(kept) - 1 :]
    assert added and {s.op for s in added} == {"launch"}


def test_resume_without_samples_says_so(measure: Measure) -> None:
    outcome = measure("--resume")
    assert outcome.code == 0 and "there are no samples 'p.samples.jsonl' to go on with" in outcome.err


def test_resume_on_another_machine(measure: Measure) -> None:
    assert measure().code == 0
    path = Path("p.samples.jsonl")
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(first), "torch": "2.4.0"}) + "\n" + "".join(rest))
    before = path.read_bytes()
    outcome = measure("--resume")
    import torch

    assert outcome.code == 1
    assert f"torch '2.4.0', here it is '{torch.__version__}'" in outcome.complaint and "without --resume" in outcome.complaint
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_profile(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure().code == 0
    before = Path("p.yaml").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    from moeplan import records

    monkeypatch.setattr(records.os, "replace", full)
    outcome = measure("--only", "kernels")
    assert outcome.code == 1 and "cannot write profile 'p.yaml': No space left on device" in outcome.complaint
    assert Path("p.yaml").read_bytes() == before
    assert sorted(os.listdir()) == ["p.samples.jsonl", "p.yaml"]


def test_too_little_for_a_profile_keeps_the_samples(measure: Measure) -> None:
    outcome = measure("--budget", "1us")
    assert outcome.code == 0 and not Path("p.yaml").exists()
    assert "no profile was written" in outcome.err and "the same command with --resume goes on" in outcome.err
    assert len(load_samples(Path("p.samples.jsonl"))[1]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--budget", "soon"), 2, ("'soon' is not a duration",)),
        (("--budget", "0"), 2, ("--budget 0 leaves no time",)),
        (("--timeout", "0s"), 2, ("--timeout 0s leaves no time",)),
        (("--largest", "big"), 2, ("'big' is not a size",)),
        (("--only", "collectives"), 2, ("--only collectives: there is one rank", "torchrun")),
        (("--only", "links"), 2, ("'links' is not one of",)),
        (("--device", "tpu"), 2, ("'tpu' is not one of",)),
        (("--model", "gpt-17"), 2, ("unknown model 'gpt-17'",)),
        (("--cluster", "h100x8"), 1, ("h100x8", "this machine has")),
        (("--cluster", "h1000x8"), 2, ("unknown",)),
        (("-o", "no/such/p.yaml"), 1, ("there is no directory 'no/such'",)),
        (("-o", "."), 1, ("it is a directory",)),
        (("nonsense",), 2, ("No such command 'nonsense'",)),
        (("show", "p.yaml"), 2, ("--device has no meaning before 'show'",)),
    ],
)
def test_bad_input(measure: Measure, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    outcome = measure(*arguments)
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in outcome.complaint
    assert "Traceback" not in outcome.err and os.listdir() == []


def test_an_output_is_needed(moeplan: Moeplan) -> None:
    outcome = moeplan("profile")
    assert outcome.code == 2 and "-o FILE is needed" in outcome.complaint


def test_no_torch(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = measure()
    assert outcome.code == 1
    assert "moeplan profile needs torch, which is not installed" in outcome.complaint
    assert "pip install 'moeplan[profile]'" in outcome.complaint


def test_no_gpu(moeplan: Moeplan, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    outcome = moeplan("profile", "--device", "cuda", "-o", tmp_path / "p.yaml")
    assert outcome.code == 1 and "--device cuda" in outcome.complaint and "sees no GPU" in outcome.complaint


def test_other_ranks_keep_silent(moeplan: Moeplan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for arguments in (("--budget", "soon"), ("--only", "links"), ()):
        outcome = moeplan("profile", *arguments)
        assert (outcome.code, outcome.out, outcome.err) == (2, "", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_below(name: str, moeplan: Moeplan) -> None:
    outcome = moeplan("profile", name, "--help")
    assert outcome.code == 0 and COMMANDS[name][1] in outcome.out and f"moeplan profile {name} " in outcome.out


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moeplan", "profile"]
SMALL = ["--device", "cpu", "--largest", "256KiB", "-o", "p.yaml"]


def test_ctrl_c_under_torchrun_and_resume(tmp_path: Path) -> None:
    how: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    path = tmp_path / "p.samples.jsonl"
    run = subprocess.Popen([*TORCHRUN, *SMALL, "--budget", "2m"], **how)
    try:
        while run.poll() is None and not (path.exists() and path.read_text().count("\n") > 14):
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=100)
    finally:
        run.kill()
    assert "stopped:" in err and "--resume goes on" in err and "profile written to p.yaml" in err
    before, partial = load_samples(path)[1], load_profile(tmp_path / "p.yaml")
    assert partial.origins["gemm/bf16"].measured and not any(s.op in cases.RING_OPS for s in before)
    again = [*TORCHRUN, *SMALL, "--budget", "10s", "--resume", "--only", "collectives", "--json"]
    for _ in range(3):
        resumed = len(load_samples(path)[1])
        end = subprocess.run(again, check=False, **how)
        assert end.returncode == 0, end.stderr
        said = json.loads(end.stdout)
        assert said["resumed"] == resumed and said["measured"] > 0
        if said["ended"] == "complete":  # a loaded machine needs longer
            break
    assert said["left"] == 0
    after = load_samples(path)[1]
    assert after[: len(before)] == before
    assert {s.op for s in after[len(before) :]} == {*cases.RING_OPS, "send", "overlap"}
    profile = load_profile(tmp_path / "p.yaml")
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        assert profile.origins[f"collectives/{op} of 2"].measured
