"""The levels of a problem's space, each filtered before the next one spreads it out; see `space.py`.

Conditions of the user and rules of the framework are settled at the first level whose fields say whether they hold. Every
layout that a level passes over is counted by the first reason met, a row standing for all layouts below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import least_state_bytes
from moeplan.planner import space
from moeplan.planner.bounds import least_step_seconds
from moeplan.planner.constraints import RULES, Level
from moeplan.planner.problem import Problem

MEMORY, SLOWER, COPY, EXCLUDED = "memory", "slower", "same-split", "excluded"
"""Reasons for passing over a layout that are not rules of the framework; "memory": too large as it is, see `relief.py`."""
DEGREES = ("tp", "cp", "pp", "dp", "ep", "etp", "edp")
FIELDS: Mapping[Level, tuple[str, ...]] = {
    "degrees": (*DEGREES, "sharding", "sequence_parallel", "dp_overlap", "cuda_graphs", "optimizer_offload"),
    "chunks": ("vpp",),
    "batch": ("micro_batch",),
    "features": ("dispatcher", "ep_overlap", "shared_overlap", "tp_overlap"),
    "recompute": ("recompute", "recompute_layers"),
}
"""Fields that are settled at each level."""


class Levels:
    """The levels of one problem; `reject` is told how many layouts are passed over for what reason."""

    def __init__(self, problem: Problem, reject: Callable[[str, int], None] = lambda reason, count: None) -> None:
        self.problem, self.reject = problem, reject
        self.chunks = space.chunk_options(problem)
        self.micro_batches = space.batch_options(problem)
        self.features = space.feature_options(problem)
        self.sets: Any = np.asarray(space.recompute_sets(problem), np.int64)
        self.per_batch = len(self.sets) * len(next(iter(self.features.values())))
        self.per_chunk = self.per_batch * len(self.micro_batches["micro_batch"])
        self.per_group = self.per_chunk * len(self.chunks["vpp"])
        """Layouts that degrees stand for, and so on."""

    def groups(self) -> tuple[Layouts, Layouts, int]:
        """Degrees that the framework accepts: those whose parameters alone fit, the others, and the degrees of the space."""
        grid = space.degree_grid(self.problem)
        groups = self._accepted(grid, "degrees", self.per_group)
        fits = self.state_excess_bytes(groups) <= 0
        return self._drop(groups, fits, MEMORY, self.per_group), groups.take(~fits), len(grid)

    def bounds(self, groups: Layouts) -> Any:
        """Seconds that no layout of the given degrees can beat, [n]."""
        return least_step_seconds(self.problem, groups, self.micro_batches["micro_batch"])

    def spread(self, groups: Layouts, limit_s: float) -> Layouts:
        """Layouts of the given degrees, without recompute, that the framework accepts; bounds leave the others no chance."""
        # 1. virtual stages and splits, then micro-batches
        rows = space.cross(groups, self.chunks)
        rows = self._drop(rows, rows.pp * rows.vpp <= len(self.problem.model.layers) + 2, "pipeline-chunks", self.per_chunk)
        before = len(rows)
        rows = space.with_balanced_splits(self.problem, rows)
        self.reject(COPY, (before - len(rows)) * self.per_chunk)
        rows = self._accepted(rows, "chunks", self.per_chunk)
        rows = self._accepted(space.cross(rows, self.micro_batches), "batch", self.per_batch)
        if np.isfinite(limit_s):
            rows = self._drop(rows, least_step_seconds(self.problem, rows) < limit_s, SLOWER, self.per_batch)
        # 2. features
        rows = space.with_shared_overlap(self.problem, space.cross(rows, self.features))
        return self._accepted(rows, "features", len(self.sets))

    def with_sets(self, rows: Layouts) -> Layouts:
        """Each row with every set of recomputed modules, [n * sets]."""
        return space.with_shared_overlap(self.problem, space.cross(rows, {"recompute": self.sets.tolist()}))

    def accepts_recompute(self, rows: Layouts, weight: int = 1) -> Any:
        """Whether conditions and the framework accept what rows recompute, [n]; each stands for `weight` layouts."""
        return self._accepts(rows, "recompute", weight)

    def state_excess_bytes(self, groups: Layouts) -> Any:
        """By how much what parameters alone need exceeds the device, [n]; negative: they fit."""
        problem = self.problem
        return problem.excess_bytes(least_state_bytes(problem.model, problem.profile.cluster.device, problem.workload, groups))

    def _accepted(self, rows: Layouts, level: Level, weight: int) -> Layouts:
        """Rows that conditions and rules of the level let pass; each stands for `weight` layouts."""
        kept = self._accepts(rows, level, weight)
        return rows if kept.all() else rows.take(kept)

    def _accepts(self, rows: Layouts, level: Level, weight: int) -> Any:
        """Whether no condition or rule of the level forbids a row, [n]; the first reason met is counted."""
        kept = self.problem.allows(rows, FIELDS[level])
        self.reject(EXCLUDED, int((~kept).sum()) * weight)
        for rule in RULES:
            if rule.level == level:
                broken = kept & rule.broken(self.problem, rows)
                self.reject(rule.name, int(broken.sum()) * weight)
                kept = kept & ~broken
        return kept

    def _drop(self, rows: Layouts, kept: Any, reason: str, weight: int) -> Layouts:
        self.reject(reason, int(len(rows) - kept.sum()) * weight)
        return rows.take(kept)


def open_rows(problem: Problem, limit_s: float) -> Layouts:
    """The layouts of pipelines that bounds leave below `limit_s`, without recompute."""
    levels = Levels(problem)
    groups = levels.groups()[0]
    groups = groups.take((groups.pp > 1) & (levels.bounds(groups) < limit_s))
    return levels.spread(groups, limit_s)


def once_each(rows: Layouts) -> Layouts:
    """Pipelines once each, whatever their split."""
    return rows.distinct(*DEGREES, "vpp", "micro_batch", *FIELDS["features"], "schedule")[0]


def with_recompute(problem: Problem, rows: Layouts) -> tuple[Layouts, Any]:
    """Each layout with every set of recomputed modules that the framework accepts, and its place among `rows`."""
    levels = Levels(problem)
    spread = levels.with_sets(rows)
    accepted = levels.accepts_recompute(spread)
    return spread.take(accepted), np.repeat(np.arange(len(rows)), len(levels.sets))[accepted]
