"""Quantiles of measured runs, of which some weigh more than others."""

from __future__ import annotations

import numpy as np

from benchmarks.accuracy.fitting import Floats


def weighted_quantile(values: Floats, weights: Floats, q: float) -> float:
    """The value below which the share `q` of the weights lies."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, q * cumulative[-1])])
