"""The grid of a sweep over one MoE layer: axes as text, their product in blocks, and a line of CSV for each point.

An axis is NAME=v1,v2,... or NAME=a:b:xN (from a to b, times N each step) or NAME=a:b:+N. The product is counted before anything
is allocated, and walked in blocks, the last axis fastest, so memory does not grow with it. Columns: the axes, seconds of each
schedule forward and backward, its chunks, and the quickest schedule that is no mere bound. Chunks that do not divide the slots
of a point are left out there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.moe_choice import IDEAL
from moeplan.errors import UnknownNameError, UsageError
from moeplan.planner.layers.study import MOST, Question, study

MOST_POINTS = 10_000_000
BLOCK = 1 << 16
"""Points that are priced at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One swept number."""

    name: str
    count: int
    given: tuple[float, ...]
    """All values, or the first alone where `step` makes the others."""
    step: float = 0.0
    geometric: bool = False
    """Whether a step multiplies."""

    def values(self) -> Any:
        """All values, [count]."""
        if not self.step:
            return np.asarray(self.given)
        steps = np.arange(self.count)
        return self.given[0] * self.step**steps if self.geometric else self.given[0] + self.step * steps


def parse_axis(text: str, names: Sequence[str]) -> Axis:
    """The axis that a text describes; refuses names that are not among `names`."""
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals:
        raise UsageError(f"sweep '{text}' has no '='", hint="write it like capacity-factor=1,1.5,2 or tokens=512:8192:x2")
    if name not in names:
        raise UnknownNameError("number to sweep", name, names)
    if ":" not in values:
        given = tuple(_number(part, text) for part in values.split(","))
        return Axis(name=name, count=len(given), given=given)
    parts = values.split(":")
    if len(parts) != 3 or parts[2][:1] not in ("x", "+"):
        raise UsageError(f"sweep '{text}': '{values}' is no range", hint="write a range like 512:8192:x2 or 1:4:+0.5")
    first, last, step = _number(parts[0], text), _number(parts[1], text), _number(parts[2][1:], text)
    geometric = parts[2][0] == "x"
    if not last >= first or (geometric and not (first > 0.0 and step > 1.0)) or (not geometric and not step > 0.0):
        raise UsageError(
            f"sweep '{text}' never gets from {first:g} to {last:g}",
            hint="give the smaller end first and a step that grows: 512:8192:x2 or 1:4:+0.5",
        )
    reach = math.log(last / first) / math.log(step) if geometric else (last - first) / step
    return Axis(name=name, count=math.floor(min(reach, MOST) + 1e-9) + 1, given=(first,), step=step, geometric=geometric)


def _number(text: str, axis: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"sweep '{axis}': '{text.strip()}' is not a number") from None
    if not math.isfinite(value):
        raise UsageError(f"sweep '{axis}': {text.strip()} is not a finite number")
    if abs(value) > MOST:
        raise UsageError(f"sweep '{axis}': {text.strip()} is more than the {MOST:g} that is handled")
    return value


def points(axes: Sequence[Axis]) -> int:
    """Points of the product; refuses more than can be handled."""
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--sweep {name} is given twice", hint="put all its values into one")
    count = math.prod(axis.count for axis in axes)
    if count > MOST_POINTS:
        ways = " x ".join(f"{axis.count:,}" for axis in axes) + " = " if len(axes) > 1 else ""
        raise UsageError(
            f"the sweep has {ways}{count:,} points, more than the {MOST_POINTS:,} that are handled",
            hint="take larger steps or fewer axes",
        )
    return count


def header(axes: Sequence[Axis], names: Sequence[str]) -> str:
    """The first line of the table, for schedules `names`."""
    columns = [axis.name.replace("-", "_") for axis in axes]
    for name in names:
        columns += [f"{name}_forward_s", f"{name}_backward_s", f"{name}_r_forward", f"{name}_r_backward"]
    return ",".join([*columns, "winner"]) + "\n"


def rows(axes: Sequence[Axis], ask: Callable[[Mapping[str, Any]], Question], block: int = BLOCK) -> Iterator[tuple[int, str]]:
    """Blocks of lines with the number of points that they hold; `ask` makes the question of some values, [points]."""
    count, values = points(axes), [axis.values() for axis in axes]
    shape = tuple(axis.count for axis in axes)
    for start in range(0, count, block):
        places = np.unravel_index(np.arange(start, min(start + block, count)), shape)
        at = {axis.name: v[place] for axis, v, place in zip(axes, values, places, strict=True)}
        yield len(places[0]), _lines(at, ask(at))


def _lines(at: Mapping[str, Any], question: Question) -> str:
    found = study(question)
    n = len(next(iter(at.values())))
    columns: list[Any] = list(at.values())
    for row in found:
        columns += [row.forward_s, row.backward_s, row.forward_degree, row.backward_degree]
    names = [row.schedule.name for row in found]
    totals = [np.broadcast_to(np.inf if row.schedule.name == IDEAL else row.total_s, n) for row in found]
    first = np.argmin(np.stack(totals), axis=0)
    # [points, columns]
    table = np.stack([np.broadcast_to(np.asarray(c, np.float64), n) for c in columns], axis=1)
    form = ",".join(["%.9g"] * len(at) + ["%.9g", "%.9g", "%d", "%d"] * len(found))
    lines = [form % tuple(line) + "," + names[i] + "\n" for line, i in zip(table.tolist(), first.tolist(), strict=True)]
    return "".join(lines)
