"""The passes that a 1F1B pipeline, plain or interleaved, waits for: one longest path through its passes.

Passes and what they need are those of `waves.py`. Which passes need which does not depend on how long they take, so that for
any other times of the same pipeline the passes on the path still run one after the other: with n passes of each chunk on it

    span >= sum over chunks of n_forward x forward_s + n_backward x backward_s

and equal for the times that it was found with. Units: seconds. Where v > 1, groups of p micro-batches must be full.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def critical_passes(forward: Floats, backward: Floats, batches: int) -> Floats:
    """How many forward and backward passes of each chunk are on a longest path, [2, p, v]; times are [p, v]."""
    p, v = forward.shape
    ends, needed = _run(forward.tolist(), backward.tolist(), batches)
    out = np.zeros((2, p, v))
    place: tuple[int, int, int] | None = max(ends, key=lambda pass_: ends[pass_])
    while place is not None:
        way, rank, number = place
        chunk = number // p % v
        out[way, rank, v - 1 - chunk if way else chunk] += 1
        place = needed[place]
    return out


def _run(
    forward: list[list[float]], backward: list[list[float]], batches: int
) -> tuple[dict[tuple[int, int, int], float], dict[tuple[int, int, int], tuple[int, int, int] | None]]:
    """When each pass (0 forward or 1 backward, rank, number) ends, and the pass that it waited for last."""
    p, v = len(forward), len(forward[0])
    passes, skew = batches * v, 2 if v > 1 else 1
    waves = []
    for r in range(p):
        ahead = 2 * (p - 1 - r) + (v - 1) * p if v > 1 else p - 1 - r
        waves += [(2 * k + skew * r, 0, r, k) for k in range(passes)]
        waves += [(2 * (k + ahead) + skew * r + 1, 1, r, k) for k in range(passes)]
    ends: dict[tuple[int, int, int], float] = {}
    needed: dict[tuple[int, int, int], tuple[int, int, int] | None] = {}
    last: list[tuple[int, int, int] | None] = [None] * p
    for _, way, r, k in sorted(waves):
        chunk = k // p % v
        if way == 0:
            other = (0, r - 1, k) if r else (0, p - 1, k - p) if chunk else None
            seconds = forward[r][chunk]
        else:
            other = (1, r + 1, k) if r < p - 1 else (0, r, k + (v - 1) * p) if chunk == 0 else (1, 0, k - p)
            seconds = backward[r][v - 1 - chunk]
        before = last[r]
        waited = max((x for x in (before, other) if x is not None), key=lambda x: ends[x], default=None)
        this = (way, r, k)
        ends[this] = (0.0 if waited is None else ends[waited]) + seconds
        needed[this] = waited
        last[r] = this
    return ends, needed
