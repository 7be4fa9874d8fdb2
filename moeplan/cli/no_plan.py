"""Why no plan fits: conditions that conflict, memory, or rules, in one sentence and as data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moeplan.cli.options import progress_bar
from moeplan.units import format_bytes, format_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """Why a solution holds no plan."""

    sentence: str
    conflict: Any = None
    """The `Conflict` of pins and forbidden conditions; None where they are not the reason."""

    def data(self) -> dict[str, Any]:
        """The conflict as data, without a number where memory is not the reason."""
        if self.conflict is None:
            return {"conflict": None}
        excess = self.conflict.excess_bytes
        return {
            "conflict": {
                "conditions": list(self.conflict.conditions),
                "rules": list(self.conflict.rules),
                "excess_bytes": round(excess) if math.isfinite(excess) else None,
                "enough_to_drop": list(self.conflict.enough),
                "smallest": self.conflict.smallest,
            }
        }


def why(problem: Any, solution: Any, has_target: bool) -> Why:
    """Why nothing fits; conditions are the reason only if there is a plan without them."""
    sizes = f"no size from {solution.counts[0]} to {solution.counts[-1]} GPUs" if solution.counts else ""
    if sizes and has_target:
        return Why(sentence=f"{sizes} reaches the target with {problem.model.name}")
    if not (problem.pins or problem.forbidden):
        return Why(sentence=_without_conditions(problem, solution, sizes))
    from moeplan.planner.conflicts import smallest_conflict
    from moeplan.planner.solve import solve

    with progress_bar("looking for conflicts") as progress:
        conflict = smallest_conflict(problem, progress)
    if conflict is not None:
        would = f"; {solution.gpus_that_fit} GPUs would do" * bool(solution.gpus_that_fit)
        return Why(sentence=f"{sizes}{' will do: ' * bool(sizes)}{conflict.sentence()}{would}", conflict=conflict)
    bare = dataclasses.replace(problem, pins=(), forbidden=())
    return Why(sentence=f"even without conditions {_without_conditions(bare, solve(bare, keep=1), sizes)}")


def _without_conditions(problem: Any, solution: Any, sizes: str) -> str:
    """Memory or rules as the reason."""
    name, cluster = problem.model.name, problem.profile.cluster
    if solution.nearest_excess_bytes < math.inf:
        reason = f"the best layout of {name} misses the {format_bytes(problem.device_bytes)} of a {cluster.device.name} by "
        reason += format_bytes(max(solution.nearest_excess_bytes, 0.0))
        if sizes:
            return f"{sizes} will do, {reason}"
        if solution.gpus_that_fit:
            return f"{reason}; {solution.gpus_that_fit} GPUs would do"
        return f"{reason}, and up to 64 times the {cluster.gpus} GPUs do not help (lower precision may)"
    parts = [f"{reason} ({format_count(count)})" for reason, count in list(solution.rejected.items())[:4]]
    return f"every layout of {name} on {cluster.gpus} GPUs is refused: {', '.join(parts)}"
