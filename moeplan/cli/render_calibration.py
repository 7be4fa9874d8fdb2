"""What people see of a calibration: factors before and after, and errors."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from moeplan.planner.calibration import Calibration
from moeplan.planner.overlap_calibration import OverlapCalibration
from moeplan.units import format_seconds

NAMES = {
    "bf16": "sustained share of GEMM rates, bf16",
    "quantized": "sustained share of GEMM rates, quantised",
    "attention": "sustained share of the attention rate",
    "host": "host time per launch",
    "exposed": "exposed communication",
}
"""Factors in words."""
MOST_ROWS = 20
"""Runs that are shown one by one."""


def factors_table(result: Calibration) -> Table:
    """Every factor before and after, and how far the runs narrow it down."""
    kept = "" if result.accepted else " (not accepted)"
    table = Table(
        title=f"profile of {result.profile.cluster.name}", title_justify="left", box=None, pad_edge=False, header_style="dim"
    )
    table.add_column("factor")
    for name in ("before", f"after{kept}", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("the runs tell")
    for c in result.corrections:
        filled = round(10 * c.evidence)
        told = Text("█" * filled + "░" * (10 - filled), style="green" if filled >= 5 else "dim").append(f" {c.evidence:.0%}")
        table.add_row(NAMES[c.name], f"{c.before:.3f}", f"{c.after:.3f}", f"{c.after / c.before - 1:+.1%}", told)
    return table


def errors_table(result: Calibration) -> Table:
    """Errors of the table, then of its runs."""
    shown = result.rows[:MOST_ROWS]
    table = Table(
        title=f"{len(result.rows)} runs, {result.groups} layouts: predicted over measured",
        title_justify="left", box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    table.add_column("run", overflow="fold")
    for name in ("measured", "before", "after", "layout left out"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown:
        off = [_off(seconds, row.measured_s) for seconds in (row.before_s, row.after_s, row.left_out_s)]
        table.add_row(row.id, format_seconds(row.measured_s), *off)
    if len(shown) < len(result.rows):
        table.add_row(f"... and {len(result.rows) - len(shown)} more", *[""] * 4, style="dim")
    for name in ("median", "mean"):
        errors = [f"{getattr(e, name):.1%}" if e is not None else "-" for e in (result.before, result.after, result.left_out)]
        table.add_row(f"{name} error", "", *errors, style="bold")
    return table


def overlap_table(result: OverlapCalibration) -> Table:
    """Runs of layers with what is predicted for them, before and after."""
    kept = "" if result.accepted else " (not accepted)"
    table = Table(
        title=f"overlap that is lost: {result.before:.2f} before, {result.after:.2f} after{kept}",
        title_justify="left", box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for name in ("run", "schedule", "direction"):
        table.add_column(name, overflow="fold")
    for name in ("chunks", "measured", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows[:MOST_ROWS]:
        off = [_off(seconds, row.run.measured_layer_s) for seconds in (row.before_s, row.after_s)]
        run = row.run
        table.add_row(run.id, run.schedule, run.direction, str(run.degree), format_seconds(run.measured_layer_s), *off)
    if len(result.rows) > MOST_ROWS:
        table.add_row(f"... and {len(result.rows) - MOST_ROWS} more", *[""] * 6, style="dim")
    return table


def _off(seconds: float | None, measured_s: float) -> str:
    return "-" if seconds is None else f"{math.expm1(math.log(seconds / measured_s)):+.1%}"
