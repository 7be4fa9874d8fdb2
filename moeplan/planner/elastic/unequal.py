"""Replicas of unequal depth: what pipelines of different lengths would give on a count of nodes that equal ones do not fill.

The replicas that share experts form a block, so that depth is free per block: GPUs = etp * ep * sum of the depths. With as many
micro-batches for each, a step takes as long as the shallowest block, which equal replicas of that depth take as well: the gain
is in dealing micro-batches, T = max_j (fixed_j + m_j * slowest stage_j) with sum m_j as before (class `order`). Oobleck has
templates of this kind (arXiv:2309.08125). Megatron builds equal replicas only, so this is reported, not planned.
Units: seconds. The slope of a step is that of its slowest stage, as in 1F1B.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from moeplan.planner.elastic.counts import SizedLayout, node_gpus
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Condition
from moeplan.planner.search import search


@dataclass(frozen=True, kw_only=True, slots=True)
class UnequalReplicas:
    """Blocks of replicas of two depths."""

    depths: tuple[int, ...]
    """Stages of each block, ascending."""
    micro_batches: tuple[int, ...]
    """Micro-batches of a step on each of its replicas."""
    step_s: float


def unequal_replicas(one: SizedLayout, nodes: int) -> UnequalReplicas | None:
    """The degrees of a layout with pipelines that fill `nodes` nodes; None where equal replicas fill them or nothing fits."""
    x = one.layout
    slots = nodes * node_gpus(one.problem) // (x.etp * x.ep)
    depth, deeper = divmod(slots, x.edp)
    if not deeper or not depth:
        return None
    priced = [_pipeline(one, d) for d in (depth, depth + 1)]
    if priced[0] is None or priced[1] is None:
        return None
    counts = [x.edp - deeper, deeper]
    lines = [line for line, count in zip(priced, counts, strict=True) for _ in range(count) if line is not None]
    each = one.problem.workload.global_batch // (x.dp * x.micro_batch)
    dealt = deal([line[0] for line in lines], [line[1] for line in lines], each * x.edp)
    return UnequalReplicas(
        depths=tuple(d for d, count in zip((depth, depth + 1), counts, strict=True) for _ in range(count)),
        micro_batches=tuple(dealt),
        step_s=max(fixed + slope * m for (fixed, slope), m in zip(lines, dealt, strict=True)),
    )


def deal(fixed_s: Sequence[float], slope_s: Sequence[float], total: int) -> list[int]:
    """Micro-batches of each replica, at least one, so that the last to end ends as early as possible."""
    dealt = [1] * len(fixed_s)
    ends = [(f + 2.0 * s, i) for i, (f, s) in enumerate(zip(fixed_s, slope_s, strict=True))]
    heapq.heapify(ends)
    for _ in range(total - len(dealt)):
        end_s, i = ends[0]
        dealt[i] += 1
        heapq.heapreplace(ends, (end_s + slope_s[i], i))
    return dealt


def _pipeline(one: SizedLayout, depth: int) -> tuple[float, float] | None:
    """Fixed seconds and seconds a micro-batch of equal replicas of a depth; None where they fill no nodes or do not fit."""
    x, base = one.layout, one.problem
    gpus = x.tp * x.cp * x.dp * depth
    if gpus % node_gpus(base):
        return None
    held = {name: getattr(x, name) for name in ("tp", "cp", "dp", "ep", "etp", "micro_batch")} | {"pp": depth}
    pins = tuple(Condition(name, "=", value, f"{name}={value}") for name, value in held.items())
    problem = dataclasses.replace(base, profile=base.profile.resized(gpus), pins=(*base.pins, *pins))
    found = search(problem, 1).best
    if not found:
        return None
    plan = price_plan(problem, found[0].layout)
    slope_s = max(plan.stage_s)
    return plan.step_s - slope_s * base.workload.global_batch / (x.dp * x.micro_batch), slope_s
