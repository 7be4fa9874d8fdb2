"""Robust least squares in few parameters: Levenberg-Marquardt within bounds.

Minimises sum_i c^2 (sqrt(1 + (r_i / c)^2) - 1): r^2 / 2 for small misses and c |r| for large ones, so that a mis-tuned kernel
pulls no harder than any other. (It is the loss "soft_l1" of scipy.optimize.least_squares, which the tests compare with.) Each
step solves (J'WJ + d diag(J'WJ)) s = -J'Wr with the weights W of the loss and central differences for J; a parameter that rests
on a bound and wants beyond it is held. It finds the minimum that belongs to its start: bring a good one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

MOST_STEPS = 200
"""Steps after which the best so far is taken."""
LEAST_GAIN = 1e-8
"""Share of the cost that a step must gain for another to follow."""
_REACH = 1e-6
"""Distance of the central differences."""
_MOST_DAMPING = 1e12


def minimize(misses: Callable[[Array], Array], start: Any, low: Any, high: Any, *, scale: float = 0.1) -> Array:
    """The parameters between `low` and `high` at which the robust sum of `misses`, [rows], is least; `scale` is c."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    here: Array = np.clip(np.asarray(start, float), low, high)
    found = misses(here)
    cost, damping = _cost(found, scale), 1e-3
    for _ in range(MOST_STEPS):
        # 1. weighted normal equations of the misses as they are here
        slopes = _slopes(misses, here)
        weights = 1.0 / np.sqrt(1.0 + (found / scale) ** 2)
        pull = slopes.T @ (weights * found)
        normal = (slopes * weights[:, None]).T @ slopes
        free = ~(((here <= low) & (pull > 0.0)) | ((here >= high) & (pull < 0.0)))
        if not free.any():
            break
        # 2. the longest damped step that helps
        before = cost
        while damping < _MOST_DAMPING:
            some = normal[np.ix_(free, free)]
            there = here.copy()
            there[free] -= np.linalg.solve(some + damping * np.diag(np.diag(some) + 1e-12), pull[free])
            there = np.clip(there, low, high)
            tried = misses(there)
            if (after := _cost(tried, scale)) < cost:
                here, found, cost, damping = there, tried, after, max(damping / 10.0, 1e-9)
                break
            damping *= 10.0
        if before - cost <= LEAST_GAIN * before:
            break
    return here


def _cost(misses: Array, scale: float) -> float:
    return float(np.sum(np.sqrt(1.0 + (misses / scale) ** 2) - 1.0))


def _slopes(misses: Callable[[Array], Array], here: Array) -> Array:
    """Derivatives of the misses, [rows, parameters]."""
    steps = _REACH * np.eye(here.size)
    slopes = [(misses(here + step) - misses(here - step)) / (2.0 * _REACH) for step in steps]
    return np.stack(slopes, axis=1)
