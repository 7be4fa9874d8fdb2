"""Arithmetic of rows: parts, chunks and phases hold every slot once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.placement import Placement
from moeplan.runtime.rows import Traffic, before, copied, copies, cut, inverse, phases, ranges, routing

FEW = settings(max_examples=60, deadline=None)


def test_parts_by_hand():
    assert [cut(7, 3, i) for i in range(3)] == [(0, 2), (2, 2), (4, 3)]
    start, size = cut(np.array([4, 1, 0]), 2, 1)
    assert start.tolist() == [2, 0, 0] and size.tolist() == [2, 1, 0]


@given(count=st.integers(0, 50), parts=st.integers(1, 9))
@FEW
def test_parts_follow_each_other_and_differ_by_one(count, parts):
    found = [cut(count, parts, i) for i in range(parts)]
    assert [start for start, _ in found] == before([size for _, size in found]).tolist()
    assert sum(size for _, size in found) == count
    assert max(size for _, size in found) - min(size for _, size in found) <= 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=6))
@FEW
def test_ranges(given_ranges):
    expected = [start + i for start, size in given_ranges for i in range(size)]
    assert ranges([a for a, _ in given_ranges], [b for _, b in given_ranges]).tolist() == expected


def test_inverse():
    order = np.array([3, 0, 2])
    assert inverse(order, 5)[order].tolist() == [0, 1, 2] and inverse(order, 5)[1] == 0


@given(send=st.lists(st.integers(0, 5), min_size=1, max_size=4), shards=st.integers(1, 4))
@FEW
def test_every_slot_is_copied_for_every_shard(send, shards):
    rows, places = copied(np.array(send), shards), copies(np.array(send), shards)
    assert len(rows) == shards * sum(send)
    assert rows[places].tolist() == [list(range(sum(send)))] * shards


PLACEMENTS = [(2, 2, 2), (2, 2, 1), (2, 2, 4), (4, 1, 2), (1, 4, 2), (2, 4, 2), (4, 2, 8), (1, 1, 1)]


@st.composite
def routed(draw, split):
    """A placement, choices of all its ranks, and the routing of each."""
    ep, esp, mp = draw(st.sampled_from(PLACEMENTS))
    placement = Placement(ep=ep, esp=esp, mp=mp)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    experts, topk = 8, draw(st.integers(1, 3))
    groups = [
        np.argsort(rng.random((rng.integers(0, 9), experts)), axis=1)[:, :topk].astype(np.int64)
        for _ in range(placement.ranks // mp)
    ]
    ids = [groups[q // mp] for q in range(placement.ranks)]
    if split == "tokens":
        ids = [each[slice(*np.cumsum(cut(len(each), mp, q % mp)))] for q, each in enumerate(ids)]
    made = []
    for q in range(placement.ranks):
        shards = list(range(q // esp * esp, q // esp * esp + esp))
        made.append(routing(split, ids, experts, placement, q, shards))
    return placement, ids, made


@pytest.mark.parametrize("split", ["tokens", "slots", "none"])
@given(data=st.data(), degree=st.integers(1, 4))
@FEW
def test_every_slot_is_sent_and_found_again(split, data, degree):
    placement, ids, made = data.draw(routed(split))
    for q, plan in enumerate(made):
        assert all((plan.counts == other.counts).all() for other in made)
        assert plan.counts[q].sum() == len(plan.order) == len(set(plan.order.tolist()))
        traffic = Traffic(plan, placement, q, degree)
        assert sorted(traffic.order.tolist()) == list(range(len(plan.order)))
        if split == "slots":
            group = sorted(np.concatenate(plan.shares).tolist())
            assert group == list(range(ids[q].size)) and sorted(plan.held.tolist()) == group
        else:
            # Its own slots come back in the order of its tokens.
            own = plan.order[plan.held] - (0 if split == "tokens" else q % placement.esp * plan.padded * ids[q].shape[1])
            assert own.tolist() == list(range(ids[q].size))


@given(data=st.data(), degree=st.integers(1, 4))
@FEW
def test_chunks_hold_every_row_of_the_experts_once(data, degree):
    placement, _, made = data.draw(routed("tokens"))
    for q, plan in enumerate(made):
        traffic, named, rows = Traffic(plan, placement, q, degree), [], 0
        for i, chunk in enumerate(traffic.chunks):
            arrived = int(chunk.arrive.sum())
            found = traffic.grouped(i, np.arange(placement.ranks), before(chunk.arrive), arrived)
            assert found.back[found.pick].tolist() == list(range(arrived)) and found.sizes.sum() == arrived
            named += found.names.tolist()
            rows += arrived
        assert sorted(named) == list(range(rows))


@given(data=st.data())
@FEW
def test_phases_send_every_partial_sum_once(data):
    placement, _, made = data.draw(routed("slots"))
    traffics = [Traffic(plan, placement, q, 1) for q, plan in enumerate(made)]
    found = [phases(traffic) for traffic in traffics]
    for q, mine in enumerate(found):
        assert len(mine) == placement.ranks
        arrived = int(traffics[q].chunks[0].arrive.sum())
        assert sorted(np.concatenate([phase.order for phase in mine]).tolist()) == list(range(arrived))
        member = q % placement.mp
        slots = np.concatenate([phase.at[member] for phase in mine])
        assert sorted(slots.tolist()) == list(range(len(made[q].order)))
        for i, phase in enumerate(mine):
            # What one sends the other receives, from all shards of one place.
            assert phase.receive.tolist() == [int(found[p][i].send[q]) for p in range(placement.ranks)]
            assert phase.receive.sum() == placement.esp * len(phase.at[member])
            assert len({int(p) // placement.esp for p in phase.receive.nonzero()[0]}) <= 1


def test_without_shards_a_phase_is_an_exchange_at_a_distance():
    placement = Placement(ep=4, esp=1, mp=1)
    ids = [np.arange(8).reshape(4, 2) for _ in range(4)]
    for q in range(4):
        mine = phases(Traffic(routing("slots", ids, 8, placement, q, [q]), placement, q, 1))
        assert [phase.send.nonzero()[0].tolist() for phase in mine] == [[(q + d) % 4] for d in range(4)]
        assert [phase.receive.nonzero()[0].tolist() for phase in mine] == [[(q - d) % 4] for d in range(4)]
