"""Collectives: groups of ranks, times by hand with round rates, laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    group,
    reduce_scatter_s,
)
from moeplan.profiles.curves import CollectiveCurve
from tests.conftest import NODE, PLAIN, TWO_NODES

QUICK = settings(max_examples=60, deadline=None)
RINGS = [all_gather_s, reduce_scatter_s, all_reduce_s]
RING_RATE, ALL_TO_ALL_RATE, HOP_S = 0.89 * 50e9, 0.86 * 50e9, 1e-6
"""Of one NIC of 50 GB/s: ring collectives, all-to-all, and one small message; inside a domain a ring moves 100 GB/s."""

# Ranks and stride of a group in domains of 8: how many of its ranks share a domain.
GROUPS = [
    ((8, 1), 8), ((16, 1), 8), ((4, 2), 4), ((8, 2), 4), ((16, 4), 2), ((4, 8), 1), ((2, 16), 1), ((1, 1), 1), ((1, 64), 1),
    ((2, 4), 2), ((2, 1), 2), ((64, 1), 8),
]  # fmt: skip


def placed(ranks, stride, domain):
    """Ranks of the group of rank 0 that share its domain, counted one by one."""
    return sum(place * stride // domain == 0 for place in range(ranks))


@pytest.mark.parametrize("sizes, local", GROUPS)
def test_group(sizes, local):
    found = group(PLAIN, *sizes)
    assert (found.ranks, found.local, found.domains) == (sizes[0], local, sizes[0] / local)
    assert local == placed(*sizes, PLAIN.cluster.domain_gpus)


@given(rows=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16])), min_size=1, max_size=6))
@QUICK
def test_groups_of_powers_of_two(rows):
    ranks, stride = (np.array(c) for c in zip(*rows, strict=True))
    assert group(PLAIN, ranks, stride).local.tolist() == [placed(r, s, 8) for r, s in rows]


# ---------------------------------------------------------------- by hand


def test_inside_a_domain_by_hand():
    # 8 ranks at 100 GB/s: 7/8 of 1 GB in 8.75 ms; an all-reduce goes there and back.
    inside = group(PLAIN, 8, 1)
    assert all_gather_s(PLAIN, 1e9, inside) == pytest.approx(8.75e-3)
    assert reduce_scatter_s(PLAIN, 1e9, inside) == pytest.approx(8.75e-3)
    assert all_reduce_s(PLAIN, 1e9, inside) == pytest.approx(17.5e-3)


def test_a_ring_across_domains_by_hand():
    # 16 ranks in two domains: half of 1 GB crosses, through the 8 NICs of a domain: 62.5 MB each and one hop, which is
    # quicker than the ring inside (8.75 ms).
    across = group(PLAIN, 16, 1)
    assert 62.5e6 / RING_RATE + HOP_S < 8.75e-3
    assert all_gather_s(PLAIN, 1e9, across) == pytest.approx(8.75e-3)
    # One rank of each of two domains: half of it through one NIC, and no NVLink to wait for.
    assert reduce_scatter_s(PLAIN, 1e9, Group(ranks=2, local=1)) == pytest.approx(0.5e9 / RING_RATE + HOP_S)
    # Four ranks in each of two domains: 125 MB a NIC, against 3/4 of 1 GB inside.
    assert all_reduce_s(PLAIN, 1e9, Group(ranks=8, local=4)) == pytest.approx(2 * max(125e6 / RING_RATE + HOP_S, 7.5e-3))
    # 32 domains of one rank: 31/32 of it, and 31 hops.
    assert all_gather_s(PLAIN, 1e6, Group(ranks=32, local=1)) == pytest.approx(31 / 32 * 1e6 / RING_RATE + 31 * HOP_S)


def test_all_to_all_by_hand():
    # Every rank sends 70 MB over NVLink: with the tenth that stays at home a buffer of 80 MB among 8, 7/8 of it at 100 GB/s.
    inside = group(PLAIN, 8, 1)
    assert all_to_all_s(PLAIN, 0.0, 70e6, inside) == pytest.approx(0.7e-3)
    # Both links work at once: 100 MB through the NIC take longer than 70 MB inside.
    across = group(PLAIN, 16, 1)
    assert all_to_all_s(PLAIN, 100e6, 70e6, across) == pytest.approx(100e6 / ALL_TO_ALL_RATE + HOP_S)
    assert all_to_all_s(PLAIN, 1e6, 70e6, across) == pytest.approx(0.7e-3)
    assert all_to_all_s(PLAIN, 100e6, 0.0, Group(ranks=4, local=1)) == pytest.approx(100e6 / ALL_TO_ALL_RATE + 3 * HOP_S)


def test_a_group_that_was_measured_counts_as_measured():
    # All-gather, reduce-scatter and all-to-all of 16 ranks in two domains take 1 s a GB; other groups follow the law.
    curve = CollectiveCurve(
        times_s=(1e-9, 1e3), sizes_bytes=(1.0, 1e12), error=0.0, error_p90=0.0, samples=2, valid={}, source="measured"
    )
    ops = ("all_gather", "reduce_scatter", "all_to_all")
    measured = dataclasses.replace(PLAIN, multi_node={op: {"16/2": curve} for op in ops})
    there, other = group(PLAIN, 16, 1), Group(ranks=16, local=1)
    assert all_gather_s(measured, 1e9, there) == pytest.approx(1.0)
    assert all_reduce_s(measured, 1e9, there) == pytest.approx(2.0)  # not measured itself: there and back
    # 15 of 16 parts of 1.6 GB leave a rank, 8 of them by the network.
    assert all_to_all_s(measured, 0.8e9, 0.7e9, there) == pytest.approx(1.6)
    for cost in (all_gather_s, reduce_scatter_s, all_reduce_s):
        assert cost(measured, 1e9, other) == cost(PLAIN, 1e9, other)
        both = cost(measured, 1e9, Group(ranks=np.array([16, 16]), local=np.array([8, 1])))
        assert both.tolist() == [cost(measured, 1e9, there), cost(measured, 1e9, other)]


def test_measured_node_of_h100():
    # An all-gather of 512 MB among 8 H100 reaches 0.68 to 0.85 of the NVLink rate (450 GB/s) on the bus.
    inside = group(NODE, 8, 1)
    bus = 2**29 * 7 / 8 / all_gather_s(NODE, 2**29, inside)
    assert 0.68 < bus / 450e9 < 0.85
    # Between two such nodes the 8 NICs of 50 GB/s bound the same buffer.
    crossing = 2**29 / 2 / 8 / (RING_RATE) + 5e-6
    assert all_gather_s(TWO_NODES, 2**29, group(TWO_NODES, 16, 1)) == pytest.approx(
        max(crossing, float(all_gather_s(NODE, 2**29, inside))), rel=0.01
    )


# ---------------------------------------------------------------- laws


@given(
    size=st.floats(1, 1e11), more=st.floats(1, 100), ranks=st.sampled_from([1, 2, 4, 8, 16]), stride=st.sampled_from([1, 2, 8])
)
@pytest.mark.parametrize("profile", [PLAIN, TWO_NODES], ids=lambda p: p.name)
@QUICK
def test_more_bytes_take_no_less(profile, size, more, ranks, stride):
    where = group(profile, ranks, stride)
    for collective in RINGS:
        assert collective(profile, size * more, where) >= collective(profile, size, where) >= 0.0
    outside = size if where.domains > 1 else 0.0
    less = all_to_all_s(profile, outside, size, where)
    assert all_to_all_s(profile, outside * more, size, where) >= less
    assert all_to_all_s(profile, outside, size * more, where) >= less


@given(size=st.floats(1e3, 1e10), local=st.sampled_from([1, 2, 4, 8]), domains=st.sampled_from([1, 2, 4, 8]))
@QUICK
def test_more_domains_take_no_less(size, local, domains):
    near, far = Group(ranks=local * domains, local=local), Group(ranks=2 * local * domains, local=local)
    for collective in RINGS:
        assert collective(PLAIN, size, far) >= collective(PLAIN, size, near) * (1 - 1e-12)


@given(size=st.floats(1e3, 1e10), ranks=st.sampled_from([2, 4, 8, 16]), local=st.sampled_from([1, 2, 4, 8]))
@QUICK
def test_an_all_reduce_is_a_scatter_and_a_gather(size, ranks, local):
    where = Group(ranks=ranks, local=min(local, ranks))
    both = reduce_scatter_s(PLAIN, size, where) + all_gather_s(PLAIN, size, where)
    assert all_reduce_s(PLAIN, size, where) == pytest.approx(both)


def test_a_lone_rank_talks_to_nobody():
    for profile in (PLAIN, NODE):
        alone = group(profile, 1, 1)
        assert [float(collective(profile, 1e9, alone)) for collective in RINGS] == [0.0, 0.0, 0.0]
        assert float(all_to_all_s(profile, 0.0, 0.0, alone)) == 0.0


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16]), st.floats(1e3, 1e9), st.floats(0, 1e9)),
        min_size=1,
        max_size=6,
    )
)
@QUICK
def test_arrays_equal_numbers(rows):
    ranks, stride, up, out = (np.array(c) for c in zip(*rows, strict=True))
    where = group(TWO_NODES, ranks, stride)
    for collective in RINGS:
        together = collective(TWO_NODES, up, where)
        single = [float(collective(TWO_NODES, size, group(TWO_NODES, r, s))) for r, s, size, _ in rows]
        assert together.tolist() == pytest.approx(single, rel=1e-12)
    together = all_to_all_s(TWO_NODES, out, up, where)
    single = [float(all_to_all_s(TWO_NODES, far, size, group(TWO_NODES, r, s))) for r, s, size, far in rows]
    assert together.tolist() == pytest.approx(single, rel=1e-12)
