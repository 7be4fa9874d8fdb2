"""The layouts that one would take without a search, priced beside a plan, and why they lost.

With experts: expert parallelism as wide as the rules allow and the least tensor parallelism that fits; expert parallelism
inside the scale-up domain and the fewest stages that fit. Dense: tensor parallelism inside the domain and the fewest stages
that fit; no pipeline and the least tensor parallelism that fits. Both: the layout that a vendor publishes for the model, if the
catalog has one (`recipes.py`). What a rule leaves open is chosen at its best, and conditions of the user hold for all of them.
Units: seconds, bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.stages import check_split
from moeplan.planner.baseline_data import Baseline, Verdict
from moeplan.planner.constraints import RULES, violations
from moeplan.planner.explain import difference
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Condition, Problem, parse_condition
from moeplan.planner.recipes import Recipe, recipe_for
from moeplan.planner.search import Search, search
from moeplan.planner.space import NOT_SEARCHED, divisors
from moeplan.planner.ties import compare
from moeplan.units import format_bytes

MOST_TP = 8
"""Tensor parallelism beyond which nobody begins."""
_PLAIN = ("etp=1", f"tp<={MOST_TP}")
"""Of both baselines with experts."""
SHOWN_PARTS = 2
"""Parts of the step that are named."""
LEAST_SHARE = 0.004
"""Share of the plan's step below which a part is not named."""


def with_baselines(plan: Plan) -> Plan:
    """The plan with its baselines."""
    return dataclasses.replace(plan, baselines=baselines(plan))


def baselines(plan: Plan) -> tuple[Baseline, ...]:
    """At most three, in the order of the text above."""
    problem = plan.problem
    domain = min(problem.profile.cluster.domain_gpus, problem.profile.cluster.gpus)
    found: list[Baseline | None]
    if problem.model.moe is not None:
        near = max(d for d in divisors(problem.model.moe.experts) if d <= domain)
        found = [
            _widest_experts(plan),
            _first(plan, "EP inside a domain, least PP", [f"ep={near}", *_PLAIN], "pp"),
        ]
    else:
        near = max(d for d in divisors(problem.profile.cluster.gpus) if d <= min(MOST_TP, domain))
        found = [
            _first(plan, "TP inside a domain, least PP", [f"tp={near}"], "pp"),
            _first(plan, "no pipeline, least TP", ["pp=1"], "tp"),
        ]
    recipe = recipe_for(problem)
    if recipe is not None:
        found.append(_published(plan, recipe))
    seen = [b.layout for b in found if b is not None]
    return tuple(b for i, b in enumerate(b for b in found if b is not None) if b.layout is None or b.layout not in seen[:i])


def _widest_experts(plan: Plan) -> Baseline | None:
    """Expert parallelism as wide as the rules allow; the first width for which more than rules is in the way."""
    moe, gpus = plan.problem.model.moe, plan.problem.profile.cluster.gpus
    assert moe is not None
    for ep in reversed([d for d in divisors(gpus) if moe.experts % d == 0]):
        found = _first(plan, "widest EP, least TP", [f"ep={ep}", *_PLAIN], "tp")
        if found is not None and found.verdict != "refused":
            return found
    return None


def _first(plan: Plan, name: str, held: Sequence[str], field: str) -> Baseline | None:
    """The best layout with the least value of a field that fits; None where conditions of the user exclude all of them."""
    problem = plan.problem
    closest, last = np.inf, Search()
    values = divisors(problem.profile.cluster.gpus)
    for value in values if field == "pp" else [v for v in values if v <= MOST_TP]:
        asked = [parse_condition(text) for text in (*held, f"{field}={value}")]
        if _excluding(problem, asked):
            continue
        last = search(_with(problem, asked), 1)
        if last.best:
            return _against(plan, name, last.best[0].layout)
        closest = min(closest, last.nearest_excess_bytes)
    if np.isfinite(closest):
        return Baseline(name=name, verdict="too large", why=f"{held[0]} {_too_large(problem, closest)}")
    return Baseline(name=name, verdict="refused", why=_refusal(last)) if last.considered else None


def _published(plan: Plan, recipe: Recipe) -> Baseline:
    """A vendor's layout; of its dispatcher and graphs the question may know nothing, then a rule says so."""
    problem, asked = plan.problem, recipe.conditions()
    differs = recipe.differs_from(problem)
    name = f"{recipe.vendor} for {differs}" if differs else recipe.vendor

    def lost(verdict: Verdict, why: str) -> Baseline:
        return Baseline(name=name, verdict=verdict, why=why, source=recipe.source)

    if out := _excluding(problem, asked):
        return lost("refused", f"excluded by {out}")
    if reason := _impossible(problem, recipe):
        return lost("refused", reason)
    found = search(_with(problem, asked), 1)
    if not found.best:
        if np.isfinite(found.nearest_excess_bytes):
            return lost("too large", f"{_degrees(recipe)} {_too_large(problem, found.nearest_excess_bytes)}")
        return lost("refused", _refusal(found))
    layout = found.best[0].layout
    if recipe.split and not check_split(recipe.split, len(problem.model.layers), len(problem.model.mtp), layout.pp, layout.vpp):
        written = dataclasses.replace(layout, stages=recipe.split)
        layout = layout if violations(problem, written) else written
    return dataclasses.replace(_against(plan, name, layout), source=recipe.source)


def _against(plan: Plan, name: str, layout: Layout) -> Baseline:
    """A layout that runs, beside the plan."""
    other = price_plan(plan.problem, layout)
    verdict: Verdict = "slower" if other.step_s >= plan.step_s else "faster"
    why = _parts(plan, other)
    if other.layout == plan.layout:
        verdict, why = "the plan", ""
    elif other.excess_bytes > 0:
        verdict, why = "too large", _too_large(plan.problem, other.excess_bytes)
    elif verdict == "faster" and (pins := _not_searched(plan.layout, other.layout)):
        why = f"with what no search decides: --pin {' --pin '.join(pins)}"
    elif compare(plan, other).tie:
        verdict = "tie"
    peak = other.peak_bytes
    return Baseline(name=name, verdict=verdict, why=why, layout=other.layout, step_s=other.step_s, peak_bytes=peak)


def _parts(plan: Plan, other: Plan) -> str:
    """The parts by which a baseline loses most, as shares of the plan's step."""
    change: dict[str, float] = {}
    for part, mine, its in difference(plan, other):
        name = part.rsplit("/", 1)[-1]
        change[name] = change.get(name, 0.0) + (its - mine) / plan.step_s
    sign = 1.0 if other.step_s >= plan.step_s else -1.0
    named = sorted((n for n in change if sign * change[n] > LEAST_SHARE), key=lambda n: -sign * change[n])
    return ", ".join(f"{n} {change[n]:+.1%}" for n in named[:SHOWN_PARTS])


def _not_searched(mine: Layout, its: Layout) -> list[str]:
    """Conditions that give a search what a layout has and no search decides."""
    out = []
    for name in NOT_SEARCHED:
        value = getattr(its, name)
        if value != getattr(mine, name) and name != "sequence_parallel":
            out.append(f"{name}={'+'.join(value) or 'none' if isinstance(value, tuple) else value}")
    return out


def _with(problem: Problem, asked: Iterable[Condition]) -> Problem:
    return dataclasses.replace(problem, pins=(*problem.pins, *asked))


def _excluding(problem: Problem, asked: Iterable[Condition]) -> str:
    """The first condition of the user that what is asked contradicts; empty: none does."""
    for wanted in asked:
        for condition in problem.pins:
            if condition.field == wanted.field and not condition.holds_for(wanted.value):
                return f"--pin {condition.text}"
        for condition in problem.forbidden:
            if condition.field == wanted.field and condition.holds_for(wanted.value):
                return f"--forbid {condition.text}"
    return ""


def _impossible(problem: Problem, recipe: Recipe) -> str:
    """Why no layout has a recipe's degrees, micro-batch and dispatcher here; empty: some may."""
    gpus, batch, asked = problem.profile.cluster.gpus, problem.workload.global_batch, recipe.layout
    for names in (("tp", "cp", "pp"), ("ep", "etp", "pp")):
        values = [int(asked.get(n, 1)) for n in names]
        if gpus % math.prod(values):
            return f"{'*'.join(names)} = {'*'.join(map(str, values))} does not divide {gpus} GPUs"
    micro, dp = int(asked.get("micro_batch", 1)), gpus // math.prod(int(asked.get(n, 1)) for n in ("tp", "cp", "pp"))
    if batch % (micro * dp):
        return f"global batch {batch} is not a multiple of micro-batch*dp = {micro}*{dp}"
    era, dispatcher = problem.workload.era, asked.get("dispatcher")
    if problem.model.moe is not None and dispatcher and dispatcher not in era.dispatchers:
        return f"era {era.name} has no {dispatcher}"
    return ""


def _degrees(recipe: Recipe) -> str:
    names = ("tp", "cp", "pp", "vpp", "ep", "etp")
    return " ".join(f"{n.upper()}{recipe.layout[n]}" for n in names if recipe.layout.get(n, 1) > 1) or "data parallelism alone"


def _too_large(problem: Problem, excess_bytes: float) -> str:
    device = problem.device_bytes
    return f"needs {format_bytes(device + max(excess_bytes, 0.0))} of {format_bytes(device)}"


def _refusal(found: Search) -> str:
    """The rule that refused most of what was left."""
    rules = {rule.name: rule for rule in RULES}
    worst = max((r for r in found.rejected if r in rules), key=lambda r: found.rejected[r], default="")
    return f"{worst}: {rules[worst].demands}" if worst else "no layout is left"
