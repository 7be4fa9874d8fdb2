"""Random graphs for the property tests of tasks and simulators."""

from __future__ import annotations

from hypothesis import strategies as st

from moeplan.costmodels.tasks import Graph, Task

RESOURCES = ("compute", "intra", "inter")


@st.composite
def graphs(draw, priorities=True):
    """Graphs of up to a dozen tasks, on one resource or several, with or without priorities."""
    tasks: list[Task] = []
    ranked = priorities and draw(st.booleans())
    for i in range(draw(st.integers(1, 12))):
        names = [task.name for task in tasks]
        tasks.append(
            Task(
                name=f"{draw(st.sampled_from(['D', 'E', 'AT']))}{i}",
                on=tuple(draw(st.lists(st.sampled_from(RESOURCES), min_size=1, max_size=3, unique=True))),
                after=tuple(draw(st.lists(st.sampled_from(names), max_size=3, unique=True))) if names else (),
                priority=draw(st.one_of(st.none(), st.integers(-2, 2))) if ranked else None,
            )
        )
    return Graph(tuple(tasks))


@st.composite
def timed_graphs(draw, priorities=True):
    """A graph with seconds for each of its tasks, some 0."""
    graph = draw(graphs(priorities))
    return graph, {task.name: draw(st.one_of(st.just(0.0), st.floats(1e-3, 1e3))) for task in graph.tasks}
