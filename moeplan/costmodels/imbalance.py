"""How much more than the mean the fullest expert-parallel rank gets where nothing forces the router to balance.

The load of one expert over the mean is gamma distributed with mean 1 and deviation d, independently in every layer, so that the
loads of a layer's experts are a Dirichlet draw. A rank of n experts out of `ranks` ranks has the variance

    v = d^2 / n (1 - 1 / ranks),   quantile x(p) = (1 - v / 9 + z(p) sqrt(v) / 3)^3        (Wilson and Hilferty 1931)

with p the probability of more. Shares of one whole are negatively associated, so that the fullest of them exceeds x(p) with a
probability between 1 - (1 - p)^ranks and ranks p; the upper end counts. A step waits in every layer for the fullest rank, and
takes the mean of the layers' maxima; the fullest memory is the maximum over ranks of the mean over the layers that they hold.
Numbers or arrays. Left out: noise of the draw of single tokens (below 1 % from 10^5 tokens on) and ranks that stay full.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

EXPERT_DEVIATION = 0.25
"""Of an expert's load under an auxiliary loss: with it the fullest of 64 experts gets 1.7 times the mean, as in the 1B model of
arXiv:2408.15664, table 2 (64 experts, violation 0.72; 0.52 in the 3B model, 0.04 where biases balance without a loss)."""
_MEAN_TAIL = math.exp(-0.5772)
"""Ranks times the probability of more than the mean of the maximum (Gumbel law)."""
_GUMBEL_DEVIATION = math.pi / math.sqrt(6.0)


def fullest_in_time(ranks: Any, experts: Any, layers: Any, z: float, deviation: float = EXPERT_DEVIATION) -> Any:
    """Load of the fullest rank over the mean, averaged over `layers`, at `z` standard deviations; `experts` of one rank."""
    v = deviation**2 / experts * (1.0 - 1.0 / ranks)
    mean = _quantile(v, _MEAN_TAIL / ranks)
    scale = _quantile(v, _MEAN_TAIL / ranks / math.e) - mean
    return np.maximum(1.0, mean + z * _GUMBEL_DEVIATION * scale / np.sqrt(layers))


def fullest_in_memory(ranks: Any, experts: Any, layers: Any, tail: float, deviation: float = EXPERT_DEVIATION) -> Any:
    """The mean over `layers` of its load on the rank where that is largest, exceeded with at most the probability `tail`."""
    v = deviation**2 / (experts * layers) * (1.0 - 1.0 / ranks)
    return np.maximum(1.0, _quantile(v, tail / ranks))


def _quantile(v: Any, tail: Any) -> Any:
    """What a gamma variable of mean 1 and variance `v` exceeds with the probability `tail`."""
    return (1.0 - v / 9.0 + _normal_quantile(tail) * np.sqrt(v) / 3.0) ** 3


def _normal_quantile(tail: Any) -> Any:
    """What a standard normal variable exceeds with probability `tail`, at most 0.5 (Abramowitz and Stegun, 26.2.23)."""
    t = np.sqrt(-2.0 * np.log(np.minimum(tail, 0.5)))
    return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
