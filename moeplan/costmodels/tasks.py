"""Schedules as text: tasks, the resources that they occupy, and what they wait for; not how long they take.

    D1@inter G1@intra<D1 E1@compute<G1 S1@intra<E1 C1@inter<S1 R1@inter!-1
A word is a task: its name; after "@" its resources, "+" between several; after "<" the tasks that it waits for, "," between
them; after "!" a priority. The letters of a name are its kind, and durations are given by kind: all D take the same. A resource
works on one task at a time, in the order of the text; where one of its tasks has a priority, on the ready task with the
highest instead (others have 0), without interrupting what runs. Reading is the inverse of printing; `simulate.py` runs a graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeplan.errors import ScheduleError

_NAME, _RESOURCE = r"[A-Za-z]+[0-9]*", r"[a-z][a-z0-9_.-]*"
_WORD = re.compile(
    rf"(?P<name>{_NAME})@(?P<on>{_RESOURCE}(?:\+{_RESOURCE})*)(?:<(?P<after>{_NAME}(?:,{_NAME})*))?(?:!(?P<priority>-?[0-9]+))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One piece of work."""

    name: str
    """Letters and a number, like "D2": kind and chunk."""
    on: tuple[str, ...]
    """Resources that it occupies at the same time."""
    after: tuple[str, ...] = ()
    """Names of the tasks that must end before it starts."""
    priority: int | None = None
    """Its resources work on the ready task with the highest one; None: in the order of the schedule."""

    @property
    def kind(self) -> str:
        """Letters of the name."""
        return self.name.rstrip("0123456789")

    def __str__(self) -> str:
        after = f"<{','.join(self.after)}" if self.after else ""
        return f"{self.name}@{'+'.join(self.on)}{after}" + ("" if self.priority is None else f"!{self.priority}")


@dataclass(frozen=True, slots=True)
class Graph:
    """Tasks in an order in which every task stands behind those that it waits for."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for task in self.tasks:
            for name in task.after:
                if name not in seen:
                    self._refuse(task, f"waits for {name}, which does not stand before it")
            if task.name in seen:
                self._refuse(task, "stands there twice")
            if not task.on or len(set(task.on)) != len(task.on):
                self._refuse(task, "needs at least one resource, each once")
            if _WORD.fullmatch(str(task)) is None:
                self._refuse(task, "has a name or a resource that cannot be read back")
            seen.add(task.name)

    def __str__(self) -> str:
        return " ".join(map(str, self.tasks))

    @property
    def resources(self) -> tuple[str, ...]:
        """All resources, in the order of their first tasks."""
        return tuple(dict.fromkeys(r for task in self.tasks for r in task.on))

    @property
    def in_order(self) -> bool:
        """Whether every resource works in the order of the text."""
        return all(task.priority is None for task in self.tasks)

    def _refuse(self, bad: Task, why: str) -> None:
        marked = " ".join(f">>>{task}<<<" if task is bad else str(task) for task in self.tasks)
        raise ScheduleError(f"task {bad.name} {why}: {marked}")


def parse_graph(text: str) -> Graph:
    """The graph that a text describes; the inverse of `str`, refuses words that are no tasks."""
    tasks = []
    for word in text.split():
        match = _WORD.fullmatch(word)
        if match is None:
            raise ScheduleError(f"'{word}' is not a task", hint="write it like E1@compute<G1")
        tasks.append(
            Task(
                name=match["name"],
                on=tuple(match["on"].split("+")),
                after=tuple(match["after"].split(",")) if match["after"] else (),
                priority=int(match["priority"]) if match["priority"] else None,
            )
        )
    return Graph(tuple(tasks))


def duration(task: Task, seconds: Mapping[str, Any]) -> Any:
    """Seconds of a task: by its name, else by its kind; refuses a graph whose durations are not all given."""
    if task.name in seconds:
        return seconds[task.name]
    if task.kind not in seconds:
        raise ScheduleError(f"task {task.name}: no duration of kind '{task.kind}'", hint=f"given are {', '.join(seconds)}")
    return seconds[task.kind]
