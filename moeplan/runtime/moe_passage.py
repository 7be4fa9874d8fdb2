"""One direction of an MoE layer under way: the buffers that its tasks hand to each other, and where every row of them lies.

A direction takes one row for each token (an input, or an output's gradient), sends a row for each slot to all shards of its
expert, and brings their sum back. What tells where rows lie is on the device before the first task starts. Buffers live until
the direction is dropped, since a lane of a GPU may read them after the host has moved on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime.experts import Rows
from moeplan.runtime.placement import LayerRanks
from moeplan.runtime.rows import Ints, Phase, Routing, Split, Traffic, before, copied, copies, cut, inverse, phases

Arrival: TypeAlias = Literal["lane", "shards", "all"]
"""Whose rows arrive at a shard of experts: those of its lane of ep; of the lanes of all shards, gathered; or of all ranks,
which send to every shard."""
Closing: TypeAlias = Literal["none", "tokens", "slots", "phases"]
"""What the tensor-parallel ranks gather at the end; "phases" are of slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a schedule moves rows."""

    split: Split
    arrival: Arrival
    closing: Closing
    tasks: Mapping[str, Callable[[Passage, int], float]]
    """What a task of each kind does in a chunk (0, 1, ..); returns its amount as `LayerSchedule.amounts` counts it."""
    owners: str = "owners"
    """Axis on which whole tokens are gathered, where nothing is split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one direction works on."""

    ranks: LayerRanks
    routing: Routing
    traffic: Traffic
    topk: int
    group_tokens: int
    """Tokens of the tensor-parallel group."""
    values: Tensor
    """[tokens, hidden]: rows of the tokens of the group, or of this rank's part where tokens are split."""
    scales: Tensor | None
    """[slots]: factors of the slots that `routing.order` counts; None: none."""
    experts: Callable[[int, Tensor, Rows], tuple[Tensor, float]]
    """Rows from the experts for those that arrived in a chunk, and their FLOP."""
    collect: Callable[[Tensor], Tensor]
    """[tokens, hidden] of the rows that came back, [tokens, top-k, hidden]."""


class Passage:
    """State of one direction."""

    def __init__(self, way: Way, load: Load) -> None:
        self.way, self.load, self.ranks, self.traffic = way, load, load.ranks, load.traffic
        self.chunks, self.lane = load.traffic.chunks, load.traffic.lane()
        self.values = load.values
        self.phases: list[Phase] = phases(load.traffic) if way.closing == "phases" else []
        self.padded = [int(self._by_shard(i).sum(axis=0).max()) for i in range(len(self.chunks))]
        """[chunks]: most rows that arrive in the lane of a shard."""
        self.rows = [self._rows(i) for i in range(len(self.chunks))]
        self.slots = self.index(load.routing.order[load.traffic.order])
        self.held = self.index(self._held())
        shards = self.ranks.placement.esp if way.arrival == "all" else 1
        self.copied = [self.index(copied(chunk.send, shards)) for chunk in self.chunks]
        """[chunks]: the slot of each row that is sent, where every shard is sent each slot."""
        self.copies = [self.index(copies(chunk.send, shards)) for chunk in self.chunks]
        """[chunks]: [shards, slots], the place of each slot among these rows."""
        # Filled by the tasks, a tensor for each chunk (`back`: for each phase).
        self.sent: dict[int, Tensor] = {}
        """Rows of this rank's slots, by expert."""
        self.arrived: dict[int, Tensor] = {}
        """Rows for this rank's experts."""
        self.made: dict[int, Tensor] = {}
        """What the experts made of them, in the order of arrival or that of the phases."""
        self.summed: dict[int, Tensor] = {}
        """Those of this rank's lane, summed over the shards."""
        self.back: dict[int, Tensor] = {}
        """Rows of this rank's slots that came back."""
        self.gathered: Tensor = self.values.new_empty(self._gathered_rows(), self.values.shape[1])
        """What the tensor-parallel ranks gathered of slots."""
        self.tokens: Tensor | None = None
        """[tokens of the group, hidden], where they were gathered."""
        if way.split != "none":
            self.order()

    def index(self, numbers: Ints) -> Tensor:
        """Numbers on the device."""
        return torch.from_numpy(numbers).to(self.values.device)

    def order(self) -> None:
        """Copy the values to the slots of each chunk."""
        rows = self.values.index_select(0, self.slots // self.load.topk)
        if self.load.scales is not None:
            rows *= self.load.scales.index_select(0, self.slots)[:, None].to(rows.dtype)
        self.sent.update(enumerate(torch.split(rows, [int(chunk.send.sum()) for chunk in self.chunks])))

    def own(self, i: int) -> slice:
        """Of the rows that arrived in a chunk, those of this rank's lane."""
        start = self.ranks.place("esp") * self.padded[i] if self.way.arrival == "shards" else 0
        return slice(start, start + int(self.chunks[i].arrive[self.lane].sum()))

    def collected(self) -> Tensor:
        """[tokens, hidden]: what came back, by token."""
        rows = (
            torch.cat([self.back[i] for i in range(len(self.chunks))])
            if self.way.closing in ("none", "tokens")
            else self.gathered
        )
        return self.load.collect(
            rows.index_select(0, self.held).view(len(self.held) // self.load.topk, self.load.topk, rows.shape[1])
        )

    def result(self) -> Tensor:
        """[tokens of the group, hidden]: what the direction gives."""
        return self.collected() if self.tokens is None else self.tokens

    def slices(self) -> list[int]:
        """Tokens of each tensor-parallel rank, where they are divided."""
        mp = self.ranks.placement.mp
        return [int(cut(self.load.group_tokens, mp, m)[1]) for m in range(mp)]

    def phase_at(self, i: int) -> slice:
        """Where the slots of a phase are gathered."""
        mp = self.ranks.placement.mp
        start = mp * sum(phase.padded for phase in self.phases[:i])
        return slice(start, start + mp * self.phases[i].padded)

    def slots_padded(self) -> int:
        """Most slots that a tensor-parallel rank has, where they are divided."""
        return max(map(len, self.load.routing.shares))

    def _gathered_rows(self) -> int:
        if self.way.closing == "phases":
            return self.ranks.placement.mp * sum(phase.padded for phase in self.phases)
        return self.ranks.placement.mp * self.slots_padded() if self.way.closing == "slots" else 0

    def _by_shard(self, i: int) -> Ints:
        """[places, shards]: rows that each rank sends to the experts of this one's place."""
        return self.chunks[i].arrive.reshape(self.ranks.placement.ep, self.ranks.placement.esp)

    def _rows(self, i: int) -> Rows:
        """Rows of the local experts among those that arrive."""
        arrive = self.chunks[i].arrive
        sources, at, arrived = np.arange(len(arrive)), before(arrive), int(arrive.sum())
        if self.way.arrival == "lane":
            sources, at, arrived = self.lane, before(arrive[self.lane]), int(arrive[self.lane].sum())
        elif self.way.arrival == "shards":
            esp, padded = self.ranks.placement.esp, self.padded[i]
            at, arrived = (before(self._by_shard(i)) + padded * np.arange(esp)).ravel(), esp * padded
        grouped = self.traffic.grouped(i, sources, at, arrived)
        if self.phases:
            grouped = replace(grouped, back=grouped.back[np.concatenate([phase.order for phase in self.phases])])
        return Rows.of(grouped, self.values.device)

    def _held(self) -> Ints:
        """Places of the slots of this rank's tokens among the rows that `collected` takes."""
        routing = self.load.routing
        if not routing.shares:
            return inverse(self.traffic.order, len(self.traffic.order))[routing.held]
        at = np.zeros(sum(map(len, routing.shares)), np.int64)
        for m, share in enumerate(routing.shares):
            if not self.phases:
                at[share] = m * self.slots_padded() + np.arange(len(share))
            for i, phase in enumerate(self.phases):
                at[share[phase.at[m]]] = self.phase_at(i).start + m * phase.padded + np.arange(len(phase.at[m]))
        return at[routing.held]
