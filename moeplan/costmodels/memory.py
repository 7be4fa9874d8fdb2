"""Bytes on the device that depend on how parameters are spread: weights, gradients, optimizer states and their buffers.

Exact counts times bytes, sharded over dp*cp (dense) and edp (experts) as the layout says; what the framework keeps beside that
is named in `constants.py`. Quantised training keeps the weights of linear layers quantised; embedding and head stay in bf16.
`peak.py` adds what micro-batches hold, `price.py` puts the parts together; their sum is what the framework's allocator reports
as peak allocated. `reserve_bytes` must stay free beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.counts import Weight, layer_weights
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.megatron_counts import (
    embedding_held,
    final_norm_held,
    head_held,
    layer_held,
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
    plain: Any
    """Those of embedding and head, which no recipe quantises; part of `dense`."""


def micro_batches(workload: Workload, layouts: Layouts) -> Any:
    """Micro-batches of a step on one data-parallel rank, [n]."""
    return workload.global_batch / (layouts.micro_batch * layouts.dp)


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
    ends = slice(len(model.kinds), len(model.kinds) + 2)
    return StageParameters(counts @ units.dense, counts @ units.expert, counts[:, ends] @ units.dense[ends])


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes that one parameter costs a rank, by part, [n]."""

    dense: dict[str, Any]
    expert: dict[str, Any]
    plain: dict[str, Any]
    """Beyond `dense`, for embedding and head; empty where they cost no more."""
    step: tuple[Any, ...]
    """Of a dense and of an expert parameter, in the optimizer step alone: fp32 copies of bf16 gradients; none of fp32 ones."""

    @property
    def tables(self) -> list[dict[str, Any]]:
        """`dense`, `expert` and, where there is any, `plain`."""
        return [self.dense, self.expert, *([self.plain] if self.plain else [])]

    def of(self, held: StageParameters) -> dict[str, Any]:
        """Bytes of all parameters of a rank by part."""
        return {
            name: self.dense[name] * held.dense + self.expert[name] * held.expert + self.plain.get(name, 0.0) * held.plain
            for name in self.dense
        }


def state_bytes(model: Model, device: Device, workload: Workload, layouts: Layouts) -> StateBytes:
    """Bytes of weights, gradients and optimizer states for each dense and each expert parameter that a rank holds, [n]."""
    fsdp, ddp = layouts.shards_as("fsdp"), layouts.shards_as("ddp")
    weight, gradient = workload.precision.weight_bytes(device), float(workload.gradient_bytes)
    # PyTorch's FSDP shards fp32 weights, which are the optimizer's own, and gathers them in bf16; Megatron keeps both.
    masters = workload.era.framework == "pytorch"
    sharded, gathered = (4.0, 2.0) if masters else (weight, weight)
    states = (4.0 + 2.0 * workload.moment_bytes - np.where(fsdp & masters, 4.0, 0.0)) * (1.0 - layouts.optimizer_offload)
    # Two gathered layers at a time; under a pipeline the whole stage stays gathered, with its gradients in the precision of
    # their reduction, from the first micro-batch to the last.
    two_layers = 2.0 / np.maximum(len(model.layers) / layouts.pp, 2.0)
    piped = layouts.pp > 1
    held_weight = np.where(fsdp, np.where(piped, gathered, gathered * two_layers), 0.0)
    held_gradient = np.where(fsdp & piped, gradient, 0.0)

    def each(shards: Any) -> dict[str, Any]:
        kept = 1.0 / np.where(fsdp, shards, 1)
        # Sharding the optimizer alone is ZeRO-2 where it is not Megatron's: gradients are sharded with it.
        reduced = 1.0 / np.where(ddp, 1, shards) if masters else kept
        return {
            "weights": np.where(fsdp, sharded, weight) * kept,
            "gathered weights": held_weight,
            "gradients": gradient * reduced + held_gradient,
            "optimizer states": states / np.where(ddp, 1, shards),
        }

    dense, expert = layouts.dp * layouts.cp, layouts.edp
    bf16 = workload.gradient_bytes == 2 and not masters
    copies = MEMORY.step_gradient * (1.0 - layouts.optimizer_offload) * ~fsdp
    step = (copies / np.where(ddp, 1, dense), copies / np.where(ddp, 1, expert)) if bf16 else ()
    # Embedding and head stay in bf16, and gathered from first to last: they belong to the outermost unit.
    plain = np.where(fsdp, 0.0, 2.0 - weight)
    whole = np.where(fsdp & ~piped, 2.0 - held_weight, 0.0)
    extra = {"weights": plain, "gathered weights": whole} if plain.any() or whole.any() else {}
    return StateBytes(dense=each(dense), expert=each(expert), plain=extra, step=step)


def least_state_bytes(model: Model, device: Device, workload: Workload, layouts: Layouts) -> Any:
    """A lower bound on the peak of the fullest rank, [n]: states of the layers spread evenly over pp."""
    states = state_bytes(model, device, workload, layouts).of(mean_parameters(model, layouts))
    return sum(states.values()) + gradient_buffers(model, layouts) + MEMORY.workspace_bytes


def mean_parameters(model: Model, layouts: Layouts) -> StageParameters:
    """Parameters of a rank if the decoder layers were spread evenly over pp, [n]; the fullest rank holds no less."""
    keys, of_row = layouts.distinct("tp", "ep", "etp")
    dense: Any = 0.0
    expert: Any = 0.0
    for k, kind in enumerate(model.kinds):
        held = layer_held(kind, model, keys.tp, keys.ep, keys.etp)
        count = model.kind_of_layer.count(k)
        dense, expert = dense + count * held.dense, expert + count * held.expert
    return StageParameters(np.asarray(dense)[of_row] / layouts.pp, np.asarray(expert)[of_row] / layouts.pp, plain=0.0)


def least_most_parameters(model: Model, layouts: Layouts) -> StageParameters:
    """Most dense and most expert parameters of any rank, the fewest that a split leaves, [n]: layers are not cut."""
    keys, of_row = layouts.distinct("tp", "ep", "etp", "pp")
    mean = mean_parameters(model, keys)
    held = [layer_held(kind, model, keys.tp, keys.ep, keys.etp) for kind in model.kinds]
    counts = [model.kind_of_layer.count(k) for k in range(len(model.kinds))]
    dense, expert = mean.dense, mean.expert
    for one, count in zip(held, counts, strict=True):
        fullest = np.ceil(count / keys.pp)
        dense, expert = np.maximum(dense, fullest * one.dense), np.maximum(expert, fullest * one.expert)
    lightest = functools.reduce(np.minimum, (one.dense for one in held))
    dense = np.maximum(dense, np.ceil(sum(counts) / keys.pp) * lightest)
    return StageParameters(dense[of_row], expert[of_row], plain=0.0)


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
