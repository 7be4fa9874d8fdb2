"""What a framework refuses: named rules over layouts.

The rules are Megatron's (megatron-core 0.19.2: its argument checks, configuration classes, process groups, and what a running
step asserts), for the fields that a layout has; the few that are ours say so. Each gives for many layouts at once whether it is
broken, and for one layout why. A rule belongs to the level whose fields it reads, so that a search can apply it before it
spreads out further fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplan.costmodels.layout import GRAPH_SCOPES, RECOMPUTE_MODULES, Layout, Layouts, mask_of
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.model import Attention, LatentAttention, LinearAttention, Mamba, Mlp, Model, Moe
from moeplan.costmodels.stages import check_split
from moeplan.planner.problem import Problem

Level = Literal["degrees", "chunks", "batch", "features", "recompute"]
LEVELS: tuple[Level, ...] = ("degrees", "chunks", "batch", "features", "recompute")
"""Levels in the order in which a search settles fields; a rule reads fields of its level and of earlier ones only."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of one layout."""

    rule: str
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.hint})" if self.hint else self.reason


@dataclass(frozen=True, slots=True)
class Rule:
    """A named condition that a layout must not meet."""

    name: str
    level: Level
    demands: str
    """What it asks for, in one line; the documentation prints these."""
    broken: Callable[[Problem, Layouts], Any]
    """Whether each layout breaks it, [n]."""
    reason: Callable[[Problem, Layout], str]
    """Why one layout breaks it, with the numbers."""
    hint: str = ""
    """What to try."""


def violations(problem: Problem, layout: Layout) -> list[Violation]:
    """All rules that `layout` breaks; none: the framework accepts it."""
    one = Layouts.of([layout])
    return [Violation(r.name, r.reason(problem, layout), r.hint) for r in RULES if np.any(r.broken(problem, one))]


def _blocks(model: Model, *kinds: type) -> list[Any]:
    return [b for b in model.blocks if isinstance(b, kinds)]


def _any(conditions: Iterable[Any], layouts: Layouts) -> Any:
    out = np.zeros(len(layouts), np.bool_)
    for condition in conditions:
        out = out | condition
    return out


def _world(p: Problem, x: Layouts) -> Any:
    return x.tp * x.cp * x.dp * x.pp != p.profile.cluster.gpus


def _attention_heads(p: Problem, x: Layouts) -> Any:
    return _any((b.heads % x.tp != 0 for b in _blocks(p.model, Attention, LatentAttention)), x)


def _query_groups(p: Problem, x: Layouts) -> Any:
    return _any(((b.kv_heads % x.tp != 0) & (x.tp % b.kv_heads != 0) for b in _blocks(p.model, Attention)), x)


def _state_heads(p: Problem, x: Layouts) -> Any:
    both = x.tp * x.cp
    linear = ((b.key_heads % both != 0) | (b.value_heads % both != 0) for b in _blocks(p.model, LinearAttention))
    mamba = ((b.heads % x.tp != 0) | (b.groups % x.tp != 0) for b in _blocks(p.model, Mamba))
    return _any(linear, x) | _any(mamba, x)


def _widths(p: Problem, x: Layouts) -> Any:
    dense = (b.width % x.tp != 0 for b in _blocks(p.model, Mlp))
    experts = ((b.width % x.etp != 0) | (b.shared_width % x.tp != 0) for b in _blocks(p.model, Moe))
    return _any(dense, x) | _any(experts, x)


def _experts(p: Problem, x: Layouts) -> Any:
    moe = _blocks(p.model, Moe)
    return _any((b.experts % x.ep != 0 for b in moe), x) if moe else (x.ep > 1) | (x.etp > 1)


def _expert_bias(p: Problem, x: Layouts) -> Any:
    return (x.etp > 1) & any(b.bias for b in _blocks(p.model, Moe))


def _context(p: Problem, x: Layouts) -> Any:
    return (x.cp > 1) & (p.workload.seq_len % (2 * x.cp) != 0)


def _sequence_shards(p: Problem, x: Layouts) -> Any:
    return x.sequence_parallel & (x.tp > 1) & (p.workload.seq_len % (x.tp * x.cp) != 0)


def _moe_sequence_parallel(p: Problem, x: Layouts) -> Any:
    return (x.tp > 1) & ~x.sequence_parallel & (p.model.moe is not None)


def _quantized_ddp(p: Problem, x: Layouts) -> Any:
    return x.shards_as("ddp") & p.workload.precision.primary_quantized


def _moments_ddp(p: Problem, x: Layouts) -> Any:
    return x.shards_as("ddp") & (p.workload.moment_bytes == 2)


def _offload_sharding(p: Problem, x: Layouts) -> Any:
    return (x.optimizer_offload > 0) & ~x.shards_as("optimizer")


def _offload_quantized(p: Problem, x: Layouts) -> Any:
    recipe = p.workload.precision
    return (x.optimizer_offload > 0) & (recipe.primary_quantized and recipe.name != "fp8-delayed")


def _virtual(p: Problem, x: Layouts) -> Any:
    return (x.vpp > 1) & (x.pp == 1)


def _chunks(p: Problem, x: Layouts) -> Any:
    return x.pp * x.vpp > len(p.model.layers) + 2


def _split(p: Problem, x: Layouts) -> Any:
    layers, mtp = len(p.model.layers), len(p.model.mtp)
    explicit = np.array([bool(s) for s in x.stages])[x.split]
    out = ~explicit & (layers % (x.pp * x.vpp) != 0)
    key = (x.split * (int(x.pp.max(initial=1)) + 1) + x.pp) * (int(x.vpp.max(initial=1)) + 1) + x.vpp
    _, first, place = np.unique(key[explicit], return_index=True, return_inverse=True)
    rows = np.flatnonzero(explicit)[first]
    wrong = [check_split(x.stages[x.split[i]], layers, mtp, int(x.pp[i]), int(x.vpp[i])) is not None for i in rows]
    out[explicit] = np.array(wrong, np.bool_)[place]
    return out


def _split_reason(p: Problem, x: Layout) -> str:
    layers = len(p.model.layers)
    if not x.stages:
        return f"pp*vpp = {x.pp}*{x.vpp} = {x.pp * x.vpp} chunks do not divide the {layers} layers"
    return f"pipeline split '{x.stages}': {check_split(x.stages, layers, len(p.model.mtp), x.pp, x.vpp)}"


def _global_batch(p: Problem, x: Layouts) -> Any:
    return p.workload.global_batch % (x.micro_batch * x.dp) != 0


def _interleaving(p: Problem, x: Layouts) -> Any:
    m = micro_batches(p.workload, x)
    return (x.vpp > 1) & ((m < x.pp) | (m % x.pp != 0))


def _tensor_overlap(p: Problem, x: Layouts) -> Any:
    return x.tp_overlap & ~(x.sequence_parallel & (x.tp > 1))


def _dispatcher(p: Problem, x: Layouts) -> Any:
    none = x.dispatches_with("none")
    return none if p.model.moe is not None else ~none


def _dispatcher_era(p: Problem, x: Layouts) -> Any:
    return ~x.dispatches_with("none", *p.workload.era.dispatchers)


def _dispatcher_vendor(p: Problem, x: Layouts) -> Any:
    return x.dispatches_with("deepep", "hybridep") & (p.profile.cluster.device.vendor != "nvidia")


def _deepep_group(p: Problem, x: Layouts) -> Any:
    return x.dispatches_with("deepep") & (x.etp * x.ep == 1)


def _overlap_experts(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & ((x.ep == 1) | ~x.dispatches_with("alltoall", "deepep", "hybridep"))


def _overlap_pipeline(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (x.pp > 1) & (x.vpp == 1)


def _overlap_prediction(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (len(p.model.mtp) > 1)


def _overlap_fsdp(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & x.shards_as("fsdp") & (x.vpp > 1)


def _overlap_era(p: Problem, x: Layouts) -> Any:
    return x.ep_overlap & (not p.workload.era.ep_overlap)


def _graph_era(p: Problem, x: Layouts) -> Any:
    return (x.cuda_graphs & ~mask_of(p.workload.era.graph_scopes, GRAPH_SCOPES)) != 0


def _graph_scopes(p: Problem, x: Layouts) -> Any:
    # In a hybrid with experts Megatron takes every feed-forward layer for one of experts.
    dense = bool(_blocks(p.model, Mlp)) and not (p.model.is_hybrid and p.model.moe is not None)
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


def _recompute_blocks(p: Problem, x: Layouts) -> Any:
    out = x.recomputes("mla_up_proj") & (not _blocks(p.model, LatentAttention))
    return out | x.recomputes("moe_act") & (p.model.moe is None)


def _recompute_delayed(p: Problem, x: Layouts) -> Any:
    return (x.recomputes("moe_act") | x.recomputes("layernorm")) & (p.workload.precision.name == "fp8-delayed")


def _recompute_graphs(p: Problem, x: Layouts) -> Any:
    scoped = (x.cuda_graphs != 0) & ~x.graphs("full_iteration")
    return scoped & x.recomputes("full") | x.graphs("moe_router") & x.recomputes("moe")


def _sizes(p: Problem, *kinds: type, field: str) -> str:
    return ", ".join(str(n) for n in dict.fromkeys(getattr(b, field) for b in _blocks(p.model, *kinds)))


RULES: tuple[Rule, ...] = (
    Rule(
        "world-size", "degrees", "tp * cp * dp * pp is the number of GPUs", _world,
        lambda p, x: f"tp*cp*dp*pp = {x.tp}*{x.cp}*{x.dp}*{x.pp} = {x.world} is not the {p.profile.cluster.gpus} GPUs",
        "change dp, or the cluster",
    ),
    Rule(
        "attention-heads", "degrees", "tp divides the attention heads", _attention_heads,
        lambda p, x: f"tp={x.tp} does not divide the {_sizes(p, Attention, LatentAttention, field='heads')} attention heads",
    ),
    Rule(
        "query-groups", "degrees", "tp divides the query groups, or they divide tp", _query_groups,
        lambda p, x: f"tp={x.tp} and the {_sizes(p, Attention, field='kv_heads')} query groups do not divide each other",
    ),
    Rule(
        "state-heads", "degrees", "tp * cp divides linear-attention heads; tp divides Mamba heads and groups", _state_heads,
        lambda p, x: f"tp*cp = {x.tp}*{x.cp} does not divide the heads or groups of the state-space or linear-attention blocks",
    ),
    Rule(
        "feed-forward-width", "degrees", "tp divides dense and shared-expert widths, etp the expert width", _widths,
        lambda p, x: f"tp={x.tp} or etp={x.etp} does not divide a feed-forward width ({_sizes(p, Mlp, Moe, field='width')})",
    ),
    Rule(
        "experts", "degrees", "ep divides the experts; a dense model has ep = etp = 1", _experts,
        lambda p, x: f"ep={x.ep}, etp={x.etp} do not suit a model with {_sizes(p, Moe, field='experts') or 'no'} experts",
    ),
    Rule(
        "expert-bias", "degrees", "experts with biases are not cut over etp", _expert_bias,
        lambda p, x: f"etp={x.etp}, but the experts of {p.model.name} have biases", "use etp=1",
    ),
    Rule(
        "context-chunks", "degrees", "with cp > 1 the sequence is a multiple of 2 * cp", _context,
        lambda p, x: f"sequence length {p.workload.seq_len} is not a multiple of 2*cp = {2 * x.cp}",
    ),
    Rule(
        "sequence-shards", "degrees", "with sequence parallelism the sequence is a multiple of tp * cp", _sequence_shards,
        lambda p, x: f"sequence length {p.workload.seq_len} is not a multiple of tp*cp = {x.tp}*{x.cp} = {x.tp * x.cp}",
    ),
    Rule(
        "moe-sequence-parallel", "degrees", "mixture of experts with tp > 1 needs sequence parallelism", _moe_sequence_parallel,
        lambda p, x: f"tp={x.tp} without sequence parallelism, but {p.model.name} has experts", "set sequence_parallel",
    ),
    Rule(
        "quantized-ddp", "degrees", "quantised weights need the distributed optimizer or FSDP", _quantized_ddp,
        lambda p, x: f"sharding 'ddp' with quantised weights of {p.workload.precision.name}", "use sharding=optimizer",
    ),
    Rule(
        "moments-ddp", "degrees", "bf16 moments need the distributed optimizer or FSDP", _moments_ddp,
        lambda p, x: f"sharding 'ddp' with moments of {p.workload.moment_bytes} bytes", "use sharding=optimizer",
    ),
    Rule(
        "offload-sharding", "degrees", "optimizer offload needs the distributed optimizer (instead of FSDP: ours)",
        _offload_sharding,
        lambda p, x: f"optimizer offload {x.optimizer_offload:g} with sharding '{x.sharding}'", "use sharding=optimizer",
    ),
    Rule(
        "offload-quantized", "degrees", "optimizer offload with quantised weights needs delayed scaling", _offload_quantized,
        lambda p, x: f"optimizer offload {x.optimizer_offload:g} with quantised weights of {p.workload.precision.name}",
        "use --precision bf16 or fp8-delayed",
    ),
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
        "virtual-stages", "chunks", "virtual stages need pp > 1", _virtual,
        lambda p, x: f"vpp={x.vpp} with pp=1", "use vpp=1",
    ),
    Rule(
        "pipeline-chunks", "chunks", "there are at most two chunks more than layers (ours)", _chunks,
        lambda p, x: f"pp*vpp = {x.pp}*{x.vpp} = {x.pp * x.vpp} chunks for {len(p.model.layers)} layers",
    ),
    Rule(
        "pipeline-split", "chunks", "pp * vpp divides the layers, or the split is written out and valid", _split, _split_reason,
        "give an explicit split, like 'Et*3|(tt|)*29m|L'",
    ),
    Rule(
        "global-batch", "batch", "the global batch is a multiple of micro-batch * dp", _global_batch,
        lambda p, x: f"global batch {p.workload.global_batch} is not a multiple of micro_batch*dp = {x.micro_batch}*{x.dp} = "
        f"{x.micro_batch * x.dp}",
    ),
    Rule(
        "interleaving", "batch", "with vpp > 1 the micro-batches are a multiple of pp", _interleaving,
        lambda p, x: f"{p.workload.global_batch / (x.micro_batch * x.dp):g} micro-batches are not a multiple of pp={x.pp} "
        f"with vpp={x.vpp}",
        "use vpp=1, or another micro-batch",
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
        "dispatcher-vendor", "features", "DeepEP and HybridEP run on NVIDIA devices (ours)", _dispatcher_vendor,
        lambda p, x: f"dispatcher '{x.dispatcher}' does not run on {p.profile.cluster.device.name}", "use alltoall",
    ),
    Rule(
        "deepep-group", "features", "DeepEP needs etp * ep > 1", _deepep_group,
        lambda p, x: f"dispatcher 'deepep' with etp*ep = {x.etp}*{x.ep}", "use alltoall",
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
        "overlap-fsdp", "features", "expert overlap with FSDP takes no virtual stages", _overlap_fsdp,
        lambda p, x: f"ep_overlap with FSDP and vpp={x.vpp}",
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
        "overlap-recompute", "recompute", "expert overlap excludes recompute of whole layers or of moe", _overlap_recompute,
        lambda p, x: f"ep_overlap with recompute of {'+'.join(x.recompute)}",
    ),
    Rule(
        "recompute-full", "recompute", "recompute of whole layers takes no module list (ours)", _full_alone,
        lambda p, x: f"recompute of {'+'.join(x.recompute)}: 'full' stands alone",
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
"""All rules, in the order in which a search applies them."""
