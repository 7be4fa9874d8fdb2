"""Which schedule of an MoE layer is quickest, and in how many chunks.

Every schedule is priced at every allowed number of chunks by its closed form; the least wins, the first in the lists where two
take the same. Numbers or arrays: a million layers are one pass of numpy. With kappa overlap is imperfect: T + kappa (serial -
T), serial the layer in one chunk with nothing overlapped. Forward and backward are chosen apart; R, the gradient all-reduce put
into the layer, belongs to backward. Units: seconds. Not valid for unbalanced loads.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, check_degree, imperfect_s
from moeplan.costmodels.moe.fsmoe import DEGREES
from moeplan.costmodels.moe.schedules import find_schedule

CANDIDATES = tuple(find_schedule(name) for name in ("baseline", "deepspeed", "s1", "s2", "hierarchical", "fsmoe"))
"""Layouts without overlap, and the schedule that overlaps most."""
BLOCK = 1 << 14
"""Layers that are priced at once: their arrays stay in the cache of a core, which halves the time."""


def schedule_s(
    schedule: LayerSchedule,
    size: MoeSize,
    lines: Lines,
    degree: Any,
    direction: Direction,
    *,
    kappa: Any = 0.0,
    gradient_s: Any = 0.0,
) -> Any:
    """Seconds of a layer in `degree` chunks, with `gradient_s` of R, under imperfect overlap."""
    parts = {**schedule.parts(size, lines, degree, direction), "R": gradient_s}
    overlapped_s = schedule.seconds(degree, parts, size)
    if np.ndim(kappa) == 0 and kappa == 0.0:
        return overlapped_s
    whole = {**schedule.parts(size, lines, 1, direction), "R": gradient_s}
    return imperfect_s(overlapped_s, schedule.serial_seconds(1, whole, size), kappa)


def best_choice(
    size: MoeSize,
    lines: Lines,
    direction: Direction,
    schedules: Sequence[LayerSchedule] = CANDIDATES,
    degrees: Sequence[int] = DEGREES,
    kappa: Any = 0.0,
    gradient_s: Any = 0.0,
) -> tuple[Any, Any, Any]:
    """Index into `schedules` of the quickest, its number of chunks (1 where that is no choice), its seconds."""
    check_degree(degrees)
    options = [(i, r) for i, schedule in enumerate(schedules) for r in (degrees if schedule.chunked else (1,))]

    def least(size: MoeSize, lines: Lines, kappa: Any, gradient_s: Any) -> tuple[Any, Any]:
        shape = np.broadcast_shapes(*_shapes((size, lines, kappa, gradient_s)))
        best, least_s = np.zeros(shape, np.int16), np.full(shape, np.inf)
        for number, (i, r) in enumerate(options):
            took_s = schedule_s(schedules[i], size, lines, r, direction, kappa=kappa, gradient_s=gradient_s)
            np.copyto(best, number, where=took_s < least_s)  # Three times as quick as np.where.
            np.minimum(least_s, took_s, out=least_s)
        return best, least_s

    best, least_s = _in_blocks(least, (size, lines, kappa, gradient_s))
    index, degree = np.array(options).T
    return index[best], degree[best], least_s


def _in_blocks(find: Callable[..., tuple[Any, Any]], given: tuple[Any, ...]) -> tuple[Any, Any]:
    """What `find` says of numbers, arrays and dataclasses of these, asked in blocks that fit the cache of a core."""
    shape = np.broadcast_shapes(*_shapes(given))
    if math.prod(shape) <= BLOCK:
        return find(*given)
    flat = _changed(given, lambda array: np.broadcast_to(array, shape).ravel())  # [layers]
    blocks = (slice(at, at + BLOCK) for at in range(0, math.prod(shape), BLOCK))
    found = [find(*_changed(flat, operator.itemgetter(block))) for block in blocks]
    first, second = (np.concatenate(column).reshape(shape) for column in zip(*found, strict=True))
    return first, second


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of the numbers and arrays in a tuple or dataclass."""
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        for item in value:
            yield from _shapes(item)
    else:
        yield np.shape(value)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A number, array, tuple or dataclass with its arrays changed."""
    if isinstance(value, tuple):
        return tuple(_changed(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{field.name: _changed(getattr(value, field.name), change) for field in fields})
    return change(np.asarray(value)) if np.ndim(value) else value


def best_degree(
    schedule: LayerSchedule,
    size: MoeSize,
    lines: Lines,
    direction: Direction,
    degrees: Sequence[int] = DEGREES,
    kappa: Any = 0.0,
    gradient_s: Any = 0.0,
) -> tuple[Any, Any]:
    """The number of chunks at which a schedule takes least, and its seconds."""
    return best_choice(size, lines, direction, (schedule,), degrees, kappa, gradient_s)[1:]
