"""`moeplan export`."""

from __future__ import annotations

from pathlib import Path

import click

from moeplan.cli.options import remark


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["megatron"]), default="megatron", show_default=True, help="Framework.")
@click.option("-d", "--directory", type=click.Path(path_type=Path), required=True, help="Directory to create.")
def export(plan_file: Path, target: str, directory: Path) -> int:
    """Write launch files for a plan.

    \b
    Example:
      moeplan export plan.yaml --to megatron -d launch

    The directory gets an argument file with the environment that it requires, a torchrun script, a Slurm batch script and a
    README of what was assumed. A plan that the framework cannot run is refused with the rule.
    """
    from moeplan.exporters import megatron
    from moeplan.planner.plan import load_plan
    from moeplan.units import format_bytes

    plan = load_plan(plan_file)
    for text in plan.remarks:
        remark(text)
    if plan.excess_bytes > 0:
        remark(f"the plan is predicted to exceed the device by {format_bytes(plan.excess_bytes)}")
    for path in megatron.export(plan, directory):
        click.echo(path)
    return 0
