"""What is expected of untried layouts: the law of two, what more trials change, and what is gained."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import deviations, difference_sigma, shares, sigmas
from moeplan.planner.outlook import WIDEST, conditioned, corrected_profile, improvement, outlook, predictions
from moeplan.planner.solve import solve
from tests.planner import tiny
from tests.planner.measured import changed

PROBLEM = tiny.problem(tiny.MIXED, "h100x8", batch=64)
LAYOUTS = [plan.layout for plan in solve(PROBLEM, keep=12).plans]
SECONDS = predictions(PROBLEM, LAYOUTS)[0]


def parts() -> tuple[np.ndarray, np.ndarray]:
    time = Pricing(PROBLEM.model, PROBLEM.profile, PROBLEM.workload, Layouts.of(LAYOUTS), exact=True).step_cost().time
    return shares(time), sigmas(PROBLEM.profile, PROBLEM.workload)


@given(st.integers(0, len(LAYOUTS) - 1), st.floats(0.97, 1.03))
def test_one_trial_leaves_what_two_layouts_differ_by(place: int, factor: float) -> None:
    share, sigma = parts()
    tried = np.array([place])
    mean, spread, widened = conditioned(np.log(SECONDS), share, sigma, tried, np.log(SECONDS[tried] * factor))
    assert widened == 1.0 and mean == pytest.approx(np.log(SECONDS * factor), abs=1e-9)
    others = [i for i in range(len(LAYOUTS)) if i != place]
    stated = difference_sigma(share[:, others], share[:, [place]], sigma, deviations().floor)
    assert spread[others] == pytest.approx(stated, rel=1e-6) and spread[place] == pytest.approx(0.0, abs=1e-6)


def test_a_trial_is_expected_to_be_what_it_was() -> None:
    measured = {i: float(1.1 * SECONDS[i] * (1.05 if i % 2 else 0.97)) for i in (0, 3, 5, 7)}
    found = outlook(PROBLEM, LAYOUTS, measured)
    for i, seconds in measured.items():
        assert found.step_s[i] == pytest.approx(seconds) and found.gain[i] == found.chance[i] == 0.0


def test_layouts_of_a_kind_are_expected_to_err_alike() -> None:
    share, sigma = parts()
    distance = difference_sigma(share, share[:, [0]], sigma, 0.0)
    other = int(np.argmax(distance))
    alike = int(np.argmin(np.where(np.arange(len(LAYOUTS)) == 0, np.inf, distance)))
    measured = {0: float(SECONDS[0] * 1.1), other: float(SECONDS[other] * 0.95)}
    found = outlook(PROBLEM, LAYOUTS, measured)
    assert found.step_s[alike] / SECONDS[alike] > found.step_s[other] / SECONDS[other] * 1.02


def test_predictions_that_fail_are_believed_less() -> None:
    near = outlook(PROBLEM, LAYOUTS, {0: float(SECONDS[0])})
    far = outlook(PROBLEM, LAYOUTS, {0: float(1000 * SECONDS[0])})
    apart = outlook(PROBLEM, LAYOUTS, {0: float(SECONDS[0]), 1: float(1.6 * SECONDS[1])})
    assert near.widened == 1.0 < apart.widened <= WIDEST and near.widened < far.widened <= WIDEST
    assert (far.gain >= near.gain).all() and far.gain.max() > 0.02
    agreeing = outlook(PROBLEM, LAYOUTS, {i: float(1000 * SECONDS[i]) for i in range(8)})
    assert agreeing.widened < far.widened and agreeing.step_s == pytest.approx(1000 * SECONDS, rel=1e-6)


def test_an_error_beyond_all_factors_corrects_nothing() -> None:
    profile, verdict = corrected_profile(PROBLEM, LAYOUTS[:6], 3.0 * SECONDS[:6])
    assert profile is PROBLEM.profile and "nothing to correct" in verdict
    assert "all take 3 times as long as predicted, which no factor explains" in verdict


def test_what_differs_on_this_machine_is_corrected() -> None:
    problem = tiny.problem(load_model("olmoe-1b-7b"), "h100x8", batch=64, seq=1024)
    layouts = [plan.layout for plan in solve(problem, keep=24).plans]
    machine = changed(problem.profile, host=1.9)
    before, truth = (predictions(p, layouts)[0] for p in (problem, dataclasses.replace(problem, profile=machine)))
    picked = list(range(0, len(layouts), 3))
    rest = [i for i in range(len(layouts)) if i not in picked]
    profile, verdict = corrected_profile(problem, [layouts[i] for i in picked], truth[picked])
    after = predictions(dataclasses.replace(problem, profile=profile), layouts)[0]
    errors = [float(np.std(np.log(seconds[rest] / truth[rest]))) for seconds in (before, after)]
    assert verdict.startswith("corrected: layouts are off by") and profile.host > 1.3
    assert errors[1] < 0.6 * errors[0]
    found = outlook(problem, layouts, {i: float(truth[i]) for i in picked})
    assert found.corrected and float(np.std(np.log(found.step_s[rest] / truth[rest]))) < 0.6 * errors[0]


@given(st.floats(-0.5, 0.5), st.floats(0.01, 0.5))
def test_improvement_is_the_mean_of_what_is_gained(log_ratio: float, sigma: float) -> None:
    gain, chance = improvement(np.array([log_ratio]), np.array([sigma]))
    z = np.random.default_rng(3).standard_normal(200_000)
    ratio = np.exp(log_ratio + sigma * z)
    assert gain[0] == pytest.approx(np.maximum(1 - ratio, 0).mean(), abs=4e-3)
    assert chance[0] == pytest.approx((ratio < 1).mean(), abs=6e-3)


def test_improvement_by_hand() -> None:
    gain, chance = improvement(np.array([math.log(0.9), 0.0, math.log(1.1)]), np.array([0.0, 0.1, 0.0]))
    assert gain == pytest.approx([0.1, 0.5 - math.exp(0.005) * 0.4601722, 0.0], abs=1e-6)
    assert chance == pytest.approx([1.0, 0.5, 0.0])
