"""Shared experts beside dispatch and combine."""

from dataclasses import replace

import pytest
from hypothesis import given

from moeplan.costmodels.moe.base import MoeSize
from moeplan.costmodels.moe.hierarchical import Hierarchical
from moeplan.costmodels.moe.shared_experts import SharedOverlap
from tests.costmodels.moe.vectors import QUICK, all_lines, sizes

SIZE = MoeSize(
    token_bytes=0, slot_bytes=0, expert_flop=0, mp_ranks=2, esp_ranks=1, ep_ranks=1, shared_up_flop=8.0, shared_down_flop=4.0
)


def test_by_hand():
    # 3 s of first products hide 1 s of dispatch, 2 s of the last are hidden by 6 s of combine.
    assert SharedOverlap().seconds(1, {"D": 0.5, "G": 0.5, "X": 3.0, "E": 5.0, "S": 2.0, "C": 4.0, "Y": 2.0}, SIZE) == 14.0


def test_backward_begins_with_the_last_products():
    there, back = (SharedOverlap().amounts(SIZE, direction) for direction in ("forward", "backward"))
    assert (there["X"], there["Y"]) == (4.0, 2.0) and (back["X"], back["Y"]) == (4.0, 8.0)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_beside_is_between_nothing_and_before(size, lines):
    for direction in ("forward", "backward"):
        parts = SharedOverlap().parts(size, lines, 1, direction)
        took_s = SharedOverlap().seconds(1, parts, size)
        alone_s = Hierarchical().seconds(1, Hierarchical().parts(size, lines, 1, direction), size)
        assert alone_s * (1 - 1e-12) <= took_s <= (alone_s + parts["X"] + parts["Y"]) * (1 + 1e-12)
        none = replace(size, shared_up_flop=0.0, shared_down_flop=0.0)
        assert SharedOverlap().seconds(1, SharedOverlap().parts(none, lines, 1, direction), none) == pytest.approx(alone_s)
