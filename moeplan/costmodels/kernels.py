"""Device time of one block: GEMM, attention core, memory traffic, forward and backward, for one micro-batch of one rank.

GEMM and attention times come from the profile's curves at the sharded shapes; a weight has three products: forward
[T, in] x [in, out], data gradient [T, out] x [out, in], weight gradient [out, T] x [T, in]. Element-wise work is bytes over
the streaming rate, with bytes counted as reads and writes of bf16 tensors. Units: seconds; arrays over layouts, [n].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, routed_rows, shard
from moeplan.costmodels.constants import HOST
from moeplan.costmodels.counts import Shard, Weight, attention_flops_per_token, block_weights, scan_channels
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model import Attention, Block, LatentAttention, LinearAttention, Mamba, Mlp, Model, Moe
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

NORM_BYTES = 10.0
"""Bytes per hidden element of a norm and the residual add after its block: read and write bf16 (4), read two, write one (6)."""
ROPE_BYTES = 6.0
"""Bytes per query, key or value element of rotary embedding, bias and layout change."""
ACTIVATION_BYTES = 6.0
"""Bytes per hidden unit of a gated activation: read two, write one, bf16."""
BACKWARD_TRAFFIC = 1.5
"""Element-wise backward traffic over forward: the gradient is read beside the saved input."""
PERMUTE_PASSES = {"fused": 4.7, "separate": 9.4}
"""Passes over the dispatched rows, read and write counted apart: the fused dispatchers leave one permute and one un-permute."""
SCORE_BYTES = 13.0
"""Bytes per attention score, forward, unfused: written by the GEMM (2), fused scale, mask and softmax (4), dropout with its
mask (5), read by the GEMM (2)."""
SCAN_PASSES = 13.0
"""Passes over the projected channels of a state-space or linear-attention scan."""
SCAN_BYTES_PER_S = 2.9e12
"""What the Triton kernels of such scans reach at most: they use the instructions of Hopper, on what came later too."""
EXPERT_BIAS_BYTES = (28.0, 36.0)
"""Bytes per element of the experts' output where they have biases, forward and backward: Megatron adds bias x probability
expert by expert, in fp32, and concatenates (experts.py, `_apply_bias`); the backward sums gradients for both."""


@dataclass(slots=True)
class PassTimes:
    """Seconds by part name, forward and backward apart; every value is an array [n]."""

    forward: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, forward: Any, backward: Any) -> None:
        """Add to the part `name`."""
        self.forward[name] = self.forward.get(name, 0.0) + forward
        self.backward[name] = self.backward.get(name, 0.0) + backward

    def merge(self, other: PassTimes) -> None:
        """Add all parts of `other`."""
        for name in other.forward:
            self.add(name, other.forward[name], other.backward[name])


def visible_host_s(device_s: Any, host_s: Any) -> Any:
    """Seconds by which the host's launches lengthen a pass that takes the device `device_s`."""
    return (device_s**HOST.sharpness + host_s**HOST.sharpness) ** (1.0 / HOST.sharpness) - device_s


def dense_times(block: Block, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """Device seconds of one block without its routed experts and without communication."""
    out = PassTimes()
    tokens = rank_tokens(workload, layouts)
    name = "attention GEMM" if not isinstance(block, (Mlp, Moe)) else "MLP GEMM"
    for weight in block_weights(block, model.hidden):
        if weight.gemm and not weight.shard.is_expert and not _is_routing(weight):
            out.add(name, *dense_gemm_s(weight, tokens, profile, workload.precision.gemm, layouts))
    forward = profile.stream_s(NORM_BYTES * model.hidden * model.streams * tokens / shard(layouts), "norm")
    match block:
        case Attention() | LatentAttention():
            _add_attention(out, block, profile, workload, layouts, tokens)
            forward = forward + profile.stream_s(ROPE_BYTES * _projected(block) * tokens / layouts.tp)
        case Mamba() | LinearAttention():
            _add_scan(out, block, model, profile, workload, layouts, tokens)
        case Mlp() | Moe():
            width = block.width if isinstance(block, Mlp) else block.shared_width
            forward = forward + profile.stream_s(_activation_bytes(block) * width * tokens / layouts.tp, "swiglu")
    forward = workload.era.traffic * forward
    out.add("norms and activations", forward, BACKWARD_TRAFFIC * forward)
    return out


def routed_times(block: Moe, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """Device seconds of the routed experts of one block: router, permutes and expert products, without communication."""
    out = PassTimes()
    for weight in block_weights(block, model.hidden):
        if weight.gemm and _is_routing(weight):
            out.add("router", *dense_gemm_s(weight, rank_tokens(workload, layouts), profile, "bf16", layouts))
    _add_experts(out, block, model, profile, workload, layouts)
    return out


def _is_routing(weight: Weight) -> bool:
    """Router and latent projections work on a rank's own tokens, before they are dispatched."""
    return weight.name in ("router", "latent_down", "latent_up")


def _activation_bytes(block: Mlp | Moe) -> float:
    return ACTIVATION_BYTES if block.gated else 4.0


def dense_gemm_s(weight: Weight, tokens: Any, profile: Profile, gemm: str, layouts: Layouts) -> tuple[Any, Any]:
    """Seconds of the forward product, and of both gradients, of a weight that is not an expert's."""
    curve = profile.gemm(gemm)
    out = weight.out / np.where(weight.shard is Shard.COLUMN, layouts.tp, 1)
    inp = weight.inp / np.where(weight.shard is Shard.ROW, layouts.tp, 1)
    rows = tokens / (shard(layouts) if weight.shard is Shard.REPLICATED else 1)
    forward = curve.seconds(rows, out, inp)
    backward = curve.seconds(rows, inp, out) + curve.seconds(out, inp, rows)
    share = profile.sustained_gemm(gemm)
    return forward / share, backward / share


def _projected(block: Attention | LatentAttention) -> int:
    """Query, key and value elements of a token."""
    if isinstance(block, LatentAttention):
        return block.query_size + block.key_value_size
    return block.heads * block.head_dim + block.kv_heads * (block.head_dim + block.v_head_dim)


def _add_attention(
    out: PassTimes, block: Attention | LatentAttention, profile: Profile, workload: Workload, layouts: Layouts, tokens: Any
) -> None:
    if isinstance(block, LatentAttention):
        qk, v, kv_heads = block.nope_dim + block.rope_dim, block.v_dim, block.heads
    else:
        qk, v, kv_heads = block.head_dim, block.v_head_dim, block.kv_heads
    if workload.era.attention == "unfused":
        _add_unfused_attention(out, block, profile, workload, layouts, tokens)
        return
    curve = profile.attention(qk, v, kernel=workload.era.attention)
    flop = tokens * attention_flops_per_token(block, workload.attended_len) / layouts.tp
    moved = 2.0 * tokens * (block.heads + np.maximum(kv_heads, layouts.tp)) * (qk + v) / layouts.tp
    forward, backward = curve.seconds(flop, moved), curve.backward_seconds(flop, moved)
    share = profile.sustained.get("attention", 1.0)
    out.add("attention core", forward / share, backward / share)


def _add_unfused_attention(
    out: PassTimes, block: Attention | LatentAttention, profile: Profile, workload: Workload, layouts: Layouts, tokens: Any
) -> None:
    """Scores of all keys as one GEMM, a masked softmax and dropout over them in memory, a GEMM with the values."""
    keys = float(workload.attended_len)
    flop = tokens * attention_flops_per_token(block, workload.attended_len, causal=False) / layouts.tp
    scores = profile.stream_s(SCORE_BYTES * tokens * keys * block.heads / layouts.tp)
    products = flop / profile.gemm("bf16").flop_per_s / profile.sustained_gemm("bf16")
    out.add("attention core", products + scores, 2.0 * (products + scores))


def _add_scan(
    out: PassTimes,
    block: Mamba | LinearAttention,
    model: Model,
    profile: Profile,
    workload: Workload,
    layouts: Layouts,
    tokens: Any,
) -> None:
    channels = scan_channels(block, model.hidden)
    flop = tokens * attention_flops_per_token(block, workload.seq_len) / layouts.tp
    moved = SCAN_PASSES * 2.0 * channels * tokens / layouts.tp
    forward = moved / min(profile.stream_bytes_per_s, SCAN_BYTES_PER_S) + flop / profile.attention(128, 128).flop_per_s
    out.add("state scan", forward, 2.0 * forward)


def _add_experts(out: PassTimes, block: Moe, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> None:
    inner, gemm = block.latent or model.hidden, workload.precision.gemm
    rows, local = routed_rows(block, workload, layouts), block.experts / layouts.ep
    per_expert, width = rows / local, block.width / layouts.etp
    fc1 = width * (2 if block.gated else 1)
    forward = backward = 0.0
    for n, k in ((fc1, inner), (inner, width)):
        forward = forward + profile.grouped_gemm(gemm, "forward").seconds(local, per_expert, n, k)
        backward = backward + profile.grouped_gemm(gemm, "dgrad").seconds(local, per_expert, n, k)
        backward = backward + profile.grouped_gemm(gemm, "wgrad").seconds(local, per_expert, n, k)
    quantize = profile.quantize_s(gemm, rows * (inner + width))
    share = profile.sustained_gemm(gemm)
    out.add("expert GEMM", forward / share + quantize, backward / share + 2.0 * quantize)
    fused = layouts.dispatches_with("deepep", "hybridep")
    passes = np.where(fused, PERMUTE_PASSES["fused"], PERMUTE_PASSES["separate"])
    traffic = profile.stream_s(2.0 * passes * rows * inner, "permute")
    out.add("permute", traffic, BACKWARD_TRAFFIC * traffic)
    activation = profile.stream_s(_activation_bytes(block) * rows * width, "swiglu")
    out.add("expert activation", activation, BACKWARD_TRAFFIC * activation)
    if block.bias:
        element = [profile.stream_s(each * rows * inner) for each in EXPERT_BIAS_BYTES]
        out.add("expert activation", *element)
    # Router probabilities, top-k and the map from tokens to experts: a dozen passes over fp32 scores.
    score_bytes = 48.0 * (block.experts + block.zero_experts) * rank_tokens(workload, layouts) / shard(layouts)
    scores = profile.stream_s(score_bytes, "router")
    out.add("router", scores, 0.5 * scores)
