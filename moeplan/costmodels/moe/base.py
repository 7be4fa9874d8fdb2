"""What the schedules of one MoE layer share: its size, and a fitted time.

Ranks that share a tensor-parallel group (`mp_ranks`) hold the same tokens; every expert is cut among `esp_ranks`, and
`ep_ranks` such groups share the experts. Sizes are those of one tensor-parallel group before any division: the schedules
divide. Units: bytes, FLOP, seconds; numbers or arrays. Not valid for unbalanced loads: the fullest expert counts for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
