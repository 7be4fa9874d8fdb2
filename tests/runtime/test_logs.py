"""Step times and memory out of logs as frameworks write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeplan.errors import UsageError
from moeplan.runtime.logs import DEEPSPEED, FORMS, MEGATRON, Log, LogForm, custom_form, recognised
from moeplan.units import GIB, MIB

MEGATRON_LOG = """\
[rank0]: using world size: 8, data-parallel size: 8
[before the start of training step] datetime: 2026-11-22 10:00:00
 [2026-11-22 10:00:09] iteration        1/      50 | consumed samples:           64 | elapsed time per iteration (ms): 8123.4 | throughput per GPU (TFLOP/s/GPU): 101.2 | learning rate: 1.0E-04 | global batch size:    64 | lm loss: 1.09E+01 |
[Rank 0] (after 1 iterations) memory (MB) | allocated: 30000.25 | max allocated: 51200.50 | reserved: 60000.00 | max reserved: 61000.00
[Rank 4] (after 1 iterations) memory (MB) | allocated: 30000.25 | max allocated: 53248.00 | reserved: 60000.00 | max reserved: 61000.00
 [2026-11-22 10:00:11] iteration        2/      50 | consumed samples:          128 | elapsed time per iteration (ms): 1500.0 | lm loss: 1.08E+01 |
 [2026-11-22 10:00:12] iteration        3/      50 | consumed samples:          192 | elapsed time per iteration (ms): 1490.5 | lm loss: 1.08E+01 |
"""  # noqa: E501
SAMPLES_LOG = """\
[2026-11-22 10:00:00,100] [INFO] [logging.py:96:log_dist] [Rank 0] step=10, skipped=0, lr=[0.0001], mom=[(0.9, 0.95)]
[2026-11-22 10:00:00,101] [INFO] [timer.py:260:stop] epoch=0/micro_step=20/global_step=10, RunningAvgSamplesPerSec=30.1, CurrSamplesPerSec=32.0, MemAllocated=4.5GB, MaxMemAllocated=20.25GB
[2026-11-22 10:00:02,101] [INFO] [timer.py:260:stop] epoch=0/micro_step=40/global_step=20, RunningAvgSamplesPerSec=31.1, CurrSamplesPerSec=64.0, MemAllocated=4.5GB, MaxMemAllocated=20.5GB
[Rank 0] time (ms) | fwd: 300.00 | bwd: 700.00 | bwd_inner: 600.00 | bwd_allreduce: 100.00 | step: 200.00
"""  # noqa: E501
BREAKDOWN_LOG = """\
[Rank 0] time (ms) | fwd_microstep: 150.00 | bwd_microstep: 350.00 | bwd_inner_microstep: 300.00 | bwd_allreduce_microstep: 50.00 | step_microstep: 200.00
[Rank 0] time (ms) | fwd: 300.00 | bwd: 700.00 | bwd_inner: 600.00 | bwd_allreduce: 100.00 | step: 200.00
MA 4.0 GB         Max_MA 9.5 GB         CA 10.0 GB         Max_CA 11 GB
"""  # noqa: E501


def log_of(tmp_path: Path, text: str, form: LogForm, batch: int = 64) -> Log:
    (tmp_path / "log.txt").write_text(text)
    log = Log(tmp_path / "log.txt", form, batch)
    log.close()
    return log


def test_megatron(tmp_path: Path) -> None:
    log = log_of(tmp_path, MEGATRON_LOG, MEGATRON)
    assert log.step_s == pytest.approx([8.1234, 1.5, 1.4905]) and log.peak_bytes == 53248 * MIB
    seconds = log_of(tmp_path, " iteration 5/ 10 | elapsed time per iteration (s): 12.5 |\n", MEGATRON)
    assert seconds.step_s == [12.5]


def test_deepspeed_counts_a_step_once(tmp_path: Path) -> None:
    log = log_of(tmp_path, SAMPLES_LOG, DEEPSPEED)
    assert log.step_s == [2.0, 1.0] and log.peak_bytes == 20.5 * GIB
    log = log_of(tmp_path, BREAKDOWN_LOG, DEEPSPEED)
    assert log.step_s == pytest.approx([1.2]) and log.peak_bytes == 9.5 * GIB
    log = log_of(tmp_path, "steps: 10 loss: 2.5000 iter time (s): 1.250 samples/sec: 51.200\n", DEEPSPEED)
    assert log.step_s == [1.25]
    old = log_of(tmp_path, "0/10, SamplesPerSec=16.0, MemAllocated=1.0GB, MaxMemAllocated=2.0GB\n", DEEPSPEED)
    assert old.step_s == [4.0]


def test_examples_are_recognised(tmp_path: Path) -> None:
    for form in FORMS.values():
        for pattern in form.steps:
            assert len(log_of(tmp_path, pattern.example + "\n", form).step_s) == 1, pattern.example
            assert pattern.example in recognised(form)
        for pattern in form.memory:
            assert log_of(tmp_path, pattern.example + "\n", form).peak_bytes > 0, pattern.example


def test_own_expressions(tmp_path: Path) -> None:
    form = custom_form([r"took (?P<step_ms>[\d.,]+) ms", r"peak (?P<memory_gib>[\d.]+) GiB"])
    log = log_of(tmp_path, "step took 1,250.5 ms\npeak 12.5 GiB\nstep took . ms\npeak 3 GiB\n", form)
    assert log.step_s == pytest.approx([1.2505]) and log.peak_bytes == 12.5 * GIB
    both = custom_form([r"t=(?P<step_s>\S+) mem=(?P<memory_gib>\S+)"])
    log = log_of(tmp_path, "t=2.5 mem=7\nt=nan mem=8\nt=-1 mem=9\n", both)
    assert log.step_s == [2.5] and log.peak_bytes == 9 * GIB


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        (["took ("], "is no regular expression"),
        (["took [0-9]+"], "has no named group"),
        (["(?P<time>x)"], "has a group 'time'"),
        (["(?P<memory_gib>x)"], "no --regex has a group step_ms or step_s"),
    ],
)
def test_expressions_that_will_not_do(expressions: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        custom_form(expressions)


def test_a_log_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    log = Log(path, MEGATRON, 64)
    assert not log.read() and log.step_s == []
    with path.open("ab") as stream:
        for piece in (
            b"start\relapsed time per iter",
            b"ation (ms): 1500.0 |",
            b"\n\xff\xfe bad bytes\nRuntimeError: no\n",
            b"end",
        ):
            stream.write(piece)
            stream.flush()
            assert log.read() and not log.read()
    assert log.step_s == [1.5] and log.errors == ["RuntimeError: no"] and log.tail(2)[-1] == "RuntimeError: no"
    log.close()
    assert log.tail(1) == ["end"]
