"""What a trial became, by how it ended and what its log says; and what that says about other plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.runtime.launch import Ended
from moeplan.runtime.logs import MEGATRON, Log
from moeplan.runtime.outcomes import Caution, Outcome, cautions, features, outcome, signature
from moeplan.units import GIB

STEP = "iteration 1/ 50 | elapsed time per iteration (ms): {} |\n"
STEPS = "".join(STEP.format(ms) for ms in (9000, 1000, 1200, 1100))
TORCHRUN = """\
[rank3]: Traceback (most recent call last):
[rank3]:     raise ValueError("no such thing")
[rank3]: ValueError: heads (12) are not divisible by 8
E1122 failed (exitcode: 1) local_rank: 3 (pid: 4711) of binary: python
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""


def became(tmp_path: Path, text: str, warmup: int = 1, **ended: Any) -> Outcome:
    (tmp_path / "log.txt").write_text(text)
    log = Log(tmp_path / "log.txt", MEGATRON, 64)
    log.close()
    return outcome(Ended(**{"why": "exit", "seconds": 30.0, **ended}), log, warmup)


@pytest.mark.parametrize(
    ("text", "ended", "kind", "message"),
    [
        (STEPS, {"exit_code": 0}, "done", ""),
        (STEPS, {"why": "enough"}, "done", ""),
        (STEPS, {"why": "timeout"}, "done", "stopped after 30.0 s"),
        (STEPS, {"word": "COMPLETED"}, "done", ""),
        (STEPS, {"word": "TIMEOUT"}, "done", "stopped after"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n" + STEPS, {"exit_code": 0}, "done", ""),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried\n", {"exit_code": 1}, "out_of_memory",
         "torch.OutOfMemoryError: CUDA out of memory. Tried"),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory\n", {"why": "stall"}, "out_of_memory", "CUDA out of memory"),
        ("MemoryError\n", {"exit_code": 1}, "out_of_memory", "MemoryError"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1.0\n", {"exit_code": 1}, "out_of_memory", "oom-kill"),
        ("traceback : Signal 9 (SIGKILL) received by PID 12\n", {"exit_code": 1}, "out_of_memory", "Signal 9"),
        ("", {"exit_code": -9}, "out_of_memory", "killed by force"),
        ("", {"word": "OUT_OF_MEMORY"}, "out_of_memory", "OUT_OF_MEMORY"),
        ("starting\n", {"why": "stall"}, "hang", "no new line in its log, 0 steps done"),
        (STEPS, {"why": "stall"}, "hang", "4 steps done"),
        ("starting\n", {"why": "timeout"}, "hang", "no end within 30.0 s"),
        (TORCHRUN, {"exit_code": 1}, "crash", "ValueError: heads (12) are not divisible by 8"),
        (TORCHRUN, {"why": "stall"}, "crash", "ValueError: heads (12) are not divisible by 8"),
        ("bash: torchrun: command not found\n", {"exit_code": 127}, "crash", "torchrun: command not found"),
        ("", {"exit_code": -11}, "crash", "exit code -11"),
        ("", {"word": "FAILED"}, "crash", "FAILED"),
        ("hello\n", {"exit_code": 0}, "unreadable", "no step line; a step line is 'iteration"),
        (STEP.format(5), {"exit_code": 0}, "unreadable", "1 step lines, of which 1 are warm-up"),
        ("", {"word": "NODE_FAIL"}, "lost", "NODE_FAIL"),
        ("", {"word": "PREEMPTED"}, "lost", "PREEMPTED"),
    ],
)  # fmt: skip
def test_kinds(tmp_path: Path, text: str, ended: dict[str, Any], kind: str, message: str) -> None:
    found = became(tmp_path, text, **ended)
    assert (found.kind, message in found.message) == (kind, True), found
    assert (found.step_s > 0) == (kind == "done") and bool(found.tail) == bool(text and kind != "done")
    assert found.text.startswith("1.10 s a step (3 steps)" if kind == "done" else found.text[:3])


def test_the_median_is_that_of_the_steps_after_warm_up(tmp_path: Path) -> None:
    assert became(tmp_path, STEPS, warmup=0, exit_code=0).step_s == pytest.approx(1.15)
    assert became(tmp_path, STEPS, warmup=2, exit_code=0).step_s == pytest.approx(1.15)
    found = became(tmp_path, STEPS, warmup=1, exit_code=0)
    assert (found.step_s, found.steps) == (pytest.approx(1.1), 3)


def test_messages_without_what_differs_between_runs() -> None:
    one = "RuntimeError: rank 3 at 0x7f12 in /tmp/a/b.py, 12.5 s"
    assert signature(one) == signature("RuntimeError: rank 11 at 0xdead in /home/c.py, 3 s") != signature("ValueError: no")


# ---------------------------------------------------------------- rules

PLAIN = Layout(dp=8, edp=8, dispatcher="alltoall")
TENSOR = Layout(tp=2, dp=4, edp=8, dispatcher="alltoall", sequence_parallel=True)
EXPERT = Layout(dp=8, ep=8, dispatcher="deepep")
EXPERT4 = Layout(dp=8, ep=4, edp=2, dispatcher="deepep")
OVERLAP = Layout(dp=8, ep=8, dispatcher="deepep", ep_overlap=True, cuda_graphs=("attn",))
ALL = [PLAIN, TENSOR, EXPERT, EXPERT4, OVERLAP]
PEAKS = [50 * GIB, 40 * GIB, 60 * GIB, 30 * GIB, 60 * GIB]
DONE, HANG = Outcome(kind="done", step_s=1.0), Outcome(kind="hang", message="silence")


def cared(outcomes: dict[int, Outcome], device: float = 80 * GIB) -> list[Caution]:
    return cautions(ALL, PEAKS, outcomes, device)


def skipped(found: list[Caution]) -> list[int]:
    return [i for i, caution in enumerate(found) if caution.skip]


def crash(message: str) -> Outcome:
    return Outcome(kind="crash", message=message)


def test_nothing_is_held_against_anybody_at_first() -> None:
    assert cared({}) == [Caution()] * len(ALL) and cared({0: DONE}) == [Caution()] * len(ALL)
    assert features(OVERLAP) >= {"EP", "dispatcher deepep", "expert all-to-all overlap", "CUDA graph of attn"}


def test_out_of_memory_forbids_what_needs_as_much() -> None:
    oom = Outcome(kind="out_of_memory")
    found = cared({0: oom})
    assert skipped(found) == [0, 2, 4]
    assert found[2].skip == "predicted to need 60.0 GiB, and a plan predicted to need 50.0 GiB ran out of memory"
    assert skipped(cared({0: oom, 2: DONE})) == []  # one with more ran: the prediction's order is wrong here


def test_observed_memory_moves_the_limit() -> None:
    ran = Outcome(kind="done", step_s=1.0, peak_bytes=48 * GIB)
    found = cared({3: ran}, device=80 * GIB)  # 1.6 times what is predicted
    assert skipped(found) == [0, 2, 4] and "need 1.60 times what is predicted, more than the 80.0 GiB" in found[0].skip
    assert skipped(cared({3: ran, 1: Outcome(kind="done", step_s=1.0, peak_bytes=44 * GIB)})) == []


def test_what_hung_comes_last_and_is_given_up_when_it_hangs_twice() -> None:
    once = cared({2: HANG})
    assert skipped(once) == [] and not once[0].doubts and not once[1].doubts
    assert once[3].doubts == once[4].doubts == ("EP", "dispatcher deepep")
    twice = cared({2: HANG, 3: HANG})
    assert skipped(twice) == [2, 3, 4] and twice[4].skip == "2 plans with EP hung, and none with it ran"
    assert skipped(cared({2: HANG, 3: HANG, 4: DONE})) == []  # one with all of it ran
    assert cared({2: HANG, 4: DONE})[3].doubts == ()


def test_crashes_count_when_they_say_the_same() -> None:
    assert skipped(cared({2: crash("no rank 3"), 3: crash("something else")})) == []
    found = cared({2: crash("no rank 3"), 3: crash("no rank 5")})
    assert skipped(found) == [2, 3, 4] and "2 plans with EP crashed with 'no rank" in found[4].skip
    assert skipped(cared({2: crash("no rank 3"), 3: HANG})) == []


def test_what_all_have_is_never_in_doubt() -> None:
    found = cautions([EXPERT, EXPERT4, OVERLAP], PEAKS[2:], {0: HANG, 1: HANG}, 80 * GIB)
    assert found == [Caution()] * 3
