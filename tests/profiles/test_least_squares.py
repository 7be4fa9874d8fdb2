"""The optimiser against scipy, and its bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from moeplan.profiles.curve_fit import BLANK
from moeplan.profiles.curves import GemmCurve
from moeplan.profiles.least_squares import minimize
from tests.profiles.synthetic import cases_of


def gemm_problem(seed: int) -> tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Misses of a noisy GEMM table with gross outliers, with start and bounds."""
    random = np.random.default_rng(seed)
    truth = np.log([random.uniform(2e-6, 8e-6), random.uniform(2e14, 2e15), random.uniform(1e12, 6e12), random.uniform(1.2, 5)])
    m, n, k = np.array([list(s.values()) for s in cases_of("gemm", "bf16")]).T

    def seconds(x: Any) -> Any:
        return GemmCurve(
            **dict(zip(("launch_s", "flop_per_s", "bytes_per_s", "sharpness"), np.exp(x), strict=True)), **BLANK
        ).seconds(m, n, k)

    measured = np.log(seconds(truth)) + 0.05 * random.standard_normal(m.size)
    measured[random.choice(m.size, 3, replace=False)] += np.log(3.0)
    start = truth + np.array([0.7, 0.3, -0.5, 0.0])
    return (
        lambda x: np.log(seconds(x)) - measured,
        start,
        start - 3.0,
        np.minimum(start + 3.0, [np.inf, np.inf, np.inf, np.log(8)]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_scipy_finds_the_same_minimum(seed: int) -> None:
    misses, start, low, high = gemm_problem(seed)
    twin = least_squares(misses, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, xtol=1e-12, ftol=1e-12, gtol=1e-12)
    found = minimize(misses, start, low, high)

    def cost(x: Any) -> float:
        return float(0.01 * np.sum(np.sqrt(1 + (misses(x) / 0.1) ** 2) - 1))

    assert cost(twin.x) == pytest.approx(twin.cost)
    assert cost(found) <= twin.cost * (1 + 1e-6)
    assert np.exp(found[:2]) == pytest.approx(np.exp(twin.x[:2]), rel=1e-2)
    assert ((low <= found) & (found <= high)).all()


def test_a_bound_holds_what_wants_beyond_it() -> None:
    found = minimize(lambda x: np.array([x[0] - 5.0, x[1] - 1.0]), [0.0, 0.0], [-1.0, -1.0], [2.0, 2.0])
    assert found == pytest.approx([2.0, 1.0])
