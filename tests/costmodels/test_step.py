"""Step time: head, sends, data parallelism by hand with round rates; the pipeline against a simulated schedule; laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.collectives import Group
from moeplan.costmodels.counts import flops_per_token
from moeplan.costmodels.layer import layer_time
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import rank_parameters, unit_parameters
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import all_ranks, chunk_letters
from moeplan.costmodels.step import (
    data_parallel_exposed_s,
    data_parallel_times,
    dense_group,
    expert_group,
    send_times,
    sends_exposed_s,
)
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import DENSE_LAYER, PLAIN, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of

QUICK = settings(max_examples=50, deadline=None)
WORKLOAD = workload_of()
TOKENS, HIDDEN, VOCAB = 256, 128, 1024
ONE = Layouts.of([Layout()])


def cost(model, layout, profile=PLAIN, workload=WORKLOAD, **options):
    return Pricing(model, profile, workload, Layouts.of([layout]), **options).step_cost()


def total(parts):
    """Sum of the parts of one layout."""
    return float(sum(np.ravel(value)[0] for value in parts.values()))


def steady(found):
    """Seconds of a step that layers, head and pipeline take, without what happens once a step."""
    once = ("pipeline sends", "data-parallel exchange", "optimizer", "step overhead")
    return float(found.time.total[0] - sum(found.time[name][0] for name in once))


# ---------------------------------------------------------------- by hand


def test_one_device_by_hand():
    # 64 micro-batches through eight layers and the head; nothing to exchange.
    layout = Layout(cuda_graphs=("full_iteration",))
    found = cost(TINY_DENSE, layout)
    layer = total(layer_time(DENSE_LAYER, TINY_DENSE, PLAIN, WORKLOAD, Layouts.of([layout])))
    # Three products with the padded vocabulary; ten bytes a logit for the loss.
    product, loss = 3 * 2 * TOKENS * HIDDEN * VOCAB / 1e15, 10 * TOKENS * VOCAB * 1e-12
    assert found.time["head/output GEMM"][0] == pytest.approx(64 * product)
    assert found.time["head/loss"][0] == pytest.approx(64 * loss)
    assert found.stage_s.tolist() == [[pytest.approx(8 * layer + product + loss)]]
    # Adam moves 34 bytes a parameter: eight layers of qkv, out, three matrices and two norms, embedding, head, final norm.
    parameters = 8 * (256 * 128 + 128 * 128 + 3 * 128 * 256 + 2 * 128) + 2 * VOCAB * HIDDEN + HIDDEN
    assert found.time["optimizer"][0] == pytest.approx(34 * parameters * 1e-12)
    assert found.time["step overhead"][0] == 0.03
    for name in ("pipeline bubble", "pipeline sends", "data-parallel exchange"):
        assert found.time[name][0] == 0.0
    assert found.time.total[0] == pytest.approx(64 * (8 * layer + product + loss) + 34 * parameters * 1e-12 + 0.03)


def test_prediction_layers_by_hand():
    layout = Layout(dispatcher="alltoall", cuda_graphs=("full_iteration",))
    found = cost(TINY_LATENT, layout)
    layer = layer_time(TINY_LATENT.mtp[0], TINY_LATENT, PLAIN, WORKLOAD, Layouts.of([layout]))
    assert found.time["prediction/layer"][0] == pytest.approx(64 * total(layer))
    # The projection of 2 x 128 to 128, forward and backward; three norms of 4 bytes an element, half as much again backward.
    projection = 3 * 2 * TOKENS * 128 * 256 / 1e15 + 2.5 * 12 * TOKENS * HIDDEN * 1e-12
    assert found.time["prediction/projection"][0] == pytest.approx(64 * projection)
    assert found.time["prediction/head"][0] == pytest.approx(found.time["head/"][0])


def test_sends_by_hand():
    # 256 tokens of 256 bytes at 0.75 x 400 GB/s inside a domain, 0.89 x 50 GB/s across, and a microsecond.
    layouts = Layouts.of([Layout(), Layout(tp=4, edp=4), Layout(tp=4, edp=4, sequence_parallel=True), Layout(cp=2, edp=2)])
    inside, across = send_times(TINY_DENSE, PLAIN, WORKLOAD, layouts)
    message = np.array([1, 1, 1 / 4, 1 / 2]) * TOKENS * 256
    assert inside.tolist() == pytest.approx((1e-6 + message / 300e9).tolist())
    assert across.tolist() == pytest.approx((1e-6 + message / 44.5e9).tolist())
    # Activations one way, gradients the other: 0.24 of the steady ones, and those of filling and draining.
    assert sends_exposed_s(1e-3, 16, 4, 1) == pytest.approx(2e-3 * (0.24 * 16 + 3))
    assert sends_exposed_s(1e-3, 16, 4, 2) == pytest.approx(2e-3 * (0.24 * 32 + 3))
    assert sends_exposed_s(1e-3, 16, 1, 1) == 0.0


def test_the_next_stage_may_be_near_or_far():
    # Four ranks on, in the same domain of eight, or eight on, in the next.
    near, far = (cost(TINY_DENSE, Layout(pp=16 // n, dp=n, edp=n)).time["pipeline sends"][0] for n in (4, 8))
    one = np.array([t[0] for t in send_times(TINY_DENSE, PLAIN, WORKLOAD, ONE)])
    assert near == pytest.approx(2 * one[0] * (0.24 * 16 + 3))
    assert far == pytest.approx(2 * one[1] * (0.24 * 8 + 1))


def test_groups_that_share_parameters():
    layouts = Layouts.of([Layout(tp=2, cp=2, dp=4, ep=4, etp=2, edp=2)])
    assert (dense_group(PLAIN, layouts).ranks[0], dense_group(PLAIN, layouts).local[0]) == (8, 4)
    assert (expert_group(PLAIN, layouts).ranks[0], expert_group(PLAIN, layouts).local[0]) == (2, 1)


def test_data_parallel_by_hand():
    # 1e9 parameters on 8 ranks of a domain: 7/8 of 4 GB of gradients, of 2 GB of weights; an eighth of them to update.
    layouts = Layouts.of([Layout(dp=8, edp=8)])
    times = data_parallel_times(PLAIN, WORKLOAD, layouts, 1e9, Group(ranks=np.array([8]), local=np.array([8])))
    assert times.scatter.tolist() == pytest.approx([35e-3])
    assert times.gather.tolist() == pytest.approx([17.5e-3])
    assert times.optimizer.tolist() == pytest.approx([34e-3 / 8])
    # Everything is updated where nothing is sharded; a lone rank exchanges nothing.
    alone = data_parallel_times(PLAIN, WORKLOAD, Layouts.of([Layout(sharding="ddp")]), 1e9, Group(ranks=1, local=1))
    assert (alone.scatter, alone.gather, alone.optimizer.tolist()) == (0.0, 0.0, pytest.approx([34e-3]))
    # Half of the states on the host: half of the update; 4 + 2 bytes of each of their parameters go over PCIe at 25 GB/s, and
    # the host takes 2.8 ns for it.
    half = Layouts.of([Layout(dp=8, edp=8, optimizer_offload=0.5)])
    times = data_parallel_times(PLAIN, workload_of(gradient_bytes=4), half, 1e9, Group(ranks=8, local=8))
    assert times.optimizer.tolist() == pytest.approx([34e-3 / 16 + 6e9 / 16 / 25e9 + 2.8 / 16])
    # Without sharding gradients are all-reduced, so that 4 bytes go back instead of 2.
    plain = Layouts.of([Layout(dp=8, edp=8, sharding="ddp")])
    unsharded = data_parallel_times(PLAIN, WORKLOAD, plain, 1e9, Group(ranks=8, local=8))
    assert (float(unsharded.scatter), unsharded.gather.tolist()) == (pytest.approx(35e-3), pytest.approx([35e-3]))
    narrow = data_parallel_times(PLAIN, workload_of(gradient_bytes=2), layouts, 1e9, Group(ranks=8, local=8))
    assert narrow.scatter.tolist() == pytest.approx(17.5e-3)


def test_the_fullest_rank_sets_the_exchange():
    # Seven of eight layers stand on the second rank: its dense and its expert parameters are the most, over 16 and 2 ranks.
    layout = Layout(pp=2, dp=16, ep=8, edp=2, dispatcher="alltoall", dp_overlap=False, stages="Et|t*7L")
    found = cost(TINY_MOE, layout)
    parameters = rank_parameters(
        TINY_MOE, all_ranks(TINY_MOE, 2, 1, layout.stages), unit_parameters(TINY_MOE, Layouts.of([layout]))
    )
    groups = {"dense": Group(ranks=16, local=8), "expert": Group(ranks=2, local=1)}
    seconds = [
        data_parallel_times(PLAIN, WORKLOAD, Layouts.of([layout]), getattr(parameters, kind)[1], where)
        for kind, where in groups.items()
    ]
    exchange = sum(float(np.ravel(t.scatter + t.gather)[0]) for t in seconds)
    assert found.time["data-parallel exchange"][0] == pytest.approx(1.08 * exchange)
    assert found.time["optimizer"][0] == pytest.approx(sum(float(t.optimizer[0]) for t in seconds))


# Scatter, gather, one micro-batch, micro-batches, overlap, in every micro-batch: what shows.
EXPOSED = [
    ((0.0, 0.0, 1.0, 8, True, False), 0.0),
    # 0.4 of two thirds and of one third of a micro-batch hide; 8 % shows anyhow.
    ((0.5, 0.1, 0.3, 8, True, False), (0.5 - 0.4 * 0.2) + (0.1 - 0.4 * 0.1) + 0.08 * 0.6),
    ((0.05, 0.02, 0.3, 8, True, False), 0.08 * 0.07),
    ((0.5, 0.1, 0.3, 8, False, False), 0.6 * 1.08),
    # FSDP: two gathers and a scatter in each of 8 micro-batches, of which 0.7 of its compute hides.
    ((0.5, 0.1, 0.3, 8, True, True), 8 * (0.7 - 0.21 + 0.08 * 0.7)),
    ((0.05, 0.05, 0.3, 8, True, True), 8 * 0.08 * 0.15),
]  # fmt: skip


@pytest.mark.parametrize("row, shows", EXPOSED)
def test_exposed_data_parallel_by_hand(row, shows):
    *numbers, overlap, fsdp = row
    assert data_parallel_exposed_s(*numbers, overlap=overlap, every_batch=fsdp, hidden_compute=0.7) == pytest.approx(shows)


def test_exposed_data_parallel_of_arrays():
    columns = [np.array(c) for c in zip(*(row for row, _ in EXPOSED), strict=True)]
    together = data_parallel_exposed_s(*columns[:4], overlap=columns[4], every_batch=columns[5], hidden_compute=0.7)
    assert together.tolist() == pytest.approx([shows for _, shows in EXPOSED])


# ---------------------------------------------------------------- the pipeline against a simulated schedule


def order(pp, vpp, rank, batches):
    """Forwards and backwards of one rank in Megatron's order: (kind, micro-batch, chunk of the rank)."""
    total = batches * vpp
    warm_up = min(total, pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp)

    def action(kind, i):
        turn, place = divmod(i, pp * vpp)
        chunk = place // pp
        return kind, turn * pp + place % pp, chunk if kind == "F" else vpp - 1 - chunk

    actions = [action("F", i) for i in range(warm_up)]
    for i in range(total - warm_up):
        actions += [action("F", warm_up + i), action("B", i)]
    return actions + [action("B", i) for i in range(total - warm_up, total)]


def simulated_s(chunk_s, pp, vpp, batches):
    """Seconds until every micro-batch has passed all chunks there and back; a third of a chunk's time is its forward."""
    done, clock, todo = {}, [0.0] * pp, [order(pp, vpp, r, batches)[::-1] for r in range(pp)]
    last = pp * vpp - 1
    while any(todo):
        for rank in range(pp):
            while todo[rank]:
                kind, batch, chunk = todo[rank][-1]
                place = chunk * pp + rank
                before = (
                    ("F", batch, place - 1) if kind == "F" else ("B", batch, place + 1) if place < last else ("F", batch, place)
                )
                if place + (kind == "B") and before not in done:
                    break
                clock[rank] = max(clock[rank], done.get(before, 0.0)) + chunk_s[place] * (1 / 3 if kind == "F" else 2 / 3)
                done[kind, batch, place] = clock[rank]
                todo[rank].pop()
    return max(clock)


@pytest.mark.parametrize(
    "pp, vpp, batches", [(1, 1, 4), (2, 1, 8), (4, 1, 8), (8, 1, 8), (2, 2, 4), (4, 2, 8), (2, 4, 2), (4, 2, 16)]
)
def test_even_stages_and_a_head_take_what_the_schedule_takes(pp, vpp, batches):
    found = cost(TINY_DENSE, Layout(pp=pp, vpp=vpp, micro_batch=1), workload=workload_of(global_batch=batches), every_rank=True)
    stages = found.stage_s[:, 0]
    chunk = stages[0] / vpp if pp > 1 else 0.0
    chunks = [chunk] * (pp * vpp - 1) + [chunk + stages[-1] - chunk * vpp]
    assert steady(found) == pytest.approx(simulated_s(chunks, pp, vpp, batches), rel=1e-9)


@pytest.mark.parametrize("pp, vpp", [(1, 1), (4, 1), (4, 2), (2, 4), (8, 1)])
def test_equal_stages_by_the_formula(pp, vpp):
    # (m + (p - 1) / v) t, in which the head adds m h on the last stage, or m h and nothing else where it makes it slowest.
    found = cost(TINY_DENSE, Layout(pp=pp, vpp=vpp), workload=workload_of(global_batch=16), every_rank=True)
    t, head = found.stage_s[0, 0], found.stage_s[-1, 0] - found.stage_s[0, 0]
    assert steady(found) == pytest.approx((16 + (pp - 1) / vpp) * t + 16 * head)


@given(data=st.data())
@pytest.mark.parametrize("model", [TINY_DENSE, TINY_MOE, TINY_LATENT], ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
def test_stages_against_a_scalar_loop(model, data):
    layout = data.draw(layouts_of(model))
    batches = WORKLOAD.global_batch / (layout.micro_batch * layout.dp)
    found = cost(model, layout, TWO_NODES, every_rank=True)
    # 1. seconds of one layer of each kind, and of what else a stage may hold, where one stage holds everything
    seconds = {kind: total(layer_time(kind, model, TWO_NODES, WORKLOAD, Layouts.of([layout]))) for kind in model.kinds}
    alone = cost(model, dataclasses.replace(layout, pp=1, vpp=1, stages=""), TWO_NODES).time
    extra = {"E": 0.0, "L": float(alone["head/"][0]) / batches, "m": float(np.sum(alone["prediction/"])) / batches}
    # 2. every rank's chunks
    chunks, layers = [], iter(model.layers)
    for chunk in chunk_letters(model, layout.pp, layout.vpp, layout.stages):
        chunks.append(sum(seconds[next(layers)] if letter == "t" else extra[letter] for letter in chunk))
    stages = [sum(chunks[rank :: layout.pp]) for rank in range(layout.pp)]
    assert found.stage_s[:, 0].tolist() == pytest.approx(stages, rel=1e-9)
    # 3. every rank works without pause between the first chunks before it and, in plain 1F1B, the round trips behind it
    spans = []
    for rank, stage in enumerate(stages):
        spans.append(batches * stage + sum(chunks[:rank]))
        if layout.vpp == 1:
            behind, ahead = sum(stages[rank + 1 :]), layout.pp - 1 - rank
            few = behind - min(batches - 1, ahead) * stage
            spans[-1] += max(0.0, 2 * behind - ahead * stage if batches > layout.pp else few)
    assert steady(found) == pytest.approx(max(spans), rel=1e-9)
    exact = steady(cost(model, layout, TWO_NODES, every_rank=True, exact=True))
    assert max(spans) * (1 - 1e-9) <= exact <= (batches * max(stages) + sum(stages)) * 2


# ---------------------------------------------------------------- laws


@given(row=layouts_of(TINY_MOE, sharding="optimizer"), more=st.sampled_from([2, 3, 8]))
@QUICK
def test_more_micro_batches_scale_the_steady_part(row, more):
    once, often = (cost(TINY_MOE, row, workload=workload_of(global_batch=64 * n)) for n in (1, more))
    for name, seconds in once.time:
        if name.split("/")[0] in ("layers", "head", "prediction"):
            assert often.time[name] == pytest.approx(more * seconds)
        elif name != "pipeline sends":
            assert often.time[name] == pytest.approx(seconds)
    assert often.stage_s.tolist() == once.stage_s.tolist()


@pytest.mark.parametrize("name, gpus, layout", [
    ("llama3-8b", "h100x16", Layout(dp=16, edp=16)),
    ("llama3-8b", "b200x16", Layout(tp=2, dp=8, edp=16, sequence_parallel=True, tp_overlap=True)),
    ("qwen3-30b-a3b", "h100x16", Layout(dp=16, ep=8, edp=2, dispatcher="hybridep")),
    ("deepseek-v3", "gb200x256", Layout(pp=4, dp=64, ep=64, edp=1, dispatcher="hybridep", cuda_graphs=("full_iteration",),
                                       stages="Et*15|t*16|t*16|t*14mL")),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_no_step_beats_the_peak_of_its_devices(name, gpus, layout):
    model, profile = load_model(name), nominal(load_cluster(gpus))
    workload = workload_of(seq_len=4096, global_batch=512)
    flop = flops_per_token(model, 4096) * workload.tokens
    used = flop / (float(cost(model, layout, profile, workload).time.total[0]) * layout.world)
    assert 0.15 < used / profile.cluster.device.peak_flop_per_s["bf16"] < 0.7
