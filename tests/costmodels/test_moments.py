"""Micro-batches in flight by chunk: by hand, against the schedule, and arrays against numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.moments import compositions, entered


def test_entered_by_hand() -> None:
    # Groups of three through two chunks: 0 0 0 1 1 1 and again.
    held = entered(3, 2, np.arange(9)).tolist()
    assert held == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [3, 3], [4, 3], [5, 3]]


def test_compositions_by_hand() -> None:
    # Four ranks of two chunks. Rank 0 has begun 11 forwards at its first backward; then one chunk fills as the other empties.
    # Backwards that have ended: 0, 4, 8, where backwards change chunks, and 1, 5, 9, where forwards do.
    assert compositions(4, 2, 11, 16).tolist() == [[7, 4], [8, 3], [7, 4], [8, 3], [7, 4], [8, 3]]
    # In a step of one round all forwards have begun before.
    assert compositions(4, 2, 11, 4).tolist() == [[4, 4]] * 6


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 8))
def test_every_composition_is_of_the_schedule(group: int, chunks: int, rounds: int) -> None:
    """Passes in order, as a set: every row occurs, and every moment's counts lie between two rows."""
    for passes in range(1, (chunks + 1) * group):
        total = group * rounds * chunks
        begun = min(passes, total)
        order = [c for _ in range(rounds) for c in range(chunks) for _ in range(group)]
        counts = np.bincount(order[:begun], minlength=chunks)
        seen = [counts.copy()]
        for done in range(total - begun):
            counts[order[begun + done]] += 1
            counts[chunks - 1 - order[done]] -= 1
            seen.append(counts.copy())
        rows = compositions(group, chunks, passes, group * rounds)
        occurring = {tuple(row) for row in seen}
        assert {tuple(row) for row in rows.tolist()} <= occurring and tuple(rows[0]) == tuple(seen[0])
        for weights in (*np.eye(chunks), np.arange(chunks), np.arange(chunks)[::-1], np.arange(chunks) % 2):
            assert (rows @ weights).max() == max(row @ weights for row in seen)


@given(
    st.integers(1, 6), st.integers(1, 5), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=5)
)
def test_arrays(group: int, chunks: int, rows: list[tuple[int, int]]) -> None:
    passes, batches = np.array(rows).T
    found = compositions(group, chunks, passes, group * batches)
    assert found.shape == (len(rows), 2 * chunks + 2, chunks)
    assert found.tolist() == [compositions(group, chunks, p, group * b).tolist() for p, b in rows]
