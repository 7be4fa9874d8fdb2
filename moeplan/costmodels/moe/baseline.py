"""The baselines of Parm: every copy of a token travels; and DeepSpeed since it drops the copies first.

"DeepSpeed-MoE" means either of the first two, and a ratio over it must say which. In each: gather (G), all-to-all (D), experts
(E), all-reduce of the shards' partial sums (A), all-to-all (C), gather (M), one after the other, time = sum. Parm (INFOCOM
2024, arXiv 2407.00599); sizes derived, a simulation of all ranks with real tokens agrees. DeepSpeed: its pull request 5626.
Units: bytes, FLOP, seconds; numbers or arrays. Not valid for group sizes of which neither divides the other.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, chain, expert_flop, times, total
from moeplan.costmodels.tasks import Graph


@final
class Baseline(LayerSchedule):
    """Parm's default schedule: shards gather each other's tokens, so that each token enters its experts mp_ranks times."""

    name = "baseline"
    title = "gather among shards, all-to-all, experts, all-reduce, all-to-all"
    source = "Parm (INFOCOM 2024), default schedule"

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """esp_ranks copies of the slots meet 1 / esp_ranks of each expert: no division of the FLOP."""
        slots = size.slot_bytes * size.esp_ranks
        return {"G": size.token_bytes * size.esp_ranks, "D": slots, "E": expert_flop(size, direction), "A": slots, "C": slots}

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        return times(self.amounts(size, direction), size, lines, degree, direction)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """One chain."""
        return chain("G1@intra D1@inter E1@compute A1@intra C1@inter R1@inter")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The sum."""
        return total(parts, "GDEACR")

    serial_seconds = seconds


@final
class ReplicatedBaseline(LayerSchedule):
    """What DeepSpeed ran before: the copies of a token are gated and sent apart, and not gathered.

    Shards beyond the tensor-parallel group hold other tokens: those are gathered, of esp_ranks / mp_ranks groups.
    """

    name = "replicated-baseline"
    title = "all-to-all of every copy, experts, all-reduce, all-to-all"
    source = "DeepSpeed before pull request 5626 (2024)"

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """Each shard needs the tokens of all groups that share it, once."""
        groups = _groups(size)
        slots = size.slot_bytes * groups
        flop = expert_flop(size, direction) * (groups / size.esp_ranks)
        return {"G": size.token_bytes * groups, "D": slots, "E": flop, "A": slots, "C": slots}

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind; the gather is among one rank of each group."""
        amounts = self.amounts(size, direction)
        gather_s = lines.gather.among_s(amounts["G"], _groups(size))
        return {**times(amounts, size, lines, degree, direction), "G": gather_s}

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """One chain."""
        return chain("G1@intra D1@inter E1@compute A1@intra C1@inter R1@inter")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The sum."""
        return total(parts, "GDEACR")

    serial_seconds = seconds


@final
class DeepSpeed(LayerSchedule):
    """DeepSpeed since then: the tensor-parallel ranks drop all but their share of the slots before each all-to-all.

    DeepSpeed itself shards experts among all of the tensor-parallel group or none of it; other shards are of the same form.
    """

    name = "deepspeed"
    title = "all-to-all of 1 / mp, gather, experts, all-reduce, all-to-all of 1 / mp, gather of slots"
    source = "DeepSpeed since pull request 5626 (2024), after DeepSpeed-TED (ICS 2023)"
    runs_on = ("deepspeed",)

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """Shards gather their shares of the slots, all of them if esp_ranks = mp_ranks; alone they gather nothing."""
        share = size.slot_bytes / size.mp_ranks
        flop, slots = expert_flop(size, direction) / size.mp_ranks, share * size.esp_ranks
        return {"D": share, "G": slots, "E": flop, "A": slots, "C": share, "M": size.slot_bytes}

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        return times(self.amounts(size, direction), size, lines, degree, direction)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """One chain."""
        return chain("D1@inter G1@intra E1@compute A1@intra C1@inter M1@intra R1@inter")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The sum."""
        return total(parts, "DGEACMR")

    serial_seconds = seconds


def _groups(size: MoeSize) -> Any:
    """Tensor-parallel groups that share the shards of an expert."""
    return np.maximum(1.0, size.esp_ranks / np.asarray(size.mp_ranks))
