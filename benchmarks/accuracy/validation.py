"""Grouped cross-validation: every run judged by a fit that never saw its group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy import fitting
from benchmarks.accuracy.fitting import Floats, Parameters, Point

Fit = Callable[[Sequence[Point]], Parameters]
Errors = Callable[[Sequence[Point], Parameters], Floats]


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """What each point looks like to a fit without its group."""

    errors: Floats
    """log(measured / predicted), [n]."""
    parameters: Mapping[str, Parameters]
    """Parameters by the group that was left out."""


def leave_out(
    points: Sequence[Point],
    key: Callable[[Point], str],
    *,
    fit: Fit = fitting.fit,
    errors: Errors = fitting.errors,
) -> LeftOut:
    """Leave out one group after the other, fit to the rest, and judge the group by it."""
    out = np.zeros(len(points))
    parameters: dict[str, Parameters] = {}
    for group in sorted({key(p) for p in points}):
        places = [i for i, p in enumerate(points) if key(p) == group]
        parameters[group] = fit([p for p in points if key(p) != group])
        out[places] = errors([points[i] for i in places], parameters[group])
    return LeftOut(errors=out, parameters=parameters)
