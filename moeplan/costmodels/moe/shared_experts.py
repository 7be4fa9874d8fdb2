"""Shared experts beside the exchange of the routed ones: Megatron-Core's moe_shared_expert_overlap.

The first products of the shared experts (X) are launched with the dispatch, the last (Y) with the combine, on a stream of
their own. They and the routed experts want the same multiprocessors, so compute runs X, E, Y, exactly max(D + G, X) + E +
max(S + C, Y). Backward is the mirror: X are then the gradients of the last products. Layout of `hierarchical.py`;
Megatron-Core's transformer/moe/shared_experts.py. Units: FLOP, seconds; numbers or arrays. Not valid with 1F1B overlap, which
excludes it.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, total
from moeplan.costmodels.moe.hierarchical import split_amounts, split_times
from moeplan.costmodels.tasks import Graph, parse_graph


@final
class SharedOverlap(LayerSchedule):
    """Shared experts in two halves, beside dispatch and combine."""

    name = "shared-overlap"
    title = "as hierarchical, shared experts beside dispatch and combine"
    source = "Megatron-Core, --moe-shared-expert-overlap"
    runs_on = ("megatron",)

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """As hierarchical, and 1 / mp_ranks of the shared experts, which are cut by tensor parallelism."""
        up, down = size.shared_up_flop / size.mp_ranks, size.shared_down_flop / size.mp_ranks
        first, second = (up, down) if direction == "forward" else (2.0 * down, 2.0 * up)
        return {**split_amounts(size, direction), "X": first, "Y": second}

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind; each half pays half of the start-ups of an expert."""
        amounts = self.amounts(size, direction)
        startup_s = lines.experts.startup_s * (0.5 if direction == "forward" else 1.0)
        halves = {
            kind: np.where(np.asarray(amounts[kind]) > 0.0, startup_s + lines.experts.unit_s * amounts[kind], 0.0)
            for kind in "XY"
        }
        return {**split_times(size, lines, degree, direction), **halves}

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Two chains that meet before the experts and at the end."""
        there = "D1@inter G1@intra<D1 X1@compute E1@compute<G1"
        return parse_graph(f"{there} S1@intra<E1 C1@inter<S1 Y1@compute M1@intra<C1,Y1 R1@inter<M1")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The longer of each pair, experts, and what follows."""
        there = np.maximum(total(parts, "DG"), total(parts, "X"))
        back = np.maximum(total(parts, "SC"), total(parts, "Y"))
        return there + parts["E"] + back + total(parts, "MR")

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The sum."""
        return total(parts, "XDGESCYMR")
