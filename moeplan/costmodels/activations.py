"""Bytes that one layer keeps from its forward pass for its backward pass, per micro-batch and rank.

Sums over the tensors that Megatron-Core with Transformer Engine saves (arXiv:2205.05198, section 4, brought up to fused
attention and softmax): T = micro-batch x sequence / cp tokens, sharded over tp where sequence parallelism or the heads allow;
r = rows after dispatch. Inputs of quantised GEMMs are kept quantised (`saved` bytes an element). Every recompute module
removes named terms. Units: bytes. Valid for flash-style attention, which keeps no score matrix.

PyTorch's own FSDP runs recompute operation by operation: attention and every second matrix product keep their output
(torchtitan, `save_list` of its activation checkpointing), everything else is run again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.counts import scan_channels
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model import Attention, Block, LatentAttention, Layer, Mamba, Mlp, Model, Moe
from moeplan.costmodels.routing import expert_rows
from moeplan.costmodels.workload import Workload


def rank_tokens(workload: Workload, layouts: Layouts) -> Any:
    """Tokens of one micro-batch on one context-parallel rank, [n]."""
    return layouts.micro_batch * workload.seq_len / layouts.cp


def shard(layouts: Layouts) -> Any:
    """Ways that norms and residuals are cut: tp with sequence parallelism, else 1, [n]."""
    return np.where(layouts.sequence_parallel, layouts.tp, 1)


def routed_rows(block: Moe, workload: Workload, layouts: Layouts) -> Any:
    """Rows that one rank's experts hold after dispatch, imbalance or padded capacity included, [n]."""
    rows = expert_rows(rank_tokens(workload, layouts) / shard(layouts), block.active_experts, layouts.etp, workload.imbalance)
    return rows * max(1.0, workload.capacity_factor)


def separate_norm(block: Block) -> bool:
    """Whether the norm before `block` is a kernel of its own; elsewhere it is part of the projection and never recomputed."""
    return isinstance(block, (LatentAttention, Moe))


def layer_activation_bytes(layer: Layer, model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Saved bytes of one layer for one micro-batch, recompute taken off, [n]."""
    return dense_activation_bytes(layer, model, workload, layouts) + routed_activation_bytes(layer, model, workload, layouts)


def dense_activation_bytes(layer: Layer, model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Saved bytes of everything but routed experts; under recompute of whole layers the layer's input is all that stays."""
    residual = 2.0 * rank_tokens(workload, layouts) * model.hidden * model.streams / shard(layouts)
    kept = sum(_dense_bytes(block, model, workload, layouts) for block in layer.blocks)
    if workload.era.framework == "pytorch":
        outputs = residual + sum(_operation_bytes(block, model, workload, layouts) for block in layer.blocks)
        kept = np.where(layouts.recomputes("core_attn"), np.minimum(outputs, kept), kept)
    return np.where(layouts.recomputes("full"), residual, kept)


def routed_activation_bytes(layer: Layer, model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Saved bytes of routed experts, [n]."""
    kept = sum((_routed_bytes(b, model, workload, layouts) for b in layer.blocks if isinstance(b, Moe)), 0.0 * layouts.cp)
    return np.where(layouts.recomputes("full") | layouts.recomputes("moe"), 0.0, kept)


def _dense_bytes(block: Block, model: Model, workload: Workload, layouts: Layouts) -> Any:
    tokens, sharded = rank_tokens(workload, layouts), shard(layouts)
    saved = workload.precision.quantized_bytes
    again = layouts.recomputes("layernorm") & separate_norm(block)
    norm_output = np.where(again, 0.0, saved) * tokens * model.hidden / sharded
    norms = 2.0 * tokens * model.hidden * model.streams / sharded + norm_output
    match block:
        case Attention():
            return norms + _attention_bytes(block, saved, tokens, layouts)
        case LatentAttention():
            return norms + _latent_bytes(block, saved, tokens, layouts)
        case Mlp():
            kept = _feed_forward_bytes(block.width, block.gated, saved) * tokens / layouts.tp
            return norms + np.where(layouts.recomputes("mlp"), 0.0, kept)
        case Moe():
            shared = _feed_forward_bytes(block.shared_width, block.gated, saved) * tokens / layouts.tp
            return norms + np.where(layouts.recomputes("shared_experts") | layouts.recomputes("moe"), 0.0, shared)
        case Mamba():
            # One kernel runs convolution and scan and keeps its input and its output before the gate (mamba_ssm,
            # `mamba_split_conv1d_scan_combined`); then the gated output, input of the norm, and the norm's, of the projection.
            kept = 2.0 * scan_channels(block, model.hidden) + (4.0 + saved) * block.inner
            return norms + kept * tokens / layouts.tp
        case _:
            # Linear attention keeps its projections' outputs before and after the convolution.
            projected = scan_channels(block, model.hidden)
            return norms + (2.0 * 2.0 * projected + saved * model.hidden) * tokens / layouts.tp


def _operation_bytes(block: Block, model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Outputs kept where operations are recomputed one by one: query, value, attention; gate and down projection."""
    tokens = rank_tokens(workload, layouts)
    match block:
        case Attention():
            wide = block.heads * (block.head_dim + block.v_head_dim) + block.kv_heads * block.v_head_dim
            return (2.0 * wide + 4.0 * block.heads) * tokens / layouts.tp
        case Mlp():
            return 2.0 * (block.width / layouts.tp + model.hidden / shard(layouts)) * tokens
        case _:
            return _dense_bytes(block, model, workload, layouts)


def _attention_bytes(block: Attention, saved: float, tokens: Any, layouts: Layouts) -> Any:
    """Queries, keys and values as attention reads them, before their own norms where they have some, and attention's part."""
    normed = (block.heads + block.kv_heads) * block.head_dim * (block.qk_norm != "none")
    qkv = (
        block.heads * block.head_dim * (2 if block.gate else 1) + block.kv_heads * (block.head_dim + block.v_head_dim) + normed
    )
    return (2.0 * qkv * tokens + _core_bytes(block.heads, block.v_head_dim, saved, tokens, layouts)) / layouts.tp


def _core_bytes(heads: int, v_dim: int, saved: float, tokens: Any, layouts: Layouts) -> Any:
    """Attention output in bf16 (also the projection's input: once more where that is quantised) and log-sum-exp in fp32."""
    output = (2.0 + (saved if saved < 2 else 0.0)) * heads * v_dim * tokens
    return output + np.where(layouts.recomputes("core_attn"), 0.0, 4.0 * heads * tokens)


def _latent_bytes(block: LatentAttention, saved: float, tokens: Any, layouts: Layouts) -> Any:
    sharded = shard(layouts)
    down = ((2.0 + saved) * (block.q_rank + block.kv_rank) + 2.0 * block.rope_dim) * tokens / sharded
    up = 2.0 * (block.query_size + block.key_value_size) * tokens / layouts.tp
    core = _core_bytes(block.heads, block.v_dim, saved, tokens, layouts) / layouts.tp
    return down + np.where(layouts.recomputes("mla_up_proj"), 0.0, up) + core


def _feed_forward_bytes(width: int, gated: bool, saved: float) -> float:
    """Per token: output of the first matrix in bf16 and the activation, which is the second matrix's input."""
    return (4.0 if gated else 2.0) * width + saved * width


def _routed_bytes(block: Moe, model: Model, workload: Workload, layouts: Layouts) -> Any:
    tokens, saved = rank_tokens(workload, layouts), workload.precision.quantized_bytes
    rows, inner = routed_rows(block, workload, layouts), block.latent or model.hidden
    # Dispatched rows are the input of the first expert matrix. Gates weight the activation, not the experts' output, so that
    # none of the latter stays (Megatron-Core 0.12 and later, `weighted_bias_swiglu_impl`).
    dispatched = saved * rows * inner
    fc1 = (4.0 if block.gated else 2.0) * rows * block.width / layouts.etp
    act = np.where(layouts.recomputes("moe_act"), 0.0, saved * rows * block.width / layouts.etp)
    # Per token and expert: fp32 score and gate, the selection, and two int32 places of the fused permutation's row map.
    router = 17.0 * (block.experts + block.zero_experts) * tokens / shard(layouts)
    return dispatched + fc1 + act + router


def gathered_input_bytes(model: Model, workload: Workload, layouts: Layouts) -> Any:
    """What a layer of a PyTorch model keeps under tensor parallelism while it is whole: the gathered inputs of its two parts.

    Transformer Engine keeps shards instead and gathers them again in the backward.
    """
    if workload.era.framework != "pytorch":
        return 0.0 * layouts.cp
    sharded = shard(layouts)
    return 2.0 * 2.0 * rank_tokens(workload, layouts) * model.hidden * (1.0 - 1.0 / sharded)


def dense_working_bytes(layer: Layer, model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Temporary bytes in the backward of the widest dense block: gradients of its input and hidden, [n]."""
    tokens = rank_tokens(workload, layouts)
    widest: Any = 0.0 * tokens
    for block in layer.blocks:
        if isinstance(block, Mlp):
            need = 4.0 * tokens * model.hidden + 4.0 * tokens * block.width / layouts.tp
        elif isinstance(block, Moe):
            continue
        else:
            need = 8.0 * tokens * model.hidden / layouts.tp
        widest = np.maximum(widest, need)
    return widest


def routed_working_bytes(layer: Layer, model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Temporary bytes in the backward of routed experts, [n]."""
    widest: Any = 0.0 * layouts.cp
    for block in layer.blocks:
        if isinstance(block, Moe):
            rows = routed_rows(block, workload, layouts)
            widest = np.maximum(widest, 4.0 * rows * (block.latent or model.hidden) + 4.0 * rows * block.width / layouts.etp)
    return widest
