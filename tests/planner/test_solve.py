"""Objectives against plain loops over searches, and what a solution says when nothing fits."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from moeplan.errors import ProblemError
from moeplan.planner.problem import Problem
from moeplan.planner.search import search
from moeplan.planner.solve import Solution, cost_per_trillion_tokens, gpu_counts, resized, solve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.planner import tiny


def priced(problem: Problem, price: float = 2.5) -> Problem:
    cluster = dataclasses.replace(problem.profile.cluster, price_per_gpu_hour=price)
    return dataclasses.replace(problem, profile=nominal(cluster))


WIDE = priced(tiny.problem(tiny.MIXED, "h100x48", batch=48, seq=2048, era="te-2024"))
"""Six nodes: 8, 16, ... 48 GPUs."""


@functools.cache
def at_every_count(device_bytes: float = 0.0) -> dict[int, list[float]]:
    """Best step times at every count of nodes, by a loop of searches."""
    problem = dataclasses.replace(WIDE, memory_limit_bytes=device_bytes)
    out = {}
    for gpus in range(8, 49, 8):
        sized = dataclasses.replace(problem, profile=nominal(problem.profile.cluster.resized(gpus)))
        out[gpus] = [c.step_s for c in search(sized, 6).best]
    return out


def steps(solution: Solution) -> list[float]:
    """Step times, fastest first: plans that tie may stand in another order."""
    return sorted(p.step_s for p in solution.plans)


def test_throughput_takes_all_gpus() -> None:
    solution = solve(WIDE, keep=4)
    np.testing.assert_allclose(steps(solution), at_every_count()[48][:4], rtol=1e-9)
    assert solution.status == "optimal" and solution.counts == () and solution.gpus_that_fit == 0
    assert {p.layout.world for p in solution.plans} == {48}
    assert solution.considered == sum(solution.rejected.values()) + solution.priced


def test_every_plan_carries_the_certificate_and_the_others() -> None:
    solution = solve(WIDE, keep=3)
    for i, plan in enumerate(solution.plans):
        assert plan.certificate is not None and plan.certificate.gap == 0.0
        assert plan.certificate.considered == solution.considered and plan.certificate.rejected == solution.rejected
        others = [p for j, p in enumerate(solution.plans) if j != i]
        assert [r.layout for r in plan.runners_up] == [p.layout for p in others]
        np.testing.assert_allclose([r.step_s for r in plan.runners_up], [p.step_s for p in others], rtol=1e-9)


@pytest.mark.parametrize("gpus", (8, 16, 32, 48))
@pytest.mark.parametrize("by", ("time", "tokens"))
def test_fewest_gpus_that_reach_a_target(gpus: int, by: str) -> None:
    best = at_every_count()
    reach = best[gpus][0]
    target = {"target_step_s": reach} if by == "time" else {"target_tokens_per_s": WIDE.workload.tokens / reach * (1 - 1e-9)}
    fewest = min(count for count, times in best.items() if times[0] <= reach)
    solution = solve(WIDE, objective="gpus", keep=5, **target)  # type: ignore[arg-type]
    assert {p.layout.world for p in solution.plans} == {fewest}
    np.testing.assert_allclose(steps(solution), [t for t in best[fewest][:5] if t <= reach * (1 + 1e-8)], rtol=1e-9)
    assert solution.counts == (8, 16, 24, 32, 40, 48)


def test_a_target_out_of_reach() -> None:
    fastest = min(times[0] for times in at_every_count().values())
    solution = solve(WIDE, objective="gpus", target_step_s=fastest * 0.99)
    assert solution.status == "infeasible" and solution.plans == () and solution.gpus_that_fit == 0


@pytest.mark.parametrize("keep", (1, 4, 9))
def test_least_cost_over_all_counts(keep: int) -> None:
    wanted = sorted(gpus * step for gpus, times in at_every_count().items() for step in times[:keep])[:keep]
    solution = solve(WIDE, objective="cost", keep=min(keep, 6))
    np.testing.assert_allclose(sorted(p.layout.world * p.step_s for p in solution.plans), wanted[:6], rtol=1e-9)


def test_least_cost_within_a_target() -> None:
    best = at_every_count()
    reach = best[24][0]
    wanted = min(gpus * step for gpus, times in best.items() for step in times if step <= reach)
    solution = solve(WIDE, objective="cost", keep=1, target_step_s=reach)
    assert solution.plans[0].layout.world * solution.plans[0].step_s == pytest.approx(wanted, rel=1e-9)
    assert wanted > min(gpus * times[0] for gpus, times in best.items())


def test_cost_of_a_plan() -> None:
    # 10^12 tokens are 10^12 / 98304 steps of 3.6 s on 48 GPUs at 2.50 an hour.
    assert WIDE.workload.tokens == 98304
    assert cost_per_trillion_tokens(WIDE, 48, 3.6) == pytest.approx(1e12 / 98304 * 48 * 2.5 * 1e-3)


def test_objectives_say_what_they_need() -> None:
    with pytest.raises(ProblemError, match="objective 'gpus' needs a target"):
        solve(WIDE, objective="gpus")
    with pytest.raises(ProblemError, match="objective 'cost' needs a price"):
        solve(priced(WIDE, 0.0), objective="cost")


@pytest.mark.parametrize(
    ("cluster", "counts"),
    [
        ("h100x4", [4]),
        ("h100x8", [8]),
        ("h100x40", [8, 16, 24, 32, 40]),
        ("gb200x12", [4, 8, 12]),
        ("h100x528", [*range(8, 513, 8), 528]),
        ("h100x576", [*range(8, 513, 8), 560, 576]),
        ("h100x592", [*range(8, 513, 8), 560, 576, 592]),
    ],
)
def test_counts_that_are_looked_at(cluster: str, counts: list[int]) -> None:
    # Beyond 64 nodes: 70 and 72 have no prime factor above 7, and the last is the cluster itself.
    assert gpu_counts(tiny.problem(tiny.MIXED, cluster)) == counts


@functools.cache
def fits(gpus: int, limit_mib: int) -> bool:
    """Whether anything of the small model fits, by a search of its own."""
    return bool(search(small(gpus, limit_mib), 1).best)


def small(gpus: int, limit_mib: int) -> Problem:
    return tiny.problem(tiny.MIXED, f"h100x{gpus}", seq=1024, batch=48, era="te-2024", memory_limit_bytes=limit_mib * 2**20)


@pytest.mark.parametrize("gpus", (1, 2, 3, 8))
def test_gpus_that_fit_is_the_first_size_with_a_plan(gpus: int) -> None:
    answers = set()
    for limit_mib in (2200, 2250, 2400, 2600):
        if fits(gpus, limit_mib):
            continue
        # Beyond a node only whole nodes are there to be had.
        sizes = [n if n < 8 else -(-n // 8) * 8 for n in (gpus * t for t in (2, 3, 4, 6, 8, 12, 16))]
        wanted = next((n for n in sizes if fits(n, limit_mib)), 0)
        solution = solve(small(gpus, limit_mib))
        assert solution.status == "infeasible" and solution.nearest_excess_bytes > 0
        assert solution.gpus_that_fit == wanted or (not wanted and solution.gpus_that_fit > sizes[-1])
        answers.add(solution.gpus_that_fit)
    assert answers, "every limit fits"


def test_no_size_fits() -> None:
    solution = solve(tiny.problem(tiny.MIXED, "h100x2", era="te-2024", memory_limit_bytes=1e9))
    assert (solution.status, solution.plans, solution.gpus_that_fit) == ("infeasible", (), 0)
    assert np.isfinite(solution.nearest_excess_bytes)


def test_where_memory_is_not_what_forbids_no_size_is_looked_for() -> None:
    solution = solve(tiny.problem(tiny.MIXED, "h100x2", pins="tp=3"))
    assert solution.gpus_that_fit == 0 and solution.nearest_excess_bytes == np.inf


def without_seconds(solution: Solution) -> Any:
    data = [p.to_data() for p in solution.plans]
    for plan in data:
        plan["certificate"].pop("seconds")
    return data


@pytest.mark.parametrize("objective", ("throughput", "cost"))
def test_the_same_question_has_the_same_answer(objective: Any) -> None:
    first, second = (solve(WIDE, objective=objective, keep=3) for _ in range(2))
    assert without_seconds(first) == without_seconds(second)


def test_resized_keeps_all_but_the_count() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x16", pins="tp=2", memory_limit_bytes=5e10)
    other = resized(problem, 32)
    assert other.profile.cluster == load_cluster("h100x32")
    assert dataclasses.replace(other, profile=problem.profile).__dict__ == problem.__dict__


def test_progress_counts_the_sizes() -> None:
    seen: list[tuple[int, int]] = []
    solve(WIDE, objective="cost", keep=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
