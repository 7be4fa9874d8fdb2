"""Algorithms of an all-to-all: traffic by counting messages, times by hand, the best one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.exchanges import (
    ALGORITHMS,
    LinkLines,
    best_exchange,
    direct_traffic,
    exchange_times,
    leader_traffic,
    one_level_s,
    pipelined_s,
    split_flat_s,
    two_level_s,
    two_level_traffic,
)
from tests.costmodels.moe.vectors import QUICK, fits

LINKS = LinkLines(
    flat=AlphaBeta(startup_s=10.0, unit_s=1.0),
    intra=AlphaBeta(startup_s=1.0, unit_s=0.1),
    inter=AlphaBeta(startup_s=4.0, unit_s=1.0),
    leader=AlphaBeta(startup_s=3.0, unit_s=0.25),
)
links_of = st.builds(LinkLines, flat=fits, intra=fits, inter=fits, leader=fits)
groups = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))


def counted(messages, node_ranks):
    """Messages and bytes of the busiest sender, inside a node and between nodes, from (sender, receiver, bytes)."""
    sent = {}
    for sender, receiver, size in messages:
        if sender != receiver:
            link = sender // node_ranks != receiver // node_ranks
            count, total = sent.get((sender, link), (0, 0.0))
            sent[sender, link] = (count + 1, total + size)
    ranks = {sender for sender, _ in sent}
    return [max((sent.get((rank, link), (0, 0.0)) for rank in ranks), default=(0, 0.0)) for link in (False, True)]


@pytest.mark.parametrize("nodes, g", [(1, 1), (1, 4), (4, 1), (2, 2), (3, 4), (4, 8)])
def test_traffic_is_what_ranks_send(nodes, g):
    p, x = nodes * g, 24.0
    pairs = [(a, b) for a in range(p) for b in range(p)]
    direct = [(a, b, x / p) for a, b in pairs]
    # To the leader, the first rank of a node; leaders exchange; from the leader, g - 1 buffers each way.
    leaders = [(a, a - a % g, x) for a in range(p)] + [(a - a % g, a, x) for a in range(p)]
    leaders += [(a, b, g * x / nodes) for a, b in pairs if a % g == b % g == 0]
    inside = [(a, b, x / g) for a, b in pairs if a // g == b // g]
    two_level = inside + [(a, b, x / nodes) for a, b in pairs if a % g == b % g]
    for traffic, messages in ((direct_traffic, direct), (two_level_traffic, two_level)):
        sent = traffic(x, p, g)
        (near, near_bytes), (far, far_bytes) = counted(messages, g)
        assert (sent.intra_messages, sent.inter_messages) == (near, far)
        assert (sent.intra_bytes, sent.inter_bytes) == pytest.approx((near_bytes, far_bytes))
    sent = leader_traffic(x, p, g)
    (_, _), (far, far_bytes) = counted(leaders, g)
    # The leader sends and receives g - 1 buffers.
    passed = [size for a, b, size in leaders if a != b and 0 in (a, b) and a // g == b // g]
    assert (sent.intra_messages, sent.intra_bytes) == (len(passed), pytest.approx(sum(passed)))
    assert (sent.inter_messages, sent.inter_bytes) == (far, pytest.approx(far_bytes))


def test_times_by_hand():
    # 16 bytes on each of 2 nodes of 4 ranks.
    assert split_flat_s(16.0, 8, 4, LINKS) == 4.0 + 8.0
    assert one_level_s(16.0, 8, 4, LINKS) == pytest.approx(2 * (1.0 + 4.8) + 3.0 + 8.0)
    assert two_level_s(16.0, 8, 4, LINKS) == pytest.approx(1.0 + 1.2 + 4.0 + 8.0)
    assert pipelined_s(16.0, 8, 4, LINKS) == 12.0
    assert exchange_times(16.0, 8, 4, LINKS).tolist() == pytest.approx([26.0, 22.6, 14.2, 12.0])
    assert best_exchange(16.0, 8, 4, LINKS) == (ALGORITHMS.index("pipe-a2a"), 12.0)


def test_one_node_and_one_rank():
    assert (
        split_flat_s(16.0, 4, 4, LINKS)
        == pytest.approx(2.2)
        == two_level_s(16.0, 4, 4, LINKS)
        == pipelined_s(16.0, 4, 4, LINKS)
    )
    assert exchange_times(16.0, 1, 1, LINKS).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert two_level_s(16.0, 4, 1, LINKS) == 4.0 + 12.0 == pipelined_s(16.0, 4, 1, LINKS)


@given(x=st.floats(1, 1e9), group=groups, links=links_of)
@QUICK
def test_both_links_at_once_take_no_more_than_one_after_the_other(x, group, links):
    nodes, g = group
    assert (
        split_flat_s(x, nodes * g, g, links)
        <= pipelined_s(x, nodes * g, g, links)
        <= two_level_s(x, nodes * g, g, links) * (1 + 1e-12)
    )


@given(rows=st.lists(st.tuples(st.floats(1, 1e9), groups), min_size=1, max_size=5), links=links_of)
@QUICK
def test_arrays_equal_numbers(rows, links):
    x, nodes, g = (np.array(v) for v in zip(*((x, *group) for x, group in rows), strict=True))
    index, took = best_exchange(x, nodes * g, g, links)
    for i, (one, (n, inside)) in enumerate(rows):
        times = exchange_times(one, n * inside, inside, links)
        assert took[i] == pytest.approx(times.min()) and times[index[i]] == pytest.approx(times.min())
        assert split_flat_s(x, nodes * g, g, links)[i] == pytest.approx(split_flat_s(one, n * inside, inside, links))
