"""Which constraint binds, and what one more unit of it would bring: the same question, changed in one respect, solved again.

The best plan of a changed question is compared with the best of the question as it is, by GPU time per token

    ratio = (gpus' step' / tokens') / (gpus step / tokens)

so that changes of the batch and of the number of GPUs compare too. Layout fields that a search does not touch stay as the plan
has them. More memory, faster links, a condition dropped and balanced routing only add layouts or take time away, so their
ratios are at most 1; a larger domain, batch or cluster and newer software may come out worse. Units: seconds, bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.uncertainty import deviations, is_tie
from moeplan.costmodels.workload import load_era
from moeplan.errors import ClusterError
from moeplan.planner.best_plans import SAME, WORTH_S, best_plans
from moeplan.planner.constraints import violations
from moeplan.planner.layout_words import Difference, differences
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Condition, Problem, parse_condition
from moeplan.planner.solve import Progress, resized
from moeplan.planner.ties import WORTH, compare
from moeplan.profiles.profile import Profile
from moeplan.profiles.scaling import with_link_rate, with_memory_rate
from moeplan.units import GIB, format_bytes

MORE_GIB = (4, 16)
"""Memory that is added to every GPU, GiB."""
LINK_FACTOR, MEMORY_FACTOR = 2.0, 1.5
"""Factors on the rates of links and of device memory."""
UNSEEN = 0.0005
"""Share of GPU time below which a change is none, unless the layout changes."""
MEMORY = "memory"
"""Constraint of the changes that allow a layout which there was no room for."""
_NOT_SEARCHED = {"sharding": "optimizer", "dp_overlap": True, "cuda_graphs": ()}
"""Fields that no search touches, with what it starts from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """A question that differs from another in one respect."""

    constraint: str
    """What is relaxed: "memory", "NIC", "pin", ..."""
    said: str
    """The change in words: "twice the NIC rate"."""
    problem: Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a change would bring."""

    constraint: str
    said: str
    plan: Plan | None
    """The best plan of the changed question; None: nothing fits."""
    ratio: float
    """Its GPU time per token over that of the best plan as it is; infinite where nothing fits."""
    sigma: float
    """Standard deviation of the log of the ratio; between two steps of one layout only their parts count."""
    noise: bool
    """Whether the ratio differs from 1, but by less than what is not known of it, or than two runs of one plan do."""
    layout: tuple[Difference, ...]
    """What changes in the layout."""
    part: str = ""
    """The part of the step that changes most in the direction of the ratio; empty where nothing changes."""
    part_shares: tuple[float, float] = (0.0, 0.0)
    """Its GPU time per token before and after, over the whole before."""
    excess_bytes: float = math.inf
    """Where nothing fits: by how much the smallest layout misses the device; infinite if no rule lets one pass."""

    @property
    def same(self) -> bool:
        """Whether nothing changes that could be seen."""
        return abs(self.ratio - 1.0) < UNSEEN and not self.layout

    @property
    def words(self) -> str:
        """The answer as a sentence: "twice the NIC rate: -7.0% and EP 64 instead of 32"."""
        if self.plan is None:
            missing = f", the smallest misses the device by {format_bytes(self.excess_bytes)}"
            return f"{self.said}: no plan fits{missing if math.isfinite(self.excess_bytes) else ''}"
        if self.same:
            return f"{self.said}: nothing changes"
        layout = ", ".join(map(str, self.layout))
        gain = f"{self.ratio - 1.0:+.1%}" + (f", within the noise (sigma {self.sigma:.1%})" if self.noise else "")
        if layout and self.constraint == MEMORY:
            return f"{self.said} would allow {layout}: {gain}"
        return f"{self.said}: {gain}" + (f"{',' if self.noise else ''} and {layout}" if layout else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """What binds a plan."""

    plan: Plan
    best: Plan | None
    """The best plan of the question as it is, which answers are compared with; None: none fits, the plan itself counts."""
    answers: tuple[Answer, ...]
    """The one that brings most first."""
    kept: int
    """Questions that had been solved before."""

    @property
    def binding(self) -> tuple[Answer, ...]:
        """Of each constraint that costs more than noise the answer that brings most."""
        gains = [a for a in self.answers if a.ratio < 1.0 - SAME and not a.noise]
        return tuple({a.constraint: a for a in reversed(gains)}.values())[::-1]


def what_if(plan: Plan, *, jobs: int = 1, progress: Progress | None = None) -> WhatIf:
    """Solve the plan's question as it is and with every change of `changes`; `jobs` processes share the work."""
    asked, held = changes(plan.problem), _held(plan)
    questions = [_also(problem, held) for problem in (plan.problem, *(c.problem for c in asked))]
    total = len(questions)
    now = best_plans(questions[:1])[0]
    if progress is not None:
        progress(1, total)
    found = best_plans(
        questions[1:],
        jobs=jobs if now.seconds * len(asked) > WORTH_S else 1,
        progress=None if progress is None else lambda done, of: progress(total - of + done, total),
    )
    # A layout outside the space that is searched counts as one of it, here and in every changed question that it can meet.
    beside = now.plan is None or plan.step_s < now.plan.step_s * (1.0 - SAME)
    best = _faster(plan, questions[0], now.plan) if beside else now.plan
    answers = []
    for change, problem, kept in zip(asked, questions[1:], found, strict=True):
        after = _faster(plan, problem, kept.plan) if beside else kept.plan
        answers.append(_answer(best or plan, change, after, kept.excess_bytes))
    answers.sort(key=lambda a: a.ratio)
    return WhatIf(plan=plan, best=best, answers=tuple(answers), kept=sum(b.kept for b in (now, *found)))


def _held(plan: Plan) -> tuple[Condition, ...]:
    """Pins that keep what no search touches as the plan has it."""
    out = []
    for name, usual in _NOT_SEARCHED.items():
        value = getattr(plan.layout, name)
        if value != usual and not plan.problem.pinned(name):
            text = "+".join(value) if isinstance(value, tuple) else str(value)
            out.append(parse_condition(f"{name}={text}"))
    return tuple(out)


def _also(problem: Problem, pins: tuple[Condition, ...]) -> Problem:
    return dataclasses.replace(problem, pins=(*problem.pins, *pins)) if pins else problem


def _faster(plan: Plan, problem: Problem, best: Plan | None) -> Plan | None:
    """The best plan of a problem, or the layout of `plan` where that can run there and is faster."""
    layout = plan.layout
    if layout.world != problem.profile.cluster.gpus or violations(problem, layout):
        return best
    priced = price_plan(problem, layout)
    if priced.excess_bytes > 0 or not problem.allows(Layouts.of([layout])).all():
        return best
    return priced if best is None or priced.step_s < best.step_s else best


def _answer(before: Plan, change: Change, after: Plan | None, excess_bytes: float) -> Answer:
    if after is None:
        return Answer(
            constraint=change.constraint, said=change.said, plan=None, ratio=math.inf, sigma=0.0, noise=False, layout=(),
            excess_bytes=excess_bytes,
        )  # fmt: skip
    ratio = _gpu_seconds(after) / _gpu_seconds(before)
    layout, found = differences(before, after), compare(before, after)
    sigma = found.sigma
    if not layout and found.shared:  # the kernels are the same, so that nothing but their parts can err
        sigma = math.sqrt(max(0.0, sigma**2 - deviations().floor ** 2))
    part, shares = _part(before, after, ratio)
    return Answer(
        constraint=change.constraint, said=change.said, plan=after, ratio=ratio, sigma=sigma,
        noise=abs(ratio - 1.0) >= SAME and (bool(is_tie(math.log(ratio), sigma)) or abs(math.log(ratio)) < WORTH),
        layout=layout, part=part, part_shares=shares,
    )  # fmt: skip


def _gpu_seconds(plan: Plan) -> float:
    """GPU time of a token."""
    return plan.step_s * plan.layout.world / plan.problem.workload.tokens


def _part(before: Plan, after: Plan, ratio: float) -> tuple[str, tuple[float, float]]:
    """The part that changes most in the direction of the ratio, with its share before and after of the whole before."""
    if abs(ratio - 1.0) < SAME:
        return "", (0.0, 0.0)
    old, new = before.time.shares(), after.time.shares()
    pairs = {name: (old.get(name, 0.0), ratio * new.get(name, 0.0)) for name in (*old, *new)}
    name = max(pairs, key=lambda n: (pairs[n][0] - pairs[n][1]) * (1.0 if ratio < 1.0 else -1.0))
    return name.rsplit("/", 1)[-1], pairs[name]


def changes(problem: Problem) -> list[Change]:
    """Every change that is asked about, for this problem."""
    return [*_of_hardware(problem), *_of_conditions(problem), *_of_work(problem)]


def _of_hardware(problem: Problem) -> Iterator[Change]:
    profile, cluster = problem.profile, problem.profile.cluster

    def on(constraint: str, said: str, changed: Profile) -> Change:
        return Change(constraint=constraint, said=said, problem=dataclasses.replace(problem, profile=changed))

    for more in MORE_GIB:
        yield Change(constraint=MEMORY, said=f"{more} GiB more per GPU", problem=_with_memory(problem, more * float(GIB)))
    if cluster.gpus > cluster.domain_gpus:
        yield on("NIC", "twice the NIC rate", with_link_rate(profile, "scale_out", LINK_FACTOR))
    if min(cluster.domain_gpus, cluster.gpus) > 1:
        said = f"twice the scale-up rate ({cluster.scale_up.name})"
        yield on("scale-up link", said, with_link_rate(profile, "scale_up", LINK_FACTOR))
    yield on("memory rate", f"{MEMORY_FACTOR:g} times the memory rate", with_memory_rate(profile, MEMORY_FACTOR))
    if 1 < cluster.domain_gpus < cluster.gpus:
        gpus = 2 * cluster.domain_gpus
        with contextlib.suppress(ClusterError):  # of hosts that such domains do not divide
            larger = dataclasses.replace(cluster, domain_gpus=gpus)
            yield on("domain", f"scale-up domains of {gpus} GPUs", dataclasses.replace(profile, cluster=larger))


def _with_memory(problem: Problem, more_bytes: float) -> Problem:
    cluster = problem.profile.cluster
    device = dataclasses.replace(cluster.device, memory_bytes=cluster.device.memory_bytes + more_bytes)
    profile = dataclasses.replace(problem.profile, cluster=dataclasses.replace(cluster, device=device))
    limit = problem.memory_limit_bytes + more_bytes if problem.memory_limit_bytes else 0.0
    return dataclasses.replace(problem, profile=profile, memory_limit_bytes=limit)


def _of_conditions(problem: Problem) -> Iterator[Change]:
    for field, said in (("pins", "the pin"), ("forbidden", "forbidding")):
        conditions: tuple[Condition, ...] = getattr(problem, field)
        for place, condition in enumerate(conditions):
            left = conditions[:place] + conditions[place + 1 :]
            changed: dict[str, Any] = {field: left}
            what = f"{said} {condition.text}"
            yield Change(constraint=what, said=f"without {what}", problem=dataclasses.replace(problem, **changed))
    if problem.memory_limit_bytes:
        what = f"the memory limit of {format_bytes(problem.memory_limit_bytes)}"
        yield Change(constraint=what, said=f"without {what}", problem=dataclasses.replace(problem, memory_limit_bytes=0.0))


def _of_work(problem: Problem) -> Iterator[Change]:
    workload, gpus = problem.workload, problem.profile.cluster.gpus

    def on(constraint: str, said: str, **changed: Any) -> Change:
        return Change(
            constraint=constraint,
            said=said,
            problem=dataclasses.replace(problem, workload=dataclasses.replace(workload, **changed)),
        )

    yield on("batch", "twice the global batch", global_batch=2 * workload.global_batch)
    latest = load_era("latest")
    if workload.era.framework == latest.framework and workload.era != latest:
        yield on("software", f"the newest software ({latest.name})", era=latest)
    if workload.imbalance > 1.0:
        yield on("routing", "perfectly balanced routing", imbalance=1.0)
    for said, count in ((f"twice the GPUs ({2 * gpus})", 2 * gpus), (f"half the GPUs ({gpus // 2})", gpus // 2)):
        with contextlib.suppress(ClusterError):  # of counts that do not fill nodes
            if count:
                yield Change(constraint="GPUs", said=said, problem=resized(problem, count))
