"""What stands behind the claim that a plan is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What stands behind the claim that a plan is the best."""

    status: Literal["optimal", "bounded"]
    """"optimal": every layout of the space was priced, or refused by a named reason, or bounded away."""
    considered: int
    priced: int
    rejected: Mapping[str, int]
    """Layouts passed over by reason: rules of the framework, memory, slower by bound, excluded by the user."""
    gap: float = 0.0
    """Share by which a layout or a split of its layers that was not priced might still be faster."""
    pipelines: int = 0
    """Pipelines, each with all splits and sets of recomputed modules, that bounds tell about; 0: splits were not looked at."""
    opened: int = 0
    """Stage problems solved for them, the most promising first."""
    programmes: int = 0
    """Mixed-integer programmes solved to prove it."""
    seconds: float = 0.0
    """Time the search took."""
