"""Robustness: probabilities and regret against drawn errors, routing against repriced workloads, and what a cliff is."""

import dataclasses

import numpy as np
import pytest

from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.uncertainty import deviations, student_tail
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.robustness import (
    LEAST_LOST,
    RISKY,
    expected_least,
    out_of_memory,
    regret,
    risk,
    safe_limit_bytes,
    stresses,
)
from moeplan.planner.solve import solve
from moeplan.units import GIB
from tests.planner import tiny

PROBLEM = tiny.problem(tiny.MIXED, "h100x16", batch=16)
LAYOUT = Layout(dp=16, ep=8, edp=2, dispatcher="alltoall")
DEVICE = PROBLEM.profile.cluster.device.memory_bytes
OUTSIDE = MEMORY.context_bytes + MEMORY.communicator_bytes


def test_the_tail_of_students_law() -> None:
    draws = np.random.default_rng(0).standard_t(4, 400_000)
    for t in (-2.0, -0.5, 0.0, 0.7, 1.5332, 4.0):
        assert student_tail(t) == pytest.approx(np.mean(draws > t), abs=0.003)
    assert student_tail(1.5332) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("peak_gib", (50.0, 66.0, 70.0, 72.0, 76.0, 90.0))
def test_out_of_memory_is_how_often_drawn_pools_exceed_the_device(peak_gib: float) -> None:
    chance = np.random.default_rng(1)
    peak = peak_gib * GIB * np.exp(deviations().memory * chance.standard_t(4, 200_000))
    pool = peak * (1.0 + chance.uniform(LEAST_LOST, MEMORY.fragmentation, len(peak)))
    drawn = np.mean(pool + OUTSIDE > DEVICE)
    # what is lost between blocks is uniform, and taken for part of the same law
    assert out_of_memory(DEVICE, peak_gib * GIB) == pytest.approx(drawn, abs=0.02)


def test_out_of_memory_of_many_is_that_of_each_and_rises() -> None:
    peaks = np.linspace(0.0, 120.0, 25) * GIB
    found = out_of_memory(DEVICE, peaks)
    np.testing.assert_allclose(found, [out_of_memory(DEVICE, p) for p in peaks])
    assert (np.diff(found) >= 0).all() and found[0] < 1e-3 and found[-1] > 0.99


def test_the_safe_limit_leaves_the_stated_risk() -> None:
    limit = safe_limit_bytes(DEVICE)
    just_fits = dataclasses.replace(PROBLEM, memory_limit_bytes=limit).peak_limit_bytes
    assert limit < DEVICE and out_of_memory(DEVICE, just_fits) == pytest.approx(RISKY, abs=1e-4)
    assert 0.2 < out_of_memory(DEVICE, PROBLEM.peak_limit_bytes) < 0.3


# -- routing -------------------------------------------------------------------------------------------------------------


def test_a_plan_under_other_routing_is_priced_with_it() -> None:
    found = stresses(price_plan(PROBLEM, LAYOUT))
    assert [s.routing for s in found] == ["balanced", "half of all steps", "9 of 10 steps", "99 of 100 steps"]
    for stress in found:
        by_load, by_kept = (
            price_plan(tiny.problem(tiny.MIXED, "h100x16", batch=16, imbalance=i), LAYOUT) for i in (stress.load, stress.kept)
        )
        assert (stress.step_s, stress.peak_bytes) == (pytest.approx(by_load.step_s), pytest.approx(by_kept.peak_bytes))
    for one, other in zip(found, found[1:], strict=False):
        assert one.load < other.load and one.kept < other.kept
        assert one.step_s < other.step_s and one.peak_bytes <= other.peak_bytes and one.out_of_memory <= other.out_of_memory


def test_no_routing_is_lighter_than_what_was_asked_for() -> None:
    plan = price_plan(tiny.problem(tiny.MIXED, "h100x16", batch=16, imbalance=1.5), LAYOUT)
    found = {s.routing: s for s in stresses(plan)}
    assert found["as asked"].step_s == pytest.approx(plan.step_s) and found["as asked"].load == 1.5
    assert all(s.load >= 1.5 and s.kept >= 1.5 for name, s in found.items() if name != "balanced")


@pytest.mark.parametrize("case", ("dense", "one rank", "drops"))
def test_routing_that_cannot_be_uneven(case: str) -> None:
    if case == "dense":
        plan = price_plan(tiny.problem(tiny.DENSE), Layout(dp=4, edp=4))
    elif case == "one rank":
        plan = price_plan(PROBLEM, dataclasses.replace(LAYOUT, ep=1, edp=16))
    else:
        plan = price_plan(tiny.problem(tiny.MIXED, "h100x16", batch=16, capacity_factor=1.0), LAYOUT)
    assert [s.routing for s in stresses(plan)] == ["balanced"]
    assert risk(plan).kept == plan.problem.workload.imbalance and risk(plan).excess_bytes == pytest.approx(plan.excess_bytes)


def on_device(memory_bytes: float, **more: float) -> Plan:
    cluster = PROBLEM.profile.cluster
    cluster = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, memory_bytes=memory_bytes))
    profile = dataclasses.replace(PROBLEM.profile, cluster=cluster)
    return price_plan(dataclasses.replace(PROBLEM, profile=profile, **more), LAYOUT)


def test_cliffs() -> None:
    peak = on_device(DEVICE).peak_bytes
    needed = peak * (1.0 + MEMORY.fragmentation) + OUTSIDE
    assert not risk(on_device(DEVICE)).cliff
    assert not risk(on_device(DEVICE, memory_limit_bytes=needed * 1.0001)).cliff  # the device has more
    tight = risk(on_device(needed * 1.0001))
    assert (
        tight.cliff and tight.out_of_memory > RISKY and tight.reason.startswith("it runs out of memory with a probability of 2")
    )
    uneven = dataclasses.replace(tight, out_of_memory=0.05, excess_bytes=GIB, kept=1.234)
    assert uneven.cliff and uneven.reason == "it misses the device by 1.0 GiB where the fullest rank keeps 1.23 x the mean"
    assert not dataclasses.replace(uneven, excess_bytes=-1.0).cliff


# -- regret --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 2, 3, 6))
def test_the_expected_least_is_that_of_drawn_times(count: int) -> None:
    chance = np.random.default_rng(count)
    scaled = chance.dirichlet(np.full(8, 0.7), count) * chance.uniform(0.05, 0.4, 8)  # shares of kinds, and their deviations
    covariance, mean = scaled @ scaled.T + 0.023**2 * np.eye(count), chance.uniform(0.0, 0.06, count)
    drawn = chance.multivariate_normal(mean, covariance, 200_000).min(axis=1).mean()
    assert expected_least(mean, covariance) == pytest.approx(drawn, rel=0.01 if count <= 2 else 0.1)


def test_regret_grows_with_the_step_and_is_none_alone() -> None:
    alone = price_plan(PROBLEM, LAYOUT)
    assert regret(alone) == 0.0
    plans = sorted(solve(PROBLEM, keep=4).plans, key=lambda p: p.step_s)
    found = [regret(p) for p in plans]
    assert found == sorted(found) and found[0] > 0.0
    # the least of all is the same for every plan: regrets differ by the predicted difference
    np.testing.assert_allclose(np.diff(found), np.diff(np.log([p.step_s for p in plans])), atol=0.002)
