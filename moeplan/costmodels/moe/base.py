"""What the schedules of one MoE layer share: its size, and a fitted time.

Ranks that share a tensor-parallel group (`mp_ranks`) hold the same tokens; every expert is cut among `esp_ranks`, and
`ep_ranks` such groups share the experts. Sizes are those of one tensor-parallel group before any division: the schedules
divide. Units: bytes, FLOP, seconds; numbers or arrays. Not valid for unbalanced loads: the fullest expert counts for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from moeplan.costmodels.tasks import Graph

Direction: TypeAlias = Literal["forward", "backward"]
Parts: TypeAlias = Mapping[str, Any]
"""Seconds of one task by its kind; numbers or arrays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlphaBeta:
    """A fitted time, alpha + beta x amount; numbers or arrays."""

    startup_s: Any
    """Alpha: seconds of an empty operation."""
    unit_s: Any
    """Beta: seconds of one more byte, or of one more FLOP where the amount is FLOP."""

    def time_s(self, amount: Any) -> Any:
        """Seconds of the operation on `amount` bytes, or FLOP."""
        return self.startup_s + self.unit_s * amount

    def among_s(self, amount: Any, ranks: Any) -> Any:
        """Seconds of a collective of `ranks` ranks on `amount` bytes; nothing where a rank is alone."""
        return np.where(np.asarray(ranks) > 1, self.time_s(amount), 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSize:
    """One MoE layer as a tensor-parallel group sees it; numbers or arrays."""

    token_bytes: Any
    """B L M elements in bytes: the input of the layer, the same on every rank of the group."""
    slot_bytes: Any
    """E T M elements in bytes: all slots of all experts, E T = k f B L where T is not padded."""
    expert_flop: Any
    """FLOP of all slots through whole experts, forward: 2 x GEMMs x E T M H."""
    mp_ranks: Any
    esp_ranks: Any
    ep_ranks: Any

    @property
    def all_ranks(self) -> Any:
        """P: ranks among which one copy of the experts is spread."""
        return self.ep_ranks * self.esp_ranks


def expert_line(gemm: AlphaBeta, gemms: Any) -> AlphaBeta:
    """Time of an expert of `gemms` equal GEMMs, over the FLOP of all of them: only the start-up is paid again."""
    return AlphaBeta(startup_s=gemms * gemm.startup_s, unit_s=gemm.unit_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Fitted times of the operations of a layer, forward; over bytes of the whole buffer, experts over FLOP."""

    exchange: AlphaBeta
    """All-to-all among the ep_ranks."""
    fused_exchange: AlphaBeta
    """All-to-all among all ranks (S1, S2): a fit of its own, as its start-up is longer."""
    gather: AlphaBeta
    """All-gather among the esp_ranks, over the gathered size."""
    scatter: AlphaBeta
    """Reduce-scatter among the esp_ranks, over the size before it."""
    reduce: AlphaBeta
    """All-reduce among the esp_ranks."""
    mp_gather: AlphaBeta
    """All-gather among the mp_ranks, over the gathered size."""
    experts: AlphaBeta
    """All GEMMs of an expert, forward; both gradients take alpha and beta twice."""


class LayerSchedule(ABC):
    """A way to run one MoE layer: what it moves, its tasks, and how long they take together.

    Kinds of tasks: D dispatch and C combine (all-to-all), G gather and S reduce-scatter among ESP, A all-reduce among ESP, E
    experts, M gather among the tensor-parallel ranks, R gradient all-reduce. Backward has the same shape with conjugate
    collectives of the same size and twice the expert FLOP.
    """

    name: ClassVar[str]
    """Word for options and files: "fsmoe"."""
    title: ClassVar[str]
    """What it does, in a line."""
    source: ClassVar[str]
    """Paper or code."""
    runs_on: ClassVar[tuple[str, ...]] = ()
    """Export targets that can execute it; empty: none."""
    chunked: ClassVar[bool] = False
    """Whether the number of chunks is a choice."""

    @abstractmethod
    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """Bytes (E: FLOP) of one rank in one direction by kind, all chunks together: of each D, each C, and so on."""

    @abstractmethod
    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds of one task by kind at `degree` chunks; a group of one rank takes no time."""

    @abstractmethod
    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Tasks of one direction in `degree` chunks, on the resources compute, intra and inter."""

    @abstractmethod
    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """Closed form: the makespan of the graph with these durations; `parts` may hold "R", which is 0 otherwise."""
