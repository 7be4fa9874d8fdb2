"""Graphs as text: reading, printing, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.tasks import Graph, Task, duration, parse_graph
from moeplan.errors import ScheduleError
from tests.costmodels.random_graphs import graphs

TEXT = "D1@inter G1@intra<D1 E1@compute<G1,D1 AT@compute+intra!2 R1@inter!-1"


def test_by_hand():
    graph = parse_graph(TEXT)
    assert graph.tasks[2] == Task(name="E1", on=("compute",), after=("G1", "D1"))
    assert graph.tasks[3] == Task(name="AT", on=("compute", "intra"), priority=2)
    assert [task.kind for task in graph.tasks] == ["D", "G", "E", "AT", "R"]
    assert graph.resources == ("inter", "intra", "compute") and not graph.in_order
    assert str(graph) == TEXT
    assert parse_graph("") == Graph(()) and parse_graph("D1@inter").in_order


@given(graph=graphs())
def test_reading_is_the_inverse_of_printing(graph):
    assert parse_graph(str(graph)) == graph


@pytest.mark.parametrize("word", [
    "D1", "1D@inter", "D1@", "D1@inter+", "D1@+inter", "D1@inter<", "D1@inter<,", "D1@inter!x", "D1@Inter", "D-1@inter",
    "D1@a,b",
])  # fmt: skip
def test_words_that_are_no_tasks(word):
    with pytest.raises(ScheduleError, match="is not a task .write it like E1@compute<G1"):
        parse_graph(f"E1@compute {word}")


@pytest.mark.parametrize("text, said", [
    ("D1@inter E1@compute<G1 G1@intra", "E1 waits for G1, which does not stand before it: D1@inter >>>E1@compute<G1<<<"),
    ("D1@inter<D1", "task D1 waits for D1"), ("D1@inter D1@intra", "task D1 stands there twice"),
    ("D1@inter+inter", "task D1 needs at least one resource, each once"),
])  # fmt: skip
def test_graphs_that_cannot_run(text, said):
    with pytest.raises(ScheduleError, match=said):
        parse_graph(text)


@pytest.mark.parametrize(
    "task", [Task(name="D1", on=()), Task(name="D 1", on=("a",)), Task(name="D", on=("a b",)), Task(name="", on=("a",))]
)
def test_tasks_that_cannot_be_written(task):
    with pytest.raises(ScheduleError, match="needs at least one resource|cannot be read back"):
        Graph((task,))


def test_durations():
    task = Task(name="D2", on=("inter",))
    assert duration(task, {"D": 1.0}) == 1.0 and duration(task, {"D": 1.0, "D2": 3.0}) == 3.0
    with pytest.raises(ScheduleError, match="task D2: no duration of kind 'D' .given are D1, E"):
        duration(task, {"D1": 1.0, "E": 2.0})


@given(name=st.text(max_size=3), after=st.text(max_size=3))
def test_whatever_is_accepted_can_be_read_back(name, after):
    try:
        graph = Graph((Task(name="A", on=("x",)), Task(name=name, on=("x",), after=(after,) if after else ())))
    except ScheduleError:
        return
    assert parse_graph(str(graph)) == graph
