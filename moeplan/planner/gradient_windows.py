"""Where the gradients of a plan could travel: FSMoE's windows on its slowest stage.

The backward pass of the last micro-batch, layer by layer from the end: the dense part of a layer leaves the link between
nodes to the gradients, its MoE layer what dispatch and combine leave of it (`costmodels/moe/gradients.py`, which has the model
and its source). Megatron cuts gradients into buckets as they come and the price of a plan keeps what was measured of that, so
the partition is shown beside it and enters no price. The reduction is a line through two sizes of the reduce-scatter among
the ranks that share dense parameters; expert gradients count as many bytes as take their time. Units: seconds, bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.costmodels.collectives import Group, reduce_scatter_s
from moeplan.costmodels.layer import dense_passes, fold, without_experts
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import unit_parameters
from moeplan.costmodels.model import Layer, Moe
from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.gradients import BackwardLayer, Partition, Slot, exposed_s, greedy, partition
from moeplan.costmodels.moe_choice import DEGREES, parse_choices
from moeplan.costmodels.recompute import recomputed_layers
from moeplan.costmodels.scheduled import RoutedLayer, makespans
from moeplan.costmodels.stages import chunk_letters
from moeplan.costmodels.step import dense_group, expert_group
from moeplan.planner.problem import Problem

ANCHORS_BYTES = (1e6, 1e8)
"""Sizes of a reduction through which its line goes: a bucket, and all gradients of a large layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientWindows:
    """The gradients of one stage in the windows of its last backward pass."""

    stage: int
    layers: tuple[int, ...]
    """Its decoder layers, in backward order."""
    alone_s: float
    """Seconds of the reduction by itself, one piece a layer."""
    greedy_s: float
    """Seconds that stay exposed if every window takes what is pending and fits."""
    exposed_s: float
    """Seconds that stay exposed at the best."""
    best: Partition
    """Pieces by layer, in the order of `layers`: beside its dense part, beside its MoE layer."""


def gradient_windows(problem: Problem, layout: Layout, stage_s: Sequence[float]) -> GradientWindows | None:
    """The best partition of the slowest stage's gradients; None without experts, without a reduction, and under FSDP.

    `stage_s`: seconds of one micro-batch on every pipeline stage.
    """
    if problem.model.moe is None or layout.sharding == "fsdp":
        return None
    stage = int(np.argmax(stage_s))
    places = _layers_of(problem, layout, stage)[::-1]
    recomputed = _recomputed(problem, layout)
    line = _line(problem, dense_group(problem.profile, Layouts.of([layout])))
    if line is None or not places:
        return None
    plain = dataclasses.replace(layout, recompute=(), recompute_layers="")
    known: dict[tuple[Layer, bool], BackwardLayer] = {}
    layers = []
    for place in places:
        kind, again = key = problem.model.layers[place], place in recomputed
        if key not in known:
            known[key] = _backward(problem, layout if again else plain, kind, line)
        layers.append(known[key])
    windows_s = sum(slot.seconds(0.0, line) for layer in layers for slot in layer.slots)
    best = partition(layers, line)
    return GradientWindows(
        stage=stage,
        layers=tuple(places),
        alone_s=exposed_s(layers, line) - windows_s,
        greedy_s=greedy(layers, line).total_s - windows_s,
        exposed_s=best.total_s - windows_s,
        best=best,
    )


def _layers_of(problem: Problem, layout: Layout, stage: int) -> list[int]:
    """Places of the decoder layers that a pipeline rank holds, in forward order."""
    out: list[int] = []
    place = 0
    for chunk, letters in enumerate(chunk_letters(problem.model, layout.pp, layout.vpp, layout.stages)):
        held = range(place, min(place + letters.count("t"), len(problem.model.layers)))
        place += letters.count("t")
        out += held if chunk % layout.pp == stage else []
    return out


def _recomputed(problem: Problem, layout: Layout) -> set[int]:
    """Places of the decoder layers that recompute what the layout says."""
    sizes = [chunk.count("t") for chunk in chunk_letters(problem.model, layout.pp, layout.vpp, layout.stages)]
    counts = recomputed_layers(layout.recompute_layers, sizes)
    starts = itertools.accumulate(sizes, initial=0)
    return {place for start, count in zip(starts, counts, strict=False) for place in range(start, start + count)}


def _line(problem: Problem, where: Group) -> AlphaBeta | None:
    """The reduce-scatter of a group as a line; None where a rank is alone."""
    if int(where.ranks[0]) == 1:
        return None
    small, large = (float(reduce_scatter_s(problem.profile, size, where)[0]) for size in ANCHORS_BYTES)
    unit_s = (large - small) / (ANCHORS_BYTES[1] - ANCHORS_BYTES[0])
    return AlphaBeta(startup_s=max(0.0, small - unit_s * ANCHORS_BYTES[0]), unit_s=unit_s)


def _backward(problem: Problem, layout: Layout, kind: Layer, line: AlphaBeta) -> BackwardLayer:
    """The windows of a layer's backward and the gradients that arrive at its end."""
    one = Layouts.of([layout])
    dense = dense_passes(kind, problem.model, problem.profile, problem.workload, without_experts(one))
    dense_s = sum(float(np.broadcast_to(seconds, 1)[0]) for seconds in dense.backward.values())
    units, place = unit_parameters(problem.model, one), problem.model.kinds.index(kind)
    element = float(problem.workload.gradient_bytes)
    expert_line = _line(problem, expert_group(problem.profile, one))
    ratio = expert_line.unit_s / line.unit_s if expert_line is not None else 0.0
    gradient_bytes = element * float(units.dense[place, 0] + ratio * units.expert[place, 0])
    blocks = [b for b in kind.blocks if isinstance(b, Moe)]
    slot = Slot(alone_s=(0.0,), busy_s=(0.0,)) if not blocks else _slot(problem, layout, blocks[0])
    return BackwardLayer(dense_s=dense_s, moe=slot, gradient_bytes=gradient_bytes)


def _slot(problem: Problem, layout: Layout, block: Moe) -> Slot:
    """An MoE layer's backward in every number of chunks that its schedule allows, and how long it keeps the link busy."""
    routed = RoutedLayer(block, problem.model, problem.profile, problem.workload, fold(Layouts.of([layout])))
    choices = parse_choices(layout.moe_schedule)
    degrees: Sequence[int] = DEGREES if choices and choices[0].name == "fsmoe" else (1,)
    alone, busy, one = [], [], routed.chunk(1)
    for degree in degrees:
        chunk = routed.chunk(degree)
        alone.append(float(np.broadcast_to(makespans("fsmoe", chunk, one, problem.profile.overlap_loss)[1], 1)[0]))
        crossing = 2.0 * degree * chunk.exchange_s * chunk.across
        busy.append(min(float(np.broadcast_to(crossing, 1)[0]), alone[-1]))
    return Slot(alone_s=tuple(alone), busy_s=tuple(busy))
