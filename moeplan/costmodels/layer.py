"""Time of one layer for one micro-batch: device work, exposed communication, recompute and host launches.

Forward and backward of a layer are the sums of their blocks' parts. A recompute module adds the forward of its parts to the
backward. Where launching the kernels takes the host about as long as running them, the pass takes
(device^3 + host^3)^(1/3): launches run ahead of the device unless the two are close. What a block costs depends on few fields
of a layout, and what routed experts cost only on the tokens of a rank, not on how tp, cp and micro-batch make them; each part
is computed on its distinct inputs and gathered. Units: seconds, [n].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, separate_norm, shard
from moeplan.costmodels.constants import HOST
from moeplan.costmodels.counts import block_weights
from moeplan.costmodels.exchange import context_exchange, expert_exchange, tensor_exchange
from moeplan.costmodels.kernels import PassTimes, dense_gemm_s, dense_times, routed_times
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model import Attention, Block, LatentAttention, Layer, Mlp, Model, Moe
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

DENSE_FIELDS = ("tp", "cp", "micro_batch", "sequence_parallel", "recompute", "tp_overlap", "cuda_graphs")
"""What the dense part of a block depends on."""
ROUTED_FIELDS = ("cp", "micro_batch", "ep", "etp", "recompute", "dispatcher", "ep_overlap", "cuda_graphs")
"""What routed experts depend on, once tp and cp are folded into the tokens of a rank."""


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer and micro-batch, [n]."""

    parts: dict[str, Any]
    """Forward plus backward seconds by part; sums to `forward + backward`."""
    forward: Any
    backward: Any
    """With what is recomputed."""


@dataclass(slots=True)
class _Share:
    """What one block, or one part of it, contributes, [n]."""

    times: PassTimes
    again: Any
    """Forward seconds that the backward repeats."""
    launches: Any
    """Kernels that the host launches in the forward."""


def layer_time(layer: Layer, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> LayerTime:
    """Time of `layer` under every layout."""
    times, again, launches = PassTimes(), np.zeros(len(layouts)), np.zeros(len(layouts))
    folded = _folded(layouts)
    for block in layer.blocks:
        for share in _shares(block, model, profile, workload, layouts, folded):
            times.merge(share.times)
            again = again + share.again
            launches = launches + share.launches
    full = layouts.recomputes("full")
    forward_device, backward_device = sum(times.forward.values()), sum(times.backward.values())
    again = np.where(full, forward_device, again)
    parts = {name: times.forward[name] + times.backward[name] for name in times.forward}
    parts["recompute"] = again
    host = launches * workload.era.host_s_per_kernel[profile.cluster.device.host]
    forward, extra_forward = _with_host(forward_device, host)
    backward, extra_backward = _with_host(backward_device + again, (HOST.backward + np.where(full, 1.0, 0.0)) * host)
    parts["host launches"] = extra_forward + extra_backward
    return LayerTime(parts, forward, backward)


def _shares(
    block: Block, model: Model, profile: Profile, workload: Workload, layouts: Layouts, folded: Layouts
) -> list[_Share]:
    """The dense part of a block, and its routed part if it has one."""
    dense = _on_distinct(layouts, DENSE_FIELDS, lambda keys: _dense_share(block, model, profile, workload, keys))
    if not isinstance(block, Moe):
        return [dense]
    return [dense, _on_distinct(folded, ROUTED_FIELDS, lambda keys: _routed_share(block, model, profile, workload, keys))]


def _folded(layouts: Layouts) -> Layouts:
    """Layouts with tp = 1 and the same tokens per rank: cp takes tp's share of the sequence, reduced by the micro-batch."""
    ways = layouts.cp * shard(layouts)
    common = np.gcd(ways, layouts.micro_batch)
    ones = np.ones(len(layouts), np.int64)
    return layouts.with_columns(
        tp=ones, cp=ways // common, micro_batch=layouts.micro_batch // common, sequence_parallel=ones > 1
    )


def _on_distinct(layouts: Layouts, fields: tuple[str, ...], price: Callable[[Layouts], _Share]) -> _Share:
    """`price` on the layouts that differ in `fields`, gathered for every layout."""
    keys, of_row = layouts.distinct(*fields)
    if len(keys) == len(layouts):
        return price(layouts)
    share = price(keys)

    def gather(values: Any) -> Any:
        return np.broadcast_to(values, len(keys))[of_row]

    times = PassTimes(
        {name: gather(v) for name, v in share.times.forward.items()},
        {name: gather(v) for name, v in share.times.backward.items()},
    )
    return _Share(times, gather(share.again), gather(share.launches))


def _with_host(device: Any, host: Any) -> tuple[Any, Any]:
    joined = (device**HOST.sharpness + host**HOST.sharpness) ** (1.0 / HOST.sharpness)
    return joined, joined - device


def _dense_share(block: Block, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> _Share:
    """Everything but routed experts: projections, attention, dense and shared feed-forward, and their exchanges."""
    times = dense_times(block, model, profile, workload, layouts)
    times.merge(tensor_exchange(block, model, profile, workload, layouts))
    core = times.forward.get("attention core", 0.0), times.backward.get("attention core", 0.0)
    times.merge(context_exchange(block, profile, workload, layouts, *core))
    norm = profile.stream_s(4.0 * model.hidden * rank_tokens(workload, layouts) / shard(layouts))
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
    times.merge(expert_exchange(block, model, profile, workload, layouts))
    activation = np.where(layouts.recomputes("moe_act"), times.forward["expert activation"], 0.0)
    again = np.where(layouts.recomputes("moe"), sum(times.forward.values()), activation)
    fused = layouts.dispatches_with("deepep", "hybridep")
    base = np.where(fused, HOST.moe_fused, HOST.moe) * np.where(layouts.graphs("moe_router"), HOST.graphed_router, 1.0)
    factor = HOST.quantized_expert_factor if workload.precision.scales_per_tensor else 1.0
    launches = base + HOST.per_expert * factor * block.experts / layouts.ep
    return _Share(times, again, np.where(layouts.graphs("full_iteration"), 0.0, launches))


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
