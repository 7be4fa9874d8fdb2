"""A plan for every node count: candidates, what they cost and give, the best choice over all counts, in words.

Every count has the layouts of all sizes up to it (`counts.py`). One of them that is so much slower than the fastest that no
saving of changes makes up for it is left out first: replacing it by the fastest costs at most two more changes each way, so
it loses for certain where   thr < thr_best - 2 g (rate of changes) C_max.   The rest is chosen exactly (`choice.py`, and
`choice_milp.py` where counts skip or the number of layouts is limited). Units: seconds, bytes, samples per second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.planner.elastic.availability import Availability, Occupancy, Trace, fitted, occupancy, trace_occupancy
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.choice import Choice, Choices, Option, choose, seconds_of
from moeplan.planner.elastic.consistency import Consistency, hazards
from moeplan.planner.elastic.counts import Progress, SizedLayout, layouts_by_size, node_gpus
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan, Transition
from moeplan.planner.elastic.growth import steps_up
from moeplan.planner.elastic.movement import instances_needed
from moeplan.planner.elastic.policy import policy
from moeplan.planner.elastic.replay import Replayed, replay
from moeplan.planner.elastic.saves import Overheads, advised_saving
from moeplan.planner.elastic.transitions import Changes
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Condition

RESHARDED_BY = ("tp", "pp", "vpp", "stages", "ep", "etp")
"""Fields of a layout that decide whose optimizer states a rank holds; only dp may change without resharding."""

SPARES = (1, 2)
"""Spares of the rigid jobs that a history is replayed for."""
LIMITED = 2
"""Layouts of each size that are looked at where their number is limited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is asked of an elastic plan."""

    counts: tuple[int, ...]
    """Node counts, ascending."""
    consistency: Consistency = "order"
    """What may change between them."""
    availability: Availability | None = None
    """How nodes fail; None: as in the trace."""
    job_rate: float = 0.0
    """Beside a trace: failures per second of the job alone, which no trace of nodes shows."""
    notice_s: float = 0.0
    """Beside a trace: seconds of warning."""
    trace: Trace | None = None
    """A recorded history."""
    overheads: Overheads = dataclasses.field(default_factory=Overheads)
    also: tuple[Plan, ...] = ()
    """Further plans to choose among."""
    templates: int = 0
    """Most different layouts; 0: as many as help."""
    survive: int = 0
    """Node failures at once that must lose no state."""
    interval_s: float = 0.0
    """Seconds between checkpoints; 0: the best."""
    blocking: bool = False
    """Checkpoints are written while training waits."""
    local_saves: bool = False
    """Nodes keep checkpoints of their own, so that only dp may change."""
    stay_s: float = 0.0
    """Mean seconds for which nodes beyond those that run are free; 0: as in the trace, if there is one."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Elastic:
    """An elastic plan with what a replay needs."""

    plan: ElasticPlan
    wish: Wish
    chosen: Mapping[int, SizedLayout]
    """The layout of each count of nodes at which the job does not wait."""
    savings: Mapping[SizedLayout, Saving]
    """Layouts that could be chosen, with their checkpoints."""
    changes: Changes
    """What changes cost."""


def plan_elastic(plan: Plan, wish: Wish, progress: Progress | None = None) -> Elastic:
    """The best plan for every node count of `wish` in the class of `plan`."""
    counts = wish.counts
    rigid = [counts[-1] - k for k in SPARES if counts[-1] - k > counts[0]] if wish.trace is not None else []
    by_size = layouts_by_size(
        plan,
        sorted({*counts, *rigid}),
        wish.consistency,
        also=wish.also,
        pins=_local_pins(plan) if wish.local_saves else (),
        fits=lambda one: _forms(one, plan, wish),
        progress=progress,
    )
    availability, shares = _rates(wish)
    changes = Changes(wish.overheads, availability)
    savings = {one: _saving(one, availability, wish) for layouts in by_size.values() for one in layouts}
    single, single_goodput = _best_single([one for found in by_size.values() for one in found], savings, shares, changes)
    if wish.templates:  # the best single layout stays, below which nothing may fall
        by_size = {size: tuple(x for i, x in enumerate(found) if i < LIMITED or x is single) for size, found in by_size.items()}
    options = [[one for size, found in by_size.items() if size <= n for one in found] for n in counts]
    if not wish.templates:  # with a limit a slow layout may be the best one for many counts
        options = [_useful(layouts, savings, shares, i, changes) for i, layouts in enumerate(options)]
    found, places = _choose(options, savings, shares, changes, wish.templates)
    chosen = {n: one for n, one in zip(counts, places, strict=True) if one is not None}
    return Elastic(
        plan=_assembled(plan, wish, availability, shares, chosen, savings, changes, (found, single_goodput)),
        wish=wish,
        savings=savings,
        chosen=chosen,
        changes=changes,
    )


def _option(one: SizedLayout, savings: Mapping[SizedLayout, Saving]) -> Option:
    return Option(key=one, throughput=one.samples_per_s, uses=one.nodes, checkpoint=savings[one])


def _cost(changes: Changes) -> Callable[[int, Option, int, Option], float]:
    """Seconds from one option at a count to another at another."""

    def seconds(nodes: int, before: Option, then: int, after: Option) -> float:
        return changes.mean_s(_layout(before), _layout(after), before.checkpoint, nodes, then)

    return seconds


def _layout(option: Option) -> SizedLayout:
    assert isinstance(option.key, SizedLayout), "options are made of layouts"
    return option.key


def _choose(
    layouts: Sequence[Sequence[SizedLayout]],
    savings: Mapping[SizedLayout, Saving],
    shares: Occupancy,
    changes: Changes,
    templates: int,
) -> tuple[Choice, list[SizedLayout | None]]:
    """The best choice; costs are those at least until the moves of the best are known, which then are no less.

    The job may wait at the smallest counts, as the best single layout does.
    """
    options = tuple(tuple(_option(one, savings) for one in found) for found in layouts)
    while True:
        cost = _cost(changes)
        again = {(i, i): np.array([cost(n, a, n, a) for a in options[i]]) for i, n in enumerate(shares.counts)}
        seconds = {**seconds_of(shares, options, cost), **again}
        found = choose(Choices(occupancy=shares, options=options, seconds=seconds), templates=templates, waiting=True)
        chosen = [None if place is None else at[place] for at, place in zip(layouts, found.places, strict=True)]
        pairs = [(chosen[i], chosen[j], shares.counts[i], shares.counts[j]) for i, j in seconds if i != j]
        if not any([changes.learn(a, b, n, then) for a, b, n, then in pairs if a is not None and b is not None]):
            return found, chosen


def _best_single(
    layouts: Sequence[SizedLayout], savings: Mapping[SizedLayout, Saving], shares: Occupancy, changes: Changes
) -> tuple[SizedLayout, float]:
    """The one layout that gives most, kept where it fits, and what it gives; the job waits at smaller counts."""
    while True:
        goodput = {one: _alone(one, savings[one], shares, changes) for one in layouts}
        best = max(goodput, key=lambda one: goodput[one])
        if not any([changes.learn(best, best, nodes, then) for nodes in shares.counts for then in shares.counts]):
            return best, goodput[best]


def _alone(one: SizedLayout, saving: Saving, shares: Occupancy, changes: Changes) -> float:
    """Samples per second of a layout that is kept where it fits, from the same sums as `choice.py`."""
    runs = [n >= one.nodes for n in shares.counts]
    share = sum(p for p, there in zip(shares.shares, runs, strict=True) if there)
    lost_s = 0.0
    for i, j in zip(*np.nonzero(shares.rates), strict=True):
        n, then = shares.counts[i], shares.counts[j]
        if runs[j]:  # what comes from a wait restarts
            lost_s += shares.shares[i] * shares.rates[i, j] * changes.mean_s(one, one, saving, n if runs[i] else then, then)
    return float(share * one.samples_per_s * saving.pace / (1.0 + lost_s))


def replayed(found: Elastic, trace: Trace) -> tuple[Replayed, ...]:
    """What the plan, a rigid job and rigid jobs with spares make of a recorded history."""
    counts, cost, job_rate = found.wish.counts, _cost(found.changes), found.wish.job_rate
    policy = {nodes: _option(one, found.savings) for nodes, one in found.chosen.items()}
    out = [replay(trace, "elastic", policy, cost, job_rate)]
    for spares in (0, *SPARES):
        sized = [_option(one, found.savings) for one in found.savings if one.nodes <= counts[-1] - spares]
        if sized:
            best = max(sized, key=lambda option: option.rate)
            name = f"rigid with {spares} spare{'s' * (spares > 1)}" if spares else "rigid"
            out.append(replay(trace, name, {best.uses: best}, cost, job_rate))
    return tuple(out)


def _rates(wish: Wish) -> tuple[Availability, Occupancy]:
    """How nodes fail, and the shares and rates of the counts: of the model, else of the trace."""
    if wish.availability is not None:
        return wish.availability, occupancy(wish.availability, wish.counts)
    if wish.trace is None:
        availability = Availability(job_rate=wish.job_rate, notice_s=wish.notice_s)
        return availability, occupancy(availability, wish.counts)
    availability = fitted(wish.trace, job_rate=wish.job_rate, notice_s=wish.notice_s)
    return availability, trace_occupancy(wish.trace, wish.counts, wish.job_rate)


def _local_pins(plan: Plan) -> tuple[Condition, ...]:
    """What layouts must share for node-local checkpoints: their format cannot be resharded."""
    fields = [name for name in RESHARDED_BY if name != "stages"]
    return tuple(Condition(name, "=", getattr(plan.layout, name), f"{name}={getattr(plan.layout, name)}") for name in fields)


def _forms(one: SizedLayout, plan: Plan, wish: Wish) -> list[SizedLayout]:
    """A layout with as many optimizer replicas as are asked for, or that spare going back; none where they do not fit."""
    if wish.local_saves and one.layout.stages != plan.layout.stages:
        return []
    if not wish.overheads.live:
        return [one]
    forms = [one] if not wish.survive else []
    replicas = _replicas(one, max(1, wish.survive))
    if replicas is not None and replicas > 1 and _fits(one, replicas):
        forms.append(dataclasses.replace(one, instances=replicas))
    elif replicas == 1 and wish.survive:
        forms.append(one)
    return forms


def _replicas(one: SizedLayout, failures: int) -> int | None:
    """Optimizer replicas by which so many node failures lose nothing."""
    problem = one.problem
    return instances_needed(problem.model, problem.workload, one.layout, failures, node_gpus(problem))


def _fits(one: SizedLayout, replicas: int) -> bool:
    """Whether the fullest device holds as many replicas of the optimizer states of its group."""
    plan = price_plan(one.problem, one.layout)
    peaks = [float(s.parts.total) + (replicas - 1) * float(s.parts.parts.get("optimizer states", 0.0)) for s in plan.stages]
    return float(one.problem.excess_bytes(max(peaks))) <= 0.0


def _saving(one: SizedLayout, availability: Availability, wish: Wish) -> Saving:
    return advised_saving(
        one.problem,
        one.layout,
        one.step_s,
        availability,
        wish.overheads,
        interval_s=wish.interval_s,
        blocking=wish.blocking,
        local=wish.local_saves,
    )


def _useful(
    layouts: Sequence[SizedLayout], savings: Mapping[SizedLayout, Saving], shares: Occupancy, i: int, changes: Changes
) -> list[SizedLayout]:
    """Layouts of count `i` that may be best, fastest first."""
    rates = [one.samples_per_s * savings[one].pace for one in layouts]
    best = max(rates)
    dearest_s = max(changes.most_s(one, savings[one]) for one in layouts)
    least = best * (1.0 - 2.0 * float(shares.rates[i].sum()) * dearest_s)
    order = sorted(range(len(layouts)), key=lambda k: -rates[k])
    return [layouts[k] for k in order if rates[k] >= least]


def _assembled(
    plan: Plan,
    wish: Wish,
    availability: Availability,
    shares: Occupancy,
    chosen: Mapping[int, SizedLayout],
    savings: Mapping[SizedLayout, Saving],
    changes: Changes,
    results: tuple[Choice, float],
) -> ElasticPlan:
    """The plan of a choice; `results`: the choice, and the goodput of the best single layout."""
    layouts = list(dict.fromkeys(chosen.values()))
    reshardable = len({tuple(getattr(one.layout, name) for name in RESHARDED_BY) for one in layouts}) > 1
    plans = {one: price_plan(one.problem, one.layout, remarks=one.problem.model.remarks) for one in layouts}
    counts = tuple(
        CountPlan(
            nodes=nodes,
            uses=one.nodes,
            share=float(share),
            plan=dataclasses.replace(plans[one], problem=dataclasses.replace(one.problem, pins=plan.problem.pins)),
            instances=one.instances,
            saving=savings[one],
        )
        for nodes, share in zip(wish.counts, shares.shares, strict=True)
        if (one := chosen.get(nodes)) is not None
    )
    transitions = _transitions(chosen, savings, changes)
    rates = {nodes: _option(one, savings).rate for nodes, one in chosen.items()}
    growths = tuple(steps_up(transitions, rates, wish.stay_s, wish.trace))
    return ElasticPlan(
        consistency=wish.consistency,
        hazards=hazards(wish.consistency, plan.problem, [plan.layout, *(one.layout for one in layouts)]),
        counts=counts,
        transitions=transitions,
        availability=availability,
        reshardable=reshardable,
        local_saves=wish.local_saves and all(savings[one].local_interval_steps for one in layouts),
        goodput=results[0].goodput,
        at_most=results[0].at_most,
        best_single=results[1],
        policy=policy(wish.counts, counts, transitions, wish.consistency, wish.overheads, list(chosen.values()), growths),
        steps_up=growths,
        remarks=tuple(filter(None, [results[0].remark])),
    )


def _transitions(
    chosen: Mapping[int, SizedLayout], savings: Mapping[SizedLayout, Saving], changes: Changes
) -> tuple[Transition, ...]:
    """Changes between neighbouring counts, down and up."""
    found = []
    pairs = list(chosen.items())
    for (low, small), (high, large) in zip(pairs, pairs[1:], strict=False):
        for before, old, after, new in ((high, large, low, small), (low, small, high, large)):
            kind, change = changes.worst(old, new, savings[old], before, after)
            found.append(
                Transition(
                    before=before,
                    after=after,
                    kind=kind,
                    moved_bytes=change.moved_bytes,
                    lost_bytes=change.lost_bytes,
                    rollback=change.rollback,
                    seconds=change.seconds,
                )
            )
    return tuple(found)
