"""Level splits: even splits of the layers of interleaved pipelines, under the costs of many layouts at once.

A virtual stage holds equally many layers on all ranks but where the ends differ: with rounds of micro-batches through unequal
chunks ranks wait for each other, least where a virtual stage takes equally long on all ranks. Of the virtual stages those with
a layer more are neighbours. What the stages would hold beyond the layers is taken from the chunk with the head, the first one,
and the last ones before the head; what they lack goes to these.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.memory import StageParameters
from moeplan.costmodels.pipeline.waves import span_s
from moeplan.planner.stages.problem import chunk_sizes, layer_counts, pass_seconds
from moeplan.planner.stages.setup import Group

Ints = npt.NDArray[np.int64]
MOST = 4096
"""Level splits of a pipeline that are looked at."""
EXTRA = 2
"""Layers that a chunk at an end may have beyond others; it may have any number less."""
BESIDE = 3
"""Other chunks that may have one layer more or less."""


class LevelSplits:
    """The level splits of a group of stage problems: n layouts, S splits."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.splits = level_splits(group.ranks, group.chunks_per_rank, len(group.kinds), group.fewest, group.most)
        sizes = self.splits.reshape(-1, group.chunks_per_rank, group.ranks)
        self.counts = layer_counts(group.kinds, len(group.forward_s), sizes, group.again)

    def spans(self) -> tuple[Any, Any]:
        """The closed form of every split under every layout, and a micro-batch on its slowest rank, in seconds, [n, S]."""
        group = self.group
        seconds = (group.forward_s + group.backward_s).T
        spans, longest, before = np.zeros((3, len(seconds), len(self.splits)))
        for r, fixed in enumerate(group.fixed_forward_s + group.fixed_backward_s):
            own = seconds @ self.counts[:, :, r].sum(axis=1).T + fixed[:, None]
            longest = np.maximum(longest, own)
            spans = np.maximum(spans, group.batches * own + before)
            before += seconds @ self.counts[:, 0, r].T
        return spans, longest

    def fits(self, layouts: Any, splits: Any) -> Any:
        """Whether each of some layouts fits under each of some splits, [layouts, splits]."""
        group, counts = self.group, self.counts[splits]
        state, saved = group.state_bytes[:, layouts].T, group.saved_bytes[:, layouts].T
        out = np.ones((len(layouts), len(splits)), np.bool_)
        for r, (held, base) in enumerate(group.moments):
            states = state @ counts[:, :, r].sum(axis=1).T
            for in_flight, beside in zip(held, base[:, layouts], strict=True):
                kept = saved @ np.einsum("svk,v->ks", counts[:, :, r], in_flight)
                out &= states + kept + beside[:, None] <= group.limit_bytes
        return out

    def most_parameters(self, layouts: Any, splits: Any) -> StageParameters:
        """Most dense parameters and most of experts that a rank holds, at least, of pairs of a layout and a split, [pairs]."""
        of_rank = self.counts[splits].sum(axis=1)
        most = []
        for of_layer, at_ends in self.group.parameters:
            layers = np.einsum("prk,kp->rp", of_rank, of_layer[:, layouts])
            most.append((layers + at_ends[:, layouts]).max(axis=0))
        return StageParameters(dense=most[0], expert=most[1], plain=0.0)

    def exact_spans(self, layouts: Any, splits: Any) -> Any:
        """Seconds of all passes of pairs of a layout and a split, run pass by pass, [pairs]."""
        group, counts = self.group, self.counts[splits]
        ways = (group.forward_s, group.fixed_forward_s), (group.backward_s, group.fixed_backward_s)
        forward, backward = (pass_seconds(counts, way[:, layouts].T, fixed[:, layouts].T) for way, fixed in ways)
        return span_s(forward, backward, group.batches)


def level_sizes(layers: int, pp: int, vpp: int) -> tuple[int, int]:
    """Fewest layers of a chunk of level splits that is not the first or one of the last two, and most of any."""
    fewest, most = chunk_sizes(layers, pp, vpp)
    whole = layers // (pp * vpp)
    return max(fewest, whole - 1), min(most, whole + 2 + EXTRA)


@functools.lru_cache(maxsize=1024)
def level_splits(p: int, v: int, layers: int, fewest: tuple[int, ...], most: tuple[int, ...]) -> Ints:
    """Level splits of a pipeline as the layers of each chunk, [S, C]; each holds at least `fewest` and at most `most`."""
    low, high, whole = np.array(fewest), np.array(most), layers // (p * v)
    place = np.arange(v)
    after = (place - place[:, None]) % v  # of each virtual stage the place, counted from each as the first
    longer = np.concatenate([np.zeros((1, v), np.int64), *(after < n for n in range(1, v + 1))])
    even = np.clip(np.repeat(np.concatenate([whole + longer, whole + 1 + longer]), p, axis=1), low, high)
    # 1. the ends take what differs
    last = p * v - 1
    ends = np.array([0, last - 1, last] if last > 1 else [0, last])
    ways = range(-int(even.max()), EXTRA + 1)
    changes = np.array(list(itertools.product(ways, repeat=len(ends))))
    left = (layers - even.sum(axis=1))[:, None] - changes.sum(axis=1)
    which, how = np.nonzero(np.abs(left) <= BESIDE)
    out, left = even[which], left[which, how]
    out[:, ends] += changes[how]
    kept = (out >= low).all(axis=1) & (out <= high).all(axis=1)
    out, left = out[kept], left[kept]
    # 2. by one each the chunks before the last
    step = np.sign(left)[:, None]
    room = (low <= out + step) & (out + step <= high)
    room[:, ends] = False
    taken = room & (np.cumsum(room[:, ::-1], axis=1)[:, ::-1] <= np.abs(left)[:, None])
    out = np.unique((out + step * taken)[taken.sum(axis=1) == np.abs(left)], axis=0)
    inner = out[:, 1:-2] if last > 2 else np.zeros((len(out), 1), np.int64)
    return out[np.argsort(out.max(axis=1, initial=0) - inner.min(axis=1, initial=0), kind="stable")[:MOST]]
