"""What stands beside a plan: a layout that somebody would have taken without a search, and why it lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moeplan.costmodels.layout import Layout
from moeplan.planner.plan_data import layout_data, read_layout
from moeplan.records import to_mapping
from moeplan.units import GIB

Verdict = Literal["the plan", "slower", "tie", "faster", "too large", "refused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A layout that is obvious, or published."""

    name: str
    """The rule by which it was chosen, or who published it."""
    verdict: Verdict
    """Against the plan; a tie is faster or slower by less than the noise."""
    why: str
    """What makes the difference, or why it cannot run."""
    layout: Layout | None = None
    """None where nothing fits."""
    step_s: float = 0.0
    peak_bytes: float = 0.0
    source: str = ""
    """Where a published one comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineRow:
    """A baseline in a plan file."""

    name: str
    verdict: Verdict
    why: str
    step_s: float = 0.0
    peak_gib: float = 0.0
    source: str = ""
    layout: Any = None


def baseline_data(b: Baseline) -> dict[str, Any]:
    """A baseline as plain data."""
    row = BaselineRow(
        name=b.name,
        verdict=b.verdict,
        why=b.why,
        step_s=round(b.step_s, 5),
        peak_gib=round(b.peak_bytes / GIB, 2),
        source=b.source,
        layout=None if b.layout is None else layout_data(b.layout),
    )
    return to_mapping(row)


def read_baseline(row: BaselineRow, where: str) -> Baseline:
    """The inverse."""
    return Baseline(
        name=row.name,
        verdict=row.verdict,
        why=row.why,
        layout=None if row.layout is None else read_layout(row.layout, where),
        step_s=row.step_s,
        peak_bytes=row.peak_gib * GIB,
        source=row.source,
    )
