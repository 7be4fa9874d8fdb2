"""What people see of baselines: one line each, what it is and why it lost."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from moeplan.planner.plan import Plan
from moeplan.units import format_seconds


def baselines_table(plan: Plan) -> Table:
    """The obvious layouts beside a plan."""
    table = Table(title="beside the obvious layouts", title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("layout", overflow="fold")
    table.add_column("degrees", overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    for b in plan.baselines:
        degrees = "" if b.layout is None else b.layout.degrees()
        step = format_seconds(b.step_s) if b.step_s else "-"
        share = f"{b.step_s / plan.step_s - 1:+.1%}" if b.step_s else ""
        if b.verdict == "the plan":
            why = Text("it is this plan")
        elif b.verdict in ("too large", "refused"):
            why = Text.assemble((b.verdict, "red"), f": {b.why}")
        else:
            said = f"{share}, tie" if b.verdict == "tie" else share
            most = b.why.split(", ")[0]  # the part that makes most of the difference
            why = Text.assemble((said, "green" if b.step_s < plan.step_s else ""), f": {most}" if most else "")
        table.add_row(b.name, degrees, step, why)
    return table
