"""Parm's S1: leave tensor parallelism before the gate, and come back after the layer.

Each of the mp_ranks keeps 1 / mp_ranks of the tokens; one all-to-all among all ranks each way carries a token to every shard of
its experts and their partial sums back; the tokens are gathered at the end: t = 2 A(y) + E + G(tokens), y = E T M esp / mp.
Parm (INFOCOM 2024, arXiv 2407.00599); sizes derived. Drops by slice where the capacity is short, S2 and the baselines by the
whole batch: outputs are equal only when nothing is dropped. Units: bytes, FLOP, seconds. Not valid unless mp_ranks divides the
tokens.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, chain, expert_flop, times, total
from moeplan.costmodels.tasks import Graph


@final
class S1(LayerSchedule):
    """Split tokens, one all-to-all over all ranks each way, gather tokens."""

    name = "s1"
    title = "split tokens, all-to-all over all shards, experts, all-to-all, gather tokens"
    source = "Parm (INFOCOM 2024), S1"

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """A slot goes to each shard of its expert."""
        fused = size.slot_bytes * size.esp_ranks / size.mp_ranks
        return {"D": fused, "E": expert_flop(size, direction) / size.mp_ranks, "C": fused, "M": size.token_bytes}

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        amounts = self.amounts(size, direction)
        return times(amounts, size, lines, degree, direction, fused=True, mp_ranks=size.closing_ranks)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """One chain."""
        return chain("D1@inter E1@compute C1@inter M1@intra R1@inter")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The sum."""
        return total(parts, "DECMR")

    serial_seconds = seconds


def s1_is_quicker(exchange_s: Any, token_gather_s: Any, slot_gather_s: Any, phases: Any) -> Any:
    """Whether S1 takes less time than S2, from the times of one all-to-all and of the two gathers.

    With A, G1, Gk and p phases: G1 < Gk / p where A >= Gk, else A + G1 < Gk + A / p. Independent links.
    """
    hidden = token_gather_s < slot_gather_s / phases
    exposed = exchange_s + token_gather_s < slot_gather_s + exchange_s / phases
    return np.where(np.asarray(exchange_s) >= slot_gather_s, hidden, exposed)


def s1_is_quicker_at_large_size(lines: Lines, size: MoeSize) -> Any:
    """The same with messages so large that start-ups and single phases vanish, and the all-to-all shorter than the gather.

    beta_gather (1 - 1 / kf) > beta_exchange esp_ranks / mp_ranks, with kf = slot_bytes / token_bytes.
    """
    spared = lines.mp_gather.unit_s * (1.0 - size.token_bytes / size.slot_bytes)
    return spared > lines.fused_exchange.unit_s * size.esp_ranks / size.mp_ranks
