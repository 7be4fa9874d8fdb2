"""Which layouts could beat a step time under some split of their layers: an admissible test on many layouts at once.

Within R seconds for its passes (`problem.py`) rank r of a layout can take, with W the seconds of everything, X those of
the ranks before it and k = p - 1 - r,

    plain, m > p    t_r <= (R - X) / m, (R - 2 W + X) / (m - 2 - k), (R - W) / (m - 1 - k / 2)
    plain, m <= p   t_r <= (R - X) / m, (R - W) / (m - 1 - k)
    interleaved     t_r <= (R - r c) / m               c: the fewest layers of a first chunk, taken as the quickest

which follows from max(0, z) >= 0, z and z / 2 for what a rank waits for. X + t_r grows with X, so that the most time that all
ranks have together follows rank by rank, and has to be W. The slowest has t_r <= (R - 2 W) / (m - p - 1) where m > p + 1, from
X <= r t_r. Memory limits the layers of a rank too, with their states and the micro-batches in flight, spread over its chunks as
saves most. A layout could only beat R if all ranks together can hold all layers, those of the commonest kind and all of them
taken as the lightest. A layout that fails has no split that is faster; one that passes may have none either.

Where only the first layers of each chunk recompute, W holds those that must at least, and the lightest takes longer.
Arrays are over n layouts, [n], over their ranks as well, [R, n], over layer kinds, [K, n].
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.moments import compositions
from moeplan.costmodels.price import Pricing
from moeplan.planner.problem import Problem
from moeplan.planner.stages.level_splits import level_sizes
from moeplan.planner.stages.problem import chunk_sizes
from moeplan.planner.stages.setup import least_rest_s

AT_ONCE = 131072
"""Ranks of layouts that are looked at together: few enough to stay in cache."""
ENDS = 3
"""Chunks of a split that may hold no layer: the first, the last, and the one before where the head has that for itself."""
EVERY = 1e9
"""More layers than a chunk has."""
FOREVER_S = 1e12
"""Longer than any step."""
SLACK = 1e-9
"""Share by which a rank may exceed what it can take, for rounding."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What n layouts could reach under some split of their layers; their own does not count."""

    problem: Problem
    rows: Layouts
    leanest: int
    """Mask of recomputed modules that leave least: what a lean layer keeps. 0: what the layout says."""
    columns: dict[str, Any]
    """Arrays over the layouts, [n]; those that memory needs are there once `with_memory` was called."""
    level: bool = False
    """Whether only level splits count (`level_splits.py`)."""

    @classmethod
    def of(cls, problem: Problem, rows: Layouts, leanest: int = 0) -> Reach:
        """Layouts, of which those without recompute stand for all sets of modules where `leanest` says which leaves least."""
        columns = {
            "batches": micro_batches(problem.workload, rows),
            "whole": _whole_s(problem, rows),
            "rest_s": least_rest_s(problem, rows),
            "lean_layers": np.full(len(rows), EVERY),
            "again_s": np.zeros(len(rows)),
        }
        return cls(problem, rows, leanest, columns)

    def recomputing(self, rows: Layouts, source: Any) -> Reach:
        """Layouts that differ from these at the places `source` by what they recompute."""
        columns = {name: self.columns[name][source] for name in ("batches", "rest_s", "lean_layers", "again_s")}
        return Reach(self.problem, rows, 0, columns | {"whole": _whole_s(self.problem, rows)})

    @property
    def least_s(self) -> Any:
        """Seconds of a step that no split can beat, memory aside, [n]."""
        return self.columns["batches"] * self.columns["whole"] / self.rows.pp + self.columns["rest_s"]

    def take(self, keep: Any) -> Reach:
        """Some of the layouts."""
        columns = {name: values[..., keep] for name, values in self.columns.items()}
        return dataclasses.replace(self, rows=self.rows.take(keep), columns=columns)

    def counted(self, most: int, limit_s: float) -> tuple[Reach, Any]:
        """Under level splits with 1, 2, ... `most` layers of each chunk recomputed, those that could take less than `limit_s`.

        With the place of each layout among these, [n]. Layers that recompute must be the leanest.
        """
        problem, given = self.problem, self.with_memory()
        if not len(self.rows):
            return given, np.zeros(0, np.int64)
        layers, (pipelines, of_row) = len(problem.model.layers), self.rows.distinct("pp", "vpp")
        sizes = [level_sizes(layers, p, v) for p, v in zip(pipelines.pp.tolist(), pipelines.vpp.tolist(), strict=True)]
        fewest, largest = np.array(sizes, np.int64).T[:, of_row]
        # 1. layers that recompute: of each chunk that is no end, and of chunks of s layers min(k, s) >= k s / largest in all
        counts = np.arange(1, most + 1)[:, None]
        share = np.minimum(counts / largest, 1.0)
        inner = np.maximum(self.rows.pp * self.rows.vpp - ENDS, 0) * np.minimum(counts, fewest)
        longer = (given.columns["lean_s"] - given.columns["seconds"]).min(axis=0)
        whole = given.columns["whole"] + np.maximum(inner, share * layers) * longer
        # 2. those that could be fast enough; some layer of a chunk, or prediction layers, must not recompute
        keep = (counts <= largest - (not problem.model.mtp)) & (
            given.columns["batches"] * whole / self.rows.pp + given.columns["rest_s"] < limit_s
        )
        count, source = np.nonzero(keep)
        out = given.take(source)
        columns = out.columns | {"whole": whole[keep], "again_s": (share * longer)[keep], "lean_layers": count + 1.0}
        return dataclasses.replace(out, columns=columns, level=True), source

    def with_memory(self) -> Reach:
        """With what memory needs, so that it is not made for each limit."""
        if "still" in self.columns or not len(self.rows):
            return self
        problem, rows = self.problem, self.rows
        pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
        costs = pricing.kind_costs()
        lean = costs
        if self.leanest:
            leaner = rows.with_columns(recompute=np.full(len(rows), self.leanest))
            lean = Pricing(problem.model, problem.profile, problem.workload, leaner).kind_costs()
        tables = {
            "still": pricing.beside_layers_bytes(),
            "seconds": costs.seconds,
            "states": costs.state_bytes,
            "saved": costs.saved_bytes,
            "lean": np.minimum(lean.saved_bytes, costs.saved_bytes),
            "lean_s": lean.seconds,
            "head_s": list(pricing.layer_tables.seconds(slice(None)))[len(problem.model.kinds)],
        }
        return dataclasses.replace(self, columns=self.columns | tables)

    def may_beat(self, limit_s: float) -> Any:
        """Whether each layout could take less than `limit_s` under some split, [n]."""
        out = self.least_s < limit_s
        if not out.any():
            return out
        some = self if out.all() else self.take(out)
        some = some.with_memory()
        room = np.minimum(limit_s, FOREVER_S) - some.columns["rest_s"]
        columns, holds = some.columns | {"room": room}, np.zeros(len(room), np.bool_)
        pipelines, of_row = some.rows.distinct("pp", "vpp")
        ends = np.cumsum(np.bincount(of_row, minlength=len(pipelines)))
        by_pipeline = np.split(np.argsort(of_row, kind="stable"), ends[:-1])
        for pp, vpp, same in zip(pipelines.pp.tolist(), pipelines.vpp.tolist(), by_pipeline, strict=False):
            for start in range(0, len(same), step := max(1, AT_ONCE // pp)):
                here = same[start : start + step]
                mine = {name: values[..., here] for name, values in columns.items()}
                holds[here] = _Pipeline(self.problem, pp, vpp, mine, self.level).holds()
        out[out] = holds
        return out


def _whole_s(problem: Problem, rows: Layouts) -> Any:
    """Seconds of one micro-batch in all stages together, [n]."""
    return Pricing(problem.model, problem.profile, problem.workload, rows).whole_micro_batch_s()


class _Pipeline:
    """Layouts with the same pipeline within the time that is given them."""

    def __init__(self, problem: Problem, pp: int, vpp: int, columns: dict[str, Any], level: bool) -> None:
        self.problem, self.pp, self.vpp, self.columns = problem, pp, vpp, columns
        self.room, self.whole, self.batches = columns["room"], columns["whole"], columns["batches"]
        self.fewest, self.most = (level_sizes if level else chunk_sizes)(len(problem.model.layers), pp, vpp)

    def holds(self) -> Any:
        """Whether the ranks can hold all layers within the time and the memory, [n]."""
        model, of_layer = self.problem.model, self.problem.model.kind_of_layer
        slowest = self._slowest_s()
        within = self._within_s(slowest)
        out = self._together_s(within) >= self.whole * (1.0 - SLACK)
        within[-1] -= self.columns["head_s"]
        counts = [of_layer.count(k) for k in range(len(model.kinds))]
        most = int(np.argmax(counts))
        tables = [self.columns[name] for name in ("states", "lean", "saved")]
        tests = [(len(of_layer), self.fewest, [self._lightest_s(), *(table.min(axis=0) for table in tables)])]
        if len(counts) > 1:  # a chunk may have its fewest layers, and those that recompute, of other kinds
            tests.append((counts[most], 0, [self.columns["seconds"][most], *(table[most] for table in tables)]))
        for layers, fewest, needed in tests:
            if out.any():
                out &= self._capacity(within, fewest, *needed) >= layers
        return out

    def _lightest_s(self) -> Any:
        """Seconds of one micro-batch in a layer, with what layers recompute spread over all, at least, [n]."""
        return self.columns["seconds"].min(axis=0) + self.columns["again_s"]

    def _slowest_s(self) -> Any:
        """Seconds that the slowest rank may take for one micro-batch, [n]."""
        p, m = self.pp, self.batches
        most = self.room / m
        if self.vpp == 1:
            tail = np.maximum(m - p - 1.0, 1.0)
            most = np.where(m > p + 2, np.minimum(most, (self.room - 2.0 * self.whole) / tail), most)
        return most

    def _within_s(self, slowest: Any) -> Any:
        """Seconds that each rank may take for one micro-batch, whatever stands before it, [R, n]."""
        p, m = self.pp, self.batches
        rank = np.arange(p)[:, None]
        if self.vpp > 1:
            first = np.maximum(rank - 1.0, 0.0) * self.fewest  # the first chunk may hold no layer
            return np.minimum(slowest, (self.room - first * self._lightest_s()) / m)
        lag = m - 1.0 - (p - 1 - rank) * np.where(m > p, 0.5, 1.0)
        out = np.minimum(slowest, (self.room - self.whole) / np.maximum(lag, 1.0))
        return np.where(lag >= 1.0, out, slowest)

    def _together_s(self, within: Any) -> Any:
        """Seconds that all ranks together may take for one micro-batch, [n]; `within`: what each may, [R, n]."""
        if self.vpp > 1:
            out: Any = within.sum(axis=0)
            return out
        p, m = self.pp, self.batches
        before = np.zeros(len(self.room))
        for rank, each in enumerate(within):
            lag = m - 2.0 - (p - 1 - rank)
            waits = (self.room - 2.0 * self.whole + before) / np.maximum(lag, 1.0)
            waits = np.where((lag >= 1.0) & (m > p), waits, np.inf)
            before = before + np.minimum(np.minimum(each, (self.room - before) / m), waits)
        return before

    def _capacity(self, within: Any, fewest: int, seconds: Any, states: Any, lean: Any, saved: Any) -> Any:
        """Layers that all ranks together can hold, [n], -inf where one cannot hold `fewest` in each of its chunks.

        Of a layer its seconds and bytes, [n].
        """
        by_time = np.floor(within / seconds * (1.0 + SLACK) + SLACK)
        held = np.minimum(np.minimum(by_time, self._held(fewest, states, lean, saved)), self.most * self.vpp)
        least = _chunks(self.pp, self.vpp, fewest)[1].sum(axis=1)[:, None]
        out: Any = np.where(held >= least, held, -np.inf).sum(axis=0)
        return out

    def _held(self, fewest: int, states: Any, lean: Any, saved: Any) -> Any:
        """Layers that memory leaves to each rank when its first backward begins, spread over its chunks as saves most, [R, n].

        Of the layers of a chunk the first `lean_layers` keep `lean`, the others `saved`, which is no less.
        """
        limit, lean_layers = self.problem.peak_limit_bytes - self.columns["still"], self.columns["lean_layers"]
        in_flight, least = _chunks(self.pp, self.vpp, fewest)
        scale = np.minimum(self.batches / self.pp, 1.0)
        mixed = bool((lean_layers < self.most).any())
        first: Any = np.minimum(lean_layers, self.most) if mixed else float(self.most)
        used, ways = np.zeros((self.pp, len(self.room))), list[tuple[Any, Any]]()
        for held, few in zip(in_flight.T[..., None], least.T[..., None], strict=True):
            each = np.minimum(self.batches, held) if self.vpp == 1 else scale * held
            cheap, dear = states + each * lean, states + each * saved if mixed else 0.0
            used = used + np.minimum(first, few) * cheap + np.maximum(few - first, 0.0) * dear
            ways.append((cheap, np.maximum(first - few, 0.0)))
            if mixed:
                ways.append((dear, self.most - np.maximum(first, few)))
        if mixed:  # what is cheapest comes first, which is not the same in all layouts
            costs, rooms = (np.stack(np.broadcast_arrays(*some)) for some in zip(*ways, strict=True))
            order = np.argsort(costs, axis=0)
            ways = list(zip(np.take_along_axis(costs, order, 0), np.take_along_axis(rooms, order, 0), strict=True))
        out = np.where(used <= limit * (1.0 + SLACK), least.sum(axis=1)[:, None], -np.inf)
        for cost, room in ways:
            more = np.clip(np.floor((limit - used) / cost * (1.0 + SLACK)), 0.0, room)
            used, out = used + more * cost, out + more
        return out


@functools.lru_cache(maxsize=4096)
def _chunks(pp: int, vpp: int, fewest: int) -> tuple[Any, Any]:
    """Of each rank's chunks their micro-batches in flight at its first backward, ascending, and their fewest layers, [R, v].

    The former in a step with pp micro-batches or more.
    """
    ahead = (pp - 1 - np.arange(pp))[:, None]
    in_flight = ahead + 1.0
    if vpp > 1:
        in_flight = np.stack([compositions(pp, vpp, (vpp + 1) * pp - 2 * rank - 1, pp)[0] for rank in range(pp)]) * 1.0
    # the chunks with embedding, prediction layers and head may hold no others
    least = np.full((pp, vpp), float(fewest))
    least[0, 0] = 0.0
    least[-2:, -1] = 0.0
    order = np.argsort(in_flight, axis=1, kind="stable")
    return np.take_along_axis(in_flight, order, 1), np.take_along_axis(least, order, 1)
