"""The front of step time against GPUs, money and free memory.

A plan is dominated if another takes no longer, no more GPUs and leaves no less device memory free. Money is in proportion to
GPUs x step time, so that it dominates nothing that these do not. Two curves of the front are found, every point by a search of
its own that proves it, within a constraint:

    at most so many GPUs      the fastest plan, for every count that `solve.gpu_counts` looks at
    at most so much memory    the fastest plan on the GPUs of the fastest of all, with the limit each time below the last peak
                              until nothing fits or the step takes `SLOWEST` times as long

Units: seconds, bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeplan.costmodels.memory import reserve_bytes
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.search import search
from moeplan.planner.solve import Progress, cost_per_trillion_tokens, gpu_counts, resized
from moeplan.units import GIB

LESS_BYTES, LESS_SHARE = float(GIB), 0.02
"""By how much the next peak must lie below the last one: a size, and a share of it, whichever is larger."""
SLOWEST = 1.5
"""Step time over that of the fastest plan up to which memory is traded for time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One plan of the front, the fastest within its constraint."""

    plan: Plan
    """On its GPUs, with all the memory of the problem."""
    limit_bytes: float
    """Device memory that its search was left; all that the problem has where GPUs are what is saved."""

    @property
    def gpus(self) -> int:
        """GPUs that it runs on."""
        return self.plan.layout.world

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step."""
        return self.plan.step_s

    @property
    def free_bytes(self) -> float:
        """Device memory that it leaves, beside what must stay free."""
        return -self.plan.excess_bytes

    @property
    def cost(self) -> float:
        """Money for 10^12 tokens; 0 where no price is known."""
        return cost_per_trillion_tokens(self.plan.problem, self.gpus, self.step_s)

    def dominates(self, other: Point) -> bool:
        """Whether it is no worse in anything and better in something."""
        mine, its = ((p.step_s, p.gpus, -p.free_bytes) for p in (self, other))
        return mine != its and all(a <= b for a, b in zip(mine, its, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """Plans of which none is better than another in everything."""

    points: tuple[Point, ...]
    """Fewest GPUs first, on equal GPUs the fastest first."""
    counts: tuple[int, ...]
    """GPU counts that were looked at."""
    considered: int
    """Layouts of all spaces that were searched."""
    searches: int

    @property
    def by_gpus(self) -> tuple[Point, ...]:
        """The fastest of each GPU count."""
        return tuple({p.gpus: p for p in reversed(self.points)}.values())[::-1]

    @property
    def by_memory(self) -> tuple[Point, ...]:
        """Those on the GPUs of the fastest plan, the fastest first."""
        return tuple(p for p in self.points if p.gpus == self.points[-1].gpus)

    @property
    def cheapest(self) -> Point:
        """The point of least GPU time a step, which is that of least money."""
        return min(self.points, key=lambda p: p.gpus * p.step_s)


def front(problem: Problem, progress: Progress | None = None) -> Front:
    """The front of a problem; without points where nothing fits at any count of GPUs."""
    counts, seen = gpu_counts(problem), _Seen()
    total = len(counts) + 1
    points: list[Point] = []
    for place, gpus in enumerate(counts):
        sized = resized(problem, gpus)
        found = seen.fastest(sized, sized.device_bytes, points[-1].step_s if points else np.inf)
        points += [] if found is None else [found]
        if progress is not None:
            progress(place + 1, total)
    if points:
        points += _less_memory(seen, points[-1])
    if progress is not None:
        progress(total, total)
    kept = [p for p in points if not any(other.dominates(p) for other in points)]
    return Front(
        points=tuple(sorted(kept, key=lambda p: (p.gpus, p.step_s))),
        counts=tuple(counts),
        considered=seen.considered,
        searches=seen.searches,
    )


def _less_memory(seen: _Seen, fastest: Point) -> Iterator[Point]:
    """The fastest plans on the GPUs of `fastest` that need less and less memory."""
    point: Point | None = fastest
    while point is not None:
        peak = point.plan.peak_bytes
        peak -= max(LESS_BYTES, LESS_SHARE * peak)
        if peak <= 0:
            return
        point = seen.fastest(fastest.plan.problem, peak + float(reserve_bytes(peak)), SLOWEST * fastest.step_s)
        if point is not None:
            yield point


@dataclass(slots=True)
class _Seen:
    """What the searches of a front have looked at."""

    considered: int = 0
    searches: int = 0

    def fastest(self, problem: Problem, limit_bytes: float, limit_s: float) -> Point | None:
        """The fastest plan below a step time within some device memory; None if there is none."""
        found = search(dataclasses.replace(problem, memory_limit_bytes=limit_bytes), 1, limit_s=limit_s)
        self.searches += 1
        self.considered += found.considered
        if not found.best:
            return None
        plan = price_plan(problem, found.best[0].layout, remarks=problem.model.remarks)
        return Point(plan=plan, limit_bytes=limit_bytes)
