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
from moeplan.costmodels.bubble import exact_span_s, least_span_s, pass_seconds
from moeplan.costmodels.constants import MEMORY, STEP
from moeplan.costmodels.layer_tables import LayerTables, gather
from moeplan.costmodels.layout import SHARDINGS, Codes, Layouts
from moeplan.costmodels.memory import (
    StageParameters,
    StateBytes,
    gradient_buffers,
    micro_batches,
    rank_parameters,
    state_bytes,
    unit_parameters,
)  # fmt: skip
from moeplan.costmodels.model import Model
from moeplan.costmodels.once_tables import SPLIT_FIELDS, OnceTables
from moeplan.costmodels.peak import MicroBatchMemory, moment_parts
from moeplan.costmodels.stages import Ranks, all_ranks, binding_ranks, chunk_units, filling
from moeplan.costmodels.step import (
    KindCosts,
    StepCost,
    data_parallel_exposed_s,
    send_times,
    sends_exposed_s,
)  # fmt: skip
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

GROUP_FIELDS = (*SPLIT_FIELDS, "recompute_count")
"""What says besides which of them recompute; layouts that share it are priced together."""
STATE_FIELDS = ("pp", "tp", "cp", "dp", "etp", "edp", "sharding", "optimizer_offload")
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
        self.layer_tables = LayerTables(model, profile, workload, layouts, self._codes)

    def step_seconds(self) -> Any:
        """Step time of every row, [n]."""
        if self.exact:
            return self.exact_step_seconds(np.arange(len(self.layouts)))
        out = np.empty(len(self.layouts))
        for group, rows in self._blocks():
            out[rows] = sum(self._step(group, rows).values())
        return out

    def exact_step_seconds(self, chosen: Any) -> Any:
        """Exact step time of the rows at the places `chosen`, in their order."""
        out, spans = np.empty(len(self.layouts)), self._exact_spans(chosen)
        for group, rows in self._blocks(chosen):
            out[rows] = sum(self._step(group, rows, spans).values())
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
        if any(self.layouts.recompute_counts):
            for group, rows in self._blocks():
                counts = chunk_units(*self._split(group)).sum(axis=(0, 1))
                out[rows] = sum(c * s for c, s in zip(counts, self._unit_seconds(group, rows), strict=True))
            return out
        for start in range(0, len(out), BLOCK):
            rows = slice(start, min(start + BLOCK, len(out)))
            out[rows] = sum(u.count * s for u, s in zip(self.layer_tables.units, self.layer_tables.seconds(rows), strict=True))
        return out

    def step_cost(self) -> StepCost:
        """Step time of every row with all its parts."""
        n = len(self.layouts)
        parts: dict[str, Any] = {}
        stage_s = np.empty((self._most_ranks, n))
        spans = self._exact_spans(np.arange(n)) if self.exact else None
        for group, rows in self._blocks():
            for name, seconds in self._step(group, rows, spans, detail=True).items():
                if name not in parts:
                    parts[name] = np.zeros(n)
                parts[name][rows] = seconds
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
                    if name not in parts:
                        parts[name] = np.zeros((self._most_ranks, len(self.layouts)))
                    parts[name][k, rows] = value
        return Breakdown(unit="bytes", parts=parts)

    def kind_costs(self) -> KindCosts:
        """What one layer of each kind costs under every layout where it recomputes what the layout says."""
        states, of_row = self._states
        units = unit_parameters(self.model, self.layouts)
        dense, expert = (sum(table.values())[of_row] for table in (states.dense, states.expert))
        kinds, every = range(len(self.model.kinds)), slice(None)
        return KindCosts(
            seconds=np.stack(list(self.layer_tables.seconds(every))[: len(kinds)]),
            state_bytes=np.stack([units.dense[k] * dense + units.expert[k] * expert for k in kinds]),
            saved_bytes=np.stack(self.layer_tables.saved_bytes(every)[: len(kinds)]),
        )

    def beside_layers_bytes(self) -> Any:
        """Buffers, and what the backward of its widest layer needs, on a rank with layers but without the head, [n]."""
        batch = self._micro_batch(0, slice(None))
        return gather(self._buffers, self._held_of_row) + batch.working + batch.again

    def saved_bytes(self) -> Any:
        """Kept of one micro-batch by a unit of each column of `stages.Ranks.layers`, [columns, n]; for rows of one split."""
        n = len(self.layouts)
        return np.stack([np.broadcast_to(s, n) for table in self._tables(0) for s in table.saved_bytes(slice(None))])

    def moment_bytes(self) -> Any:
        """Held for a moment by every rank looked at in the backward of its widest layer, [K, n]; for rows of one split."""
        batch = self._micro_batch(0, slice(None))
        return np.stack([batch.working + batch.again * again for again in self._ranks[0].recomputes])

    # -- one block of rows that share a split ----------------------------------------------------------------------------

    def _step(self, group: int, rows: Any, spans: Any = None, *, detail: bool = False) -> dict[str, Any]:
        """Seconds of a step by part, [n]; without `detail` all layers are one part.

        `spans`: of the passes of all rows, see `_exact_spans`; without it waiting is bounded.
        """
        pp, vpp = self._degrees(group)
        batches = self._batches[rows]
        units = list(self._unit_seconds(group, rows))
        # 1. seconds of one micro-batch on the slowest rank, and on all ranks together
        stages = self._stage_seconds(group, rows, units)
        longest = functools.reduce(np.maximum, stages)
        # 2. the slowest rank's work for all micro-batches, and its waiting for others
        parts = self._layer_parts(group, rows, stages, batches) if detail else {"layers": batches * longest}
        waits = self._span(group, rows, units, spans) - batches * longest if pp > 1 else 0.0
        parts["pipeline bubble"] = np.maximum(waits, 0.0)
        once = self._once
        dense_place, expert_place = once.dense_of_row[rows], once.expert_of_row[rows]
        inside, across = (gather(t, self.layer_tables.dense_of_row[rows]) for t in self._sends)
        one = np.where(once.stage_in_domain[dense_place], inside, across) if pp > 1 else inside
        parts["pipeline sends"] = sends_exposed_s(one, batches, pp, vpp)
        # 3. once a step: data parallelism, optimizer, overhead
        dense, expert = once.dense_times, once.expert_times
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

    def _span(self, group: int, rows: Any, units: list[Any], spans: Any) -> Any:
        """Seconds of the passes of all ranks, [n]: exact where `spans` are given, or in closed form from below."""
        least = least_span_s(filling(*self._split(group)), units, self._batches[rows])
        return least if spans is None else np.maximum(spans[rows], least)

    def _exact_spans(self, chosen: Any) -> Any:
        """Seconds of all passes of the rows at the places `chosen`, run together where pipelines are alike, [n]."""
        alike: dict[tuple[int, int], list[list[Any]]] = {}
        for group, rows in self._blocks(chosen):
            if self._degrees(group)[0] > 1:
                ways = [table.pass_seconds(rows) for table in self._tables(group)]
                units = chunk_units(*self._split(group))
                passes = [pass_seconds(units, [unit for table in ways for unit in table[way]]) for way in (0, 1)]
                alike.setdefault(self._degrees(group), []).append([rows, *passes])
        out = np.zeros(len(self.layouts))
        for parts in alike.values():
            rows, forward, backward = (np.concatenate(some, axis=-1) for some in zip(*parts, strict=True))
            out[rows] = exact_span_s(forward, backward, self._batches[rows])
        return out

    def _stage_seconds(self, group: int, rows: Any, units: list[Any] | None = None) -> list[Any]:
        """Seconds of one micro-batch on each rank looked at, [n] each."""
        units = list(self._unit_seconds(group, rows)) if units is None else units
        return [sum(c * s for c, s in zip(counts, units, strict=True) if c) for counts in self._unit_counts(group).tolist()]

    def _layer_parts(self, group: int, rows: Any, stages: list[Any], batches: Any) -> dict[str, Any]:
        """Parts of the slowest rank's work for all micro-batches, [n] each."""
        slowest = np.argmax(np.stack(np.broadcast_arrays(*stages)), axis=0)
        counts = self._unit_counts(group)[slowest].T
        parts: dict[str, Any] = {}
        units = [(table, unit) for table in self._tables(group) for unit in table.units]
        for (layers, unit), count in zip(units, counts, strict=True):
            mine = batches * count
            for table, keys, place in (
                (unit.dense, layers.dense, layers.dense_of_row),
                (unit.routed, layers.routed, layers.routed_of_row),
            ):
                for name, seconds in table.items():
                    path = f"{unit.name}/{name}"
                    parts[path] = parts.get(path, 0.0) + mine * np.broadcast_to(seconds, len(keys))[place[rows]]
        return parts

    def _memory(self, group: int, rows: Any, *, detail: bool = False) -> Iterator[dict[str, Any]]:
        """Peak bytes of each rank looked at by part, [n]; without `detail` in few parts."""
        (pp, vpp), ranks, batches = self._degrees(group), self._ranks[group], self._batches[rows]
        batch = self._micro_batch(group, rows)
        held, place, spread = self._parameters[group], self._held_of_row[rows], self._states[1][rows]
        each = [{n: gather(v, spread) for n, v in table.items()} for table in self._state_tables(detail)]
        copies = [gather(v, spread) for v in self._states[0].step]
        for k in range(len(ranks.rank)):
            counts = [gather(v[k], place) for v in (held.dense, held.expert, held.plain)[: len(each)]]
            parts = {n: sum(c * t[n] for c, t in zip(counts, each, strict=True) if n in t) for n in each[0]}
            parts["buffers"] = gather(self._buffers, place)
            step = sum(c * v for c, v in zip(counts, copies, strict=False))
            yield parts | moment_parts(self.workload, pp, vpp, ranks, k, batch, batches, step)

    def _micro_batch(self, group: int, rows: Any) -> MicroBatchMemory:
        """What one micro-batch keeps or needs for a moment."""
        layers = self.layer_tables
        dense, routed = layers.dense_of_row[rows], layers.routed_of_row[rows]
        one, two = layers.dense_memory, layers.routed_memory
        return MicroBatchMemory(
            saved=[bytes_ for table in self._tables(group) for bytes_ in table.saved_bytes(rows)],
            working=np.maximum(gather(one.working, dense), gather(two.working, routed)),
            again=gather(one.again, dense) + gather(two.again, routed) if self._recomputes else 0.0,
            logits=gather(one.logits, dense) if self._ranks[group].head.any() else 0.0,
            sent=gather(one.sent, dense) if self._degrees(group)[0] > 1 else 0.0,
        )

    def _unit_seconds(self, group: int, rows: Any) -> Iterator[Any]:
        """Seconds of one micro-batch in each unit, [n]; those without recompute last where only some layers recompute."""
        for table in self._tables(group):
            yield from table.seconds(rows)

    def _state_tables(self, detail: bool) -> list[dict[str, Any]]:
        """Bytes of a dense and of an expert parameter, and of what embedding and head cost beyond, by part or in one sum."""
        return self._states[0].tables if detail else self._state_sums

    def _unit_counts(self, group: int) -> Any:
        """How many of each unit every rank looked at holds, [K, units]."""
        return chunk_units(*self._split(group)).sum(axis=1)[self._ranks[group].rank.astype(np.int64)]

    def _tables(self, group: int) -> list[LayerTables]:
        """Tables of the units, those without recompute last where only some layers recompute."""
        return [self.layer_tables, self._plain] if self._texts[group][1] else [self.layer_tables]

    # -- tables, made when first needed ----------------------------------------------------------------------------------

    def _blocks(self, chosen: Any = None) -> Iterator[tuple[int, Any]]:
        """Groups of rows that share a split, in blocks: the place of the split, and rows as slice or indices.

        Of the rows at the places `chosen` only, if given, as indices.
        """
        splits, of_row = self._splits
        if chosen is not None:
            for group in np.unique(of_row[chosen]).tolist():
                some = np.sort(chosen[of_row[chosen] == group])
                yield from ((group, some[a : a + BLOCK]) for a in range(0, len(some), BLOCK))
            return
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
        return self._codes.distinct(*GROUP_FIELDS)

    def _degrees(self, group: int) -> tuple[int, int]:
        splits = self._splits[0]
        return int(splits.pp[group]), int(splits.vpp[group])

    @functools.cached_property
    def _ranks(self) -> list[Ranks]:
        choose = all_ranks if self.every_rank else binding_ranks
        return [choose(*self._split(g)) for g in range(len(self._splits[0]))]

    def _split(self, group: int) -> tuple[Model, int, int, str, str]:
        """What says which layers stand in which chunk, and which of them recompute."""
        return self.model, *self._degrees(group), *self._texts[group]

    @functools.cached_property
    def _texts(self) -> list[tuple[str, str]]:
        x = self._splits[0]
        return [(x.stages[s], x.recompute_counts[c]) for s, c in zip(x.split, x.recompute_count, strict=True)]

    @functools.cached_property
    def _plain(self) -> LayerTables:
        """Tables without recompute of the rows whose chunks recompute only some layers."""
        some = np.array([bool(text) for text in self.layouts.recompute_counts])[self.layouts.recompute_count]
        given = self.model, self.profile, self.workload, self.layouts
        return LayerTables.without_recompute(*given, np.flatnonzero(some))

    @functools.cached_property
    def _batches(self) -> Any:
        return micro_batches(self.workload, self.layouts)

    @functools.cached_property
    def _most_ranks(self) -> int:
        return max((len(r.rank) for r in self._ranks), default=1)

    @functools.cached_property
    def _sends(self) -> tuple[Any, Any]:
        return send_times(self.model, self.profile, self.workload, self.layer_tables.dense)

    @functools.cached_property
    def _recomputes(self) -> bool:
        return bool(self.layouts.recompute.any())

    @functools.cached_property
    def _states(self) -> tuple[StateBytes, Any]:
        """Bytes of each parameter on the distinct spreads, and every row's place among them."""
        spread, of_row = self._codes.distinct(*STATE_FIELDS)
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
    def _once(self) -> OnceTables:
        return OnceTables(self.model, self.profile, self.workload, self._codes)
