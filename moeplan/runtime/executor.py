"""Runs the task graph that the simulator times, with real work.

Every resource of a graph is a lane that works on its tasks in the order of the text, one at a time; a task starts when those
that it waits for have ended and all of its lanes have come to it. On CPUs a lane is a thread; on GPUs it is a CUDA stream, to
which one host thread hands all tasks in the order of the text, so that all ranks call collectives in one order. Units: seconds
from the start, on GPUs by CUDA events. Not for graphs with priorities: real lanes do not choose among what is ready.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

from moeplan.costmodels.simulate import Event, Timeline
from moeplan.costmodels.tasks import Graph, Task
from moeplan.errors import ScheduleError

Work: TypeAlias = Mapping[str, Callable[[int], Any]]
"""What a task does, by its kind; called with the number in its name, 0 if it has none."""


class Lanes(ABC):
    """A way to run tasks of several resources side by side."""

    @abstractmethod
    def run(self, graph: Graph, work: Work) -> Timeline:
        """Run a graph without priorities, every kind of which has its work; what a task raises ends all lanes."""


def execute(graph: Graph, work: Work, lanes: Lanes) -> Timeline:
    """Run every task of a graph; refuses one with priorities, or whose work is not all given."""
    for task in graph.tasks:
        if task.priority is not None:
            raise ScheduleError(
                f"task {task.name} has priority {task.priority}, which cannot be executed",
                hint="use a schedule whose resources work in the order of the text",
            )
        if task.kind not in work:
            raise ScheduleError(f"task {task.name}: no work of kind '{task.kind}'", hint=f"given are {', '.join(work)}")
    return lanes.run(graph, work)


def lanes_for(device: Any) -> Lanes:
    """Streams on a CUDA (or ROCm) device of torch, threads elsewhere."""
    import torch

    device = torch.device(device)
    return StreamLanes(device) if device.type == "cuda" else ThreadLanes()


def _number(task: Task) -> int:
    return int(task.name[len(task.kind) :] or 0)


def _timeline(graph: Graph, spans: Mapping[str, tuple[float, float]]) -> Timeline:
    """Events by start; ties in the order of the text."""
    events = [Event(name=t.name, on=t.on, start_s=spans[t.name][0], end_s=spans[t.name][1]) for t in graph.tasks]
    return Timeline(tuple(sorted(events, key=lambda event: event.start_s)))


@final
class ThreadLanes(Lanes):
    """A thread for every resource; the first lane of a task does its work while the others wait."""

    def run(self, graph: Graph, work: Work) -> Timeline:
        """Run a graph; the first exception is raised when all lanes have left their tasks."""
        return _Run(graph, work).run()


class _Run:
    """State of one run, guarded by one condition."""

    def __init__(self, graph: Graph, work: Work) -> None:
        self.graph, self.work = graph, work
        self.changed = threading.Condition()
        self.started_s: float | None = None
        self.arrived = {task.name: 0 for task in graph.tasks}
        self.spans: dict[str, tuple[float, float]] = {}
        self.failure: BaseException | None = None

    def run(self) -> Timeline:
        threads = [threading.Thread(target=self._lane, args=(lane,), name=lane, daemon=True) for lane in self.graph.resources]
        for thread in threads:
            thread.start()
        with self.changed:
            self.started_s = time.perf_counter()
            self.changed.notify_all()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return _timeline(self.graph, self.spans)

    def _lane(self, lane: str) -> None:
        try:
            if self._wait(lambda: self.started_s is not None):
                for task in self.graph.tasks:
                    if lane in task.on and not self._take(task, lane):
                        return
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()

    def _take(self, task: Task, lane: str) -> bool:
        """Bring a lane behind a task; False if another lane has failed."""
        with self.changed:
            self.arrived[task.name] += 1
            self.changed.notify_all()
        if lane != task.on[0]:
            return self._wait(lambda: task.name in self.spans)
        if not self._wait(lambda: self._can_start(task)):
            return False
        assert self.started_s is not None
        start_s = time.perf_counter() - self.started_s
        self.work[task.kind](_number(task))
        end_s = time.perf_counter() - self.started_s
        with self.changed:
            self.spans[task.name] = (start_s, end_s)
            self.changed.notify_all()
        return True

    def _can_start(self, task: Task) -> bool:
        return self.arrived[task.name] == len(task.on) and all(name in self.spans for name in task.after)

    def _wait(self, until: Callable[[], bool]) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or until())
            return self.failure is None


@final
class StreamLanes(Lanes):
    """A CUDA stream for every resource, kept from run to run; the first lane of a task does its work."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.streams: dict[str, Any] = {}

    def run(self, graph: Graph, work: Work) -> Timeline:
        """Enqueue a graph behind the current stream, which then waits for it; returns when it has ended."""
        import torch

        cuda: Any = torch.cuda
        with cuda.device(self.device):
            main = cuda.current_stream()
            for lane in graph.resources:
                if lane not in self.streams:
                    self.streams[lane] = cuda.Stream()
            begin = main.record_event(cuda.Event(enable_timing=True))
            for lane in graph.resources:
                self.streams[lane].wait_event(begin)
            events: dict[str, tuple[Any, Any]] = {}
            for task in graph.tasks:
                home, *others = (self.streams[lane] for lane in task.on)
                for name in task.after:
                    home.wait_event(events[name][1])
                for other in others:
                    home.wait_stream(other)
                with cuda.stream(home):
                    start = home.record_event(cuda.Event(enable_timing=True))
                    work[task.kind](_number(task))
                    end = home.record_event(cuda.Event(enable_timing=True))
                for other in others:
                    other.wait_event(end)
                events[task.name] = (start, end)
            for lane in graph.resources:
                main.wait_stream(self.streams[lane])
            main.synchronize()
        spans = {
            name: (begin.elapsed_time(start) / 1e3, begin.elapsed_time(end) / 1e3) for name, (start, end) in events.items()
        }
        return _timeline(graph, spans)
