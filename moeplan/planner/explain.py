"""Why a plan is as it is: what binds, and what the next value of each degree would bring.

A neighbour changes one degree by one step and keeps the others; data parallelism takes up the difference, and micro-batch,
virtual stages, dispatcher, overlap and recompute are chosen anew, so that a neighbour is shown at its best.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.price import Pricing
from moeplan.planner.constraints import RULES
from moeplan.planner.levels import EXCLUDED, MEMORY, SLOWER
from moeplan.planner.plan import Plan
from moeplan.planner.problem import Condition, Problem
from moeplan.planner.search import Candidate, search
from moeplan.planner.space import divisors
from moeplan.planner.ties import distances
from moeplan.units import format_bytes

DEGREES = ("tp", "cp", "pp", "ep", "etp", "vpp", "micro_batch")
"""Fields whose neighbours are shown."""
_HELD = ("tp", "cp", "pp", "ep", "etp")
"""Degrees that a neighbour keeps but for the one that it changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """One step away from a plan in one field."""

    field: str
    value: int
    verdict: Literal["faster", "slower", "too large", "refused"]
    step_s: float = 0.0
    """Its best step time; 0 where there is none."""
    reason: str = ""
    """Why there is none: the rule, or by how much memory misses."""
    best: Candidate | None = None
    sigma: float = 0.0
    """Standard deviation of the log of its step time over the plan's; 0 where there is none."""
    tie: bool = False
    """Whether the two differ by less than that leaves open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """Something that limits a plan."""

    what: str
    share: float
    """Share of the step or of the device memory."""
    detail: str


def neighbours(plan: Plan) -> list[Neighbour]:
    """The next lower and higher value of every degree, each at its best or with the reason why not."""
    out = []
    for name in DEGREES:
        if name in ("ep", "etp") and plan.problem.model.moe is None:
            continue
        for value in _steps(plan, name):
            out.append(_neighbour(plan, name, value))
    return _told_apart(plan, out)


def _told_apart(plan: Plan, found: list[Neighbour]) -> list[Neighbour]:
    """The neighbours with what is not known of their difference from the plan; all of them are priced at once."""
    layouts = [n.best.layout for n in found if n.best is not None]
    if not layouts:
        return found
    problem = plan.problem
    times = Pricing(problem.model, problem.profile, problem.workload, Layouts.of(layouts), exact=True).step_cost().time
    sigma, tie = distances(plan, layouts, times)
    known = iter(zip(sigma.tolist(), tie.tolist(), strict=True))
    out = []
    for n in found:
        if n.best is not None:
            one_sigma, one_tie = next(known)
            n = dataclasses.replace(n, sigma=one_sigma, tie=one_tie)
        out.append(n)
    return out


def _steps(plan: Plan, name: str) -> list[int]:
    """The next lower and the next higher value that could stand for a field."""
    current: int = getattr(plan.layout, name)
    if name == "vpp":
        values = list(range(1, len(plan.problem.model.layers) // plan.layout.pp + 2))
    elif name == "micro_batch":
        values = divisors(plan.problem.workload.global_batch)
    else:
        values = divisors(plan.layout.world)
    lower, higher = [v for v in values if v < current], [v for v in values if v > current]
    return lower[-1:] + higher[:1]


def _neighbour(plan: Plan, name: str, value: int) -> Neighbour:
    held = {n: getattr(plan.layout, n) for n in _HELD} | {name: value}
    for first, second in (("tp", "cp"), ("ep", "etp")):
        ways, stage = held[first] * held[second], plan.layout.world // held["pp"]
        if plan.layout.world % held["pp"] or stage % ways:
            reason = f"{first}*{second}*pp = {held[first]}*{held[second]}*{held['pp']} does not divide {plan.layout.world} GPUs"
            return Neighbour(field=name, value=value, verdict="refused", reason=reason)
    problem = _pinned(plan.problem, held)
    found = search(problem, 1)
    if found.best:
        best = found.best[0]
        verdict: Literal["faster", "slower"] = "faster" if best.step_s < plan.step_s else "slower"
        return Neighbour(field=name, value=value, verdict=verdict, step_s=best.step_s, best=best)
    if np.isfinite(found.nearest_excess_bytes) and found.rejected[MEMORY]:
        reason = f"misses the device by {format_bytes(max(found.nearest_excess_bytes, 0.0))} at least"
        return Neighbour(field=name, value=value, verdict="too large", reason=reason)
    rules = {rule.name: rule for rule in RULES}
    reasons = [r for r in found.rejected if r not in (EXCLUDED, MEMORY, SLOWER) and r in rules]
    worst = max(reasons, key=lambda r: found.rejected[r], default="")
    reason = f"{worst}: {rules[worst].demands}" if worst else "no layout is left"
    return Neighbour(field=name, value=value, verdict="refused", reason=reason)


def _pinned(problem: Problem, held: dict[str, int]) -> Problem:
    pins = tuple(Condition(name, "=", float(value), f"{name}={value}") for name, value in held.items())
    return dataclasses.replace(problem, pins=(*_others(problem, held), *pins))


def _others(problem: Problem, held: dict[str, int]) -> tuple[Condition, ...]:
    return tuple(c for c in problem.pins if c.field not in held)


def bindings(plan: Plan) -> list[Binding]:
    """What limits the plan: the fullest stage, the slowest stage, and the largest exposed losses."""
    fullest, device = plan.fullest, plan.problem.device_bytes
    needed = plan.peak_bytes + plan.excess_bytes + device - plan.peak_bytes
    out = [
        Binding(
            what="memory",
            share=needed / device,
            detail=f"stage {fullest.rank} peaks at {format_bytes(plan.peak_bytes)}; with what must stay free "
            f"{format_bytes(needed)} of {format_bytes(device)}",
        )
    ]
    slowest = int(np.argmax(plan.stage_s))
    mean = sum(plan.stage_s) / len(plan.stage_s)
    if len(plan.stage_s) > 1:
        out.append(
            Binding(
                what="slowest stage",
                share=1 - mean / plan.stage_s[slowest],
                detail=f"stage {slowest} takes {plan.stage_s[slowest] / mean - 1:.1%} longer than the mean stage",
            )
        )
    losses = {
        "expert all-to-all": "layers/expert all-to-all",
        "tensor-parallel exchange": "layers/tensor-parallel exchange",
        "context-parallel exchange": "layers/context-parallel exchange",
        "recompute": "layers/recompute",
        "pipeline bubble": "pipeline bubble",
        "pipeline sends": "pipeline sends",
        "data-parallel exchange": "data-parallel exchange",
        "host launches": "layers/host launches",
    }
    shares = plan.time.shares()
    for what, part in sorted(losses.items(), key=lambda kv: -shares.get(kv[1], 0.0)):
        share = shares.get(part, 0.0)
        if share > 0.01:
            out.append(Binding(what=what, share=share, detail=f"{share:.1%} of the step"))
    return out


def difference(first: Plan, second: Plan) -> list[tuple[str, float, float]]:
    """Parts of the step time of two plans side by side, largest difference first: name, seconds of each."""
    names = list(dict.fromkeys([*first.time.parts, *second.time.parts]))
    rows = [(n, float(first.time.parts.get(n, 0.0)), float(second.time.parts.get(n, 0.0))) for n in names]
    return sorted((r for r in rows if r[1] or r[2]), key=lambda r: -abs(r[1] - r[2]))
