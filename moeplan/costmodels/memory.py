"""Peak bytes on the device: what depends on layers and micro-batches, and what depends on how parameters are spread.

Weights, gradients and optimizer states are exact counts times bytes, sharded over dp*cp (dense) and edp (experts) as the
layout says; activations are the saved bytes of every layer times the micro-batches in flight; the last stage adds logits; what
the framework keeps beside that is named in `constants.py`. In flight on rank r of p (arXiv:2104.04473): 1F1B p - r, interleaved
with v chunks (2 (p - 1 - r) + (v - 1) p + 1) / v, never more than the micro-batches of the step. `price.py` puts the parts
together; their sum is what the framework's allocator reports as peak allocated. `reserve_bytes` must stay free beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import layer_activation_bytes, rank_tokens, shard, working_set_bytes
from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.counts import Weight, layer_weights
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.megatron_counts import (
    embedding_held,
    final_norm_held,
    head_held,
    layer_held,
    padded_vocab,
    prediction_held,
)
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import StageTable
from moeplan.costmodels.workload import Workload
from moeplan.profiles.hardware import Device


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Parameters that a rank of each binding stage holds, [K, n]."""

    dense: Any
    expert: Any


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one micro-batch, [n] each."""

    kinds: list[Any]
    """Saved by one layer of each kind."""
    mtp: Any
    """Saved by one prediction layer."""
    logits: Any
    """Held for a moment by the stage with the head."""
    working: Any
    """Held for a moment in the backward of the widest layer."""


def micro_batches(workload: Workload, layouts: Layouts) -> Any:
    """Micro-batches of a step on one data-parallel rank, [n]."""
    return workload.global_batch / (layouts.micro_batch * layouts.dp)


def in_flight(pp: Any, vpp: Any, rank: Any, batches: Any) -> Any:
    """Micro-batches whose activations pipeline rank `rank` holds at its peak, in units of all its layers."""
    plain = pp - rank
    interleaved = (2 * (pp - 1 - rank) + (vpp - 1) * pp + 1) / vpp
    return np.minimum(np.where(vpp > 1, interleaved, plain), batches)


def stage_parameters(model: Model, layouts: Layouts, table: StageTable) -> StageParameters:
    """Parameters held by the binding ranks of every layout, [K, n]."""
    keys, of_row = layouts.distinct("tp", "ep", "etp")
    rows = table.of_row
    dense: Any = 0.0
    expert: Any = 0.0
    for k, kind in enumerate(model.kinds):
        held = layer_held(kind, model, keys.tp, keys.ep, keys.etp)
        count = table.kinds[k][:, rows]
        dense = dense + count * held.dense[of_row]
        if kind.is_moe:
            expert = expert + count * held.expert[of_row]
    embedding, head = embedding_held(model, keys.tp).dense[of_row], head_held(model, keys.tp).dense[of_row]
    first, last = table.embedding[:, rows], table.head[:, rows]
    tied_here = first * last if model.tied else 0.0  # one stage holds both: the tied matrix exists once
    dense = dense + first * embedding + last * (head + final_norm_held(model).dense) - tied_here * head
    if model.mtp:
        held = prediction_held(model, keys.tp, keys.ep, keys.etp)
        holds = table.mtp[:, rows] / len(model.mtp)
        # Prediction layers bring a copy of the embedding unless their rank holds it anyway.
        dense = dense + holds * (held.dense[of_row] + (1.0 - first) * embedding)
        expert = expert + holds * held.expert[of_row]
    return StageParameters(dense, expert + 0.0 * dense)


def state_bytes(model: Model, device: Device, workload: Workload, layouts: Layouts, held: StageParameters) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer states of a rank that holds `held`, by part, [K, n]."""
    fsdp, ddp = layouts.shards_as("fsdp"), layouts.shards_as("ddp")
    dense_shards, expert_shards = layouts.dp * layouts.cp, layouts.edp
    weight, gradient = workload.precision.weight_bytes(device), float(workload.gradient_bytes)
    states = (4.0 + 2.0 * workload.moment_bytes) * (1.0 - layouts.optimizer_offload)
    # FSDP keeps weights and gradients sharded, and two gathered layers at a time.
    kept = held.dense / np.where(fsdp, dense_shards, 1) + held.expert / np.where(fsdp, expert_shards, 1)
    gathered = np.where(fsdp, 2.0 * (held.dense + held.expert) / np.maximum(len(model.layers) / layouts.pp, 1.0), 0.0)
    sharded = held.dense / np.where(ddp, 1, dense_shards) + held.expert / np.where(ddp, 1, expert_shards)
    return {
        "weights": weight * kept,
        "gathered weights": weight * gathered,
        "gradients": gradient * kept,
        "optimizer states": states * sharded,
        "wgrad buffers": np.where(fsdp, 0.0, _dummy_gradients(model, layouts)) + 0.0 * kept,
    }


def least_state_bytes(model: Model, device: Device, workload: Workload, layouts: Layouts) -> Any:
    """A lower bound on the peak of the fullest rank, [n]: states of the layers spread evenly over pp."""
    return sum(state_bytes(model, device, workload, layouts, mean_parameters(model, layouts)).values())


def mean_parameters(model: Model, layouts: Layouts) -> StageParameters:
    """Parameters of a rank if the decoder layers were spread evenly over pp, [n]; the fullest rank holds no less."""
    keys, of_row = layouts.distinct("tp", "ep", "etp")
    dense: Any = 0.0
    expert: Any = 0.0
    for k, kind in enumerate(model.kinds):
        held = layer_held(kind, model, keys.tp, keys.ep, keys.etp)
        count = model.kind_of_layer.count(k)
        dense, expert = dense + count * held.dense, expert + count * held.expert
    return StageParameters(np.asarray(dense)[of_row] / layouts.pp, np.asarray(expert)[of_row] / layouts.pp)


def layer_memory(model: Model, workload: Workload, layouts: Layouts) -> LayerMemory:
    """Bytes that one micro-batch keeps or needs for a moment, by what causes them, [n]."""
    tokens = rank_tokens(workload, layouts)
    kinds = [layer_activation_bytes(kind, model, workload, layouts) for kind in model.kinds]
    mtp: Any = 0.0 * tokens
    if model.mtp:
        layers = sum(layer_activation_bytes(x, model, workload, layouts) for x in model.mtp) / len(model.mtp)
        mtp = layers + 4.0 * tokens * model.hidden / shard(layouts)
    vocab = padded_vocab(model, layouts.tp) / layouts.tp
    logits = MEMORY.logits * tokens * vocab + (MEMORY.head_gradient * vocab + MEMORY.head_input * tokens) * model.hidden
    working: Any = 0.0
    for kind, kept in zip(model.kinds, kinds, strict=True):
        need = working_set_bytes(kind, model, workload, layouts)
        # A fully recomputed layer is whole again while its backward runs.
        full = layouts.recomputes("full")
        if full.any():
            whole = layer_activation_bytes(kind, model, workload, layouts.with_columns(recompute=0 * layouts.recompute))
            need = need + np.where(full, np.maximum(whole - kept, 0.0), 0.0)
        working = np.maximum(working, need)
    return LayerMemory(kinds, mtp, logits, working)


def _dummy_gradients(model: Model, layouts: Layouts) -> Any:
    """Bytes of the bf16 buffers that gradient-accumulation fusion keeps, one for every distinct weight shape, [n]."""
    shapes = {(w.out, w.inp, w.shard) for w in _gemm_weights(model)}
    total: Any = 0.0 * layouts.tp
    for out, inp, cut in shapes:
        total = total + float(out * inp) / (layouts.etp if cut.is_expert else layouts.tp if cut.is_cut else 1)
    return MEMORY.dummy_gradient * total


def _gemm_weights(model: Model) -> Iterable[Weight]:
    for kind in (*model.kinds, *model.mtp):
        yield from (w for w in layer_weights(kind, model) if w.gemm and w.name != "router")


def reserve_bytes(peak: Any) -> Any:
    """Device bytes that must stay free beside a peak allocated of `peak`: context, communicators, fragmentation."""
    return MEMORY.context_bytes + MEMORY.communicator_bytes + MEMORY.fragmentation * peak
