"""The question that a published run answered: its model, cluster and workload, with what the search does not vary as published.

Two rows ask the same question if everything but the layout is the same; fields that no search varies (`space.NOT_SEARCHED`)
belong to the question and are pinned where the published run differs from what every search takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.accuracy.rows import Result, device_bytes, results
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import MoeplanError
from moeplan.planner.estimate import profile_of
from moeplan.planner.problem import Condition, Problem
from moeplan.planner.runs import group_key
from moeplan.planner.space import NOT_SEARCHED

NAMED = ("num_gpus", "gbs")
"""Cells that a row must have to ask a question."""
FEATURES = ("dispatcher", "ep_overlap")
"""Software that a plan may use and a published run did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a published run answered."""

    problem: Problem
    key: tuple[Any, ...]
    """Equal for equal questions."""

    @property
    def pinned(self) -> tuple[str, ...]:
        """Conditions, as texts."""
        return tuple(c.text for c in self.problem.pins)


def rows_of_experts(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Rows of models with experts, or of unknown ones, whose GPUs and global batch are known."""
    return [row for row in rows if all(row.get(name) for name in NAMED) and _may_have_experts(row["model"])]


def _may_have_experts(name: str) -> bool:
    try:
        return load_model(name).moe is not None
    except MoeplanError:
        return True


def priced(rows: Sequence[Mapping[str, str]]) -> tuple[list[Result], list[Result]]:
    """Rows of models with experts with their published layouts priced, and those that cannot be."""
    known = results(rows_of_experts(rows))
    return [r for r in known if r.priced.run is not None], [r for r in known if r.priced.run is None]


def question(result: Result) -> Question:
    """The question of a row."""
    run = result.run
    bare = Problem(model=run.model, profile=profile_of(run.cluster), workload=run.workload, extend_positions=True)
    named = device_bytes(result, bare.device_bytes)
    limit = named if named < bare.device_bytes else 0.0
    pins = tuple(_condition(run.layout, name) for name in NOT_SEARCHED if not _usual(run.layout, name))
    problem = replace(bare, memory_limit_bytes=limit, pins=pins)
    return Question(problem=problem, key=(group_key(run), limit, tuple(c.text for c in pins)))


def with_features(asked: Question, layout: Layout) -> Question:
    """The same question with the published dispatcher and overlap."""
    more = tuple(_condition(layout, name) for name in FEATURES)
    problem = replace(asked.problem, pins=(*asked.problem.pins, *more))
    return Question(problem=problem, key=(*asked.key, tuple(c.text for c in more)))


def _usual(layout: Layout, name: str) -> bool:
    """Whether a field has the value of every search."""
    usual = Layout(sequence_parallel=layout.tp > 1)
    return bool(getattr(layout, name) == getattr(usual, name))


def _condition(layout: Layout, name: str) -> Condition:
    """The pin of a field to its value in a layout."""
    value = getattr(layout, name)
    shown = "+".join(value) or "none" if isinstance(value, tuple) else str(value).lower()
    return Condition(name, "=", getattr(Layouts.of([layout]), name)[0].item(), f"{name}={shown}")
