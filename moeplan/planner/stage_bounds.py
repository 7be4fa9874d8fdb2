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
SLACK = 1e-9
"""Share by which a rank may exceed what it can take, for rounding."""


def may_beat(problem: Problem, rows: Layouts, limit_s: Any, *, leanest: int = 0) -> Any:
    """Whether each layout could take less than `limit_s` (one number or [n]) under some split, [n]; its own does not count.

    `leanest`: mask of the recomputed modules that leave least, to keep no more than under them; then a layout without recompute
    stands for all sets of modules.
    """
    pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
    whole = pricing.whole_micro_batch_s()
    batches = micro_batches(problem.workload, rows)
    room = limit_s - least_rest_s(problem, rows)
    out = whole / rows.pp * batches < room
    places = np.flatnonzero(out)
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        out[some] = _holds(problem, rows.take(some), room[some], whole[some], leanest)
    return out


def _holds(problem: Problem, rows: Layouts, room: Any, whole: Any, leanest: int) -> Any:
    """Whether the ranks of each layout can hold all layers within the time and the memory, [n]."""
    pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
    costs, parts = pricing.kind_costs(), dict(pricing.peak_memory())
    saved = costs.saved_bytes
    if leanest:
        lean = rows.with_columns(recompute=0 * rows.recompute + leanest)
        saved = np.minimum(saved, Pricing(problem.model, problem.profile, problem.workload, lean).kind_costs().saved_bytes)
    table = {
        "room": room,
        "whole": whole,
        "still": parts["buffers"].max(axis=0) + parts["working set"].max(axis=0),
        "batches": micro_batches(problem.workload, rows),
        "seconds": costs.seconds,
        "states": costs.state_bytes,
        "saved": saved,
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
        tests = [(counts[most], self.seconds[most], self.states[most], self.saved[most])]
        if len(counts) > 1:
            tests.append((len(of_layer), *(table.min(axis=0) for table in (self.seconds, self.states, self.saved))))
        for layers, seconds, states, saved in tests:
            held: Any = 0.0
            for rank in range(self.pp):
                held = held + self._capacity(rank, slowest, seconds, states, saved)
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

    def _capacity(self, rank: int, slowest: Any, seconds: Any, states: Any, saved: Any) -> Any:
        """Layers that a rank can hold, [n]."""
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
        if self.vpp == 1:
            by_memory = np.floor(limit / (states + np.minimum(m, ahead + 1.0) * saved) * (1.0 + SLACK))
        else:
            by_memory = self._held(rank, limit, states, saved)
        return np.clip(np.minimum(by_time, by_memory), 0.0, self.most * self.vpp)

    def _held(self, rank: int, limit: Any, states: Any, saved: Any) -> Any:
        """Layers that memory leaves to a rank of several chunks when its first backward begins, spread as saves most, [n]."""
        p, v = self.pp, self.vpp
        in_flight = compositions(p, v, (v + 1) * p - 2 * rank - 1, p)[0].astype(np.float64)
        share = np.minimum(self.batches / p, 1.0)
        least = np.full(v, float(self.fewest))
        least[0] *= rank > 0  # the chunks with embedding, prediction layers and head may hold no others
        least[-1] *= rank < p - 2
        each = [states + share * held * saved for held in in_flight]
        used = sum(n * one for n, one in zip(least, each, strict=True))
        out = np.where(used <= limit * (1.0 + SLACK), least.sum(), 0.0)
        for place in np.argsort(in_flight):
            more = np.clip(np.floor((limit - used) / each[place] * (1.0 + SLACK)), 0.0, self.most - least[place])
            used, out = used + more * each[place], out + more
        return out
