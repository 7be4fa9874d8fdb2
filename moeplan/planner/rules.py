"""Rules: named conditions that a layout must not meet.

Each gives for many layouts at once whether it is broken, and for one layout why. A rule belongs to the level whose fields it
reads, so that a search can apply it before it spreads out further fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import Model
from moeplan.planner.problem import Problem

Level = Literal["degrees", "chunks", "batch", "features", "recompute"]
LEVELS: tuple[Level, ...] = ("degrees", "chunks", "batch", "features", "recompute")
"""Levels in the order in which a search settles fields; a rule reads fields of its level and of earlier ones only."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of one layout."""

    rule: str
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.hint})" if self.hint else self.reason


@dataclass(frozen=True, slots=True)
class Rule:
    """A named condition that a layout must not meet."""

    name: str
    level: Level
    demands: str
    """What it asks for, in one line; the documentation prints these."""
    broken: Callable[[Problem, Layouts], Any]
    """Whether each layout breaks it, [n]."""
    reason: Callable[[Problem, Layout], str]
    """Why one layout breaks it, with the numbers."""
    hint: str = ""
    """What to try."""


def blocks(model: Model, *kinds: type) -> list[Any]:
    """The distinct blocks of the given kinds."""
    return [b for b in model.blocks if isinstance(b, kinds)]


def any_of(conditions: Iterable[Any], layouts: Layouts) -> Any:
    """Whether each layout meets one of `conditions`, [n]."""
    out = np.zeros(len(layouts), np.bool_)
    for condition in conditions:
        out = out | condition
    return out
