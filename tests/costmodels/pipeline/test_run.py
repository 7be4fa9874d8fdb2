"""Running orders: the same times as the event loop of tasks, sends as the closed form has them, laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.constants import OVERLAP
from moeplan.costmodels.pipeline.action import Action, Orders, loop_route
from moeplan.costmodels.pipeline.interleaved import Interleaved
from moeplan.costmodels.pipeline.one_f_one_b import OneForwardOneBackward
from moeplan.costmodels.pipeline.run import run
from moeplan.costmodels.simulate import simulate
from moeplan.costmodels.step import sends_exposed_s
from moeplan.costmodels.tasks import Graph, Task
from moeplan.errors import ScheduleError

SECONDS = st.floats(0.1, 10.0)


def orders_of(p: int, v: int, m: int) -> Orders:
    return Interleaved().orders(p, v, m) if v > 1 else OneForwardOneBackward().orders(p, v, m)


def graph_of(orders: Orders) -> Graph:
    """The same orders as named tasks; numbers are micro-batch, rank, chunk with two digits each."""

    def name(kind: str, batch: int, place: tuple[int, int]) -> str:
        return f"{kind}{batch:02d}{place[0]:02d}{place[1]:02d}"

    tasks: dict[str, Task] = {}
    at = [0] * len(orders.rows)
    while any(at[r] < len(row) for r, row in enumerate(orders.rows)):
        for r, row in enumerate(orders.rows):
            while at[r] < len(row):
                action = row[at[r]]
                route = orders.route_of(action.batch)
                i = route.index((r, action.chunk))
                if action.kind == "F":
                    after = (name("F", action.batch, route[i - 1]),) if i else ()
                else:
                    after = (name("B", action.batch, route[i + 1]),) if i + 1 < len(route) else ()
                if any(a not in tasks for a in after):
                    break
                own = name(action.kind, action.batch, route[i])
                tasks[own] = Task(name=own, on=(f"rank{r}",), after=after)
                at[r] += 1
    return Graph(tuple(tasks.values()))


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_equal_to_the_event_loop(p: int, v: int, groups: int, seed: int) -> None:
    orders = orders_of(p, v, p * groups)
    rng = np.random.default_rng(seed)
    seconds = {kind: rng.random((p, v, p * groups)) for kind in "FB"}
    graph = graph_of(orders)
    lengths = {}
    for task in graph.tasks:
        batch, rank, chunk = (int(task.name[i : i + 2]) for i in (1, 3, 5))
        lengths[task.name] = float(seconds[task.kind][rank, chunk, batch])
    events = {e.name: e for e in simulate(graph, lengths).events}
    passes = run(orders, seconds)
    assert len(events) == len(passes.rank)
    for rank, chunk, batch, kind, start, end in zip(
        passes.rank, passes.chunk, passes.batch, passes.kind, passes.start_s, passes.end_s, strict=True
    ):
        event = events[f"{'FB'[kind]}{batch:02d}{rank:02d}{chunk:02d}"]
        assert (event.start_s, event.end_s) == (pytest.approx(start), pytest.approx(end))


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 5), SECONDS, SECONDS, st.floats(0.0, 0.6))
def test_sends_of_equal_ranks_are_those_of_the_closed_form(
    p: int, v: int, groups: int, f: float, b: float, share: float
) -> None:
    m, exposed = p * groups, OVERLAP.send_exposed
    send_s = share * min(f, b) / v
    passes = run(orders_of(p, v, m), {"F": f / v, "B": b / v}, send_s=send_s, exposed=exposed)
    # The passes of the fill are longer by the exposed share as well, for which their sends are the less hidden.
    closed = (m + (p - 1) / v) * (f + b) + float(sends_exposed_s(send_s, m, p, v))
    assert passes.makespan_s == pytest.approx(closed, rel=1e-9)


def test_a_busy_link_holds_sends_up() -> None:
    orders = OneForwardOneBackward().orders(2, 1, 8)
    free = run(orders, {"F": 1.0, "B": 1.0}, send_s=0.5, exposed=0.25).makespan_s
    full = run(orders, {"F": 1.0, "B": 1.0}, send_s=5.0, exposed=0.25)
    assert full.makespan_s > free + 8 * 2 * 0.25 * 4.5
    link = sorted({(s, a) for s, a, o in zip(full.sent_s, full.arrived_s, full.source, strict=True) if o >= 0 and o < 16})
    assert all(end <= start + 1e-12 for (_, end), (start, _) in zip(link, link[1:], strict=False))
    assert all(end - start == pytest.approx(5.0) for start, end in link)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.data())
def test_monotone_and_deterministic(p: int, groups: int, seed: int, data: st.DataObject) -> None:
    v = data.draw(st.integers(1, 3)) if p > 1 else 1
    orders, m = orders_of(p, v, p * groups), p * groups
    seconds: dict[str, Any] = {kind: np.random.default_rng(seed).random((p, v, m)) for kind in "FB"}
    before = run(orders, seconds, send_s=0.1, exposed=0.3)
    again = run(orders, seconds, send_s=0.1, exposed=0.3)
    assert np.array_equal(before.start_s, again.start_s) and np.array_equal(before.end_s, again.end_s)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in (p, v, m))
    longer = {kind: values.copy() for kind, values in seconds.items()}
    longer["F"][place] += 1.0
    after = run(orders, longer, send_s=0.1, exposed=0.3)
    assert (after.end_s >= before.end_s - 1e-12).all()


@given(st.integers(1, 5), st.integers(1, 9), SECONDS, SECONDS)
def test_passes_follow_each_other(p: int, m: int, f: float, b: float) -> None:
    passes = run(orders_of(p, 1, m), {"F": f, "B": b}, send_s=0.2, exposed=0.5, begin_s=np.arange(p))
    for r in range(p):
        here = passes.of_rank(r)
        assert passes.start_s[here][0] >= r
        assert (passes.start_s[here][1:] >= passes.end_s[here][:-1]).all()
    waits = passes.source >= 0
    assert (passes.start_s[waits] >= passes.arrived_s[waits] - 1e-12).all()
    assert (passes.sent_s[waits] >= -1e-12).all()


def test_joined_passes_run_as_one() -> None:
    rows = (Action("F", 0), Action("F", 1, 0, True), Action("B", 0), Action("B", 1))
    passes = run(Orders((rows,), (loop_route(1, 1),), 2), {"F": 1.0, "B": 2.0, "F&B": 2.5})
    assert passes.start_s.tolist() == [0.0, 1.0, 1.0, 3.5] and passes.end_s.tolist() == [1.0, 3.5, 3.5, 5.5]


def test_a_deadlock_is_told() -> None:
    one = tuple(Action(k, i) for k, i in (("F", 0), ("B", 0), ("F", 1), ("B", 1)))
    two = tuple(Action(k, i) for k, i in (("F", 1), ("F", 0), ("B", 0), ("B", 1)))
    with pytest.raises(ScheduleError, match=r"rank 0 waits for ever at B0\.0 F1\.0"):
        run(Orders((one, two), (loop_route(2, 1),), 2), {"F": 1.0, "B": 1.0})
