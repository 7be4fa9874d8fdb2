"""What a framework demands of a plan, by name: one that breaks a demand is refused with it, nothing is left out or replaced.

Plans keep Megatron's rules, which is what the planner prices (`planner/constraints.py`); a demand is what another framework
asks for besides. docs/export-targets.md lists all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeplan.errors import ExportError
from moeplan.planner.plan import Plan, check_layout


@dataclass(frozen=True, slots=True)
class Demand:
    """A named condition that a plan must meet."""

    name: str
    demands: str
    """What it asks for, in one line; the documentation has it word for word."""
    broken: Callable[[Plan], bool]
    reason: Callable[[Plan], str]
    """Why one plan breaks it, with the values."""
    hint: str = ""
    """What to try."""


def broken_demands(demands: Sequence[Demand], plan: Plan) -> list[Demand]:
    """The demands that a plan breaks."""
    return [demand for demand in demands if demand.broken(plan)]


def check_demands(target: str, demands: Sequence[Demand], plan: Plan) -> None:
    """Refuse a plan that breaks a rule of the planner or a demand of `target`, naming every one."""
    check_layout(plan.problem, plan.layout)
    broken = broken_demands(demands, plan)
    if broken:
        reasons = "; ".join(f"{d.reason(plan)} (rule {d.name}: {d.demands})" for d in broken)
        hints = dict.fromkeys(d.hint for d in broken if d.hint)
        raise ExportError(f"{target} cannot run this plan: {reasons}", hint="; ".join(hints) or None)


def features(plan: Plan, *names: str) -> list[str]:
    """Those switches of a layout, out of `names`, that are on."""
    return [name for name in names if getattr(plan.layout, name)]


def without_features(*names: str) -> Demand:
    """The demand that switches of a layout are off."""
    return Demand(
        "-".join(name.replace("_", "-") for name in names),
        f"{', '.join(names)} off",
        lambda plan: bool(features(plan, *names)),
        lambda plan: f"{', '.join(features(plan, *names))} is on",
        " ".join(f"--pin {name}=false" for name in names),
    )


def whole_layers(demands: str) -> Demand:
    """The demand that layers recompute whole or not at all."""
    return Demand(
        "recompute",
        demands,
        lambda plan: plan.layout.recompute not in ((), ("full",)),
        lambda plan: f"recompute of {'+'.join(plan.layout.recompute)}",
        "--pin recompute=full, or --pin recompute=none",
    )


ALL_LAYERS = Demand(
    "recompute-layers",
    "recompute in all layers or in none",
    lambda plan: bool(plan.layout.recompute_layers),
    lambda plan: f"recompute_layers '{plan.layout.recompute_layers}'",
    "--pin recompute_layers=all",
)
"""The demand that all layers recompute the same."""


def without_capacity(demands: str) -> Demand:
    """The demand that experts take all their tokens."""
    return Demand(
        "capacity",
        demands,
        lambda plan: plan.problem.workload.capacity_factor > 0,
        lambda plan: f"capacity factor {plan.problem.workload.capacity_factor:g}",
    )
