"""The fullest rank: closed forms against drawn loads, and their limits."""

import numpy as np
import pytest

from moeplan.costmodels.imbalance import EXPERT_DEVIATION, fullest_in_memory, fullest_in_time

TAILS = ((0.5, 0.0), (0.1, 1.2816), (0.01, 2.3263))


def drawn(ranks: int, experts: int, layers: int, draws: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Loads of the fullest rank in time and in memory, [draws] each: gamma distributed, shares of a layer's whole."""
    shape = EXPERT_DEVIATION**-2
    load = np.random.default_rng(0).gamma(shape, 1.0, (draws, layers, ranks, experts))
    of_rank = load.mean(axis=3) / load.mean(axis=(2, 3))[:, :, None]
    return of_rank.max(axis=2).mean(axis=1), of_rank.mean(axis=1).max(axis=1)


@pytest.mark.parametrize(
    ("ranks", "experts", "layers"), [(2, 4, 3), (8, 8, 1), (8, 1, 4), (16, 16, 4), (64, 4, 20), (128, 1, 8)]
)
def test_quantiles_are_those_of_drawn_loads(ranks: int, experts: int, layers: int) -> None:
    time, kept = drawn(ranks, experts, layers)
    for tail, z in TAILS:
        assert fullest_in_time(ranks, experts, layers, z) == pytest.approx(np.quantile(time, 1 - tail), rel=0.025)
        # an upper end: hardly ever below, and not far above
        assert -0.01 < fullest_in_memory(ranks, experts, layers, tail) - np.quantile(kept, 1 - tail) < 0.02


def test_the_stated_deviation_gives_what_was_published() -> None:
    time, _ = drawn(64, 1, 1, 20000)
    assert 1.52 < time.mean() < 1.72


def test_limits() -> None:
    assert fullest_in_time(1, 8, 4, 2.0) == fullest_in_memory(1, 8, 4, 0.01) == 1.0
    assert fullest_in_time(8, 1e9, 4, 0.0) == pytest.approx(1.0, abs=1e-4)
    assert fullest_in_time(8, 1, 1, 0.0, deviation=0.0) == 1.0


def test_arrays_are_numbers_one_by_one() -> None:
    ranks, experts = np.array([1, 2, 8, 64]), np.array([64, 32, 8, 1])
    time, kept = fullest_in_time(ranks, experts, 4, 1.0), fullest_in_memory(ranks, experts, 4, 0.1)
    pairs = list(zip(ranks.tolist(), experts.tolist(), strict=True))
    np.testing.assert_allclose(time, [fullest_in_time(r, e, 4, 1.0) for r, e in pairs])
    np.testing.assert_allclose(kept, [fullest_in_memory(r, e, 4, 0.1) for r, e in pairs])
    assert (np.diff(time) > 0).all() and (np.diff(kept) > 0).all()
