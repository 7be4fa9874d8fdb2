"""Micro-batches through a block, and through several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize
from moeplan.costmodels.moe.flowmoe import FlowMoe, blocks
from moeplan.costmodels.moe.two_stream import PIPEMOE
from moeplan.costmodels.simulate import bound_s, makespan_s, serial_s, simulate
from moeplan.costmodels.tasks import parse_graph
from tests.costmodels.moe.vectors import LINES, QUICK, seconds

SIZE = MoeSize(token_bytes=0, slot_bytes=0, expert_flop=0, mp_ranks=1, esp_ranks=1, ep_ranks=1)
chunks = st.fixed_dictionaries(dict.fromkeys(["AT", *"DGESCM"], seconds))
few = st.integers(1, 5)


def test_by_hand():
    # Two micro-batches: attention to 2 and 4, there to 3 and 5, experts after all attention to 7 and 10, back to 8 and 11.
    parts = {"AT": 2.0, "D": 1.0, "E": 3.0, "C": 1.0, "R": 0.5}
    assert FlowMoe().seconds(2, parts, SIZE) == 11.5


@given(m=few, parts=chunks)
@QUICK
def test_one_block_either_way(m, parts):
    assert makespan_s(blocks(1, m, "forward"), parts) == pytest.approx(FlowMoe().seconds(m, parts, SIZE), rel=1e-9)
    back_s = FlowMoe().seconds(m, {**parts, "M": 0.0}, SIZE)
    assert makespan_s(blocks(1, m, "backward"), parts) == pytest.approx(back_s, rel=1e-9)
    assert simulate(blocks(1, m, "backward", 2), {**parts, "R": 1.0}).makespan_s == pytest.approx(back_s + 2.0, rel=1e-9)


def test_backward_names_what_it_mirrors():
    lines = {k: AlphaBeta(startup_s=float(i), unit_s=0.0) for i, k in enumerate(LINES, 1)}
    size = MoeSize(token_bytes=1, slot_bytes=1, expert_flop=1, mp_ranks=2, esp_ranks=2, ep_ranks=2)
    there, back = (FlowMoe().parts(size, Lines(**lines), 1, direction) for direction in ("forward", "backward"))
    assert (there["G"], there["S"], there["M"]) == (3.0, 4.0, 6.0) and (back["G"], back["S"], back["M"]) == (10.0, 3.0, 0.0)


@given(m=few, parts=chunks)
@QUICK
def test_without_attention_it_is_pipemoe(m, parts):
    alone = {**parts, "AT": 0.0, "M": 0.0}
    assert FlowMoe().seconds(m, alone, SIZE) == pytest.approx(PIPEMOE.seconds(m, alone, SIZE))


@given(m=few, count=few, parts=chunks, pieces=st.integers(1, 3), piece_s=seconds)
@QUICK
def test_several_blocks(m, count, parts, pieces, piece_s):
    parts["M"] = 0.0
    block_s = FlowMoe().seconds(m, parts, SIZE)
    for direction in ("forward", "backward"):
        graph = blocks(count, m, direction)
        took_s = makespan_s(graph, parts)
        assert parse_graph(str(graph)) == graph
        # Blocks overlap, but not more than their busiest resource and longest chain allow.
        assert bound_s(graph, parts) * (1 - 1e-12) <= took_s <= count * block_s * (1 + 1e-9)
    graph, both = blocks(count, m, "backward", pieces), {**parts, "R": piece_s}
    reduced_s = simulate(graph, both).makespan_s
    assert bound_s(graph, both) * (1 - 1e-12) <= reduced_s <= serial_s(graph, both) * (1 + 1e-9)


def test_gradients_fill_the_gaps_of_the_next_block():
    # While the experts of the second block run 5 s, the link is free for gradients of the first; those of the second follow.
    parts = {"AT": 1.0, "D": 1.0, "G": 0.0, "E": 5.0, "S": 0.0, "C": 1.0, "M": 0.0, "R": 2.0}
    timeline = simulate(blocks(2, 1, "backward", 2), parts)
    starts = {e.name: e.start_s for e in timeline.events}
    assert (starts["R1"], starts["R2"]) == (9.0, 11.0) and (starts["R3"], starts["R4"]) == (16.0, 18.0)
    assert timeline.makespan_s == 20.0
