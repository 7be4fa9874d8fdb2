"""What stands behind the claim that a plan is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What stands behind the claim that a plan is the best."""

    status: Literal["optimal", "bounded"]
    """"optimal": every layout of the space was priced, or refused by a named reason, or bounded away; "bounded": see `gap`."""
    considered: int
    priced: int
    rejected: Mapping[str, int]
    """Layouts passed over by reason: rules of the framework, memory, slower by bound, excluded by the user."""
    variants: int = 0
    """Priced besides: layouts that memory refused, with recompute in part of the layers or part of the optimizer offloaded."""
    gap: float = 0.0
    """Share by which a layout, with any split that `refine.py` looks at, might still be faster: 0 unless time ran out."""
    uneven_gap: float = 0.0
    """The same with any split at all, where chunks of one rank may differ from those of others."""
    pipelines: int = 0
    """Pipelines, each with all splits and recompute, that bounds tell about; 0: splits were not looked at."""
    opened: int = 0
    """Stage problems that closed forms of their splits left open, and dynamic programmes; the most promising first."""
    programmes: int = 0
    """Mixed-integer programmes solved to prove it."""
    seconds: float = 0.0
    """Time the search took."""
