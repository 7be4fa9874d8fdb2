"""State that moves and state that is lost: against elements counted one by one, published shapes and laws."""

import itertools
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import LayoutError, ProblemError
from moeplan.planner.elastic.holdings import holdings
from moeplan.planner.elastic.movement import (
    SLOWNESS,
    fewest_holders,
    instances_needed,
    least_move_seconds,
    lost_bytes,
    move_seconds,
    movement,
)
from moeplan.profiles.hardware import load_cluster
from tests.conftest import workload_of
from tests.planner.elastic import elements

WORKLOAD = workload_of()
SAMPLE = 14


def layout_of(tp=1, cp=1, dp=1, ep=1, etp=1, **more):
    return Layout(tp=tp, cp=cp, dp=dp, ep=ep, etp=etp, edp=tp * cp * dp // (ep * etp), **more)


def hold(model, layout, instances=1, node=4):
    return holdings(model, WORKLOAD, layout, instances=instances, node_gpus=node)


def some_layouts(model, count=SAMPLE):
    every = elements.layouts(model)
    chosen = np.random.default_rng(len(model.name)).choice(len(every), count, replace=False)
    return [every[i] for i in sorted(chosen)]


# ---------------------------------------------------------------- element by element


@pytest.mark.parametrize("model", elements.MODELS, ids=lambda m: m.name)
def test_moved_bytes_equal_elements_for_all_pairs(model):
    cases = some_layouts(model)
    counted = [elements.held(model, *case) for case in cases]
    ours = [hold(model, *case) for case in cases]
    for a, b in itertools.product(range(len(cases)), repeat=2):
        need, moved = elements.moved(counted[a], counted[b], 4)
        found = movement(ours[a], ours[b])
        assert found.need_bytes == pytest.approx(need), (cases[a], cases[b])
        assert found.moved_bytes == pytest.approx(moved, abs=0.5), (cases[a], cases[b])
        if a == b:
            assert found.moved_bytes == found.received_bytes == 0.0


@pytest.mark.parametrize("model", elements.MODELS, ids=lambda m: m.name)
def test_every_rank_holds_as_many_elements(model):
    for case in some_layouts(model, 40):
        has, size = elements.held(model, *case)
        assert hold(model, *case).rank_bytes() == pytest.approx(has @ size), case


@pytest.mark.parametrize("model", elements.MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("node", [2, 4])
def test_lost_bytes_equal_elements_for_every_set_of_dead_nodes(model, node):
    for case in some_layouts(model):
        counted, ours = elements.held(model, *case), hold(model, *case, node=node)
        survives = []
        for failures in range(ours.nodes + 1):
            losses = [(elements.lost(counted, node, s), s) for s in itertools.combinations(range(ours.nodes), failures)]
            for loss, dead in losses:
                assert lost_bytes(ours, dead) == pytest.approx(loss), (case, dead)
            survives.append(not any(loss for loss, _ in losses))
        assert fewest_holders(ours) == survives.index(False)


@pytest.mark.parametrize("model", [elements.TIED, elements.PREDICTING], ids=lambda m: m.name)
def test_moved_bytes_with_dead_nodes_equal_elements(model):
    cases = some_layouts(model, 6)
    counts = {case: elements.held(model, *case) for case in cases}
    for one, other in itertools.permutations(cases, 2):
        ours = hold(model, *one, node=2), hold(model, *other, node=2)
        for dead in ((0,), (1,), tuple(range(1, ours[0].nodes))):
            need, moved = elements.moved(counts[one], counts[other], 2, dead)
            found = movement(*ours, alive=[n not in dead for n in range(ours[0].nodes)])
            assert (found.need_bytes, found.moved_bytes) == (pytest.approx(need), pytest.approx(moved, abs=0.5))


@pytest.mark.parametrize("model", [elements.TIED, elements.PREDICTING], ids=lambda m: m.name)
def test_the_placement_is_the_best_of_all_permutations(model):
    node = 2
    every = [case for case in elements.layouts(model, (4, 6)) if case[0].tp <= node]
    cases = every[:: len(every) // 7]
    counts = {case: elements.held(model, *case) for case in cases}
    for one, other in itertools.product(cases, repeat=2):
        pairs = elements.gains(counts[one], counts[other])
        old, new = hold(model, *one, node=node), hold(model, *other, node=node)
        # A new node on each old one or on a fresh one, its two ranks either way round.
        hosts = [*range(old.nodes), *[-1] * new.nodes]
        best = 0.0
        for chosen in set(itertools.permutations(hosts, new.nodes)):
            gain = 0.0
            for guest, host in enumerate(chosen):
                if host >= 0:
                    block = pairs[2 * host : 2 * host + 2, 2 * guest : 2 * guest + 2]
                    gain += max(np.trace(block), np.trace(block[::-1]))
            best = max(best, gain)
        found = movement(old, new)
        assert found.need_bytes - found.moved_bytes == pytest.approx(best)
        # What the placement says is what was counted, and nodes stay whole.
        kept = sum(pairs[place, rank] for rank, place in enumerate(found.placement) if place >= 0)
        assert kept == pytest.approx(best)
        taken = [p for p in found.placement.tolist() if p >= 0]
        assert len(taken) == len(set(taken))
        for first in range(0, new.world, node):
            assert len({p // node for p in found.placement[first : first + node].tolist() if p >= 0}) <= 1


# ---------------------------------------------------------------- Mixtral on 64 GPUs

MIXTRAL = load_model("mixtral-8x7b")
BASE = layout_of(tp=2, pp=4, dp=8, ep=8)
THREE = layout_of(tp=2, pp=3, dp=8, ep=8, stages="Et*11|t*11|t*10L")
# New layout, replicas, dead node; GB needed, moved and lost, and the seconds of nodes with 400 GB/s.
ROWS = [
    ("pp 8", layout_of(tp=2, pp=8, dp=8, ep=8), 1, None, 766.6, 379.6, 0.0, 0.12),
    ("pp 3", THREE, 1, None, 766.6, 237.3, 0.0, 0.15),
    ("pp 2", layout_of(tp=2, pp=2, dp=8, ep=8), 1, None, 766.6, 379.6, 0.0, 0.24),
    ("dp 16", layout_of(tp=2, pp=4, dp=16, ep=8), 1, None, 972.7, 493.6, 0.0, 0.15),
    ("tp 4, dp 4", layout_of(tp=4, pp=4, dp=4, ep=8), 1, None, 753.8, 23.3, 0.0, 0.01),
    ("ep 4", layout_of(tp=2, pp=4, dp=8, ep=4), 1, None, 946.9, 478.3, 0.0, 0.15),
    ("a node dies", THREE, 1, 1, 766.6, 298.4, 70.5, 0.24),
    ("a node dies, two replicas", THREE, 2, 1, 1327.0, 516.9, 0.0, 0.42),
]


@pytest.mark.parametrize("name, layout, instances, dead, need, moved, lost, seconds", ROWS, ids=[r[0] for r in ROWS])
def test_transitions_of_mixtral(name, layout, instances, dead, need, moved, lost, seconds):
    old, new = (hold(MIXTRAL, x, instances, node=8) for x in (BASE, layout))
    found = movement(old, new, alive=[node != dead for node in range(old.nodes)])
    in_bytes = found.need_bytes, found.moved_bytes, lost_bytes(old, [] if dead is None else [dead])
    # The rows are rounded to two digits first, then to one: 766.549 is 766.55 is 766.6.
    assert [float(Decimal(f"{x / 1e9:.2f}").quantize(Decimal("0.1"), ROUND_HALF_UP)) for x in in_bytes] == [need, moved, lost]
    cluster = load_cluster("h100x64")
    assert least_move_seconds(found, cluster) == pytest.approx(seconds, abs=0.0051)
    assert move_seconds(found, cluster) == pytest.approx(SLOWNESS * least_move_seconds(found, cluster))


def test_more_pipeline_stages_move_half_of_what_is_needed_but_for_the_ends():
    found = movement(hold(MIXTRAL, BASE, node=8), hold(MIXTRAL, layout_of(tp=2, pp=8, dp=8, ep=8), node=8))
    # The nodes that stay keep the embedding and the head, 28 bytes for each of 32000 * 4096 elements.
    ends = 2 * 32000 * 4096 * 28
    assert found.moved_bytes == pytest.approx((found.need_bytes - ends) / 2, rel=1e-4)


def test_need_is_that_of_the_new_layout_alone():
    layouts = [BASE, THREE, layout_of(tp=4, pp=4, dp=4, ep=8)]
    held = [hold(MIXTRAL, layout, node=8) for layout in layouts]
    for new in held:
        assert len({movement(old, new).need_bytes for old in held}) == 1


def test_fewer_survivors_never_move_less():
    old, new = hold(MIXTRAL, BASE, node=8), hold(MIXTRAL, THREE, node=8)
    moved = [movement(old, new, alive=[n >= dead for n in range(8)]).moved_bytes for dead in range(9)]
    assert moved == sorted(moved)
    assert moved[-1] == pytest.approx(movement(old, new).need_bytes)


# ---------------------------------------------------------------- replicas


def test_replicas_that_survive_failures():
    assert instances_needed(MIXTRAL, WORKLOAD, BASE, 0, 8) == 1
    assert instances_needed(MIXTRAL, WORKLOAD, BASE, 1, 8) == 2
    assert instances_needed(MIXTRAL, WORKLOAD, BASE, 2, 8) is None  # the experts have two replicas
    # One replica on each of four nodes survives three of them.
    wide = layout_of(tp=8, dp=4, pp=2)
    assert [instances_needed(elements.DENSE, WORKLOAD, wide, f, 8) for f in range(5)] == [1, 2, 4, 4, None]
    # Replicas beside each other on a node are none.
    assert instances_needed(elements.DENSE, WORKLOAD, layout_of(dp=8), 1, 8) is None
    # Without sharding every rank has everything.
    assert instances_needed(elements.DENSE, WORKLOAD, layout_of(dp=16, sharding="ddp"), 1, 8) == 1


@pytest.mark.parametrize("model", [elements.DENSE, elements.TIED], ids=lambda m: m.name)
def test_the_fewest_replicas_equal_all_failures_tried(model):
    for layout, _ in elements.layouts(model, (8,))[::9]:
        for failures in (1, 2):
            enough = []
            for instances in range(1, 9):
                try:
                    ours = hold(model, layout, instances, node=2)
                except LayoutError:
                    continue
                sets = itertools.combinations(range(ours.nodes), failures)
                if not any(lost_bytes(ours, dead) for dead in sets):
                    enough.append(instances)
            assert instances_needed(model, WORKLOAD, layout, failures, 2) == (enough[0] if enough else None)


# ---------------------------------------------------------------- refusals and size


def test_what_does_not_go_together_is_refused():
    one = hold(elements.DENSE, layout_of(dp=4))
    with pytest.raises(ProblemError, match=r"'elements-dense' cannot become state of 'elements-tied'"):
        movement(one, hold(elements.TIED, layout_of(dp=4)))
    with pytest.raises(ProblemError, match=r"nodes of 4 GPUs cannot become nodes of 2"):
        movement(one, hold(elements.DENSE, layout_of(dp=4), node=2))
    with pytest.raises(ProblemError, match=r"2 nodes are alive or dead, the layout has 1"):
        movement(one, one, alive=[True, False])


def test_sixteen_thousand_ranks_equal_scipy_and_stay_within_nodes():
    from scipy.optimize import linear_sum_assignment

    from moeplan.planner.elastic.overlap import node_gains

    model = load_model("deepseek-v3")
    old = hold(model, layout_of(pp=16, dp=1024, ep=64), node=8)
    new = hold(model, layout_of(tp=2, pp=8, dp=960, ep=32), node=8)
    found, gains = movement(old, new), node_gains(old, new)
    best = gains[linear_sum_assignment(gains, maximize=True)].sum()
    assert found.need_bytes - found.moved_bytes == pytest.approx(best, rel=1e-9)
    assert len(set(found.placement.tolist())) == new.world == 15360
    assert (found.placement.reshape(-1, 8) // 8 == found.placement[::8, None] // 8).all()
