"""Tasks on resources -> timeline.

`in_order` runs a graph whose resources work in the order of its text: start = max(ends of the tasks waited for, end of the
resource's task before), a recurrence in max and plus, so durations may be arrays and a million layers run at once. `on_ranks`
runs the same graph on ranks of unequal load, whose exchanges start when all are ready. `simulate` is the event loop for numbers
(a heap of ends), which also knows priorities: of the ready tasks the highest, never interrupting one that runs.
Units: seconds. Deterministic: ties go to the task that stands first.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.tasks import Graph, duration
from moeplan.errors import ScheduleError


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A task that ran."""

    name: str
    on: tuple[str, ...]
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What ran when, by start."""

    events: tuple[Event, ...]

    @property
    def makespan_s(self) -> float:
        """End of the last task."""
        return max((e.end_s for e in self.events), default=0.0)

    def busy_s(self, resource: str) -> float:
        """Seconds for which a resource works."""
        return sum(e.end_s - e.start_s for e in self.events if resource in e.on)


def in_order(graph: Graph, seconds: Mapping[str, Any]) -> dict[str, Any]:
    """End of every task, resources working in the order of the text; numbers or arrays."""
    ends: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for task in graph.tasks:
        before = [ends[name] for name in task.after] + [free[r] for r in task.on if r in free]
        end = (functools.reduce(np.maximum, before) if before else 0.0) + duration(task, seconds)
        ends[task.name] = end
        free.update(dict.fromkeys(task.on, end))
    return ends


def makespan_s(graph: Graph, seconds: Mapping[str, Any]) -> Any:
    """Seconds of the whole graph, resources working in the order of the text; numbers or arrays."""
    return functools.reduce(np.maximum, in_order(graph, seconds).values(), 0.0)


def on_ranks(graph: Graph, seconds: Mapping[str, Any], together: Collection[str]) -> dict[str, Any]:
    """End of every task on every rank, [ranks, ...]: durations have a leading axis of ranks, or none where all are equal.

    A task of a kind in `together` is a collective: it starts on all ranks when it can on the last, and ends with the longest.
    """
    ends: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for task in graph.tasks:
        before = [ends[name] for name in task.after] + [free[r] for r in task.on if r in free]
        start = functools.reduce(np.maximum, before) if before else 0.0
        length = duration(task, seconds)
        if task.kind in together:
            start, length = _slowest(start), _slowest(length)
        ends[task.name] = start + length
        free.update(dict.fromkeys(task.on, ends[task.name]))
    return ends


def _slowest(values: Any) -> Any:
    return np.max(values, axis=0, keepdims=True) if np.ndim(values) else values


def serial_s(graph: Graph, seconds: Mapping[str, Any]) -> Any:
    """Seconds of all tasks one after the other."""
    return sum((duration(task, seconds) for task in graph.tasks), 0.0)


def bound_s(graph: Graph, seconds: Mapping[str, Any]) -> Any:
    """Seconds that no order of the tasks can beat: the busiest resource, or the longest chain."""
    busy: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    for task in graph.tasks:
        length = duration(task, seconds)
        for r in task.on:
            busy[r] = busy.get(r, 0.0) + length
        ends[task.name] = functools.reduce(np.maximum, (ends[name] for name in task.after), 0.0) + length
    return functools.reduce(np.maximum, [*busy.values(), *ends.values()], 0.0)


def simulate(graph: Graph, seconds: Mapping[str, float]) -> Timeline:
    """The timeline of a graph, with priorities where its tasks have any; refuses durations that are no time."""
    lengths = [float(duration(task, seconds)) for task in graph.tasks]
    for task, length in zip(graph.tasks, lengths, strict=True):
        if not 0.0 <= length < math.inf:
            raise ScheduleError(f"task {task.name} takes {length:g} s", hint="give a finite number from 0")
    return _Loop(graph, lengths).run()


class _Loop:
    """State of one run: for each task what it still waits for, for each resource its queue."""

    def __init__(self, graph: Graph, seconds: Sequence[float]) -> None:
        self.tasks, self.seconds = graph.tasks, seconds
        place = {task.name: i for i, task in enumerate(self.tasks)}
        self.waits = [len(task.after) for task in self.tasks]
        self.followers: list[list[int]] = [[] for _ in self.tasks]
        for i, task in enumerate(self.tasks):
            for name in task.after:
                self.followers[place[name]].append(i)
        self.ranked = _ranked(graph)
        # A queue in order holds all tasks of the resource from the start, one by priority those that are ready.
        self.queues: dict[str, list[tuple[int, int]]] = {r: [] for r in graph.resources}
        for i, task in enumerate(self.tasks):
            for r in task.on:
                if r not in self.ranked or not task.after:
                    heapq.heappush(self.queues[r], self._rank(i, r))
        self.idle = set(graph.resources)
        self.start_s = [0.0] * len(self.tasks)

    def run(self) -> Timeline:
        """Start what can start, go to the next end, until all tasks have ended."""
        ends: list[tuple[float, int]] = []
        now, done = 0.0, 0
        touched: dict[str, None] = dict.fromkeys(self.queues)
        while done < len(self.tasks):
            for i in self._startable(touched):
                self.start_s[i] = now
                heapq.heappush(ends, (now + self.seconds[i], i))
            now = ends[0][0]
            touched = {}
            while ends and ends[0][0] == now:
                _, i = heapq.heappop(ends)
                done += 1
                self.idle.update(self.tasks[i].on)
                touched.update(dict.fromkeys(self.tasks[i].on))
                for follower in self.followers[i]:
                    self.waits[follower] -= 1
                    if not self.waits[follower]:
                        touched.update(dict.fromkeys(self._ready(follower)))
        order = sorted(range(len(self.tasks)), key=lambda i: (self.start_s[i], i))
        return Timeline(tuple(self._event(i) for i in order))

    def _event(self, i: int) -> Event:
        task, start_s = self.tasks[i], self.start_s[i]
        return Event(name=task.name, on=task.on, start_s=start_s, end_s=start_s + self.seconds[i])

    def _rank(self, i: int, resource: str) -> tuple[int, int]:
        return (-(self.tasks[i].priority or 0) if resource in self.ranked else 0, i)

    def _ready(self, i: int) -> tuple[str, ...]:
        """Resources whose queues a task that now waits for nothing may stand first in."""
        for r in self.tasks[i].on:
            if r in self.ranked:
                heapq.heappush(self.queues[r], self._rank(i, r))
        return self.tasks[i].on

    def _startable(self, touched: Iterable[str]) -> list[int]:
        """Tasks that start now: waiting for nothing, first in the queues of all their resources, which are idle."""
        out = []
        for r in touched:
            if r not in self.idle or not self.queues[r]:
                continue
            i = self.queues[r][0][1]
            on = self.tasks[i].on
            if self.waits[i] or any(o not in self.idle or self.queues[o][0][1] != i for o in on):
                continue
            for o in on:
                heapq.heappop(self.queues[o])
                self.idle.discard(o)
            out.append(i)
        return out


def _ranked(graph: Graph) -> set[str]:
    """Resources that work by priority: those of tasks that have one, and what shares tasks with these."""
    ranked = {r for task in graph.tasks if task.priority is not None for r in task.on}
    shared = [task.on for task in graph.tasks if len(task.on) > 1]
    while more := {r for on in shared if ranked & set(on) for r in on} - ranked:
        ranked |= more
    return ranked
