"""Counts that follow from the architecture alone: weights, parameters, FLOP.

Every block is a list of `Weight` matrices (norm weights and biases are matrices of one column). Totals, active
parameters, per-rank shares, GEMM shapes and FLOP all come from that one list. FLOP per token of training =
6 x active matmul weights + 12 x heads x (d_qk + d_v) / 2 x mean keys seen, where causal attention sees half of the
sequence on average (arXiv:2205.05198, appendix A, with the causal half counted once).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moeplan.costmodels.model import (
    Attention,
    Block,
    Compression,
    LatentAttention,
    Layer,
    LinearAttention,
    Mamba,
    Mlp,
    Model,
    Moe,
)


class Shard(Enum):
    """How tensor and expert parallelism cut a weight."""

    COLUMN = "column"
    """Output features over the tensor-parallel group."""
    ROW = "row"
    """Input features over the tensor-parallel group."""
    REPLICATED = "replicated"
    """The same on every tensor-parallel rank."""
    EXPERT_COLUMN = "expert column"
    """Copies over the expert-parallel group, output features over the expert-tensor-parallel group."""
    EXPERT_ROW = "expert row"
    """Copies over the expert-parallel group, input features over the expert-tensor-parallel group."""

    @property
    def is_expert(self) -> bool:
        """Whether the weight belongs to routed experts."""
        return self in (Shard.EXPERT_COLUMN, Shard.EXPERT_ROW)

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold different parts of the weight."""
        return self is not Shard.REPLICATED


@dataclass(frozen=True, slots=True)
class Weight:
    """`copies` matrices of `out` x `inp` elements, of which a token passes `used` on average."""

    name: str
    out: int
    inp: int
    shard: Shard
    copies: int = 1
    used: float = 1.0
    gemm: bool = True
    """Whether tokens are multiplied with it (norms, biases and convolutions are not GEMMs)."""

    @property
    def size(self) -> int:
        """Elements of all copies."""
        return self.out * self.inp * self.copies


def _vector(name: str, size: int, shard: Shard = Shard.REPLICATED, copies: int = 1, used: float = 1.0) -> Weight:
    return Weight(name, size, 1, shard, copies, used, gemm=False)


def block_weights(block: Block, hidden: int) -> tuple[Weight, ...]:
    """The weights of one block in a model of width `hidden`, as published (not padded, not sharded)."""
    match block:
        case Attention():
            return _attention(block, hidden)
        case LatentAttention():
            return _latent_attention(block, hidden)
        case LinearAttention():
            return _linear_attention(block, hidden)
        case Mamba():
            return _mamba(block, hidden)
        case Mlp():
            return _feed_forward("mlp", block.width, hidden, block.gated, block.bias)
        case Moe():
            return _moe(block, hidden)


def _attention(b: Attention, h: int) -> tuple[Weight, ...]:
    qkv = b.heads * b.head_dim * (2 if b.gate else 1) + b.kv_heads * (b.head_dim + b.v_head_dim)
    out = [Weight("qkv", qkv, h, Shard.COLUMN), Weight("attention_out", h, b.heads * b.v_head_dim, Shard.ROW)]
    if b.qkv_bias:
        out.append(_vector("qkv_bias", qkv, Shard.COLUMN))
    if b.out_bias:
        out.append(_vector("attention_out_bias", h))
    if b.qk_norm == "head":
        out.append(_vector("qk_norm", 2 * b.head_dim))
    elif b.qk_norm == "full":
        out.append(_vector("qk_norm", (b.heads + b.kv_heads) * b.head_dim, Shard.COLUMN))
    return (*out, *_per_head(b, h))


def _per_head(b: Attention | LatentAttention, h: int) -> tuple[Weight, ...]:
    """Output gates and softmax offsets, one a head."""
    gate = (Weight("head_gate", b.heads, h, Shard.COLUMN),) if b.head_gate else ()
    return (*gate, _vector("sinks", b.heads, Shard.COLUMN)) if b.sinks else gate


def _latent_attention(b: LatentAttention, h: int) -> tuple[Weight, ...]:
    if b.compression:
        return _compressed_attention(b, b.compression, h)
    query = b.heads * (b.nope_dim + b.rope_dim)
    out: list[Weight] = []
    if b.q_rank:
        out += [
            Weight("q_down", b.q_rank, h, Shard.REPLICATED),
            _vector("q_norm", b.q_rank),
            Weight("q_up", query, b.q_rank, Shard.COLUMN),
        ]
        if b.qkv_bias:
            out.append(_vector("q_down_bias", b.q_rank))
    else:
        out.append(Weight("q", query, h, Shard.COLUMN))
    out += [
        Weight("kv_down", b.kv_rank + b.rope_dim, h, Shard.REPLICATED),
        _vector("kv_norm", b.kv_rank),
        Weight("kv_up", b.heads * (b.nope_dim + b.v_dim), b.kv_rank, Shard.COLUMN),
        Weight("attention_out", h, b.heads * b.v_dim, Shard.ROW),
    ]
    if b.qkv_bias:
        out.append(_vector("kv_down_bias", b.kv_rank + b.rope_dim))
    if b.out_bias:
        out.append(_vector("attention_out_bias", h))
    if b.index_heads:
        out += [
            Weight("index_q", b.index_heads * b.index_dim, b.q_rank, Shard.REPLICATED),
            Weight("index_k", b.index_dim, h, Shard.REPLICATED),
            _vector("index_k_norm", 2 * b.index_dim),
            Weight("index_weights", b.index_heads, h, Shard.REPLICATED),
        ]
    return (*out, *_per_head(b, h))


def _compressed_attention(b: LatentAttention, c: Compression, h: int) -> tuple[Weight, ...]:
    head_dim = b.nope_dim + b.rope_dim
    out = [
        Weight("q_down", b.q_rank, h, Shard.REPLICATED),
        _vector("q_norm", b.q_rank),
        Weight("q_up", b.heads * head_dim, b.q_rank, Shard.COLUMN),
        Weight("kv", b.kv_rank, h, Shard.REPLICATED),
        _vector("kv_norm", b.kv_rank),
        Weight("attention_out_down", c.out_groups * c.out_rank, b.heads * head_dim // c.out_groups, Shard.COLUMN),
        Weight("attention_out", h, c.out_groups * c.out_rank, Shard.ROW),
    ]
    if c.rate:
        # With an indexer neighbouring blocks overlap: every token yields two compressed halves.
        out += _compressor("compress", b.kv_rank, 2 if b.index_heads else 1, c.rate, h)
    if b.index_heads:
        out += [
            Weight("index_q", b.index_heads * b.index_dim, b.q_rank, Shard.REPLICATED),
            *_compressor("index_compress", b.index_dim, 2, c.rate, h),
            Weight("index_weights", b.index_heads, h, Shard.REPLICATED),
        ]
    return (*out, *_per_head(b, h))


def _compressor(name: str, width: int, parts: int, rate: int, h: int) -> list[Weight]:
    """Keys and gates of every token, the bias of each place in a block, and the norm of the compressed key."""
    return [
        Weight(name, 2 * parts * width, h, Shard.REPLICATED),
        _vector(f"{name}_bias", parts * width * rate),
        _vector(f"{name}_norm", width),
    ]


def _linear_attention(b: LinearAttention, h: int) -> tuple[Weight, ...]:
    keys, values = b.key_heads * b.key_dim, b.value_heads * b.value_dim
    if b.variant == "gdn":
        return (
            Weight("qkvz", 2 * keys + 2 * values, h, Shard.COLUMN),
            Weight("beta_alpha", 2 * b.value_heads, h, Shard.COLUMN),
            _vector("conv", (2 * keys + values) * b.conv, Shard.COLUMN),
            _vector("decay", 2 * b.value_heads, Shard.COLUMN),
            _vector("gate_norm", b.value_dim),
            Weight("attention_out", h, values, Shard.ROW),
        )
    if b.variant == "kda":
        bottleneck = (
            Weight("decay_gate_down", b.key_dim + b.value_dim, h, Shard.REPLICATED),
            Weight("decay_up", keys, b.key_dim, Shard.COLUMN),
            Weight("gate_up", values, b.value_dim, Shard.COLUMN),
        )
        return (
            Weight("qkv", 2 * keys + values, h, Shard.COLUMN),
            _vector("conv", (2 * keys + values) * b.conv, Shard.COLUMN),
            _vector("decay", b.key_heads + keys, Shard.COLUMN),
            *((Weight("decay_gate", keys + values, h, Shard.COLUMN),) if b.full_rank else bottleneck),
            Weight("beta", b.key_heads, h, Shard.COLUMN),
            _vector("gate_norm", b.value_dim),
            Weight("attention_out", h, values, Shard.ROW),
        )
    return (
        Weight("qkv", 2 * keys + values, h, Shard.COLUMN),
        Weight("output_gate", values, h, Shard.COLUMN),
        _vector("gate_norm", values, Shard.COLUMN),
        Weight("attention_out", h, values, Shard.ROW),
    )


def _mamba(b: Mamba, h: int) -> tuple[Weight, ...]:
    if b.version == 2:
        mixed = b.inner + 2 * b.groups * b.state
        out = [
            Weight("mamba_in", mixed + b.inner + b.heads, h, Shard.COLUMN),
            _vector("conv", mixed * (b.conv + int(b.conv_bias)), Shard.COLUMN),
            _vector("dt_a_d", 3 * b.heads, Shard.COLUMN),
            _vector("gate_norm", b.inner, Shard.COLUMN),
            Weight("mamba_out", h, b.inner, Shard.ROW),
        ]
        bias = mixed + b.inner + b.heads + h
    else:
        out = [
            Weight("mamba_in", 2 * b.inner, h, Shard.COLUMN),
            _vector("conv", b.inner * (b.conv + int(b.conv_bias)), Shard.COLUMN),
            Weight("mamba_x", b.dt_rank + 2 * b.state, b.inner, Shard.ROW),
            Weight("mamba_dt", b.inner, b.dt_rank, Shard.COLUMN),
            _vector("dt_bias_a_d", b.inner * (2 + b.state), Shard.COLUMN),
            _vector("dt_b_c_norm", b.dt_rank + 2 * b.state),
            Weight("mamba_out", h, b.inner, Shard.ROW),
        ]
        bias = 2 * b.inner + h
    if b.proj_bias:
        out.append(_vector("mamba_bias", bias))
    return tuple(out)


def _feed_forward(name: str, width: int, h: int, gated: bool, bias: bool = False) -> tuple[Weight, ...]:
    fc1 = width * (2 if gated else 1)
    out = [Weight(f"{name}_fc1", fc1, h, Shard.COLUMN), Weight(f"{name}_fc2", h, width, Shard.ROW)]
    if bias:
        out += [_vector(f"{name}_fc1_bias", fc1, Shard.COLUMN), _vector(f"{name}_fc2_bias", h)]
    return tuple(out)


def _moe(b: Moe, h: int) -> tuple[Weight, ...]:
    inner, fc1, used = b.latent or h, b.width * (2 if b.gated else 1), b.active_experts
    out = [
        Weight("router", b.experts + b.zero_experts, h, Shard.REPLICATED),
        Weight("expert_fc1", fc1, inner, Shard.EXPERT_COLUMN, b.experts, used),
        Weight("expert_fc2", inner, b.width, Shard.EXPERT_ROW, b.experts, used),
    ]
    if b.bias:
        out.append(_vector("expert_fc1_bias", fc1, Shard.EXPERT_COLUMN, b.experts, used))
        out.append(_vector("expert_fc2_bias", inner, Shard.EXPERT_ROW, b.experts, used))
    if b.router_bias:
        out.append(_vector("router_bias", b.experts))
    if b.expert_bias_is_parameter:
        out.append(_vector("expert_bias", b.experts))
    if b.latent:
        out.append(Weight("latent_down", b.latent, h, Shard.REPLICATED))
        out.append(Weight("latent_up", h, b.latent, Shard.REPLICATED))
    if b.shared_width:
        out += _feed_forward("shared", b.shared_width, h, b.gated)
        if b.shared_gate:
            out.append(Weight("shared_gate", 1, h, Shard.REPLICATED))
    return tuple(out)


def norm_size(model: Model) -> int:
    """Elements of one norm over the hidden size."""
    return model.hidden * (2 if model.norm == "layernorm" and model.norm_bias else 1)


def layer_weights(layer: Layer, model: Model) -> tuple[Weight, ...]:
    """The weights of one layer, its norms and the hyper-connections around its blocks included."""
    rest = [_vector("norms", norm_size(model) * layer.norms)]
    if (n := model.streams) > 1:
        # Per block: weights that collapse, expand and mix the n streams, computed from all of them.
        rest.append(Weight("hyper_connections", len(layer.blocks) * (2 + n) * n, n * model.hidden, Shard.REPLICATED))
        rest.append(_vector("hyper_connections_bias", len(layer.blocks) * ((2 + n) * n + 3)))
    return (*rest, *(w for block in layer.blocks for w in block_weights(block, model.hidden)))


def mtp_weights(model: Model) -> tuple[Weight, ...]:
    """What a multi-token-prediction layer has beside its transformer layers: three norms and the 2h -> h projection."""
    projection = Weight("mtp_projection", model.hidden, 2 * model.hidden, Shard.COLUMN)
    return (_vector("mtp_norms", 3 * norm_size(model)), projection)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a model, as its publisher counts them: without prediction (MTP) layers."""

    total: int
    active: float
    """Parameters that a token passes, the input embedding included."""
    active_without_embedding: float
    """The same without the input embedding; equal to `active` where the head is tied to it."""
    routed: int
    """Parameters of routed experts."""
    mtp: int
    """Parameters of the multi-token-prediction layers, in none of the above."""


def parameter_count(model: Model) -> ParameterCount:
    """Count the published parameters of `model` exactly."""
    total = active = 0.0
    routed = 0
    for kind, layer in enumerate(model.kinds):
        repeat = model.kind_of_layer.count(kind)
        for weight in layer_weights(layer, model):
            total += repeat * weight.size
            active += repeat * (weight.out * weight.inp * weight.used if weight.shard.is_expert else weight.size)
            routed += repeat * weight.size if weight.shard.is_expert else 0
    embedding = model.vocab * model.hidden
    rest = norm_size(model) + (model.max_positions * model.hidden if model.position == "learned" else 0)
    if (n := model.streams) > 1:
        rest += n * n * model.hidden + n + 1
    head = 0 if model.tied else embedding
    depths = model.mtp[:1] if model.mtp_shared else model.mtp
    mtp = sum(w.size for layer in depths for w in (*layer_weights(layer, model), *mtp_weights(model)))
    return ParameterCount(
        total=int(total) + embedding + head + rest,
        active=active + embedding + head + rest,
        active_without_embedding=active + embedding + rest,
        routed=routed,
        mtp=mtp,
    )


def mean_keys(block: Attention | LatentAttention, seq_len: float, *, causal: bool = True) -> float:
    """Keys that a query attends to on average over a sequence of `seq_len` tokens.

    Causal: s / 2 (the half token on the diagonal is dropped, as every source does). With a window w < s it is
    w - w^2 / (2 s): full windows but for the first w queries. Not causal: s, or w.
    """
    if isinstance(block, LatentAttention) and (c := block.compression):
        near = _keys_seen(seq_len, c.window, causal)
        return near + (_keys_seen(seq_len / c.rate, block.index_topk, causal) if c.rate else 0.0)
    return _keys_seen(seq_len, block.window if isinstance(block, Attention) else block.index_topk, causal)


def _keys_seen(seq_len: float, window: int, causal: bool) -> float:
    if not window or window >= seq_len:
        return seq_len / 2 if causal else seq_len
    return window - window**2 / (2 * seq_len) if causal else float(window)


def attention_flops_per_token(block: Block, seq_len: float, *, causal: bool = True) -> float:
    """Forward FLOP per token of the part of a mixer that is not a weight GEMM: scores and values, or the state scan."""
    match block:
        case Attention():
            return 2 * block.heads * (block.head_dim + block.v_head_dim) * mean_keys(block, seq_len, causal=causal)
        case LatentAttention():
            width = block.nope_dim + block.rope_dim + block.v_dim
            flops = 2 * block.heads * width * mean_keys(block, seq_len, causal=causal)
            # The indexer scores every earlier key before it keeps the top-k.
            keys = seq_len / block.compression.rate if block.compression and block.compression.rate else seq_len
            return flops + 2 * block.index_heads * block.index_dim * (keys / 2 if causal else keys)
        case LinearAttention():
            return 6 * block.value_heads * block.key_dim * block.value_dim
        case Mamba():
            return 6 * block.inner * block.state
        case _:
            return 0.0


def scan_channels(block: Block, hidden: int) -> int:
    """Elements that a state-space or linear-attention block projects a token to, from the residual stream."""
    return sum(w.out for w in block_weights(block, hidden) if w.gemm and w.inp == hidden and w.shard is not Shard.ROW)


def flops_per_token(model: Model, seq_len: int, *, causal: bool = True, mtp: bool = True) -> float:
    """Training FLOP per token, forward and backward, without recompute; `causal` halves attention."""
    layers = [model.kinds[k] for k in model.kind_of_layer] + (list(model.mtp) if mtp else [])
    kinds = {kind: layers.count(kind) for kind in dict.fromkeys(layers)}
    forward = 0.0
    for kind, repeat in kinds.items():
        weights = [w for w in layer_weights(kind, model) if w.gemm]
        gemm = sum(w.out * w.inp * (w.used if w.shard.is_expert else w.copies) for w in weights)
        core = sum(attention_flops_per_token(b, seq_len, causal=causal) for b in kind.blocks)
        forward += repeat * (2 * gemm + core)
    depths = len(model.mtp) if mtp else 0
    forward += 2 * model.vocab * model.hidden * (1 + depths)
    forward += 2 * sum(w.size for w in mtp_weights(model) if w.gemm) * depths
    return 3 * forward
