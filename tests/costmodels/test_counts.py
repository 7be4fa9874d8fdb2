"""Counts: hand-made cases, independent twins, FLOP as published sources count them, laws."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.counts import (
    Shard,
    attention_flops_per_token,
    block_weights,
    flops_per_token,
    layer_weights,
    mean_keys,
    parameter_count,
)
from moeplan.costmodels.model import (
    Attention,
    Compression,
    LatentAttention,
    Layer,
    LinearAttention,
    Mamba,
    Mlp,
    Model,
    Moe,
)
from moeplan.costmodels.model_catalog import load_model, model_names

# GFLOP per token of training: model, sequence, causal attention counted once, causal attention counted in full.
PUBLISHED_FLOPS = [
    ("llama3-70b", 8192, 449.2, 481.4),
    ("llama3.1-405b", 8192, 2524.0, 2625.4),
    ("llama3-8b", 8192, 51.5, 57.9),
    ("qwen3-30b-a3b", 4096, 23.1, 27.9),
    ("qwen3-235b-a22b", 4096, 148.3, 167.3),
    ("qwen3-235b-a22b", 131072, 735, 1341),
    ("deepseek-v3", 4096, 260.6, 291.8),
]


def digits(value):
    """Half of the last digit shown."""
    return 0.051 if isinstance(value, float) else 0.51


@pytest.mark.parametrize("name, seq_len, causal, full", PUBLISHED_FLOPS)
def test_flops_as_published(name, seq_len, causal, full):
    model = load_model(name)
    assert flops_per_token(model, seq_len) / 1e9 == pytest.approx(causal, abs=digits(causal))
    assert flops_per_token(model, seq_len, causal=False) / 1e9 == pytest.approx(full, abs=digits(full))


def test_flops_without_prediction_layers():
    model = load_model("deepseek-v3")
    assert flops_per_token(model, 4096, mtp=False) / 1e9 == pytest.approx(250.4, abs=0.051)
    assert flops_per_token(model, 4096, causal=False, mtp=False) / 1e9 == pytest.approx(281.2, abs=0.051)


@pytest.mark.parametrize("name, seq_len, published", [("gpt-oss-120b", 4096, 32.6), ("deepseek-v4-flash", 4096, 90.8)])
def test_flops_of_windowed_and_compressed_attention(name, seq_len, published):
    # The sources' own counts are not spelt out; 0.5 % allows for their treatment of the first, short windows.
    assert flops_per_token(load_model(name), seq_len) / 1e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", [n for n in model_names() if n.startswith("gpt-") and "oss" not in n])
def test_gpt_totals_against_the_closed_form(name):
    # arXiv:2104.04473, equation 2: P = 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)), less the final norm of 2 h.
    model = load_model(name)
    layers, h = len(model.layers), model.hidden
    closed = 12 * layers * h * h + 13 * layers * h + (model.vocab + model.max_positions) * h
    assert parameter_count(model).total == closed + 2 * h


def test_mixtral_by_hand():
    count = parameter_count(load_model("mixtral-8x7b"))
    h, width, vocab, layers = 4096, 14336, 32000, 32
    rest = layers * (h * h * 2 + h * 1024 * 2 + 8 * h + 2 * h) + h + 2 * vocab * h
    assert count.routed == layers * 8 * 3 * h * width
    assert count.total == count.routed + rest
    assert count.active == layers * 2 * 3 * h * width + rest
    assert count.active - count.active_without_embedding == vocab * h


def test_prediction_layers_are_counted_apart():
    with_mtp = load_model("deepseek-v3")
    without = dataclasses.replace(with_mtp, mtp=())
    count = parameter_count(with_mtp)
    layer = sum(w.size for w in layer_weights(with_mtp.layers[-1], with_mtp))
    assert count.mtp == layer + 2 * 7168 * 7168 + 3 * 7168
    assert dataclasses.replace(count, mtp=0) == parameter_count(without)
    repeated = dataclasses.replace(with_mtp, mtp=with_mtp.mtp * 2, mtp_shared=True)
    assert parameter_count(repeated) == count
    assert flops_per_token(repeated, 4096) > flops_per_token(with_mtp, 4096)


BLOCKS = [
    (Attention(heads=4, kv_heads=2, head_dim=8, v_head_dim=8), 64 * 32 * 2 + 64 * 16 * 2),
    (Attention(heads=4, kv_heads=4, head_dim=16, v_head_dim=16, qkv_bias=True, out_bias=True), 4 * 64 * 64 + 4 * 64),
    (Attention(heads=4, kv_heads=2, head_dim=8, v_head_dim=4, sinks=True), 64 * (32 + 16 + 8 + 16) + 4),
    (Attention(heads=4, kv_heads=2, head_dim=8, v_head_dim=8, qk_norm="head", gate=True), 64 * (32 * 3 + 32) + 16),
    (Attention(heads=4, kv_heads=2, head_dim=8, v_head_dim=8, qk_norm="full", head_gate=True), 64 * (96 + 4) + 48),
    (
        LatentAttention(heads=4, q_rank=0, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8),
        64 * 48 + 64 * 20 + 16 + 16 * 64 + 32 * 64,
    ),
    (
        LatentAttention(heads=4, q_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8, head_gate=True),
        64 * 24 + 24 + 24 * 48 + 64 * 20 + 16 + 16 * 64 + 32 * 64 + 4 * 64,
    ),
    (
        LinearAttention(variant="gdn", key_heads=2, value_heads=4, key_dim=8, value_dim=8, conv=4),
        64 * (16 * 2 + 32 * 2) + 64 * 8 + 64 * 4 + 8 + 8 + 64 * 32,
    ),
    (
        LinearAttention(variant="kda", key_heads=4, value_heads=4, key_dim=8, value_dim=8, conv=4, full_rank=True),
        64 * 96 + 96 * 4 + 36 + 64 * 64 + 64 * 4 + 8 + 64 * 32,
    ),
    (
        LinearAttention(variant="lightning", key_heads=4, value_heads=4, key_dim=8, value_dim=8),
        64 * 96 + 64 * 32 + 32 + 64 * 32,
    ),
    (Mamba(version=2, inner=128, state=16, heads=8, groups=2), 64 * (320 + 8) + 192 * 5 + 24 + 128 + 64 * 128),
    (
        Mamba(version=1, inner=128, state=16, dt_rank=4),
        64 * 256 + 128 * 5 + 36 * 128 + 128 * 4 + 128 * 18 + 36 + 64 * 128,
    ),
    (Mlp(width=96), 3 * 64 * 96),
    (Mlp(width=96, gated=False, bias=True), 2 * 64 * 96 + 96 + 64),
    (Moe(experts=8, topk=2, width=32), 64 * 8 + 8 * 3 * 64 * 32),
    (Moe(experts=8, topk=2, width=32, shared_width=16, shared_gate=True), 64 * 8 + 8 * 3 * 64 * 32 + 3 * 64 * 16 + 64),
    (
        Moe(experts=8, topk=2, width=32, bias=True, router_bias=True, expert_bias=True),
        64 * 8 + 8 + 8 * (3 * 64 * 32 + 64 + 64),
    ),
    (Moe(experts=8, topk=2, width=32, latent=16, gated=False), 64 * 8 + 8 * 2 * 16 * 32 + 2 * 64 * 16),
]


@pytest.mark.parametrize("block, expected", BLOCKS)
def test_parameters_of_one_block_by_hand(block, expected):
    assert sum(w.size for w in block_weights(block, 64)) == expected


def test_zero_experts_take_their_share_of_the_tokens():
    plain, half = Moe(experts=8, topk=4, width=32), Moe(experts=8, topk=4, width=32, zero_experts=8)
    used = [next(w.used for w in block_weights(b, 64) if w.shard is Shard.EXPERT_COLUMN) for b in (plain, half)]
    assert used == [4, 2]


def test_mean_keys_of_a_causal_window_is_the_mean_over_queries():
    block = Attention(heads=4, kv_heads=2, head_dim=8, v_head_dim=8, window=100)
    exact = sum(min(i, 100) for i in range(1000)) / 1000
    assert mean_keys(block, 1000) == pytest.approx(exact, rel=0.01)
    assert mean_keys(block, 50) == 25
    assert mean_keys(block, 1000, causal=False) == 100


def test_compressed_attention_sees_a_window_and_compressed_keys():
    heavy = LatentAttention(
        heads=8,
        q_rank=16,
        kv_rank=32,
        nope_dim=24,
        rope_dim=8,
        v_dim=32,
        compression=Compression(window=128, rate=128, out_groups=2, out_rank=16),
    )
    window = 128 - 128**2 / (2 * 4096)
    assert mean_keys(heavy, 4096) == window + 4096 / 128 / 2
    near = dataclasses.replace(heavy, compression=dataclasses.replace(heavy.compression, rate=0))
    assert mean_keys(near, 4096) == window
    sparse = dataclasses.replace(
        heavy,
        index_heads=4,
        index_dim=8,
        index_topk=512,
        compression=dataclasses.replace(heavy.compression, rate=4),
    )
    assert mean_keys(sparse, 4096) == window + 512 - 512**2 / (2 * 1024)
    # The indexer scores every compressed key.
    core = attention_flops_per_token(dataclasses.replace(sparse, index_heads=0), 4096)
    assert attention_flops_per_token(sparse, 4096) - core == 2 * 4 * 8 * 512


def test_hyper_connections_cost_what_their_streams_need():
    layer = Layer(blocks=(Mlp(width=96), Mlp(width=96)))
    one = Model(name="x", hidden=64, vocab=100, layers=(layer,) * 3)
    four = dataclasses.replace(one, streams=4)
    a_block = 24 * 4 * 64 + 24 + 3
    assert parameter_count(four).total - parameter_count(one).total == 3 * 2 * a_block + 4 * 4 * 64 + 4 + 1


@pytest.mark.parametrize("name", model_names())
def test_totals_are_consistent(name):
    model = load_model(name)
    count = parameter_count(model)
    assert 0 < count.active_without_embedding <= count.active <= count.total
    assert (count.routed > 0) == (model.moe is not None)
    assert count.routed < count.total
    assert all(w.size > 0 for kind in model.kinds for w in layer_weights(kind, model))
    # Forward and backward pass every active matmul weight three times, two FLOP each.
    assert flops_per_token(model, 1, mtp=False) >= 0.9 * 6 * (count.active_without_embedding - 2048 * model.hidden)


@given(st.integers(1, 6), st.integers(1, 64), st.integers(1, 8))
def test_counts_do_not_depend_on_the_order_of_layers(layers, width, kv_heads):
    attention = Attention(heads=8 * kv_heads, kv_heads=kv_heads, head_dim=4, v_head_dim=4)
    dense = Layer(blocks=(attention, Mlp(width=width)))
    sparse = Layer(blocks=(attention, Moe(experts=4, topk=2, width=width)))
    order = (dense,) * layers + (sparse,) * layers
    model = Model(name="x", hidden=32, vocab=64, layers=order)
    mixed = dataclasses.replace(model, layers=(dense, sparse) * layers)
    assert parameter_count(model) == parameter_count(mixed)
    assert flops_per_token(model, 128) == pytest.approx(flops_per_token(mixed, 128))


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(0, 4096))
def test_longer_sequences_and_wider_windows_see_more_keys(a, b, window):
    block = Attention(heads=4, kv_heads=2, head_dim=8, v_head_dim=8, window=window)
    short, long = sorted((a, b))
    assert mean_keys(block, short) <= mean_keys(block, long) <= mean_keys(block, long, causal=False)
    if window:
        assert mean_keys(block, long) <= mean_keys(dataclasses.replace(block, window=window + 1), long) <= long / 2
