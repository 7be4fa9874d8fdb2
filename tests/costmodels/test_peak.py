"""Peak memory: micro-batches in flight against a simulated schedule, and a scalar twin that goes through every rank, chunk,
layer and backward."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.activations import dense_activation_bytes, layer_activation_bytes, routed_activation_bytes
from moeplan.costmodels.counts import layer_weights
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.megatron_counts import embedding_held, final_norm_held, head_held, layer_held, prediction_held
from moeplan.costmodels.memory import least_state_bytes
from moeplan.costmodels.model import Mlp, Moe
from moeplan.costmodels.peak import in_flight
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.recompute import recomputed_layers
from moeplan.costmodels.stages import chunk_letters
from tests.conftest import DENSE_LAYER, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of
from tests.costmodels.random_splits import unequal_splits, with_counts

WORKLOAD = workload_of()
MODELS = [TINY_DENSE, dataclasses.replace(TINY_DENSE, name="tiny-tied", tied=True), TINY_MOE, TINY_LATENT]

# ---------------------------------------------------------------- micro-batches in flight

# Stages, chunks, rank, micro-batches of the step: in flight at the peak.
IN_FLIGHT = [
    (1, 1, 0, 8, 1), (4, 1, 0, 8, 4), (4, 1, 3, 8, 1), (4, 1, 1, 8, 3), (4, 1, 0, 2, 2), (8, 1, 7, 1, 1),
    (4, 2, 0, 8, 5.5), (4, 2, 3, 8, 2.5), (4, 4, 0, 8, 4.75), (2, 2, 0, 2, 2), (8, 4, 0, 32, 9.75),
]  # fmt: skip


@pytest.mark.parametrize("pp, vpp, rank, batches, expected", IN_FLIGHT)
def test_in_flight_by_hand(pp, vpp, rank, batches, expected):
    assert in_flight(pp, vpp, rank, batches) == expected


def backwards(pp, vpp, rank, batches):
    """Chunk of every backward of a rank under Megatron's schedules, and the micro-batches of each chunk that it then holds:
    warm-up forwards, then forwards and backwards in turn; rounds of pp micro-batches through chunk after chunk."""
    total = batches * vpp
    warm_up = min(total, pp - rank - 1 if vpp == 1 else (pp - rank - 1) * 2 + (vpp - 1) * pp)
    held_now, forwards, backwards = [0] * vpp, 0, 0
    for step in ["F"] * warm_up + ["F", "B"] * (total - warm_up) + ["B"] * warm_up:
        if step == "F":
            held_now[forwards // pp % vpp] += 1
            forwards += 1
        else:
            chunk = vpp - 1 - backwards // pp % vpp
            yield chunk, list(held_now)
            held_now[chunk] -= 1
            backwards += 1
    assert held_now == [0] * vpp


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 3, 5])
def test_in_flight_against_the_schedule(pp, vpp):
    for rank in range(pp):
        for batches in [1, 2, 3, 8, 16] if vpp == 1 else [pp, 2 * pp, 8 * pp] if pp > 1 else []:
            most = max(sum(held_now) for _, held_now in backwards(pp, vpp, rank, batches))
            assert in_flight(pp, vpp, rank, batches) * vpp == most


UNEVEN = Layout(pp=4, vpp=2, dp=4, edp=4, stages="Et|(tt|)*6tL")
UNEVEN_MODEL = dataclasses.replace(TINY_DENSE, layers=(DENSE_LAYER,) * 14)


def uneven_peak(layout, global_batch, model=UNEVEN_MODEL, **options):
    """Peak, and its activations in layers."""
    workload = workload_of(global_batch=global_batch)
    layer = float(layer_activation_bytes(DENSE_LAYER, model, workload, Layouts.of([layout]))[0])
    peak = Pricing(model, TWO_NODES, workload, Layouts.of([layout]), **options).peak_memory()
    return peak.total[:, 0].max(), (peak["activations"][:, 0] / layer).tolist()


def test_uneven_chunks_by_hand():
    # Four ranks of two chunks, one layer in the very first and last chunk, two in the others. Rank 0 holds 4 + 3 micro-batches
    # of its first chunk and 4 of its second, so the others; rank 3 holds 4 and 1 at its first backward, later 5 and none.
    total, activations = uneven_peak(UNEVEN, 64, every_rank=True)
    assert activations == [7 + 2 * 4, 2 * 5 + 2 * 4, 2 * 4 + 2 * 3, 2 * 5]
    assert uneven_peak(UNEVEN, 64)[0] == total
    # With one round of micro-batches no rank has any of a second.
    assert uneven_peak(UNEVEN, 16, every_rank=True)[1] == [4 + 2 * 4, 4 * 4, 2 * 4 + 2 * 3, 2 * 4 + 1]


def test_heavy_first_chunks_by_hand():
    # Three layers in the first chunks, one in the last: backwards of the last chunk go on while the next round enters the
    # first, so that ranks come to hold 8 of the first and 3, 1 of the second; 7 and none; 5 and none.
    layout = dataclasses.replace(UNEVEN, stages="Et*3|(t*3|)*3(t|)*3tL")
    model = dataclasses.replace(TINY_DENSE, layers=(DENSE_LAYER,) * 16)
    assert uneven_peak(layout, 64, model, every_rank=True)[1] == [3 * 8 + 3, 3 * 8 + 1, 3 * 7, 3 * 5]
    assert uneven_peak(layout, 16, model, every_rank=True)[1] == [3 * 4 + 4] * 2 + [3 * 4 + 3, 3 * 4 + 1]


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
    counts = recomputed_layers(layout.recompute_layers, [chunk.count("t") for chunk in chunks])
    kinds = iter(model.layers)
    dense = expert = plain = 0.0
    saved = [0.0] * layout.vpp
    head = False
    for place, chunk in enumerate(chunks):
        layers = [next(kinds) for letter in chunk if letter == "t"]
        if place % layout.pp != rank:
            continue
        parts = [layer_held(layer, model, *degrees) for layer in layers]
        kept = [layout.recompute if i < counts[place] else () for i in range(len(layers))]
        chunk_saved = sum(activation(layer, model, layout, recompute=r) for layer, r in zip(layers, kept, strict=True))
        if "E" in chunk or "m" in chunk:
            parts.append(embedding_held(model, layout.tp))
            plain += parts[-1].dense
        if "m" in chunk:
            parts.append(prediction_held(model, *degrees))
            r = () if layout.recompute_layers else layout.recompute
            chunk_saved += activation(model.mtp[0], model, layout, recompute=r) + 4 * tokens * model.hidden / ways
        if "L" in chunk:
            parts.append(head_held(model, layout.tp, shares_embedding="E" in chunk))
            plain += parts[-1].dense
            head = True
        if place == normed:
            parts.append(final_norm_held(model))
        saved[place // layout.pp] = chunk_saved
        dense, expert = dense + sum(p.dense for p in parts), expert + sum(p.expert for p in parts)
    # 1. states
    shards = (layout.dp * layout.cp, layout.edp)
    total = 0.0
    for count, ranks in zip((dense, expert), shards, strict=True):
        kept = ranks if layout.sharding == "fsdp" else 1
        spread = 1 if layout.sharding == "ddp" else ranks
        total += count * ((2 + 4) / kept + 12 * (1 - layout.optimizer_offload) / spread)
        if layout.sharding == "fsdp":  # a whole stage with its gradients; else two layers
            total += (2 + 4) * count if layout.pp > 1 else 2 * 2 * count / max(len(model.layers), 2)
    if layout.sharding == "fsdp" and layout.pp == 1:  # embedding and head
        total += (2 - 2 * 2 / max(len(model.layers), 2)) * plain
    # 2. one gradient buffer for every shape of a weight that is multiplied
    total += 64 * 2**20  # workspaces of the GEMM library
    if layout.sharding != "fsdp":
        shapes = set()
        for kind in (*model.layers, *model.mtp):
            for w in layer_weights(kind, model):
                if w.gemm and w.name != "router":
                    shapes.add((w.out, w.inp, w.shard, layout.etp if w.shard.is_expert else layout.tp if w.shard.is_cut else 1))
        total += sum(2.0 * out * inp / cut for out, inp, _, cut in shapes)
    # 3. what comes and goes
    if layout.recompute_layers and not any(counts[rank :: layout.pp]):
        layout = dataclasses.replace(layout, recompute=())
    return total + fullest_moment(model, layout, rank, saved, head)


def fullest_moment(model, layout, rank, saved, head):
    """Most bytes in any backward: activations in flight, and what the backward of a layer needs or the logits, if more."""
    tokens, ways = layout.micro_batch * WORKLOAD.seq_len / layout.cp, layout.tp if layout.sequence_parallel else 1
    moment = momentary(model, layout, tokens, ways)
    vocab = 128 * layout.tp * -(-model.vocab // (128 * layout.tp)) / layout.tp
    norm = 6 * tokens * model.hidden / ways + (4 * tokens * model.hidden if ways > 1 else 0)
    loss = 2 * tokens * vocab + 2 * vocab * model.hidden + norm
    most = 0.0
    batches = WORKLOAD.global_batch // (layout.micro_batch * layout.dp)
    for chunk, held_now in backwards(layout.pp, layout.vpp, rank, batches):
        active = sum(count * kept for count, kept in zip(held_now, saved, strict=True))
        most = max(most, active + max(moment, loss if head and chunk == layout.vpp - 1 else 0.0))
    return most


def momentary(model, layout, tokens, ways):
    """Bytes that the backward of the widest layer needs; what one layer recomputes is there again meanwhile."""
    need, again = [0.0], {"dense": [0.0], "routed": [0.0]}
    for layer in model.kinds:
        for block in layer.blocks:
            if isinstance(block, Moe):
                rows = tokens / ways * block.topk * layout.etp
                need.append(4 * rows * (model.hidden + block.width / layout.etp))
            elif isinstance(block, Mlp):
                need.append(4 * tokens * (model.hidden + block.width / layout.tp))
            else:
                need.append(8 * tokens * model.hidden / layout.tp)
        for part, of in (("dense", dense_activation_bytes), ("routed", routed_activation_bytes)):
            kept, whole = (
                float(of(layer, model, WORKLOAD, Layouts.of([dataclasses.replace(layout, recompute=r)]))[0])
                for r in (layout.recompute, ())
            )
            again[part].append(whole - kept)
    return max(need) + max(again["dense"]) + max(again["routed"])


@given(data=st.data())
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
def test_every_rank_against_the_scalar_twin(model, data):
    check_against_the_scalar_twin(model, data.draw(layouts_of(model)))


@given(data=st.data())
@pytest.mark.parametrize("base", MODELS, ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
def test_unequal_chunks_against_the_scalar_twin(base, data):
    # 4 to 64 micro-batches, from one round of the stages up
    dp = data.draw(st.sampled_from([1, 4, 16]))
    check_against_the_scalar_twin(*data.draw(unequal_splits(base, (2, 4), dp=dp, edp=dp)))


@given(data=st.data())
@pytest.mark.parametrize("base", MODELS, ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
def test_recompute_of_some_layers_against_the_scalar_twin(base, data):
    dp = data.draw(st.sampled_from([1, 4, 16]))
    check_against_the_scalar_twin(*data.draw(with_counts(unequal_splits(base, (1, 2, 4), dp=dp, edp=dp))))


def check_against_the_scalar_twin(model, layout):
    layouts = Layouts.of([layout])
    everywhere = Pricing(model, TWO_NODES, WORKLOAD, layouts, every_rank=True).peak_memory().total[:, 0]
    twin = [peak_of_rank(model, layout, rank) for rank in range(layout.pp)]
    assert everywhere.tolist() == pytest.approx(twin, rel=1e-12)
    # The ranks that can bind hold the peak, and the bound from states alone stays below it.
    binding = Pricing(model, TWO_NODES, WORKLOAD, layouts).peak_memory().total[:, 0].max()
    assert binding == pytest.approx(max(twin), rel=1e-12)
    assert least_state_bytes(model, TWO_NODES.cluster.device, WORKLOAD, layouts)[0] <= binding
