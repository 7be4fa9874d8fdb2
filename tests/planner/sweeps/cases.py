"""Sweeps that are solved in a moment, and engines that solve in this process or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeplan.planner.problem import Problem
from moeplan.planner.sweeps.answer import Answer
from moeplan.planner.sweeps.sweep import Sweep, load_sweep

TEXT = """schema: moeplan.sweep/1
question:
  model: mixtral-8x7b-4l-proxy
  seq_len: 4096
axes:
  device: [h100, a100]
  gpus: {from: 8, to: 16, times: 2}
  global_batch: [16, 32]
  precision: [bf16, fp8-cs]
exclude:
  - {device: h100, gpus: ">8"}
prices: {h100: 2.5}
"""
"""Twelve points: four of h100, eight of a100, where FP8 is refused."""


def write(directory: Path, text: str = TEXT, name: str = "small.yaml") -> Path:
    """A sweep file."""
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def small(directory: Path) -> Sweep:
    """The sweep of `TEXT`."""
    return load_sweep(write(directory))


class Echo:
    """An engine that answers at once, so much at a time, without solving; what it was given is kept."""

    def __init__(self, room: int = 2, deaths: Sequence[int] = ()) -> None:
        self.most, self.deaths = room, list(deaths)
        self.given: list[int] = []
        self.held: list[tuple[int, Problem]] = []

    def room(self) -> int:
        return self.most - len(self.held)

    def busy(self) -> int:
        return len(self.held)

    def submit(self, place: int, problem: Problem) -> None:
        self.given.append(place)
        self.held.append((place, problem))

    def completed(self, timeout_s: float) -> list[tuple[int, Answer | str]]:
        held, self.held = self.held, []
        return [(place, self.outcome(place, problem)) for place, problem in held]

    def outcome(self, place: int, problem: Problem) -> Answer | str:
        if place in self.deaths:
            self.deaths.remove(place)
            return "signal 9"
        return echo(problem)

    def close(self) -> None:
        pass


def echo(problem: Problem) -> Answer:
    """An answer that says which problem it is of."""
    gpus, batch = problem.profile.cluster.gpus, problem.workload.global_batch
    return Answer(status="infeasible", reason=f"{problem.profile.cluster.device.name} {gpus} {batch}")
