"""Running a sweep: points are claimed in the database, solved by an engine, and recorded as they are completed.

The database decides what is left to do; any number of processes may run the same sweep at once. A run ends when every point is
done, whoever did it, and gives back what it holds when it is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moeplan._version import VERSION
from moeplan.errors import DeviceError
from moeplan.planner.sweeps.answer import Answer, problem_or_answer
from moeplan.planner.sweeps.engine import Engine
from moeplan.planner.sweeps.store import Counts, Row, Store
from moeplan.planner.sweeps.sweep import Point, Sweep

POLL_S = 0.5
"""Longest time between two looks at the database."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """How far a sweep is."""

    counts: Counts
    best: Row | None
    """The point of most tokens/s/GPU so far."""


def run(sweep: Sweep, store: Store, engine: Engine, report: Callable[[Stand], None], say: Callable[[str], None]) -> None:
    """Work until every point is done; `report` hears where it stands, `say` remarks."""
    best, look_at = best_of(store.rows(done=True)), 0.0
    points: dict[int, Point] = {}
    store.join()
    try:
        while True:
            claimed = store.claim(engine.room())
            for place, point in claimed:
                found = problem_or_answer(sweep, point, say)
                if isinstance(found, Answer):
                    store.record(place, found)
                else:
                    engine.submit(place, found)
                    points[place] = point
            if store.finished():
                return
            for place, outcome in engine.completed(POLL_S if engine.busy() or not claimed else 0.0):
                if isinstance(outcome, str):
                    store.died(place, outcome)
                elif store.record(place, _checked(outcome)):
                    row = Row(place=place, point=points.pop(place), answer=outcome)
                    best = best_of([row] if best is None else [best, row])
            store.beat()
            if (now := time.monotonic()) > look_at:
                report(Stand(counts=store.counts(), best=best))
                look_at = time.monotonic() + max(POLL_S, 20.0 * (time.monotonic() - now))  # to count millions takes a while
    finally:
        store.leave()


def best_of(rows: Iterable[Row]) -> Row | None:
    """The first row of most tokens/s/GPU; None where no point has a plan."""
    solved = [(row.answer.tokens_per_s_per_gpu, row) for row in rows if row.answer is not None and row.answer.layout]
    return max(solved, key=lambda found: found[0])[1] if solved else None


def _checked(answer: Answer) -> Answer:
    """Refuse what another version computed: rows of one table must be comparable."""
    if answer.moeplan != VERSION:
        raise DeviceError(f"a worker runs moeplan {answer.moeplan}, this is {VERSION}", hint="install the same on all machines")
    return answer
