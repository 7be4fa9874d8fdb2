"""`moeplan export`."""

from __future__ import annotations

from pathlib import Path

import click

from moeplan.cli.options import remark
from moeplan.errors import UsageError

TARGETS = ("megatron", "megatron-bridge", "deepspeed", "torchtitan", "plan-json")
LAUNCHERS = ("torchrun", "rendezvous", "slurm", "trainjob", "pytorchjob", "job", "skypilot", "ray")


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(TARGETS), default="megatron", show_default=True, help="Framework.")
@click.option("--framework-version", "version", metavar="V", default="", help="Its version; default: the one the rules are of.")
@click.option(
    "--launcher",
    "launchers",
    type=click.Choice(LAUNCHERS),
    multiple=True,
    help="How to start it; several times for several. Default: torchrun and slurm.",
)
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Option of a launcher, or variable of the job.")
@click.option("--force", is_flag=True, help="Replace an older export.")
@click.option("-d", "--directory", type=click.Path(path_type=Path), required=True, help="Directory to create.")
def export(
    plan_file: Path,
    target: str,
    version: str,
    launchers: tuple[str, ...],
    settings: tuple[str, ...],
    force: bool,
    directory: Path,
) -> int:
    """Write launch files for a plan.

    \b
    Example:
      moeplan export plan.yaml --to megatron -d launch
      moeplan export plan.yaml -d launch --launcher trainjob \\
        --set image=registry.example/megatron:0.19 --set MEGATRON_LM=/opt/megatron

    The directory gets an argument file with the environment that it requires, launch files, a check of the nodes to run
    before the job (preflight.py), the plan as plan.json and a README of what was assumed. A plan that the framework cannot
    run is refused with the rule, and so is one that needs what the version lacks. All files are read back and compared
    with the plan before the directory appears. docs/export.md describes launchers and their options.
    """
    from moeplan.exporters import write
    from moeplan.exporters.targets import exporter
    from moeplan.planner.plan import load_plan
    from moeplan.units import format_bytes

    values = read_settings(settings)
    plan = load_plan(plan_file)
    for text in plan.remarks:
        remark(text)
    if plan.excess_bytes > 0:
        remark(f"the plan is predicted to exceed the device by {format_bytes(plan.excess_bytes)}")
    paths = write.export(
        plan,
        directory,
        exporter=exporter(target),
        version=version,
        launchers=launchers or None,
        settings=values,
        force=force,
    )
    for path in paths:
        click.echo(path)
    return 0


def read_settings(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE pairs; a name that stands twice with two values is a slip."""
    values: dict[str, str] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UsageError(f"--set '{text}' is not NAME=VALUE")
        if values.setdefault(name, value) != value:
            raise UsageError(f"--set {name} stands twice, with '{values[name]}' and '{value}'")
    return values
