"""The flags that tell Megatron-LM a model's architecture, written for megatron-core 0.19.2.

Megatron knows two model classes. A GPT model has layers of one token mixer and one feed-forward part; what differs from
layer to layer is given as lists (dense or mixture of experts, sliding window or full, linear or full attention), the
rest is the same in all layers. A hybrid model (Mamba) has layers of one block each, spelled as a string of letters. A
model that fits neither is refused with the reason: an approximation would train another model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from moeplan.costmodels.model import Attention, Block, LatentAttention, Layer, LinearAttention, Mamba, Mlp, Model, Moe
from moeplan.errors import ExportError
from moeplan.exporters.base import Flag

MOE_PROPERTIES = (
    "experts topk width gated shared_width shared_gate bias router_bias expert_bias expert_bias_is_parameter latent "
    "zero_experts score pre_softmax groups group_topk scaling"
)
HYBRID_LETTERS: dict[type, str] = {Mamba: "M", Attention: "*", Mlp: "-", Moe: "E"}
MAMBA_CONV_TAPS = 4
"""Taps of the convolution, fixed in Megatron's Mamba mixer."""

B = TypeVar("B", bound=Block)


def model_arguments(model: Model, seq_len: int = 0) -> list[Flag]:
    """The flags of `model`; attention windows of at least `seq_len` tokens (if given) count as full attention.

    Raises `ExportError` for what Megatron cannot represent. Not included are parallelism, precision, batches,
    dispatchers and all else that a layout or a workload decides, the tokenizer, and rotary positions scaled to longer
    contexts (YaRN).
    """
    if model.streams > 1:
        raise _refusal(model, f"{model.streams} residual streams")
    layers = (*model.layers, *model.mtp)
    mixers = list(dict.fromkeys(b for layer in layers for b in layer.blocks if not isinstance(b, (Mlp, Moe))))
    if model.is_hybrid:
        size: Flag = ("--hybrid-layer-pattern", hybrid_pattern(model))
    else:
        for layer in layers:
            _check_pair(model, layer)
        size = ("--num-layers", str(len(model.layers)))
    return [
        size,
        ("--hidden-size", str(model.hidden)),
        *_attention(model, mixers, seq_len),
        *_position(model, seq_len),
        *_feed_forward(model),
        *_moe(model),
        *_biases(model, mixers),
        *_norms(model, mixers),
        *_ends(model),
        *_mtp(model),
    ]


def hybrid_pattern(model: Model, segments: Sequence[int] = ()) -> str:
    """A Mamba hybrid in Megatron's letters, one a block; `segments` counts the layers of each chunk in order."""
    letters = iter([hybrid_letters(model, layer) for layer in model.layers])
    chunks = ["".join(itertools.islice(letters, count)) for count in segments or [len(model.layers)]]
    depths = [hybrid_letters(model, layer) for layer in model.mtp]
    if len(set(depths)) > 1:
        raise _refusal(model, "prediction (MTP) layers that differ from each other")
    return "/".join(["|".join(chunks), *depths])


def hybrid_letters(model: Model, layer: Layer) -> str:
    """The letters of one layer, a letter for each of its blocks."""
    if layer.norms != len(layer.blocks):
        raise _refusal(model, f"layers of {len(layer.blocks)} blocks with {layer.norms} norms")
    for block in layer.blocks:
        if type(block) not in HYBRID_LETTERS:
            raise _refusal(model, f"{type(block).__name__} blocks in a Mamba hybrid")
    return "".join(HYBRID_LETTERS[type(block)] for block in layer.blocks)


def _check_pair(model: Model, layer: Layer) -> None:
    kinds = " + ".join(type(b).__name__ for b in layer.blocks)
    if len(layer.blocks) != 2 or isinstance(layer.blocks[0], (Mlp, Moe)) or not isinstance(layer.blocks[1], (Mlp, Moe)):
        raise _refusal(model, f"layers of {kinds}", "a GPT layer is one token mixer and one feed-forward part")
    if layer.norms != 2:
        raise _refusal(model, f"layers with {layer.norms} norms", "a GPT layer has one before each of its two parts")


# Token mixers.


def _attention(model: Model, mixers: Sequence[Block], seq_len: int) -> list[Flag]:
    plain, latent = _of(mixers, Attention), _of(mixers, LatentAttention)
    others = _linear(model, _of(mixers, LinearAttention)) + _mamba(model, _of(mixers, Mamba))
    if not plain and not latent:
        raise _refusal(model, "models without softmax attention")
    if latent and (plain or others):
        raise _refusal(model, "latent attention beside other token mixers")
    return (_latent(model, latent) if latent else _plain(model, plain, seq_len)) + others


def _plain(model: Model, blocks: Sequence[Attention], seq_len: int) -> list[Flag]:
    first = _alike(model, [dataclasses.replace(b, window=0) for b in blocks])
    _only(model, first, "heads kv_heads head_dim v_head_dim qkv_bias out_bias qk_norm gate sinks")
    if first.head_dim != first.v_head_dim:
        raise _refusal(model, f"value heads of {first.v_head_dim} beside key heads of {first.head_dim}")
    if first.qk_norm == "full":
        raise _refusal(model, "query and key norms over all heads", "its norms are per head")
    flags: list[Flag] = [("--num-attention-heads", str(first.heads)), ("--kv-channels", str(first.head_dim))]
    if first.kv_heads != first.heads:
        flags += [("--group-query-attention",), ("--num-query-groups", str(first.kv_heads))]
    if first.qk_norm == "head":
        flags.append(("--qk-layernorm",))
    elif _published(model, "use_qk_norm"):  # a norm without weights
        flags.append(("--qk-l2-norm",))
    if first.gate:
        flags.append(("--attention-output-gate",))
    if first.sinks:
        flags.append(("--softmax-type", "learnable"))
    return flags + _windows(model, seq_len)


def _windows(model: Model, seq_len: int) -> list[Flag]:
    def window(blocks: Sequence[Block]) -> int:
        seen = next((b.window for b in blocks if isinstance(b, Attention)), 0)
        return 0 if seq_len and seen >= seq_len else seen

    if model.is_hybrid:
        windows = [window([b]) for layer in model.layers for b in layer.blocks]
    else:
        windows = [window(layer.blocks) for layer in model.layers]
    widths = {w for w in windows if w}
    if not widths:
        return []
    if len(widths) > 1:
        raise _refusal(model, f"attention windows of {' and '.join(map(str, sorted(widths)))} tokens", "one width is possible")
    if _published(model, "attention_chunk_size"):
        raise _refusal(model, "attention in chunks", "a sequence of one chunk can be exported")
    if model.mtp:
        raise _refusal(model, "prediction (MTP) layers beside attention windows", "it numbers both from 1")
    # Megatron counts the tokens before the query, the published configurations the query too.
    flags: list[Flag] = [("--window-size", f"{widths.pop() - 1},0")]
    if not all(windows):
        flags.append(("--window-attn-skip-freq", pattern([int(w > 0) for w in windows])))
    return flags


def _latent(model: Model, blocks: Sequence[LatentAttention]) -> list[Flag]:
    b = _alike(model, blocks)
    _only(model, b, "heads q_rank kv_rank nope_dim rope_dim v_dim index_heads index_dim index_topk")
    if b.index_heads and not b.q_rank:
        raise _refusal(model, "sparse attention without query compression")
    flags: list[Flag] = [
        ("--num-attention-heads", str(b.heads)),
        ("--kv-channels", str(b.v_dim)),
        ("--multi-latent-attention",),
        ("--kv-lora-rank", str(b.kv_rank)),
        ("--qk-head-dim", str(b.nope_dim)),
        ("--qk-pos-emb-head-dim", str(b.rope_dim)),
        ("--v-head-dim", str(b.v_dim)),
        ("--qk-layernorm",),
    ]
    if b.q_rank:
        flags.append(("--q-lora-rank", str(b.q_rank)))
    if b.index_heads:
        flags += [
            ("--experimental-attention-variant", "dsa"),
            ("--dsa-indexer-n-heads", str(b.index_heads)),
            ("--dsa-indexer-head-dim", str(b.index_dim)),
            ("--dsa-indexer-topk", str(b.index_topk)),
            ("--dsa-indexer-loss-coeff", "0.01"),
            ("--no-rope-fusion",),
        ]
    return flags


def _linear(model: Model, blocks: Sequence[LinearAttention]) -> list[Flag]:
    if not blocks:
        return []
    b = _alike(model, blocks)
    if b.variant != "gdn":
        names = {"kda": "Kimi delta attention", "lightning": "lightning attention"}
        raise _refusal(model, names[b.variant], "its linear attention is the gated delta net")
    _only(model, b, "variant key_heads value_heads key_dim value_dim conv")
    return [
        ("--experimental-attention-variant", "gated_delta_net"),
        ("--linear-attention-freq", pattern([int(isinstance(x.blocks[0], LinearAttention)) for x in model.layers])),
        ("--linear-conv-kernel-dim", str(b.conv)),
        ("--linear-key-head-dim", str(b.key_dim)),
        ("--linear-value-head-dim", str(b.value_dim)),
        ("--linear-num-key-heads", str(b.key_heads)),
        ("--linear-num-value-heads", str(b.value_heads)),
    ]


def _mamba(model: Model, blocks: Sequence[Mamba]) -> list[Flag]:
    if not blocks:
        return []
    b = _alike(model, blocks)
    if b.version != 2:
        raise _refusal(model, "Mamba-1 blocks", "only Mamba-2 is known")
    if b.conv != MAMBA_CONV_TAPS or not b.conv_bias or b.proj_bias:
        raise _refusal(model, f"Mamba convolutions of {b.conv} taps or projections with other biases")
    return [
        ("--mamba-num-heads", str(b.heads)),
        ("--mamba-head-dim", str(b.inner // b.heads)),
        ("--mamba-state-dim", str(b.state)),
        ("--mamba-num-groups", str(b.groups)),
    ]


def _position(model: Model, seq_len: int) -> list[Flag]:
    kinds = {"rope": "rope", "learned": "learned_absolute", "none": "none"}
    if model.position not in kinds:
        raise _refusal(model, f"{model.position} position encoding")
    flags: list[Flag] = [("--position-embedding-type", kinds[model.position])]
    if model.position == "rope":
        if model.rope_base != int(model.rope_base):
            raise _refusal(model, f"a rotary base of {model.rope_base}", "it takes whole numbers")
        flags.append(("--rotary-base", str(int(model.rope_base))))
        if model.rope_fraction != 1.0:
            flags.append(("--rotary-percent", str(model.rope_fraction)))
        rotated = _published(model, "no_rope_layers")  # 1 where positions are rotated
        if isinstance(rotated, list) and len(rotated) == len(model.layers) and not all(rotated):
            flags.append(("--no-rope-freq", pattern([1 - int(bool(r)) for r in rotated])))
    if longest := max(model.max_positions, seq_len):
        flags.append(("--max-position-embeddings", str(longest)))
    return flags


# Feed-forward parts.


def _feed_forward(model: Model) -> list[Flag]:
    mlps, moes = _of(model.blocks, Mlp), _of(model.blocks, Moe)
    if len({b.gated for b in mlps} | {b.gated for b in moes}) > 1:
        raise _refusal(model, "gated beside plain feed-forward parts")
    first = _alike(model, mlps) if mlps else moes[0]
    gated = first.gated
    flags: list[Flag] = [("--ffn-hidden-size", str(first.width))]
    match (model.activation, gated):
        case ("silu", True):
            return [*flags, ("--swiglu",)]
        case ("gelu", False):
            return flags
        case ("relu2", False):
            return [*flags, ("--squared-relu",)]
        case ("swigluoai", True):
            clamp: Flag = ("--activation-func-clamp-value", "7.0")
            return [*flags, ("--quick-geglu",), ("--glu-linear-offset", "1.0"), clamp]
        case _:
            raise _refusal(model, f"{'gated ' if gated else ''}{model.activation} activation")


def _moe(model: Model) -> list[Flag]:
    blocks = _of(model.blocks, Moe)
    if not blocks:
        return []
    b = _alike(model, blocks)
    if b.zero_experts:
        raise _refusal(model, "experts that compute nothing")
    _only(model, b, MOE_PROPERTIES)
    flags: list[Flag] = [
        ("--num-experts", str(b.experts)),
        ("--moe-router-topk", str(b.topk)),
        ("--moe-ffn-hidden-size", str(b.width)),
    ]
    if not model.is_hybrid and not all(layer.is_moe for layer in model.layers):
        flags.append(("--moe-layer-freq", pattern([int(layer.is_moe) for layer in model.layers])))
    if b.shared_width:
        flags.append(("--moe-shared-expert-intermediate-size", str(b.shared_width)))
        if b.shared_gate:
            flags.append(("--moe-shared-expert-gate",))
    if b.latent:
        flags.append(("--moe-latent-size", str(b.latent)))
    return flags + _router(model, b)


def _router(model: Model, b: Moe) -> list[Flag]:
    if b.expert_bias and b.score == "softmax":
        raise _refusal(model, "selection biases beside softmax scores")
    if b.topk == 1 and b.score == "softmax" and not b.pre_softmax:
        raise _refusal(model, "softmax over the one expert that was chosen")
    flags: list[Flag] = [("--moe-router-score-function", b.score), ("--moe-router-dtype", "fp32")]
    if b.pre_softmax:
        flags.append(("--moe-router-pre-softmax",))
    if b.expert_bias:
        flags += [("--moe-router-enable-expert-bias",), ("--moe-router-load-balancing-type", "seq_aux_loss")]
        flags.append(("--moe-aux-loss-coeff", "0.0001"))
    else:
        flags += [("--moe-router-load-balancing-type", "aux_loss"), ("--moe-aux-loss-coeff", "0.01")]
    if b.groups > 1 and b.group_topk:
        flags += [("--moe-router-num-groups", str(b.groups)), ("--moe-router-group-topk", str(b.group_topk))]
    if b.scaling != 1.0:
        flags.append(("--moe-router-topk-scaling-factor", str(b.scaling)))
    return flags


# What spans the blocks.


def _biases(model: Model, mixers: Sequence[Block]) -> list[Flag]:
    """Megatron has biases in all linear layers, in none, or on query, key and value alone."""
    attention, moes = _of(mixers, Attention), _of(model.blocks, Moe)
    qkv = any(b.qkv_bias for b in attention)
    others = [b.out_bias for b in attention] + [b.bias for b in _of(model.blocks, Mlp)]
    others += [x for b in moes for x in (b.bias, b.router_bias)]
    if not any(others):
        return [("--disable-bias-linear",), *([("--add-qkv-bias",)] if qkv else [])]
    if not all(others) or not qkv or len(attention) < len(mixers):
        raise _refusal(model, "biases in some linear layers only", "all, none, or query, key and value are possible")
    if any(b.shared_width or b.latent for b in moes):
        raise _refusal(model, "biases beside shared experts or a latent projection")
    return [("--no-bias-dropout-fusion",)] if moes else []


def _norms(model: Model, mixers: Sequence[Block]) -> list[Flag]:
    if model.norm == "layernorm" and not model.norm_bias:
        raise _refusal(model, "layer norms without bias")
    normed = _of(mixers, LatentAttention) or any(b.qk_norm != "none" for b in _of(mixers, Attention))
    if model.norm == "layernorm" and normed:
        raise _refusal(model, "RMS norms of queries and keys beside layer norms", "it has one kind of norm")
    name = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm]
    return [("--normalization", name), ("--norm-epsilon", f"{model.norm_eps:g}")]


def _ends(model: Model) -> list[Flag]:
    flags: list[Flag] = [
        ("--vocab-size", str(model.vocab)),
        ("--make-vocab-size-divisible-by", "128"),
        ("--hidden-dropout", "0.0"),
        ("--attention-dropout", "0.0"),
    ]
    return flags if model.tied else [*flags, ("--untie-embeddings-and-output-weights",)]


def _mtp(model: Model) -> list[Flag]:
    if not model.mtp:
        return []
    repeated: list[Flag] = [("--mtp-use-repeated-layer",)] if model.mtp_shared else []
    if model.is_hybrid:
        return repeated
    if any(layer.blocks != model.layers[-1].blocks for layer in model.mtp):
        raise _refusal(model, "prediction (MTP) layers unlike the last decoder layer", "it copies that layer")
    if model.position not in ("rope", "none"):
        raise _refusal(model, f"prediction (MTP) layers with {model.position} positions")
    if any(isinstance(b, LinearAttention) or (isinstance(b, LatentAttention) and b.index_heads) for b in model.blocks):
        raise _refusal(model, "prediction (MTP) layers beside linear or sparse attention", "drop them from the model")
    return [("--mtp-num-layers", str(len(model.mtp))), *repeated]


def pattern(values: Sequence[int]) -> str:
    """A list in the shortest of Megatron's forms: "([1]*3+[0]*1)*12" for twelve times 1, 1, 1, 0."""
    n = len(values)
    period = next(p for p in range(1, n + 1) if n % p == 0 and list(values) == list(values[:p]) * (n // p))
    runs: list[list[int]] = []
    for value in values[:period]:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    text = "(" + "+".join(f"[{value}]*{count}" for value, count in runs) + ")"
    return f"{text}*{n // period}" if period < n else text


def _of(blocks: Iterable[Block], kind: type[B]) -> list[B]:
    return [b for b in blocks if isinstance(b, kind)]


def _published(model: Model, key: str) -> Any:
    """A key of the configuration the model was read from, or of the language model's part of it; None if absent."""
    parts = [model.config, *(v for v in model.config.values() if isinstance(v, Mapping))]
    return next((part[key] for part in parts if key in part), None)


def _alike(model: Model, blocks: Sequence[B]) -> B:
    """The one block that all of `blocks` are."""
    for other in blocks[1:]:
        for field in dataclasses.fields(other):
            one, two = getattr(blocks[0], field.name), getattr(other, field.name)
            if one != two:
                kind = type(other).__name__
                raise _refusal(model, f"{kind} blocks with {field.name} {one} in some layers and {two} in others")
    return blocks[0]


def _only(model: Model, block: Block, known: str) -> None:
    """Refuse a block that has a property other than the `known` ones, which is more than this module can express."""
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name not in known.split() and value != field.default:
            raise _refusal(model, f"{type(block).__name__} blocks with {field.name} = {value}")


def _refusal(model: Model, what: str, hint: str | None = None) -> ExportError:
    return ExportError(f"model '{model.name}': Megatron-LM 0.19.2 has no {what}", hint=hint)
