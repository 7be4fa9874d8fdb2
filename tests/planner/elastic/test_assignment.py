"""Assignments: against every permutation and against scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moeplan.planner.elastic.assignment import best_inside, best_outside

QUICK = settings(max_examples=80, deadline=None)


def best(gains):
    return gains[linear_sum_assignment(gains, maximize=True)].sum()


@QUICK
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 1000), st.integers(0, 2**32 - 1))
def test_small_ones_equal_the_best_permutation(size, count, values, seed):
    gains = np.random.default_rng(seed).integers(0, values, (count, size, size)).astype(float)
    columns = best_inside(gains)
    for one, chosen in zip(gains, columns, strict=True):
        assert sorted(chosen) == list(range(size))
        every = max(sum(one[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(size)))
        assert one[np.arange(size), chosen].sum() == every


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 10, 10**9]), st.integers(0, 2**32 - 1))
def test_large_ones_equal_scipy(rows, columns, values, seed):
    gains = np.random.default_rng(seed).integers(0, values, (rows, columns)).astype(float)
    chosen = best_outside(gains)
    placed = np.flatnonzero(chosen >= 0)
    assert len(placed) == min(rows, columns) == len(set(chosen[placed]))
    assert gains[placed, chosen[placed]].sum() == pytest.approx(best(gains), rel=1e-9)


@pytest.mark.parametrize("shape", [(300, 300), (300, 280), (280, 300)], ids=str)
def test_blocks_with_many_ties_equal_scipy(shape):
    rng = np.random.default_rng(3)
    row, column = (rng.integers(0, 5, n) for n in shape)
    gains = rng.integers(0, 4, (5, 5))[row][:, column] + (rng.random(shape) < 0.01) * rng.integers(1, 3, shape)
    chosen = best_outside(gains.astype(float))
    placed = np.flatnonzero(chosen >= 0)
    assert gains[placed, chosen[placed]].sum() == best(gains)


def test_matrices_in_step_do_not_touch_each_other():
    rng = np.random.default_rng(5)
    gains = rng.random((200, 6, 6))
    together = best_inside(gains)
    assert together.tolist() == [best_inside(one[None])[0].tolist() for one in gains]


def test_no_gain_at_all_places_everyone():
    assert sorted(best_outside(np.zeros((4, 4)))) == [0, 1, 2, 3]
    assert sorted(best_inside(np.zeros((1, 3, 3)))[0]) == [0, 1, 2]
