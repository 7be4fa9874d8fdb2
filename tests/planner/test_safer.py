"""The fastest layout that surely fits: found among all, offered where the fastest is on a cliff, preferred where it ties."""

from __future__ import annotations

import dataclasses

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.robustness import risk
from moeplan.planner.safer import safer
from moeplan.planner.search import search
from moeplan.planner.solve import solve
from moeplan.planner.ties import CLIFF, PREFERRED, compare
from moeplan.units import GIB
from tests.planner import tiny
from tests.planner.brute import Prices, needed_bytes

pytestmark = pytest.mark.usefixtures("coarse")


def small_devices(model: Model, memory_gib: float) -> Problem:
    """Four devices with little memory."""
    problem = tiny.problem(model, "h100x4", batch=16)
    device = dataclasses.replace(problem.profile.cluster.device, memory_bytes=memory_gib * GIB)
    cluster = dataclasses.replace(problem.profile.cluster, device=device)
    return dataclasses.replace(problem, profile=dataclasses.replace(problem.profile, cluster=cluster))


def cliff(problem: Problem, layout: Layout) -> bool:
    return risk(price_plan(problem, layout)).cliff


@pytest.mark.parametrize(("model", "memory_gib"), [(tiny.MIXED, 5.0), (tiny.MIXED, 6.2)])
def test_no_safe_layout_is_faster(model: Model, memory_gib: float) -> None:
    problem = small_devices(model, memory_gib)
    known = search(problem, 3)
    best = known.best
    (found,) = safer(problem, best)
    assert safer(problem, best, known=known) == [found]
    assert cliff(problem, best[0].layout) and not cliff(problem, found.layout)
    assert found.identity == best[0].identity and best[0].step_s < found.step_s < 1.01 * best[0].step_s
    prices = Prices(problem)
    rows = zip(prices.layouts, prices.step_s, prices.peak_bytes, strict=True)
    faster = [x for x, took, peak in rows if took < found.step_s * (1 - 1e-9) and needed_bytes(peak) <= problem.device_bytes]
    assert faster and all(cliff(problem, x) for x in faster)


def test_nothing_beside_what_is_safe_or_known() -> None:
    roomy = small_devices(tiny.MIXED, 8.0)
    assert safer(roomy, search(roomy, 3).best) == [] == safer(roomy, [])
    known = small_devices(tiny.MIXED, 6.0)  # the third best is safe, and faster than what else is
    best = search(known, 3).best
    assert [cliff(known, c.layout) for c in best] == [True, True, False] and safer(known, best) == []


def test_a_safer_variant_that_ties_comes_first() -> None:
    solution = solve(small_devices(tiny.MIXED, 5.0), keep=2)
    chosen, fastest = solution.plans[0], min(solution.plans, key=lambda p: p.step_s)
    assert len(solution.plans) == 3 and chosen is not fastest
    assert chosen.layout.degrees() == fastest.layout.degrees() and not risk(chosen).cliff and risk(fastest).cliff
    assert compare(fastest, chosen).tie and chosen.remarks[-1].startswith(PREFERRED)
    assert chosen.certificate == fastest.certificate is not None


def test_a_safer_plan_that_is_no_tie_is_named_and_what_it_costs() -> None:
    solution = solve(small_devices(tiny.ODD, 3.5), keep=1)
    fastest, safe = solution.plans
    assert fastest.step_s < safe.step_s and not compare(fastest, safe).tie
    said = f"{CLIFF}it runs out of memory with a probability of"
    assert fastest.remarks[-1].startswith(said)
    assert f"takes {safe.step_s / fastest.step_s - 1:.1%} longer, which is no tie" in fastest.remarks[-1]
