"""Time of one layer for one micro-batch: device work, exposed communication, recompute and host launches.

A layer is its dense part (projections, attention, dense and shared feed-forward) and the routed experts of its MoE blocks.
They depend on different fields of a layout: routed experts see only the tokens of a rank, however tp, cp and micro-batch make
them (`fold`). A recompute module adds the forward of its parts to the backward. Where launching the kernels of a block takes
the host about as long as running them, a pass takes (device^3 + host^3)^(1/3): launches run ahead of the device unless the two
are close. Parts are forward plus backward. Units: seconds, [n].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, separate_norm, shard
from moeplan.costmodels.constants import HOST
from moeplan.costmodels.counts import block_weights
from moeplan.costmodels.exchange import context_exchange, exposed_expert_exchange_s, tensor_exchange
from moeplan.costmodels.kernels import PassTimes, dense_gemm_s, dense_times, routed_times, visible_host_s
from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layouts, mask_of
from moeplan.costmodels.model import Attention, Block, LatentAttention, Layer, Mlp, Model, Moe
from moeplan.costmodels.scheduled import RoutedLayer, exposed, shared_gain_s
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

DENSE_FIELDS = ("tp", "cp", "micro_batch", "sequence_parallel", "recompute", "tp_overlap", "cuda_graphs")
"""What the dense part of a layer depends on."""
ROUTED_FIELDS = (
    "cp", "micro_batch", "ep", "etp", "recompute", "dispatcher", "ep_overlap", "shared_overlap", "schedule", "cuda_graphs",
)  # fmt: skip
"""What routed experts depend on in folded layouts."""


@dataclass(slots=True)
class _Share:
    """What one block, or one part of it, contributes, [n]."""

    times: PassTimes
    again: Any
    """Forward seconds that the backward repeats."""
    launches: Any
    """Kernels that the host launches in the forward, in one chunk."""
    chunks: tuple[Any, Any] = (1.0, 1.0)
    """Chunks of forward and backward, each with all the launches."""


_INSIDE_EXPERTS = mask_of(["moe_act", "moe", "full"], RECOMPUTE_MODULES)
"""Recompute modules that touch routed experts."""
_INSIDE_EXPERTS_ONLY = mask_of(["moe_act"], RECOMPUTE_MODULES)


def fold(layouts: Layouts) -> Layouts:
    """Layouts as routed experts see them: tp = 1 and the same tokens per rank, cp taking tp's share of the sequence.

    The micro-batch and cp are reduced by their common divisor, and recompute is reduced to what touches routed experts, so that
    few layouts remain distinct.
    """
    ways = layouts.cp * shard(layouts)
    common = np.gcd(ways, layouts.micro_batch)
    ones = np.ones(len(layouts), np.int64)
    return layouts.with_columns(
        tp=ones,
        cp=ways // common,
        micro_batch=layouts.micro_batch // common,
        sequence_parallel=ones > 1,
        recompute=layouts.recompute & _INSIDE_EXPERTS,
    )


def without_experts(layouts: Layouts) -> Layouts:
    """Layouts as dense parts see them: recompute without what only touches routed experts."""
    return layouts.with_columns(recompute=layouts.recompute & ~_INSIDE_EXPERTS_ONLY)


def dense_part(layer: Layer, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> dict[str, Any]:
    """Everything of `layer` but its routed experts, by part."""
    return both_passes(dense_passes(layer, model, profile, workload, layouts))


def routed_part(layer: Layer, model: Model, profile: Profile, workload: Workload, folded: Layouts) -> dict[str, Any]:
    """Routed experts of `layer` under folded layouts, by part; empty for a dense layer."""
    return both_passes(routed_passes(layer, model, profile, workload, folded))


def dense_passes(layer: Layer, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """Everything of `layer` but its routed experts, forward and backward apart."""
    out = PassTimes()
    for block in layer.blocks:
        out.merge(_passes(_dense_share(block, model, profile, workload, layouts), profile, workload, layouts))
    return out


def routed_passes(layer: Layer, model: Model, profile: Profile, workload: Workload, folded: Layouts) -> PassTimes:
    """Routed experts of `layer` under folded layouts, forward and backward apart; empty for a dense layer."""
    out = PassTimes()
    for block in layer.blocks:
        if isinstance(block, Moe):
            out.merge(_passes(_routed_share(block, model, profile, workload, folded), profile, workload, folded))
    return out


def both_passes(passes: PassTimes) -> dict[str, Any]:
    """Forward plus backward, by part."""
    return {name: seconds + passes.backward[name] for name, seconds in passes.forward.items()}


def layer_time(layer: Layer, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> dict[str, Any]:
    """Seconds of `layer` and one micro-batch under every layout, by part."""
    parts = dense_part(layer, model, profile, workload, layouts)
    for name, seconds in routed_part(layer, model, profile, workload, fold(layouts)).items():
        parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _passes(share: _Share, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """The passes of a share: its own parts, what the backward recomputes, and the launches that device time does not hide."""
    full = layouts.recomputes("full")
    forward, backward = sum(share.times.forward.values()), sum(share.times.backward.values())
    again = np.where(full, forward, share.again)
    host = share.launches * launch_s(profile, workload)
    there, back = share.chunks
    repeated = np.where(full, there, 0.0)
    out = PassTimes()
    out.merge(share.times)
    out.add("recompute", 0.0, again)
    out.add(
        "host launches",
        visible_host_s(forward, there * host),
        visible_host_s(backward + again, (HOST.backward * back + repeated) * host),
    )
    return out


def _dense_share(block: Block, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> _Share:
    """Everything but routed experts: projections, attention, dense and shared feed-forward, and their exchanges."""
    times = dense_times(block, model, profile, workload, layouts)
    times.merge(tensor_exchange(block, model, profile, workload, layouts))
    core = times.forward.get("attention core", 0.0), times.backward.get("attention core", 0.0)
    times.merge(context_exchange(block, profile, workload, layouts, *core))
    norm = profile.stream_s(4.0 * model.hidden * rank_tokens(workload, layouts) / shard(layouts), "norm")
    whole = sum(times.forward.values())
    again = np.where(layouts.recomputes("layernorm") & separate_norm(block), norm, 0.0)
    if isinstance(block, (Attention, LatentAttention)):
        again = again + np.where(layouts.recomputes("core_attn"), times.forward["attention core"], 0.0)
    if isinstance(block, LatentAttention):
        up = (w for w in block_weights(block, model.hidden) if w.name in ("q_up", "q", "kv_up"))
        tokens, gemm = rank_tokens(workload, layouts), workload.precision.gemm
        seconds = sum(dense_gemm_s(w, tokens, profile, gemm, layouts)[0] for w in up)
        again = again + np.where(layouts.recomputes("mla_up_proj"), seconds, 0.0)
    if isinstance(block, Mlp):
        again = again + np.where(layouts.recomputes("mlp"), whole - norm, 0.0)
    if isinstance(block, Moe):
        again = again + np.where(layouts.recomputes("shared_experts") | layouts.recomputes("moe"), whole - norm, 0.0)
    return _Share(times, again, _dense_launches(block, layouts))


def _routed_share(block: Moe, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> _Share:
    """Routed experts: router, dispatch, expert products, combine."""
    times = routed_times(block, model, profile, workload, layouts)
    question = RoutedLayer(block, model, profile, workload, layouts)
    launches = routed_launches(block, workload, layouts)
    there = back = exposed_expert_exchange_s(block, model, profile, workload, layouts)
    chunks: tuple[Any, Any] = (1.0, 1.0)
    if layouts.shared_overlap.any() and block.shared_width:
        gains = shared_gain_s(question)
        apart = layouts.shared_overlap & ~layouts.ep_overlap  # 1F1B overlap hides the exchange already, and excludes this
        there, back = (there - np.where(apart, gain, 0.0) for gain in gains)
    if any(layouts.schedules):
        left = exposed(question, there, back, launches * launch_s(profile, workload))
        there, back, chunks = left.forward_s, left.backward_s, (left.forward_chunks, left.backward_chunks)
    times.add("expert all-to-all", there, back)
    activation = np.where(layouts.recomputes("moe_act"), times.forward["expert activation"], 0.0)
    again = np.where(layouts.recomputes("moe"), sum(times.forward.values()), activation)
    return _Share(times, again, launches, chunks)


def launch_s(profile: Profile, workload: Workload) -> float:
    """Seconds in which the host launches a kernel."""
    return workload.era.host_s_per_kernel[profile.cluster.device.host] * profile.host


def routed_launches(block: Moe, workload: Workload, layouts: Layouts) -> Any:
    """Kernels that the host launches in the forward of routed experts, CUDA graphs taken off, [n]."""
    fused = layouts.dispatches_with("deepep", "hybridep")
    base = np.where(fused, HOST.moe_fused, HOST.moe) * np.where(layouts.graphs("moe_router"), HOST.graphed_router, 1.0)
    factor = HOST.quantized_expert_factor if workload.precision.gemm != "bf16" else 1.0
    each = HOST.per_expert * factor + (HOST.per_expert_bias if block.bias else 0.0)
    launches = base + each * block.experts / layouts.ep
    launches = launches * np.where(layouts.ep_overlap, HOST.overlapped, 1.0)
    return np.where(layouts.graphs("full_iteration"), 0.0, launches)


def _dense_launches(block: Block, layouts: Layouts) -> Any:
    """Kernels that the host launches in the forward of a block without its routed part, CUDA graphs taken off, [n]."""
    attention = np.where(layouts.graphs("attn"), HOST.graphed_attention, 1.0)
    count: Any
    match block:
        case Attention():
            count = HOST.attention * attention
        case LatentAttention():
            count = HOST.latent_attention * attention
        case Mlp():
            count = np.where(layouts.graphs("mlp"), 0.0, HOST.mlp)
        case Moe():
            count = 0.0 * layouts.tp
        case _:
            count = np.where(layouts.graphs("mamba"), HOST.graphed_attention, 1.0) * HOST.scan
    return np.where(layouts.graphs("full_iteration"), 0.0, count)
