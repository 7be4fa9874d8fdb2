"""What people see of a verification: results, times by task and by schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.render import console
from moeplan.planner.layers.comparison import ComparedRun, Comparison
from moeplan.planner.layers.setup import LayerSetup
from moeplan.records import plain
from moeplan.runtime.verify import TOLERANCE, Checked
from moeplan.units import format_seconds

KINDS = {
    "D": "dispatch", "G": "gather", "E": "experts", "A": "all-reduce", "S": "scatter", "C": "combine", "M": "tokens",
    "R": "gradients",
}  # fmt: skip
"""Tasks in words."""


def show(setup: LayerSetup, checks: Sequence[Checked], comparison: Comparison | None) -> None:
    """Print everything."""
    out = console()
    out.print(_title(setup))
    out.print()
    out.print(_checks(checks))
    if comparison is None:
        return
    for table in (_schedules(comparison), _runs(comparison)):
        out.print()
        out.print(table)
    out.print()
    out.print(_summary(comparison))


def data(setup: LayerSetup, checks: Sequence[Checked], comparison: Comparison | None) -> dict[str, Any]:
    """The same for machines."""
    return {
        "layer": {**plain(setup), "ranks": setup.ranks},
        "tolerance": TOLERANCE,
        "checks": [
            {"schedule": str(c.variant), "errors": dict(c.errors), "in_order": c.in_order, "right": c.right} for c in checks
        ],
        "comparison": None if comparison is None else plain(comparison),
    }


def _title(setup: LayerSetup) -> Text:
    what = f"{setup.experts} experts of {setup.hidden} x {setup.expert_hidden}, top-{setup.topk}, {setup.tokens} tokens a group"
    where = f"{setup.ranks} ranks: ep {setup.ep} x esp {setup.esp}, mp {setup.mp}"
    return Text(f"{what} on {where}" + (f", {setup.replicas} replicas" if setup.replicas > 1 else ""), style="bold")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")


def _checks(checks: Sequence[Checked]) -> Table:
    table = _table(f"results beside a dense layer in one process, fp32 (at most {TOLERANCE:g} is right)")
    table.add_column("schedule")
    for name in checks[0].errors:
        table.add_column(name, justify="right")
    table.add_column("order of tasks")
    table.add_column("")
    for each in checks:
        cells = [Text(f"{e:.1e}", style="" if e <= TOLERANCE else "bold red") for e in each.errors.values()]
        verdict = Text("right", style="green") if each.right else Text("wrong", style="bold red")
        table.add_row(str(each.variant), *cells, "as planned" if each.in_order else "another", verdict)
    return table


def _schedules(comparison: Comparison) -> Table:
    table = _table("schedules, both directions at their best chunks, quickest first")
    table.add_column("schedule")
    for name in ("chunks", "measured", "predicted", "ratio", "place measured", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in comparison.schedules:
        ratio = f"{s.predicted_s / s.measured_s:.2f}"
        places = (str(s.measured_place), str(s.predicted_place))
        chunks = f"{s.forward_degree}/{s.backward_degree}"
        table.add_row(s.name, chunks, format_seconds(s.measured_s), format_seconds(s.predicted_s), ratio, *places)
    return table


def _runs(comparison: Comparison) -> Table:
    kinds = [k for k in KINDS if any(run.tasks.get(k, (0.0, 0.0))[0] > 0.0 for run in comparison.runs)]
    table = _table("runs, and one task of each kind: measured, and predicted / measured")
    table.add_column("schedule")
    table.add_column("", no_wrap=True)
    table.add_column("all", justify="right", no_wrap=True)
    for kind in kinds:
        table.add_column(KINDS[kind], justify="right")
    for each in comparison.runs:
        run = each.run
        name = f"{run.schedule} {run.degree}" if run.degree > 1 else run.schedule
        cells = [_cell(*each.tasks[kind]) if kind in each.tasks else Text("") for kind in kinds]
        table.add_row(name, {"forward": "fwd", "backward": "bwd"}[run.direction], _whole(each), *cells)
    return table


def _whole(each: ComparedRun) -> Text:
    return _cell(each.predicted_s, each.run.measured_layer_s)


def _cell(predicted_s: float, measured_s: float) -> Text:
    if predicted_s == 0.0:
        return Text("-", style="dim")
    ratio = predicted_s / measured_s if measured_s > 0 else float("inf")
    near = 2 / 3 <= ratio <= 1.5
    return Text(format_seconds(measured_s)).append(f" {ratio:.2f}", style="dim" if near else "yellow")


def _summary(comparison: Comparison) -> Text:
    said = [f"predicted / measured: {comparison.median_ratio:.2f} in the median of {len(comparison.runs)} runs"]
    if comparison.correlation is not None:
        said.append(f"correlation of the logarithms {comparison.correlation:.2f}")
    if comparison.rank_correlation is not None:
        said.append(f"of the order of the schedules {comparison.rank_correlation:.2f}")
    return Text("; ".join(said))
