"""Solving a problem: the best plans of one cluster, or over the sizes that a cluster can be cut to.

"throughput" takes all GPUs. "gpus" finds the fewest that reach a target, "cost" the least money per 10^12 tokens; both look at
whole nodes, every count up to 64 nodes and beyond that those with small prime factors only, since others leave few layouts.
That no plan fits is an answer: `Solution.status` says so, with what missed by how much and how many GPUs would do. Plans that
tie with the fastest are put in the order of `ties.py`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplan.errors import ProblemError
from moeplan.planner.certificate import Certificate
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.safer import safer
from moeplan.planner.search import Candidate, Search, search
from moeplan.planner.ties import settled
from moeplan.units import HOUR_S

Objective = Literal["throughput", "gpus", "cost"]
Progress = Callable[[int, int], None]

EVERY_COUNT_UP_TO = 64
"""Nodes up to which every count is looked at."""
SMALL_PRIMES = (2, 3, 5, 7)
FAR_ENOUGH = 64
"""Times the GPUs of the problem, up to which a size that fits is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """How far splits of layers over the stages are looked at."""

    gap: float = 1.0
    """Share of the step time that need not be proven of splits that are not level; 1: no more than bounds say at once."""
    time_limit_s: float = math.inf
    """Seconds after which nothing more is looked at."""
    jobs: int = 1
    """Processes that prove."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Answer to a problem."""

    status: Literal["optimal", "bounded", "infeasible"]
    plans: tuple[Plan, ...]
    """Best first: of those that tie with the fastest the preferred one, see `ties.py`; empty if nothing fits."""
    considered: int
    rejected: Mapping[str, int]
    """Layouts by the reason they were passed over."""
    priced: int
    seconds: float
    nearest_excess_bytes: float = np.inf
    """By how much the smallest layout that memory forbids misses the device; infinite if no layout got that far."""
    gpus_that_fit: int = 0
    """GPUs of the same kind on which some plan fits; 0: not looked for or not found."""
    counts: tuple[int, ...] = ()
    """GPU counts that were looked at."""

    @property
    def tied(self) -> tuple[int, ...]:
        """Places in `plans` of those that differ from the first by less than what is not known of the difference."""
        return tuple(i + 1 for i, runner in enumerate(self.plans[0].runners_up) if runner.tie) if self.plans else ()


def solve(
    problem: Problem,
    *,
    objective: Objective = "throughput",
    keep: int = 5,
    target_step_s: float = np.inf,
    target_tokens_per_s: float = 0.0,
    progress: Progress | None = None,
    splits: Splits | None = None,
) -> Solution:
    """The `keep` best plans, and the fastest that surely fits where the best of all may not (objective "throughput").

    A target is a step time or tokens per second of the whole job.
    `splits`: look at further splits of layers over the stages than even and balanced ones (objective "throughput").
    """
    started = time.perf_counter()
    if objective == "throughput":
        found = search(problem, keep, progress)
        if splits is not None and (split := _split(problem, found, splits, started, progress)).plans:
            return split
        best = [*found.best, *safer(problem, found.best, progress, known=found)]
        solution = _solution([(problem, c) for c in best], found, started)
        if solution.plans:
            return solution
        gpus = _gpus_that_fit(problem, found)
        return dataclasses.replace(solution, gpus_that_fit=gpus, seconds=time.perf_counter() - started)
    reach = min(target_step_s, problem.workload.tokens / target_tokens_per_s if target_tokens_per_s else np.inf)
    reach = np.nextafter(reach, np.inf)  # a search finds what is below its limit; the target itself will do
    if objective == "gpus" and not np.isfinite(reach):
        raise ProblemError("objective 'gpus' needs a target", hint="give --target-step-time or --target-tokens-per-s")
    if objective == "cost" and not problem.profile.cluster.price_per_gpu_hour:
        raise ProblemError("objective 'cost' needs a price", hint="give --price-per-gpu-hour")
    return _over_counts(problem, objective, keep, reach, started, progress)


def _split(problem: Problem, found: Search, splits: Splits, started: float, progress: Progress | None) -> Solution:
    """The plans of a search with the best splits of layers."""
    from moeplan.planner.stages.refine import refine, resplit  # the simulator and the solvers are loaded where they are needed

    deadline_s = started + splits.time_limit_s
    plain = resplit(problem, found.best)
    first = plain[0] if plain else None
    proof = refine(problem, first, found=found, gap=splits.gap, deadline_s=deadline_s, jobs=splits.jobs, progress=progress)
    better = [proof.best] if proof.best.step_s < np.inf else []
    others = [c for c in plain if c.identity != proof.best.identity]
    best = sorted([*better, *others], key=lambda c: c.step_s)[: max(1, len(found.best))]
    more = {
        "gap": proof.gap,
        "uneven_gap": proof.uneven_gap,
        "pipelines": proof.considered,
        "opened": proof.opened,
        "programmes": proof.programmes,
    }
    best = [*best, *safer(problem, best, progress, known=found)]
    return _solution([(problem, c) for c in best], found, started, proof.remarks, **more)


def gpu_counts(problem: Problem) -> list[int]:
    """GPU counts of the problem's cluster that are looked at, ascending."""
    cluster = problem.profile.cluster
    node = min(cluster.gpus_per_node, cluster.gpus)
    nodes = cluster.gpus // node
    return [node * n for n in range(1, nodes + 1) if n <= EVERY_COUNT_UP_TO or n == nodes or _smooth(n)]


def cost_per_trillion_tokens(problem: Problem, gpus: int, step_s: float) -> float:
    """Money for 10^12 tokens."""
    seconds = 1e12 / problem.workload.tokens * step_s
    return gpus * problem.profile.cluster.price_per_gpu_hour * seconds / HOUR_S


def resized(problem: Problem, gpus: int) -> Problem:
    """The same problem on another number of GPUs."""
    return dataclasses.replace(problem, profile=problem.profile.resized(gpus))


def _over_counts(
    problem: Problem, objective: Objective, keep: int, reach: float, started: float, progress: Progress | None
) -> Solution:
    counts = gpu_counts(problem)
    best: list[tuple[Problem, Candidate]] = []
    totals = Search()
    for place, gpus in enumerate(counts):
        sized = resized(problem, gpus)
        limit = reach
        if objective == "cost" and len(best) == keep:
            limit = min(limit, _gpu_seconds(*best[-1]) / gpus)
        found = search(sized, keep, limit_s=limit)
        totals.considered += found.considered
        totals.priced += found.priced
        totals.variants += found.variants
        totals.rejected += found.rejected
        totals.nearest_excess_bytes = min(totals.nearest_excess_bytes, found.nearest_excess_bytes)
        if progress is not None:
            progress(place + 1, len(counts))
        best += [(sized, c) for c in found.best]
        if objective == "gpus" and best:
            break
        best = sorted(best, key=lambda found: _gpu_seconds(*found))[:keep]
    return dataclasses.replace(_solution(best, totals, started), counts=tuple(counts))


def _gpu_seconds(problem: Problem, candidate: Candidate) -> float:
    """GPU time of a step, which cost is in proportion to."""
    return problem.profile.cluster.gpus * candidate.step_s


def _solution(
    candidates: list[tuple[Problem, Candidate]], totals: Search, started: float, remarks: Sequence[str] = (), **proof: Any
) -> Solution:
    seconds = time.perf_counter() - started
    certificate = Certificate(
        status="optimal" if proof.get("gap", 0.0) <= 0.0 else "bounded",
        considered=totals.considered,
        priced=totals.priced,
        variants=totals.variants,
        rejected=dict(totals.rejected),
        seconds=round(seconds, 3),
        **proof,
    )
    plans = settled(
        [
            price_plan(sized, c.layout, certificate=certificate, remarks=(*sized.model.remarks, *remarks))
            for sized, c in candidates
        ]
    )
    return Solution(
        status="infeasible" if not plans else certificate.status,
        plans=plans,
        considered=totals.considered,
        rejected=dict(Counter(totals.rejected).most_common()),
        priced=totals.priced,
        seconds=seconds,
        nearest_excess_bytes=totals.nearest_excess_bytes,
    )


def _gpus_that_fit(problem: Problem, found: Search) -> int:
    """The smallest of 2, 3, 4, 6, 8, 12, ... times the GPUs on which some plan fits, if memory is what forbids."""
    if not np.isfinite(found.nearest_excess_bytes):
        return 0
    gpus = problem.profile.cluster.gpus
    for power in range(1, FAR_ENOUGH.bit_length()):
        for times in (2**power, 3 * 2 ** (power - 1)):
            if times <= FAR_ENOUGH and search(resized(problem, _whole_nodes(problem, times * gpus)), 1).best:
                return _whole_nodes(problem, times * gpus)
    return 0


def _whole_nodes(problem: Problem, gpus: int) -> int:
    node = problem.profile.cluster.gpus_per_node
    return gpus if gpus < node else -(-gpus // node) * node


def _smooth(n: int) -> bool:
    for prime in SMALL_PRIMES:
        while n % prime == 0:
            n //= prime
    return n == 1
