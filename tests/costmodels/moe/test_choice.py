"""The quickest schedule of a layer against a search of all."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe import choice
from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize, imperfect_s
from moeplan.costmodels.moe.choice import CANDIDATES, best_choice, best_degree, schedule_s
from moeplan.costmodels.moe.fsmoe import DEGREES, FsMoe
from moeplan.costmodels.moe.s1 import S1
from moeplan.costmodels.moe.schedules import SCHEDULES, find_schedule
from moeplan.costmodels.simulate import makespan_s, serial_s
from moeplan.errors import ScheduleError
from tests.costmodels.moe.vectors import FREE, LINES, QUICK, all_lines, sizes, stacked

DIRECTIONS = st.sampled_from(["forward", "backward"])


@given(
    rows=st.lists(sizes(), min_size=1, max_size=4), lines=all_lines, direction=DIRECTIONS,
    kappa=st.sampled_from([0.0, 0.3]), gradient_s=st.floats(0, 0.1),
)  # fmt: skip
@QUICK
def test_it_is_the_least_of_all(rows, lines, direction, kappa, gradient_s):
    index, degree, took_s = best_choice(stacked(rows), lines, direction, kappa=kappa, gradient_s=gradient_s)
    assert index.shape == degree.shape == took_s.shape == (len(rows),)
    for i, size in enumerate(rows):
        found = {}
        for n, schedule in enumerate(CANDIDATES):
            whole = {**schedule.parts(size, lines, 1, direction), "R": gradient_s}
            alone_s = serial_s(schedule.graph(1, size), whole)
            for r in DEGREES if schedule.chunked else (1,):
                parts = {**schedule.parts(size, lines, r, direction), "R": gradient_s}
                found[n, r] = imperfect_s(makespan_s(schedule.graph(r, size), parts), alone_s, kappa)
        assert took_s[i] == pytest.approx(min(found.values())) == pytest.approx(found[index[i], degree[i]])


@given(size=sizes(), lines=all_lines, direction=DIRECTIONS)
@QUICK
def test_the_best_degree_is_the_best(size, lines, direction):
    sizes_ = replace(size, slot_bytes=size.slot_bytes * np.array([0.1, 1.0, 10.0]), expert_flop=size.expert_flop)
    degree, took_s = best_degree(FsMoe(), sizes_, lines, direction, degrees=range(1, 9))
    for r in range(1, 9):
        other = schedule_s(FsMoe(), sizes_, lines, r, direction)
        assert (took_s <= other).all() and (took_s[degree == r] == other[degree == r]).all()


@given(size=sizes(), lines=all_lines, direction=DIRECTIONS, gradient_s=st.floats(0, 0.1), r=st.integers(1, 9))
@QUICK
def test_without_overlap_chunks_do_not_matter(size, lines, direction, gradient_s, r):
    for schedule in SCHEDULES:
        once_s, often_s = (schedule_s(schedule, size, lines, n, direction, kappa=1.0, gradient_s=gradient_s) for n in (1, r))
        assert often_s == pytest.approx(once_s, rel=1e-9)
    layouts = [schedule_s(find_schedule(name), size, lines, r, direction, kappa=1.0) for name in ("fsmoe", "hierarchical")]
    assert layouts[0] == pytest.approx(layouts[1])


def test_ties_go_to_the_first():
    free = Lines(**dict.fromkeys(LINES, FREE))
    size = MoeSize(token_bytes=1, slot_bytes=1, expert_flop=1, mp_ranks=2, esp_ranks=2, ep_ranks=2)
    assert best_choice(size, free, "forward", (S1(), FsMoe()), (2, 4)) == (0, 1, 0.0)
    assert best_choice(size, free, "forward", (FsMoe(), S1()), (4, 2)) == (0, 4, 0.0)


def test_every_schedule_can_be_asked():
    lines = Lines(**dict.fromkeys(LINES, AlphaBeta(startup_s=1e-5, unit_s=1e-9)))
    size = MoeSize(token_bytes=1e6, slot_bytes=2e6, expert_flop=1e6, mp_ranks=2, esp_ranks=2, ep_ranks=np.array([2, 4]))
    index, degree, took_s = best_choice(size, lines, "backward", SCHEDULES, gradient_s=1e-3)
    assert (
        took_s.shape == (2,) and (took_s > 1e-3).all() and set(degree.tolist()) <= set(DEGREES) and index.max() < len(SCHEDULES)
    )


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    gradient_s = rng.uniform(0, 1e-3, 3)
    tokens = rng.uniform(1e3, 1e7, (5, 3))
    line = AlphaBeta(startup_s=1e-5, unit_s=rng.uniform(1e-10, 1e-9, (5, 1)))
    lines = Lines(**dict.fromkeys(LINES, line))
    size = MoeSize(
        token_bytes=tokens,
        slot_bytes=2 * tokens,
        expert_flop=1e6,
        mp_ranks=2,
        esp_ranks=np.array([1, 2, 4]),
        ep_ranks=np.array([[2]]),
    )
    whole = best_choice(size, lines, "backward", kappa=0.3, gradient_s=gradient_s)
    monkeypatch.setattr(choice, "BLOCK", 4)
    for one, other in zip(whole, best_choice(size, lines, "backward", kappa=0.3, gradient_s=gradient_s), strict=True):
        assert one.shape == (5, 3) and (one == other).all()


def test_arrays_that_no_schedule_reads_still_give_the_shape():
    line = AlphaBeta(startup_s=1e-5, unit_s=1e-9)
    lines = Lines(**(dict.fromkeys(LINES, line) | {"reduce": AlphaBeta(startup_s=np.array([1e-5, 2e-5]), unit_s=1e-9)}))
    size = MoeSize(token_bytes=1e6, slot_bytes=2e6, expert_flop=1e6, mp_ranks=2, esp_ranks=2, ep_ranks=4)
    _, _, took_s = best_choice(size, lines, "forward", (S1(),))
    assert took_s.shape == (2,) and took_s[0] == took_s[1] > 0


def test_degrees_below_one():
    size = MoeSize(token_bytes=1, slot_bytes=1, expert_flop=1, mp_ranks=2, esp_ranks=2, ep_ranks=2)
    with pytest.raises(ScheduleError, match="the number of chunks r is 0 chunks"):
        best_choice(size, Lines(**dict.fromkeys(LINES, FREE)), "forward", degrees=(1, 0))
