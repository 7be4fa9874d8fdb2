"""How much of what a rank will hold lies already on a device: bytes for ranks, nodes and all pairs of nodes.

    have(g, r) = sum over spreads of bytes * |slots of g and r| * overlap(experts) * overlap(elements)
Borders are compared as whole numbers over the common denominator of both cuts, so that equal shares overlap to the last bit.
The gain of putting a new node on an old one is the best way of putting its ranks on the other's devices. Stages that share the
same slots have the same gains. Few pairs of nodes share some of the sharded states; the rest differ by what they hold of the
weights alone, which is one of few things: not all pairs are worked out. Units: bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.errors import ProblemError
from moeplan.planner.elastic.assignment import best_inside
from moeplan.planner.elastic.holdings import Floats, Holdings, Ints, Spread

_PAIRS = 1 << 20
"""Pairs of ranks whose overlap is held at a time."""


def check_same(old: Holdings, new: Holdings) -> None:
    """Refuse holdings of two models, or nodes of two sizes."""
    for a, b in zip(old.spreads, new.spreads, strict=True):
        if not np.array_equal(a.sizes, b.sizes):
            raise ProblemError(f"state of '{old.model}' cannot become state of '{new.model}': their layers differ")
    if old.node_gpus != new.node_gpus:
        raise ProblemError(f"nodes of {old.node_gpus} GPUs cannot become nodes of {new.node_gpus}: nodes move as they are")


def stage_overlap(old: Holdings, new: Holdings) -> Floats:
    """Bytes of the slots that two stages share, by spread, [spreads, old stages, new stages]."""
    shared = [
        min(a.bytes_each, b.bytes_each) * ((old.present * a.sizes) @ new.present.T)
        for a, b in zip(old.spreads, new.spreads, strict=True)
    ]
    return np.stack(shared)


def share_overlap(old: Spread, new: Spread, at: Any, to: Any) -> Any:
    """Share of a slot that positions `at` of an old stage and positions `to` of a new one both hold, broadcast."""
    expert = _overlap(old.expert[at], old.experts, new.expert[to], new.experts)
    return expert * _overlap(old.part[at], old.parts, new.part[to], new.parts, (old.padded, new.padded, old.real))


def _overlap(a: Any, parts: int, b: Any, others: int, cut: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """Common share of part `a` of `parts` and part `b` of `others`; `cut`: what either cuts, and what of it counts."""
    first, second, real = cut[0] * others, cut[1] * parts, cut[2] * parts * others
    low = np.maximum(a * first, b * second)
    high = np.minimum(np.minimum((a + 1) * first, (b + 1) * second), real)
    return np.maximum(high - low, 0) / real


def rank_overlap(old: Holdings, new: Holdings, at: Any, to: Any) -> Floats:
    """Bytes that old ranks `at` and new ranks `to` both hold, broadcast; ranks beyond the last hold nothing."""
    both = (at < old.world) & (to < new.world)
    at, to = np.minimum(at, old.world - 1), np.minimum(to, new.world - 1)
    (stage, here), (into, there) = np.divmod(at, old.positions), np.divmod(to, new.positions)
    shared = stage_overlap(old, new)
    total: Any = 0.0
    for s, (a, b) in enumerate(zip(old.spreads, new.spreads, strict=True)):
        if shared[s].any():
            total = total + shared[s][stage, into] * share_overlap(a, b, here, there)
    return np.asarray(np.where(both, total, 0.0), np.float64)


def node_gains(old: Holdings, new: Holdings) -> Floats:
    """Most bytes that a new node finds where it is put on an old one, [old nodes, new nodes]."""
    node = old.node_gpus
    if old.positions % node or new.positions % node:
        return _gains_of_ranks(old, new)
    shared = stage_overlap(old, new)
    used = [s for s in range(len(shared)) if shared[s].any()]
    # Stages that share the same slots: [spreads, pairs of stages] -> [kinds of pairs, spreads].
    rows, kind = np.unique(shared[used].reshape(len(used), -1).T, axis=0, return_inverse=True)
    fine = [s for s in used if old.spreads[s].sharded and new.spreads[s].sharded]
    coarse = [s for s in used if s not in fine]
    at, like = _alike(old, coarse)
    to, likewise = _alike(new, coarse)
    a, b = np.divmod(_touching(old, new, fine), new.positions // node)
    alone = _shares(old, new, coarse, np.repeat(at, len(to)), np.tile(to, len(at)))
    pairs = _shares(old, new, used, a, b)
    where = [used.index(s) for s in coarse]
    found = np.zeros((len(rows), len(like), len(likewise)))
    kinds = np.flatnonzero(rows.any(axis=1))
    # 1. nodes that share no part of the sharded states, 2. those that do
    gains = _gains([shares @ row for k in kinds for shares, row in ((alone, rows[k, where]), (pairs, rows[k]))])
    for k, of_class, of_pair in zip(kinds, gains[::2], gains[1::2], strict=True):
        found[k] = of_class.reshape(len(at), len(to))[np.ix_(like, likewise)]
        found[k, a, b] = of_pair
    # [old stages, new stages, rooms, others] -> [old nodes, new nodes]
    blocks = found[kind.reshape(old.stages, new.stages)]
    return blocks.transpose(0, 2, 1, 3).reshape(old.nodes, new.nodes)


def _alike(held: Holdings, spreads: list[int]) -> tuple[Ints, Ints]:
    """One node of a stage for each set of shares in `spreads`, and which of them every node is like."""
    columns = [c for s in spreads for c in (held.spreads[s].expert, held.spreads[s].part)]
    marks = np.stack([np.zeros(held.positions, np.int64), *columns], axis=1).reshape(-1, held.node_gpus * (len(columns) + 1))
    _, first, like = np.unique(marks, axis=0, return_index=True, return_inverse=True)
    return first, like.reshape(-1)


def _touching(old: Holdings, new: Holdings, spreads: list[int]) -> Ints:
    """Pairs of nodes of a stage that share something of `spreads`, as places in [nodes, new nodes]."""
    node, others = old.node_gpus, new.positions // new.node_gpus
    found = [np.zeros(0, np.int64)]
    distinct = {_borders(old.spreads[s], new.spreads[s]): s for s in spreads}
    for s in distinct.values():
        a, b = old.spreads[s], new.spreads[s]
        experts = _overlapping(a.experts, b.experts, 1, 1)
        parts = _overlapping(a.parts, b.parts, a.padded, b.padded)
        # [pairs of experts, pairs of parts] of both sides' cells
        one = (experts[0][:, None] * a.parts + parts[0]).reshape(-1)
        two = (experts[1][:, None] * b.parts + parts[1]).reshape(-1)
        one, two = _holders(a, node, one, two)
        two, one = _holders(b, node, two, one)
        found.append(np.unique(one * others + two))
    return np.unique(np.concatenate(found))


def _borders(a: Spread, b: Spread) -> tuple[int, ...]:
    return a.experts, a.parts, a.padded, b.experts, b.parts, b.padded


def _overlapping(parts: int, others: int, padded: int, length: int) -> tuple[Ints, Ints]:
    """Pairs of parts that overlap when one length is cut into `parts` and another into `others`."""
    every = np.arange(parts)
    low = every * padded * others // (length * parts)
    high = np.minimum(-(-(every + 1) * padded * others // (length * parts)), others)
    count = np.maximum(high - low, 0)
    first = np.repeat(every, count)
    return first, np.arange(len(first)) - np.repeat(np.cumsum(count) - count - low, count)


def _holders(spread: Spread, node: int, cell: Ints, other: Ints) -> tuple[Ints, Ints]:
    """The nodes of a stage that hold each cell, and what stood beside the cell."""
    order = np.argsort(spread.cell, kind="stable")
    first, last = (np.searchsorted(spread.cell[order], cell, side=side) for side in ("left", "right"))
    count = last - first
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    return order[place] // node, np.repeat(other, count)


def _shares(old: Holdings, new: Holdings, spreads: list[int], a: Ints, b: Ints) -> Floats:
    """Common shares of the ranks of nodes `a` and new nodes `b` of a stage, [pairs, node, node, spreads]."""
    ranks = np.arange(old.node_gpus)
    at, to = (a[:, None] * old.node_gpus + ranks)[:, :, None], (b[:, None] * old.node_gpus + ranks)[:, None]
    found = [share_overlap(old.spreads[s], new.spreads[s], at, to) for s in spreads]
    return np.stack(found, axis=-1) if found else np.zeros((len(a), old.node_gpus, old.node_gpus, 0))


def _gains_of_ranks(old: Holdings, new: Holdings) -> Floats:
    """The same where a node holds ranks of two stages."""
    node = old.node_gpus
    to = np.arange(new.nodes * node)
    step = max(1, _PAIRS // (node * len(to)))
    parts = []
    for first in range(0, old.nodes, step):
        at = np.arange(first * node, min(first + step, old.nodes) * node)
        # [old ranks, new ranks] -> [old nodes, new nodes, node, node]
        pairs = rank_overlap(old, new, at[:, None], to[None]).reshape(-1, node, new.nodes, node).transpose(0, 2, 1, 3)
        parts.append(_gains([pairs.reshape(-1, node, node)])[0].reshape(-1, new.nodes))
    return np.concatenate(parts)


def _gains(tables: list[Floats]) -> list[Floats]:
    """Best sum of a one-to-one placement inside each pair of nodes, [n, node, node] -> [n], for several tables."""
    some, alike = [], []
    for pairs in tables:
        flat = np.ascontiguousarray(pairs).reshape(len(pairs), pairs.shape[1] * pairs.shape[2])
        # Pairs of nodes that look alike have the same weighted sum: one of each is worked out.
        weights = np.random.default_rng(0).random(flat.shape[1])
        _, first, inverse = np.unique(flat @ weights, return_index=True, return_inverse=True)
        some.append(pairs[first])
        alike.append(inverse)
    together = np.concatenate(some)
    gains = np.take_along_axis(together, best_inside(together)[:, :, None], axis=2)[:, :, 0].sum(axis=1)
    ends = np.cumsum([len(x) for x in some])[:-1]
    return [part[inverse] for part, inverse in zip(np.split(gains, ends), alike, strict=True)]
