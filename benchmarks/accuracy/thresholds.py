"""Thresholds: what every change must still meet, and beside it what is aimed at (`thresholds.yaml`); percent, or tau."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplan.errors import SchemaError, nearest_hint
from moeplan.records import from_mapping, load_yaml

FILE = Path(__file__).parent / "thresholds.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """Bounds on one figure."""

    figure: str
    """Name of the figure, as the study gives it."""
    at_least: float | None = None
    at_most: float | None = None
    goal: str
    """What is aimed at, as people write it."""

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise SchemaError(f"threshold on '{self.figure}' bounds nothing", hint="give at_least or at_most")

    def met(self, value: float) -> bool:
        """Whether a value lies within the bounds."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def demand(self) -> str:
        """The bounds in words."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        return f"at most {self.at_most:g}" if self.at_least is None else f"at least {self.at_least:g}"


def load_thresholds(path: Path = FILE) -> list[Threshold]:
    """All thresholds of a file."""
    data = load_yaml(path, "thresholds")
    return [from_mapping(Threshold, entry, f"{path.name}, entry {i + 1}") for i, entry in enumerate(data["thresholds"])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A threshold with the figure that it was held against."""

    threshold: Threshold
    value: float

    @property
    def met(self) -> bool:
        """Whether the figure lies within the bounds."""
        return self.threshold.met(self.value)


def checks(figures: Mapping[str, float], thresholds: Sequence[Threshold]) -> list[Check]:
    """Every threshold with its figure; refuses one on a figure that does not exist."""
    for threshold in thresholds:
        if threshold.figure not in figures:
            raise SchemaError(f"no figure '{threshold.figure}'", hint=nearest_hint(threshold.figure, figures))
    return [Check(threshold=t, value=figures[t.figure]) for t in thresholds]
