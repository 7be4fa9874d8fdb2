"""The fastest layout that surely fits, for where the fastest of all is on a cliff of its memory (`robustness.py`).

A search keeps one variant of each set of degrees, the fastest, and so passes over variants of it that need less memory and
hardly more time. The space is searched once more under a memory limit that leaves what the cliff asks for; whether what comes
out is preferred is for `ties.py` to say. Units: bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.robustness import Risk, risk, safe_limit_bytes
from moeplan.planner.search import Candidate, Search, search, search_again

KEPT = 5
"""Layouts under the limit that are looked at: under heavier routing some need more beyond it than the fastest of all does."""
NEAR = 0.01
"""Share of its time by which the fastest of all beats one on no cliff that is as good for all that is known."""


def safer(
    problem: Problem,
    best: Sequence[Candidate],
    progress: Callable[[int, int], None] | None = None,
    *,
    known: Search | None = None,
) -> list[Candidate]:
    """The fastest layout found that is on no cliff, where the first of `best` is on one and no other as good.

    `known`: a search of the problem, what it opened is looked at first.
    """
    its = _risk(problem, best[0]) if best else None
    if its is None or not its.cliff:
        return []
    if any(c.step_s <= best[0].step_s * (1.0 + NEAR) and not _risk(problem, c).cliff for c in best[1:]):
        return []
    device = problem.profile.cluster.device.memory_bytes
    limit = min(problem.device_bytes, safe_limit_bytes(device), device - max(its.excess_bytes, 0.0))
    if limit <= 0.0:
        return []
    within = dataclasses.replace(problem, memory_limit_bytes=limit)
    first = _first(problem, search_again(within, KEPT, known)) if known is not None else None
    if first is None:
        first = _first(problem, search(within, KEPT, progress).best)
    return [] if first is None or first.layout in [c.layout for c in best] else [first]


def _first(problem: Problem, found: Sequence[Candidate]) -> Candidate | None:
    """The first on no cliff."""
    return next((c for c in found if not _risk(problem, c).cliff), None)


def _risk(problem: Problem, candidate: Candidate) -> Risk:
    return risk(price_plan(problem, candidate.layout))
