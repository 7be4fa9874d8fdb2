"""What a plan does when predictions or routing are off: probability of running out of memory, uneven routing, regret.

A device is full when its context, communicators and the allocator's pool fill it. The pool is the peak allocated P times 1 + f,
f between 3 and 9 % of blocks that do not fit each other, and the measured peak is P e^x, x by Student's law with 4 degrees of
freedom, scale s (`Deviations.memory`, from published runs):

    P(out of memory) = P(x > log((device - outside) / (P (1 + mean f)))),   scale^2 = s^2 + deviation(f)^2

A plan is on a cliff where that exceeds `RISKY`, or where the next heavier routing does not fit. Regret of a plan is the
expected log of its step time over the least of all plans given: times are normal in the log and correlated as in `ties.py`,
their least by Clark's recursion (Operations Research 9, 1961), exact for two and within a tenth for more. Units: seconds,
bytes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.imbalance import fullest_in_memory, fullest_in_time
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import reserve_bytes
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import deviations, shares, sigmas, student_tail
from moeplan.planner.plan import Plan
from moeplan.units import format_bytes

RISKY = 0.10
"""Probability of running out of memory from which on a plan is on a cliff."""
_T_RISKY = 1.5332
"""What Student's law with 4 degrees of freedom exceeds with that probability."""
SAYS = 0.01
"""Probability below which nothing is said."""
LEAST_LOST = 0.03
"""Least share of the pool that is lost between blocks; the most is `MEMORY.fragmentation` (docs/memory.md)."""
TAILS = {"half of all steps": 0.5, "9 of 10 steps": 0.1, "99 of 100 steps": 0.01}
"""Probabilities with which routing under an auxiliary loss is heavier than the load that is priced."""
_Z = (0.0, 1.2816, 2.3263)
"""Standard deviations of a normal variable above which these probabilities lie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stress:
    """A plan under one routing."""

    routing: str
    load: float
    """Tokens of the fullest rank of a layer over the mean, over the layers of a step."""
    kept: float
    """Tokens that the fullest rank keeps of all its layers, over the mean."""
    step_s: float
    peak_bytes: float
    out_of_memory: float
    """Probability of running out of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Risk:
    """Whether a plan fits for sure."""

    out_of_memory: float
    """Probability of running out of memory with the routing that was asked for."""
    excess_bytes: float
    """By how much it misses the device under the next heavier routing; negative: it fits."""
    kept: float
    """Tokens that the fullest rank keeps under that routing, over the mean."""

    @property
    def cliff(self) -> bool:
        """Whether a small step away from what was asked it does not fit."""
        return self.out_of_memory > RISKY or self.excess_bytes > 0

    @property
    def reason(self) -> str:
        """Why, in words."""
        if self.out_of_memory > RISKY or self.excess_bytes <= 0:
            return f"it runs out of memory with a probability of {self.out_of_memory:.0%}"
        return (
            f"it misses the device by {format_bytes(self.excess_bytes)} where the fullest rank keeps {self.kept:.2f} x the mean"
        )


def out_of_memory(device_bytes: float, peak_bytes: Any) -> Any:
    """Probability that a plan with that predicted peak does not fit, numbers or arrays; a memory limit is no device."""
    pool = _room_bytes(device_bytes) / np.maximum(peak_bytes * (1.0 + _lost()), 1.0)
    return student_tail(np.log(pool) / _scale())


def safe_limit_bytes(device_bytes: float) -> float:
    """The memory limit under which whatever fits has at most the probability `RISKY` of running out of memory."""
    peak = _room_bytes(device_bytes) / ((1.0 + _lost()) * math.exp(_T_RISKY * _scale()))
    return peak + float(reserve_bytes(peak))


def plan_risk(plan: Plan) -> float:
    """Probability that a plan runs out of memory with the routing that was asked for."""
    return float(out_of_memory(_device_bytes(plan), plan.peak_bytes))


def _device_bytes(plan: Plan) -> float:
    """What the device has, whatever a plan may use of it."""
    return plan.problem.profile.cluster.device.memory_bytes


def stresses(plan: Plan) -> tuple[Stress, ...]:
    """The plan with balanced routing, as asked, and as an auxiliary loss leaves it; only the first two where tokens drop."""
    asked = plan.problem.workload.imbalance
    loads = {"balanced": (1.0, 1.0)}
    if asked != 1.0:
        loads["as asked"] = (asked, asked)
    if _unforced(plan):
        loads |= {name: _loads(plan, tail, z) for (name, tail), z in zip(TAILS.items(), _Z, strict=True)}
    out = []
    for name, (load, kept) in loads.items():
        peak = _peak_bytes(plan, kept)
        step = float(_pricing(plan, load).step_cost().time.total[0])
        risk = float(out_of_memory(_device_bytes(plan), peak))
        out.append(Stress(routing=name, load=load, kept=kept, step_s=step, peak_bytes=peak, out_of_memory=risk))
    return tuple(out)


def risk(plan: Plan) -> Risk:
    """Whether a plan fits for sure."""
    peak = plan.peak_bytes
    kept = _next_kept(plan)
    stressed = max(peak, _peak_bytes(plan, kept)) if kept > plan.problem.workload.imbalance else peak
    return Risk(
        out_of_memory=plan_risk(plan),
        excess_bytes=stressed + float(reserve_bytes(stressed)) - _device_bytes(plan),
        kept=kept,
    )


def regret(plan: Plan) -> float:
    """Expected log of a plan's step time over the least of its own and those of its runners-up on as many GPUs."""
    problem, layouts = plan.problem, [r.layout for r in plan.runners_up if r.layout.world == plan.layout.world]
    pricing = Pricing(problem.model, problem.profile, problem.workload, Layouts.of([plan.layout, *layouts]), exact=True)
    time = pricing.step_cost().time
    scaled = shares(time) * sigmas(problem.profile, problem.workload)[:, None]
    covariance = scaled.T @ scaled + np.eye(len(layouts) + 1) * deviations().floor ** 2 / 2
    log_time = np.log(time.total)
    return max(0.0, float(log_time[0]) - expected_least(log_time, covariance))


def expected_least(mean: Any, covariance: Any) -> float:
    """Expected minimum of normal variables with means [n] and covariance [n, n], by Clark's recursion."""
    # the least so far: its mean, variance, and covariance with the variables still to come, [n]
    at, variance, with_rest = float(mean[0]), float(covariance[0, 0]), np.array(covariance[0], np.float64)
    for i in range(1, len(mean)):
        apart = math.sqrt(max(variance + covariance[i, i] - 2.0 * with_rest[i], 1e-18))
        z = (float(mean[i]) - at) / apart
        first = 0.5 * math.erfc(-z / math.sqrt(2.0))  # probability that the least so far stays the least
        density = math.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)
        new = at * first + mean[i] * (1.0 - first) - apart * density
        square = (at**2 + variance) * first + (mean[i] ** 2 + covariance[i, i]) * (1.0 - first)
        square -= (at + mean[i]) * apart * density
        variance = max(float(square - new**2), 0.0)
        at, with_rest = float(new), with_rest * first + covariance[i] * (1.0 - first)
    return at


def _room_bytes(device_bytes: float) -> float:
    """What a device has for the allocator's pool."""
    return max(device_bytes - float(reserve_bytes(0.0)), 1.0)


def _lost() -> float:
    """Mean share of the peak that the pool holds beyond it."""
    return (LEAST_LOST + MEMORY.fragmentation) / 2.0


def _scale() -> float:
    """Scale of the log of the pool over its prediction; what is lost is spread evenly between its two ends."""
    return math.hypot(deviations().memory, (MEMORY.fragmentation - LEAST_LOST) / math.sqrt(12.0))


def _loads(plan: Plan, tail: float, z: float) -> tuple[float, float]:
    """Load of the fullest rank in time and in memory, no less than what was asked for."""
    model, x = plan.problem.model, plan.layout
    assert model.moe is not None
    experts, layers = model.moe.experts, sum(layer.is_moe for layer in model.layers)
    mine = max(1.0, layers / x.pp)
    loads = (
        fullest_in_time(x.ep, experts / x.ep, layers, z),
        fullest_in_memory(x.ep, experts / x.ep, mine, tail),
    )
    asked = plan.problem.workload.imbalance
    time, kept = (min(max(asked, float(load)), float(experts)) for load in loads)
    return time, kept


def _next_kept(plan: Plan) -> float:
    """What the fullest rank keeps under the first routing that is heavier than what was asked for, or what was asked for."""
    asked = plan.problem.workload.imbalance
    if not _unforced(plan):
        return asked
    kept = (_loads(plan, tail, z)[1] for tail, z in zip(TAILS.values(), _Z, strict=True))
    return next((k for k in kept if k > asked), asked)


def _unforced(plan: Plan) -> bool:
    """Whether routing can be uneven: experts are spread over ranks, and no token is dropped."""
    routed = any(layer.is_moe for layer in plan.problem.model.layers)
    return routed and plan.layout.ep > 1 and not plan.problem.workload.capacity_factor


def _pricing(plan: Plan, imbalance: float) -> Pricing:
    workload = dataclasses.replace(plan.problem.workload, imbalance=imbalance)
    return Pricing(plan.problem.model, plan.problem.profile, workload, Layouts.of([plan.layout]), exact=True)


def _peak_bytes(plan: Plan, imbalance: float) -> float:
    return float(_pricing(plan, imbalance).peak_bytes()[0])
