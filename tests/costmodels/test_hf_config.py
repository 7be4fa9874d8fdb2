"""Reading published configurations: rules for layers, traps, remarks, complaints."""

import re

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.hf_layers import KINDS
from moeplan.costmodels.model import Attention, LatentAttention, LinearAttention, Mamba, Mlp, Moe
from moeplan.errors import ModelError

TINY = {
    "model_type": "mixtral",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def tiny(**changes):
    """The tiny configuration with keys changed, and those given as Ellipsis removed."""
    return {k: v for k, v in {**TINY, **changes}.items() if v is not ...}


def read(**changes):
    return read_config(tiny(**changes), name="tiny")


# A real config.json says `q_lora_rank: null` for "no compression"; leaving the key out means the class default, 1536.
def test_null_means_none_and_absent_means_the_class_default():
    keys = {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
    }
    null = read_config({**keys, "q_lora_rank": None}, name="x")
    absent = read_config(keys, name="x")
    assert null.layers[0].blocks[0].q_rank == 0
    assert absent.layers[0].blocks[0].q_rank == 1536
    assert parameter_count(absent).total - parameter_count(null).total == 27 * (1536 * (2048 + 1 + 3072) - 3072 * 2048)


def test_null_heads_and_window():
    model = read(head_dim=None, sliding_window=None, num_key_value_heads=None)
    attention = model.layers[0].blocks[0]
    assert (attention.head_dim, attention.window, attention.kv_heads) == (16, 0, 4)


def test_class_default_of_a_head_size_is_not_the_quotient():
    assert read_config({"model_type": "qwen3", "hidden_size": 1024}, name="x").layers[0].blocks[0].head_dim == 128


def test_nested_text_configuration():
    inner = {k: v for k, v in TINY.items() if k != "model_type"}
    outer = {"model_type": "mixtral", "tie_word_embeddings": True, "text_config": inner, "vision_config": {"depth": 3}}
    nested = read_config(outer, name="tiny")
    assert nested == read(tie_word_embeddings=True)
    assert nested.config is outer
    twice = {"model_type": "any", "thinker_config": {"text_config": TINY}}
    assert read_config(twice, name="tiny").layers == read().layers


def letters(model):
    """One letter a layer and block: A attention, W windowed, L linear, S state space; d dense, e experts."""
    out = []
    for layer in model.layers:
        for block in layer.blocks:
            match block:
                case Attention() | LatentAttention():
                    out.append("W" if getattr(block, "window", 0) else "A")
                case LinearAttention():
                    out.append("L")
                case Mamba():
                    out.append("S")
                case Mlp():
                    out.append("d")
                case Moe():
                    out.append("e")
    return "".join(out)


GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_dt_rank": "auto"}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "AeAeAeAe"),
        ({"num_local_experts": 0}, "AdAdAdAd"),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, "AdAeAeAd"),
        ({"first_k_dense_replace": 3}, "AdAdAdAe"),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, "AdAdAeAd"),
        ({"moe_layer_freq": [0, 1, 1, 0]}, "AdAeAeAd"),
        ({"num_dense_layers": 2}, "AdAdAeAe"),
        ({"decoder_sparse_step": 2}, "AdAeAdAe"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}, "AdAeAdAe"),
        ({"moe_layers": [1]}, "AdAeAdAd"),
        ({"interleave_moe_layer_step": 4}, "AdAdAdAe"),
        ({"expert_layer_period": 2, "expert_layer_offset": 0}, "AeAdAeAd"),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1}, "AdAeAeAd"),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, "AdAeAeAe"),
        ({"sliding_window": 8}, "WeWeWeWe"),
        ({"sliding_window": 8, "use_sliding_window": False}, "AeAeAeAe"),
        ({"sliding_window": 8, "max_window_layers": 3}, "AeAeAeWe"),
        ({"sliding_window": 8, "sliding_window_pattern": 2}, "WeAeWeAe"),
        ({"sliding_window": 8, "sliding_window_pattern": "LLLG"}, "WeWeWeAe"),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "AeAeAeWe"),
        ({"sliding_window": 8, "hybrid_layer_pattern": [0, 1, 1, 0]}, "AeWeWeAe"),
        ({"attention_chunk_size": 8, "no_rope_layer_interval": 4}, "WeWeWeAe"),
        ({**GDN, "full_attention_interval": 4}, "LeLeLeAe"),
        ({**GDN, "layer_types": ["linear_attention", "full_attention"] * 2}, "LeAeLeAe"),
        ({"attn_type_list": [0, 0, 0, 1]}, "LeLeLeAe"),
        (
            {
                "linear_attn_config": {
                    "kda_layers": [1, 2, 4],
                    "num_heads": 2,
                    "head_dim": 8,
                    "short_conv_kernel_size": 4,
                }
            },
            "LeLeAeLe",
        ),
        ({**MAMBA, "attn_layer_period": 4, "attn_layer_offset": 1}, "SeAeSeSe"),
    ],
)
def test_which_block_stands_in_which_layer(changes, expected):
    assert letters(read(**changes)) == expected


def test_hybrids_with_one_block_a_layer():
    keys = {"model_type": "nemotron_h", "hidden_size": 64, "num_hidden_layers": 4}
    assert letters(read_config({**keys, "hybrid_override_pattern": "ME*-"}, name="x")) == "SeAd"
    words = ["mamba", "moe", "attention", "mlp"]
    assert letters(read_config({**keys, "layers_block_type": words}, name="x")) == "SeAd"
    # A pattern for more layers than the model has is cut, as for a truncated model.
    assert letters(read_config({**keys, "hybrid_override_pattern": "ME*-ME*-"}, name="x")) == "SeAd"
    with pytest.raises(ModelError, match="lists 2 layers, the model has 4"):
        read_config({**keys, "hybrid_override_pattern": "ME"}, name="x")


def test_shared_indexer_of_earlier_layers():
    model = read_config(
        {"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]},
        name="x",
    )
    assert [layer.blocks[0].index_heads for layer in model.layers] == [32, 0, 0, 32]
    assert {layer.blocks[0].index_topk for layer in model.layers} == {2048}


def test_sizes_by_layer():
    model = read(
        num_attention_heads_per_layer=[4, 4, 8, 8],
        head_dim=16,
        moe_intermediate_size=[32, 32, 32, 48],
        per_layer_config={"03": {"head_dim": 32}},
    )
    assert [layer.blocks[0].heads for layer in model.layers] == [4, 4, 8, 8]
    assert [layer.blocks[0].head_dim for layer in model.layers] == [16, 16, 16, 32]
    assert [layer.blocks[1].width for layer in model.layers] == [32, 32, 32, 48]
    assert len(model.kinds) == 3


def test_double_layers_and_residual_blocks():
    longcat = read_config({"model_type": "longcat_flash", "num_layers": 1}, name="x")
    assert letters(longcat) == "AdAde"
    assert longcat.moe.active_experts == 12 * 512 / 768
    arctic = read_config({**TINY, "model_type": "arctic"}, name="x")
    assert [type(b) for b in arctic.layers[0].blocks] == [Attention, Mlp, Moe]
    assert arctic.layers[0].blocks[1].width == arctic.hidden


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"model_type": "mixtral"}, ("softmax", False, False, 0, 1.0)),
        ({"model_type": "deepseek_v3"}, ("sigmoid", False, True, 8, 2.5)),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, ("sigmoid", False, False, 0, 2.5)),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 6}, ("softmax", True, False, 0, 1.0)),
        ({"model_type": "qwen3_moe"}, ("softmax", True, False, 0, 1.0)),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True}, ("softmax", False, False, 0, 1.0)),
        ({"model_type": "llama4_text"}, ("sigmoid", False, False, 0, 1.0)),
        ({"model_type": "longcat_flash"}, ("softmax", True, True, 0, 6.0)),
        ({"model_type": "deepseek_v4"}, ("sqrtsoftplus", False, True, 0, 1.5)),
        ({"model_type": "mixtral", "num_experts_per_tok": 1}, ("softmax", True, False, 0, 1.0)),
    ],
)
def test_router(keys, expected):
    moe = read_config(keys, name="x").moe
    assert (moe.score, moe.pre_softmax, moe.expert_bias, moe.groups, moe.scaling) == expected


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"model_type": "llama"}, ("rmsnorm", "silu", "rope", False, 1.0)),
        ({"model_type": "gpt2"}, ("layernorm", "gelu", "learned", True, 1.0)),
        ({"model_type": "mpt"}, ("layernorm", "gelu", "alibi", True, 1.0)),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, ("layernorm", "gelu", "learned", True, 1.0)),
        ({"model_type": "nemotron"}, ("layernorm", "relu2", "rope", False, 0.5)),
        ({"model_type": "nemotron_h"}, ("rmsnorm", "relu2", "none", False, 1.0)),
        ({"model_type": "gpt_oss"}, ("rmsnorm", "swigluoai", "rope", False, 1.0)),
        ({"model_type": "minimax_m3_vl_text"}, ("rmsnorm", "swigluoai", "rope", False, 0.5)),
        ({"model_type": "gemma2"}, ("rmsnorm", "gelu", "rope", True, 1.0)),
        ({"model_type": "jamba"}, ("rmsnorm", "silu", "none", False, 1.0)),
    ],
)
def test_what_surrounds_the_blocks(keys, expected):
    model = read_config(keys, name="x")
    assert (model.norm, model.activation, model.position, model.tied, model.rope_fraction) == expected


def test_biases_of_projections():
    def biases(**keys):
        block = read_config(keys, name="x").layers[0].blocks[0]
        return block.qkv_bias, block.out_bias

    assert biases(model_type="llama", attention_bias=True) == (True, True)
    assert biases(model_type="qwen2") == (True, False)
    assert biases(model_type="glm4_moe", attention_bias=True) == (True, False)
    assert biases(model_type="mpt") == (False, False)
    assert biases(model_type="mpt", no_bias=False) == (True, True)


def test_prediction_layers():
    model = read(num_nextn_predict_layers=2, first_k_dense_replace=1)
    assert model.mtp == (model.layers[-1],) * 2
    hybrid = read_config(
        {"model_type": "nemotron_h", "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}, name="x"
    )
    assert [type(b) for b in hybrid.mtp[0].blocks] == [Attention, Moe]
    assert read().mtp == ()


def test_rope_in_both_spellings():
    assert read(rope_theta=5e5).rope_base == read(rope_parameters={"rope_theta": 5e5}).rope_base == 5e5
    assert read(rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 0.5}, rope_theta=...).rope_fraction == 0.5


def test_unknown_family_is_read_by_the_usual_names_with_a_remark():
    model = read(model_type="brand_new")
    assert model.layers == read().layers
    assert "'brand_new' is not in the catalog" in model.remarks[0]
    assert "softmax router" in model.remarks[0]
    assert "names no model_type" in read(model_type=...).remarks[0]
    assert read().remarks == ()


def test_remarks_name_what_was_assumed():
    assert "'telepathic' are read as full attention" in read(layer_types=["telepathic"] * 4).remarks[0]
    assert "activation 'sine'" in read(hidden_act="sine").remarks[0]
    assert "24 is taken" in read(hidden_size=124, num_attention_heads=5, num_key_value_heads=5).remarks[0]
    assert "gated norms" in read_config({"model_type": "axk2"}, name="x").remarks[0]
    assert "the first is used" in read(moe_intermediate_size=[32, 16]).remarks[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "new", "hidden_size": ...}, "no hidden size found .looked for 'hidden_size', 'd_model'"),
        ({"model_type": "new", "num_experts_per_tok": ...}, "no experts per token found .looked for 'num_exp"),
        ({"hidden_size": "64"}, "hidden size 'hidden_size' must be a positive whole number, found '64'"),
        ({"hidden_size": -64}, "must be a positive whole number, found -64"),
        ({"hidden_size": 64.5}, "found 64.5"),
        ({"hidden_size": True}, "found True"),
        ({"num_hidden_layers": 0}, "layers 'num_hidden_layers' must be a positive whole number, found 0"),
        ({"num_hidden_layers": 10**6}, "1000000 layers are more than the 10000"),
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1e.12, more than the 1000000000"),
        ({"num_local_experts": -1}, "experts 'num_local_experts'"),
        ({"num_experts_per_tok": 9}, "model 'tiny': mixture of experts: top-k 9 exceeds the 8 experts"),
        ({"num_key_value_heads": 3}, "model 'tiny': attention: 3 key/value heads do not divide 4 query heads"),
        ({"layer_types": ["full_attention"]}, "'layer_types' lists 1 layers, the model has 4"),
        ({"tie_word_embeddings": "yes"}, "tied 'tie_word_embeddings' must be true or false, found 'yes'"),
        ({"rms_norm_eps": "small"}, "norm eps 'rms_norm_eps' must be a positive number"),
        ({"rope_theta": float("nan")}, "must be a positive number"),
        ({"hidden_act": 3}, "activation 'hidden_act' must be a word, found 3"),
        ({"scoring_func": "dice"}, "unknown router score 'dice' .known: softmax"),
        ({"layer_types": ["linear_attention"] * 4}, "linear-attention layers, but no size of theirs"),
        ({"per_layer_config": [1]}, "'per_layer_config' must map layer numbers"),
        ({"sliding_window": [1, 2]}, "must be a whole number"),
    ],
)
def test_complaints(changes, message):
    with pytest.raises(ModelError, match=message):
        read(**changes)


def test_the_configuration_must_be_a_mapping():
    with pytest.raises(ModelError, match="must be a mapping of keys, found list"):
        read_config([1], name="x")  # type: ignore[arg-type]


def test_every_kind_of_block_can_be_read():
    assert {"full", "window", "linear", "sparse", "heavy", "moe", "dense"} == set(KINDS.values())
    assert all(re.fullmatch(r"[a-z_*ME-]+", word) for word in KINDS)
