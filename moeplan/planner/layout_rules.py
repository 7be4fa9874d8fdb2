"""What Megatron refuses of degrees, pipeline splits and batches (megatron-core 0.19.2), as `Rule`s.

The conditions stand in its argument checks, configuration classes, process groups and layers; those that are not Megatron's
say whose they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.exchange import exchanges_heads
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.model import Attention, LatentAttention, LinearAttention, Mamba, Mlp, Moe
from moeplan.costmodels.stages import check_split, parse_split
from moeplan.planner.problem import Problem
from moeplan.planner.rules import Rule, any_of, blocks
from moeplan.units import GIB

ROTARY_TABLE = 4096
"""Positions of the rotary table that Megatron makes for latent attention before training starts."""


def _world(p: Problem, x: Layouts) -> Any:
    return x.tp * x.cp * x.dp * x.pp != p.profile.cluster.gpus


def _attention_heads(p: Problem, x: Layouts) -> Any:
    return any_of((b.heads % x.tp != 0 for b in blocks(p.model, Attention, LatentAttention)), x)


def _query_groups(p: Problem, x: Layouts) -> Any:
    def uneven(block: Attention) -> Any:
        columns = ((2 if block.gate else 1) * block.heads + 2 * block.kv_heads) * block.head_dim
        return (block.kv_heads % x.tp != 0) & ((x.tp % block.kv_heads != 0) | (columns % x.tp != 0))

    return any_of((uneven(b) for b in blocks(p.model, Attention)), x)


def _state_heads(p: Problem, x: Layouts) -> Any:
    both = x.tp * x.cp
    linear = ((b.key_heads % both != 0) | (b.value_heads % both != 0) for b in blocks(p.model, LinearAttention))
    return any_of(linear, x) | any_of((_mamba_heads(b, x) for b in blocks(p.model, Mamba)), x)


def _mamba_heads(block: Mamba, x: Layouts) -> Any:
    groups = np.maximum(block.groups // x.tp, 1)
    shared = np.where(groups < x.cp, x.cp % groups, groups % x.cp)  # a group may be on several ranks, or several on one
    return (block.heads % (x.tp * x.cp) != 0) | (block.groups % x.tp != 0) | (shared != 0)


def _widths(p: Problem, x: Layouts) -> Any:
    dense = (b.width % x.tp != 0 for b in blocks(p.model, Mlp))
    experts = ((b.width % x.etp != 0) | (b.shared_width % x.tp != 0) for b in blocks(p.model, Moe))
    return any_of(dense, x) | any_of(experts, x)


def _experts(p: Problem, x: Layouts) -> Any:
    moe = blocks(p.model, Moe)
    return any_of((b.experts % x.ep != 0 for b in moe), x) if moe else (x.ep > 1) | (x.etp > 1)


def _expert_bias(p: Problem, x: Layouts) -> Any:
    return (x.etp > 1) & any(b.bias for b in blocks(p.model, Moe))


def _context(p: Problem, x: Layouts) -> Any:
    return (x.cp > 1) & (p.workload.seq_len % (2 * x.cp) != 0)


def _rotary_table(p: Problem, x: Layouts) -> Any:
    return (x.cp > 1) & (ROTARY_TABLE % (2 * x.cp) != 0) & bool(blocks(p.model, LatentAttention))


def _context_heads(p: Problem, x: Layouts) -> Any:
    def uneven(block: Attention) -> Any:
        groups = np.maximum(block.kv_heads // x.tp, 1)
        return (groups % x.cp != 0) | (block.heads // x.tp % x.cp != 0)

    return any_of((uneven(b) for b in blocks(p.model, Attention) if exchanges_heads(b, p.workload.seq_len)), x)


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


def _offload_host(p: Problem, x: Layouts) -> Any:
    cluster = p.profile.cluster
    each = cluster.host_memory_bytes / min(cluster.gpus_per_node, cluster.gpus)
    # fp32 weights, two moments and the gradient that the host works on; hosts of no known memory hold all
    needed = 16.0 * parameter_count(p.model).total * x.optimizer_offload / (x.tp * x.cp * x.dp * x.pp)
    return (each > 0) & (needed > each)


def _offload_quantized(p: Problem, x: Layouts) -> Any:
    recipe = p.workload.precision
    return (x.optimizer_offload > 0) & (recipe.primary_quantized and recipe.name != "fp8-delayed")


def _virtual(p: Problem, x: Layouts) -> Any:
    return (x.vpp > 1) & (x.pp == 1)


def _chunks(p: Problem, x: Layouts) -> Any:
    return x.pp * x.vpp > len(p.model.layers) + 2


def _split_fault(p: Problem, text: str, pp: int, vpp: int) -> str | None:
    model = p.model
    fault = check_split(text, len(model.layers), len(model.mtp), pp, vpp)
    if fault is None and model.is_hybrid and model.mtp and "m" not in parse_split(text)[-1]:
        return "a Mamba hybrid keeps its prediction layers beside the head"
    return fault


def _split(p: Problem, x: Layouts) -> Any:
    layers = len(p.model.layers)
    explicit = np.array([bool(s) for s in x.stages])[x.split]
    out = ~explicit & (layers % (x.pp * x.vpp) != 0)
    key = (x.split * (int(x.pp.max(initial=1)) + 1) + x.pp) * (int(x.vpp.max(initial=1)) + 1) + x.vpp
    _, first, place = np.unique(key[explicit], return_index=True, return_inverse=True)
    rows = np.flatnonzero(explicit)[first]
    wrong = [_split_fault(p, x.stages[x.split[i]], int(x.pp[i]), int(x.vpp[i])) is not None for i in rows]
    out[explicit] = np.array(wrong, np.bool_)[place]
    return out


def _split_reason(p: Problem, x: Layout) -> str:
    layers = len(p.model.layers)
    if not x.stages:
        return f"pp*vpp = {x.pp}*{x.vpp} = {x.pp * x.vpp} chunks do not divide the {layers} layers"
    return f"pipeline split '{x.stages}': {_split_fault(p, x.stages, x.pp, x.vpp)}"


def _global_batch(p: Problem, x: Layouts) -> Any:
    return p.workload.global_batch % (x.micro_batch * x.dp) != 0


def _interleaving(p: Problem, x: Layouts) -> Any:
    m = micro_batches(p.workload, x)
    return (x.vpp > 1) & ((m < x.pp) | (m % x.pp != 0))


def _sizes(p: Problem, *kinds: type, field: str) -> str:
    return ", ".join(str(n) for n in dict.fromkeys(getattr(b, field) for b in blocks(p.model, *kinds)))


LAYOUT_RULES: tuple[Rule, ...] = (
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
        "query-groups", "degrees", "tp divides the query groups, or they divide tp and tp their projection", _query_groups,
        lambda p, x: f"tp={x.tp} and the {_sizes(p, Attention, field='kv_heads')} query groups do not divide each other, "
        f"or tp={x.tp} does not divide the projection of queries, keys and values",
    ),
    Rule(
        "state-heads", "degrees", "tp * cp divides linear-attention and Mamba heads; tp divides Mamba groups", _state_heads,
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
        "rotary-table", "degrees", f"with cp > 1 latent attention cuts a table of {ROTARY_TABLE} positions into 2 * cp parts",
        _rotary_table,
        lambda p, x: f"the rotary table of {ROTARY_TABLE} positions is not a multiple of 2*cp = {2 * x.cp}",
        "use a power of two for cp",
    ),
    Rule(
        "context-heads", "degrees",
        "cp divides the heads and query groups of a rank where attention has windows or sinks (Transformer Engine's)",
        _context_heads,
        lambda p, x: f"cp={x.cp} does not divide the heads or query groups that tp={x.tp} leaves a rank of {p.model.name}",
        "use cp=1",
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
        "offload-host", "degrees", "offloaded optimizer states fit the memory of the hosts, 16 bytes a parameter (ours)",
        _offload_host,
        lambda p, x: f"optimizer offload {x.optimizer_offload:g} on {x.world} GPUs with "
        f"{p.profile.cluster.host_memory_bytes / GIB:,.0f} GiB of host memory a node", "use less offload or more GPUs",
    ),
    Rule(
        "offload-quantized", "degrees", "optimizer offload with quantised weights needs delayed scaling", _offload_quantized,
        lambda p, x: f"optimizer offload {x.optimizer_offload:g} with quantised weights of {p.workload.precision.name}",
        "use --precision bf16 or fp8-delayed",
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
)  # fmt: skip
