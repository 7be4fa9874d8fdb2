"""Parm's S2: leave tensor parallelism after the gate; the last all-to-all overlaps with the gather (SAA).

As S1, but each of the mp_ranks keeps 1 / mp_ranks of the slots, and gathers slots: the second all-to-all is cut into P phases
(with the rank at distance i), each gathered while the next one is on the wire: A + E + A/P + G/P + (1 - 1/P) max(A, G). Parm
(INFOCOM 2024, arXiv 2407.00599); the phases are those of its public kernel, the formula is derived and exact where the gather
has a link of its own. With esp > 1 the phases with one EP distance carry parts of the rows, so that the sums over shards are
complete before they are gathered (runtime/moe_tasks.py). Units: bytes, FLOP, seconds. Not valid unless mp_ranks divides the
slots (`padded_slots`).
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, expert_flop, times, total
from moeplan.costmodels.tasks import Graph, parse_graph


@final
class S2(LayerSchedule):
    """Split slots, all-to-all over all ranks, experts, all-to-all while gathering slots; C and M are phases of the last."""

    name = "s2"
    title = "split slots, all-to-all over all shards, experts, all-to-all in phases while gathering slots"
    source = "Parm (INFOCOM 2024), S2 with SAA"

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """As S1 with a gather of slots, all phases together."""
        fused = size.slot_bytes * size.esp_ranks / size.mp_ranks
        return {"D": fused, "E": expert_flop(size, direction) / size.mp_ranks, "C": fused, "M": size.slot_bytes}

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind; of C and M those of one phase."""
        whole = times(self.amounts(size, direction), size, lines, degree, direction, fused=True)
        return {**whole, "C": whole["C"] / size.all_ranks, "M": whole["M"] / size.all_ranks}

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """A chain to the phases, each gathered behind its exchange."""
        phases = range(1, int(size.all_ranks) + 1)
        sent = [f"C{i}@inter<E1" for i in phases]
        gathered = [f"M{i}@intra<C{i}" for i in phases]
        return parse_graph(" ".join(["D1@inter E1@compute<D1", *sent, *gathered, f"R1@inter<M{phases[-1]}"]))

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """First all-to-all, experts, a phase of each of two stages and the rest at the slower one's pace."""
        sent, gathered = parts["C"], parts.get("M", 0.0)
        return total(parts, "DER") + sent + gathered + (size.all_ranks - 1) * np.maximum(sent, gathered)

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """All phases one after the other."""
        return total(parts, "DER") + size.all_ranks * total(parts, "CM")


def saa_s(exchange_s: Any, gather_s: Any, phases: Any, shared: Any = 0.0) -> Any:
    """Seconds of an all-to-all in `phases` phases, each gathered while the next one is on the wire (SAA).

    A two-stage flow shop: (A + G) / p + (1 - 1/p) max(A, G). `shared`, 0 to 1, is the part of the shorter one that is not
    hidden because both use one link; no worse than one after the other.
    """
    shorter, longer = np.minimum(exchange_s, gather_s), np.maximum(exchange_s, gather_s)
    return np.minimum(longer + shorter / phases + shared * shorter, exchange_s + gather_s)


def repeated_gate_s(gate_s: Any, mp_ranks: Any) -> Any:
    """Seconds by which the gate of S2, over all tokens on every rank, exceeds that of S1; matters with very many experts."""
    return (1.0 - 1.0 / mp_ranks) * gate_s


def padded_slots(slots: Any, mp_ranks: Any) -> Any:
    """Slots of an expert, padded so that mp_ranks divides them, as S2 needs."""
    return np.ceil(slots / np.asarray(mp_ranks)) * mp_ranks
