"""Which rows of an MoE layer go where: plain arithmetic on the choices of all tokens, the same on every rank.

A slot is one (token, choice) pair. A rank holds its slots by expert, in the order of its tokens; chunk i of r takes part i of
the slots of each expert, so that every chunk meets all experts. No slot is dropped, so sizes are those of the routing. Ranks
are places in their replica: q = e * esp + s. Part i of n rows in p parts is n i // p to n (i + 1) // p: they differ by one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplan.runtime.placement import Placement

Ints: TypeAlias = npt.NDArray[np.int64]
Split: TypeAlias = Literal["tokens", "slots", "none"]
"""What tensor-parallel ranks divide among them before the layer sends: tokens, slots of every expert, or nothing."""


def cut(count: Any, parts: int, part: int) -> tuple[Any, Any]:
    """Start and size of a part of `count` rows; numbers or arrays."""
    start = count * part // parts
    return start, count * (part + 1) // parts - start


def ranges(starts: Any, sizes: Any) -> Ints:
    """The numbers from each start, `sizes` many, one range behind the other."""
    first, many = np.ravel(starts).astype(np.int64), np.ravel(sizes).astype(np.int64)
    out: Ints = np.repeat(first - before(many), many) + np.arange(many.sum())
    return out


def before(sizes: Any, axis: int = 0) -> Ints:
    """Sum of the sizes that stand before each, along an axis."""
    out: Ints = np.cumsum(sizes, axis=axis, dtype=np.int64) - sizes
    return out


def inverse(order: Ints, length: int) -> Ints:
    """Where each of `length` numbers stands in an order of them; 0 for those that are not in it."""
    out = np.zeros(length, np.int64)
    out[order] = np.arange(len(order))
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The slots that each rank sends, and how this rank finds its own again."""

    counts: Ints
    """[ranks, experts]: slots that each rank sends to each expert."""
    order: Ints
    """Slots that this rank sends, by expert: row of the token x top-k + choice."""
    held: Ints
    """For each slot of this rank's own tokens, its place among those that come back to it: of `order`, or of all slots of
    its tensor-parallel group."""
    shares: tuple[Ints, ...] = ()
    """Split by slots: places, among all slots of the group, of those that each of its ranks sends."""
    padded: int = 0
    """Nothing split: tokens to which those of each owner are padded."""


def routing(
    split: Split, ids: Sequence[Ints], experts: int, placement: Placement, place: int, owners: Sequence[int]
) -> Routing:
    """Routing of the rank at `place`, from the choices [tokens, top-k] of all ranks of its replica.

    `owners`: places of the ranks whose tokens it gathers, itself among them, where nothing is split.
    """
    chosen = np.stack([np.bincount(each.ravel(), minlength=experts) for each in ids]).astype(np.int64)
    mine, topk, mp = ids[place], ids[place].shape[1], placement.mp
    if split == "none":
        return _gathered(ids, chosen, topk, placement, place, owners)
    order = np.argsort(mine.ravel(), kind="stable")
    held = inverse(order, mine.size)
    if split == "tokens":
        return Routing(counts=chosen, order=order, held=held)
    counts = np.stack([cut(chosen[q], mp, q % mp)[1] for q in range(placement.ranks)])
    total = chosen[place]
    shares = tuple(ranges(before(total) + start, size) for start, size in (cut(total, mp, m) for m in range(mp)))
    return Routing(counts=counts, order=order[shares[place % mp]], held=held, shares=shares)


def _gathered(ids: Sequence[Ints], chosen: Ints, topk: int, placement: Placement, place: int, owners: Sequence[int]) -> Routing:
    """Every rank sends the slots of the tokens that it has gathered; these are padded to the most tokens of an owner."""
    step = placement.esp // len(owners)
    sources = np.arange(placement.ranks)
    # [ranks, owners of each]
    gathered = (sources // placement.esp * placement.esp + sources % step)[:, None] + step * np.arange(len(owners))
    padded = max(len(ids[q]) for q in owners)
    rows = np.concatenate([i * padded * topk + np.arange(ids[q].size) for i, q in enumerate(owners)])
    order = rows[np.argsort(np.concatenate([ids[q].ravel() for q in owners]), kind="stable")]
    own = list(owners).index(place) * padded * topk
    held = inverse(order, padded * topk * len(owners))[own : own + ids[place].size]
    return Routing(counts=chosen[gathered].sum(axis=1), order=order, held=held, padded=padded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Rows of one chunk on this rank."""

    send: Ints
    """[places]: rows for the experts of each place."""
    arrive: Ints
    """[ranks]: rows of each rank of the replica for the experts of this rank."""
    local: Ints
    """[ranks, local experts]: the same by expert."""
    first: Ints
    """[ranks, local experts]: at which of its slots for an expert a rank begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouped:
    """Rows that the experts of this rank work on in one chunk, of those that arrived."""

    pick: Ints
    """Place among the arrived rows of each row, by expert and rank that sent it."""
    back: Ints
    """Place among the picked rows of each arrived row; 0 where no row arrived."""
    sizes: Ints
    """[local experts]: rows of each."""
    names: Ints
    """A number of each picked row that does not depend on the chunks."""


class Traffic:
    """A routing in chunks, as the rank at `place` sees it."""

    def __init__(self, routing: Routing, placement: Placement, place: int, degree: int) -> None:
        self.placement, self.place, self.counts = placement, place, routing.counts
        self.local = routing.counts.shape[1] // placement.ep
        mine = slice(place // placement.esp * self.local, (place // placement.esp + 1) * self.local)
        self.chunks: list[Chunk] = []
        order: list[Ints] = []
        for i in range(degree):
            start, size = cut(routing.counts, degree, i)
            order.append(ranges(before(routing.counts[place]) + start[place], size[place]))
            self.chunks.append(
                Chunk(
                    send=size[place].reshape(placement.ep, -1).sum(axis=1),
                    arrive=size[:, mine].sum(axis=1),
                    local=size[:, mine],
                    first=start[:, mine],
                )
            )
        self.mine = routing.counts[:, mine]
        self.order = np.concatenate(order)
        """The slots that this rank sends, one chunk behind the other."""

    def grouped(self, i: int, sources: Ints, arrived_at: Ints, arrived: int) -> Grouped:
        """Rows of chunk i from `sources`, whose blocks begin at `arrived_at` among `arrived` rows."""
        chunk = self.chunks[i]
        local = chunk.local[sources]
        # [local experts, sources]
        pick = ranges((arrived_at[:, None] + before(local, axis=1)).T, local.T)
        held = self.mine[sources].T
        names = ranges(before(held.ravel()).reshape(held.shape) + chunk.first[sources].T, local.T)
        return Grouped(pick=pick, back=inverse(pick, arrived), sizes=local.sum(axis=0), names=names)

    def lane(self) -> Ints:
        """Ranks with which this one exchanges among ep."""
        return np.arange(self.placement.ep) * self.placement.esp + self.place % self.placement.esp

    def blocks(self) -> Ints:
        """[ranks, places]: all slots that each rank sends to the experts of each place."""
        out: Ints = self.counts.reshape(len(self.counts), self.placement.ep, self.local).sum(axis=2)
        return out


def copied(send: Ints, shards: int) -> Ints:
    """Slots, of which `send[e]` go to place e, in the order in which they go to each of its shards."""
    return ranges(np.repeat(before(send), shards), np.repeat(send, shards))


def copies(send: Ints, shards: int) -> Ints:
    """[shards, slots]: where `copied` has each slot."""
    starts = before(np.repeat(send, shards)).reshape(len(send), shards)
    return np.stack([ranges(starts[:, shard], send) for shard in range(shards)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of S2's last exchange: part `esp` of the slots between places at a distance."""

    send: Ints
    """[ranks]: rows of partial sums to each rank."""
    receive: Ints
    """[ranks]: rows of partial sums from each rank."""
    order: Ints
    """Places among the arrived rows of those that are sent."""
    padded: int
    """Most rows that a rank of the tensor-parallel group has received when partial sums are added."""
    at: tuple[Ints, ...]
    """Of each rank of the group, which of the slots that it sent are these."""


def phases(traffic: Traffic) -> list[Phase]:
    """The phases of an unchunked exchange, one for each rank of a replica.

    Phase b esp + t: each rank receives part t of its slots at place e - b from all shards there, so that the shards' partial
    sums are complete and can be gathered. Without shards this is the exchange with the rank at distance b.
    """
    placement, place, blocks = traffic.placement, traffic.place, traffic.blocks()
    ep, esp, mp, e = placement.ep, placement.esp, placement.mp, place // placement.esp
    begins, arrived_at = before(blocks, axis=1), before(blocks[:, e])
    group = np.arange(mp) + place // mp * mp
    out = []
    for b in range(ep):
        shards = np.arange(esp)
        to, source = (e + b) % ep * esp + shards, (e - b) % ep * esp + shards
        for t in range(esp):
            send, receive = np.zeros(placement.ranks, np.int64), np.zeros(placement.ranks, np.int64)
            start, size = cut(blocks[to, e], esp, t)
            send[to] = size
            receive[source] = cut(blocks[place, (e - b) % ep], esp, t)[1]
            at = []
            for q in group:
                there = (q // esp - b) % ep
                first, rows = cut(blocks[q, there], esp, t)
                at.append(begins[q, there] + first + np.arange(rows))
            out.append(
                Phase(
                    send=send,
                    receive=receive,
                    order=ranges(arrived_at[to] + start, size),
                    padded=max(len(each) for each in at),
                    at=tuple(at),
                )
            )
    return out
