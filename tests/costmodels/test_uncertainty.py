"""Uncertainty: which spread applies, its edges, arrays."""

import numpy as np
import pytest

from moeplan.costmodels.uncertainty import interval, regime
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.profile import nominal
from tests.conftest import NODE, PLAIN, TINY_DENSE, TINY_LATENT, TINY_MOE

# Model, profile, regime; a profile that says nothing of origins was measured on its own cluster.
SCALED = nominal(load_cluster("h800x8"))
REGIMES = [
    (TINY_DENSE, NODE, "dense"),
    (TINY_DENSE, PLAIN, "dense"),
    (TINY_DENSE, SCALED, "dense, scaled device"),
    (TINY_MOE, NODE, "moe"),
    (TINY_LATENT, SCALED, "moe, scaled device"),
]


@pytest.mark.parametrize("model, profile, name", REGIMES, ids=[f"{m.name} {n}" for m, _, n in REGIMES])
def test_regime_and_interval(model, profile, name):
    assert regime(model, profile) == name
    low, high = interval(model, profile, 2.0)
    # Two releases of the same software differ by about 5 %: an interval narrower than that claims too much.
    assert 0.5 < low / 2.0 < high / 2.0 < 2.0
    assert high / low > 1.05


def test_arrays_equal_numbers():
    times = np.array([0.1, 1.0, 7.0])
    low, high = interval(TINY_MOE, NODE, times)
    assert low.tolist() == [interval(TINY_MOE, NODE, t)[0] for t in times]
    assert high.tolist() == [interval(TINY_MOE, NODE, t)[1] for t in times]
