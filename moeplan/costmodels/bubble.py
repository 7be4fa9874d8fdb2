"""How long a pipeline takes for its passes, given what each unit of work takes: exactly, or from below.

`pipeline/waves.py` runs the passes of plain and interleaved 1F1B. Below that stands what rank r does without pause, m t_r, with
what it must wait for: the first chunks of the ranks before it, forward until it starts and backward after it ends, x_<r; in
plain 1F1B also the ranks behind it, x_>r, where a round trip of its first and last micro-batch takes longer than its own
k = p - 1 - r passes ahead:
    interleaved     m t_r + x_<r
    plain, m > p    m t_r + x_<r + max(0, 2 x_>r - k t_r)
    plain, m <= p   m t_r + x_<r + max(0, x_>r - min(m - 1, k) t_r)
the greatest over all ranks. For equal stages this is the whole time, (m + (p - 1) / v) t (arXiv:2104.04473, section 2), and
nearly so for nearly equal ones. Chunks of one rank that differ make neighbours wait for each other beyond it. Units: seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplan.costmodels.pipeline.waves import span_s
from moeplan.costmodels.stages import Fill, Floats


def least_span_s(fill: Fill, units_s: Sequence[Any], batches: Any) -> Any:
    """Seconds that no pipeline of this split can beat, [n]; `units_s`: one micro-batch in each unit, [n] each."""
    own = _weighted(fill.held, units_s)  # [K, n]
    took = batches * own + _weighted(fill.before, units_s)
    if fill.chunks == 1:
        behind, ahead = _weighted(fill.behind, units_s), fill.ranks_behind[:, None]
        full = np.all(batches > fill.ranks)
        waits = 2.0 * behind - ahead * own
        if not full:
            waits = np.where(batches > fill.ranks, waits, behind - np.minimum(batches - 1, ahead) * own)
        took = took + np.maximum(waits, 0.0)
    return took.max(axis=0)


def pass_seconds(chunks: Floats, units_s: Sequence[Any]) -> Any:
    """Seconds of a pass of every chunk, [p, v, n]; `chunks`: its units, [p, v, units]; seconds of each unit, [n] each."""
    return np.einsum("pvu,un->pvn", chunks, np.stack(np.broadcast_arrays(*units_s)))


def exact_span_s(forward_s: Any, backward_s: Any, batches: Any) -> Any:
    """Seconds of all passes, [n], given those of every chunk, [p, v, n].

    0 where micro-batches are no whole number, or interleaved groups of p are not full: no order is known.
    """
    p, v, n = forward_s.shape
    out = np.zeros(n)
    rows = np.flatnonzero((batches == np.floor(batches)) & ((v == 1) | (batches % p == 0)))
    if len(rows):
        out[rows] = span_s(forward_s[..., rows], backward_s[..., rows], batches[rows])
    return out


def _weighted(counts: Floats, units_s: Sequence[Any]) -> Any:
    """Sums of units, [K, n]; not as a matrix product, whose rounding depends on how many rows there are."""
    return sum(counts[:, u, None] * unit for u, unit in enumerate(units_s))
