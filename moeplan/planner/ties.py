"""Which plans tie: those that differ by less than what is not known of their difference.

Two plans run the same kernels on the same machine, so most of what is not known of their step times is common to both and
cancels; what remains is in the parts by which they differ (`costmodels/uncertainty.py`). Among plans that tie with the fastest
and are predicted to be no more than `WORTH` slower the more robust one is preferred: one that is not on a cliff of its memory
(`robustness.py`), then the lowest upper end of its own interval (to 0.1 %), then more free memory (to 1 GiB), then fewer
degrees and features. Where all of these are on a cliff, the fastest tie that is not comes first; where no tie is safe, the
fastest stays and a remark says what safety would cost. The proof of the search is about predicted times and stays what it is.
Times are GPU seconds of a step, so that plans on different numbers of GPUs compare by cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.uncertainty import (
    KINDS,
    deviations,
    difference_parts,
    difference_sigma,
    is_tie,
    shares,
    sigmas,
    step_sigma,
)
from moeplan.planner.measurement import Measurement, called, measurement
from moeplan.planner.plan import Plan, RunnerUp
from moeplan.planner.problem import Problem
from moeplan.planner.robustness import RISKY, Risk, risk, safe_limit_bytes
from moeplan.units import GIB

WORTH = 0.01
"""Share of the predicted speed that robustness is worth: what two runs of one plan differ by."""
SAME_END = 0.001
"""Upper ends closer than this share count as equal."""
PREFERRED = "preferred to "
"""How the remark of a plan begins that comes before a faster one."""
CLIFF = "on a cliff: "
"""How the remark of a plan begins that comes first though it may not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One plan against another."""

    log_ratio: float
    """Log of the second's GPU time over the first's."""
    sigma: float
    """Standard deviation of that log."""
    tie: bool
    """Whether the two differ by less than what is not known of their difference."""
    shared: bool
    """Whether errors are common to both: the same model and numbers on the same device with the same software."""
    measurement: Measurement | None = None
    """What would tell them apart; only where errors are shared."""


def compare(first: Plan, second: Plan) -> Comparison:
    """Two plans against each other, of one problem or of two."""
    log_ratio = math.log(_gpu_seconds(second) / _gpu_seconds(first))
    one, two = shares(first.time), shares(second.time)
    shared = _kin(first.problem) == _kin(second.problem)
    if shared:
        sigma = float(difference_sigma(one, two, _sigmas(first.problem), deviations().floor))
    else:
        apart = (step_sigma(s, _sigmas(p.problem), deviations().common) for s, p in ((one, first), (two, second)))
        sigma = math.hypot(*(float(s) for s in apart))
    return Comparison(
        log_ratio=log_ratio,
        sigma=sigma,
        tie=bool(is_tie(log_ratio, sigma)),
        shared=shared,
        measurement=_measurement(first, second, difference_parts(one, two, _sigmas(first.problem))) if shared else None,
    )


def distances(plan: Plan, layouts: Sequence[Layout], times: Breakdown) -> tuple[Any, Any]:
    """Deviation of the log of each layout's time over that of a plan of the same problem, and whether they tie, [n] each."""
    sigma = difference_sigma(shares(times), shares(plan.time)[:, None], _sigmas(plan.problem), deviations().floor)
    log_ratio = np.log(times.total * np.array([x.world for x in layouts]) / _gpu_seconds(plan))
    return sigma, is_tie(log_ratio, sigma)


def settled(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Plans of one problem, the preferred first, each with the others as runners-up and what would tell it from the next."""
    if not plans:
        return ()
    # 1. deviations of all differences, [k, k]
    share, floor = np.stack([shares(p.time) for p in plans], axis=1), deviations().floor
    parts = difference_parts(share[:, :, None], share[:, None, :], _sigmas(plans[0].problem))
    apart = np.sqrt(floor**2 + parts.sum(axis=0))
    log_time = np.log([_gpu_seconds(p) for p in plans])
    ties = is_tie(log_time[:, None] - log_time[None, :], apart)
    # 2. those that tie with the fastest, and are hardly slower, by preference, then the others by time
    by_time = sorted(range(len(plans)), key=lambda i: log_time[i])
    fastest = by_time[0]
    risks = {i: risk(plans[i]) for i in by_time if ties[fastest, i]}
    near = {i for i in risks if log_time[i] <= log_time[fastest] + WORTH}
    if all(risks[i].cliff for i in near):
        near.update([i for i in risks if not risks[i].cliff][:1])
    order = sorted(near, key=lambda i: (_robustness(plans[i], risks[i]), i)) + [i for i in by_time if i not in near]
    # 3. the others, and what tells each plan from the first that it ties with and that a microbenchmark can tell from it
    runners = [[_runner(plans[j], float(apart[i, j]), bool(ties[i, j])) for j in order if j != i] for i in range(len(plans))]
    out = []
    for i in order:
        rivals = [j for j in order if j != i and ties[i, j]]
        rival = next((j for j in rivals if parts[:, i, j].max() > floor**2), rivals[0] if rivals else i)
        measure = _measurement(plans[i], plans[rival], parts[:, i, rival]) if rivals else None
        remarks = tuple(r for r in plans[i].remarks if not r.startswith((PREFERRED, CLIFF)))
        out.append(dataclasses.replace(plans[i], runners_up=tuple(runners[i]), measure=measure, remarks=remarks))
    first, said = order[0], []
    if first != fastest:
        said.append(_preference(plans[first], plans[fastest], float(apart[first, fastest]), risks[first], risks[fastest]))
    if risks[first].cliff:
        rest = (plans[i] for i in by_time if i not in risks)
        said.append(_warning(plans[first], risks[first], next((p for p in rest if not risk(p).cliff), None)))
    out[0] = dataclasses.replace(out[0], remarks=(*out[0].remarks, *said))
    return tuple(out)


def _gpu_seconds(plan: Plan) -> float:
    return plan.step_s * plan.layout.world


def _sigmas(problem: Problem) -> Any:
    return sigmas(problem.profile, problem.workload)


def _kin(problem: Problem) -> tuple[object, ...]:
    """What two problems must have in common to share their errors."""
    workload, cluster = problem.workload, problem.profile.cluster
    precision, era = workload.precision.name, workload.era.name
    return problem.model.hidden, problem.model.kinds, cluster.device.name, cluster.machine, precision, era


def _robustness(plan: Plan, its: Risk) -> tuple[bool, float, float, int]:
    """What the more robust plan has less of."""
    upper = round(math.log(plan.high_s * plan.layout.world) / SAME_END)
    return its.cliff, upper, round(plan.excess_bytes / GIB), _complexity(plan.layout)


def _complexity(layout: Layout) -> int:
    """Degrees and features that a layout makes use of."""
    x = layout
    degrees = sum(degree > 1 for degree in (x.tp, x.cp, x.pp, x.vpp, x.ep, x.etp))
    switches = sum(map(bool, (x.ep_overlap, x.tp_overlap, x.stages, x.moe_schedule, x.optimizer_offload, x.recompute_layers)))
    return degrees + switches + len(layout.recompute) + len(layout.cuda_graphs)


def _runner(plan: Plan, sigma: float, tie: bool) -> RunnerUp:
    return RunnerUp(layout=plan.layout, step_s=plan.step_s, peak_bytes=plan.peak_bytes, sigma=sigma, tie=tie)


def _measurement(first: Plan, second: Plan, parts: Any) -> Measurement:
    by_kind = {kind: float(part) for kind, part in zip(KINDS, parts, strict=True)}
    return measurement(first.problem, first.layout, second.layout, by_kind, deviations().floor ** 2)


def _preference(plan: Plan, fastest: Plan, sigma: float, its: Risk, other: Risk) -> str:
    """Why a plan comes before one that is predicted to be faster."""
    gap = _gpu_seconds(plan) / _gpu_seconds(fastest) - 1
    mine, theirs = _robustness(plan, its)[1:], _robustness(fastest, other)[1:]
    if other.cliff and not its.cliff:
        reason = f"that one is on a cliff: {other.reason}; the probability of this one is {its.out_of_memory:.0%}"
    elif mine[0] < theirs[0]:
        end = plan.high_s * plan.layout.world / (fastest.high_s * fastest.layout.world) - 1
        reason = f"the upper end of its interval is {-end:.1%} lower"
    elif mine[1] < theirs[1]:
        reason = f"it leaves {(fastest.excess_bytes - plan.excess_bytes) / GIB:.1f} GiB more memory free"
    else:
        reason = "its layout is simpler"
    return (
        f"{PREFERRED}{called(fastest.layout)}, which is predicted {gap:.1%} faster: a tie within the noise "
        f"(sigma {sigma:.1%}), and {reason}"
    )


def _warning(plan: Plan, its: Risk, safe: Plan | None) -> str:
    """That no plan which ties is safe, what the fastest safe one costs, and what to ask for instead."""
    cost = ""
    if safe is not None:
        more = _gpu_seconds(safe) / _gpu_seconds(plan) - 1
        cost = f"; the fastest that is not, {called(safe.layout)}, takes {more:.1%} longer, which is no tie"
    if its.out_of_memory > RISKY:
        limit = math.floor(safe_limit_bytes(plan.problem.profile.cluster.device.memory_bytes) / GIB * 10) / 10
        return f"{CLIFF}{its.reason}{cost}; for a plan with at most {RISKY:.0%} ask with --memory-limit {limit}GiB"
    return f"{CLIFF}{its.reason}{cost}; for a plan that fits then ask with --imbalance {math.ceil(its.kept * 100) / 100}"
