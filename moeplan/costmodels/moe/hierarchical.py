"""FSMoE's layout without overlap: the nodes exchange 1 / esp_ranks of what S1 sends, shards gather and reduce inside.

All-to-all among EP (D), gather among ESP (G), experts (E), reduce-scatter (S), all-to-all (C), and a gather of the tokens (M)
if they are not split outside: time = sum. FSMoE (ASPLOS 2025, arXiv 2501.10714); Megatron's all-to-all dispatcher under expert
tensor parallelism. Better than S1 at large size where beta_exchange (1 - 1 / esp_ranks) > beta_gather. Units: bytes, FLOP,
seconds; numbers or arrays. Not valid unless mp_ranks divides the tokens.
"""

from __future__ import annotations

from typing import Any, final

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, chain, expert_flop, times, total
from moeplan.costmodels.tasks import Graph


@final
class Hierarchical(LayerSchedule):
    """All-to-all between nodes, gather and reduce-scatter inside, one after the other."""

    name = "hierarchical"
    title = "all-to-all, gather among shards, experts, reduce-scatter, all-to-all"
    source = "FSMoE (ASPLOS 2025), layout; Megatron-Core all-to-all dispatcher"
    runs_on = ("megatron",)

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """What FSMoE's layout moves."""
        return split_amounts(size, direction)

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        return split_times(size, lines, degree, direction)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """One chain."""
        return chain("D1@inter G1@intra E1@compute S1@intra C1@inter M1@intra R1@inter")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The sum."""
        return total(parts, "DGESCMR")

    serial_seconds = seconds


def split_amounts(size: MoeSize, direction: Direction) -> dict[str, Any]:
    """Bytes and FLOP of a rank in FSMoE's layout, which all chunked schedules share."""
    share = size.slot_bytes / size.mp_ranks
    slots, flop = share * size.esp_ranks, expert_flop(size, direction) / size.mp_ranks
    return {"D": share, "G": slots, "E": flop, "S": slots, "C": share, "M": size.token_bytes}


def split_times(size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> dict[str, Any]:
    """Seconds by kind of one of `degree` chunks in FSMoE's layout; the tokens are gathered once, when all chunks are back."""
    return times(split_amounts(size, direction), size, lines, degree, direction, mp_ranks=size.closing_ranks)


def chunked_serial_s(degree: Any, parts: Parts) -> Any:
    """Seconds of `degree` chunks in FSMoE's layout with nothing overlapped."""
    return degree * total(parts, "DGESC") + total(parts, "MR")
