"""What Megatron refuses of dispatchers, overlaps, CUDA graphs and recompute (megatron-core 0.19.2), as `Rule`s.

The conditions stand in its argument checks, configuration classes and schedules; those that are not Megatron's say whose they
are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.layout import GRAPH_SCOPES, RECOMPUTE_MODULES, Layout, Layouts, mask_of
from moeplan.costmodels.model import Attention, LatentAttention, Mlp, Moe
from moeplan.costmodels.moe_choice import parse_choices
from moeplan.costmodels.recompute import check_counts, parse_counts
from moeplan.costmodels.stages import chunk_letters
from moeplan.planner.problem import Problem
from moeplan.planner.rules import Rule, blocks

LINKED = 2.0
"""Times the rate of PCIe beyond which GPUs are joined by NVLink: without it they have that of PCIe, with it 3.1 times."""
DEEPEP_PEERS = 8
"""Ranks that DeepEP joins over NVLink (`NUM_MAX_NVL_PEERS`); what it sends further goes by RDMA."""


def _tensor_overlap(p: Problem, x: Layouts) -> Any:
    return x.tp_overlap & ~(x.sequence_parallel & (x.tp > 1))


def _dispatcher(p: Problem, x: Layouts) -> Any:
    none = x.dispatches_with("none")
    return none if p.model.moe is not None else ~none


def _dispatcher_era(p: Problem, x: Layouts) -> Any:
    return ~x.dispatches_with("none", *p.workload.era.dispatchers)


def _dispatcher_device(p: Problem, x: Layouts) -> Any:
    device = p.profile.cluster.device
    either = device.vendor == "nvidia" and 8.0 <= device.capability_number < 11.0
    deepep = either and (device.host != "grace" or device.capability_number < 10.0)
    return x.dispatches_with("hybridep") & (not either) | x.dispatches_with("deepep") & (not deepep)


def _dispatcher_link(p: Problem, x: Layouts) -> Any:
    cluster = p.profile.cluster
    linked = cluster.device.host == "grace" or cluster.scale_up.bytes_per_s > LINKED * cluster.pcie.bytes_per_s
    return x.dispatches_with("deepep", "hybridep") & (not linked)


def _deepep_group(p: Problem, x: Layouts) -> Any:
    return x.dispatches_with("deepep") & (x.etp * x.ep == 1)


def _deepep_domain(p: Problem, x: Layouts) -> Any:
    return x.dispatches_with("deepep") & (np.minimum(x.etp * x.ep, DEEPEP_PEERS) > p.profile.cluster.domain_gpus)


def _overlap_experts(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & ((x.ep == 1) | ~x.dispatches_with("alltoall", "deepep", "hybridep"))


def _overlap_pipeline(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (x.pp > 1) & (x.vpp == 1)


def _overlap_prediction(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (len(p.model.mtp) > 1)


def _overlap_fsdp(p: Problem, x: Layouts) -> Any:
    by_layer = (x.cuda_graphs != 0) & ~x.graphs("full_iteration")
    return x.ep_overlap & x.shards_as("fsdp") & ((x.vpp > 1) | by_layer)


def _overlap_bias(p: Problem, x: Layouts) -> Any:
    biased = any(b.qkv_bias for b in blocks(p.model, Attention))
    return x.ep_overlap & x.dp_overlap & x.graphs("attn") & biased


def _overlap_era(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (not p.workload.era.ep_overlap)


def _shared_overlap(p: Problem, x: Layouts) -> Any:
    has = p.model.moe is not None and p.model.moe.shared_width > 0
    return x.shared_overlap & (x.ep_overlap | ~x.dispatches_with("alltoall", "deepep", "hybridep") | (not has))


def _shared_era(p: Problem, x: Layouts) -> Any:
    return x.shared_overlap & (not p.workload.era.shared_overlap)


def _shared_recompute(p: Problem, x: Layouts) -> Any:
    return x.shared_overlap & x.recomputes("shared_experts")


def _schedule(x: Layouts) -> Any:
    """Whether MoE layers have a schedule of their own, [n]."""
    return np.array([bool(text) for text in x.schedules])[x.schedule]


def _schedule_target(p: Problem, x: Layouts) -> Any:
    return _schedule(x) & (p.target == "megatron")


def _schedule_experts(p: Problem, x: Layouts) -> Any:
    return _schedule(x) & (x.ep_overlap | x.shared_overlap | ~x.dispatches_with("alltoall", "deepep", "hybridep"))


def _schedule_kinds(p: Problem, x: Layouts) -> Any:
    counts = np.array([len(parse_choices(text)) for text in x.schedules])[x.schedule]
    return (counts > 1) & (counts != len(blocks(p.model, Moe)))


def _graph_era(p: Problem, x: Layouts) -> Any:
    return (x.cuda_graphs & ~mask_of(p.workload.era.graph_scopes, GRAPH_SCOPES)) != 0


def _graph_scopes(p: Problem, x: Layouts) -> Any:
    # In a hybrid with experts Megatron takes every feed-forward layer for one of experts.
    dense = bool(blocks(p.model, Mlp)) and not (p.model.is_hybrid and p.model.moe is not None)
    out = x.graphs("moe_preprocess") & ~x.graphs("moe_router")
    out = out | x.graphs("moe") | x.graphs("mlp") & (not dense)
    out = out | (x.graphs("moe_router") | x.graphs("moe_preprocess")) & (p.model.moe is None)
    return out | x.graphs("full_iteration") & (x.cuda_graphs != mask_of(["full_iteration"], GRAPH_SCOPES))


def _graph_capacity(p: Problem, x: Layouts) -> Any:
    return x.graphs("moe_preprocess") & x.dispatches_with("alltoall") & (p.workload.capacity_factor > 0)


def _overlap_graphs(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (x.graphs("moe") | x.graphs("mlp"))


def _overlap_recompute(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (x.recomputes("full") | x.recomputes("moe"))


def _full_alone(p: Problem, x: Layouts) -> Any:
    return x.recomputes("full") & (x.recompute != mask_of(["full"], RECOMPUTE_MODULES))


def _counts_fault(p: Problem, x: Layout) -> str | None:
    """What is wrong with a layout that recomputes some layers of its chunks; None if nothing."""
    chunks = chunk_letters(p.model, x.pp, x.vpp, x.stages)
    layers = [chunk.count("t") for chunk in chunks]
    if fault := check_counts(x.recompute_layers, layers):
        return fault
    if not x.recompute:
        return "nothing is recomputed"
    if p.target != "megatron":
        return None
    said = parse_counts(x.recompute_layers)
    if not isinstance(said, int):
        return "Megatron takes one number for all chunks"
    if x.recompute != ("full",):
        return f"Megatron recomputes {'+'.join(x.recompute)} in all layers"
    if not said:
        return "Megatron takes a number of at least 1"
    # A number that covers all layers still says that prediction layers do not recompute.
    if said > max(layers) or said == max(layers) and not p.model.mtp:
        return f"{said} leaves out no layer of a chunk: the largest has {max(layers)}"
    return None


def _recompute_layers(p: Problem, x: Layouts) -> Any:
    out = np.zeros(len(x), np.bool_)
    if any(x.recompute_counts):
        rows = np.flatnonzero(np.array([bool(text) for text in x.recompute_counts])[x.recompute_count])
        keys, of_row = x.take(rows).distinct("pp", "vpp", "split", "recompute_count", "recompute")
        faults = [_counts_fault(p, keys.row(i)) is not None for i in range(len(keys))]
        out[rows] = np.array(faults, np.bool_)[of_row]
    return out


def _recompute_blocks(p: Problem, x: Layouts) -> Any:
    out = x.recomputes("mla_up_proj") & (not blocks(p.model, LatentAttention))
    return out | x.recomputes("moe_act") & (p.model.moe is None)


def _recompute_delayed(p: Problem, x: Layouts) -> Any:
    return (x.recomputes("moe_act") | x.recomputes("layernorm")) & (p.workload.precision.name == "fp8-delayed")


def _recompute_graphs(p: Problem, x: Layouts) -> Any:
    scoped = (x.cuda_graphs != 0) & ~x.graphs("full_iteration")
    return scoped & x.recomputes("full") | x.graphs("moe_router") & x.recomputes("moe")


FEATURE_RULES: tuple[Rule, ...] = (
    Rule(
        "graph-era", "degrees", "CUDA graph scopes exist in the software era (ours)", _graph_era,
        lambda p, x: f"CUDA graphs over {'+'.join(x.cuda_graphs)} do not exist in era {p.workload.era.name}",
        "choose a later --era",
    ),
    Rule(
        "graph-scopes", "degrees",
        "graph scopes fit the model: mlp needs dense layers, moe_preprocess needs moe_router, dropless experts are not graphed",
        _graph_scopes,
        lambda p, x: f"CUDA graph scopes {'+'.join(x.cuda_graphs)} do not go together or not with {p.model.name}",
    ),
    Rule(
        "tensor-overlap", "features", "tensor-parallel overlap needs sequence parallelism over tp > 1", _tensor_overlap,
        lambda p, x: f"tp_overlap with tp={x.tp}, sequence_parallel={x.sequence_parallel}",
    ),
    Rule(
        "dispatcher-model", "features", "a dispatcher is set exactly for models with experts (ours)", _dispatcher,
        lambda p, x: f"dispatcher '{x.dispatcher}' for a model with{'out' if p.model.moe is None else ''} experts",
    ),
    Rule(
        "dispatcher-era", "features", "the dispatcher exists in the software era (ours)", _dispatcher_era,
        lambda p, x: f"dispatcher '{x.dispatcher}' does not exist in era {p.workload.era.name}", "choose a later --era",
    ),
    Rule(
        "dispatcher-device", "features",
        "DeepEP and HybridEP run on NVIDIA's Ampere, Hopper and Blackwell, DeepEP not on Blackwell beside a Grace "
        "(Megatron-Bridge's)",
        _dispatcher_device,
        lambda p, x: f"dispatcher '{x.dispatcher}' does not run on {p.profile.cluster.device.name}", "use alltoall",
    ),
    Rule(
        "dispatcher-link", "features", "DeepEP and HybridEP need NVLink between the GPUs of a node (DeepEP's)",
        _dispatcher_link,
        lambda p, x: f"'{x.dispatcher}' needs NVLink, {p.profile.cluster.name} has {p.profile.cluster.scale_up.name}",
        "use alltoall",
    ),
    Rule(
        "deepep-group", "features", "DeepEP needs etp * ep > 1", _deepep_group,
        lambda p, x: f"dispatcher 'deepep' with etp*ep = {x.etp}*{x.ep}", "use alltoall",
    ),
    Rule(
        "deepep-domain", "features", "the first 8 ranks of a group of experts share an NVLink domain (DeepEP's)",
        _deepep_domain,
        lambda p, x: f"dispatcher 'deepep' with etp*ep = {x.etp}*{x.ep} over domains of {p.profile.cluster.domain_gpus}",
        "use alltoall",
    ),
    Rule(
        "graph-capacity", "features", "a graphed moe_preprocess with alltoall excludes a capacity factor", _graph_capacity,
        lambda p, x: f"CUDA graphs over moe_preprocess with alltoall and capacity factor {p.workload.capacity_factor:g}",
    ),
    Rule(
        "overlap-experts", "features", "expert overlap needs ep > 1 and a dispatcher other than allgather", _overlap_experts,
        lambda p, x: f"ep_overlap with ep={x.ep} and dispatcher '{x.dispatcher}'",
    ),
    Rule(
        "overlap-pipeline", "features", "expert overlap with pp > 1 needs virtual stages", _overlap_pipeline,
        lambda p, x: f"ep_overlap with pp={x.pp} and vpp={x.vpp}", "use vpp > 1",
    ),
    Rule(
        "overlap-prediction", "features", "expert overlap takes at most one prediction (MTP) layer", _overlap_prediction,
        lambda p, x: f"ep_overlap with {len(p.model.mtp)} prediction layers",
    ),
    Rule(
        "overlap-fsdp", "features", "expert overlap with FSDP takes no virtual stages and no CUDA graphs of single layers",
        _overlap_fsdp,
        lambda p, x: f"ep_overlap with FSDP, vpp={x.vpp} and CUDA graphs over {'+'.join(x.cuda_graphs) or 'nothing'}",
    ),
    Rule(
        "overlap-bias", "features", "expert and gradient overlap with graphed attention exclude attention biases",
        _overlap_bias,
        lambda p, x: f"ep_overlap and dp_overlap with CUDA graphs over attn, but {p.model.name} has attention biases",
        "leave attn out of the CUDA graphs",
    ),
    Rule(
        "overlap-era", "features", "expert overlap exists in the software era (ours)", _overlap_era,
        lambda p, x: f"ep_overlap does not exist in era {p.workload.era.name}", "choose a later --era",
    ),
    Rule(
        "overlap-graphs", "features", "expert overlap excludes CUDA graphs over moe or mlp", _overlap_graphs,
        lambda p, x: f"ep_overlap with CUDA graphs over {'+'.join(x.cuda_graphs)}",
    ),
    Rule(
        "shared-overlap", "features",
        "overlap of shared experts needs shared experts, a dispatcher other than allgather and no expert overlap",
        _shared_overlap,
        lambda p, x: f"shared_overlap with ep_overlap={x.ep_overlap} and dispatcher '{x.dispatcher}'"
        + ("" if p.model.moe is not None and p.model.moe.shared_width else f", but {p.model.name} has no shared experts"),
    ),
    Rule(
        "shared-era", "features", "overlap of shared experts exists in the software era (ours)", _shared_era,
        lambda p, x: f"shared_overlap does not exist in era {p.workload.era.name}", "choose a later --era",
    ),
    Rule(
        "schedule-target", "features", "Megatron runs no schedule of MoE layers but its own (ours)", _schedule_target,
        lambda p, x: f"moe_schedule '{x.moe_schedule}' is nothing that Megatron runs", "use --target research to price it",
    ),
    Rule(
        "schedule-experts", "features",
        "a schedule of MoE layers needs a dispatcher other than allgather and excludes Megatron's overlaps (ours)",
        _schedule_experts,
        lambda p, x: f"moe_schedule '{x.moe_schedule}' with dispatcher '{x.dispatcher}', ep_overlap={x.ep_overlap}, "
        f"shared_overlap={x.shared_overlap}",
    ),
    Rule(
        "schedule-kinds", "features", "schedules of MoE layers are one for all, or one for each kind of MoE block (ours)",
        _schedule_kinds,
        lambda p, x: f"moe_schedule '{x.moe_schedule}' names {len(parse_choices(x.moe_schedule))} schedules, "
        f"{p.model.name} has {len(blocks(p.model, Moe))} kinds of MoE blocks",
    ),
    Rule(
        "shared-recompute", "recompute", "overlap of shared experts excludes their recompute", _shared_recompute,
        lambda p, x: f"shared_overlap with recompute of {'+'.join(x.recompute)}",
    ),
    Rule(
        "overlap-recompute", "recompute", "expert overlap excludes recompute of whole layers or of moe", _overlap_recompute,
        lambda p, x: f"ep_overlap with recompute of {'+'.join(x.recompute)}",
    ),
    Rule(
        "recompute-full", "recompute", "recompute of whole layers takes no module list", _full_alone,
        lambda p, x: f"recompute of {'+'.join(x.recompute)}: 'full' stands alone",
    ),
    Rule(
        "recompute-layers", "recompute",
        "recompute of some layers: whole ones, and one number for all chunks that leaves one out (ours; research takes any)",
        _recompute_layers, lambda p, x: f"recompute_layers '{x.recompute_layers}': {_counts_fault(p, x)}",
        "leave recompute_layers out to recompute in all layers",
    ),
    Rule(
        "recompute-blocks", "recompute", "mla_up_proj needs latent attention, moe_act needs experts", _recompute_blocks,
        lambda p, x: f"recompute of {'+'.join(x.recompute)}: {p.model.name} lacks what one of them names",
    ),
    Rule(
        "recompute-delayed", "recompute", "delayed scaling excludes recompute of moe_act and layernorm", _recompute_delayed,
        lambda p, x: f"recompute of {'+'.join(x.recompute)} with {p.workload.precision.name}",
    ),
    Rule(
        "recompute-graphs", "recompute", "scoped CUDA graphs exclude full recompute, a graphed router recompute of moe",
        _recompute_graphs,
        lambda p, x: f"recompute of {'+'.join(x.recompute)} with CUDA graphs over {'+'.join(x.cuda_graphs)}",
    ),
)  # fmt: skip
