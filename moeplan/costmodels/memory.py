"""Peak bytes on the device: what depends on layers and micro-batches, and what depends on how parameters are spread.

Weights, gradients and optimizer states are exact counts times bytes, sharded over dp*cp (dense) and edp (experts) as the
layout says; activations are the saved bytes of every layer times the micro-batches in flight; the last stage adds logits; what
the framework keeps beside that is named in `constants.py`. In flight on rank r of p (arXiv:2104.04473): 1F1B p - r, interleaved
with v chunks (2 (p - 1 - r) + (v - 1) p + 1) / v, never more than the micro-batches of the step. `price.py` puts the parts
together; their sum is what the framework's allocator reports as peak allocated. `reserve_bytes` must stay free beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import (
    dense_activation_bytes,
    dense_working_bytes,
    rank_tokens,
    routed_activation_bytes,
    routed_working_bytes,
    shard,
)  # fmt: skip
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
from moeplan.costmodels.stages import Ranks
from moeplan.costmodels.workload import Workload
from moeplan.profiles.hardware import Device


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Parameters that a rank of each binding stage holds, [K, n]."""

    dense: Any
    expert: Any


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one micro-batch in one part of the layers (dense or routed), [n] each."""

    kinds: list[Any]
    """Saved by one layer of each kind."""
    mtp: Any
    """Saved by one prediction layer."""
    working: Any
    """Held for a moment in the backward of the widest layer."""
    whole: Any
    """What a fully recomputed layer holds beside that while its backward runs."""
    logits: Any
    """Held for a moment by the stage with the head (dense part only)."""


def micro_batches(workload: Workload, layouts: Layouts) -> Any:
    """Micro-batches of a step on one data-parallel rank, [n]."""
    return workload.global_batch / (layouts.micro_batch * layouts.dp)


def in_flight(pp: Any, vpp: Any, rank: Any, batches: Any) -> Any:
    """Micro-batches whose activations pipeline rank `rank` holds at its peak, in units of all its layers."""
    plain = pp - rank
    interleaved = (2 * (pp - 1 - rank) + (vpp - 1) * pp + 1) / vpp
    return np.minimum(np.where(vpp > 1, interleaved, plain), batches)


@dataclass(frozen=True, slots=True)
class UnitParameters:
    """Parameters that one rank holds of everything a stage can hold, [units, n]; see `rank_counts` for the units."""

    dense: Any
    expert: Any


def unit_parameters(model: Model, layouts: Layouts) -> UnitParameters:
    """Parameters of a layer of each kind, of the embedding, of the head, of the final norm and of all prediction layers."""
    degrees = layouts.tp, layouts.ep, layouts.etp
    held = [layer_held(kind, model, *degrees) for kind in model.kinds]
    held += [embedding_held(model, layouts.tp), head_held(model, layouts.tp), final_norm_held(model)]
    held += [prediction_held(model, *degrees)] if model.mtp else []
    shape = (len(layouts),)
    return UnitParameters(
        np.stack([np.broadcast_to(np.asarray(h.dense, np.float64), shape) for h in held]),
        np.stack([np.broadcast_to(np.asarray(h.expert, np.float64), shape) for h in held]),
    )


def rank_counts(model: Model, ranks: Ranks) -> Any:
    """How many of each unit the given pipeline ranks hold, [K, units]."""
    # One stage that holds both ends of a tied model holds their matrix once.
    both = ranks.embedding * ranks.head if model.tied else 0.0 * ranks.head
    predicts = [np.minimum(ranks.mtp, 1.0)] if model.mtp else []
    columns = [*ranks.kinds.T, ranks.copies, ranks.head - both, ranks.norms, *predicts]
    return np.stack(columns, axis=1)


def rank_parameters(model: Model, ranks: Ranks, units: UnitParameters) -> StageParameters:
    """Parameters held by the given pipeline ranks, [K, n]."""
    counts = rank_counts(model, ranks)
    return StageParameters(counts @ units.dense, counts @ units.expert)


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes that one parameter costs a rank, by part, [n]."""

    dense: dict[str, Any]
    expert: dict[str, Any]

    def of(self, held: StageParameters) -> dict[str, Any]:
        """Bytes of all parameters of a rank by part."""
        return {name: self.dense[name] * held.dense + self.expert[name] * held.expert for name in self.dense}


def state_bytes(model: Model, device: Device, workload: Workload, layouts: Layouts) -> StateBytes:
    """Bytes of weights, gradients and optimizer states for each dense and each expert parameter that a rank holds, [n]."""
    fsdp, ddp = layouts.shards_as("fsdp"), layouts.shards_as("ddp")
    weight, gradient = workload.precision.weight_bytes(device), float(workload.gradient_bytes)
    states = (4.0 + 2.0 * workload.moment_bytes) * (1.0 - layouts.optimizer_offload)
    # FSDP keeps weights and gradients sharded, and two gathered layers at a time.
    gathered = np.where(fsdp, 2.0 * weight / np.maximum(len(model.layers) / layouts.pp, 1.0), 0.0)

    def each(shards: Any) -> dict[str, Any]:
        kept = 1.0 / np.where(fsdp, shards, 1)
        return {
            "weights": weight * kept,
            "gathered weights": gathered,
            "gradients": gradient * kept,
            "optimizer states": states / np.where(ddp, 1, shards),
        }

    return StateBytes(dense=each(layouts.dp * layouts.cp), expert=each(layouts.edp))


def least_state_bytes(model: Model, device: Device, workload: Workload, layouts: Layouts) -> Any:
    """A lower bound on the peak of the fullest rank, [n]: states of the layers spread evenly over pp."""
    states = state_bytes(model, device, workload, layouts).of(mean_parameters(model, layouts))
    return sum(states.values()) + gradient_buffers(model, layouts)


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


def dense_memory(model: Model, workload: Workload, layouts: Layouts) -> LayerMemory:
    """What one micro-batch keeps or needs for a moment outside routed experts, [n]."""
    tokens = rank_tokens(workload, layouts)
    kinds = [dense_activation_bytes(kind, model, workload, layouts) for kind in model.kinds]
    mtp: Any = 0.0 * tokens
    if model.mtp:
        layers = sum(dense_activation_bytes(x, model, workload, layouts) for x in model.mtp) / len(model.mtp)
        mtp = layers + 4.0 * tokens * model.hidden / shard(layouts)
    vocab = padded_vocab(model, layouts.tp) / layouts.tp
    logits = MEMORY.logits * tokens * vocab + (MEMORY.head_gradient * vocab + MEMORY.head_input * tokens) * model.hidden
    working = _most(dense_working_bytes(kind, model, workload, layouts) for kind in model.kinds)
    plain = layouts.with_columns(recompute=0 * layouts.recompute)
    whole = _most(dense_activation_bytes(kind, model, workload, plain) for kind in model.kinds)
    return LayerMemory(kinds, mtp, working, np.where(layouts.recomputes("full"), whole, 0.0), logits)


def routed_memory(model: Model, workload: Workload, layouts: Layouts) -> LayerMemory:
    """What routed experts keep or need for a moment under folded layouts, [n]."""
    kinds = [routed_activation_bytes(kind, model, workload, layouts) for kind in model.kinds]
    none: Any = np.zeros(len(layouts))
    mtp = sum((routed_activation_bytes(x, model, workload, layouts) for x in model.mtp), none) / max(1, len(model.mtp))
    working = _most(routed_working_bytes(kind, model, workload, layouts) for kind in model.kinds)
    plain = layouts.with_columns(recompute=0 * layouts.recompute)
    whole = _most(routed_activation_bytes(kind, model, workload, plain) for kind in model.kinds)
    return LayerMemory(kinds, mtp, working, np.where(layouts.recomputes("full"), whole, 0.0), none)


def _most(values: Iterable[Any]) -> Any:
    return functools.reduce(np.maximum, values)


def gradient_buffers(model: Model, layouts: Layouts) -> Any:
    """Bytes of the bf16 buffers that gradient-accumulation fusion keeps, one for every distinct weight shape, [n]."""
    shapes = {(w.out, w.inp, w.shard) for w in _gemm_weights(model)}
    total: Any = 0.0 * layouts.tp
    for out, inp, cut in shapes:
        total = total + float(out * inp) / (layouts.etp if cut.is_expert else layouts.tp if cut.is_cut else 1)
    return np.where(layouts.shards_as("fsdp"), 0.0, MEMORY.dummy_gradient * total)


def _gemm_weights(model: Model) -> Iterable[Weight]:
    for kind in (*model.kinds, *model.mtp):
        yield from (w for w in layer_weights(kind, model) if w.gemm and w.name != "router")


def reserve_bytes(peak: Any) -> Any:
    """Device bytes that must stay free beside a peak allocated of `peak`: context, communicators, fragmentation."""
    return MEMORY.context_bytes + MEMORY.communicator_bytes + MEMORY.fragmentation * peak


def largest_peak_bytes(device_bytes: float) -> float:
    """The peak allocated that, with what must stay free beside it, just fills `device_bytes`."""
    return (device_bytes - MEMORY.context_bytes - MEMORY.communicator_bytes) / (1.0 + MEMORY.fragmentation)
