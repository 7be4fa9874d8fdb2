"""Elastic plan: a layout for every node count, what moving between them costs, and what it gives in the long run.

A count of nodes has one plan on the nodes that it uses, the rest of them are spares. Goodput is samples kept per second over
failures, repairs and moves (`choice.py`); it holds while failures are rare beside the seconds of a move.
Units: seconds, bytes, samples per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.consistency import Consistency, Hazard
from moeplan.planner.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class CountPlan:
    """What runs while so many nodes are there."""

    nodes: int
    """Nodes that are there."""
    uses: int
    """Nodes that train; the others are spares."""
    share: float
    """Share of the running time at this count."""
    plan: Plan
    """The plan on the nodes that train."""
    instances: int
    """Replicas of the optimizer states (Megatron's distributed optimizer instances)."""
    saving: Saving
    """How often checkpoints are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """What it costs to go from one node count to another."""

    before: int
    """Nodes before."""
    after: int
    """Nodes after."""
    kind: Literal["planned", "unplanned"]
    """Whether there is notice enough to finish the step."""
    moved_bytes: float
    """Bytes that change devices."""
    lost_bytes: float
    """Bytes that no device holds any more; above 0 all state comes from the last checkpoint."""
    rollback: bool
    """Whether training goes back to the last checkpoint."""
    seconds: Mapping[str, float]
    """Seconds without progress by part: detect, drain, group, move, warm, lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepUp:
    """A step up to more nodes that may not stay."""

    before: int
    """Nodes before."""
    after: int
    """Nodes after."""
    least_s: float
    """Seconds that the nodes must stay for the step to pay; infinite where it never does."""
    stay_s: float = 0.0
    """Mean seconds that they are expected to stay; 0: nothing is known."""
    gain: float = 0.0
    """Samples that the step then wins in the mean; below 0 it does not pay."""

    def data(self) -> dict[str, Any]:
        """For programs; null is what is not known, or never."""
        return {
            "from": self.before,
            "to": self.after,
            "pays_after_s": None if math.isinf(self.least_s) else self.least_s,
            "stay_s": self.stay_s or None,
            "gain_samples": self.gain if self.stay_s else None,
            "grow": self.gain > 0.0 if self.stay_s else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticPlan:
    """A plan for every node count."""

    consistency: Consistency
    """What may change between counts, see `consistency.py`."""
    hazards: tuple[Hazard, ...]
    """What can make results differ all the same."""
    counts: tuple[CountPlan, ...]
    """By nodes, ascending."""
    transitions: tuple[Transition, ...]
    """Between neighbouring counts, both ways."""
    availability: Availability
    """How nodes fail and come back."""
    reshardable: bool
    """Whether checkpoints must be loadable under other tensor, pipeline or expert degrees."""
    local_saves: bool
    """Whether nodes keep checkpoints of their own; never together with `reshardable`."""
    goodput: float
    """Samples per second in the long run."""
    best_single: float
    """The same for the best single layout, kept at every count where it fits."""
    policy: tuple[str, ...]
    """What to do, in words."""
    at_most: float = 0.0
    """No choice gives more, if above `goodput`; then time did not suffice to prove this one the best."""
    steps_up: tuple[StepUp, ...] = ()
    """Steps up, by rising nodes."""
    remarks: tuple[str, ...] = ()
    """What to know of how it was found."""
