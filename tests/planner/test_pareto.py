"""The front against pricing everything: optimal within each constraint, nothing dominated, monotone, complete."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from moeplan.planner import pareto
from moeplan.planner.pareto import Front, front
from moeplan.planner.problem import Problem
from moeplan.planner.solve import cost_per_trillion_tokens, gpu_counts, resized, solve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.planner import tiny
from tests.planner.brute import Prices, needed_bytes

pytestmark = pytest.mark.usefixtures("coarse")

STEP = 50e6
"""Bytes: peaks of the tiny problems are about a GiB, so that the memory curve takes smaller steps than on a real device."""


def on_pairs(problem: Problem, gpus: int, price: float = 0.0) -> Problem:
    """On hosts of two GPUs, so that a few GPUs have several counts."""
    pairs = dataclasses.replace(
        load_cluster(f"h100x{gpus}"), name=f"pairsx{gpus}", gpus_per_node=2, domain_gpus=2, nics_per_node=2,
        price_per_gpu_hour=price,
    )  # fmt: skip
    return dataclasses.replace(problem, profile=nominal(pairs))


CASES = {
    "experts": on_pairs(tiny.problem(tiny.MIXED, batch=6, seq=1024, era="te-2024"), 6, price=2.5),
    "uneven stages": on_pairs(tiny.problem(tiny.ODD, batch=12, seq=2048), 8),
    "pinned": on_pairs(tiny.problem(tiny.MIXED, batch=4, era="te-2024", pins="pp>=2", forbid="ep=2"), 4),
    "tight": on_pairs(tiny.problem(tiny.MIXED, batch=6, seq=4096, era="te-2024", memory_limit_bytes=3.6e9), 6),
}


@functools.cache
def prices(name: str, gpus: int) -> Prices:
    return Prices(resized(CASES[name], gpus))


def least(name: str, gpus: int, device_bytes: float) -> float:
    """Least step time of all layouts that meet the conditions and fit, infinite if there is none."""
    problem = CASES[name]

    def meets(x: object) -> bool:
        fields = [(c, True) for c in problem.pins] + [(c, False) for c in problem.forbidden]
        return all(bool(c.holds_for(getattr(x, c.field))) == wanted for c, wanted in fields)

    return min(prices(name, gpus).best(device_bytes, 1, meets), default=np.inf)


@functools.cache
def found(name: str) -> Front:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pareto, "LESS_BYTES", STEP)
        return front(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_no_point_is_dominated(name: str) -> None:
    points = found(name).points
    for one, two in itertools.permutations(points, 2):
        assert not one.dominates(two)
        worse = one.step_s >= two.step_s, one.gpus >= two.gpus, one.free_bytes <= two.free_bytes
        assert not all(worse), "no better in anything"


@pytest.mark.parametrize("name", CASES)
def test_every_point_is_the_best_within_its_constraint(name: str) -> None:
    problem = CASES[name]
    for point in found(name).by_gpus:
        counts = [n for n in gpu_counts(problem) if n <= point.gpus]
        wanted = min(least(name, n, problem.device_bytes) for n in counts)
        assert point.step_s == pytest.approx(wanted, rel=1e-9)
        assert point.limit_bytes == problem.device_bytes
    for point in found(name).by_memory:
        assert point.step_s == pytest.approx(least(name, point.gpus, point.limit_bytes), rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_counts_that_are_left_out_gain_nothing(name: str) -> None:
    curve = {p.gpus: p.step_s for p in found(name).by_gpus}
    best = np.inf
    for gpus in gpu_counts(CASES[name]):
        here = least(name, gpus, CASES[name].device_bytes)
        assert (gpus in curve) == (here < best)
        best = min(best, here)
    assert found(name).counts == tuple(gpu_counts(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_curves_are_monotone(name: str) -> None:
    by_gpus, by_memory = found(name).by_gpus, found(name).by_memory
    assert [p.gpus for p in by_gpus] == sorted({p.gpus for p in by_gpus})
    assert [p.step_s for p in by_gpus] == sorted((p.step_s for p in by_gpus), reverse=True)
    assert [p.step_s for p in by_memory] == sorted(p.step_s for p in by_memory)
    free = [p.free_bytes for p in by_memory]
    assert free == sorted(free) and min(free) >= 0
    assert by_memory[0] is by_gpus[-1] and {p.gpus for p in by_memory} == {by_gpus[-1].gpus}
    assert by_memory[-1].step_s < pareto.SLOWEST * by_memory[0].step_s


@pytest.mark.parametrize("name", CASES)
def test_the_memory_curve_steps_down_and_goes_on_to_its_end(name: str) -> None:
    points = found(name).by_memory
    for before, after in itertools.pairwise(points):
        assert after.plan.peak_bytes <= before.plan.peak_bytes - STEP
        assert needed_bytes(after.plan.peak_bytes) <= after.limit_bytes
    last = points[-1].plan.peak_bytes
    beyond = needed_bytes(last - max(STEP, pareto.LESS_SHARE * last))
    assert least(name, points[0].gpus, beyond) >= pareto.SLOWEST * points[0].step_s


def test_there_is_something_to_weigh() -> None:
    assert len(found("uneven stages").by_gpus) == 4 and len(found("uneven stages").by_memory) > 4
    # Six sequences on six GPUs are slower than on four, whose memory is what is saved then.
    assert [p.gpus for p in found("experts").by_gpus] == [2, 4] and found("experts").by_memory[0].gpus == 4


def test_free_memory_and_money() -> None:
    problem, points = CASES["experts"], found("experts").points
    for p in points:
        assert p.free_bytes == pytest.approx(problem.device_bytes - needed_bytes(p.plan.peak_bytes), abs=1.0)
        assert p.cost == pytest.approx(cost_per_trillion_tokens(problem, p.gpus, p.step_s))
        assert p.plan.problem.device_bytes == problem.device_bytes and p.plan.layout.world == p.gpus
    cheapest = found("experts").cheapest
    assert cheapest.cost == min(p.cost for p in points)
    # Least money over all counts is on the front.
    assert cheapest.plan.step_s == pytest.approx(solve(problem, objective="cost", keep=1).plans[0].step_s)
    assert found("uneven stages").cheapest.cost == 0.0


def test_the_fastest_is_that_of_solve_or_needs_fewer_gpus() -> None:
    for name, problem in CASES.items():
        fastest, whole = found(name).by_memory[0], solve(problem, keep=1).plans[0]
        same = fastest.gpus == problem.profile.cluster.gpus
        assert fastest.step_s == pytest.approx(whole.step_s, rel=1e-9) if same else fastest.step_s < whole.step_s


def test_nothing_fits() -> None:
    seen: list[tuple[int, int]] = []
    nothing = front(
        dataclasses.replace(CASES["experts"], memory_limit_bytes=2.2e9), lambda done, total: seen.append((done, total))
    )
    assert nothing.points == () and nothing.searches == 3 and nothing.by_gpus == nothing.by_memory == ()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
