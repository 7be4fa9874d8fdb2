"""The blocks of one layer of a published model: token mixers and feed-forward parts with their sizes.

Every function takes the configuration as that layer sees it (`Keys.at`). Which key carries which size is said in
`hf_keys.NAMES`, what no key says in `catalog/families.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeplan.costmodels.hf_keys import Keys
from moeplan.costmodels.model import (
    Attention,
    Block,
    Compression,
    LatentAttention,
    LinearAttention,
    Mamba,
    Mixer,
    Mlp,
    Moe,
)
from moeplan.errors import ModelError

_SCORES: dict[str, Any] = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrtsoftplus",
    "noaux_tc": "sigmoid",
}


def read_block(keys: Keys, kind: str) -> Block:
    """The block of a kind that `hf_layers` names, or "residual": an MLP as wide as the model (Arctic)."""
    if kind == "moe":
        return _moe(keys)
    if kind == "dense":
        return _mlp(keys, keys.size("dense_width", _width(keys)))
    if kind == "residual":
        return _mlp(keys, keys.size("hidden_size"))
    return _mixer(keys, kind)


def _mixer(keys: Keys, kind: str) -> Mixer:
    if kind == "linear":
        return _linear(keys)
    if keys.known("out_groups"):
        return _compressed(keys, kind)
    if keys.known("kv_rank"):
        return _latent(keys, kind)
    return _attention(keys, kind == "window")


def _attention(keys: Keys, window: bool) -> Attention:
    """Grouped-query attention; `own` reads a size of sliding layers, which some families give apart."""

    def own(meaning: str, size: int) -> int:
        return keys.size(f"window_{meaning}", size) if window else size

    heads = keys.size("heads")
    head_dim = own("head_dim", keys.size("head_dim", max(1, keys.size("hidden_size") // heads)))
    if not keys.known("head_dim") and keys.size("hidden_size") % heads:
        keys.remark(f"{heads} heads do not divide the hidden size and no head size is given: {head_dim} is taken")
    sinks = keys.text("sinks", "none")
    return Attention(
        heads=own("heads", heads),
        kv_heads=own("kv_heads", keys.size("kv_heads", heads)),
        head_dim=head_dim,
        v_head_dim=own("v_head_dim", keys.size("v_head_dim", head_dim)),
        window=keys.size("window") if window else 0,
        qkv_bias=keys.flag("qkv_bias"),
        out_bias=keys.flag("out_bias"),
        qk_norm=_qk_norm(keys),
        gate=keys.flag("attention_gate"),
        head_gate=keys.flag("head_gate"),
        sinks=sinks == "all" or (sinks == "window" and window),
    )


def _qk_norm(keys: Keys) -> Any:
    return keys.text("qk_norm_form", "head") if keys.flag("qk_norm") else "none"


def _latent(keys: Keys, kind: str) -> LatentAttention:
    # A sliding window is what a top-k of its size without an indexer is.
    topk = keys.size("window") if kind == "window" else keys.count("index_topk", 0)
    indexer = topk > 0 and kind == "full"
    return LatentAttention(
        heads=keys.size("heads"),
        q_rank=keys.count("q_rank", 0),
        kv_rank=keys.size("kv_rank"),
        nope_dim=keys.size("nope_dim"),
        rope_dim=keys.count("rope_dim"),
        v_dim=keys.size("v_dim"),
        qkv_bias=keys.flag("qkv_bias"),
        out_bias=keys.flag("out_bias"),
        index_heads=keys.size("index_heads") if indexer else 0,
        index_dim=keys.size("index_dim") if indexer else 0,
        index_topk=topk,
        head_gate=keys.flag("head_gate"),
        sinks=keys.text("sinks", "none") == "all",
    )


def _compressed(keys: Keys, kind: str) -> LatentAttention:
    """Attention of DeepSeek-V4: one key / value head as wide as a query head, compressed by `kind`."""
    head_dim, sparse = keys.size("head_dim"), kind == "sparse"
    rope_dim = keys.size("rope_dim", max(1, round(head_dim * keys.number("rope_fraction", 0.125))))
    return LatentAttention(
        heads=keys.size("heads"),
        q_rank=keys.size("q_rank"),
        kv_rank=head_dim,
        nope_dim=head_dim - rope_dim,
        rope_dim=rope_dim,
        v_dim=head_dim,
        index_heads=keys.size("index_heads") if sparse else 0,
        index_dim=keys.size("index_dim") if sparse else 0,
        index_topk=keys.size("index_topk") if sparse else 0,
        sinks=keys.text("sinks", "none") == "all",
        compression=Compression(
            window=keys.size("window"),
            rate=keys.size("sparse_rate") if sparse else keys.size("heavy_rate") if kind == "heavy" else 0,
            out_groups=keys.size("out_groups"),
            out_rank=keys.size("out_rank"),
        ),
    )


def _linear(keys: Keys) -> Mixer:
    for meaning, reader in _LINEAR:
        if keys.known(meaning):
            return reader(keys)
    tried = ", ".join(f"'{name}'" for meaning, _ in _LINEAR for name in keys.names(meaning))
    raise ModelError(f"{keys.where}: it has linear-attention layers, but no size of theirs", hint=f"looked for {tried}")


def _gdn(keys: Keys) -> LinearAttention:
    return LinearAttention(
        variant="gdn",
        key_heads=keys.size("gdn_key_heads"),
        value_heads=keys.size("gdn_value_heads"),
        key_dim=keys.size("gdn_key_dim"),
        value_dim=keys.size("gdn_value_dim"),
        conv=keys.size("linear_conv"),
    )


def _kda(keys: Keys) -> LinearAttention:
    heads, dim = keys.size("kda_heads"), keys.size("kda_dim")
    return LinearAttention(
        variant="kda",
        key_heads=heads,
        value_heads=heads,
        key_dim=dim,
        value_dim=dim,
        conv=keys.size("linear_conv"),
        full_rank=keys.flag("linear_full_rank"),
    )


def _lightning(keys: Keys) -> LinearAttention:
    heads = keys.size("heads")
    dim = keys.size("head_dim", max(1, keys.size("hidden_size") // heads))
    return LinearAttention(variant="lightning", key_heads=heads, value_heads=heads, key_dim=dim, value_dim=dim)


def _mamba2(keys: Keys) -> Mamba:
    heads = keys.size("mamba2_heads")
    return Mamba(
        version=2,
        inner=heads * keys.size("mamba2_head_dim"),
        state=keys.size("mamba_state"),
        heads=heads,
        groups=keys.size("mamba_groups"),
        conv=keys.size("mamba_conv", 4),
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("mamba_bias"),
        chunk=keys.size("mamba_chunk", 128),
    )


def _mamba1(keys: Keys) -> Mamba:
    hidden = keys.size("hidden_size")
    automatic = keys.find("mamba_dt_rank")[1] == "auto"
    return Mamba(
        version=1,
        inner=keys.size("mamba_expand", 2) * hidden,
        state=keys.size("mamba_state"),
        conv=keys.size("mamba_conv", 4),
        dt_rank=-(-hidden // 16) if automatic else keys.size("mamba_dt_rank"),
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("mamba_bias"),
    )


# The meaning whose presence tells the form, in the order to try, and how to read that form.
_LINEAR: tuple[tuple[str, Callable[[Keys], Mixer]], ...] = (
    ("gdn_value_heads", _gdn),
    ("kda_heads", _kda),
    ("mamba2_heads", _mamba2),
    ("mamba_dt_rank", _mamba1),
    ("lightning", _lightning),
)


def _width(keys: Keys) -> int:
    """The feed-forward width of a model that has a single one, or its ratio to the hidden size."""
    if keys.known("width") or not keys.known("width_ratio"):
        return keys.size("width")
    return keys.size("width_ratio") * keys.size("hidden_size")


def _mlp(keys: Keys, width: int) -> Mlp:
    return Mlp(width=width, gated=keys.flag("gated", True), bias=keys.flag("mlp_bias"))


def _moe(keys: Keys) -> Moe:
    width = keys.size("expert_width") if keys.known("expert_width") else _width(keys)
    score, topk = _score(keys), keys.size("experts_per_token")
    method = keys.text("topk_method", "")
    groups = 0 if method == "greedy" else keys.count("groups", 0)
    normalised = keys.flag("normalised", True)
    return Moe(
        experts=keys.size("experts"),
        topk=topk,
        width=width,
        gated=keys.flag("gated", True),
        shared_width=keys.count("shared_width", keys.count("shared_experts", 0) * width),
        shared_gate=keys.flag("shared_gate"),
        bias=keys.flag("expert_matrix_bias"),
        router_bias=keys.flag("router_bias"),
        expert_bias=method == "noaux_tc" if method else keys.flag("expert_bias"),
        expert_bias_is_parameter=keys.flag("expert_bias_is_parameter"),
        latent=keys.count("latent", 0),
        zero_experts=keys.count("zero_experts", 0),
        score=score,
        pre_softmax=score == "softmax" and (not normalised or topk == 1),
        groups=groups if groups > 1 else 0,
        group_topk=keys.count("group_topk", 0) if groups > 1 else 0,
        scaling=keys.number("scaling", 1.0),
    )


def _score(keys: Keys) -> Any:
    score = keys.text("score", "softmax")
    if score not in _SCORES:
        raise ModelError(f"{keys.where}: unknown router score '{score}'", hint=f"known: {', '.join(_SCORES)}")
    return _SCORES[score]
