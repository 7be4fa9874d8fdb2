"""Peak memory: parameters and states against Megatron's numbers, micro-batches in flight against a simulated schedule, and a
scalar twin that goes through every rank, chunk and layer."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.activations import layer_activation_bytes
from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.counts import layer_weights
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.megatron_counts import embedding_held, final_norm_held, head_held, layer_held, prediction_held
from moeplan.costmodels.memory import (
    gradient_buffers,
    in_flight,
    least_state_bytes,
    mean_parameters,
    micro_batches,
    rank_parameters,
    reserve_bytes,
    state_bytes,
    unit_parameters,
)
from moeplan.costmodels.model import Mlp, Moe
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import peak_memory
from moeplan.costmodels.stages import all_ranks, chunk_letters
from moeplan.costmodels.workload import load_precision
from moeplan.profiles.hardware import load_device
from tests.conftest import DENSE_LAYER, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of

QUICK = settings(max_examples=60, deadline=None)
WORKLOAD = workload_of()
H100 = load_device("H100")
TIED = dataclasses.replace(TINY_DENSE, name="tiny-tied", tied=True)
MODELS = [TINY_DENSE, TIED, TINY_MOE, TINY_LATENT]


def held(model, layout):
    """Dense and expert parameters of every pipeline rank."""
    columns = Layouts.of([layout])
    found = rank_parameters(model, all_ranks(model, layout.pp, layout.vpp, layout.stages), unit_parameters(model, columns))
    return found.dense[:, 0], found.expert[:, 0]


# ---------------------------------------------------------------- against Megatron


def test_states_of_qwen3_by_hand():
    # Megatron's own estimate for 64 GPUs, TP 2, PP 2, EP 8: 18.93 GB of weights, gradients and optimizer states on the
    # fullest rank. bf16 weight and fp32 gradient: 6 bytes; master and moments: 12, over dp = 16 and over edp = 4.
    layout = Layout(tp=2, pp=2, dp=16, ep=8, edp=4, sequence_parallel=True, dispatcher="alltoall")
    model = load_model("qwen3-30b-a3b")
    dense, expert = held(model, layout)
    assert (round(dense.max() / 1e6, 1), round(expert.max() / 1e6, 1)) == (388.6, 1811.9)
    by_hand = dense.max() * (6 + 12 / 16) + expert.max() * (6 + 12 / 4)
    peak = peak_memory(model, TWO_NODES, WORKLOAD, Layouts.of([layout]), every_rank=True)
    states = peak["weights"] + peak["gradients"] + peak["optimizer states"]
    assert states.max() == pytest.approx(by_hand)
    assert states.max() / 1e9 == pytest.approx(18.93, abs=0.005)


def test_parameters_of_every_rank_of_deepseek_v3():
    # What Megatron builds on 8 ranks of 4 chunks with EP 32, in 1e9; the rank with the prediction layer holds a second
    # embedding.
    layout = Layout(pp=8, vpp=4, dp=32, ep=32, stages="Et*3|(tt|)*29m|L", dispatcher="alltoall")
    dense, expert = held(load_model("deepseek-v3"), layout)
    assert (dense / 1e9).round(3).tolist() == [4.075, 1.864, 1.864, 1.864, 1.864, 1.864, 2.66, 2.325]
    assert (expert / 1e9).round(3).tolist() == [2.114, 2.819, 2.819, 2.819, 2.819, 2.819, 2.466, 2.114]


def test_a_tied_matrix_on_one_stage_exists_once():
    embedding = 1024 * 128  # the vocabulary of 1000, padded to a multiple of 128
    alone = [held(model, Layout())[0][0] for model in (TINY_DENSE, TIED)]
    assert alone[0] - alone[1] == embedding
    split = [held(model, Layout(pp=2))[0] for model in (TINY_DENSE, TIED)]
    assert split[0].tolist() == split[1].tolist()  # the last stage has a copy of its own


# ---------------------------------------------------------------- states by hand

# Sharding, precision and other fields: bytes of a dense and of an expert parameter; dp 4, cp 2, edp 2.
STATES = [
    ({}, {}, 2 + 4 + 12 / 8, 2 + 4 + 12 / 2),
    ({"sharding": "ddp"}, {}, 2 + 4 + 12, 2 + 4 + 12),
    ({"sharding": "fsdp"}, {}, (2 + 4 + 12) / 8 + 2 * 2 / 8, (2 + 4 + 12) / 2 + 2 * 2 / 8),
    ({"optimizer_offload": 0.75}, {}, 6 + 3 / 8, 6 + 3 / 2),
    ({}, {"gradient_bytes": 2}, 4 + 12 / 8, 4 + 12 / 2),
    ({}, {"moment_bytes": 2}, 6 + 8 / 8, 6 + 8 / 2),
    ({}, {"precision": load_precision("fp8-delayed")}, 6 + 12 / 8, 6 + 12 / 2),
]


@pytest.mark.parametrize("fields, work, dense, expert", STATES, ids=[f"{f} {list(w)}" for f, w, _, _ in STATES])
def test_bytes_of_a_parameter_by_hand(fields, work, dense, expert):
    layouts = Layouts.of([Layout(cp=2, dp=4, ep=4, edp=2, **fields)])
    states = state_bytes(TINY_MOE, H100, workload_of(**work), layouts)
    assert sum(states.dense.values()) == pytest.approx(dense)  # eight layers, of which FSDP gathers two at a time
    assert sum(states.expert.values()) == pytest.approx(expert)


def test_gradient_buffers_by_hand():
    # One bf16 buffer for each shape: qkv 256 x 128, out 128 x 128, fc1 512 x 128, fc2 128 x 256.
    shapes = 256 * 128 + 128 * 128 + 512 * 128 + 128 * 256
    assert gradient_buffers(TINY_DENSE, Layouts.of([Layout(), Layout(tp=4, edp=4)])).tolist() == [2 * shapes, 2 * shapes / 4]
    # Experts of 128 x 128 and 128 x 64, cut over etp; shared experts have the same shapes but are cut over tp.
    experts, shared = 128 * 128 + 128 * 64, 128 * 128 + 128 * 64
    both = Layouts.of([Layout(tp=2, dp=2, etp=4, sequence_parallel=True), Layout(sharding="fsdp")])
    assert gradient_buffers(TINY_MOE, both).tolist() == [2 * ((shapes + shared) / 2 + experts / 4), 0.0]


def test_what_must_stay_free():
    assert reserve_bytes(0.0) == pytest.approx(2.0 * 2**30)
    assert reserve_bytes(np.array([1e9, 2e9])).tolist() == pytest.approx([2 * 2**30 + 0.04e9, 2 * 2**30 + 0.08e9])


# ---------------------------------------------------------------- micro-batches in flight

# Stages, chunks, rank, micro-batches of the step: in flight at the peak.
IN_FLIGHT = [
    (1, 1, 0, 8, 1), (4, 1, 0, 8, 4), (4, 1, 3, 8, 1), (4, 1, 1, 8, 3), (4, 1, 0, 2, 2), (8, 1, 7, 1, 1),
    (4, 2, 0, 8, 5.5), (4, 2, 3, 8, 2.5), (4, 4, 0, 8, 4.75), (2, 2, 0, 2, 2), (8, 4, 0, 32, 9.75),
]  # fmt: skip


@pytest.mark.parametrize("pp, vpp, rank, batches, expected", IN_FLIGHT)
def test_in_flight_by_hand(pp, vpp, rank, batches, expected):
    assert in_flight(pp, vpp, rank, batches) == expected


def chunks_in_flight(pp, vpp, rank, batches):
    """Most chunks that a rank holds under Megatron's schedules: warm-up forwards, then forwards and backwards in turn."""
    total = batches * vpp
    warm_up = min(total, pp - rank - 1 if vpp == 1 else (pp - rank - 1) * 2 + (vpp - 1) * pp)
    held_now = most = 0
    for step in ["F"] * warm_up + ["F", "B"] * (total - warm_up) + ["B"] * warm_up:
        held_now += 1 if step == "F" else -1
        most = max(most, held_now)
    assert held_now == 0
    return most


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 3, 5])
def test_in_flight_against_the_schedule(pp, vpp):
    for rank in range(pp):
        for batches in [1, 2, 3, 8, 16] if vpp == 1 else [pp, 2 * pp, 8 * pp] if pp > 1 else []:
            assert in_flight(pp, vpp, rank, batches) * vpp == chunks_in_flight(pp, vpp, rank, batches)


def test_in_flight_of_arrays():
    rows = np.array([row[:4] for row in IN_FLIGHT])
    assert in_flight(*rows.T).tolist() == [row[4] for row in IN_FLIGHT]


# ---------------------------------------------------------------- a scalar twin of the whole peak


def activation(layer, model, layout, **changes):
    one = Layouts.of([dataclasses.replace(layout, **changes)])
    return float(layer_activation_bytes(layer, model, WORKLOAD, one)[0])


def peak_of_rank(model, layout, rank):
    """Bytes on one pipeline rank, added up chunk by chunk, layer by layer."""
    degrees = layout.tp, layout.ep, layout.etp
    tokens = layout.micro_batch * WORKLOAD.seq_len / layout.cp
    ways = layout.tp if layout.sequence_parallel else 1
    chunks = chunk_letters(model, layout.pp, layout.vpp, layout.stages)
    # The final norm stands with the head, or beside the last decoder layer if prediction layers follow it.
    normed = max(c for c, chunk in enumerate(chunks) if "t" in chunk) if model.mtp else len(chunks) - 1
    kinds = iter(model.layers)
    dense = expert = saved = 0.0
    head = False
    for place, chunk in enumerate(chunks):
        layers = [next(kinds) for letter in chunk if letter == "t"]
        if place % layout.pp != rank:
            continue
        parts = [layer_held(layer, model, *degrees) for layer in layers]
        saved += sum(activation(layer, model, layout) for layer in layers)
        if "E" in chunk or "m" in chunk:
            parts.append(embedding_held(model, layout.tp))
        if "m" in chunk:
            parts.append(prediction_held(model, *degrees))
            saved += activation(model.mtp[0], model, layout) + 4 * tokens * model.hidden / ways
        if "L" in chunk:
            parts.append(head_held(model, layout.tp, shares_embedding="E" in chunk))
            head = True
        if place == normed:
            parts.append(final_norm_held(model))
        dense, expert = dense + sum(p.dense for p in parts), expert + sum(p.expert for p in parts)
    # 1. states
    shards = (layout.dp * layout.cp, layout.edp)
    total = 0.0
    for count, ranks in zip((dense, expert), shards, strict=True):
        kept = ranks if layout.sharding == "fsdp" else 1
        spread = 1 if layout.sharding == "ddp" else ranks
        total += count * ((2 + 4) / kept + 12 * (1 - layout.optimizer_offload) / spread)
        if layout.sharding == "fsdp":
            total += 2 * 2 * count / max(len(model.layers) / layout.pp, 1)
    # 2. one gradient buffer for every shape of a weight that is multiplied
    if layout.sharding != "fsdp":
        shapes = set()
        for kind in (*model.layers, *model.mtp):
            for w in layer_weights(kind, model):
                if w.gemm and w.name != "router":
                    shapes.add((w.out, w.inp, w.shard, layout.etp if w.shard.is_expert else layout.tp if w.shard.is_cut else 1))
        total += sum(2.0 * out * inp / cut for out, inp, _, cut in shapes)
    # 3. activations of the micro-batches in flight
    batches = WORKLOAD.global_batch / (layout.micro_batch * layout.dp)
    total += saved * float(in_flight(layout.pp, layout.vpp, rank, batches))
    # 4. what is held for a moment: logits and their gradients, or the backward of one layer
    if head:
        vocab = 128 * layout.tp * -(-model.vocab // (128 * layout.tp)) / layout.tp
        return (
            total + MEMORY.logits * tokens * vocab + (MEMORY.head_gradient * vocab + MEMORY.head_input * tokens) * model.hidden
        )
    return total + momentary(model, layout, tokens, ways)


def momentary(model, layout, tokens, ways):
    """Bytes that the backward of the widest layer needs; a recomputed layer is whole again meanwhile."""
    need, whole = [0.0], {"dense": [0.0], "routed": [0.0]}
    for layer in model.kinds:
        for block in layer.blocks:
            if isinstance(block, Moe):
                rows = tokens / ways * block.topk * layout.etp
                need.append(4 * rows * (model.hidden + block.width / layout.etp))
            elif isinstance(block, Mlp):
                need.append(4 * tokens * (model.hidden + block.width / layout.tp))
            else:
                need.append(8 * tokens * model.hidden / layout.tp)
        everything, without = (activation(layer, model, layout, recompute=r) for r in ((), ("moe",)))
        blocks = [b for b in layer.blocks if isinstance(b, Moe)]
        shared = sum(6 * b.shared_width * tokens / layout.tp for b in blocks)
        whole["dense"].append(without + shared)
        whole["routed"].append(everything - without - shared)
    return max(need) + ("full" in layout.recompute) * (max(whole["dense"]) + max(whole["routed"]))


@given(data=st.data())
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
def test_every_rank_against_the_scalar_twin(model, data):
    layout = data.draw(layouts_of(model))
    layouts = Layouts.of([layout])
    everywhere = peak_memory(model, TWO_NODES, WORKLOAD, layouts, every_rank=True).total[:, 0]
    twin = [peak_of_rank(model, layout, rank) for rank in range(layout.pp)]
    assert everywhere.tolist() == pytest.approx(twin, rel=1e-12)
    # The ranks that can bind hold the peak, and the bound from states alone stays below it.
    binding = peak_memory(model, TWO_NODES, WORKLOAD, layouts).total[:, 0].max()
    assert binding == pytest.approx(max(twin), rel=1e-12)
    assert least_state_bytes(model, TWO_NODES.cluster.device, WORKLOAD, layouts)[0] <= binding


# ---------------------------------------------------------------- laws


@given(rows=st.lists(layouts_of(TINY_LATENT), min_size=1, max_size=5))
@QUICK
def test_arrays_equal_numbers(rows):
    layouts = Layouts.of(rows)
    for price in (
        lambda x: micro_batches(WORKLOAD, x),
        lambda x: gradient_buffers(TINY_LATENT, x),
        lambda x: least_state_bytes(TINY_LATENT, H100, WORKLOAD, x),
        lambda x: mean_parameters(TINY_LATENT, x).expert,
    ):
        single = [float(price(Layouts.of([row]))[0]) for row in rows]
        assert price(layouts).tolist() == pytest.approx(single, rel=1e-12)


@given(row=layouts_of(TINY_MOE))
@QUICK
def test_the_mean_rank_holds_no_more_than_the_fullest(row):
    mean = mean_parameters(TINY_MOE, Layouts.of([row]))
    dense, expert = held(TINY_MOE, row)
    assert mean.dense[0] <= dense.max() and mean.expert[0] <= expert.max() * (1 + 1e-12)
    assert expert.sum() == pytest.approx(mean.expert[0] * row.pp)


@given(row=layouts_of(TINY_MOE, sharding="optimizer", optimizer_offload=0.0))
@QUICK
def test_more_replicas_hold_smaller_shards(row):
    twice = dataclasses.replace(row, dp=2 * row.dp, edp=2 * row.edp)
    shares = [peak_memory(TINY_MOE, TWO_NODES, WORKLOAD, Layouts.of([x])) for x in (row, twice)]
    assert shares[1]["optimizer states"] == pytest.approx(shares[0]["optimizer states"] / 2)
    assert shares[1]["weights"].tolist() == shares[0]["weights"].tolist()
    sharded = [dataclasses.replace(row, sharding=s) for s in ("fsdp", "optimizer", "ddp")]
    states = [least_state_bytes(TINY_MOE, H100, WORKLOAD, Layouts.of([x]))[0] for x in sharded]
    assert states[1] <= states[2]


def test_dense_models_hold_no_experts():
    dense, expert = held(TINY_DENSE, Layout(pp=4))
    assert expert.tolist() == [0.0] * 4
    assert dense[1] == 2 * layer_held(DENSE_LAYER, TINY_DENSE, 1, 1, 1).dense
