"""MoE layers under schedules of their own: against plain, against the event loop, and against trying everything."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.exchange import expert_exchange_s
from moeplan.costmodels.kernels import dense_times
from moeplan.costmodels.layer import fold, launch_s, layer_time, routed_launches
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.moe.fsmoe import three_streams
from moeplan.costmodels.moe.two_stream import two_streams
from moeplan.costmodels.moe_choice import DEGREES
from moeplan.costmodels.scheduled import RoutedLayer, exposed, makespans, resolved, shared_gain_s
from moeplan.costmodels.simulate import serial_s, simulate
from moeplan.costmodels.tasks import parse_graph
from tests.conftest import MOE, MOE_LAYER, PLAIN, TINY_MOE, TWO_NODES, layouts_of, workload_of

QUICK = settings(max_examples=30, deadline=None)
BIG = dataclasses.replace(MOE, width=2048, shared_width=1024)
"""Experts that take about as long as their exchange."""


def layer(*layouts, block=MOE, profile=PLAIN):
    return RoutedLayer(block, TINY_MOE, profile, workload_of(seq_len=4096), Layouts.of(layouts))


def over_nodes(**fields):
    """A layout whose experts are spread over both nodes of sixteen ranks."""
    return Layout(**{"dp": 16, "ep": 16, "edp": 1, "dispatcher": "alltoall"} | fields)


def kinds(chunk, experts):
    names = dict(zip("DGESC", (chunk.exchange_s, chunk.gather_s, experts, chunk.scatter_s, chunk.exchange_s), strict=True))
    return {kind: float(np.broadcast_to(seconds, 1)[0]) for kind, seconds in names.items()}


# ---------------------------------------------------------------- on paper


def test_parts_of_a_chunk_on_paper():
    # 4096 tokens, two experts each, 256 bytes a row; 15 / 16 of all rows leave, 8 / 16 of them to the other node.
    whole = layer(over_nodes()).chunk(1)
    rows = 4096 * 2 * 256.0
    out = 0.5 * rows / PLAIN.all_to_all_bytes_per_s + 1e-6
    assert whole.exchange_s[0] == pytest.approx(max(out, 7 / 16 * rows / 100e9))
    assert whole.across[0] and whole.gather_s[0] == whole.scatter_s[0] == 0.0
    half = layer(over_nodes()).chunk(2)
    assert half.exchange_s[0] == pytest.approx((out - 1e-6) / 2 + 1e-6)
    assert half.forward_s[0] == pytest.approx(whole.forward_s[0] / 2)


def test_fused_exchange_sends_a_row_to_every_shard():
    two = layer(over_nodes(ep=8, etp=2)).chunk(1)
    rows = 4096 * 2 * 2 * 256.0
    assert two.fused_s[0] == pytest.approx(0.5 * rows / PLAIN.all_to_all_bytes_per_s + 1e-6)
    # The plain way sends half of that over the network, and gathers and scatters the rest inside the node.
    assert two.exchange_s[0] == pytest.approx(0.25 * rows / PLAIN.all_to_all_bytes_per_s + 1e-6)
    assert two.gather_s[0] == two.scatter_s[0] == pytest.approx(rows / 2 / 100e9)


def test_shared_experts_hide_the_exchange_beside_them():
    question = layer(over_nodes(), block=BIG, profile=TWO_NODES)
    times = dense_times(BIG, question.model, TWO_NODES, question.workload, question.layouts)
    one_way = float(expert_exchange_s(BIG, question.model, TWO_NODES, question.workload, question.layouts)[0]) / 2
    for gain, shared, first in zip(shared_gain_s(question), (times.forward, times.backward), (2 / 3, 1 / 3), strict=True):
        all_of_it = float(sum(shared.values())[0])
        hidden = min(first * all_of_it, one_way) + min((1 - first) * all_of_it, one_way)
        assert gain[0] == pytest.approx(hidden * (1 - TWO_NODES.overlap_loss))
        assert 0 < gain[0] < 2 * one_way


# ---------------------------------------------------------------- against the event loop


@pytest.mark.parametrize("count", (1, 2, 3, 8))
@pytest.mark.parametrize("shards", (1, 2, 8))
@pytest.mark.parametrize("kappa", (0.0, 0.33, 1.0))
def test_makespans_are_those_of_the_event_loop(count, shards, kappa):
    question = layer(over_nodes(ep=16 // shards, etp=shards), block=BIG, profile=TWO_NODES)
    chunk, one = question.chunk(count), question.chunk(1)
    across = bool(np.broadcast_to(chunk.across, 1)[0])
    for name, graph in (
        ("fsmoe", three_streams(count) if across else parse_graph(two_streams(count))),
        ("tutel", parse_graph(two_streams(count))),
    ):
        ways = ((chunk.forward_s, one.forward_s), (chunk.backward_s, one.backward_s))
        for took, (experts, undivided) in zip(makespans(name, chunk, one, kappa), ways, strict=True):
            seconds, alone = ({**kinds(c, e), "M": 0.0, "R": 0.0} for c, e in ((chunk, experts), (one, undivided)))
            overlapped = simulate(graph, seconds).makespan_s
            serial = max(serial_s(three_streams(1), alone), overlapped)
            assert float(np.broadcast_to(took, 1)[0]) == pytest.approx(overlapped + kappa * (serial - overlapped), rel=1e-12)


# ---------------------------------------------------------------- laws


@given(row=layouts_of(TINY_MOE, ep_overlap=False, shared_overlap=False, moe_schedule=""))
@QUICK
def test_single_chunks_are_the_plain_schedule(row):
    if row.dispatcher == "allgather":
        row = dataclasses.replace(row, dispatcher="alltoall")
    rows = Layouts.of(
        [row, dataclasses.replace(row, moe_schedule="fsmoe 1/1"), dataclasses.replace(row, moe_schedule="tutel 1/1")]
    )
    plain, fsmoe, tutel = sum(layer_time(MOE_LAYER, TINY_MOE, TWO_NODES, workload_of(), rows).values()).tolist()
    assert [fsmoe, tutel] == pytest.approx([plain, plain], rel=1e-12)


@given(row=layouts_of(TINY_MOE, dispatcher="alltoall"), kappa=st.floats(0, 1))
@QUICK
def test_the_best_is_what_trying_everything_finds(row, kappa):
    profile = dataclasses.replace(TWO_NODES, overlap_loss=kappa)
    texts = [f"{name} {f}/{b}" for name in ("fsmoe", "tutel") for f, b in itertools.product(DEGREES, DEGREES)]
    base = dataclasses.replace(row, ep_overlap=False, shared_overlap=False, recompute=())
    rows = [dataclasses.replace(base, moe_schedule=text) for text in ("best", "comet", "s1", *texts)]
    best, ideal, *tried = sum(layer_time(MOE_LAYER, TINY_MOE, profile, workload_of(), Layouts.of(rows)).values()).tolist()
    assert best == pytest.approx(min(tried), rel=1e-9)
    assert ideal <= best * (1 + 1e-9)


@given(row=layouts_of(TINY_MOE, dispatcher="alltoall", ep_overlap=False, shared_overlap=False, moe_schedule=""))
@QUICK
def test_what_is_resolved_is_what_was_chosen(row):
    folded = fold(Layouts.of([row]))
    workload = workload_of()
    question = RoutedLayer(MOE, TINY_MOE, TWO_NODES, workload, folded)
    host = launch_s(TWO_NODES, workload) * routed_launches(MOE, workload, folded)
    choice = resolved(question, host)
    rows = Layouts.of([dataclasses.replace(row, moe_schedule=text) for text in (str(choice), "best")])
    named, best = (np.broadcast_to(v, 2) for v in _exposed(rows, host))
    assert named == pytest.approx(best, rel=1e-12, abs=1e-18)


def _exposed(rows, host):
    found = exposed(RoutedLayer(MOE, TINY_MOE, TWO_NODES, workload_of(), fold(rows)), 0.0, 0.0, np.repeat(host, 2))
    return zip(*((v[0], v[1]) for v in (found.forward_s, found.backward_s)), strict=True)


def test_nothing_is_gained_where_nothing_overlaps():
    serial = dataclasses.replace(TWO_NODES, overlap_loss=1.0)
    question = layer(over_nodes(), block=BIG, profile=serial)
    whole = question.chunk(1)
    for count in DEGREES:
        firsts = makespans("fsmoe", whole, whole, 1.0)
        for took, first in zip(makespans("fsmoe", question.chunk(count), whole, 1.0), firsts, strict=True):
            assert took[0] >= first[0] * (1 - 1e-12)
    assert all(gain[0] == 0.0 for gain in shared_gain_s(question))


def test_each_kind_of_block_has_its_own_choice():
    narrow = dataclasses.replace(MOE, width=128)
    model = dataclasses.replace(
        TINY_MOE, layers=(MOE_LAYER, dataclasses.replace(MOE_LAYER, blocks=(*MOE_LAYER.blocks[:-1], narrow)))
    )
    rows = Layouts.of([over_nodes(moe_schedule=text) for text in ("fsmoe 1/1; fsmoe 4/8", "fsmoe 1/1", "fsmoe 4/8")])
    both, ones, more = (
        [layer_time(kind, model, TWO_NODES, workload_of(), rows)["expert all-to-all"][i] for kind in model.layers]
        for i in range(3)
    )
    assert both == [ones[0], more[1]] and ones[0] != more[0]
