"""One MoE layer under every schedule: seconds of both directions, each at its best number of chunks, and what bounds them.

The layer is given by its sizes, the machine by fitted lines (alpha + beta x amount); everything takes numbers or arrays. With
kappa > 0 overlap is imperfect (`schedule_s`). Forward and backward choose their chunks apart; backward may carry a gradient
all-reduce. Units: seconds, bytes, FLOP. Not valid for unbalanced loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta, Direction, LayerSchedule, Lines, MoeSize, imperfect_s
from moeplan.costmodels.moe.choice import schedule_s
from moeplan.costmodels.moe.lina import Lina
from moeplan.costmodels.moe.megatron_overlap import PairSchedule
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.costmodels.moe_choice import IDEAL
from moeplan.costmodels.tasks import duration
from moeplan.errors import ScheduleError, UsageError

DEGREES = (1, 2, 4, 8)
"""Numbers of chunks that are tried unless others are asked for."""
MOST_RANKS = 65_536
"""Ranks of a copy of the experts that are handled: S2 has a phase for each."""
MOST = 1e15
"""Larger sizes are taken for slips."""
ROUNDING = 1e-9
"""Relative error of a capacity that counts as none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """An MoE layer as one tensor-parallel group sees it; numbers or arrays."""

    tokens: Any
    """B L: tokens of the group, the same on all its ranks."""
    hidden: Any
    """M: width of a token."""
    expert_hidden: Any
    """H: width inside a whole expert."""
    topk: Any
    capacity_factor: Any = 1.0
    """Slots over the slots that balanced routing fills."""
    experts: Any = 0
    """E; 0: not stated, slots are then not counted out to experts and any number of chunks is possible."""
    gemms: Any = 3
    """GEMMs of an expert: 3 gated, 2 plain."""
    mp: Any = 1
    """Tensor-parallel ranks around the experts."""
    esp: Any = 1
    """Ranks among which an expert is cut."""
    ep: Any = 1
    """Groups of `esp` ranks that share the experts."""
    element_bytes: Any = 2
    shared_hidden: Any = 0
    """Width inside the shared experts together; 0: none."""
    sequence_parallel: Any = False
    """Whether tokens stay split among the mp ranks around the layer."""

    def __post_init__(self) -> None:
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = np.asarray(getattr(self, name), np.float64)
            stated = value > 0.0 if name in _POSITIVE else value >= 0.0
            if bad := _first(~stated | (value == np.inf), self, name):
                raise UsageError(
                    f"{_word(name)} is {bad[0]:g}, a number {'above' if name in _POSITIVE else 'from'} 0 is needed"
                )
            if bad := _first(value > MOST, self, name):
                raise UsageError(f"{_word(name)} is {bad[0]:g}, at most {MOST:g} is handled")
            bad = _first((value != np.floor(value)) & (name not in ("tokens", "capacity_factor")), self, name)
            if bad:
                raise UsageError(f"{_word(name)} is {bad[0]:g}, a whole number is needed")
        ranks = np.asarray(self.ep, np.float64) * self.esp
        if bad := _first(ranks > MOST_RANKS, self, "ep", "esp"):
            raise UsageError(
                f"ep x esp = {bad[0]:g} x {bad[1]:g} = {bad[0] * bad[1]:,.0f} ranks, at most {MOST_RANKS:,} are handled"
            )
        if bad := _first(ranks % self.mp != 0, self, "mp", "esp", "ep"):
            mp, esp, ep = (int(x) for x in bad)
            raise ScheduleError(
                f"mp = {mp} does not divide the ep x esp = {ep} x {esp} = {ep * esp} ranks of a copy of the experts",
                hint=f"use a divisor of {ep * esp}, like {math.gcd(mp, ep * esp)}",
            )
        stated = np.asarray(self.experts) > 0
        if bad := _first(stated & (np.asarray(self.topk) > self.experts), self, "topk", "experts"):
            raise UsageError(f"top-k {bad[0]:g} exceeds the {bad[1]:g} experts")
        if bad := _first(stated & (np.asarray(self.experts) % self.ep != 0), self, "ep", "experts"):
            raise ScheduleError(f"ep = {bad[0]:g} does not divide the {bad[1]:g} experts")

    @property
    def capacity(self) -> Any:
        """T: slots of an expert, rounded up to whole ones; infinite where the experts are not stated."""
        slots = 1.0 * self.topk * self.capacity_factor * self.tokens
        whole = np.ceil(slots / np.maximum(self.experts, 1) * (1.0 - ROUNDING))
        return np.where(np.asarray(self.experts) > 0, whole, np.inf)

    @property
    def size(self) -> MoeSize:
        """The layer in bytes and FLOP."""
        slots = 1.0 * self.topk * self.capacity_factor * self.tokens
        stated = np.asarray(self.experts) > 0
        slots = np.where(stated, np.where(stated, self.capacity, 0.0) * self.experts, slots)[()]
        return MoeSize(
            token_bytes=1.0 * self.tokens * self.hidden * self.element_bytes,
            slot_bytes=slots * self.hidden * self.element_bytes,
            expert_flop=2.0 * self.gemms * slots * self.hidden * self.expert_hidden,
            mp_ranks=self.mp,
            esp_ranks=self.esp,
            ep_ranks=self.ep,
            shared_up_flop=2.0 * (self.gemms - 1) * self.tokens * self.hidden * self.shared_hidden,
            shared_down_flop=2.0 * self.tokens * self.hidden * self.shared_hidden,
            sequence_parallel=self.sequence_parallel,
        )

    def takes(self, degree: int) -> Any:
        """Whether the slots of an expert can be cut into `degree` chunks of one size."""
        capacity = self.capacity
        return ~np.isfinite(capacity) | (np.where(np.isfinite(capacity), capacity, 0.0) % degree == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A layer on a machine, and what may be chosen."""

    layer: Layer
    lines: Lines
    schedules: tuple[LayerSchedule, ...]
    pairs: tuple[PairSchedule, ...] = ()
    """Schedules of a forward and a backward together."""
    degrees: tuple[int, ...] = DEGREES
    kappa: Any = 0.0
    """Part of the overlap that is lost, 0 to 1."""
    gradient_bytes: Any = 0.0
    """Gradients that a rank all-reduces during the backward pass."""
    gradient: AlphaBeta = AlphaBeta(startup_s=0.0, unit_s=0.0)
    """Time of that all-reduce."""

    def __post_init__(self) -> None:
        kappa = np.asarray(self.kappa, np.float64)
        if not np.all((kappa >= 0.0) & (kappa <= 1.0)):
            bad = kappa[~((kappa >= 0.0) & (kappa <= 1.0))].flat[0]
            raise UsageError(f"kappa is {bad:g}, a number from 0 (perfect overlap) to 1 (none) is needed")

    def gradient_s(self, pieces: int = 1) -> Any:
        """Seconds of the gradient all-reduce, of one of `pieces` equal pieces."""
        carried = np.asarray(self.gradient_bytes, np.float64)
        return np.where(carried > 0.0, self.gradient.time_s(carried / pieces), 0.0)[()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """One schedule, each direction at the number of chunks that takes least."""

    schedule: LayerSchedule
    forward_s: Any
    backward_s: Any
    forward_degree: Any
    backward_degree: Any

    @property
    def total_s(self) -> Any:
        """Both directions."""
        return self.forward_s + self.backward_s


def study(question: Question) -> tuple[Priced, ...]:
    """Every schedule of the question, in its order."""
    out = []
    for schedule in question.schedules:
        forward_s, forward_degree = best(question, schedule, "forward")
        backward_s, backward_degree = best(question, schedule, "backward")
        out.append(
            Priced(
                schedule=schedule,
                forward_s=forward_s,
                backward_s=backward_s,
                forward_degree=forward_degree,
                backward_degree=backward_degree,
            )
        )
    return tuple(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """All schedules of a question beside the one that ratios are over."""

    rows: tuple[Priced, ...]
    pairs: Mapping[str, float]
    """Seconds of both directions by name of the pair."""
    over: Priced

    @property
    def quickest(self) -> Priced:
        """The row that takes least of those that are no mere bound."""
        real = [row for row in self.rows if row.schedule.name != IDEAL]
        return min(real or self.rows, key=lambda row: float(row.total_s))


def compared(question: Question, over: str) -> Compared:
    """The schedules of one layer, and the one named `over`."""
    reference = study(replace(question, schedules=(find_schedule(over),)))[0]
    pairs = {pair.name: float(pair_s(question, pair)) for pair in question.pairs}
    return Compared(rows=study(question), pairs=pairs, over=reference)


def pair_s(question: Question, schedule: PairSchedule) -> Any:
    """Seconds of a forward and a backward together, with the gathers of both and the gradients exposed."""
    size = question.layer.size
    parts = schedule.parts(size, question.lines)
    both_s = imperfect_s(schedule.seconds(parts), schedule.serial_seconds(parts), question.kappa)
    return both_s + 2.0 * question.lines.mp_gather.among_s(size.token_bytes, size.closing_ranks) + question.gradient_s()


def best(question: Question, schedule: LayerSchedule, direction: Direction) -> tuple[Any, Any]:
    """Seconds and chunks of one direction; the fewer chunks where two take the same, infinite where none divides the slots."""
    layer, size = question.layer, question.layer.size
    gradient_s = _gradient_s(question, schedule, direction)
    least_s: Any = np.inf
    chosen: Any = 0
    for degree in question.degrees if schedule.chunked else (1,):
        seconds = schedule_s(schedule, size, question.lines, degree, direction, kappa=question.kappa, gradient_s=gradient_s)
        seconds = np.where(layer.takes(degree), seconds, np.inf)
        chosen = np.where(seconds < least_s, degree, chosen)
        least_s = np.minimum(seconds, least_s)
    return least_s, chosen


def _gradient_s(question: Question, schedule: LayerSchedule, direction: Direction) -> Any:
    """Seconds of R, one piece of it where the schedule has several."""
    if direction == "forward":
        return 0.0
    return question.gradient_s(schedule.pieces if isinstance(schedule, Lina) else 1)


def shares(question: Question, schedule: LayerSchedule, degree: int, direction: Direction) -> dict[str, float]:
    """Part of the time for which each resource works, the busiest first; for one layer, with perfect overlap."""
    size = question.layer.size
    parts = dict(schedule.parts(size, question.lines, degree, direction)) | {"R": _gradient_s(question, schedule, direction)}
    whole_s = float(schedule.seconds(degree, parts, size))
    busy: dict[str, float] = {}
    for task in schedule.graph(degree, size).tasks:
        for resource in task.on:
            busy[resource] = busy.get(resource, 0.0) + float(duration(task, parts))
    return {r: s / whole_s for r, s in sorted(busy.items(), key=lambda item: -item[1])} if whole_s else {}


_POSITIVE = ("tokens", "hidden", "expert_hidden", "topk", "capacity_factor", "gemms", "mp", "esp", "ep", "element_bytes")
_NOT_NEGATIVE = ("experts", "shared_hidden")


def _word(name: str) -> str:
    return "top-k" if name == "topk" else name.replace("_", "-")


def _first(bad: Any, layer: Layer, *names: str) -> tuple[float, ...]:
    """The named values at the first place where `bad` holds; empty where it holds nowhere."""
    if not np.any(bad):
        return ()
    values = np.broadcast_arrays(bad, *(getattr(layer, name) for name in names))
    place = int(np.argmax(values[0].ravel()))
    return tuple(float(v.ravel()[place]) for v in values[1:])
