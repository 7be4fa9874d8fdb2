"""How often to save, and what saving and losing work leave of the time.

With M the mean time between failures, tau the work between saves, d the stall of a save, p the seconds until it is durable and
R the restart (Daly 2006; memoryless failures, which may strike a restart too):
    blocking       efficiency = tau / (M exp(R/M) (exp((tau+d)/M) - 1)),   tau* = M (1 + W0(-exp(-1 - d/M)))
    asynchronous   efficiency = 1 / ((1 + d/tau) (1 + (R + tau/2 + p)/M)), tau* = sqrt(2 d (M + R + p)),  tau >= p
    two levels     efficiency = 1 / ((1 + d1/tau1 + d2/tau2) (1 + (R + (1-q)(tau1/2+p1) + q(tau2/2+p2))/M))
where a share q of the failures loses the node-local level 1. Units: seconds. The last two are first order in tau/M: 1 to 3 %
high where M is only some ten times tau or R.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import ProblemError

NEWTON_STEPS = 60
"""More than quadratic convergence from the right takes for any ratio of numbers that a double holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """When a layout saves, and what that leaves of its time."""

    interval_steps: int
    """Steps between saves to storage."""
    interval_s: float
    """Seconds of work between them."""
    stall_s: float
    """Seconds that training waits for each."""
    persist_s: float
    """Seconds from the start of a save until it can be loaded; those of the stall where it blocks."""
    asynchronous: bool
    """Whether training goes on while the save is written."""
    efficiency: float
    """Share of time that is kept work, with failures that end in a restart on as many nodes."""
    local_interval_steps: int = 0
    """Steps between saves to node-local or peer memory; 0: there are none."""
    local_stall_s: float = 0.0
    """Seconds that training waits for each of these."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.interval_s / self.interval_steps

    @property
    def pace(self) -> float:
        """Share of the time between failures that is work: stalls count, failures do not."""
        local_s = self.local_interval_steps * self.step_s
        return 1.0 / (1.0 + self.stall_s / self.interval_s + (self.local_stall_s / local_s if local_s else 0.0))

    @property
    def lost_s(self) -> float:
        """Mean seconds thrown away by going back to the last save in storage."""
        return 0.5 * self.interval_s + (self.persist_s if self.asynchronous else 0.5 * self.stall_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveCost:
    """What saves and restarts of one layout cost."""

    step_s: float
    """Seconds of a training step."""
    stall_s: float
    """Seconds that training waits for a save to storage: all of it if it blocks, the copy out of the GPUs if not."""
    persist_s: float = 0.0
    """Seconds from the start of an asynchronous save until it can be loaded; 0 for blocking ones, where it is the stall."""
    restart_s: float = 0.0
    """Seconds from a failure until training goes on from the save."""
    asynchronous: bool = False
    """Whether training goes on while the save is written."""
    local_stall_s: float = 0.0
    """Seconds that training waits for a save to node-local or peer memory."""
    local_persist_s: float = 0.0
    """Seconds from the start of such a save until it can be loaded."""
    storage_share: float = 1.0
    """Share q of the failures that lose the local level too; 1: there is no local level."""

    def __post_init__(self) -> None:
        if not 0.0 < self.step_s < math.inf:
            raise ProblemError(f"a step of {self.step_s:g} s", hint="give a positive number of seconds")
        for name in ("stall_s", "persist_s", "restart_s", "local_stall_s", "local_persist_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ProblemError(f"{name} of a save is {getattr(self, name):g}", hint="give 0 or more seconds")
        if not self.asynchronous and self.persist_s not in (0.0, self.stall_s):
            message = f"a blocking save that stalls {self.stall_s:g} s is durable after {self.persist_s:g} s"
            raise ProblemError(message, hint="leave persist_s at 0, or let the save be asynchronous")
        if not 0.0 <= self.storage_share <= 1.0:
            raise ProblemError(f"{self.storage_share:g} of the failures lose the local level", hint="give 0 to 1")
        if self.two_levels and not self.asynchronous:
            raise ProblemError("two levels of saves with blocking writes to storage", hint="let the saves be asynchronous")

    @property
    def two_levels(self) -> bool:
        """Whether there is a local level."""
        return self.storage_share < 1.0

    @property
    def durable_s(self) -> float:
        """Seconds until a save can be loaded: the shortest interval."""
        return self.persist_s if self.asynchronous else self.stall_s


# ---------------------------------------------------------------- closed forms: numbers or arrays


def optimal_interval_s(save_s: Any, mtbf_s: Any) -> Any:
    """Work between blocking saves with the greatest efficiency: M (1 + W0(-exp(-1 - d/M))).

    With x = d/M and s = (tau + d)/M the optimum is where s + exp(-s) - 1 = x: convex and rising, so that Newton's method from
    the right never passes it. It keeps the digits that the difference 1 + W0 loses where x is small.
    """
    x = np.asarray(save_s / np.asarray(mtbf_s, float))
    s = x + np.minimum(1.0, np.sqrt(2.0 * x))
    for _ in range(NEWTON_STEPS):
        excess = np.where(s < 1e-3, s * s * (0.5 - s / 6.0 * (1.0 - s / 4.0 * (1.0 - s / 5.0))), s + np.expm1(-s)) - x
        s = s - excess / np.maximum(-np.expm1(-s), np.finfo(float).tiny)
    return -mtbf_s * np.expm1(-s)


def young_interval_s(save_s: Any, mtbf_s: Any) -> Any:
    """Young's approximation of the work between saves: sqrt(2 d M)."""
    return np.sqrt(2.0 * save_s * mtbf_s)


def daly_first_interval_s(save_s: Any, mtbf_s: Any) -> Any:
    """Daly's first order: sqrt(2 d M) - d."""
    return young_interval_s(save_s, mtbf_s) - save_s


def daly_interval_s(save_s: Any, mtbf_s: Any) -> Any:
    """Daly's higher order: sqrt(2 d M) (1 + x/3 + x^2/9) - d with x = sqrt(d / 2M); M where d >= 2 M."""
    x = np.sqrt(save_s / (2.0 * mtbf_s))
    return np.where(save_s >= 2.0 * mtbf_s, mtbf_s, young_interval_s(save_s, mtbf_s) * (1.0 + x / 3.0 + x * x / 9.0) - save_s)


def available_period_s(save_s: Any, mtbf_s: Any, restart_s: Any = 0.0) -> Any:
    """Work and save together where availability is greatest to first order: d + sqrt(2 (M+R) d + d^2)."""
    return save_s + np.sqrt(2.0 * (mtbf_s + restart_s) * save_s + save_s * save_s)


def efficiency(interval_s: Any, save_s: Any, mtbf_s: Any, restart_s: Any = 0.0) -> Any:
    """Share of time that is kept work with blocking saves."""
    return interval_s / (mtbf_s * np.exp(restart_s / mtbf_s) * np.expm1((interval_s + save_s) / mtbf_s))


def first_order_efficiency(interval_s: Any, save_s: Any, mtbf_s: Any, restart_s: Any = 0.0) -> Any:
    """The same to first order: (1 - (R + tau/2)/M) / (1 + d/tau)."""
    return (1.0 - (restart_s + 0.5 * interval_s) / mtbf_s) / (1.0 + save_s / interval_s)


def asynchronous_efficiency(interval_s: Any, stall_s: Any, persist_s: Any, mtbf_s: Any, restart_s: Any = 0.0) -> Any:
    """Share of time that is kept work with asynchronous saves."""
    return 1.0 / ((1.0 + stall_s / interval_s) * (1.0 + (restart_s + 0.5 * interval_s + persist_s) / mtbf_s))


def asynchronous_interval_s(stall_s: Any, persist_s: Any, mtbf_s: Any, restart_s: Any = 0.0) -> Any:
    """Work between asynchronous saves with the greatest efficiency, but no shorter than one takes to be durable."""
    return np.maximum(persist_s, np.sqrt(2.0 * stall_s * (mtbf_s + restart_s + persist_s)))


def two_level_efficiency(local_s: Any, storage_s: Any, cost: SaveCost, mtbf_s: Any) -> Any:
    """Share of time that is kept work with saves to local memory every `local_s` and to storage every `storage_s`."""
    q = cost.storage_share
    lost_s = (1.0 - q) * (0.5 * local_s + cost.local_persist_s) + q * (0.5 * storage_s + cost.persist_s)
    stalls = cost.local_stall_s / local_s + cost.stall_s / storage_s
    return 1.0 / ((1.0 + stalls) * (1.0 + (cost.restart_s + lost_s) / mtbf_s))


def write_s(checkpoint_bytes: Any, storage_bytes_per_s: Any, nodes: Any = 1, node_bytes_per_s: Any = math.inf) -> Any:
    """Seconds until a checkpoint is written: storage takes what it can, every node sends what its network can."""
    return checkpoint_bytes / np.minimum(storage_bytes_per_s, nodes * np.asarray(node_bytes_per_s))


# ---------------------------------------------------------------- whole steps


def best_saving(cost: SaveCost, mtbf_s: float) -> Saving:
    """The intervals of whole steps with the greatest efficiency."""
    _check_mtbf(mtbf_s)
    fewest = max(1, math.ceil(cost.durable_s / cost.step_s - 1e-9))
    if cost.two_levels:
        return _best_two_levels(cost, mtbf_s, fewest)
    if cost.asynchronous:
        ideal_s = asynchronous_interval_s(cost.stall_s, cost.persist_s, mtbf_s, cost.restart_s)
    else:
        ideal_s = optimal_interval_s(cost.stall_s, mtbf_s)
    # efficiency rises up to the ideal and falls after it, so that the best whole number is beside it
    return max((saving_at(cost, mtbf_s, steps) for steps in _around(float(ideal_s), cost.step_s, fewest)), key=_worth)


def saving_at(cost: SaveCost, mtbf_s: float, interval_steps: int, local_interval_steps: int = 0) -> Saving:
    """What saving every `interval_steps` comes to; refused where the next save would start before one is durable."""
    _check_mtbf(mtbf_s)
    interval_s = interval_steps * cost.step_s
    _check_interval(interval_steps, cost.step_s, cost.durable_s, "storage")
    if local_interval_steps:
        _check_interval(local_interval_steps, cost.step_s, cost.local_persist_s, "local memory")
        if not cost.two_levels:
            raise ProblemError(
                "an interval for saves to local memory, which all failures lose", hint="give a storage_share below 1"
            )
        share = two_level_efficiency(local_interval_steps * cost.step_s, interval_s, cost, mtbf_s)
    elif cost.asynchronous:
        share = asynchronous_efficiency(interval_s, cost.stall_s, cost.persist_s, mtbf_s, cost.restart_s)
    else:
        # an interval that no failure-free run of this machine reaches keeps nothing
        with np.errstate(over="ignore"):
            share = efficiency(interval_s, cost.stall_s, mtbf_s, cost.restart_s)
    return Saving(
        interval_steps=interval_steps,
        interval_s=interval_s,
        stall_s=cost.stall_s,
        persist_s=cost.durable_s,
        asynchronous=cost.asynchronous,
        efficiency=float(share),
        local_interval_steps=local_interval_steps,
        local_stall_s=cost.local_stall_s if local_interval_steps else 0.0,
    )


def _best_two_levels(cost: SaveCost, mtbf_s: float, fewest: int) -> Saving:
    """Both intervals, or one level alone where it is better.

    Stalls times losses are a posynomial, convex in the logarithms: the interval of one level given the other has a closed form,
    and taking turns leads to the only optimum.
    """
    q, fixed = cost.storage_share, mtbf_s + cost.restart_s
    fixed += (1.0 - cost.storage_share) * cost.local_persist_s + cost.storage_share * cost.persist_s
    least_s = max(cost.step_s, cost.local_persist_s), max(cost.step_s, cost.persist_s)
    local_s = max(least_s[0], math.sqrt(2.0 * cost.local_stall_s * mtbf_s / (1.0 - q)))
    # no failure needs storage where q is 0: its saves are as rare as failures
    storage_s = max(least_s[1], math.sqrt(2.0 * cost.stall_s * mtbf_s / q)) if q else max(least_s[1], mtbf_s)
    for _ in range(NEWTON_STEPS):
        # min over t of (c + d/t) (k + w t) is at t = sqrt(d k / (c w))
        others = 1.0 + cost.stall_s / storage_s, fixed + 0.5 * q * storage_s
        local_s = max(least_s[0], math.sqrt(2.0 * cost.local_stall_s * others[1] / (others[0] * (1.0 - q))))
        others = 1.0 + cost.local_stall_s / local_s, fixed + 0.5 * (1.0 - q) * local_s
        storage_s = max(least_s[1], math.sqrt(2.0 * cost.stall_s * others[1] / (others[0] * q))) if q else storage_s
    least_local = max(1, math.ceil(cost.local_persist_s / cost.step_s - 1e-9))
    both = itertools.product(_around(storage_s, cost.step_s, fewest), _around(local_s, cost.step_s, least_local))
    found = [saving_at(cost, mtbf_s, storage, local) for storage, local in both if local < storage]
    ideal_s = asynchronous_interval_s(cost.stall_s, cost.persist_s, mtbf_s, cost.restart_s)
    alone = [saving_at(cost, mtbf_s, steps) for steps in _around(float(ideal_s), cost.step_s, fewest)]
    return max(found + alone, key=_worth)


def _around(ideal_s: float, step_s: float, fewest: int) -> list[int]:
    """Whole steps beside an interval, no fewer than `fewest`."""
    below = math.floor(ideal_s / step_s)
    return sorted({max(fewest, steps) for steps in (below, below + 1)})


def _worth(saving: Saving) -> float:
    return saving.efficiency


def _check_mtbf(mtbf_s: float) -> None:
    if not 0.0 < mtbf_s < math.inf:
        raise ProblemError(f"a mean time between failures of {mtbf_s:g} s", hint="give a positive number of seconds")


def _check_interval(steps: int, step_s: float, durable_s: float, level: str) -> None:
    if steps < 1:
        raise ProblemError(f"saves to {level} every {steps} steps", hint="give 1 step or more")
    if steps * step_s < durable_s * (1.0 - 1e-9):
        fewest = math.ceil(durable_s / step_s - 1e-9)
        message = f"saves to {level} every {steps} steps are {steps * step_s:g} s apart, but one takes {durable_s:g} s"
        raise ProblemError(message, hint=f"save every {fewest} steps or more, or to faster storage")
