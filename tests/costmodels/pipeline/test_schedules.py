"""Every pipeline schedule: its orders run, its closed forms are what they take, and its refusals are clear."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moeplan.costmodels.peak import in_flight
from moeplan.costmodels.pipeline.action import Orders, check_orders
from moeplan.costmodels.pipeline.base import PassSeconds, PipelineSchedule
from moeplan.costmodels.pipeline.dualpipe import DualPipe
from moeplan.costmodels.pipeline.gpipe import GPipe
from moeplan.costmodels.pipeline.interleaved import Interleaved
from moeplan.costmodels.pipeline.one_f_one_b import OneForwardOneBackward
from moeplan.costmodels.pipeline.run import Passes, run
from moeplan.costmodels.pipeline.schedules import SCHEDULES, find_pipeline_schedule
from moeplan.costmodels.pipeline.zero_bubble import ZeroBubble
from moeplan.errors import ScheduleError, UnknownNameError

SECONDS = st.floats(0.01, 10.0)


def held(orders: Orders, weights: list[float]) -> list[float]:
    """The most that each rank holds, when a micro-batch in flight in chunk c weighs weights[c]."""
    out = []
    for row in orders.rows:
        now = most = 0.0
        for action in row:
            now += weights[action.chunk] * (action.kind == "F")
            most = max(most, now)
            now -= weights[action.chunk] * (action.kind in "BW")
        out.append(most)
    return out


def idle_s(passes: Passes, ranks: int) -> list[float]:
    """Seconds in which each rank has nothing to do; joined passes count once."""
    spans = [dict.fromkeys(zip(passes.start_s[r], passes.end_s[r], strict=True)) for r in map(passes.of_rank, range(ranks))]
    return [passes.makespan_s - sum(end - start for start, end in s) for s in spans]


@pytest.mark.parametrize(
    ("schedule", "stages", "chunks", "batches"),
    [
        (GPipe(), 3, 1, 5),
        (OneForwardOneBackward(), 4, 1, 2),
        (OneForwardOneBackward(), 1, 1, 3),
        (Interleaved(), 3, 2, 9),
        (Interleaved(group=5), 3, 2, 8),
        (Interleaved(ahead=1), 4, 2, 8),
        (ZeroBubble(), 4, 1, 6),
        (ZeroBubble(), 4, 1, 2),
        (DualPipe(), 6, 2, 14),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_orders_run(schedule: PipelineSchedule, stages: int, chunks: int, batches: int) -> None:
    orders = schedule.orders(stages, chunks, batches)
    check_orders(orders)
    passes = run(orders, dict.fromkeys(["F", "B", "I", "W", "F&B"], 1.0))
    assert len(passes.rank) == sum(map(len, orders.rows)) and passes.makespan_s > 0


@given(st.sampled_from([GPipe(), OneForwardOneBackward()]), st.integers(1, 8), st.integers(1, 20), SECONDS, SECONDS)
def test_balanced_plain(schedule: PipelineSchedule, p: int, m: int, f: float, b: float) -> None:
    orders = schedule.orders(p, 1, m)
    passes = run(orders, {"F": f, "B": b})
    assert passes.makespan_s == pytest.approx((m + p - 1) * (f + b), rel=1e-12)
    assert passes.makespan_s == pytest.approx(m * (f + b) + schedule.bubble_s(p, 1, PassSeconds(forward=f, backward=b)))
    assert held(orders, [1.0]) == [schedule.in_flight(p, 1, r, m) for r in range(p)]


@given(st.data(), st.integers(2, 7), st.integers(1, 4), st.integers(1, 4), SECONDS, SECONDS)
def test_balanced_interleaved(data: st.DataObject, p: int, v: int, groups: int, f: float, b: float) -> None:
    group = p + data.draw(st.integers(0, 3))
    left = data.draw(st.sampled_from([0, *range(p, group)]))
    m, schedule = group * groups + left, Interleaved(group=group)
    orders = schedule.orders(p, v, m)
    passes = run(orders, {"F": f / v, "B": b / v})
    assert passes.makespan_s == pytest.approx((m + (p - 1) / v) * (f + b), rel=1e-12)
    assert passes.makespan_s == pytest.approx(m * (f + b) + schedule.bubble_s(p, v, PassSeconds(forward=f, backward=b)))
    assert held(orders, [1.0 / v] * v) == pytest.approx([schedule.in_flight(p, v, r, m) for r in range(p)])


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 4))
def test_in_flight_is_that_of_the_memory_model(p: int, v: int, groups: int) -> None:
    schedule: PipelineSchedule = Interleaved() if v > 1 else OneForwardOneBackward()
    for r in range(p):
        assert schedule.in_flight(p, v, r, p * groups) == pytest.approx(float(in_flight(p, v, r, p * groups)))


@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.data())
def test_compositions_hold_the_peak_of_unequal_chunks(p: int, v: int, groups: int, more: int, data: st.DataObject) -> None:
    schedule, m = Interleaved(group=p + more), (p + more) * groups
    weights = data.draw(st.lists(st.floats(0.0, 10.0), min_size=v, max_size=v))
    peaks = held(schedule.orders(p, v, m), weights)
    for r in range(p):
        counts = schedule.compositions(p, v, r, m)
        assert (counts @ np.array(weights)).max() == pytest.approx(peaks[r], abs=1e-9)
        assert counts.sum(axis=1).tolist() == [round(v * schedule.in_flight(p, v, r, m))] * len(counts)


def test_megatrons_table_of_groups() -> None:
    row = Interleaved(group=3).orders(2, 2, 5).rows[0]
    order = [(a.batch, a.chunk) for a in row if a.kind == "F"]
    # Megatron-Core, schedules.py: the table for two ranks, groups of three, five micro-batches, two chunks
    assert [b for b, _ in order] == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert [c for _, c in order] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]


@given(st.integers(1, 8), st.integers(0, 16), SECONDS, SECONDS, st.floats(0.0, 1.0))
def test_zero_bubble(p: int, more: int, f: float, i: float, share: float) -> None:
    schedule, m, w = ZeroBubble(), p + more, share * min(f, i)
    orders = schedule.orders(p, 1, m)
    makespan_s = run(orders, {"F": f, "I": i, "W": w}).makespan_s
    bubble_s = schedule.bubble_s(p, 1, PassSeconds(forward=f, backward=i + w, weight=w))
    assert makespan_s == pytest.approx(m * (f + i + w) + bubble_s, rel=1e-9)
    assert makespan_s <= (m + p - 1) * (f + i + w) * (1 + 1e-12)
    assert held(orders, [1.0]) == [schedule.in_flight(p, 1, r, m) for r in range(p)] == [p] * p


@given(st.integers(1, 6), st.integers(1, 10), SECONDS, SECONDS, SECONDS)
def test_zero_bubble_is_a_lower_bound_elsewhere(p: int, m: int, f: float, i: float, w: float) -> None:
    assume(m >= p)
    makespan_s = run(ZeroBubble().orders(p, 1, m), {"F": f, "I": i, "W": w}).makespan_s
    bubble_s = ZeroBubble().bubble_s(p, 1, PassSeconds(forward=f, backward=i + w, weight=w))
    assert makespan_s >= (m * (f + i + w) + bubble_s) * (1 - 1e-12)


@given(st.integers(1, 5), st.integers(0, 5), SECONDS, st.floats(0.0, 1.0), st.booleans(), st.floats(0.67, 1.0))
def test_dualpipe(half: int, more: int, f: float, share: float, whole: bool, overlap: float) -> None:
    """Exact where F = I, and either nothing hides in F&B or W = F, F&B being no shorter than B."""
    p, m = 2 * half, 2 * (2 * half + more)
    w = share * f if whole else f
    joined = 2 * f + w if whole else overlap * (2 * f + w)
    orders = DualPipe().orders(p, 2, m)
    passes = run(orders, {"F": f, "B": f + w, "I": f, "W": w, "F&B": joined})
    bubble_s = DualPipe().bubble_s(p, 2, PassSeconds(forward=f, backward=f + w, weight=w, joined=joined))
    assert max(idle_s(passes, p)) == pytest.approx(bubble_s, abs=1e-9 * passes.makespan_s)
    assert held(orders, [1.0, 1.0]) == [DualPipe().in_flight(p, 2, r, m) for r in range(p)] == [p + 1] * p


def test_bubbles_of_deepseeks_table() -> None:
    seconds = PassSeconds(forward=1.0, backward=2.0, weight=1.0, joined=3.0)
    found = {s.name: s.bubble_s(8, 2 if s.name == "dualpipe" else 1, seconds) for s in SCHEDULES}
    assert found == {"gpipe": 21.0, "1f1b": 21.0, "interleaved": 21.0, "zero-bubble": 7.0, "dualpipe": 6.0}
    assert [s.copies for s in SCHEDULES] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_closed_forms_take_arrays(schedule: PipelineSchedule) -> None:
    p, v, m = np.array([2, 4, 8]), np.array([2, 2, 2]), np.array([16, 17, 32])
    f = np.array([1.0, 2.0, 3.0])
    seconds = PassSeconds(forward=f, backward=2 * f, weight=f, joined=3 * f)
    assert schedule.bubble_s(p, v, seconds).shape == (3,)
    for i in range(3):
        one = PassSeconds(forward=f[i], backward=2 * f[i], weight=f[i], joined=3 * f[i])
        assert schedule.bubble_s(p, v, seconds)[i] == schedule.bubble_s(p[i], v[i], one)
        assert schedule.in_flight(p, v, p - 1, m)[i] == schedule.in_flight(p[i], v[i], p[i] - 1, m[i])


@pytest.mark.parametrize(
    ("schedule", "sizes", "message"),
    [
        (GPipe(), (2, 2, 4), "one chunk a rank is needed, not 2"),
        (OneForwardOneBackward(), (2, 2, 4), "'interleaved' runs several"),
        (OneForwardOneBackward(), (0, 1, 4), "a pipeline schedule of 0 ranks"),
        (OneForwardOneBackward(), (2, 1, 0), "a pipeline schedule of 0 micro-batches"),
        (Interleaved(), (1, 2, 4), "2 chunks on one rank"),
        (Interleaved(), (4, 2, 2), "2 micro-batches do not fill one group of 4"),
        (Interleaved(), (4, 2, 6), "6 micro-batches leave 2 beside groups of 4: 0, or at least 4, may be left"),
        (Interleaved(group=3), (4, 2, 6), "groups of 3 micro-batches are smaller than the 4 ranks"),
        (ZeroBubble(), (2, 2, 4), "one chunk a rank is needed"),
        (DualPipe(), (4, 1, 8), "two chunks a rank are needed"),
        (DualPipe(), (3, 2, 8), "both must be even"),
        (DualPipe(), (4, 2, 6), "6 micro-batches are fewer than twice the 4 ranks"),
    ],
)
def test_refusals(schedule: PipelineSchedule, sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.orders(*sizes)


def test_names() -> None:
    for schedule in SCHEDULES:
        assert find_pipeline_schedule(schedule.name) is schedule and schedule.title and schedule.source
    with pytest.raises(UnknownNameError, match="did you mean 'zero-bubble'"):
        find_pipeline_schedule("zerobubble")
