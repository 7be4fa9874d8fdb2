"""Executed graphs: every lane in the order of the text, every dependency kept, on threads and on (imitated) streams."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.costmodels.simulate import Timeline, simulate
from moeplan.costmodels.tasks import Graph, parse_graph
from moeplan.errors import ScheduleError
from moeplan.runtime.executor import StreamLanes, ThreadLanes, execute, lanes_for
from tests.costmodels.random_graphs import graphs

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Watch:
    """Work of every kind that notes who runs and what has ended."""

    def __init__(self, graph: Graph, pauses: random.Random | None = None) -> None:
        self.tasks = {task.name: task for task in graph.tasks}
        self.lock, self.pauses = threading.Lock(), pauses
        self.busy: set[str] = set()
        self.begun: list[str] = []
        self.ended: set[str] = set()
        self.faults: list[str] = []
        self.work = {task.kind: self._work(task.kind) for task in graph.tasks}

    def _work(self, kind: str):
        def run(number: int) -> None:
            self.begin(f"{kind}{number}")
            if self.pauses is not None:
                time.sleep(self.pauses.choice([0.0, 0.0, 0.0005]))
            self.end(f"{kind}{number}")

        return run

    def begin(self, name: str) -> None:
        task = self.tasks[name]
        with self.lock:
            if self.busy & set(task.on):
                self.faults.append(f"{name} found a busy lane")
            if not self.ended >= set(task.after):
                self.faults.append(f"{name} did not wait")
            self.busy |= set(task.on)
            self.begun.append(name)

    def end(self, name: str) -> None:
        with self.lock:
            self.busy -= set(self.tasks[name].on)
            self.ended.add(name)


def check(graph: Graph, watch: Watch, timeline: Timeline) -> None:
    """What was seen and what was told: both as planned."""
    assert not watch.faults and sorted(watch.begun) == sorted(watch.tasks)
    starts, ends = ({e.name: t for e, t in zip(timeline.events, times, strict=True)} for times in _times(timeline))
    for lane in graph.resources:
        planned = [task.name for task in graph.tasks if lane in task.on]
        assert [name for name in watch.begun if name in planned] == planned
        assert [event.name for event in timeline.events if lane in event.on] == planned
        assert all(starts[b] >= ends[a] for a, b in zip(planned[:-1], planned[1:], strict=True))
    for task in graph.tasks:
        assert 0.0 <= starts[task.name] <= ends[task.name]
        assert all(ends[name] <= starts[task.name] for name in task.after)


def _times(timeline: Timeline) -> tuple[list[float], list[float]]:
    return [e.start_s for e in timeline.events], [e.end_s for e in timeline.events]


@given(graph=graphs(priorities=False), seed=st.integers(0, 10**6))
@FEW
def test_threads_keep_order_and_dependencies(graph, seed):
    watch = Watch(graph, random.Random(seed))
    check(graph, watch, execute(graph, watch.work, ThreadLanes()))


def test_the_order_is_that_of_the_simulator():
    graph = parse_graph("D1@inter D2@inter G1@intra<D1 R1@inter E1@compute<G1 G2@intra<D2 E2@compute<G2 C1@inter+intra<E1")
    watch = Watch(graph)
    ran = execute(graph, watch.work, ThreadLanes())
    planned = simulate(graph, dict.fromkeys("DGREC", 1.0))
    for lane in graph.resources:
        assert [e.name for e in ran.events if lane in e.on] == [e.name for e in planned.events if lane in e.on]


def test_lanes_work_side_by_side():
    both = threading.Barrier(2, timeout=30)
    graph = parse_graph("D1@inter E1@compute")
    execute(graph, {"D": lambda number: both.wait(), "E": lambda number: both.wait()}, ThreadLanes())


def test_work_is_called_with_the_number_of_the_task():
    seen = []
    execute(parse_graph("E12@compute E@compute AT3@compute"), {"E": seen.append, "AT": seen.append}, ThreadLanes())
    assert seen == [12, 0, 3]


@pytest.mark.parametrize("bad", ["D1", "E1", "C1", "R1"])
def test_an_exception_ends_all_lanes_and_is_raised_once(bad):
    graph = parse_graph("D1@inter R1@inter+intra E1@compute<D1 S1@intra<E1 C1@inter<S1 E2@compute<C1 S2@intra<E2")
    ran = []

    def work(kind):
        def run(number):
            ran.append(f"{kind}{number}")
            if ran[-1] == bad:
                raise ValueError(f"{bad} fails")

        return run

    with pytest.raises(ValueError, match=f"{bad} fails"):
        execute(graph, {kind: work(kind) for kind in "DRESC"}, ThreadLanes())
    assert ran.count(bad) == 1 and "S2" not in ran
    assert not {thread.name for thread in threading.enumerate()} & set(graph.resources)


def test_of_two_exceptions_the_first_is_raised():
    first = threading.Event()

    def fails(number):
        first.set()
        raise ValueError("first")

    def fails_later(number):
        first.wait(30)
        time.sleep(0.05)
        raise KeyError("second")

    with pytest.raises(ValueError, match="first"):
        execute(parse_graph("D1@inter E1@compute"), {"D": fails, "E": fails_later}, ThreadLanes())


def test_priorities_are_refused():
    graph = parse_graph("D1@inter E1@compute<D1 R1@inter!-1")
    with pytest.raises(ScheduleError, match="task R1 has priority -1, which cannot be executed"):
        execute(graph, dict.fromkeys("DER", print), ThreadLanes())


def test_missing_work_is_refused():
    with pytest.raises(ScheduleError, match="task E1: no work of kind 'E'.*given are D, C"):
        execute(parse_graph("D1@inter E1@compute"), {"D": print, "C": print}, ThreadLanes())


def test_an_empty_graph_takes_no_time():
    assert execute(Graph(()), {}, ThreadLanes()) == Timeline(())


def test_processors_have_threads():
    assert isinstance(lanes_for("cpu"), ThreadLanes) and isinstance(lanes_for("cuda:1"), StreamLanes)


# ---------------------------------------------------------------- streams without a GPU


class Imitation:
    """torch.cuda as far as lanes use it: streams are queues, which run in random turns when the host waits for them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.streams, self.now = rng, [], 0
        self.main = self.Stream()
        self.current = self.main

    def Stream(self) -> ImitatedStream:
        self.streams.append(ImitatedStream(self))
        return self.streams[-1]

    def Event(self, enable_timing: bool = False) -> ImitatedEvent:
        return ImitatedEvent()

    def current_stream(self) -> ImitatedStream:
        return self.current

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self, stream: ImitatedStream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def run(self) -> None:
        while waiting := [s for s in self.streams if s.queue]:
            ready = [s for s in waiting if s.queue[0][0] != "wait" or s.queue[0][1].at_ms is not None]
            assert ready, "streams wait for each other"
            self.now += 1
            what, item = self.rng.choice(ready).queue.pop(0)
            if what == "record":
                item.at_ms = float(self.now)
            elif what == "work":
                item()


class ImitatedEvent:
    at_ms: float | None = None

    def elapsed_time(self, other: ImitatedEvent) -> float:
        assert self.at_ms is not None and other.at_ms is not None
        return other.at_ms - self.at_ms


class ImitatedStream:
    def __init__(self, cuda: Imitation) -> None:
        self.cuda, self.queue = cuda, []

    def record_event(self, event: ImitatedEvent) -> ImitatedEvent:
        self.queue.append(("record", event))
        return event

    def wait_event(self, event: ImitatedEvent) -> None:
        self.queue.append(("wait", event))

    def wait_stream(self, other: ImitatedStream) -> None:
        self.wait_event(other.record_event(ImitatedEvent()))

    def synchronize(self) -> None:
        self.cuda.run()


@given(graph=graphs(priorities=False), seed=st.integers(0, 10**6))
@FEW
def test_streams_keep_order_and_dependencies(graph, seed, monkeypatch):
    cuda, watch = Imitation(random.Random(seed)), Watch(graph)
    monkeypatch.setattr(torch, "cuda", cuda)

    def enqueue(kind):
        def run(number):
            cuda.current.queue.append(("work", lambda: watch.begin(f"{kind}{number}")))
            cuda.current.queue.append(("work", lambda: watch.end(f"{kind}{number}")))

        return run

    lanes = StreamLanes(torch.device("cuda"))
    timeline = execute(graph, {kind: enqueue(kind) for kind in watch.work}, lanes)
    check(graph, watch, timeline)
    # A second run has the same streams, and stands behind what the current stream does.
    made, again = len(cuda.streams), Watch(graph)
    watch.__dict__.update(again.__dict__)
    check(graph, watch, execute(graph, {kind: enqueue(kind) for kind in watch.work}, lanes))
    assert len(cuda.streams) == made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_of_a_gpu():
    graph = parse_graph("D1@inter E1@compute D2@inter E2@compute<D1 C1@inter+intra<E2 M1@intra<C1")
    x = torch.ones(2048, 2048, device="cuda")
    done = []

    def work(number):
        done.append(x @ x)

    timeline = execute(graph, dict.fromkeys("DECM", work), StreamLanes(torch.device("cuda")))
    assert len(done) == 6 and all(event.end_s > event.start_s for event in timeline.events)
    starts, ends = {e.name: e.start_s for e in timeline.events}, {e.name: e.end_s for e in timeline.events}
    assert all(starts[task.name] >= ends[name] for task in graph.tasks for name in task.after)
