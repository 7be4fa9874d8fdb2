"""The event loop, the recurrence and the ranks: by hand, against each other, laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.simulate import bound_s, in_order, makespan_s, on_ranks, serial_s, simulate
from moeplan.costmodels.tasks import parse_graph
from moeplan.errors import ScheduleError
from tests.costmodels.random_graphs import timed_graphs

QUICK = settings(max_examples=200, deadline=None)


def starts(graph, seconds):
    return {e.name: e.start_s for e in simulate(parse_graph(graph), seconds).events}


def test_streams_work_in_the_order_of_the_text():
    # C1 stands before D2, so D2 waits for it though it could start.
    assert starts("D1@inter E1@compute<D1 C1@inter<E1 D2@inter", {"D": 1, "E": 2, "C": 1}) == {
        "D1": 0,
        "E1": 1,
        "C1": 3,
        "D2": 4,
    }


def test_a_task_on_two_resources_waits_for_both():
    text = "G1@intra D1@inter A1@inter+intra G2@intra D2@inter"
    seconds = {"G1": 3, "D1": 1, "A1": 2, "G2": 1, "D2": 1}
    assert starts(text, seconds) == {"G1": 0, "D1": 0, "A1": 3, "G2": 5, "D2": 5}
    assert makespan_s(parse_graph(text), seconds) == 6 == simulate(parse_graph(text), seconds).makespan_s


def test_priorities():
    # Of those that are ready the highest, and none is interrupted: R1 begins, as D2 is not ready before 1; R2 gives way.
    text = "E1@compute D2@inter<E1 R1@inter!-1 R2@inter!-1 D3@inter!1 D4@inter<E1"
    seconds = {"E": 1.5, "R": 2, "D2": 1, "D3": 1, "D4": 1}
    assert starts(text, seconds) == {"E1": 0, "D3": 0, "R1": 1, "D2": 3, "D4": 4, "R2": 5}


def test_timeline():
    timeline = simulate(parse_graph("D1@inter E1@compute<D1 A1@inter+compute"), {"D": 1.0, "E": 2.0, "A": 3.0})
    assert timeline.makespan_s == 6.0 and timeline.busy_s("inter") == 4.0 and timeline.busy_s("compute") == 5.0
    assert [e.name for e in timeline.events] == ["D1", "E1", "A1"]
    assert simulate(parse_graph(""), {}).makespan_s == 0.0 == makespan_s(parse_graph(""), {})


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_durations_that_are_no_time(bad):
    with pytest.raises(ScheduleError, match="task E1 takes (-1|nan|inf) s"):
        simulate(parse_graph("D1@inter E1@compute"), {"D": 1.0, "E": bad})


def test_ranks_of_unequal_load():
    graph = parse_graph("D1@inter E1@compute<D1 C1@inter<E1 F1@compute<C1")
    ends = on_ranks(graph, {"D": 1.0, "E": np.array([2.0, 5.0]), "C": np.array([1.0, 2.0]), "F": 1.0}, {"D", "C"})
    # The combine starts on both ranks when the experts of the second end, and ends with its longer half.
    assert ends["E1"].tolist() == [3.0, 6.0]
    assert ends["C1"].tolist() == [8.0] and ends["F1"].tolist() == [9.0, 9.0]
    alone = on_ranks(graph, {"D": 1.0, "E": np.array([2.0, 5.0]), "C": 1.0, "F": 1.0}, set())
    assert alone["F1"].tolist() == [5.0, 8.0]


# ---------------------------------------------------------------- laws


@given(drawn=timed_graphs())
@QUICK
def test_every_graph_runs_to_its_end(drawn):
    graph, seconds = drawn
    timeline = simulate(graph, seconds)
    events = {e.name: e for e in timeline.events}
    # No deadlock: every task ran, after those it waits for, alone on its resources.
    assert set(events) == {task.name for task in graph.tasks}
    assert all(events[name].end_s <= events[task.name].start_s for task in graph.tasks for name in task.after)
    for resource in graph.resources:
        used = sorted((e.start_s, e.end_s) for e in timeline.events if resource in e.on)
        assert all(end_s <= start_s for (_, end_s), (start_s, _) in zip(used, used[1:], strict=False))
    assert bound_s(graph, seconds) <= timeline.makespan_s * (1 + 1e-9)
    assert timeline.makespan_s <= serial_s(graph, seconds) * (1 + 1e-9)
    assert simulate(graph, seconds) == timeline


@given(drawn=timed_graphs(priorities=False), more=st.floats(0, 1e3))
@QUICK
def test_the_recurrence_is_the_event_loop(drawn, more):
    graph, seconds = drawn
    ends = in_order(graph, seconds)
    assert {e.name: e.end_s for e in simulate(graph, seconds).events} == pytest.approx(ends)
    assert makespan_s(graph, seconds) == max(ends.values())
    for name in seconds:
        assert makespan_s(graph, {**seconds, name: seconds[name] + more}) >= makespan_s(graph, seconds)


@given(drawn=timed_graphs(priorities=False), together=st.sets(st.sampled_from(["D", "E", "AT"])))
@QUICK
def test_ranks_of_equal_load_are_one(drawn, together):
    graph, seconds = drawn
    ends = in_order(graph, seconds)
    for name, on in on_ranks(graph, {k: np.full(3, v) for k, v in seconds.items()}, together).items():
        assert np.broadcast_to(on, 3).tolist() == [ends[name]] * 3


@given(drawn=timed_graphs(priorities=False), factors=st.lists(st.floats(0.1, 10), min_size=1, max_size=4))
@QUICK
def test_arrays_equal_numbers(drawn, factors):
    graph, seconds = drawn
    scaled = {name: value * np.array(factors) for name, value in seconds.items()}
    for law in (makespan_s, bound_s, serial_s):
        apart = [law(graph, {name: value * f for name, value in seconds.items()}) for f in factors]
        assert law(graph, scaled).tolist() == pytest.approx(apart)


@given(drawn=timed_graphs(priorities=False), slow=st.floats(1, 10), together=st.sets(st.sampled_from(["D", "E", "AT"])))
@QUICK
def test_a_slower_rank_lengthens_no_less(drawn, slow, together):
    graph, seconds = drawn
    both = on_ranks(graph, {k: v * np.array([1.0, slow]) for k, v in seconds.items()}, together)
    alone, slowest = makespan_s(graph, seconds), makespan_s(graph, {k: v * slow for k, v in seconds.items()})
    took = max(float(np.max(end)) for end in both.values())
    assert alone * (1 - 1e-9) <= took <= slowest * (1 + 1e-9)
