"""Routing: copies by hand, against simulated routing, laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.routing import (
    all_to_all_copies,
    deduplicated_copies,
    expected_group_limited_holders,
    expected_holders,
    expert_rows,
)

QUICK = settings(max_examples=60, deadline=None)
POWERS = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
TOPK = st.integers(1, 10)


@st.composite
def groups(draw):
    """Expert-parallel ranks, and how many of them share a domain."""
    ranks = draw(POWERS)
    return ranks, draw(st.sampled_from([p for p in (1, 2, 4, 8, 16, 32, 64) if p <= ranks]))


def counted(choices, ranks, local, home):
    """Copies over (network, NVLink) of one token of rank `home` that picked the ranks `choices`, moved hop by hop."""
    network = nvlink = 0
    for node in {c // local for c in choices}:
        holders = {c for c in choices if c // local == node}
        entry = node * local + home % local  # rails: a rank talks to the ranks of its own place in other nodes
        if node != home // local:
            network += 1
        nvlink += len(holders - {entry})
    return network, nvlink


def plainly_counted(choices, local, home):
    """The same for one copy a choice, sent directly."""
    network = sum(c // local != home // local for c in choices)
    return network, sum(c // local == home // local and c != home for c in choices)


# ---------------------------------------------------------------- by hand


def test_holders_by_hand():
    assert expected_holders(1, 8) == 1.0
    assert expected_holders(4, 1) == 1.0
    # Two coins on two sides: one side in half of the cases, both in the other.
    assert expected_holders(2, 2) == 1.5
    # 8 choices among 8: 8 (1 - (7/8)^8)
    assert expected_holders(8, 8) == pytest.approx(8 * (1 - 5764801 / 16777216))


def test_rows_by_hand():
    # 4,096 tokens to 8 experts each; two ranks that share an expert hold the rows of both; the fullest has 1.5 times the mean.
    assert expert_rows(4096, 8, 1) == 32768
    assert expert_rows(4096, 8, 2, 1.5) == 32768 * 2 * 1.5


def test_plain_copies_by_hand():
    # 8 copies spread over 32 ranks, of which 8 are near: 24/32 go far, 7/32 near, 1/32 stays.
    copies = all_to_all_copies(8, 32, 8)
    assert (copies.scale_out, copies.scale_up) == (6.0, 1.75)
    assert all_to_all_copies(8, 8, 8).scale_out == 0.0


def test_deduplicated_copies_by_hand():
    # One node of 8, top-8: 8 (1 - (7/8)^8) ranks are hit, of which 7/8 are others.
    inside = deduplicated_copies(8, 8, 8)
    assert inside.scale_out == 0.0
    assert inside.scale_up == pytest.approx(7 * (1 - (7 / 8) ** 8))
    # Ranks alone in their nodes: everything goes over the network, nothing over NVLink.
    alone = deduplicated_copies(2, 4, 1)
    assert alone.scale_out == pytest.approx(3 * (1 - (3 / 4) ** 2))
    assert alone.scale_up == 0.0


# ---------------------------------------------------------------- against simulated routing


@pytest.mark.parametrize("topk, ranks, local", [(1, 4, 2), (2, 4, 2), (3, 4, 2), (2, 4, 4), (3, 6, 2), (2, 8, 4), (4, 4, 1)])
def test_copies_against_every_routing(topk, ranks, local):
    every = list(itertools.product(range(ranks), repeat=topk))
    for home in (0, ranks - 1):
        network, nvlink = np.mean([counted(c, ranks, local, home) for c in every], axis=0)
        once = deduplicated_copies(topk, ranks, local)
        assert (once.scale_out, once.scale_up) == pytest.approx((network, nvlink))
        network, nvlink = np.mean([plainly_counted(c, local, home) for c in every], axis=0)
        plain = all_to_all_copies(topk, ranks, local)
        assert (plain.scale_out, plain.scale_up) == pytest.approx((network, nvlink))


@pytest.mark.parametrize("experts, topk, ranks, local", [(256, 8, 64, 8), (128, 8, 16, 8), (64, 6, 8, 8), (256, 8, 32, 4)])
def test_copies_against_random_routing_to_distinct_experts(experts, topk, ranks, local):
    # A router picks distinct experts; where every rank holds several, independent choices come within 2.5 %.
    random = np.random.default_rng(1)
    tokens = 2000
    picked = random.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :topk] // (experts // ranks)
    network, nvlink = np.mean([counted(set(c), ranks, local, i % ranks) for i, c in enumerate(picked.tolist())], axis=0)
    once = deduplicated_copies(topk, ranks, local)
    assert once.scale_out == pytest.approx(network, rel=0.025)
    assert once.scale_up == pytest.approx(nvlink, rel=0.025)


# ---------------------------------------------------------------- laws


@given(group=groups(), topk=TOPK)
@QUICK
def test_no_more_copies_than_holders_or_choices(group, topk):
    ranks, local = group
    once, plain = deduplicated_copies(topk, ranks, local), all_to_all_copies(topk, ranks, local)
    assert 0 <= once.scale_out <= min(plain.scale_out, ranks / local - 1) + 1e-12
    # Forwarding inside the nodes included, NVLink carries at most one copy for every rank but the own lane.
    assert 0 <= once.scale_up <= min(topk, ranks) * (1 - 1 / local) + 1e-12
    assert 0 <= plain.scale_up + plain.scale_out <= topk
    assert plain.scale_up + plain.scale_out == pytest.approx(topk * (1 - 1 / ranks))


@given(group=groups(), topk=TOPK)
@QUICK
def test_monotone_in_choices_and_ranks(group, topk):
    ranks, local = group
    for copies in (deduplicated_copies, all_to_all_copies):
        fewer, more = copies(topk, ranks, local), copies(topk + 1, ranks, local)
        assert fewer.scale_out <= more.scale_out and fewer.scale_up <= more.scale_up
        wider = copies(topk, 2 * ranks, local)
        assert wider.scale_out >= fewer.scale_out - 1e-12


@given(group=groups())
@QUICK
def test_one_choice_needs_no_deduplication(group):
    ranks, local = group
    once, plain = deduplicated_copies(1, ranks, local), all_to_all_copies(1, ranks, local)
    assert once.scale_out == pytest.approx(plain.scale_out)
    # A far copy crosses NVLink as well, but for those that land on the right rank.
    assert once.scale_up == pytest.approx(plain.scale_up + plain.scale_out * (1 - 1 / local))


@given(columns=st.lists(groups(), min_size=1, max_size=6), topk=TOPK)
@QUICK
def test_arrays_equal_numbers(columns, topk):
    ranks, local = (np.array(c) for c in zip(*columns, strict=True))
    for copies in (deduplicated_copies, all_to_all_copies):
        together = copies(topk, ranks, local)
        for i, (r, n) in enumerate(columns):
            one = copies(topk, r, n)
            assert together.scale_out[i] == pytest.approx(one.scale_out, rel=1e-12, abs=1e-300)
            assert together.scale_up[i] == pytest.approx(float(one.scale_up), rel=1e-12, abs=1e-300)
    assert expert_rows(np.array([1.0, 2.0]), 4, np.array([1, 2]), 1.5).tolist() == [6.0, 24.0]


# ---------------------------------------------------------------- routing limited to groups of experts


def test_group_limited_holders_by_hand():
    # One of two groups is drawn: a holder a group, one is reached; two holders a group and two choices, 1.5 of them.
    assert expected_group_limited_holders(2, 5, 2, 1) == pytest.approx(1.0)
    assert expected_group_limited_holders(4, 2, 2, 1) == pytest.approx(1.5)
    # Two of four groups on two holders: on the same one in 2 of 6 draws; else two choices miss one of them half of the time.
    assert expected_group_limited_holders(2, 2, 4, 2) == pytest.approx(2 / 6 * 1 + 4 / 6 * 1.5)


@given(holders=st.sampled_from([1, 2, 4, 8, 16, 32, 64]), topk=st.integers(1, 8))
@QUICK
def test_drawing_all_groups_is_no_limit(holders, topk):
    # Choices fall on independent groups either way.
    assert expected_group_limited_holders(holders, topk, 8, 8) == pytest.approx(expected_holders(holders, topk))


@given(holders=st.sampled_from([1, 2, 4, 8, 16, 32, 64]), topk=st.integers(1, 10), drawn=st.integers(1, 7))
@QUICK
def test_fewer_groups_reach_fewer_holders(holders, topk, drawn):
    some, more = (expected_group_limited_holders(holders, topk, 8, n) for n in (drawn, drawn + 1))
    assert 1 - 1e-12 <= some <= more + 1e-12 <= expected_holders(holders, topk) + 2e-12


@pytest.mark.parametrize("holders, drawn", [(4, 4), (8, 4), (32, 4), (2, 3), (16, 2)])
def test_group_limited_holders_against_simulated_routing(holders, drawn):
    random, experts, groups, topk = np.random.default_rng(1), 64, 8, 6
    found = []
    for _ in range(4000):
        chosen = random.choice(groups, drawn, replace=False)
        picks = chosen[random.integers(0, drawn, topk)] * (experts // groups) + random.integers(0, experts // groups, topk)
        found.append(len({int(p) * holders // experts for p in picks}))
    assert expected_group_limited_holders(holders, topk, groups, drawn) == pytest.approx(np.mean(found), rel=0.03)


def test_group_limits_reach_the_copies_and_arrays_equal_numbers():
    ranks, local = np.array([8, 16, 32, 64]), np.array([8, 8, 8, 8])
    free, limited = deduplicated_copies(8, ranks, local), deduplicated_copies(8, ranks, local, 8, 4)
    assert np.all(limited.scale_out <= free.scale_out) and limited.scale_out[-1] < 0.8 * free.scale_out[-1]
    for i in range(4):
        one = deduplicated_copies(8, int(ranks[i]), 8, 8, 4)
        assert (one.scale_out, one.scale_up) == pytest.approx((limited.scale_out[i], limited.scale_up[i]))
