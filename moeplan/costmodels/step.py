"""Time of one training step: what one micro-batch costs, and what a step costs once.

What one micro-batch takes on the units of work that pipeline ranks hold, forward and backward, makes the span of all passes
(`bubble.py`). Sends between stages, gradient reduction and parameter gather add what their overlap leaves exposed; the
optimizer and a fixed overhead close the step. `price.py` puts these together. Units: seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, shard
from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.collectives import Group, all_gather_s, group, reduce_scatter_s, send_s
from moeplan.costmodels.constants import OVERLAP, STEP
from moeplan.costmodels.layer import both_passes, dense_part, routed_part
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model import Model
from moeplan.costmodels.passes import head_passes, projection_passes
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile


@dataclass(frozen=True, slots=True)
class UnitTime:
    """Seconds of one micro-batch in one thing that stages hold a number of: a layer kind, the head, a prediction layer."""

    name: str
    dense: dict[str, Any]
    """Forward plus backward by part, on the distinct layouts of the dense fields."""
    routed: dict[str, Any]
    """The same for routed experts, on the distinct folded layouts; empty where there are none."""
    count: float
    """How many the whole pipeline holds."""


def unit_times(model: Model, profile: Profile, workload: Workload, dense: Layouts, routed: Layouts) -> list[UnitTime]:
    """Layers by kind, then the head, then prediction layers (if the model has any)."""
    kinds = dict.fromkeys((*model.kinds, *model.mtp))
    times = {
        k: (dense_part(k, model, profile, workload, dense), routed_part(k, model, profile, workload, routed)) for k in kinds
    }
    units = [UnitTime("layers", *times[kind], float(model.kind_of_layer.count(k))) for k, kind in enumerate(model.kinds)]
    head = _head(model, profile, workload, dense)
    units.append(UnitTime("head", head, {}, 1.0))
    if model.mtp:
        depths = [times[x] for x in model.mtp]
        parts = _prediction(model, profile, workload, dense, head)
        parts["layer"] = sum(sum(d.values()) for d, _ in depths) / len(depths)
        experts = {"layer": sum(sum(r.values()) for _, r in depths) / len(depths)} if any(r for _, r in depths) else {}
        units.append(UnitTime("prediction", parts, experts, float(len(model.mtp))))
    return units


def _head(model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> dict[str, Any]:
    """Output projection and loss of one micro-batch; Megatron computes the head in bf16 under every recipe."""
    return both_passes(head_passes(model, profile, workload, layouts))


def _prediction(model: Model, profile: Profile, workload: Workload, layouts: Layouts, head: dict[str, Any]) -> dict[str, Any]:
    """What a prediction layer has beside its layer: a projection of 2 x hidden and its own pass through the head."""
    return {**both_passes(projection_passes(model, profile, workload, layouts)), "head": sum(head.values())}


def send_times(model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> tuple[Any, Any]:
    """Seconds to send one micro-batch's activations to the next stage, inside a scale-up domain and across, [n] each."""
    message = 2.0 * rank_tokens(workload, layouts) * model.hidden / shard(layouts)
    return send_s(profile, message, inside=True), send_s(profile, message, inside=False)


def sends_exposed_s(one_s: Any, batches: Any, pp: Any, vpp: Any) -> Any:
    """Exposed sends of activations and their gradients, given one send: a share of the steady ones, and those of the fill."""
    return np.where(pp > 1, 2.0 * one_s * (OVERLAP.send_exposed * batches * vpp + pp - 1), 0.0)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step."""

    time: Breakdown
    """Parts, [n]; layer parts are those of the slowest stage, for all its micro-batches."""
    stage_s: Any
    """Seconds of one micro-batch on every rank looked at, [K, n]."""


@dataclass(frozen=True, slots=True)
class KindCosts:
    """What one layer of each kind costs the rank that holds it, [kinds, n] each."""

    seconds: Any
    """One micro-batch, forward and backward."""
    state_bytes: Any
    """Weights, gradients and optimizer states."""
    saved_bytes: Any
    """Kept for one micro-batch."""


@dataclass(frozen=True, slots=True)
class DataParallelTime:
    """Seconds of data-parallel work of a rank, without overlap, [n]."""

    scatter: Any
    """Reduce all gradients."""
    gather: Any
    """Gather all weights, or the summed gradients where nothing is sharded."""
    optimizer: Any
    """Update the rank's shard."""


def data_parallel_times(
    profile: Profile, workload: Workload, layouts: Layouts, parameters: Any, where: Group
) -> DataParallelTime:
    """Gradient reduction, parameter gather and optimizer step of `parameters` that a group of ranks shares, [n]."""

    def moved(collective: Callable[[Profile, Any, Group], Any], element_bytes: Any) -> Any:
        return np.where(where.ranks > 1, collective(profile, element_bytes * parameters, where), 0.0)

    weight, gradient = min(2.0, workload.precision.weight_bytes(profile.cluster.device)), float(workload.gradient_bytes)
    ddp, offload = layouts.shards_as("ddp"), layouts.optimizer_offload
    updated = parameters / np.where(ddp, 1, where.ranks)
    on_device = profile.stream_s(STEP.optimizer_bytes * updated * (1.0 - offload), "optimizer")
    on_host = host_update_s(profile, workload) * updated * offload
    return DataParallelTime(
        scatter=moved(reduce_scatter_s, gradient),
        # Without sharding the sums of the gradients go back to everyone; weights stay where they are.
        gather=moved(all_gather_s, np.where(ddp, gradient, weight)),
        optimizer=on_device + on_host,
    )


def host_update_s(profile: Profile, workload: Workload) -> float:
    """Seconds of an offloaded parameter: its gradient moves down, the host updates it, its weight moves up."""
    return (workload.gradient_bytes + 2.0) / profile.cluster.pcie.bytes_per_s + STEP.host_update_s


def dense_group(profile: Profile, layouts: Layouts) -> Group:
    """Ranks that hold the same dense parameters."""
    return group(profile, layouts.dp * layouts.cp, layouts.tp)


def expert_group(profile: Profile, layouts: Layouts) -> Group:
    """Ranks that hold the same experts."""
    return group(profile, layouts.edp, layouts.ep * layouts.etp)


def data_parallel_exposed_s(
    scatter: Any, gather: Any, micro_batch_s: Any, batches: Any, *, overlap: Any, every_batch: Any, hidden_compute: float
) -> Any:
    """What stays visible of gradient reduction and parameter gather, given one micro-batch's compute, [n].

    `every_batch`: FSDP gathers weights for forward and backward and scatters gradients in every micro-batch, behind the share
    `hidden_compute` of its compute.
    """
    backward, forward = micro_batch_s * (2.0 / 3.0), micro_batch_s * (1.0 / 3.0)
    hide = OVERLAP.data_hidden_compute * overlap
    once = np.maximum(scatter - hide * backward, 0.0) + np.maximum(gather - hide * forward, 0.0)
    once = once + OVERLAP.data_exposed * (scatter + gather)
    if not np.any(every_batch):
        return once
    each = 2.0 * gather + scatter
    sharded = np.maximum(each - hidden_compute * micro_batch_s, 0.0) + OVERLAP.data_exposed * each
    return np.where(every_batch, batches * sharded, once)
