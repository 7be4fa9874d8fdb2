"""Seconds of all passes of a 1F1B pipeline, plain or interleaved, for unequal chunks and many layouts at once.

The order of passes on a rank is fixed (`one_f_one_b.py`, `interleaved.py`), so a pass starts at the end of the one before it on
its rank or of the one that it needs on another, whichever is later. Passes that need nothing of one another form waves, and a
wave is one step of numpy over ranks and layouts. Slot k of rank r has forward pass k and backward pass k - w_r, where w_r
passes run ahead: 2 (p - 1 - r) + (v - 1) p, or p - 1 - r for one chunk a rank. Wave 2 k + a r holds the forward passes, the
next one the backward passes, a = 2 (1 for one chunk). Once every wave comes a fixed time after the one a group of micro-batches
earlier, further groups take that time each, so few groups are run. Sends take no time. Units: seconds. Where v > 1, groups of
p micro-batches must be full. Tests hold it to the event loop.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GROUPS = 4
"""Groups of p micro-batches that are run before further ones are taken to be like the last."""
SAME = 1e-10
"""Relative difference below which two groups take the same time."""


def span_s(forward: Floats, backward: Floats, batches: npt.ArrayLike) -> Floats:
    """Seconds from the first pass to the last, [n].

    `forward` and `backward`: of each chunk of each rank, [p, v, n]. `batches`: micro-batches, one number or [n].
    """
    p, _, n = forward.shape
    counts = np.broadcast_to(np.asarray(batches, np.int64), n)
    further = np.maximum(0, (counts - GROUPS * p) // p)
    out = np.empty(n)
    for run in np.unique(counts - further * p):
        rows = np.flatnonzero(counts - further * p == run)
        more = further[rows]
        span, group_s = _Run(forward[..., rows], backward[..., rows], int(run)).all()
        out[rows] = span + more * np.where(more > 0, group_s, 0.0)
    unsettled = np.isnan(out)
    for count in np.unique(counts[unsettled]):  # where groups do not settle, all of them are run
        rows = np.flatnonzero(unsettled & (counts == count))
        out[rows] = _Run(forward[..., rows], backward[..., rows], int(count)).all()[0]
    return out


class _Run:
    """State of the waves: when each rank is free, and the last ends of forward and backward passes."""

    def __init__(self, forward: Floats, backward: Floats, batches: int) -> None:
        self.p, self.v, n = forward.shape
        self.passes = batches * self.v
        # Seconds of pass (start - rank) or (start + rank) on every rank, for each start; that of others differs by full cycles.
        cycle, ranks = np.arange(self.p * self.v)[:, None], np.arange(self.p)
        self.forward = forward[ranks, (cycle - ranks) // self.p % self.v]
        self.backward = backward[ranks, self.v - 1 - (cycle + ranks) // self.p % self.v]
        self.free = np.zeros((self.p, n))
        # Ends by rank, with a place before the first rank and one behind the last for what these wait for.
        self.there, self.back = np.zeros((self.p + 1, n)), np.zeros((self.p + 1, n))
        # Ends of forward passes on the last rank, which its backward passes and the next chunk on the first rank wait for, and
        # of backward passes on the first rank, which the chunk before on the last rank waits for.
        self.last_there, self.first_back = np.zeros((self.passes, n)), np.zeros((self.passes, n))

    def all(self) -> tuple[Floats, Floats]:
        """Seconds of all passes, and of a group of p micro-batches, [n] each; NaN where the last two groups differ."""
        p, v, passes = self.p, self.v, self.passes
        skew, ahead = (2, (v + 1) * p - 2) if v > 1 else (1, p - 1)
        full = 2 * passes - 2  # no rank has run out of forward passes yet
        before: Floats | None = None
        group_s = np.full(self.free.shape[1], np.nan)
        for wave in range(2 * (passes + ahead) + skew * p):
            # forward pass k on rank r where 2 k + skew r = wave; backward pass l where 2 (l + w_r) + skew r + 1 = wave
            if skew == 2 and wave % 2 == 0:
                self._forward(range(max(0, wave // 2 - passes + 1), min(p, wave // 2 + 1)), wave // 2)
            elif skew == 2:
                start = wave // 2 - ahead
                self._backward(range(max(0, -start), min(p, passes - start)), start)
            else:
                low = max(0, wave - 2 * passes + 2)
                self._forward(range(low + (wave - low) % 2, min(p, wave + 1), 2), wave)
                start = wave - 1 - 2 * ahead
                low = max(0, -start)
                self._backward(range(low + (start + low) % 2, min(p, 2 * passes - start), 2), start)
            if wave == full - 2 * p * v:
                before = self._state()
            elif wave == full and before is not None:
                group_s = _same(self._state() - before)
        return np.asarray(self.free.max(axis=0)), group_s

    def _forward(self, ranks: range, start: int) -> None:
        """Forward passes (start - rank) of these ranks, in half steps where every other rank has one."""
        if not len(ranks):
            return
        p, r = self.p, slice(ranks.start, ranks.stop, ranks.step)
        if ranks.start == 0:
            first = start // ranks.step
            self.there[0] = self.last_there[first - p] if first // p % self.v else 0.0
        done = np.maximum(self.free[r], self.there[r])
        done += self.forward[start % len(self.forward), r]
        self.free[r] = self.there[ranks.start + 1 : ranks.stop + 1 : ranks.step] = done
        if ranks[-1] == p - 1:
            self.last_there[(start - p + 1) // ranks.step] = done[-1]

    def _backward(self, ranks: range, start: int) -> None:
        """Backward passes (start + rank) of these ranks, in half steps where every other rank has one."""
        if not len(ranks):
            return
        p, r = self.p, slice(ranks.start, ranks.stop, ranks.step)
        if ranks[-1] == p - 1:
            last = (start + p - 1) // ranks.step
            seen = last // p % self.v
            self.back[p] = self.first_back[last - p] if seen else self.last_there[last + (self.v - 1) * p]
        done = np.maximum(self.free[r], self.back[ranks.start + 1 : ranks.stop + 1 : ranks.step])
        done += self.backward[start % len(self.backward), r]
        self.free[r] = self.back[r] = done
        if ranks.start == 0:
            self.first_back[start // ranks.step] = done[0]

    def _state(self) -> Floats:
        return np.concatenate([self.free, self.there[1:], self.back[:-1]])


def _same(taken: Floats) -> Floats:
    """The time that every entry took, [n]; NaN where they differ."""
    low, high = taken.min(axis=0), taken.max(axis=0)
    return np.where(high - low <= SAME * high, high, np.nan)
