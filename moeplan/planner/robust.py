"""Few factors from many rows, of which some may be wrong: robust least squares with priors, by reweighting.

Errors are log(predicted / measured), linear in the logs of the factors. Minimises

    sum_i w_i rho((e_i + S_i d) / scale) + sum_j ((d_j - pull_j) / spread_j)^2

over the change d, with rho quadratic near 0 and linear beyond `scale`: a row far off is no reason to bend the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

REWEIGHTINGS = 50
"""Rounds of reweighting; a tenth of them settles well-behaved tables."""


def robust_change(error: Any, slopes: Any, weights: Any, *, scale: float, spread: Any, pull: Any = 0.0) -> Any:
    """The change of the log factors, [factors].

    `error` [rows], `slopes` [rows, factors], `weights` [rows]; `spread` is the deviation of each log factor around `pull`,
    where the prior would have it, [factors] each.
    """
    precision = np.asarray(spread, np.float64) ** -2.0
    delta = np.zeros(slopes.shape[1])
    for _ in range(REWEIGHTINGS):
        left = error + slopes @ delta
        w = weights / scale**2 / np.sqrt(1.0 + (left / scale) ** 2)
        normal = (slopes * w[:, None]).T @ slopes + np.diag(precision)
        delta = np.linalg.solve(normal, precision * pull - (slopes * w[:, None]).T @ error)
    return delta


def shared_votes(keys: Sequence[Hashable]) -> Any:
    """Weights of rows, 1 / sqrt(rows with the same key), [rows]: what nine releases publish is not nine facts."""
    count = Counter(keys)
    return np.array([count[key] ** -0.5 for key in keys])
