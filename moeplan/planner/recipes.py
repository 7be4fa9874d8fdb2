"""Layouts that vendors publish with a model: `catalog/recipes.yaml`.

A recipe holds what its source gives and nothing that is assumed. It stands for a question with the same model, device and
sequence length; of several the one with the same precision counts, then the one with the nearest number of GPUs, then of batch.
On other GPUs and batches data parallelism alone changes, and what the recipe leaves open is chosen at its best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.planner.problem import Condition, Problem, parse_condition
from moeplan.records import from_mapping, load_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One published layout."""

    model: str
    """Catalog name."""
    device: str
    gpus: int
    global_batch: int
    """Sequences of a step."""
    seq_len: int
    precision: str
    vendor: str
    """What it was published with: a vendor's framework and release, or a paper of theirs."""
    source: str
    run: str
    """Row of the table of published runs that says how fast it was."""
    layout: Mapping[str, Any]
    """Fields of `Layout` that the source gives; `stages` is the only one that no condition can ask for."""

    @property
    def split(self) -> str:
        """Its split in layout letters; empty: the source gives none."""
        return str(self.layout.get("stages", ""))

    def conditions(self) -> tuple[Condition, ...]:
        """What it says of a layout, as pins."""
        return tuple(parse_condition(f"{name}={_text(value)}") for name, value in self.layout.items() if name != "stages")

    def differs_from(self, problem: Problem) -> str:
        """GPUs, batch and precision that it was published for, where a problem has others; empty: it has the same."""
        cluster, workload = problem.profile.cluster, problem.workload
        differs = {
            f"{self.gpus} GPUs": self.gpus != cluster.gpus,
            f"batch {self.global_batch}": self.global_batch != workload.global_batch,
            self.precision: self.precision != workload.precision.name,
        }
        return ", ".join(text for text, other in differs.items() if other)


@functools.cache
def recipes() -> tuple[Recipe, ...]:
    """All recipes of the catalog."""
    path = Path(__file__).parent / "catalog" / "recipes.yaml"
    return tuple(
        from_mapping(Recipe, row, f"{path.name}, entry {i + 1}") for i, row in enumerate(load_yaml(path, "catalog file"))
    )


def recipe_for(problem: Problem) -> Recipe | None:
    """The recipe that comes nearest to a problem, if there is one for its model, device and sequence length."""
    cluster, workload = problem.profile.cluster, problem.workload
    asked = problem.model.name, cluster.device.name, workload.seq_len
    found = [r for r in recipes() if (r.model, r.device, r.seq_len) == asked]
    return min(
        found,
        key=lambda r: (
            r.precision != workload.precision.name,
            abs(math.log(r.gpus / cluster.gpus)),
            abs(math.log(r.global_batch / workload.global_batch)),
        ),
        default=None,
    )


def _text(value: Any) -> str:
    """A value as a condition spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "+".join(value) or "none"
    return str(value)
