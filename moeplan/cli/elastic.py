"""`moeplan elastic`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.elastic_options import availability_options, overhead_options, overheads_of, rates_of
from moeplan.cli.export import read_settings
from moeplan.cli.options import Count, json_option, print_json, progress_bar, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.planner.elastic.solve_elastic import Wish

CLASSES = ("bitwise", "order", "batch", "none")
LAUNCHERS = ("torchrun", "slurm", "pytorchjob", "torchft")


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--nodes", required=True, metavar="COUNTS", help="Node counts to plan for: 12..16, 12..16:2 or 8,12,16.")
@click.option(
    "--consistency", type=click.Choice(CLASSES), default="order", show_default=True,
    help="What stays the same between counts: every bit (only pp changes), the mathematics, the samples of a step, nothing.",
)  # fmt: skip
@availability_options
@overhead_options
@click.option("--save-interval", metavar="TIME", help="Time between checkpoints.  [default: what keeps most work]")
@click.option("--blocking-saves", is_flag=True, help="Training waits until checkpoints are written.")
@click.option("--local-saves", is_flag=True, help="Nodes keep checkpoints too: only dp may change, needs --job-mtbf.")
@click.option("--templates", type=Count(), metavar="Z", help="Most different layouts.  [default: no limit]")
@click.option(
    "--survive", type=Count(), metavar="F", help="Failures of nodes at once that lose no state, by optimizer replicas; --live."
)
@click.option("--trace", type=click.Path(path_type=Path), metavar="CSV", help="Recorded history (time_s,nodes) to replay.")
@click.option(
    "--stay",
    metavar="TIME",
    help="Mean time for which further nodes are free: is it worth to grow?  [default: that of --trace]",
)
@click.option("--also", type=click.Path(path_type=Path), multiple=True, metavar="PLAN", help="A further plan to choose among.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write launch files into this directory.")
@click.option(
    "--launcher", "launchers", type=click.Choice(LAUNCHERS), multiple=True,
    help="How to start it; several times for several. Default: torchrun and slurm.",
)  # fmt: skip
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Option of a launcher, or variable of the job.")
@click.option("--force", is_flag=True, help="Replace an older export.")
@json_option
def elastic(
    plan_file: Path,
    output: Path | None,
    launchers: tuple[str, ...],
    settings: tuple[str, ...],
    force: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Plan for every node count, with what moving between them costs.

    \b
    Examples:
      moeplan elastic plan.yaml --nodes 12..16
      moeplan elastic plan.yaml --nodes 12..16 --consistency bitwise --node-mtbf 20d --repair 6h -o launch
      moeplan elastic plan.yaml --nodes 8,12,16 --trace availability.csv

    Layouts of all counts are chosen together for the most samples in the long run: failures, repairs, moves and checkpoints
    counted. With --trace its own rates are used, unless --node-mtbf or --repair give others, and the history is replayed for
    this plan, a rigid job and one with spares.
    """
    from moeplan.cli import render_elastic
    from moeplan.planner.elastic.solve_elastic import plan_elastic, replayed
    from moeplan.planner.plan import load_plan

    if output is None and (launchers or settings or force):
        raise UsageError("--launcher, --set and --force say how files are written", hint="give --output too")
    wish = _wish(**options)
    plan = load_plan(plan_file)
    for text in plan.remarks:
        remark(text)
    with progress_bar("searching layouts") as progress:
        found = plan_elastic(plan, wish, progress)
    for text in found.plan.remarks:
        remark(text)
    replays = () if wish.trace is None else replayed(found, wish.trace)
    if output is not None:
        from moeplan.exporters.elastic import write_elastic

        given = read_settings(settings)
        write_elastic(found.plan, output, launchers=launchers or None, settings=given, force=force)
        click.echo(f"launch files written to {output}; start with its README.md", err=True)
    if as_json:
        print_json(render_elastic.data(found.plan, replays))
    else:
        render_elastic.show(found.plan, replays)
    return 0


def _wish(
    *,
    nodes: str,
    consistency: Any,
    save_interval: str | None,
    blocking_saves: bool,
    local_saves: bool,
    templates: int | None,
    survive: int | None,
    trace: Path | None,
    stay: str | None,
    also: tuple[Path, ...],
    live: bool,
    storage_bandwidth: str | None,
    **times: str | None,
) -> Wish:
    """What the options ask for."""
    from moeplan.planner.elastic.availability import load_trace
    from moeplan.planner.elastic.counts import parse_nodes
    from moeplan.planner.elastic.solve_elastic import Wish
    from moeplan.planner.plan import load_plan
    from moeplan.units import parse_seconds

    if local_saves and times["job_mtbf"] is None:
        hint = "give --job-mtbf, or leave --local-saves out"
        raise UsageError("--local-saves helps only where the job fails and its nodes stay", hint=hint)
    if local_saves and blocking_saves:
        raise UsageError("--local-saves and --blocking-saves exclude each other", hint="leave one of the two out")
    if save_interval is not None and parse_seconds(save_interval) <= 0.0:
        raise UsageError(f"--save-interval {save_interval}: a time above 0 is needed")
    if stay is not None and parse_seconds(stay) <= 0.0:
        raise UsageError(f"--stay {stay}: a time above 0 is needed")
    costs = {name: times.pop(name) for name in ("detect", "group", "warm")}
    rates = rates_of(**times)
    own = trace is not None and times["node_mtbf"] is None and times["repair"] is None
    return Wish(
        counts=parse_nodes(nodes),
        consistency=consistency,
        availability=None if own else rates,
        job_rate=rates.job_rate,
        notice_s=rates.notice_s,
        trace=None if trace is None else load_trace(trace),
        overheads=overheads_of(storage_bandwidth=storage_bandwidth, live=live or bool(survive), **costs),
        also=tuple(load_plan(path) for path in also),
        templates=templates or 0,
        survive=survive or 0,
        interval_s=0.0 if save_interval is None else parse_seconds(save_interval),
        blocking=blocking_saves,
        local_saves=local_saves,
        stay_s=0.0 if stay is None else parse_seconds(stay),
    )
