"""Samples of a step, and who takes which."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime.elastic_data import micro_batches, sample_ids, sequences


def test_by_hand():
    ids = np.arange(12)
    assert micro_batches(ids, 2, 1, 3).tolist() == [[3, 4, 5], [9, 10, 11]]
    assert micro_batches(ids, 3, 0, 2).tolist() == [[0, 1], [6, 7]]


@given(dp=st.integers(1, 6), micro_batch=st.integers(1, 4), micros=st.integers(1, 5), consumed=st.integers(0, 500))
def test_replicas_share_a_step_without_gap_or_overlap(dp, micro_batch, micros, consumed):
    ids = sample_ids(consumed, dp * micro_batch * micros, 100, seed=3)
    parts = [micro_batches(ids, dp, replica, micro_batch) for replica in range(dp)]
    assert {part.shape for part in parts} == {(micros, micro_batch)}
    assert sorted(np.concatenate([part.ravel() for part in parts])) == sorted(ids)


@given(batches=st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_the_order_does_not_depend_on_the_steps(batches):
    total, parts = 0, []
    for batch in batches:
        parts.append(sample_ids(total, batch, 50, seed=3))
        total += batch
    whole = sample_ids(0, total, 50, seed=3)
    assert np.array_equal(np.concatenate(parts), whole)
    for epoch in range(total // 50):
        assert sorted(whole[50 * epoch : 50 * (epoch + 1)]) == list(range(50))


def test_epochs_and_seeds_differ():
    first, second = sample_ids(0, 50, 50, 3), sample_ids(50, 50, 50, 3)
    assert not np.array_equal(first, second) and not np.array_equal(first, sample_ids(0, 50, 50, 4))


def test_sequences_are_functions_of_their_numbers():
    rows = sequences(np.array([7, 3]), 6, 64, 1)
    assert np.array_equal(rows[1], sequences(np.array([3]), 6, 64, 1)[0])
    steps = np.diff(rows, axis=1) % 64
    assert (steps == steps[:, :1]).all() and rows.min() >= 0 and rows.max() < 64
