"""Measured runs of an MoE layer beside what a profile predicts: by task, by run, and in which order the schedules come.

A schedule takes the sum of its directions, each at the number of chunks that was quickest. Correlations are over runs of all
schedules and directions: of the logarithms (1: times differ by one factor), and of the ranks of schedules (1: same order).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.planner.layers.runs import LayerRun, predict
from moeplan.profiles.profile import Profile


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedRun:
    """A measured run with its tasks."""

    run: LayerRun
    tasks: Mapping[str, float]
    """Seconds of one task by kind: median over repeats, slowest rank, mean over chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRun:
    """A run beside its prediction."""

    run: LayerRun
    predicted_s: float
    tasks: Mapping[str, tuple[float, float]]
    """Predicted and measured seconds of one task by kind."""

    @property
    def ratio(self) -> float:
        """Predicted over measured time."""
        return self.predicted_s / self.run.measured_layer_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedSchedule:
    """A schedule, both directions at their best numbers of chunks."""

    name: str
    forward_degree: int
    backward_degree: int
    """As measured to be quickest."""
    predicted_s: float
    measured_s: float
    predicted_place: int
    """1 is the quickest."""
    measured_place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All runs of one layer."""

    runs: tuple[ComparedRun, ...]
    schedules: tuple[ComparedSchedule, ...]
    """As measured, quickest first."""
    correlation: float | None
    """Of the logarithms of predicted and measured times; None for fewer than three runs."""
    rank_correlation: float | None
    """Of the places of the schedules; None for fewer than three."""
    median_ratio: float
    """Predicted over measured."""


def compare(timed: Sequence[TimedRun], profile: Profile) -> Comparison:
    """Measured runs of one layer beside the predictions of a profile."""
    runs = []
    for each in timed:
        said = predict(each.run, profile)
        both = {kind: (said.tasks[kind], seconds) for kind, seconds in each.tasks.items() if kind in said.tasks}
        runs.append(ComparedRun(run=each.run, predicted_s=said.seconds(profile.overlap_loss), tasks=both))
    schedules = _schedules(runs)
    logs = np.log([[run.predicted_s, run.run.measured_layer_s] for run in runs])
    places = np.array([[s.predicted_place, s.measured_place] for s in schedules], np.float64)
    return Comparison(
        runs=tuple(runs),
        schedules=schedules,
        correlation=_correlation(logs),
        rank_correlation=_correlation(places),
        median_ratio=float(np.median([run.ratio for run in runs])),
    )


def _schedules(runs: Sequence[ComparedRun]) -> tuple[ComparedSchedule, ...]:
    """Schedules that were measured in both directions."""
    found = []
    for name in dict.fromkeys(run.run.schedule for run in runs):
        ways = [[r for r in runs if r.run.schedule == name and r.run.direction == way] for way in ("forward", "backward")]
        if all(ways):
            best = [min(way, key=lambda r: r.run.measured_layer_s) for way in ways]
            predicted_s = sum(min(r.predicted_s for r in way) for way in ways)
            found.append((name, best, predicted_s, sum(r.run.measured_layer_s for r in best)))
    said = sorted(range(len(found)), key=lambda i: found[i][2])
    took = sorted(range(len(found)), key=lambda i: found[i][3])
    return tuple(
        ComparedSchedule(
            name=found[i][0],
            forward_degree=found[i][1][0].run.degree,
            backward_degree=found[i][1][1].run.degree,
            predicted_s=found[i][2],
            measured_s=found[i][3],
            predicted_place=said.index(i) + 1,
            measured_place=took.index(i) + 1,
        )
        for i in took
    )


def _correlation(pairs: np.ndarray) -> float | None:
    """Pearson's correlation of two columns; None for fewer than three rows, or where one does not vary."""
    if len(pairs) < 3 or not pairs.std(axis=0).all():
        return None
    return float(np.corrcoef(pairs.T)[0, 1])
