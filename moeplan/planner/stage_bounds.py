"""Which layouts could beat a step time under some split of their layers: an admissible test on many layouts at once.

Within R seconds for its passes (`stage_problem.py`) rank r of a layout can take, with W the seconds of everything,

    plain           t_r <= (R - W) / (m - 1 - k / 2), and the slowest t_r <= (R - 2 W) / (m - p - 1) where m > p + 1
    interleaved     t_r <= (R - r c) / m               c: the fewest layers of a first chunk, taken as the quickest

The first comes from 2 x_>r >= k t_r or not, whichever is less; the second from x_<r <= r t_r. Memory limits its layers too,
with their states and the micro-batches in flight, spread over its chunks as saves most. A layout could only beat R if all ranks
together can hold all layers, those of the commonest kind and all of them taken as the lightest, and if p times the slowest is
at least W. A layout that fails has no split that is faster; one that passes may have none either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.moments import compositions
from moeplan.costmodels.price import Pricing
from moeplan.planner.problem import Problem
from moeplan.planner.stage_problem import chunk_sizes
from moeplan.planner.stage_setup import least_rest_s

AT_ONCE = 32768
"""Layouts whose memory is looked at together."""
EVERY = 1e9
"""More layers than a chunk has."""
SLACK = 1e-9
"""Share by which a rank may exceed what it can take, for rounding."""


def may_beat(problem: Problem, rows: Layouts, limit_s: Any, *, leanest: int = 0, lean_layers: Any = EVERY) -> Any:
    """Whether each layout could take less than `limit_s` (one number or [n]) under some split, [n]; its own does not count.

    `leanest`: mask of the recomputed modules that leave least, to keep no more than under them; then a layout without recompute
    stands for all sets of modules. `lean_layers`: so many layers of a chunk keep no more, the others all, one number or [n].
    """
    pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
    whole = pricing.whole_micro_batch_s()
    batches = micro_batches(problem.workload, rows)
    room = limit_s - least_rest_s(problem, rows)
    out = whole / rows.pp * batches < room
    places = np.flatnonzero(out)
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        lean = np.broadcast_to(lean_layers, len(rows))[some]
        out[some] = _holds(problem, rows.take(some), room[some], whole[some], leanest, lean)
    return out


def _holds(problem: Problem, rows: Layouts, room: Any, whole: Any, leanest: int, lean_layers: Any) -> Any:
    """Whether the ranks of each layout can hold all layers within the time and the memory, [n]."""
    pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
    costs, parts = pricing.kind_costs(), dict(pricing.peak_memory())
    lean = costs.saved_bytes
    if leanest:
        leaner = rows.with_columns(recompute=0 * rows.recompute + leanest)
        lean = np.minimum(lean, Pricing(problem.model, problem.profile, problem.workload, leaner).kind_costs().saved_bytes)
    table = {
        "room": room,
        "whole": whole,
        "still": parts["buffers"].max(axis=0) + parts["working set"].max(axis=0),
        "batches": micro_batches(problem.workload, rows),
        "seconds": costs.seconds,
        "states": costs.state_bytes,
        "saved": costs.saved_bytes,
        "lean": lean,
        "lean_layers": lean_layers.astype(np.float64),
        "head_s": list(pricing.layer_tables.seconds(slice(None)))[len(problem.model.kinds)],
    }
    out = np.zeros(len(rows), np.bool_)
    for pp, vpp in np.unique(np.stack([rows.pp, rows.vpp]), axis=1).T.tolist():
        here = np.flatnonzero((rows.pp == pp) & (rows.vpp == vpp))
        out[here] = _Group(problem, pp, vpp, **{name: values[..., here] for name, values in table.items()}).holds()
    return out


@dataclass
class _Group:
    """Layouts with the same pipeline; arrays over them are [n], those over layer kinds [kinds, n]."""

    problem: Problem
    pp: int
    vpp: int
    room: Any
    """Seconds that the passes may take."""
    whole: Any
    """Seconds of one micro-batch in all stages."""
    still: Any
    """Bytes beside layers, at least."""
    batches: Any
    seconds: Any
    states: Any
    saved: Any
    lean: Any
    """Saved by one of the first `lean_layers` layers of a chunk, at most `saved`."""
    lean_layers: Any
    head_s: Any

    def __post_init__(self) -> None:
        self.fewest, self.most = chunk_sizes(len(self.problem.model.layers), self.pp, self.vpp)

    def holds(self) -> Any:
        """Whether the ranks can hold all layers within the time and the memory, [n]."""
        model, of_layer = self.problem.model, self.problem.model.kind_of_layer
        slowest = self._slowest_s()
        out = self.pp * slowest >= self.whole * (1.0 - SLACK)
        counts = [of_layer.count(k) for k in range(len(model.kinds))]
        most = int(np.argmax(counts))
        tables = (self.seconds, self.states, self.lean, self.saved)
        tests = [(counts[most], *(table[most] for table in tables))]
        if len(counts) > 1:
            tests.append((len(of_layer), *(table.min(axis=0) for table in tables)))
        for layers, seconds, *needed in tests:
            held: Any = 0.0
            for rank in range(self.pp):
                held = held + self._capacity(rank, slowest, seconds, needed)
            out &= held >= layers
        return out

    def _slowest_s(self) -> Any:
        """Seconds that the slowest rank may take for one micro-batch, [n]."""
        p, m = self.pp, self.batches
        most = self.room / m
        if self.vpp == 1:
            tail = np.maximum(m - p - 1.0, 1.0)
            most = np.where(m > p + 2, np.minimum(most, (self.room - 2.0 * self.whole) / tail), most)
        return most

    def _capacity(self, rank: int, slowest: Any, seconds: Any, needed: Sequence[Any]) -> Any:
        """Layers that a rank can hold, [n]. `needed`: bytes of the states, of what a lean layer keeps, and any other."""
        p, m = self.pp, self.batches
        ahead = p - 1 - rank
        if self.vpp > 1:
            first = 0.0 if rank == 0 else (rank - 1.0) * self.fewest  # the first chunk may hold no layer
            time = np.minimum(slowest, (self.room - first * self.seconds.min(axis=0)) / m)
        else:
            lag = m - 1.0 - ahead / 2.0
            time = np.where(lag > 1.0, np.minimum(slowest, (self.room - self.whole) / np.maximum(lag, 1.0)), slowest)
            time = np.where(m > p, time, slowest)
        time = time - (self.head_s if rank == p - 1 else 0.0)
        by_time = np.floor(time / seconds * (1.0 + SLACK) + SLACK)
        limit = self.problem.peak_limit_bytes - self.still
        in_flight = [np.minimum(m, ahead + 1.0)]
        if self.vpp > 1:
            share = np.minimum(m / p, 1.0)
            in_flight = [share * held for held in compositions(p, self.vpp, (self.vpp + 1) * p - 2 * rank - 1, p)[0]]
        by_memory = self._held(rank, limit, in_flight, *needed)
        return np.clip(np.minimum(by_time, by_memory), 0.0, self.most * self.vpp)

    def _held(self, rank: int, limit: Any, in_flight: Sequence[Any], states: Any, lean: Any, saved: Any) -> Any:
        """Layers that memory leaves to a rank when its first backward begins, spread over its chunks as saves most, [n].

        `in_flight`: micro-batches in flight in each of its chunks then.
        """
        least: Any = np.full(self.vpp, float(self.fewest))
        least[0] *= rank > 0  # the chunks with embedding, prediction layers and head may hold no others
        least[-1] *= rank < self.pp - 2
        mixed = bool((self.lean_layers < self.most).any())
        first: Any = np.minimum(self.lean_layers, self.most) if mixed else float(self.most)
        used, ways = 0.0 * limit, list[tuple[Any, Any]]()
        for fewest, each in sorted(zip(least, in_flight, strict=True), key=lambda both: float(np.max(both[1]))):
            cheap, dear = states + each * lean, states + each * saved if mixed else 0.0
            used = used + np.minimum(first, fewest) * cheap + np.maximum(fewest - first, 0.0) * dear
            ways.append((cheap, np.maximum(first - fewest, 0.0)))
            if mixed:
                ways.append((dear, self.most - np.maximum(first, fewest)))
        if mixed:  # what is cheapest comes first, which is not the same in all layouts
            costs, rooms = (np.stack(np.broadcast_arrays(*some)) for some in zip(*ways, strict=True))
            order = np.argsort(costs, axis=0)
            ways = list(zip(np.take_along_axis(costs, order, 0), np.take_along_axis(rooms, order, 0), strict=True))
        out = np.where(used <= limit * (1.0 + SLACK), least.sum(), 0.0)
        for cost, room in ways:
            more = np.clip(np.floor((limit - used) / cost * (1.0 + SLACK)), 0.0, room)
            used, out = used + more * cost, out + more
        return out
