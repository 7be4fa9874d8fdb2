"""What people see of robustness: the plan under heavier routing, its risk of running out of memory, its regret."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.render_baselines import baselines_table
from moeplan.planner.plan import Plan
from moeplan.planner.robustness import RISKY, SAYS, Stress, plan_risk, regret, stresses
from moeplan.records import to_mapping
from moeplan.units import GIB, format_seconds


def risk_text(plan: Plan) -> Text:
    """The probability that a plan runs out of memory, marked where it is on a cliff."""
    risk = plan_risk(plan)
    return Text(f"{risk:.0%}" if risk >= SAYS else "", style="red" if risk > RISKY else "")


def says_something(plans: Sequence[Plan]) -> bool:
    """Whether a column of these probabilities is worth its place."""
    return any(plan_risk(p) >= SAYS for p in plans)


def data(plan: Plan) -> dict[str, Any]:
    """All of it for machines."""
    return {
        "out_of_memory": plan_risk(plan),
        "regret": regret(plan),
        "routing": [to_mapping(s) for s in stresses(plan)],
    }


def robustness_tables(plan: Plan) -> list[Table]:
    """What is beside a plan, where it was solved, and what it does under other routing, where there is any."""
    found = stresses(plan)
    tables = [baselines_table(plan)] if plan.baselines else []
    return tables + ([stress_table(plan, found)] if len(found) > 1 else [])


def stress_table(plan: Plan, found: Sequence[Stress]) -> Table:
    """The plan under balanced and heavier routing."""
    table = Table(title="under other routing", title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("routing", no_wrap=True)
    for name in ("fullest rank: load", "kept", "step", "against this plan", "peak GiB", "OOM risk"):
        table.add_column(name, justify="right")
    for s in found:
        table.add_row(
            s.routing,
            f"{s.load:.2f}",
            f"{s.kept:.2f}",
            format_seconds(s.step_s),
            f"{s.step_s / plan.step_s - 1:+.1%}",
            f"{s.peak_bytes / GIB:.1f}",
            Text(f"{s.out_of_memory:.1%}", style="red" if s.out_of_memory > RISKY else ""),
        )
    return table


def robustness_lines(plan: Plan) -> Iterable[Text]:
    """Risk and regret of a plan in a line."""
    risk = plan_risk(plan)
    lost = (
        f"; expected loss against the best of the {len(plan.runners_up) + 1} plans {regret(plan):.1%}"
        if plan.runners_up
        else ""
    )
    yield Text(f"probability of running out of memory {risk:.1%}{lost}", style="yellow" if risk > RISKY else "")
