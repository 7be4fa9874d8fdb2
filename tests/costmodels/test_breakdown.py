"""Breakdown: parts sum to the total, numbers and arrays alike."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.breakdown import Breakdown

BYTES = Breakdown(unit="bytes", parts={"weights": 6.0, "states/dense": 1.0, "states/expert": 3.0, "logits": 0.0})
PARTS = st.dictionaries(st.text(st.sampled_from("abc/"), min_size=1), st.floats(0, 1e15), min_size=1, max_size=6)


def test_by_hand():
    assert BYTES.total == 10.0
    assert BYTES["states/expert"] == 3.0
    assert BYTES["states/"] == 1.0 + 3.0
    assert list(BYTES) == [("weights", 6.0), ("states/dense", 1.0), ("states/expert", 3.0), ("logits", 0.0)]
    assert BYTES.shares() == {"weights": 0.6, "states/dense": 0.1, "states/expert": 0.3, "logits": 0.0}
    assert list(BYTES.nonzero().parts) == ["weights", "states/dense", "states/expert"]


def test_an_unknown_part_is_an_error_but_an_empty_group_is_nothing():
    with pytest.raises(KeyError):
        BYTES["states"]
    assert BYTES["layers/"] == 0


def test_a_group_is_what_stands_before_the_slash():
    cost = Breakdown(unit="seconds", parts={"head/loss": 1.0, "prediction/head/loss": 2.0, "head": 4.0})
    assert cost["head/"] == 1.0
    assert cost["prediction/"] == 2.0


def test_arrays_and_numbers_mix():
    cost = Breakdown(unit="seconds", parts={"layers": np.array([[1.0, 2.0], [3.0, 4.0]]), "overhead": 0.5})
    assert cost.total.tolist() == [[1.5, 2.5], [3.5, 4.5]]
    row = Breakdown(unit="seconds", parts={"layers": np.array([1.0, 2.0]), "overhead": 0.5})
    assert row.at(1) == Breakdown(unit="seconds", parts={"layers": 2.0, "overhead": 0.5})
    assert all(type(value) is float for _, value in row.at(0))


def test_nothing_costs_nothing():
    free = Breakdown(unit="seconds", parts={"layers": 0.0})
    assert free.total == 0.0
    assert free.shares() == {"layers": 0.0}
    assert Breakdown(unit="seconds", parts={}).total == 0


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BYTES.unit = "seconds"


@given(parts=PARTS)
@settings(max_examples=60, deadline=None)
def test_laws(parts):
    cost = Breakdown(unit="bytes", parts=parts)
    assert cost.total == pytest.approx(sum(cost[name] for name in parts if not name.endswith("/")) + _slashed(parts))
    assert cost.nonzero().total == pytest.approx(cost.total)
    if cost.total > 1e-300:
        assert sum(cost.shares().values()) == pytest.approx(1.0)


def _slashed(parts):
    return sum(value for name, value in parts.items() if name.endswith("/"))


@given(columns=st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_arrays_equal_numbers(columns):
    first, second = (np.array(c) for c in zip(*columns, strict=True))
    together = Breakdown(unit="seconds", parts={"a": first, "b": second})
    for i, (a, b) in enumerate(columns):
        assert together.at(i).parts == {"a": a, "b": b}
        assert together.total[i] == together.at(i).total == a + b
