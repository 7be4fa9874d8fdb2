"""The answer to one point of a sweep: the best plan in figures, or why there is none.

What a solve finds out is kept as plain data that fits into a row of a database and travels between machines. That nothing
fits, or that parts of a question do not go together, are answers too. Units: seconds, bytes, money in the unit of the price.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moeplan._version import VERSION
from moeplan.errors import MoeplanError
from moeplan.planner.plan_data import layout_data
from moeplan.planner.problem import Problem
from moeplan.planner.solve import Solution, cost_per_trillion_tokens, solve
from moeplan.planner.sweeps.sweep import Point, Sweep
from moeplan.units import format_bytes, format_count

T = TypeVar("T")
Status = Literal["solved", "infeasible", "refused", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is known of a point when it is done."""

    status: Status
    """"refused": the question itself is at fault; "failed": the program is, or its worker died."""
    reason: str = ""
    """Why there is no plan."""
    layout: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The best one, as in a plan file."""
    step_s: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0
    """See `Plan.low_s`."""
    tokens_per_s_per_gpu: float = 0.0
    mfu: float = 0.0
    peak_bytes: float = 0.0
    device_bytes: float = 0.0
    cost: float = 0.0
    """Money for 10^12 tokens; 0: no price is known."""
    tied: int = 0
    """Further plans that differ from the best by less than what is not known of the difference."""
    gap: float = 0.0
    considered: int = 0
    priced: int = 0
    seconds: float = 0.0
    """Time that the solve took."""
    moeplan: str = VERSION
    """Version that gave it."""


def answer(problem: Problem) -> Answer:
    """Solve a problem; whatever goes wrong becomes the answer."""
    started = time.perf_counter()
    found = _guarded(lambda: _answer(problem, solve(problem)))
    return dataclasses.replace(found, seconds=round(time.perf_counter() - started, 3))


def problem_or_answer(sweep: Sweep, point: Point, say: Callable[[str], None]) -> Problem | Answer:
    """The problem of a point, or the answer that there is none."""
    return _guarded(lambda: sweep.problem_of(point, say))


def _guarded(do: Callable[[], T]) -> T | Answer:
    try:
        return do()
    except MoeplanError as error:
        return Answer(status="refused", reason=error.message)
    except Exception as error:  # a fault of ours costs one point, not the sweep
        return Answer(status="failed", reason=f"{type(error).__name__}: {error}")


def _answer(problem: Problem, solution: Solution) -> Answer:
    counts: dict[str, Any] = {"considered": solution.considered, "priced": solution.priced}
    if not solution.plans:
        return Answer(status="infeasible", reason=_why(solution), **counts)
    plan = solution.plans[0]
    cost = cost_per_trillion_tokens(problem, plan.layout.world, plan.step_s)
    return Answer(
        status="solved",
        layout=layout_data(plan.layout),
        step_s=plan.step_s,
        low_s=plan.low_s,
        high_s=plan.high_s,
        tokens_per_s_per_gpu=plan.tokens_per_s_per_gpu,
        mfu=plan.mfu,
        peak_bytes=plan.peak_bytes,
        device_bytes=problem.device_bytes,
        cost=cost,
        tied=len(solution.tied),
        gap=plan.certificate.gap if plan.certificate is not None else 0.0,
        **counts,
    )


def _why(solution: Solution) -> str:
    """Why nothing fits, for a cell of a table."""
    if solution.nearest_excess_bytes < math.inf:
        excess = f"{format_bytes(max(solution.nearest_excess_bytes, 0.0))} too large"
        return f"{excess}, {solution.gpus_that_fit} GPUs would do" if solution.gpus_that_fit else excess
    if not solution.considered:
        return "pins and forbidden conditions leave no layout"
    reason, count = max(solution.rejected.items(), key=lambda kv: kv[1])
    return f"every layout is refused: {reason} ({format_count(count)} of {format_count(solution.considered)})"
