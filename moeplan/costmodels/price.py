"""Price of layouts: step time and peak memory together, for one layout or for millions.

A layout's price depends on few combinations of its fields: what layers cost on some, how parameters are spread on others.
`Pricing` computes those on the distinct combinations and gathers them. Layouts of one pipeline split are priced together, in
blocks that stay in cache, rank by rank for the few ranks that can be slowest or fullest. `step_cost` and `peak_memory` keep
every named part, `step_seconds` and `peak_bytes` only their sums.
Arrays over layouts are [n]; over pipeline ranks [K, n].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.bubble import exact_span_s, least_span_s
from moeplan.costmodels.constants import MEMORY, STEP
from moeplan.costmodels.layer import DENSE_FIELDS, ROUTED_FIELDS, fold, without_experts
from moeplan.costmodels.layout import SHARDINGS, Codes, Layouts
from moeplan.costmodels.memory import (
    StageParameters,
    StateBytes,
    UnitParameters,
    gradient_buffers,
    micro_batches,
    rank_parameters,
    state_bytes,
    unit_parameters,
)  # fmt: skip
from moeplan.costmodels.model import Model
from moeplan.costmodels.passes import pass_totals
from moeplan.costmodels.peak import LayerMemory, MicroBatchMemory, dense_memory, moment_parts, routed_memory
from moeplan.costmodels.stages import Ranks, all_ranks, binding_ranks, chunk_units, filling
from moeplan.costmodels.step import (
    DataParallelTime,
    KindCosts,
    StepCost,
    UnitTime,
    data_parallel_exposed_s,
    data_parallel_times,
    dense_group,
    expert_group,
    send_times,
    sends_exposed_s,
    unit_times,
)  # fmt: skip
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

SPLIT_FIELDS = ("pp", "vpp", "split")
"""What says which layers stand on which rank."""
DENSE_SPREAD = (*SPLIT_FIELDS, "tp", "cp", "dp", "sharding")
"""What the exchange of dense parameters depends on (with the optimizer's offload)."""
EXPERT_SPREAD = (*SPLIT_FIELDS, "ep", "etp", "edp", "sharding")
"""What the exchange of expert parameters depends on."""
STATE_FIELDS = ("pp", "tp", "cp", "dp", "etp", "edp", "sharding")
"""What the bytes of a parameter depend on."""
BLOCK = 16384
"""Rows priced at a time."""


class Pricing:
    """Tables for pricing `layouts`, made when first needed."""

    def __init__(
        self,
        model: Model,
        profile: Profile,
        workload: Workload,
        layouts: Layouts,
        every_rank: bool = False,
        exact: bool = False,
    ) -> None:
        """`every_rank`: look at all, not only at those that can bind. `exact`: run the passes of pipelines, see `bubble.py`."""
        self.model, self.profile, self.workload, self.layouts = model, profile, workload, layouts
        self.every_rank, self.exact = every_rank, exact
        self._codes = Codes(layouts)
        dense = Codes(without_experts(layouts), self._codes, ("recompute",))
        self._dense, self._dense_of_row = dense.distinct(*DENSE_FIELDS)
        folded = Codes(fold(layouts), self._codes, ("tp", "cp", "micro_batch", "sequence_parallel", "recompute"))
        self._routed, self._routed_of_row = folded.distinct(*ROUTED_FIELDS)

    def step_seconds(self) -> Any:
        """Step time of every row, [n]."""
        out = np.empty(len(self.layouts))
        for group, rows in self._blocks():
            out[rows] = sum(self._step(group, rows, exact=self.exact).values())
        return out

    def exact_step_seconds(self, chosen: Any) -> Any:
        """Exact step time of the rows at the places `chosen`, in their order."""
        out, places = np.empty(len(self.layouts)), np.arange(len(self.layouts))
        for group, rows in self._blocks():
            if len(some := np.intersect1d(places[rows], chosen, assume_unique=True)):
                out[some] = sum(self._step(group, some, exact=True).values())
        return out[chosen]

    def peak_bytes(self) -> Any:
        """Peak allocation on the fullest rank of every row, [n]."""
        out = np.empty(len(self.layouts))
        for group, rows in self._blocks():
            out[rows] = functools.reduce(np.maximum, (sum(parts.values()) for parts in self._memory(group, rows)))
        return out

    def whole_micro_batch_s(self) -> Any:
        """Seconds of one micro-batch in all stages together, [n]."""
        out = np.empty(len(self.layouts))
        for start in range(0, len(out), BLOCK):
            rows = slice(start, min(start + BLOCK, len(out)))
            out[rows] = sum(u.count * s for u, s in zip(self._units, self._unit_seconds(rows), strict=True))
        return out

    def step_cost(self) -> StepCost:
        """Step time of every row with all its parts."""
        n = len(self.layouts)
        parts: dict[str, Any] = {}
        stage_s = np.empty((self._most_ranks, n))
        for group, rows in self._blocks():
            for name, seconds in self._step(group, rows, detail=True, exact=self.exact).items():
                parts.setdefault(name, np.zeros(n))[rows] = seconds
            stages = self._stage_seconds(group, rows)
            for k in range(self._most_ranks):
                stage_s[k, rows] = stages[k if k < len(stages) else 0]
        return StepCost(time=Breakdown(unit="seconds", parts=parts), stage_s=stage_s)

    def peak_memory(self) -> Breakdown:
        """Peak allocated bytes of every row on every rank, by part."""
        parts: dict[str, Any] = {}
        for group, rows in self._blocks():
            ranks = list(self._memory(group, rows, detail=True))
            for k in range(self._most_ranks):
                for name, value in ranks[k if k < len(ranks) else 0].items():
                    parts.setdefault(name, np.zeros((self._most_ranks, len(self.layouts))))[k, rows] = value
        return Breakdown(unit="bytes", parts=parts)

    def kind_costs(self) -> KindCosts:
        """What one layer of each kind costs under every layout."""
        states, of_row = self._states
        units = unit_parameters(self.model, self.layouts)
        dense, expert = (sum(table.values())[of_row] for table in (states.dense, states.expert))
        kinds = range(len(self.model.kinds))
        totals = list(self._unit_seconds(slice(None)))
        one, two = self._dense_memory, self._routed_memory
        return KindCosts(
            seconds=np.stack([totals[k] for k in kinds]),
            state_bytes=np.stack([units.dense[k] * dense + units.expert[k] * expert for k in kinds]),
            saved_bytes=np.stack([one.kinds[k][self._dense_of_row] + two.kinds[k][self._routed_of_row] for k in kinds]),
        )

    # -- one block of rows that share a split ----------------------------------------------------------------------------

    def _step(self, group: int, rows: Any, *, exact: bool, detail: bool = False) -> dict[str, Any]:
        """Seconds of a step by part, [n]; without `detail` all layers are one part, without `exact` waiting is bounded."""
        pp, vpp = self._degrees(group)
        batches = self._batches[rows]
        units = list(self._unit_seconds(rows))
        # 1. seconds of one micro-batch on the slowest rank, and on all ranks together
        stages = self._stage_seconds(group, rows, units)
        longest = functools.reduce(np.maximum, stages)
        # 2. the slowest rank's work for all micro-batches, and its waiting for others
        parts = self._layer_parts(group, rows, stages, batches) if detail else {"layers": batches * longest}
        waits = self._span(group, rows, units, exact) - batches * longest if pp > 1 else 0.0
        parts["pipeline bubble"] = np.maximum(waits, 0.0)
        dense_place, expert_place = self._dense_spread[1][rows], self._expert_spread[1][rows]
        inside, across = (_gather(t, self._dense_of_row[rows]) for t in self._sends)
        one = np.where(self._stage_in_domain[dense_place], inside, across) if pp > 1 else inside
        parts["pipeline sends"] = sends_exposed_s(one, batches, pp, vpp)
        # 3. once a step: data parallelism, optimizer, overhead
        dense, expert = self._data_parallel
        parts["data-parallel exchange"] = self.profile.exposed * data_parallel_exposed_s(
            dense.scatter[dense_place] + expert.scatter[expert_place],
            dense.gather[dense_place] + expert.gather[expert_place],
            longest,
            batches,
            overlap=self._codes.column("dp_overlap", rows),
            # Under a pipeline, weights stay gathered from the first micro-batch to the last.
            every_batch=np.equal(self._codes.column("sharding", rows), SHARDINGS.index("fsdp")) & (pp == 1),
            hidden_compute=self.workload.era.fsdp_hidden_compute,
        )
        parts["optimizer"] = dense.optimizer[dense_place] + expert.optimizer[expert_place]
        parts["step overhead"] = STEP.overhead_s
        return parts

    def _span(self, group: int, rows: Any, units: list[Any], exact: bool) -> Any:
        """Seconds of the passes of all ranks, [n]: exact, or in closed form from below."""
        split, batches = (self.model, *self._degrees(group), self._texts[group]), self._batches[rows]
        least = least_span_s(filling(*split), units, batches)
        if not exact:
            return least
        dense, routed = self._dense_of_row[rows], self._routed_of_row[rows]
        there, back = ([_gather(one, dense) + _gather(two, routed) for one, two in way] for way in self._pass_totals)
        return np.maximum(exact_span_s(chunk_units(*split), there, back, batches), least)

    def _stage_seconds(self, group: int, rows: Any, units: list[Any] | None = None) -> list[Any]:
        """Seconds of one micro-batch on each rank looked at, [n] each."""
        units = list(self._unit_seconds(rows)) if units is None else units
        return [sum(c * s for c, s in zip(counts, units, strict=True) if c) for counts in self._unit_counts(group)]

    def _layer_parts(self, group: int, rows: Any, stages: list[Any], batches: Any) -> dict[str, Any]:
        """Parts of the slowest rank's work for all micro-batches, [n] each."""
        slowest = np.argmax(np.stack(np.broadcast_arrays(*stages)), axis=0)
        counts = np.array(list(self._unit_counts(group)))
        parts: dict[str, Any] = {}
        for u, unit in enumerate(self._units):
            mine = batches * counts[slowest, u]
            for table, keys, place in (
                (unit.dense, self._dense, self._dense_of_row),
                (unit.routed, self._routed, self._routed_of_row),
            ):
                for name, seconds in table.items():
                    path = f"{unit.name}/{name}"
                    parts[path] = parts.get(path, 0.0) + mine * np.broadcast_to(seconds, len(keys))[place[rows]]
        return parts

    def _memory(self, group: int, rows: Any, *, detail: bool = False) -> Iterator[dict[str, Any]]:
        """Peak bytes of each rank looked at by part, [n]; without `detail` in few parts."""
        (pp, vpp), ranks, batches = self._degrees(group), self._ranks[group], self._batches[rows]
        dense, routed = self._dense_of_row[rows], self._routed_of_row[rows]
        one, two = self._dense_memory, self._routed_memory
        saved = [_gather(kept, dense) for kept in one.kinds]
        saved = [s + _gather(two.kinds[k], routed) if self.model.kinds[k].is_moe else s for k, s in enumerate(saved)]
        batch = MicroBatchMemory(
            saved=saved,
            predicted=_gather(one.mtp, dense) + _gather(two.mtp, routed) if self.model.mtp else 0.0,
            working=np.maximum(_gather(one.working, dense), _gather(two.working, routed)),
            again=_gather(one.again, dense) + _gather(two.again, routed) if self._recomputes else 0.0,
            logits=_gather(one.logits, dense) if ranks.head.any() else 0.0,
            sent=_gather(one.sent, dense) if pp > 1 else 0.0,
        )
        held, place, spread = self._parameters[group], self._held_of_row[rows], self._states[1][rows]
        each = [{n: _gather(v, spread) for n, v in table.items()} for table in self._state_tables(detail)]
        copies = [_gather(v, spread) for v in self._states[0].step]
        for k in range(len(ranks.rank)):
            counts = [_gather(v[k], place) for v in (held.dense, held.expert, held.plain)[: len(each)]]
            parts = {n: sum(c * t[n] for c, t in zip(counts, each, strict=True) if n in t) for n in each[0]}
            parts["buffers"] = _gather(self._buffers, place)
            step = sum(c * v for c, v in zip(counts, copies, strict=False))
            yield parts | moment_parts(self.workload, pp, vpp, ranks, k, batch, batches, step)

    def _unit_seconds(self, rows: Any) -> Iterator[Any]:
        """Seconds of one micro-batch in each unit, [n]."""
        dense, routed = self._dense_of_row[rows], self._routed_of_row[rows]
        for one, two in self._unit_totals:
            yield _gather(one, dense) if two is None else _gather(one, dense) + _gather(two, routed)

    def _state_tables(self, detail: bool) -> list[dict[str, Any]]:
        """Bytes of a dense and of an expert parameter, and of what embedding and head cost beyond, by part or in one sum."""
        return self._states[0].tables if detail else self._state_sums

    def _unit_counts(self, group: int) -> Iterator[list[float]]:
        """How many of each unit every rank looked at holds."""
        ranks = self._ranks[group]
        for k in range(len(ranks.rank)):
            yield [*ranks.kinds[k].tolist(), float(ranks.head[k]), *([float(ranks.mtp[k])] if self.model.mtp else [])]

    # -- tables, made when first needed ----------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[int, Any]]:
        """Groups of rows that share a split, in blocks: the place of the split, and rows as slice or indices."""
        splits, of_row = self._splits
        if len(splits) == 1:
            order: Any = None
            ends = [len(of_row)]
        else:
            order = np.argsort(of_row.astype(np.int16 if len(splits) < 2**15 else np.int64), kind="stable")
            ends = np.cumsum(np.bincount(of_row, minlength=len(splits))).tolist()
        start = 0
        for group, end in enumerate(ends):
            for a in range(start, end, BLOCK):
                rows = slice(a, min(a + BLOCK, end))
                yield group, rows if order is None else order[rows]
            start = end

    @functools.cached_property
    def _splits(self) -> tuple[Layouts, Any]:
        return self._codes.distinct(*SPLIT_FIELDS)

    def _degrees(self, group: int) -> tuple[int, int]:
        splits = self._splits[0]
        return int(splits.pp[group]), int(splits.vpp[group])

    @functools.cached_property
    def _ranks(self) -> list[Ranks]:
        choose = all_ranks if self.every_rank else binding_ranks
        return [choose(self.model, *self._degrees(g), text) for g, text in enumerate(self._texts)]

    @functools.cached_property
    def _texts(self) -> list[str]:
        return [self._splits[0].stages[int(s)] for s in self._splits[0].split]

    @functools.cached_property
    def _batches(self) -> Any:
        return micro_batches(self.workload, self.layouts)

    @functools.cached_property
    def _most_ranks(self) -> int:
        return max((len(r.rank) for r in self._ranks), default=1)

    @functools.cached_property
    def _units(self) -> list[UnitTime]:
        return unit_times(self.model, self.profile, self.workload, self._dense, self._routed)

    @functools.cached_property
    def _unit_totals(self) -> list[tuple[Any, Any]]:
        """All parts of a unit together, dense and routed (None where it has no experts)."""
        return [
            (
                np.broadcast_to(sum(u.dense.values()), len(self._dense)),
                np.broadcast_to(sum(u.routed.values()), len(self._routed)) if u.routed else None,
            )
            for u in self._units
        ]

    @functools.cached_property
    def _pass_totals(self) -> list[list[tuple[Any, Any]]]:
        return pass_totals(self.model, self.profile, self.workload, self._dense, self._routed)

    @functools.cached_property
    def _sends(self) -> tuple[Any, Any]:
        return send_times(self.model, self.profile, self.workload, self._dense)

    @functools.cached_property
    def _dense_memory(self) -> LayerMemory:
        return dense_memory(self.model, self.workload, self._dense)

    @functools.cached_property
    def _routed_memory(self) -> LayerMemory:
        return routed_memory(self.model, self.workload, self._routed)

    @functools.cached_property
    def _recomputes(self) -> bool:
        return bool(self.layouts.recompute.any())

    @functools.cached_property
    def _states(self) -> tuple[StateBytes, Any]:
        """Bytes of each parameter on the distinct spreads, and every row's place among them."""
        spread, of_row = self._distinct_with_offload(STATE_FIELDS)
        return state_bytes(self.model, self.profile.cluster.device, self.workload, spread), of_row

    @functools.cached_property
    def _state_sums(self) -> list[dict[str, Any]]:
        return [{"states": sum(table.values())} for table in self._states[0].tables]

    @functools.cached_property
    def _held(self) -> tuple[Layouts, Any]:
        return self._codes.distinct("tp", "ep", "etp", "sharding")

    @property
    def _held_of_row(self) -> Any:
        return self._held[1]

    @functools.cached_property
    def _parameters(self) -> list[StageParameters]:
        """Parameters of the ranks looked at of every split, [K, distinct tp, ep, etp]."""
        units = unit_parameters(self.model, self._held[0])
        return [rank_parameters(self.model, ranks, units) for ranks in self._ranks]

    @functools.cached_property
    def _buffers(self) -> Any:
        return gradient_buffers(self.model, self._held[0]) + MEMORY.workspace_bytes

    @functools.cached_property
    def _dense_spread(self) -> tuple[Layouts, Any]:
        return self._distinct_with_offload(DENSE_SPREAD)

    @functools.cached_property
    def _expert_spread(self) -> tuple[Layouts, Any]:
        return self._distinct_with_offload(EXPERT_SPREAD)

    def _distinct_with_offload(self, fields: tuple[str, ...]) -> tuple[Layouts, Any]:
        """Distinct layouts of some fields; an optimizer offload is a fraction, so where there is any every row is its own."""
        if self.layouts.optimizer_offload.any():
            return self.layouts, np.arange(len(self.layouts))
        return self._codes.distinct(*fields)

    @functools.cached_property
    def _stage_in_domain(self) -> Any:
        """Whether the next pipeline rank stands in the same scale-up domain, on the distinct dense spreads."""
        spread = self._dense_spread[0]
        return spread.tp * spread.cp * spread.dp < self.profile.cluster.domain_gpus

    @functools.cached_property
    def _data_parallel(self) -> tuple[DataParallelTime, DataParallelTime]:
        """Exchange and update of dense and of expert parameters, of the rank that holds most of each."""
        dense, expert = self._dense_spread[0], self._expert_spread[0]
        most_dense, most_expert = self._most(dense).dense, self._most(expert).expert
        return (
            data_parallel_times(self.profile, self.workload, dense, most_dense, dense_group(self.profile, dense)),
            data_parallel_times(self.profile, self.workload, expert, most_expert, expert_group(self.profile, expert)),
        )

    def _most(self, spread: Layouts) -> UnitParameters:
        """Most dense and most expert parameters of any rank of each layout's split, [n]."""
        keys, of_row = spread.distinct(*SPLIT_FIELDS, "tp", "ep", "etp")
        dense, expert = np.empty(len(keys)), np.empty(len(keys))
        units = unit_parameters(self.model, keys)
        splits = self._splits[0]
        for g in range(len(splits)):
            rows = np.flatnonzero((keys.pp == splits.pp[g]) & (keys.vpp == splits.vpp[g]) & (keys.split == splits.split[g]))
            some = UnitParameters(units.dense[:, rows], units.expert[:, rows])
            held = rank_parameters(self.model, self._ranks[g], some)
            dense[rows], expert[rows] = held.dense.max(axis=0), held.expert.max(axis=0)
        return UnitParameters(dense[of_row], expert[of_row])


def _gather(values: Any, places: Any) -> Any:
    """`values` along the last axis at `places`."""
    return np.take(values, places, axis=-1, mode="clip")
