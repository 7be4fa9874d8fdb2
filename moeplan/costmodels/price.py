"""Price of layouts: step time and peak memory together, for one layout or for millions.

A layout's price depends on few combinations of its fields: what a layer costs on one group of fields, how parameters are spread
on another. `Pricing` computes those on the distinct combinations and gathers them for every row, block by block, so that the
working columns stay in cache. The same code with `detail` gives every named part. Arrays over layouts are [n]; over the
pipeline ranks that can bind, [K, n].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.constants import STEP
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import (
    LayerMemory,
    StageParameters,
    in_flight,
    layer_memory,
    micro_batches,
    stage_parameters,
    state_bytes,
)
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import stage_table
from moeplan.costmodels.step import (
    DataParallelTime,
    UnitTime,
    data_parallel_exposed_s,
    data_parallel_times,
    sends_s,
    unit_times,
)
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

LAYER_FIELDS = (
    "tp", "cp", "ep", "etp", "micro_batch", "sequence_parallel", "recompute",
    "dispatcher", "ep_overlap", "tp_overlap", "cuda_graphs",
)  # fmt: skip
"""What time and memory of a layer depend on."""
GRID_FIELDS = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "split", "sharding")
"""What the spread of parameters depends on (with the optimizer's offload)."""
BLOCK = 8192
"""Rows priced at a time."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step by part."""

    time: Breakdown
    """Parts, [n]; layer parts are those of the slowest stage, for all its micro-batches."""
    stage_s: Any
    """Seconds of one micro-batch on every binding rank, [K, n]."""


def step_cost(model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> StepCost:
    """Step time of every layout with all its parts."""
    return Pricing(model, profile, workload, layouts, detail=True).step()


def peak_memory(model: Model, profile: Profile, workload: Workload, layouts: Layouts, *, every_rank: bool = False) -> Breakdown:
    """Peak allocated bytes by part, [K, n], of the ranks that can bind, or of `every_rank` (layouts of one split only)."""
    return Pricing(model, profile, workload, layouts, detail=True, every_rank=every_rank).memory()


class Pricing:
    """Tables for pricing `layouts`, made when first needed; `step` and `memory` price rows from them."""

    def __init__(
        self,
        model: Model,
        profile: Profile,
        workload: Workload,
        layouts: Layouts,
        *,
        detail: bool = False,
        every_rank: bool = False,
    ) -> None:
        self.model, self.profile, self.workload, self.layouts = model, profile, workload, layouts
        self.detail = detail
        offloads = layouts.optimizer_offload.any()
        self.keys, self.key_of_row = layouts.distinct(*LAYER_FIELDS)
        grid = layouts.distinct(*GRID_FIELDS) if not offloads else (layouts, np.arange(len(layouts)))
        self.grids, self.grid_of_row = grid
        self.table = stage_table(model, self.grids, every_rank=every_rank)
        self.held_by_unit = [*self.table.kinds, self.table.head, *([self.table.mtp] if model.mtp else [])]

    def step(self, rows: slice = slice(None)) -> StepCost:
        """Step time of the given rows."""
        layouts, key, grid, split = self._columns(rows)
        batches = micro_batches(self.workload, layouts)
        held = [_gather(h, split) for h in self.held_by_unit]
        # 1. seconds of one micro-batch on every binding rank, [K, n], and on all ranks together, [n]
        stage: Any = 0.0
        whole: Any = 0.0
        for unit, total, count in zip(self._units, self._unit_totals, held, strict=True):
            seconds = _gather(total, key)
            stage = stage + count * seconds
            whole = whole + unit.count * seconds
        longest = stage.max(axis=0)
        # 2. the slowest rank's work for all micro-batches, and the others' filling and draining
        parts: dict[str, Any] = {}
        if self.detail:
            slowest = stage.argmax(axis=0)[None]
            for unit, count in zip(self._units, held, strict=True):
                mine = np.take_along_axis(count, slowest, axis=0)[0]
                for name, seconds in unit.parts.items():
                    path = f"{unit.name}/{name}"
                    parts[path] = parts.get(path, 0.0) + batches * mine * _gather(np.broadcast_to(seconds, len(self.keys)), key)
        else:
            parts["layers"] = batches * longest
        parts["pipeline bubble"] = np.maximum(whole - longest, 0.0) / layouts.vpp
        parts["pipeline sends"] = sends_s(self.model, self.profile, self.workload, layouts, batches)
        # 3. once a step: data parallelism, optimizer, overhead
        spread = self._data_parallel
        scatter, gathered = _gather(spread.scatter, grid), _gather(spread.gather, grid)
        parts["data-parallel exchange"] = data_parallel_exposed_s(layouts, scatter, gathered, longest, batches)
        parts["optimizer"] = _gather(spread.optimizer, grid)
        parts["step overhead"] = np.full(len(layouts), STEP.overhead_s)
        return StepCost(time=Breakdown(unit="seconds", parts=parts), stage_s=stage)

    def memory(self, rows: slice = slice(None)) -> Breakdown:
        """Peak allocated bytes of the given rows on every binding rank."""
        layouts, key, grid, split = self._columns(rows)
        kept = self._layer_memory
        head, rank = _gather(self.table.head, split), _gather(self.table.rank, split)
        saved: Any = 0.0
        for count, each in zip(self.table.kinds, kept.kinds, strict=True):
            saved = saved + _gather(count, split) * _gather(each, key)
        if self.model.mtp:
            saved = saved + _gather(self.table.mtp, split) * _gather(kept.mtp, key)
        parts = {name: _gather(states, grid) for name, states in self._states.items()}
        parts["activations"] = saved * in_flight(layouts.pp, layouts.vpp, rank, micro_batches(self.workload, layouts))
        if self.detail:
            parts["logits and loss"] = head * _gather(kept.logits, key)
            parts["working set"] = np.where(head > 0, 0.0, _gather(kept.working, key))
        else:
            parts["momentary"] = np.where(head > 0, _gather(kept.logits, key), _gather(kept.working, key))
        return Breakdown(unit="bytes", parts=parts)

    def step_seconds(self) -> Any:
        """Step time of every row, [n]."""
        return self._by_block(lambda rows: self.step(rows).time.total)

    def peak_bytes(self) -> Any:
        """Peak allocation on the fullest rank of every row, [n]."""
        return self._by_block(lambda rows: self.memory(rows).total.max(axis=0))

    def _by_block(self, price: Any) -> Any:
        out = np.empty(len(self.layouts))
        for rows in _blocks(len(out)):
            out[rows] = price(rows)
        return out

    def _columns(self, rows: slice) -> tuple[Layouts, Any, Any, Any]:
        grid = self.grid_of_row[rows]
        return self.layouts.take(rows), self.key_of_row[rows], grid, self.table.of_row[grid]

    @functools.cached_property
    def _units(self) -> list[UnitTime]:
        return unit_times(self.model, self.profile, self.workload, self.keys)

    @functools.cached_property
    def _unit_totals(self) -> list[Any]:
        return [np.broadcast_to(sum(unit.parts.values()), len(self.keys)) for unit in self._units]

    @functools.cached_property
    def _parameters(self) -> StageParameters:
        return stage_parameters(self.model, self.grids, self.table)

    @functools.cached_property
    def _states(self) -> dict[str, Any]:
        parts = state_bytes(self.model, self.profile.cluster.device, self.workload, self.grids, self._parameters)
        return parts if self.detail else {"states": sum(parts.values())}

    @functools.cached_property
    def _layer_memory(self) -> LayerMemory:
        return layer_memory(self.model, self.workload, self.keys)

    @functools.cached_property
    def _data_parallel(self) -> DataParallelTime:
        """Of the rank that holds the most of each kind of parameter."""
        most = StageParameters(self._parameters.dense.max(axis=0), self._parameters.expert.max(axis=0))
        return data_parallel_times(self.profile, self.workload, self.grids, most)


def _gather(values: Any, places: Any) -> Any:
    """`values` along the last axis at `places`."""
    return np.take(values, places, axis=-1, mode="clip")


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))
