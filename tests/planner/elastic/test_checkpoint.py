"""Checkpoint intervals: the published check values, the maximum on a grid, laws, and a simulation of failures."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw

from moeplan.errors import ProblemError
from moeplan.planner.elastic import checkpoint as ck
from moeplan.planner.elastic.checkpoint import SaveCost, best_saving, saving_at

HOUR_S = 3600.0
TWO_LEVELS = SaveCost(
    step_s=7.0,
    stall_s=4.0,
    persist_s=90.0,
    restart_s=200.0,
    asynchronous=True,
    local_stall_s=0.5,
    local_persist_s=5.0,
    storage_share=0.1,
)


@pytest.mark.parametrize(("mtbf_s", "interval_s", "share"), [(1.8 * HOUR_S, 842.3, 0.8307), (7.9 * HOUR_S, 1807.6, 0.9266)])
def test_published_check_values(mtbf_s: float, interval_s: float, share: float) -> None:
    found_s = ck.optimal_interval_s(60.0, mtbf_s)
    assert found_s == pytest.approx(interval_s, abs=0.05)
    assert ck.efficiency(found_s, 60.0, mtbf_s, 300.0) == pytest.approx(share, abs=5e-5)


def test_optimum_is_that_of_lambert() -> None:
    x = np.logspace(-6, 2.5, 60)
    assert ck.optimal_interval_s(x, 1.0) == pytest.approx(1.0 + lambertw(-np.exp(-1.0 - x)).real, rel=1e-8)


def test_optimum_keeps_its_digits_for_tiny_saves() -> None:
    x = np.logspace(-18, -6, 13)
    series = np.sqrt(2.0 * x) - 2.0 * x / 3.0 + np.sqrt(2.0) * x**1.5 / 18.0
    assert ck.optimal_interval_s(x, 1.0) / series - 1.0 == pytest.approx(0.0, abs=1e-9)
    assert ck.optimal_interval_s(0.0, 1.0) == 0.0


@given(st.floats(1e-3, 1e4), st.floats(1.0, 1e8), st.floats(0.0, 1e3))
def test_nothing_on_a_fine_grid_is_better(save_s: float, mtbf_s: float, restart_s: float) -> None:
    save_s, restart_s = min(save_s, 10.0 * mtbf_s), min(restart_s, 10.0 * mtbf_s)
    best_s = ck.optimal_interval_s(save_s, mtbf_s)
    grid = best_s * np.concatenate([np.linspace(0.5, 1.5, 401), [0.01, 0.1, 10.0]])
    assert np.all(
        ck.efficiency(grid, save_s, mtbf_s, restart_s) <= ck.efficiency(best_s, save_s, mtbf_s, restart_s) * (1 + 1e-12)
    )
    stalled_s = ck.asynchronous_interval_s(save_s, 0.0, mtbf_s, restart_s)
    grid = stalled_s * np.linspace(0.5, 1.5, 401)
    best = ck.asynchronous_efficiency(stalled_s, save_s, 0.0, mtbf_s, restart_s)
    assert np.all(ck.asynchronous_efficiency(grid, save_s, 0.0, mtbf_s, restart_s) <= best * (1 + 1e-12))


def test_approximations_near_the_optimum_where_saves_are_short() -> None:
    best_s = ck.optimal_interval_s(60.0, 30_000.0)
    assert abs(ck.daly_interval_s(60.0, 30_000.0) / best_s - 1.0) < 1e-5
    assert (
        abs(ck.daly_first_interval_s(60.0, 30_000.0) / best_s - 1.0)
        < 0.012
        < ck.young_interval_s(60.0, 30_000.0) / best_s - 1.0
    )
    assert ck.daly_interval_s(np.array([5.0, 60.0]), 2.0) == pytest.approx([2.0, 2.0])
    share = ck.efficiency(best_s, 60.0, 30_000.0, 300.0)
    assert ck.first_order_efficiency(best_s, 60.0, 30_000.0, 300.0) == pytest.approx(share, rel=5e-3)


def test_period_of_greatest_availability() -> None:
    """Work tau + save d: maximum of tau / (tau + d) less what is redone and restarted, to first order."""
    period_s = ck.available_period_s(10.0, 5000.0, 100.0)
    grid = np.linspace(50.0, 2000.0, 100_001)
    share = (grid - 10.0) / (grid * (1.0 + (100.0 + grid / 2.0) / 5000.0))
    assert period_s == pytest.approx(grid[np.argmax(share)], abs=0.05)


def test_numbers_and_arrays_alike() -> None:
    saves, mtbfs = np.array([1.0, 60.0, 600.0]), np.array([1e3, 1e4, 1e5])
    for function in (
        ck.optimal_interval_s,
        ck.young_interval_s,
        ck.daly_first_interval_s,
        ck.daly_interval_s,
        ck.available_period_s,
    ):
        assert function(saves, mtbfs) == pytest.approx([float(function(d, m)) for d, m in zip(saves, mtbfs, strict=True)])


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("step_s", [0.7, 13.0, 500.0, 4000.0])
@pytest.mark.parametrize("mtbf_s", [400.0, 6480.0, 1e6])
def test_best_whole_number_of_steps(asynchronous: bool, step_s: float, mtbf_s: float) -> None:
    cost = SaveCost(step_s=step_s, stall_s=30.0, persist_s=700.0 * asynchronous, restart_s=300.0, asynchronous=asynchronous)
    best = best_saving(cost, mtbf_s)
    fewest = math.ceil(cost.durable_s / step_s - 1e-9)
    scanned = [
        saving_at(cost, mtbf_s, steps) for steps in range(max(1, fewest), fewest + int(3 * best.interval_s / step_s) + 3)
    ]
    assert best == max(scanned, key=lambda saving: saving.efficiency)
    assert best.interval_s == best.interval_steps * step_s >= cost.durable_s


def test_two_levels_are_the_best_on_a_grid() -> None:
    best = best_saving(TWO_LEVELS, 50_000.0)
    assert 0 < best.local_interval_steps < best.interval_steps
    local, storage = np.meshgrid(7.0 * np.arange(1, 200), 7.0 * np.arange(13, 800))
    grid = ck.two_level_efficiency(local, storage, TWO_LEVELS, 50_000.0)
    assert best.efficiency >= grid.max() * (1.0 - 1e-9)
    first_order = 50_000.0 * np.array([2 * 0.5 / 0.9, 2 * 4.0 / 0.1])
    assert [best.local_interval_steps * 7.0, best.interval_s] == pytest.approx(np.sqrt(first_order), rel=0.03)
    assert best.efficiency > best_saving(dataclasses.replace(TWO_LEVELS, storage_share=1.0), 50_000.0).efficiency


def test_a_local_level_that_costs_too_much_is_left_out() -> None:
    dear = dataclasses.replace(TWO_LEVELS, local_stall_s=50.0, storage_share=0.95)
    assert best_saving(dear, 50_000.0).local_interval_steps == 0
    assert best_saving(dear, 50_000.0) == best_saving(dataclasses.replace(dear, storage_share=1.0), 50_000.0)


def test_storage_is_hardly_written_where_the_local_level_survives_all() -> None:
    safe = best_saving(dataclasses.replace(TWO_LEVELS, storage_share=0.0), 50_000.0)
    assert safe.interval_s >= 49_000.0 and safe.local_interval_steps * 7.0 < 500.0


def test_pace_counts_stalls_and_lost_counts_work() -> None:
    blocking = saving_at(SaveCost(step_s=10.0, stall_s=50.0), 1e5, 45)
    assert (blocking.pace, blocking.lost_s, blocking.persist_s) == pytest.approx((0.9, 250.0, 50.0))
    one = saving_at(dataclasses.replace(TWO_LEVELS, step_s=10.0), 1e5, 40, 10)
    assert one.pace == pytest.approx(1.0 / (1.0 + 4.0 / 400.0 + 0.5 / 100.0))
    assert one.lost_s == 200.0 + 90.0


def test_writing_takes_as_long_as_the_slowest_part() -> None:
    assert ck.write_s(1e12, 100e9) == 10.0
    assert ck.write_s(1e12, 100e9, np.array([1, 4]), 20e9) == pytest.approx([50.0, 12.5])


@given(st.floats(1.0, 500.0), st.floats(500.0, 1e6), st.floats(1.01, 10.0))
def test_rarer_failures_and_cheaper_saves_are_no_worse(stall_s: float, mtbf_s: float, factor: float) -> None:
    cost = SaveCost(step_s=3.0, stall_s=stall_s, restart_s=100.0)
    share = best_saving(cost, mtbf_s).efficiency
    assert best_saving(cost, mtbf_s * factor).efficiency >= share
    assert best_saving(dataclasses.replace(cost, stall_s=stall_s / factor), mtbf_s).efficiency >= share


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_s": 0.0}, "a step of 0 s"),
        ({"stall_s": -1.0}, "stall_s of a save is -1"),
        ({"restart_s": float("nan")}, "restart_s of a save is nan"),
        ({"asynchronous": False}, "stalls 4 s is durable after 90 s"),
        ({"asynchronous": False, "persist_s": 0.0}, "two levels"),
        ({"storage_share": 1.5}, "1.5 of the failures"),
    ],
)
def test_costs_that_cannot_be(change: dict[str, object], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        dataclasses.replace(TWO_LEVELS, **change)  # type: ignore[arg-type]


def test_intervals_that_cannot_be() -> None:
    with pytest.raises(ProblemError, match=r"every 12 steps are 84 s apart, but one takes 90 s \(save every 13 steps"):
        saving_at(TWO_LEVELS, 1e5, 12)
    with pytest.raises(ProblemError, match="every 8 steps are 56 s apart, but one takes 60 s"):
        saving_at(SaveCost(step_s=7.0, stall_s=60.0), 1e5, 8)
    with pytest.raises(ProblemError, match="every 0 steps"):
        saving_at(TWO_LEVELS, 1e5, 0)
    with pytest.raises(ProblemError, match="which all failures lose"):
        saving_at(dataclasses.replace(TWO_LEVELS, storage_share=1.0), 1e5, 40, 10)
    with pytest.raises(ProblemError, match="between failures of -5 s"):
        best_saving(TWO_LEVELS, -5.0)


def _simulated(cost: SaveCost, interval_s: float, mtbf_s: float, failures: int, seed: int) -> float:
    """Share of time that is kept work: events one by one, failures strike work, saves and restarts."""
    gaps = itertools.cycle(np.random.default_rng(seed).exponential(mtbf_s, failures))
    total = kept = 0.0
    for _ in range(failures):
        left = next(gaps)
        total += left
        if left < cost.restart_s:
            continue
        ran = left - cost.restart_s
        cycle_s = interval_s + cost.stall_s
        done = int(ran // cycle_s)
        if cost.asynchronous:
            # a save is durable `persist_s` after its snapshot, which follows the work of its interval
            done = int(max(0.0, ran - cost.persist_s) // cycle_s)
        kept += done * interval_s
    return kept / total


@pytest.mark.parametrize(("mtbf_s", "seed"), [(1.8 * HOUR_S, 1), (7.9 * HOUR_S, 2)])
def test_simulation_agrees(mtbf_s: float, seed: int) -> None:
    blocking = SaveCost(step_s=1.0, stall_s=60.0, restart_s=300.0)
    interval_s = float(ck.optimal_interval_s(60.0, mtbf_s))
    formula = ck.efficiency(interval_s, 60.0, mtbf_s, 300.0)
    assert _simulated(blocking, interval_s, mtbf_s, 100_000, seed) == pytest.approx(formula, rel=8e-3)
    asynchronous = SaveCost(step_s=1.0, stall_s=5.0, persist_s=120.0, restart_s=300.0, asynchronous=True)
    saving = best_saving(asynchronous, mtbf_s)
    assert _simulated(asynchronous, saving.interval_s, mtbf_s, 100_000, seed) == pytest.approx(saving.efficiency, rel=2e-2)
