"""Statistics of repeats by hand and by simulation, when repeats end, and what the timers of host and device do."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.profiles import timing
from moeplan.profiles.timing import MOST_BATCH, MOST_REPEATS, Clock, clocks, merged, repeated, summary

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)


def test_summary_by_hand() -> None:
    """Of ten repeats the 2nd least and 2nd greatest enclose the median with 1 - 22/1024 = 97.9 %; with the 3rd it is 89 %."""
    found = summary([10.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0])
    assert found.seconds == 5.5
    assert found.spread == pytest.approx((9.0 - 2.0) / 2 / 5.5)
    assert found.outliers == 0
    assert found.times_s[:3] == (10.0, 1.0, 9.0)


@pytest.mark.parametrize(("n", "rank"), [(5, 0), (6, 1), (8, 1), (9, 2), (10, 2), (15, 4), (20, 6), (50, 18), (100, 40)])
def test_ranks_are_those_of_published_tables(n: int, rank: int) -> None:
    """Conover, Practical Nonparametric Statistics: of 20 values the 6th and the 15th, of 50 the 18th and the 33rd."""
    assert timing._interval_rank(n) == rank


def test_a_slow_repeat_is_an_outlier_and_changes_nothing() -> None:
    usual = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01]
    found = summary([*usual, 7.0])
    assert found.outliers == 1
    assert (found.seconds, found.spread) == (summary(usual).seconds, summary(usual).spread)
    assert 7.0 in found.times_s


def test_two_states_of_a_machine_are_no_outliers() -> None:
    """More than half of the repeats are equal, so that their deviation is 0; the others are still not left out."""
    found = summary([1.0, 2.0] * 5 + [1.0])
    assert (found.seconds, found.outliers) == (1.0, 0)
    assert found.spread == 0.5


def test_equal_repeats_but_for_the_timer_have_no_outliers() -> None:
    found = summary([1.0] * 9 + [1.01])
    assert (found.seconds, found.spread, found.outliers) == (1.0, 0.0, 0)


def test_few_repeats_know_little() -> None:
    assert summary([3.0]).spread == 1.0
    assert summary([1.0, 1.1]).spread == pytest.approx(0.05 / 1.05 * 0.95 / 0.5)
    assert summary([1.0, 1.05, 1.1]).spread == pytest.approx(0.05 / 1.05 * 0.95 / 0.75)


@settings(deadline=None)
@given(TIMES, st.sampled_from([0.125, 0.5, 4.0]))
def test_units_do_not_matter(times: list[float], unit: float) -> None:
    one, other = summary(times), summary([t * unit for t in times])
    assert (other.seconds, other.spread, other.outliers) == (one.seconds * unit, one.spread, one.outliers)


@settings(deadline=None)
@given(TIMES, st.randoms())
def test_order_does_not_matter(times: list[float], random: Any) -> None:
    mixed = list(times)
    random.shuffle(mixed)
    one, other = summary(times), summary(mixed)
    assert (one.seconds, one.spread, one.outliers) == (other.seconds, other.spread, other.outliers)


@settings(deadline=None)
@given(TIMES)
def test_most_repeats_are_kept_and_the_median_is_between_them(times: list[float]) -> None:
    found = summary(times)
    assert found.outliers <= len(times) * 0.2
    assert min(times) <= found.seconds <= max(times)
    assert found.times_s == tuple(times)


@pytest.mark.parametrize("n", [7, 15, 40])
def test_the_interval_holds_the_true_median(n: int) -> None:
    """Skewed times: in 95 % of cases at least, less what leaving out outliers costs."""
    draws = np.random.default_rng(5).gamma(4.0, 0.02, (2000, n)) + 1.0
    truth = float(np.median(np.random.default_rng(6).gamma(4.0, 0.02, 400_000))) + 1.0
    rows = [np.sort(row) for row in draws]
    j = timing._interval_rank(n)
    assert np.mean([row[j - 1] <= truth <= row[n - j] for row in rows]) >= 0.95
    found = [summary(row) for row in draws]
    assert np.mean([abs(each.seconds - truth) <= 2 * each.spread * each.seconds for each in found]) >= 0.95


def test_visits_apart_are_in_the_spread() -> None:
    """Each visit alone is sure of its time; they differ by 20 %, which no single one can know."""
    first, second = summary([1.0] * 10), summary([1.2] * 10)
    both = merged([first, second])
    assert both.seconds == pytest.approx(1.1)
    assert both.spread == pytest.approx(0.1 / 1.1)
    assert merged([first]) == first
    assert len(both.times_s) == 20


class Machine:
    """Runs of given lengths on a clock of its own."""

    def __init__(self, length: Callable[[int], float]) -> None:
        self.time, self.runs, self.batches, self.length = 0.0, 0, [], length

    def batch(self, size: int) -> float:
        start = self.time
        for _ in range(size):
            self.time += self.length(self.runs)
            self.runs += 1
        self.batches.append(size)
        return self.time - start

    def now(self) -> float:
        return self.time


def test_repeats_end_when_the_time_is_known() -> None:
    machine = Machine(lambda run: 1.0 if run > 3 else 9.0)
    found = repeated(machine.batch, 1000.0, now=machine.now)
    assert (found.seconds, found.spread) == (1.0, 0.0), "slow first runs are warm-up"
    assert machine.time < 400, "and the rest of the budget is left"


def test_repeats_end_with_the_budget() -> None:
    machine = Machine(lambda run: 1.0 + run % 2)
    found = repeated(machine.batch, 60.0, now=machine.now)
    assert found.spread > 0.03
    assert 60.0 <= machine.time <= 62.0


def test_an_operation_longer_than_the_budget_still_gets_three_repeats() -> None:
    machine = Machine(lambda run: 100.0 + run)
    found = repeated(machine.batch, 1.0, now=machine.now)
    assert found.times_s == (102.0, 103.0, 104.0)


def test_short_operations_are_batched() -> None:
    machine = Machine(lambda run: 2.0**-20)
    found = repeated(machine.batch, 0.1, least_s=50 * 2.0**-20, now=machine.now)
    assert machine.batches[-1] == 50
    assert found.seconds == 2.0**-20


def test_batches_and_repeats_have_a_limit() -> None:
    machine = Machine(lambda run: 1e-3 * (1 + run // (10 * MOST_BATCH) % 2))
    found = repeated(machine.batch, 200.0, least_s=10.0, now=machine.now)
    assert max(machine.batches) == MOST_BATCH
    assert len(found.times_s) == MOST_REPEATS


def test_the_clock_of_a_cpu_measures_what_runs() -> None:
    import time

    done = []
    found = Clock("cpu").measure(lambda: (done.append(1), time.sleep(2e-3)), 0.1)
    assert found.seconds >= 2e-3
    assert len(done) >= len(found.times_s) >= 3


class FakeCuda:
    """Writes down what a GPU is told; kernels take 1 ms, and the host needs 1 ms to queue one."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.queued_s = 0.0

    def get_device_properties(self, device: Any) -> Any:
        return types.SimpleNamespace(total_memory=2**36, L2_cache_size=2**29, clock_rate=1_000_000)

    def device(self, device: Any) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def _sleep(self, cycles: int) -> None:
        self.told.append(("sleep", cycles))

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return types.SimpleNamespace(
            record=lambda: self.told.append("record"),
            synchronize=lambda: self.told.append("wait"),
            elapsed_time=lambda end: 4.0,
        )


def test_the_timer_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush, pause as long as the host needs to queue the batch, event, runs, event; milliseconds become seconds."""
    cuda, host = FakeCuda(), iter([1.0, 1.001, 2.0, 2.002])
    sizes = []

    def empty(size: int, **_: Any) -> Any:
        sizes.append(size)
        return types.SimpleNamespace(zero_=lambda: cuda.told.append("flush"))

    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(host))
    torch = types.SimpleNamespace(cuda=cuda, empty=empty, uint8=None)
    time_batch = timing._EventTimer(torch, "cuda:0").batches(lambda: cuda.told.append("run"))
    assert sizes == [2**30], "twice the cache, which is more than the usual buffer and less than 1/64 of the memory"
    assert time_batch(1) == pytest.approx(4e-3)
    assert cuda.told == ["flush", "record", "run", "record", "wait"], "nothing is known yet of the host"
    cuda.told.clear()
    assert time_batch(2) == pytest.approx(4e-3)
    assert [cuda.told[0], *cuda.told[2:]] == ["flush", "record", "run", "run", "record", "wait"]
    assert cuda.told[1] == ("sleep", pytest.approx(1.5 * 2 * 1e-3 * 1e9, rel=1e-6))


def test_clocks_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu MHz\t\t: 2000.0\nprocessor\t: 1\ncpu MHz\t\t: 3000.0\n")
    assert timing._cpu_mhz(info) == 2500.0
    assert timing._cpu_mhz(tmp_path / "none") is None
    info.write_text("processor\t: 0\n")
    assert timing._cpu_mhz(info) is None
    monkeypatch.setattr(timing, "_read", {})
    read = iter([2500.0, 1.0])
    monkeypatch.setattr(timing, "_cpu_mhz", lambda: next(read))
    assert clocks("cpu") == (2500.0, None)
    assert clocks("cpu") == (2500.0, None), "read again only after a while"


def test_statistics_need_no_torch() -> None:
    code = (
        "import sys, moeplan.profiles.timing as t, moeplan.profiles.cases; t.summary([1.0]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
