"""Saved activations: tensor by tensor by hand, what each recompute module removes, laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.activations import (
    gathered_input_bytes,
    layer_activation_bytes,
    rank_tokens,
    routed_rows,
    separate_norm,
    shard,
)  # fmt: skip
from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layout, Layouts
from moeplan.costmodels.model import Attention, Layer, LinearAttention, Mamba, Mlp
from moeplan.costmodels.workload import load_era, load_precision
from tests.conftest import (
    ATTENTION,
    DENSE_LAYER,
    LATENT,
    LATENT_LAYER,
    MLP,
    MOE,
    MOE_LAYER,
    TINY_LATENT,
    layouts_of,
    workload_of,
)

QUICK = settings(max_examples=60, deadline=None)
T, H = 256, 128
"""Tokens of a micro-batch and hidden size of the tiny models."""
SCAN_LAYER = Layer(blocks=(Mamba(version=2, inner=128, state=16, heads=8, groups=8), MLP))
DELTA_LAYER = Layer(blocks=(LinearAttention(variant="gdn", key_heads=8, value_heads=8, key_dim=16, value_dim=16, conv=4), MOE))
LAYERS = [DENSE_LAYER, MOE_LAYER, LATENT_LAYER, SCAN_LAYER, DELTA_LAYER]

# Bytes in bf16 of what one layer saves on one rank, by tensor.
NORMS = 2 * T * H + 2 * T * H  # input and output of one norm
QKV = 2 * T * (128 + 4 * (16 + 16))  # projected queries, keys and values
CORE = 2 * T * 128 + 4 * T * 8  # attention's output; log-sum-exp in fp32, one a head
FC1, ACT = 4 * T * 256, 2 * T * 256  # gate and up; their product
ROWS = 2 * T
DISPATCHED = 2 * ROWS * H
EXPERT_FC1, EXPERT_ACT = 4 * ROWS * 64, 2 * ROWS * 64
ROUTER, SHARED = (4 + 4 + 1 + 2 * 4) * T * 8, (4 + 2) * T * 64
LATENT_DOWN = (2 + 2) * T * (32 + 16) + 2 * T * 8  # before and after the norms of the compressed ones; rotary keys
LATENT_UP = 2 * T * 8 * (24 + 24 + 16)  # queries, keys, values of 8 heads

WHOLE = {
    DENSE_LAYER: 2 * NORMS + QKV + CORE + FC1 + ACT,
    MOE_LAYER: 2 * NORMS + QKV + CORE + DISPATCHED + EXPERT_FC1 + EXPERT_ACT + ROUTER + SHARED,
    LATENT_LAYER: 2 * NORMS
    + LATENT_DOWN + LATENT_UP + CORE
    + DISPATCHED + EXPERT_FC1 + EXPERT_ACT + ROUTER + SHARED,
}  # fmt: skip

# Layer, module, what it no longer keeps.
REMOVED = [
    (DENSE_LAYER, "core_attn", 4 * T * 8),
    (DENSE_LAYER, "layernorm", 0),  # part of the projections' kernels
    (DENSE_LAYER, "mlp", FC1 + ACT),
    (DENSE_LAYER, "full", WHOLE[DENSE_LAYER] - 2 * T * H),
    (MOE_LAYER, "layernorm", 2 * T * H),
    (MOE_LAYER, "moe_act", EXPERT_ACT),
    (MOE_LAYER, "shared_experts", SHARED),
    (MOE_LAYER, "moe", DISPATCHED + EXPERT_FC1 + EXPERT_ACT + ROUTER + SHARED),
    (MOE_LAYER, "mlp", 0),
    (MOE_LAYER, "mla_up_proj", 0),
    (MOE_LAYER, "full", WHOLE[MOE_LAYER] - 2 * T * H),
    (LATENT_LAYER, "layernorm", 2 * 2 * T * H),
    (LATENT_LAYER, "mla_up_proj", LATENT_UP),
]


def saved(layer, workload=None, **fields):
    """Bytes of one layer under one layout over 16 ranks, data-parallel for what is not said."""
    dense, expert = fields.get("tp", 1) * fields.get("cp", 1), fields.get("ep", 1) * fields.get("etp", 1)
    layouts = Layouts.of([Layout(**{"dp": 16 // dense, "edp": 16 // expert} | fields)])
    return float(layer_activation_bytes(layer, TINY_LATENT, workload or workload_of(), layouts)[0])


@pytest.mark.parametrize("layer", WHOLE, ids=["dense", "moe", "latent"])
def test_everything_by_hand(layer):
    assert saved(layer) == WHOLE[layer]
    assert saved(layer, micro_batch=4) == 4 * WHOLE[layer]
    assert saved(layer, cp=4) == WHOLE[layer] / 4


@pytest.mark.parametrize("layer, module, less", REMOVED, ids=[f"{type(x.blocks[0]).__name__} {m}" for x, m, _ in REMOVED])
def test_what_a_module_removes(layer, module, less):
    assert saved(layer) - saved(layer, recompute=(module,)) == less


def test_modules_add_up():
    both = saved(LATENT_LAYER, recompute=("layernorm", "mla_up_proj", "moe_act"))
    assert both == WHOLE[LATENT_LAYER] - 4 * T * H - LATENT_UP - EXPERT_ACT
    # moe holds its activation and its shared experts, full holds everything.
    assert saved(MOE_LAYER, recompute=("moe", "moe_act", "shared_experts")) == saved(MOE_LAYER, recompute=("moe",))
    assert saved(MOE_LAYER, recompute=("full", "moe", "core_attn")) == saved(MOE_LAYER, recompute=("full",)) == 2 * T * H


def test_tensor_parallel_ranks_share_by_hand():
    # With sequence sharding everything is cut; without it norms are not.
    assert saved(DENSE_LAYER, tp=4, sequence_parallel=True) == WHOLE[DENSE_LAYER] / 4
    assert saved(DENSE_LAYER, tp=4) == 2 * NORMS + (WHOLE[DENSE_LAYER] - 2 * NORMS) / 4
    assert saved(MOE_LAYER, tp=4, sequence_parallel=True) == WHOLE[MOE_LAYER] / 4
    # Two ranks that share an expert hold the rows of both, each with half of the expert's width.
    rows = DISPATCHED
    assert saved(MOE_LAYER, etp=2) == WHOLE[MOE_LAYER] + rows
    # Expert parallelism moves rows, on average as many as it takes.
    assert saved(MOE_LAYER, ep=8) == WHOLE[MOE_LAYER]


def test_quantised_inputs_are_narrower_by_hand():
    fp8 = workload_of(precision=load_precision("fp8-delayed"))
    # One byte for norm outputs and activations; attention's output in bf16 for its backward and in FP8 for the projection.
    norms, core = 2 * (2 + 1) * T * H, (2 + 1) * T * 128 + 4 * T * 8
    assert saved(DENSE_LAYER, fp8) == norms + QKV + core + FC1 + ACT / 2
    experts = 1 * ROWS * H + EXPERT_FC1 + EXPERT_ACT / 2 + ROUTER + (4 + 1) * T * 64
    assert saved(MOE_LAYER, fp8) == norms + QKV + core + experts


def test_variants_of_blocks_by_hand():
    plain = Layer(blocks=(Mlp(width=256, gated=False),))
    assert saved(plain) == NORMS + (2 + 2) * T * 256
    gated = Layer(blocks=(dataclasses.replace(ATTENTION, gate=True),))
    assert saved(gated) == NORMS + QKV + CORE + 2 * T * 128
    narrow = Layer(blocks=(Attention(heads=8, kv_heads=4, head_dim=16, v_head_dim=8),))
    assert saved(narrow) == NORMS + 2 * T * (128 + 4 * 24) + 2 * T * 64 + 4 * T * 8
    # Norms of queries (8 heads of 16) and keys (4) keep their inputs.
    normed = Layer(blocks=(dataclasses.replace(ATTENTION, qk_norm="head"),))
    assert saved(normed) == NORMS + QKV + CORE + 2 * T * (128 + 64)
    # Mamba-2 projects to 128 + 2 x 8 x 16 mixed channels, a gate of 128 and 8 steps; then the scan's output of 128, gated,
    # normed.
    assert saved(Layer(blocks=SCAN_LAYER.blocks[:1])) == NORMS + (2 * (128 + 256 + 128 + 8) + 3 * 2 * 128) * T


def test_operations_recomputed_one_by_one_by_hand():
    # Input; query, value, attention and its log-sum-exp; gate and down projection: every second matrix product.
    eager = workload_of(era=load_era("pytorch-eager"))
    outputs = 2 * T * H + 2 * T * (128 + 64 + 128) + 4 * T * 8 + 2 * T * (256 + H)
    assert saved(DENSE_LAYER, eager, recompute=("core_attn",)) == outputs
    assert saved(DENSE_LAYER, eager) == WHOLE[DENSE_LAYER]
    assert saved(DENSE_LAYER, eager, recompute=("full",)) == 2 * T * H
    # Under tensor parallelism a whole layer holds the gathered inputs of its two parts: 3/4 of them came from other ranks.
    layouts = Layouts.of([Layout(tp=4, dp=4, edp=16, sequence_parallel=True)])
    assert gathered_input_bytes(TINY_LATENT, eager, layouts)[0] == 2 * 2 * T * H * 3 / 4
    assert gathered_input_bytes(TINY_LATENT, workload_of(), layouts)[0] == 0.0


def test_rows_after_dispatch():
    layouts = Layouts.of([Layout(tp=2, dp=8, etp=2, edp=8, sequence_parallel=True)])
    # 128 tokens a rank, two experts each, two ranks to an expert.
    assert routed_rows(MOE, workload_of(), layouts)[0] == 128 * 2 * 2
    assert routed_rows(MOE, workload_of(imbalance=1.5), layouts)[0] == 1.5 * 128 * 2 * 2
    assert routed_rows(MOE, workload_of(capacity_factor=1.25), layouts)[0] == 1.25 * 128 * 2 * 2
    idle = dataclasses.replace(MOE, zero_experts=8)
    assert routed_rows(idle, workload_of(), layouts)[0] == 128 * 2  # half of the choices compute nothing


def test_tokens_and_shards():
    layouts = Layouts.of([Layout(tp=4, cp=2, edp=8, micro_batch=3), Layout(tp=4, sequence_parallel=True, edp=4)])
    assert rank_tokens(workload_of(), layouts).tolist() == [3 * 256 / 2, 256]
    assert shard(layouts).tolist() == [1, 4]
    assert [separate_norm(b) for b in (ATTENTION, LATENT, MLP, MOE)] == [False, True, False, True]


# ---------------------------------------------------------------- laws

MODULES = st.sets(st.sampled_from(RECOMPUTE_MODULES))


@given(row=layouts_of(TINY_LATENT), some=MODULES, more=MODULES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: type(x.blocks[0]).__name__ + type(x.blocks[-1]).__name__)
@settings(max_examples=25, deadline=None)
def test_recompute_never_keeps_more(layer, row, some, more):
    rows = [dataclasses.replace(row, recompute=tuple(m)) for m in (set(), some, some | more, {"full"})]
    none, few, many, full = layer_activation_bytes(layer, TINY_LATENT, workload_of(), Layouts.of(rows)).tolist()
    assert none >= few >= many >= full > 0


@given(row=layouts_of(TINY_LATENT, micro_batch=1))
@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: type(x.blocks[0]).__name__ + type(x.blocks[-1]).__name__)
@settings(max_examples=25, deadline=None)
def test_bytes_go_with_tokens(layer, row):
    rows = [dataclasses.replace(row, micro_batch=m) for m in (1, 2, 4)]
    one, two, four = layer_activation_bytes(layer, TINY_LATENT, workload_of(), Layouts.of(rows))
    assert (two, four) == pytest.approx((2 * one, 4 * one))
    longer = layer_activation_bytes(layer, TINY_LATENT, workload_of(seq_len=512), Layouts.of(rows[:1]))[0]
    assert longer == pytest.approx(2 * one)


@given(rows=st.lists(layouts_of(TINY_LATENT), min_size=1, max_size=6))
@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: type(x.blocks[0]).__name__ + type(x.blocks[-1]).__name__)
@settings(max_examples=20, deadline=None)
def test_arrays_equal_numbers(layer, rows):
    together = layer_activation_bytes(layer, TINY_LATENT, workload_of(), Layouts.of(rows))
    single = [layer_activation_bytes(layer, TINY_LATENT, workload_of(), Layouts.of([row])) for row in rows]
    assert together.tolist() == pytest.approx(np.concatenate(single).tolist(), rel=1e-12)


@given(row=layouts_of(TINY_LATENT, tp=1))
@QUICK
def test_more_tensor_parallel_ranks_keep_no_more(row):
    last = np.inf
    for tp in (1, 2, 4, 8):
        wide = dataclasses.replace(row, tp=tp, dp=row.dp * tp, edp=row.edp * tp * tp, sequence_parallel=tp > 1)
        kept = float(layer_activation_bytes(LATENT_LAYER, TINY_LATENT, workload_of(), Layouts.of([wide]))[0])
        assert kept < last
        last = kept
