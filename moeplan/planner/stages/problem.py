"""The stage problem: which layers stand on which pipeline chunk of a layout whose degrees are given.

Chunk c runs on rank c mod p as virtual stage c div p. With t_r the seconds of a micro-batch on rank r, x_<r and x_>r those of
what stands before and behind it and m micro-batches, a step's passes take at least (`costmodels/bubble.py`)

    interleaved     max_r  m t_r + first chunks of the ranks before r
    plain, m > p    max_r  m t_r + x_<r + max(0, 2 x_>r - k t_r)              k = p - 1 - r
    plain, m <= p   max_r  m t_r + x_<r + max(0, x_>r - min(m - 1, k) t_r)

which is linear in what the chunks hold: `partition.py` minimises it by a mixed-integer programme, `split_by_programme` here by
an exact dynamic programme for one chunk a rank. `level_splits.py` runs through the even ones of several. Memory: every rank at
each of its moments, sum of (states + micro-batches in flight x saved) + what cannot move <= limit. Units: seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.pipeline.critical import critical_passes
from moeplan.costmodels.pipeline.waves import span_s
from moeplan.errors import ProblemError

Ints = npt.NDArray[np.int64]
SAME = 1e-9
"""Relative difference below which two closed forms count as equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """When a rank can be fullest."""

    held: tuple[float, ...]
    """Micro-batches in flight in each of its chunks, [v]."""
    base_bytes: float
    """What it holds then beside layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProblem:
    """What the split of layers depends on."""

    ranks: int
    chunks_per_rank: int
    batches: float
    """Micro-batches of a step."""
    kinds: Sequence[int]
    """Kind of each layer, [L]."""
    forward_s: Sequence[float]
    """Seconds of one micro-batch in a layer of each kind, [K]."""
    backward_s: Sequence[float]
    state_bytes: Sequence[float]
    """Weights, gradients and optimizer states of a layer of each kind, [K]."""
    saved_bytes: Sequence[float]
    """What a layer of each kind keeps for one micro-batch, [K]."""
    fixed_forward_s: Sequence[float]
    """What cannot move on the last chunk of each rank: head, prediction layers, [R]."""
    fixed_backward_s: Sequence[float]
    moments: Sequence[Sequence[Moment]]
    """When each rank can be fullest, [R]."""
    limit_bytes: float
    """Peak allocation that a rank may reach."""
    fewest: Sequence[int]
    """Layers that each chunk must hold at least, [C]."""
    most: Sequence[int]
    again: int | None = None
    """Layers of each chunk, from its first, that recompute: costs of these follow those of kinds that do not, [2 K]."""
    level: bool = False
    """Whether chunks of a virtual stage may differ by one layer at most, those that may hold none left aside."""

    def __post_init__(self) -> None:
        layers, chunks = len(self.kinds), self.chunks
        if not sum(self.fewest) <= layers <= sum(self.most):
            raise ProblemError(f"{chunks} chunks hold {sum(self.fewest)} to {sum(self.most)} layers, there are {layers}")

    @property
    def chunks(self) -> int:
        """Chunks of the whole pipeline."""
        return self.ranks * self.chunks_per_rank

    @property
    def layer_s(self) -> list[float]:
        """Forward and backward seconds of a layer of each kind, [K]."""
        return [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]

    @property
    def fixed_s(self) -> list[float]:
        """Seconds of what cannot move on each rank, [R]."""
        return [f + b for f, b in zip(self.fixed_forward_s, self.fixed_backward_s, strict=True)]

    def counts(self, sizes: Any) -> Any:
        """Layers of each kind on every chunk of splits given by their sizes [n, C]: [n, v, R, K]."""
        sizes = np.reshape(sizes, (-1, self.chunks_per_rank, self.ranks))
        return layer_counts(self.kinds, len(self.forward_s), sizes, self.again)

    def spans(self, sizes: Any) -> Any:
        """The closed form of splits [n, C] in seconds, [n]."""
        of_chunk = self.counts(sizes) @ np.array(self.layer_s)
        of_chunk[:, -1] += self.fixed_s
        own = of_chunk.sum(axis=1)
        first = of_chunk[:, 0] if self.chunks_per_rank > 1 else own
        before = np.cumsum(first, axis=1) - first
        took = self.batches * own + before
        if self.chunks_per_rank == 1:
            behind = own.sum(axis=1, keepdims=True) - np.cumsum(own, axis=1)
            took = took + np.maximum(waits(self, np.arange(self.ranks), own, behind), 0.0)
        return took.max(axis=1)

    def slowest_s(self, sizes: Any) -> Any:
        """Seconds of a micro-batch on the slowest rank of splits [n, C], [n]."""
        own = (self.counts(sizes) @ np.array(self.layer_s)).sum(axis=1) + self.fixed_s
        return own.max(axis=1)

    def exact_spans(self, sizes: Any) -> Any:
        """Seconds of all passes of splits [n, C], run pass by pass, [n]."""
        forward, backward = self._passes(sizes)
        return span_s(forward, backward, self.batches)

    def critical(self, sizes: Any) -> Any:
        """A longest path through the passes of a split [C]: how many of each chunk are on it, [2, p, v]."""
        forward, backward = self._passes(sizes)
        return critical_passes(forward[..., 0], backward[..., 0], int(self.batches))

    def along(self, sizes: Any, path: Any) -> float:
        """Seconds of the passes of a split [C] that are on a path, [2, p, v]: no more than its span."""
        forward, backward = self._passes(sizes)
        return float((path[0] * forward[..., 0] + path[1] * backward[..., 0]).sum())

    def _passes(self, sizes: Any) -> tuple[Any, Any]:
        """Forward and backward seconds of every chunk of splits [n, C], [p, v, n] each."""
        counts = self.counts(sizes)
        ways = (self.forward_s, self.fixed_forward_s), (self.backward_s, self.fixed_backward_s)
        forward, backward = (pass_seconds(counts, seconds, fixed) for seconds, fixed in ways)
        return forward, backward

    def excess_bytes(self, sizes: Any) -> Any:
        """By how much the fullest rank of splits [n, C] exceeds the limit, [n]; negative: they fit."""
        counts = self.counts(sizes)
        states, saved = counts.sum(axis=1) @ np.array(self.state_bytes), counts @ np.array(self.saved_bytes)
        most = np.full(len(counts), -np.inf)
        for r, moments in enumerate(self.moments):
            for moment in moments:
                most = np.maximum(most, states[:, r] + saved[:, :, r] @ np.array(moment.held) + moment.base_bytes)
        return most - self.limit_bytes


def layer_counts(kinds: Sequence[int], count: int, sizes: Any, again: int | None = None) -> Any:
    """Layers of each of `count` kinds on the chunks of splits, [n, v, R, K]; `sizes`: all layers of each chunk, [n, v, R].

    `again`: the first so many of a chunk count as of the second half of the kinds.
    """
    flat = np.asarray(sizes, np.int64).reshape(len(sizes), int(np.prod(np.shape(sizes)[1:])))
    ends = np.cumsum(flat, axis=1)
    alike = count if again is None else count // 2
    prefix = np.stack([np.cumsum([0, *(kind == k for kind in kinds)]) for k in range(alike)], axis=-1)
    out = prefix[ends] - prefix[ends - flat]
    if again is not None:
        first = prefix[np.minimum(ends - flat + again, ends)] - prefix[ends - flat]
        out = np.concatenate([out - first, first], axis=-1)
    return out.reshape(*np.shape(sizes), count)


def pass_seconds(counts: Any, seconds: Any, fixed_s: Any) -> Any:
    """Seconds of a pass of every chunk, [p, v, n]. `counts`: its layers, [n, v, R, K]; `seconds`: of a layer, [K] or [n, K].

    `fixed_s`: of what cannot move on the last chunk of each rank, [R] or [n, R].
    """
    of_chunk = (counts * np.atleast_2d(seconds)[:, None, None]).sum(axis=-1)
    of_chunk[:, -1] += fixed_s
    return np.ascontiguousarray(of_chunk.transpose(2, 1, 0))


def chunk_sizes(layers: int, pp: int, vpp: int) -> tuple[int, int]:
    """Fewest and most layers of a chunk that are looked at; the first and the last may hold fewer.

    Any number of layers for one chunk a rank; for several, where unequal chunks make ranks wait, within one of the mean.
    """
    chunks = pp * vpp
    if vpp == 1:
        return 1, layers
    return max(1, layers // chunks - 1), -(-layers // chunks) + 1


def waits(problem: StageProblem, rank: Any, own: Any, behind: Any) -> Any:
    """What a rank of a plain pipeline waits for those behind it beyond its own passes ahead; negative: it does not."""
    ahead = problem.ranks - 1 - rank
    if problem.batches > problem.ranks:
        return 2.0 * behind - ahead * own
    return behind - np.minimum(problem.batches - 1, ahead) * own


def split_by_programme(problem: StageProblem) -> list[int] | None:
    """Layers of each chunk with the least closed form, of equal ones the most even; None if no split fits.

    Dynamic programming over the end of each chunk: what stands before and behind a chunk follows from its first and last layer.
    For one chunk a rank.
    """
    if problem.chunks_per_rank != 1 or problem.again is not None:
        raise ProblemError(
            f"the dynamic programme takes one chunk a rank, not {problem.chunks_per_rank}, all layers of a kind alike"
        )
    layers, tables = len(problem.kinds), list(_chunk_tables(problem))
    best = np.full(layers + 1, np.inf)
    best[0] = 0.0
    for took, _ in tables:
        best = np.maximum(best[:, None], took).min(axis=0)
    if not np.isfinite(best[layers]):
        return None
    # of all splits within the best time the one with the least sum of squares
    squares = np.full(layers + 1, np.inf)
    squares[0] = 0.0
    starts = []
    for took, own in tables:
        sums = squares[:, None] + np.where(took <= best[layers] * (1 + SAME), own**2, np.inf)
        starts.append(sums.argmin(axis=0))
        squares = sums.min(axis=0)
    sizes, end = [], layers
    for start in reversed(starts):
        sizes.append(int(end - start[end]))
        end = int(start[end])
    return sizes[::-1]


def splits_within(problem: StageProblem, limit_s: float, most: int) -> Ints | None:
    """All splits with a closed form of no more than a limit, [n, C]; None if these are more than `most`.

    For one chunk a rank.
    """
    allowed = [np.isfinite(took) & (took <= limit_s) for took, _ in _chunk_tables(problem)]
    # ways on from a layer to the end, of the ranks from each on
    ways = [np.zeros(len(problem.kinds) + 1)]
    ways[0][-1] = 1.0
    for table in reversed(allowed):
        ways.append(table @ ways[-1])
    if ways[-1][0] > most:
        return None
    ends = np.zeros((1, 1), np.int64)
    for table, on in zip(allowed, reversed(ways[:-1]), strict=True):
        which, end = np.nonzero(table[ends[:, -1]] & (on > 0))
        ends = np.concatenate([ends[which], end[:, None]], axis=1)
    return np.diff(ends, axis=1)


def _chunk_tables(problem: StageProblem) -> Iterator[tuple[Any, Any]]:
    """Of each rank by first and last layer, [L + 1, L + 1]: its term of the closed form, infinite if too large; its seconds."""
    seconds, state, saved = (
        np.concatenate([[0.0], np.cumsum([values[kind] for kind in problem.kinds])])
        for values in (problem.layer_s, problem.state_bytes, problem.saved_bytes)
    )
    size = np.arange(len(seconds)) - np.arange(len(seconds))[:, None]
    held_s, held_state, held_saved = (x[None, :] - x[:, None] for x in (seconds, state, saved))
    fixed = np.array(problem.fixed_s)
    for r, moments in enumerate(problem.moments):
        own = held_s + fixed[r]
        before = (seconds + fixed[:r].sum())[:, None]
        behind = (seconds[-1] - seconds + fixed[r + 1 :].sum())[None, :]
        took = problem.batches * own + before + np.maximum(waits(problem, r, own, behind), 0.0)
        fits = (size >= problem.fewest[r]) & (size <= problem.most[r])
        for moment in moments:
            fits &= held_state + moment.held[0] * held_saved + moment.base_bytes <= problem.limit_bytes
        yield np.where(fits, took, np.inf), own
