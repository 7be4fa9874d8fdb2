"""Robust least squares: by hand, against a minimiser, and what it does with a row that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from moeplan.planner.robust import robust_change, shared_votes


def test_one_factor_by_hand() -> None:
    # Errors far below the scale: plain least squares with a prior, d = -(w s e / scale^2) / (w s^2 / scale^2 + 1 / spread^2).
    error, slope = np.array([1e-6, 1e-6]), np.ones((2, 1))
    found = robust_change(error, slope, np.ones(2), scale=0.1, spread=np.array([0.2]))
    assert found == pytest.approx([-(2 * 1e-6 / 0.01) / (2 / 0.01 + 1 / 0.04)])


def test_without_rows_that_speak_the_prior_holds() -> None:
    assert robust_change(
        np.array([0.3]), np.zeros((1, 2)), np.ones(1), scale=0.1, spread=np.array([0.1, 0.2]), pull=[0.5, -1.0]
    ) == (pytest.approx([0.5, -1.0]))


def test_against_a_minimiser() -> None:
    random = np.random.default_rng(3)
    error, slopes, weights = random.normal(0, 0.2, 40), random.uniform(0, 1, (40, 3)), random.uniform(0.3, 1, 40)
    spread, pull = np.array([0.1, 0.2, 0.4]), np.array([0.05, -0.1, 0.0])

    def objective(change: Any) -> float:
        left = (error + slopes @ change) / 0.06
        return float(2 * weights @ (np.sqrt(1 + left**2) - 1) + (((change - pull) / spread) ** 2).sum())

    found = robust_change(error, slopes, weights, scale=0.06, spread=spread, pull=pull)
    assert found == pytest.approx(minimize(objective, np.zeros(3), tol=1e-12).x, abs=1e-4)


def test_a_wrong_row_hardly_bends_the_rest() -> None:
    slope, spread = np.ones((21, 1)), np.array([10.0])
    error = np.r_[np.full(20, -0.1), 3.0]
    found = robust_change(error, slope, np.ones(21), scale=0.05, spread=spread)
    assert found == pytest.approx([0.1], abs=0.01) and -error.mean() < 0.0


def test_votes() -> None:
    assert shared_votes(["a", "b", "a", "a", "a"]) == pytest.approx([0.5, 1.0, 0.5, 0.5, 0.5])
