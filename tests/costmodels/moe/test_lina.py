"""Gradients in pieces that yield to all-to-alls."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import AlphaBeta, MoeSize
from moeplan.costmodels.moe.lina import Lina, delay_s, pieces_of
from moeplan.costmodels.moe.two_stream import NO_IIO
from moeplan.costmodels.simulate import serial_s, simulate
from tests.costmodels.moe.vectors import QUICK, seconds

SIZE = MoeSize(token_bytes=0, slot_bytes=0, expert_flop=0, mp_ranks=1, esp_ranks=1, ep_ranks=1)
chunks = st.fixed_dictionaries(dict.fromkeys("DGESCRM", seconds))


def test_pieces():
    assert pieces_of(np.array([0.0, 1.0, 30e6, 30e6 + 1])).tolist() == [0, 1, 1, 2]
    assert pieces_of(10.0, 4.0) == 3
    assert delay_s(AlphaBeta(startup_s=1.0, unit_s=1e-6)) == 31.0 and delay_s(AlphaBeta(startup_s=1.0, unit_s=1.0), 4.0) == 5.0


def test_by_hand():
    # The gap of 5 s while the experts run takes the first piece of 4 s and the second, for which the way back waits 3 s.
    parts = {"D": 1.0, "E": 5.0, "C": 1.0, "R": 4.0}
    assert Lina(pieces=1).seconds(1, parts, SIZE) == 7.0
    assert Lina(pieces=2).seconds(1, parts, SIZE) == 10.0
    # The third comes last.
    assert Lina(pieces=3).seconds(1, parts, SIZE) == 14.0


def test_arrays():
    took = Lina(pieces=2).seconds(np.array([1, 2]), {"D": 1.0, "E": np.array([5.0, 2.5]), "C": 1.0, "R": 4.0}, SIZE)
    assert took.shape == (2,) and took[0] == 10.0
    assert np.ndim(Lina().seconds(1, {"D": 1.0, "E": 1.0, "C": 1.0}, SIZE)) == 0


@given(r=st.integers(1, 6), pieces=st.integers(0, 6), parts=chunks)
@QUICK
def test_between_two_streams_and_none(r, pieces, parts):
    schedule = Lina(pieces=pieces)
    took_s = schedule.seconds(r, parts, SIZE)
    together = {**parts, "R": pieces * parts["R"]}
    assert NO_IIO.seconds(r, {**together, "M": 0.0}, SIZE) <= took_s * (1 + 1e-9)
    assert took_s <= schedule.serial_seconds(r, parts, SIZE) * (1 + 1e-9)
    assert serial_s(schedule.graph(r, SIZE), parts) == pytest.approx(schedule.serial_seconds(r, parts, SIZE))
    if pieces == 0:
        assert took_s == pytest.approx(NO_IIO.seconds(r, together, SIZE))


@given(r=st.integers(1, 6), pieces=st.integers(1, 6), parts=chunks)
@QUICK
def test_an_exchange_waits_for_one_piece_at_most(r, pieces, parts):
    graph = Lina(pieces=pieces).graph(r, SIZE)
    events = {e.name: e for e in simulate(graph, parts).events}
    for task in graph.tasks:
        if task.priority is None and "inter" in task.on:
            ready_s = max((events[name].end_s for name in task.after), default=0.0)
            start_s = events[task.name].start_s
            sent = [e for e in events.values() if e.name[0] == "R" and e.end_s > ready_s and e.start_s < start_s]
            waited_s = sum(min(e.end_s, start_s) - max(e.start_s, ready_s) for e in sent)
            assert waited_s <= parts["R"] * (1 + 1e-9)
