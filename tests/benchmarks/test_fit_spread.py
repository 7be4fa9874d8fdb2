"""The fit of the error bars: it finds again what made-up errors were drawn from."""

import numpy as np
import pytest

from benchmarks import fit_spread
from benchmarks.fit_spread import BEGIN, END, KINDS, Runs
from moeplan.costmodels.uncertainty import Z_80

COUNT = 4000
PLACE = KINDS.index("expert GEMM")


def runs_of(error: np.ndarray, shares: np.ndarray, regime: str = "dense") -> Runs:
    return Runs(
        results=(),
        error=error,
        shares=shares,
        curves=np.zeros_like(shares),
        regime=np.array([regime] * len(error)),
        weight=np.ones(len(error)),
    )


def drawn(common: float, expert: float) -> Runs:
    """Runs whose errors are as stated, with between none and all of the step in expert GEMM."""
    chance = np.random.default_rng(1)
    shares = np.zeros((COUNT, len(KINDS)))
    shares[:, PLACE] = chance.uniform(0, 1, COUNT)
    return runs_of(chance.normal(0, np.hypot(common, expert * shares[:, PLACE])), shares)


def test_deviations_are_found_again() -> None:
    runs = drawn(common=0.06, expert=0.3)
    found = fit_spread.deviations(runs, runs.error, np.ones(COUNT, np.bool_))
    # Student's t judges normal errors a tenth wider than they are; the scale of a regime makes up for it.
    assert found[[0, 1 + PLACE]] == pytest.approx([1.12 * 0.06, 1.12 * 0.3], rel=0.1)
    other = KINDS.index("permute")
    assert found[1 + other] == pytest.approx(fit_spread.STATED["permute"], rel=0.01)  # no run has any: it stays as stated


def test_a_refit_finds_a_factor_and_leaves_the_rest() -> None:
    chance = np.random.default_rng(2)
    slope = chance.uniform(0, 1, (COUNT, 2))
    error = slope @ np.array([0.2, 0.0]) + chance.normal(0, 0.02, COUNT)
    np.testing.assert_allclose(fit_spread.refit(error, slope, np.array([0.3, 0.3]), np.ones(COUNT)), [0.2, 0.0], atol=0.01)


def test_a_bias_needs_models_on_one_side() -> None:
    owner = np.arange(20)
    assert fit_spread._bias(np.linspace(-0.1, 0.1, 20), owner) == 0.0
    assert fit_spread._bias(0.2 + np.linspace(-0.1, 0.1, 20), owner) == pytest.approx(0.2)
    assert fit_spread._bias(0.2 + np.linspace(-0.1, 0.1, 5), np.arange(5)) == 0.0


def test_scales_hold_four_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runs, "column", lambda self, key: np.arange(len(self.error)))
    runs, everyone = drawn(common=0.06, expert=0.3), np.ones(COUNT, np.bool_)
    found = fit_spread.deviations(runs, runs.error, everyone)
    held = fit_spread.regimes(runs, runs.error, found, everyone)
    assert 0.78 < fit_spread.inside(runs, runs.error, found, held).mean() < 0.82
    assert held["moe"].runs == 0 and held["moe"].scale == held["dense"].scale and len(held) == 8


def test_the_floor_holds_four_of_five_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    error = np.random.default_rng(3).normal(0, 0.05, COUNT)
    places = np.arange(COUNT // 2)
    monkeypatch.setattr(fit_spread, "pairs", lambda runs: (2 * places, 2 * places + 1))
    least, count = fit_spread.floor(runs_of(error, np.zeros((COUNT, len(KINDS)))), np.zeros(1 + len(KINDS)))
    assert count == COUNT // 2 and least == pytest.approx(0.05 * np.sqrt(2), rel=0.05)
    assert np.mean(np.abs(error[::2] - error[1::2]) < Z_80 * least) == pytest.approx(0.8, abs=0.01)


def test_tables_go_between_their_marks() -> None:
    once = fit_spread.page(f"before\n{BEGIN}\nold\n{END}\nafter\n", "| new |")
    assert once == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    assert fit_spread.page(once, "| new |") == once
