"""`moeplan explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import json_option, print_json, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.planner.explain import Binding, Neighbour
    from moeplan.planner.gradient_windows import GradientWindows
    from moeplan.planner.plan import Plan
    from moeplan.planner.schedules import Alternative


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="OTHER", help="Compare with another plan.")
@click.option("--what-if", is_flag=True, help="Which constraint binds: change one at a time and solve again.")
@click.option(
    "--node-mtbf", metavar="TIME", help="For advice on checkpoints: time between failures of a node.  [default: 153.8d]"
)
@click.option(
    "--storage-bandwidth", metavar="SIZE", help="Likewise, bytes per second of the whole job, like 50GB.  [default: 1GB a node]"
)
@json_option
def explain(
    plan_file: Path, against: Path | None, what_if: bool, node_mtbf: str | None, storage_bandwidth: str | None, as_json: bool
) -> int:
    """Show what a plan's time and memory go to, and what its neighbours cost.

    \b
    Examples:
      moeplan explain plan.yaml
      moeplan explain plan.yaml --against other.yaml
      moeplan explain plan.yaml --what-if

    For each degree the next value up and down is shown at its best, or with the rule or the memory that forbids it. Checkpoint
    advice is the interval that keeps most work; a node fails every 153.8 days by default (Meta's RSC-1).
    """
    from moeplan.cli.elastic_options import overheads_of, rates_of
    from moeplan.cli.render import console
    from moeplan.cli.render_elastic import saving_data, saving_lines
    from moeplan.planner.elastic.saves import advised_saving
    from moeplan.planner.explain import bindings, neighbours
    from moeplan.planner.gradient_windows import gradient_windows
    from moeplan.planner.plan import load_plan
    from moeplan.planner.schedules import alternatives
    from moeplan.records import to_mapping

    if what_if and against is not None:
        raise UsageError("--what-if and --against answer two questions", hint="leave one of the two out")
    availability, overheads = rates_of(node_mtbf=node_mtbf), overheads_of(storage_bandwidth=storage_bandwidth)
    plan = load_plan(plan_file)
    other = load_plan(against) if against is not None else None
    for text in plan.remarks:
        remark(text)
    if other is not None:
        return _side_by_side(plan, other, as_json)
    if what_if:
        from moeplan.cli import render_what_if

        render_what_if.report(plan, as_json)
        return 0
    limits, around = bindings(plan), neighbours(plan)
    schedules = alternatives(plan.problem, plan.layout)
    windows = gradient_windows(plan.problem, plan.layout, plan.stage_s)
    saving = advised_saving(plan.problem, plan.layout, plan.step_s, availability, overheads)
    if as_json:
        data = _data(plan, limits, around, schedules) | {"gradients": to_mapping(windows) if windows else None}
        print_json(data | {"checkpoints": saving_data(saving, availability)})
    else:
        _show(plan, limits, around, schedules, windows)
        for line in saving_lines(saving, availability):
            console().print(line)
    return 0


def _show(
    plan: Plan,
    limits: list[Binding],
    around: list[Neighbour],
    schedules: list[Alternative],
    windows: GradientWindows | None,
) -> None:
    """Print everything about a plan."""
    from moeplan.cli.render import (
        bindings_table,
        certificate_lines,
        console,
        gradient_line,
        memory_table,
        neighbours_table,
        plan_summary,
        schedules_table,
        tie_lines,
        time_bars,
    )  # fmt: skip
    from moeplan.cli.render_robustness import robustness_lines, robustness_tables

    out = console()
    for line in plan_summary(plan):
        out.print(line)
    blocks = [time_bars(plan.time), memory_table(plan), bindings_table(limits), neighbours_table(plan, around)]
    blocks += robustness_tables(plan)
    if schedules:
        blocks.append(schedules_table(plan, schedules))
    for block in blocks:
        out.print()
        out.print(block)
    if windows is not None:
        out.print(gradient_line(windows, plan))
    if plan.certificate is not None:
        out.print()
        for line in certificate_lines(plan.certificate):
            out.print(line)
    for line in (*tie_lines(plan), *robustness_lines(plan)):
        out.print(line)


def _data(plan: Plan, limits: list[Binding], around: list[Neighbour], schedules: list[Alternative]) -> dict[str, Any]:
    """The plan as plain data, with what binds, what is one step away, and its MoE layers under every schedule."""
    from moeplan.cli.render_robustness import data as robustness_data

    data = plan.to_data() | {"robustness": robustness_data(plan)}
    data["binds"] = [{"what": b.what, "share": b.share, "detail": b.detail} for b in limits]
    data["neighbours"] = [
        {
            "field": n.field,
            "value": n.value,
            "verdict": n.verdict,
            "step_s": n.step_s or None,
            "reason": n.reason,
            "sigma": n.sigma or None,
            "tie": n.tie,
        }
        for n in around
    ]
    data["moe_schedules"] = [
        {
            "name": a.name,
            "runs_on": list(a.runs_on),
            "exposed_exchange_s": a.exposed_s,
            "step_s": a.step_s,
            "broken": a.broken,
            "chosen": a.chosen,
        }
        for a in schedules
    ]
    return data


def _side_by_side(plan: Plan, other: Plan, as_json: bool) -> int:
    """Two plans part by part, and whether their difference is more than noise."""
    from moeplan.planner.explain import difference
    from moeplan.planner.ties import compare
    from moeplan.records import to_mapping

    rows, found = difference(plan, other), compare(plan, other)
    if as_json:
        parts = [{"part": name, "this_s": a, "other_s": b} for name, a, b in rows]
        data = {"this_step_s": plan.step_s, "other_step_s": other.step_s, "parts": parts}
        print_json({**data, "comparison": to_mapping(found)})
        return 0
    from moeplan.cli.render import comparison_lines, console, difference_table

    out = console()
    out.print(difference_table(plan, other, rows))
    for line in comparison_lines(found):
        out.print(line)
    return 0
