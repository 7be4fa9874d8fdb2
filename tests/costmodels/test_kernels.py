"""Device time of a block: by hand with round rates, FLOP against the model's own count, laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from moeplan.costmodels.counts import Shard, Weight, attention_flops_per_token, layer_weights
from moeplan.costmodels.kernels import PassTimes, dense_gemm_s, dense_times, routed_times
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import LinearAttention, Mamba
from moeplan.costmodels.workload import load_era, load_precision
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import (
    ATTENTION,
    LATENT,
    MLP,
    MOE,
    NODE,
    PLAIN,
    TINY_DENSE,
    TINY_LATENT,
    TINY_MOE,
    layouts_of,
    workload_of,
)

QUICK = settings(max_examples=40, deadline=None)
WORKLOAD = workload_of()
TOKENS, HIDDEN = 256, 128
FLOP_S = 1e-15
"""Seconds of a FLOP of a GEMM under the plain profile in a step; attention takes twice as long, a byte 1e-12."""
MIXERS = [
    ATTENTION,
    LATENT,
    LinearAttention(variant="gdn", key_heads=8, value_heads=8, key_dim=16, value_dim=16, conv=4),
    Mamba(version=2, inner=128, state=16, heads=8, groups=8),
]


def one(**fields):
    """Columns of one layout over 16 ranks, data-parallel for what is not said."""
    dense = fields.get("tp", 1) * fields.get("cp", 1)
    expert = fields.get("ep", 1) * fields.get("etp", 1)
    return Layouts.of([Layout(**{"dp": 16 // dense, "edp": 16 // expert} | fields)])


def numbers(times):
    """Forward and backward seconds by part."""
    return {name: (float(np.ravel(times.forward[name])[0]), float(np.ravel(times.backward[name])[0])) for name in times.forward}


def dense(block, layouts, profile=PLAIN, workload=WORKLOAD):
    return numbers(dense_times(block, TINY_MOE, profile, workload, layouts))


def routed(block, layouts, profile=PLAIN, workload=WORKLOAD):
    return numbers(routed_times(block, TINY_MOE, profile, workload, layouts))


# ---------------------------------------------------------------- by hand

# How a weight of 384 x 128 is cut: fields of the layout, FLOP of its forward product for 256 tokens.
PRODUCTS = [
    (Shard.COLUMN, {}, 2 * 256 * 384 * 128),
    (Shard.COLUMN, {"tp": 4}, 2 * 256 * (384 / 4) * 128),
    (Shard.ROW, {"tp": 4}, 2 * 256 * 384 * (128 / 4)),
    (Shard.REPLICATED, {"tp": 4}, 2 * 256 * 384 * 128),
    (Shard.REPLICATED, {"tp": 4, "sequence_parallel": True}, 2 * (256 / 4) * 384 * 128),
]


@pytest.mark.parametrize("cut, fields, flop", PRODUCTS)
def test_products_of_a_weight_by_hand(cut, fields, flop):
    forward, backward = dense_gemm_s(Weight("w", 384, 128, cut), 256.0, PLAIN, "bf16", one(**fields))
    assert forward[0] == pytest.approx(flop * FLOP_S)
    assert backward[0] == pytest.approx(2 * flop * FLOP_S)


def test_mlp_by_hand():
    times = dense(MLP, one())
    # Three matrices of 128 x 256. Norm and residual: 10 bytes a hidden element; gated activation: 6 bytes a hidden unit.
    product = 2 * TOKENS * 3 * 128 * 256 * FLOP_S
    traffic = TOKENS * (10 * HIDDEN + 6 * 256) * 1e-12
    assert times["MLP GEMM"] == pytest.approx((product, 2 * product))
    assert times["norms and activations"] == pytest.approx((traffic, 1.5 * traffic))
    assert set(times) == {"MLP GEMM", "norms and activations"}
    # Four ranks share the hidden units; with sequence sharding the norms as well.
    cut = dense(MLP, one(tp=4, sequence_parallel=True))
    assert cut["MLP GEMM"] == pytest.approx((product / 4, product / 2))
    assert cut["norms and activations"][0] == pytest.approx(traffic / 4)
    assert dense(MLP, one(tp=4))["norms and activations"][0] == pytest.approx(TOKENS * (10 * HIDDEN + 6 * 256 / 4) * 1e-12)


def test_attention_by_hand():
    times = dense(ATTENTION, one(tp=2, micro_batch=2))
    # Query 128, key and value 4 x 16 each, output 128 elements, over two ranks; two sequences of 256 tokens.
    product = 2 * 2 * TOKENS * 128 * (128 + 64 + 64 + 128) / 2 * FLOP_S
    # Scores and values: 2 x 8 heads x (16 + 16) x 128 keys on average, at half the rate; the backward takes three times that.
    core = 2 * TOKENS * 2 * 8 * 32 * 128 / 2 * 2 * FLOP_S
    assert times["attention GEMM"] == pytest.approx((product, 2 * product))
    assert times["attention core"] == pytest.approx((core, 3 * core))
    # Norms are not cut without sequence sharding; rotary embedding of 128 + 128 elements with 6 bytes each is.
    traffic = 2 * TOKENS * (10 * HIDDEN + 6 * 256 / 2) * 1e-12
    assert times["norms and activations"][0] == pytest.approx(traffic)


def test_a_context_parallel_rank_sees_all_keys():
    whole, shared = dense(ATTENTION, one()), dense(ATTENTION, one(cp=4))
    for part in whole:
        assert shared[part] == pytest.approx(tuple(t / 4 for t in whole[part]))


def test_experts_by_hand():
    times = routed(MOE, one(ep=4, dispatcher="alltoall"))
    rows = TOKENS * 2
    # Matrices of 128 x 128 (gate and up) and 64 x 128 for every row.
    product = 2 * rows * (128 * 128 + 64 * 128) * FLOP_S
    assert times["expert GEMM"] == pytest.approx((product, 2 * product))
    # 9.4 passes over the rows in bf16; the fused dispatchers leave half of them.
    assert times["permute"] == pytest.approx((9.4 * 2 * rows * HIDDEN * 1e-12, 14.1 * 2 * rows * HIDDEN * 1e-12))
    assert routed(MOE, one(ep=4, dispatcher="deepep"))["permute"][0] == pytest.approx(4.7 * 2 * rows * HIDDEN * 1e-12)
    assert times["expert activation"] == pytest.approx((6 * rows * 64 * 1e-12, 9 * rows * 64 * 1e-12))
    # The router: a product with 8 outputs, and 48 bytes a score.
    router, scores = 2 * TOKENS * 128 * 8 * FLOP_S, 48 * 8 * TOKENS * 1e-12
    assert times["router"] == pytest.approx((router + scores, 2 * router + scores / 2))
    assert set(times) == {"expert GEMM", "permute", "expert activation", "router"}


def test_state_scan_by_hand():
    # Mamba-2 projects to 520 channels (see activations), passed over 13 times in bf16; 6 FLOP for each of 128 x 16 states,
    # which take as long as attention's.
    times = dense(MIXERS[3], one())
    moved, flop = 13 * 2 * 520 * TOKENS * 1e-12, 6 * 128 * 16 * TOKENS / 0.5e15
    assert times["state scan"] == pytest.approx((moved + flop, 2 * (moved + flop)))
    # In: 520 x 128, out: 128 x 128.
    product = 2 * TOKENS * (520 * 128 + 128 * 128) * FLOP_S
    assert times["attention GEMM"] == pytest.approx((product, 2 * product))


def test_imbalance_and_padding_lengthen_expert_work_only():
    layouts = one(ep=4, dispatcher="alltoall")
    even, uneven = routed(MOE, layouts), routed(MOE, layouts, workload=workload_of(imbalance=1.5))
    padded = routed(MOE, layouts, workload=workload_of(capacity_factor=1.25))
    for part, times in even.items():
        factor, room = (1.0, 1.0) if part == "router" else (1.5, 1.25)
        assert uneven[part] == pytest.approx(tuple(factor * t for t in times)), part
        assert padded[part] == pytest.approx(tuple(room * t for t in times)), part


def test_latent_experts_work_on_narrow_rows():
    times = routed(dataclasses.replace(MOE, latent=32), one(ep=4, dispatcher="alltoall"))
    rows = TOKENS * 2
    assert times["expert GEMM"][0] == pytest.approx(2 * rows * (32 * 128 + 64 * 32) * FLOP_S)
    # Down and up projection of the rank's own tokens stand beside the router.
    assert times["router"][0] == pytest.approx(2 * TOKENS * (128 * 8 + 2 * 128 * 32) * FLOP_S + 48 * 8 * TOKENS * 1e-12)


def test_shared_experts_are_dense():
    times = dense(MOE, one(tp=2, sequence_parallel=True))
    product = 2 * TOKENS * 3 * 128 * 64 / 2 * FLOP_S
    assert times["MLP GEMM"] == pytest.approx((product, 2 * product))
    alone = dense(dataclasses.replace(MOE, shared_width=0), one())
    assert set(alone) == {"norms and activations"}


def test_quantised_products_are_faster_and_cost_casts():
    fp8 = workload_of(precision=load_precision("fp8-delayed"), seq_len=8192)
    big = dataclasses.replace(TINY_MOE, hidden=4096)
    block = dataclasses.replace(MLP, width=16384)
    slow = dense_times(block, big, NODE, workload_of(seq_len=8192), one(dp=16))
    fast = dense_times(block, big, NODE, fp8, one(dp=16))
    gain = slow.forward["MLP GEMM"][0] / fast.forward["MLP GEMM"][0]
    assert 1.3 < gain < 2.0  # less than the ratio of the peaks
    # Attention core and memory traffic are the same in both.
    assert fast.forward["norms and activations"][0] == slow.forward["norms and activations"][0]


# ---------------------------------------------------------------- FLOP against the count of the model


@pytest.mark.parametrize("model", [TINY_DENSE, TINY_MOE, TINY_LATENT], ids=lambda m: m.name)
@pytest.mark.parametrize("fields", [{}, {"tp": 4, "sequence_parallel": True, "ep": 8}, {"cp": 2, "etp": 2, "ep": 2}], ids=str)
def test_work_of_all_ranks_is_that_of_the_model(model, fields):
    fields = fields if model.moe else {k: v for k, v in fields.items() if k not in ("ep", "etp")}
    layouts = one(**fields, dispatcher="alltoall" if model.moe else "none")
    for kind in model.kinds:
        done = {"product": 0.0, "core": 0.0}
        for block in kind.blocks:
            times = dense(block, layouts)
            if block is MOE:
                times |= routed(block, layouts)
                scores = 48 * 8 * TOKENS * 1e-12 * (1.5 / layouts.cp[0] / (fields.get("tp", 1)))
                times["router"] = (times["router"][0] + times["router"][1] - scores, 0.0)
            for part, (forward, backward) in times.items():
                if part.endswith("GEMM") or part == "router":
                    done["product"] += (forward + backward) / FLOP_S
                elif part == "attention core":
                    done["core"] += forward / FLOP_S / 2
        # A rank's share: cp ranks cut the tokens, tp ranks the rest.
        ranks = fields.get("cp", 1) * fields.get("tp", 1)
        weights = sum(w.out * w.inp * (w.used if w.shard.is_expert else 1) for w in layer_weights(kind, model) if w.gemm)
        assert done["product"] * ranks == pytest.approx(3 * 2 * weights * TOKENS)
        core = sum(attention_flops_per_token(b, 256) for b in kind.blocks)
        assert done["core"] * ranks == pytest.approx(core * TOKENS)


# ---------------------------------------------------------------- laws


@given(row=layouts_of(TINY_MOE, micro_batch=1))
@pytest.mark.parametrize("block", [*MIXERS, MLP, MOE], ids=lambda b: type(b).__name__)
@settings(max_examples=15, deadline=None)
def test_more_tokens_take_longer(block, row):
    less, more = (Layouts.of([dataclasses.replace(row, micro_batch=m)]) for m in (1, 2))
    for price in (dense, routed) if block is MOE else (dense,):
        before, after = price(block, less, NODE), price(block, more, NODE)
        assert all(after[part][way] > before[part][way] > 0.0 for part in before for way in (0, 1))


@pytest.mark.parametrize("block", [*MIXERS, MLP], ids=lambda b: type(b).__name__)
def test_tensor_parallelism_shortens_a_block_less_than_in_proportion(block):
    times = [dense(block, one(tp=tp, sequence_parallel=tp > 1), NODE, workload_of(seq_len=8192)) for tp in (1, 2, 4, 8)]
    total = [sum(f + b for f, b in t.values()) for t in times]
    for i in range(3):
        assert total[i] / 2 * (1 - 1e-12) <= total[i + 1] < total[i]


@given(rows=layouts_of(TINY_MOE).flatmap(lambda a: layouts_of(TINY_MOE).map(lambda b: [a, b, a])))
@pytest.mark.parametrize("block", [*MIXERS, MLP, MOE], ids=lambda b: type(b).__name__)
@settings(max_examples=15, deadline=None)
def test_arrays_equal_numbers(block, rows):
    layouts = Layouts.of(rows)
    for times, price in ((dense_times, dense), (routed_times, routed)) if block is MOE else ((dense_times, dense),):
        together = times(block, TINY_MOE, NODE, WORKLOAD, layouts)
        for i, row in enumerate(rows):
            alone = price(block, Layouts.of([row]), NODE)
            assert {n: float(np.broadcast_to(together.forward[n], 3)[i]) for n in alone} == pytest.approx(
                {n: forward for n, (forward, _) in alone.items()}, rel=1e-12
            )
            assert {n: float(np.broadcast_to(together.backward[n], 3)[i]) for n in alone} == pytest.approx(
                {n: backward for n, (_, backward) in alone.items()}, rel=1e-12
            )


@QUICK
@given(row=layouts_of(TINY_MOE))
def test_parts_merge(row):
    layouts = Layouts.of([row])
    merged = PassTimes()
    for block in (ATTENTION, MLP, MLP):
        merged.merge(dense_times(block, TINY_MOE, PLAIN, WORKLOAD, layouts))
    one_mlp, attention = dense(MLP, layouts), dense(ATTENTION, layouts)
    assert numbers(merged)["MLP GEMM"] == pytest.approx(tuple(2 * t for t in one_mlp["MLP GEMM"]))
    assert numbers(merged)["norms and activations"][0] == pytest.approx(
        attention["norms and activations"][0] + 2 * one_mlp["norms and activations"][0]
    )


# ---------------------------------------------------------------- other software


def software(**changes):
    return workload_of(era=dataclasses.replace(load_era("latest"), **changes))


def test_attention_that_keeps_its_scores_by_hand():
    times = dense_times(ATTENTION, TINY_DENSE, PLAIN, software(attention="unfused"), one())
    # Scores of all 256 keys (no causal half), as GEMMs; 13 bytes a score.
    products = 2 * TOKENS * 2 * 8 * 16 * 256 * FLOP_S
    scores = 13 * TOKENS * 256 * 8 * 1e-12
    assert float(np.ravel(times.forward["attention core"])[0]) == pytest.approx(products + scores)
    assert float(np.ravel(times.backward["attention core"])[0]) == pytest.approx(2 * (products + scores))


def test_flash_attention_2_is_slower_on_hopper_only():
    old, new = software(attention="fa2"), software()
    for cluster, slower in (("h100x8", True), ("b200x8", True), ("a100x8", False)):
        profile = nominal(load_cluster(cluster))
        core = [
            float(np.ravel(dense_times(ATTENTION, TINY_DENSE, profile, w, one()).forward["attention core"])[0])
            for w in (old, new)
        ]
        assert (core[0] > core[1]) is slower


def test_eager_modules_move_more():
    plain, eager = (dense_times(MLP, TINY_DENSE, PLAIN, w, one()).forward for w in (software(), software(traffic=2.0)))
    assert float(np.ravel(eager["norms and activations"])[0]) == pytest.approx(
        2 * float(np.ravel(plain["norms and activations"])[0])
    )
    assert eager["MLP GEMM"] == pytest.approx(plain["MLP GEMM"])


def test_packed_documents_shorten_attention_alone():
    whole, packed = (dense_times(ATTENTION, TINY_DENSE, PLAIN, workload_of(document_len=n), one()).forward for n in (0, 64))
    assert float(np.ravel(packed["attention core"])[0]) == pytest.approx(float(np.ravel(whole["attention core"])[0]) / 4)
    assert packed["attention GEMM"] == pytest.approx(whole["attention GEMM"])


def test_sustained_shares_slow_their_own_kernels():
    slow = dataclasses.replace(PLAIN, sustained={"bf16": 0.5, "attention": 0.25})
    plain, slower = (dense_times(ATTENTION, TINY_DENSE, p, workload_of(), one()).forward for p in (PLAIN, slow))
    ratio = {name: float(np.ravel(slower[name])[0] / np.ravel(plain[name])[0]) for name in plain}
    assert ratio == pytest.approx({"attention GEMM": 2.0, "attention core": 4.0, "norms and activations": 1.0})


def test_experts_with_biases_by_hand():
    plain, biased = (routed_times(m, TINY_MOE, PLAIN, workload_of(), one(ep=4, dispatcher="alltoall")) for m in (
        MOE, dataclasses.replace(MOE, bias=True)))  # fmt: skip
    elements = TOKENS * 2 * HIDDEN
    for way, each in ((0, 28), (1, 36)):
        times = [(t.forward, t.backward)[way]["expert activation"] for t in (plain, biased)]
        assert float(np.ravel(times[1] - times[0])[0]) == pytest.approx(each * elements * 1e-12)
