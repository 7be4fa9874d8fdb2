"""Runs the orders of a pipeline schedule: when each pass starts and ends on its rank.

Every rank works through its order; a pass starts when the rank is free and what it waits for has arrived: the output of the
place before it on the route, or the gradient of the place behind. Sends take `send_s` each, one after the other on the
sender's link. A share `exposed` of one send lengthens every pass, whether it waits to send or to receive; the rest runs beside
the pass that makes what is sent. Nothing runs beside sends from first pass to first pass of two ranks, and from last to last:
these are waited for in whole. Units: seconds. 100,000 passes take about half a second: tasks are integers, and a rank runs
until it waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.pipeline.action import KINDS, Orders, format_order
from moeplan.errors import ScheduleError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """What ran when, rank by rank in the order of the schedule, [n] each."""

    rank: Ints
    chunk: Ints
    batch: Ints
    kind: Ints
    """Places in `KINDS`."""
    start_s: Floats
    end_s: Floats
    source: Ints
    """The pass on another rank whose send each pass waits for; -1: none."""
    sent_s: Floats
    """Start of that send."""
    arrived_s: Floats
    """Its end."""

    @property
    def makespan_s(self) -> float:
        """End of the last pass."""
        return float(self.end_s.max(initial=0.0))

    def of_rank(self, rank: int) -> slice:
        """The passes of a rank."""
        return slice(*np.searchsorted(self.rank, [rank, rank + 1]))


def run(orders: Orders, seconds: dict[str, Any], *, send_s: float = 0.0, exposed: float = 1.0, begin_s: Any = 0.0) -> Passes:
    """Times of all passes.

    `seconds`: of F, B, I, W, and of "F&B" for two that are joined (looked up at the first of them), each a number or an array
    that broadcasts to [ranks, chunks, micro-batches]. `send_s`: of one send between two ranks; `exposed`: its share that passes
    wait for; `begin_s`: when the ranks begin, a number or [ranks].
    """
    rank, kind, batch, chunk, joined = _columns(orders)
    shape = (len(orders.rows), int(chunk.max()) + 1, orders.batches)
    # 1. how long each pass takes
    length = np.zeros(len(rank))
    for name, of in seconds.items():
        here = joined if name == "F&B" else ~joined & (kind == KINDS.index(name))
        length[here] = np.broadcast_to(np.asarray(of, np.float64), shape)[rank[here], chunk[here], batch[here]]
    if len(orders.rows) > 1:
        length += exposed * send_s
    # 2. what it waits for, and which sends it waits for in whole
    source = _sources(orders, rank, kind, batch, chunk, shape)
    bounds = np.searchsorted(rank, np.arange(len(orders.rows) + 1))
    further = np.zeros(len(rank))
    for outer in (bounds[:-1], bounds[1:] - 1):
        further[np.intersect1d(source[outer], outer)] = (1.0 - exposed) * send_s
    receiver = np.full(len(rank), -1)
    receiver[source[source >= 0]] = rank[source >= 0]
    # 3. every rank until it waits
    given = (length.tolist(), source.tolist(), joined.tolist(), receiver.tolist(), further.tolist())
    begin = np.broadcast_to(np.asarray(begin_s, np.float64), shape[:1]).tolist()
    start, end, arrived = (np.asarray(times) for times in _loop(bounds.tolist(), begin, *given, send_s))
    if (end < 0.0).any():
        raise _deadlock(orders, bounds, end)
    arrived = np.where(source >= 0, arrived[source], 0.0)
    return Passes(
        rank=rank, chunk=chunk, batch=batch, kind=kind, start_s=start, end_s=end,
        source=source, sent_s=arrived - send_s, arrived_s=arrived,
    )  # fmt: skip


def _columns(orders: Orders) -> tuple[Ints, Ints, Ints, Ints, npt.NDArray[np.bool_]]:
    """Rank, kind, micro-batch, chunk of every pass, and whether it is joined to the next, [n] each."""
    rank = np.repeat(np.arange(len(orders.rows)), [len(row) for row in orders.rows])
    actions = [action for row in orders.rows for action in row]
    kinds, batches, chunks, joined = zip(*actions, strict=True)
    code = np.array([KINDS.index(kind) for kind in kinds])
    return rank, code, np.array(batches), np.array(chunks), np.array(joined, np.bool_)


def _sources(orders: Orders, rank: Ints, kind: Ints, batch: Ints, chunk: Ints, shape: tuple[int, int, int]) -> Ints:
    """The pass on another rank that each one waits for, [n]; -1: none."""
    # 1. where each pass stands: forwards, and what makes gradients of inputs (B or I), [2, ranks, chunks, batches]
    back = np.where(kind == KINDS.index("F"), 0, 1)
    waits = kind != KINDS.index("W")
    table = np.full((2, *shape), -1)
    table[back[waits], rank[waits], chunk[waits], batch[waits]] = np.flatnonzero(waits)
    # 2. the place before (forward) and behind (backward) on each route, [routes, 2, ranks, chunks, 2]
    near = np.full((len(orders.routes), 2, *shape[:2], 2), -1)
    for i, route in enumerate(orders.routes):
        for one, two in zip(route, route[1:], strict=False):
            near[i, 0, two[0], two[1]], near[i, 1, one[0], one[1]] = one, two
    there = near[batch * len(orders.routes) // orders.batches, back, rank, chunk]
    source = table[back, there[:, 0], there[:, 1], batch]
    return np.where(waits & (there[:, 0] >= 0) & (there[:, 0] != rank), source, -1)


def _loop(
    bounds: list[int], free: list[float], length: list[float], source: list[int], joined: list[bool], receiver: list[int],
    further: list[float], send_s: float,
) -> tuple[list[float], list[float], list[float]]:  # fmt: skip
    """Start, end, and arrival of what is sent, of every pass; ends below 0: it never came to it."""
    ranks, count = len(bounds) - 1, len(length)
    start, end, arrival = [0.0] * count, [-1.0] * count, [-1.0] * count
    at, link = bounds[:-1], [0.0] * ranks
    waiting = [False] * ranks
    ready = deque(range(ranks))
    while ready:
        r = ready.popleft()
        waiting[r] = False
        i, now, stop = at[r], free[r], bounds[r + 1]
        while i < stop:
            step = 2 if joined[i] else 1
            begin = now
            for j in range(i, i + step):
                if source[j] >= 0:
                    came = arrival[source[j]]
                    if came < 0.0:
                        break
                    if came > begin:
                        begin = came
            else:
                now = begin + length[i]
                for j in range(i, i + step):
                    start[j], end[j] = begin, now
                    to = receiver[j]
                    if to >= 0:
                        arrival[j] = link[r] = max(now + further[j], link[r] + send_s)
                        if waiting[to]:
                            waiting[to] = False
                            ready.append(to)
                i += step
                continue
            break
        at[r], free[r], waiting[r] = i, now, i < stop
    return start, end, arrival


def _deadlock(orders: Orders, bounds: Ints, end: Floats) -> ScheduleError:
    """The error for orders that wait for ever, with the step at which the first such rank stands."""
    step = int(np.argmax(end < 0.0))
    rank = int(np.searchsorted(bounds, step, side="right")) - 1
    row = orders.rows[rank][step - bounds[rank] :]
    return ScheduleError(f"rank {rank} waits for ever at {format_order(row[:8])}", hint="`check_orders` shows the schedule")
