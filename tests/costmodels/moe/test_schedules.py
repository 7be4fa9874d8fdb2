"""All schedules of a layer: a row each, and laws that hold for every one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize, imperfect_s, total
from moeplan.costmodels.moe.schedules import PAIR_SCHEDULES, SCHEDULES, find_schedule
from moeplan.costmodels.simulate import bound_s, makespan_s, on_ranks, serial_s, simulate
from moeplan.costmodels.tasks import parse_graph
from moeplan.errors import UnknownNameError
from tests.costmodels.moe.vectors import LINES, QUICK, all_lines, sizes, stacked

ALL = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
CLOSED = pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.name != "lina"], ids=lambda s: s.name)
DIRECTIONS = st.sampled_from(["forward", "backward"])
FEW = st.integers(1, 9)
LINE = AlphaBeta(startup_s=1e-4, unit_s=1e-9)
LINE_SET = Lines(**dict.fromkeys(LINES, LINE))
SIZE = MoeSize(token_bytes=1e6, slot_bytes=2e6, expert_flop=1e9, mp_ranks=2, esp_ranks=2, ep_ranks=2)
# Name, whether chunked, where it runs, and seconds of one and of three chunks whose every task takes 1 s, R and M too.
ROWS = [
    ("baseline", False, (), 6.0, 6.0), ("replicated-baseline", False, (), 6.0, 6.0),
    ("deepspeed", False, ("deepspeed",), 7.0, 7.0), ("s1", False, (), 5.0, 5.0), ("s2", False, (), 8.0, 8.0),
    ("hierarchical", False, ("megatron",), 7.0, 7.0), ("tutel", True, (), 7.0, 14.0),
    ("tutel-improved", True, (), 7.0, 14.0), ("pipemoe", True, (), 6.0, 14.0),
    ("lina", True, (), 6.0, 14.0), ("fsmoe-no-iio", True, (), 6.0, 14.0), ("fsmoe", True, (), 6.0, 9.0),
    ("flowmoe", True, (), 8.0, 17.0), ("shared-overlap", False, ("megatron",), 7.0, 7.0), ("comet", True, (), 6.0, 9.0),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rows(row):
    name, chunked, runs_on, once_s, thrice_s = row
    schedule = find_schedule(name)
    assert (schedule.name, schedule.chunked, schedule.runs_on) == (name, chunked, runs_on)
    assert schedule.title and schedule.source
    ones = dict.fromkeys(schedule.parts(SIZE, LINE_SET, 1, "forward"), 1.0)
    assert (schedule.seconds(1, ones, SIZE), schedule.seconds(3, ones, SIZE)) == (once_s, thrice_s)


def test_every_schedule_has_a_row():
    assert [schedule.name for schedule in SCHEDULES] == [row[0] for row in ROWS]
    assert [pair.name for pair in PAIR_SCHEDULES] == ["1f1b-overlap", "1f1b-overlap-delayed"]


def test_find():
    assert find_schedule("s2") is SCHEDULES[4]
    with pytest.raises(UnknownNameError, match="unknown MoE schedule 'fsmo' .did you mean 'fsmoe'"):
        find_schedule("fsmo")


@st.composite
def durations(draw, schedule, size, lines, degree=1):
    """Random seconds for every kind of a schedule, some 0."""
    kinds = schedule.parts(size, lines, degree, "forward")
    return {kind: draw(st.one_of(st.just(0.0), st.floats(1e-3, 1e3))) for kind in kinds}


@ALL
@given(data=st.data(), size=sizes(), lines=all_lines, degree=FEW)
@QUICK
def test_the_closed_form_is_the_makespan(schedule, data, size, lines, degree):
    graph, parts = schedule.graph(degree, size), data.draw(durations(schedule, size, lines))
    took_s = schedule.seconds(degree, parts, size)
    timeline = simulate(graph, parts)
    assert took_s == pytest.approx(timeline.makespan_s, rel=1e-9)
    if graph.in_order:
        assert took_s == pytest.approx(makespan_s(graph, parts), rel=1e-9)
        alike = on_ranks(graph, {k: np.full((3, 1), v) for k, v in parts.items()}, {"D", "G", "S", "C"})
        assert max(v.max() for v in alike.values()) == pytest.approx(took_s, rel=1e-9)
    assert took_s >= bound_s(graph, parts) * (1 - 1e-12)
    alone_s = schedule.serial_seconds(degree, parts, size)
    assert alone_s == pytest.approx(serial_s(graph, parts), rel=1e-9) and took_s <= alone_s * (1 + 1e-12)
    assert imperfect_s(took_s, alone_s, 1.0) == pytest.approx(alone_s)
    assert parse_graph(str(graph)) == graph and simulate(graph, parts) == timeline


@ALL
@given(size=sizes(), lines=all_lines, degree=FEW, direction=DIRECTIONS)
@QUICK
def test_what_the_parts_lack_takes_nothing(schedule, size, lines, degree, direction):
    parts = schedule.parts(size, lines, degree, direction)
    graph = schedule.graph(degree, size)
    assert {task.kind for task in graph.tasks} <= set(parts)
    assert schedule.seconds(degree, parts, size) == pytest.approx(simulate(graph, parts).makespan_s, rel=1e-9)
    spare = {kind: value for kind, value in parts.items() if kind in "DECGS" or np.any(value)}
    assert schedule.seconds(degree, spare, size) == pytest.approx(schedule.seconds(degree, parts, size))


@CLOSED
@given(data=st.data(), size=sizes(), lines=all_lines, degree=FEW, more=st.floats(1, 10))
@QUICK
def test_longer_tasks_take_no_less(schedule, data, size, lines, degree, more):
    # Not so by priority: a longer expert may let a piece of gradients in.
    parts = data.draw(durations(schedule, size, lines))
    kind = data.draw(st.sampled_from(sorted(parts)))
    longer_s = schedule.seconds(degree, {**parts, kind: parts[kind] * more + more - 1}, size)
    assert longer_s >= schedule.seconds(degree, parts, size) * (1 - 1e-12)


@ALL
@given(rows=st.lists(st.tuples(sizes(), all_lines), min_size=1, max_size=4), degree=FEW, direction=DIRECTIONS)
@QUICK
def test_arrays_equal_numbers(schedule, rows, degree, direction):
    size, lines = stacked([s for s, _ in rows]), Lines(**{k: stacked([getattr(x, k) for _, x in rows]) for k in LINES})
    for kind, values in schedule.amounts(size, direction).items():
        assert np.broadcast_to(values, len(rows)).tolist() == pytest.approx(
            [schedule.amounts(s, direction)[kind] for s, _ in rows]
        )
    together = schedule.parts(size, lines, np.full(len(rows), degree), direction) | {"R": np.arange(len(rows)) * 1e-3}
    apart = [{**schedule.parts(s, x, degree, direction), "R": i * 1e-3} for i, (s, x) in enumerate(rows)]
    took = [float(schedule.seconds(degree, parts, s)) for parts, (s, _) in zip(apart, rows, strict=True)]
    assert np.broadcast_to(schedule.seconds(degree, together, size), len(rows)).tolist() == pytest.approx(took)
    alone = [float(schedule.serial_seconds(degree, parts, s)) for parts, (s, _) in zip(apart, rows, strict=True)]
    assert np.broadcast_to(schedule.serial_seconds(degree, together, size), len(rows)).tolist() == pytest.approx(alone)


@ALL
@given(
    size=sizes(),
    lines=all_lines,
    degree=FEW,
    more=st.floats(1, 10),
    name=st.sampled_from(["token_bytes", "slot_bytes", "expert_flop"]),
)
@QUICK
def test_larger_layers_take_no_less(schedule, size, lines, degree, more, name):
    larger = replace(size, **{name: getattr(size, name) * more})
    for direction in ("forward", "backward"):
        before, after = (schedule.seconds(degree, schedule.parts(s, lines, degree, direction), s) for s in (size, larger))
        assert after >= before * (1 - 1e-12)
    # Backward moves the same and computes twice as much.
    there, back = schedule.amounts(size, "forward"), schedule.amounts(size, "backward")
    assert back["E"] == 2 * there["E"] and all(back[k] == there[k] for k in there if k not in "EXY")
    ahead, behind = (schedule.parts(size, lines, degree, d) for d in ("forward", "backward"))
    assert behind["E"] == pytest.approx(2 * ahead["E"]) and total(behind, "DGASCM") == pytest.approx(total(ahead, "DGASCM"))
