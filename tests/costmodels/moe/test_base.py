"""A fitted time, sizes, chains, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from moeplan.costmodels.moe.base import (
    AlphaBeta,
    Lines,
    MoeSize,
    chain,
    check_degree,
    check_groups,
    expert_line,
    imperfect_s,
    times,
    total,
)
from moeplan.errors import LayoutError, ScheduleError
from tests.costmodels.moe.vectors import LINES

LINE = AlphaBeta(startup_s=2.0, unit_s=0.5)
ALL = Lines(**dict.fromkeys(LINES, LINE))
SIZE = MoeSize(token_bytes=1, slot_bytes=1, expert_flop=1, mp_ranks=2, esp_ranks=4, ep_ranks=8)


def test_by_hand():
    assert LINE.time_s(10) == 7.0
    assert LINE.among_s(10, 1) == 0.0 and LINE.among_s(10, 2) == 7.0
    assert LINE.among_s(np.array([10, 10, 20]), np.array([1, 4, 4])).tolist() == [0.0, 7.0, 12.0]
    assert imperfect_s(10.0, 20.0, 0.3) == 13.0
    assert total({"D": 1.0, "E": 2.0, "R": 4.0}, "DRM") == 5.0 and total({}, "D") == 0.0


def test_an_expert_starts_each_of_its_gemms():
    # Three GEMMs of 10 FLOP each.
    assert expert_line(LINE, 3).time_s(30) == pytest.approx(3 * LINE.time_s(10))


def test_ranks_of_a_layer():
    assert SIZE.all_ranks == 32 and SIZE.closing_ranks == 2
    assert replace(SIZE, sequence_parallel=True).closing_ranks == 1


def test_times_of_a_chunk():
    amounts = {"D": 8.0, "E": 4.0, "M": 8.0, "G": 16.0}
    # Both gradients of the experts: alpha twice, the FLOP are counted twice already.
    assert times(amounts, SIZE, ALL, 4, "backward") == {"D": 3.0, "C": 3.0, "R": 0.0, "E": 4.5, "G": 4.0, "M": 6.0}
    assert times(amounts, SIZE, ALL, 4, "forward")["E"] == 2.5
    # One rank exchanges with itself, all 32 with each other.
    lone = replace(SIZE, ep_ranks=1)
    assert (
        times(amounts, lone, ALL, 1, "forward")["D"] == 0.0 and times(amounts, lone, ALL, 1, "forward", fused=True)["D"] == 6.0
    )
    assert times(amounts, SIZE, ALL, 1, "forward", mp_ranks=1)["M"] == 0.0


def test_chain():
    assert str(chain("D1@inter E1@compute C1@inter+intra")) == "D1@inter E1@compute<D1 C1@inter+intra<E1"


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("value, said", [(-1e-6, "is -1e-06 s"), (float("nan"), "is nan s"), (float("inf"), "is inf s")])
def test_constants_that_are_no_time(value, said):
    for bad in (value, np.array([1.0, value])):
        with pytest.raises(ScheduleError, match=f"the start-up of a fitted time {said}"):
            AlphaBeta(startup_s=bad, unit_s=0.0)
        with pytest.raises(ScheduleError, match=f"the slope of a fitted time {said}"):
            AlphaBeta(startup_s=0.0, unit_s=bad)


@pytest.mark.parametrize("value", [None, "3", [1.0, None]])
def test_missing_constants(value):
    with pytest.raises(ScheduleError, match="the slope of a fitted time is missing"):
        AlphaBeta(startup_s=0.0, unit_s=value)


@pytest.mark.parametrize("name", LINES)
def test_missing_lines(name):
    with pytest.raises(ScheduleError, match=f"the fitted time of '{name}' is missing"):
        Lines(**(dict.fromkeys(LINES, LINE) | {name: None}))


@pytest.mark.parametrize("name, value, said", [
    ("token_bytes", -1, "token_bytes of an MoE layer is -1 bytes"), ("expert_flop", np.nan, "layer is nan flop"),
    ("slot_bytes", np.array([1.0, np.inf]), "slot_bytes of an MoE layer is inf bytes"), ("ep_ranks", 0, "layer is 0 ranks"),
    ("mp_ranks", np.array([2, -4]), "mp_ranks of an MoE layer is -4"), ("esp_ranks", None, "esp_ranks .* is missing"),
])  # fmt: skip
def test_sizes_that_cannot_be(name, value, said):
    with pytest.raises(ScheduleError, match=said):
        replace(SIZE, **{name: value})


def test_groups():
    check_groups(32, mp=4, ep=8, esp=4)
    check_groups(6, mp=3, ep=6, esp=1)
    with pytest.raises(LayoutError, match=r"ep 4 x esp 4 = 16 ranks, but the MoE layer has 32 \(with esp 4, ep must be 8\)"):
        check_groups(32, mp=4, ep=4, esp=4)
    with pytest.raises(LayoutError, match="ep 4 x esp 3 = 12 ranks, but the MoE layer has 32 .esp must divide 32"):
        check_groups(32, mp=4, ep=4, esp=3)
    with pytest.raises(LayoutError, match=r"mp 4 does not divide the 6 ranks of the MoE layer \(use a divisor of 6, like 3\)"):
        check_groups(6, mp=4, ep=3, esp=2)
    with pytest.raises(LayoutError, match=r"use a divisor of 999999937, like 1\)"):  # a prime
        check_groups(999_999_937, mp=2, ep=999_999_937, esp=1)
    for bad in ({"mp": 0}, {"ep": -8, "esp": -4}, {"esp": 0}, {"mp": 0.5}):
        with pytest.raises(LayoutError, match="is not a number of ranks"):
            check_groups(**({"ranks": 32, "mp": 4, "ep": 8, "esp": 4} | bad))


def test_degrees():
    check_degree(8, 64)
    check_degree(np.array([1, 3]), np.array([7, 9]))
    check_degree((1, 2, 4, 8))
    with pytest.raises(
        ScheduleError, match=r"r = 8 chunks do not divide a capacity of 100 slots \(use r = 5, or pad the capacity to 104\)"
    ):
        check_degree(8, 100)
    with pytest.raises(ScheduleError, match="use r = 2, or pad the capacity to 1000000000000000002"):  # too large to factor
        check_degree(6, 10**18)
    with pytest.raises(ScheduleError, match="r = 3 chunks do not divide a capacity of 8 slots"):
        check_degree(np.array([1, 3]), 8)
    for bad in (0, -2, np.array([1, 0])):
        with pytest.raises(ScheduleError, match="the number of chunks r is (0|-2) chunks .give a finite number from 1"):
            check_degree(bad, 8)
    with pytest.raises(ScheduleError, match="r = 1.5 is not a number of chunks"):
        check_degree(1.5)
