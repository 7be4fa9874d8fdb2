"""`moeplan estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.options import (
    COUNT,
    check_writable,
    json_option,
    make_problem,
    print_json,
    problem_options,
    progress_bar,
    remark,
)
from moeplan.errors import LayoutError, UsageError

_LAYOUT = [
    click.option("--tp", type=COUNT, default=1, show_default=True, help="Tensor-parallel size."),
    click.option("--cp", type=COUNT, default=1, show_default=True, help="Context-parallel size."),
    click.option("--pp", type=COUNT, default=1, show_default=True, help="Pipeline stages."),
    click.option("--vpp", type=COUNT, default=1, show_default=True, help="Virtual stages per pipeline rank."),
    click.option("--ep", type=COUNT, default=1, show_default=True, help="Expert-parallel size."),
    click.option("--etp", type=COUNT, default=1, show_default=True, help="Tensor-parallel size of experts."),
    click.option("--micro-batch", type=COUNT, default=1, show_default=True, help="Sequences of a micro-batch."),
    click.option("--sharding", type=click.Choice(["ddp", "optimizer", "fsdp"]), default="optimizer", show_default=True),
    click.option("--recompute", default="none", show_default=True, help="Modules joined by +, or full, or none."),
    click.option("--recompute-layers", default="", metavar="TEXT",
                 help="Layers of every chunk that do so: 2; with --target research also '4*8|0*24'. [default: all]"),
    click.option("--dispatcher", type=click.Choice(["allgather", "alltoall", "deepep", "hybridep"]), default="alltoall",
                 show_default=True),
    click.option("--ep-overlap", is_flag=True, help="Hide expert all-to-all behind another micro-batch."),
    click.option("--shared-overlap", is_flag=True, help="Run shared experts beside dispatch and combine."),
    click.option("--moe-schedule", default="", metavar="TEXT", help="'fsmoe 2/4', s1, best; needs --target research."),
    click.option("--tp-overlap", is_flag=True, help="Overlap tensor-parallel exchange with its GEMMs."),
    click.option("--no-dp-overlap", is_flag=True, help="Do not overlap gradient reduction and parameter gather."),
    click.option("--cuda-graphs", default="none", show_default=True, help="Scopes joined by +, full_iteration, or none."),
    click.option("--optimizer-offload", type=float, default=0.0, show_default=True, help="Share of optimizer states on host."),
    click.option("--stages", default="", help="Pipeline split, like 'Et*3|(tt|)*29m|L', or balanced; default: even."),
]  # fmt: skip


def _layout_options(function: Any) -> Any:
    for option in reversed(_LAYOUT):
        function = option(function)
    return function


@click.command()
@click.argument("plan_file", required=False, metavar="[PLAN]", type=click.Path(path_type=Path))
@problem_options
@_layout_options
@click.option("--runs", type=click.Path(path_type=Path), metavar="FILE.csv", help="Price a table of training runs instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the table, or the plan, to this file.")
@json_option
def estimate(plan_file: Path | None, runs: Path | None, output: Path | None, as_json: bool, **options: Any) -> int:
    """Price a given layout, or a table of training runs.

    \b
    Examples:
      moeplan estimate plan.yaml
      moeplan estimate --model mixtral-8x7b --cluster h100x64 --global-batch 256 --seq-len 4096 \\
                       --tp 2 --pp 2 --ep 8 --micro-batch 1
      moeplan estimate --runs runs.csv -o predicted.csv
      moeplan estimate --runs runs.csv --profile ours.yaml -o predicted.csv

    The layout comes from a plan file or from options; data parallelism takes the GPUs that the other degrees leave. A table has
    the columns listed in docs/runs.md; each row becomes ok, partial (with the defaults that were used) or unsupported (with the
    reason).
    """
    ctx = click.get_current_context()
    given = [n for n in options if ctx.get_parameter_source(n) == click.core.ParameterSource.COMMANDLINE]
    if runs is not None and plan_file is None:
        given = [n for n in given if n != "profile_file"]
    if runs is not None or plan_file is not None:
        if runs is not None and plan_file is not None:
            raise UsageError("give a plan file or --runs, not both")
        if given:
            what = "--runs" if runs is not None else "a plan file"
            names = ", ".join("--" + n.removesuffix("_ref").removesuffix("_file").replace("_", "-") for n in given)
            raise UsageError(f"{what} states the whole question; {names} would be ignored")
    if output is not None:
        check_writable(output, "plan file" if runs is None else "table of predictions")
    if runs is not None:
        if output is not None and output.exists() and runs.exists() and output.samefile(runs):
            raise UsageError(f"-o {output} is the run table itself, which would be lost", hint="choose another file")
        return _table(runs, options["profile_file"], output, as_json)
    if plan_file is not None:
        from moeplan.planner.plan import load_plan

        plan = load_plan(plan_file)
        for text in plan.remarks:
            remark(text)
    else:
        plan = _from_options(options, dispatcher_given="dispatcher" in given)
        for text in plan.remarks[len(plan.problem.model.remarks) :]:
            remark(text)
    if output is not None:
        plan.save(output)
    if as_json:
        print_json(plan.to_data())
        return 0
    from moeplan.cli.render import console, memory_table, plan_summary, time_bars

    out = console()
    for line in plan_summary(plan):
        out.print(line)
    out.print()
    out.print(time_bars(plan.time))
    out.print()
    out.print(memory_table(plan))
    return 0


def _from_options(options: dict[str, Any], *, dispatcher_given: bool) -> Any:
    from moeplan.costmodels.layout import Layout
    from moeplan.costmodels.stages import balanced_split
    from moeplan.planner.plan import check_layout, price_plan

    names = [p.name for p in estimate.params if isinstance(p, click.Option)]
    layout_names = {"tp", "cp", "pp", "vpp", "ep", "etp", "micro_batch", "sharding", "recompute", "recompute_layers",
                    "dispatcher", "ep_overlap", "shared_overlap", "moe_schedule", "tp_overlap", "no_dp_overlap", "cuda_graphs",
                    "optimizer_offload", "stages"}  # fmt: skip
    chosen = {n: options[n] for n in names if n in layout_names}
    problem = make_problem(**{n: v for n, v in options.items() if n not in layout_names})
    if dispatcher_given and problem.model.moe is None:
        raise UsageError(f"--dispatcher {chosen['dispatcher']}: {problem.model.name} has no experts to dispatch to")
    gpus = problem.profile.cluster.gpus
    tp, cp, pp, ep, etp = (chosen[n] for n in ("tp", "cp", "pp", "ep", "etp"))
    for text, ways in ((f"tp*cp*pp = {tp}*{cp}*{pp}", tp * cp * pp), (f"etp*ep*pp = {etp}*{ep}*{pp}", etp * ep * pp)):
        if gpus % ways:
            raise LayoutError(f"{text} = {ways} does not divide the {gpus} GPUs of {problem.profile.cluster.name}")
    stages = chosen["stages"]
    if stages == "balanced":
        stages = balanced_split(problem.model, problem.workload.seq_len, pp * chosen["vpp"])
    layout = Layout(
        tp=tp, cp=cp, pp=pp, vpp=chosen["vpp"], dp=gpus // (tp * cp * pp), ep=ep, etp=etp, edp=gpus // (etp * ep * pp),
        micro_batch=chosen["micro_batch"],
        sequence_parallel=tp > 1,
        sharding=chosen["sharding"],
        recompute=_names(chosen["recompute"]),
        recompute_layers=chosen["recompute_layers"],
        dispatcher=chosen["dispatcher"] if problem.model.moe is not None else "none",
        ep_overlap=chosen["ep_overlap"],
        shared_overlap=chosen["shared_overlap"],
        moe_schedule=chosen["moe_schedule"],
        tp_overlap=chosen["tp_overlap"],
        dp_overlap=not chosen["no_dp_overlap"],
        cuda_graphs=_names(chosen["cuda_graphs"]),
        optimizer_offload=chosen["optimizer_offload"],
        stages=stages,
    )  # fmt: skip
    check_layout(problem, layout)
    return price_plan(problem, layout, remarks=problem.model.remarks)


def _names(text: str) -> tuple[str, ...]:
    return () if text in ("none", "") else tuple(text.split("+"))


def _table(runs: Path, profile_file: Path | None, output: Path | None, as_json: bool) -> int:
    from moeplan.planner.estimate import price_runs, profile_for_runs, read_table, table_text
    from moeplan.profiles.profile_file import load_profile
    from moeplan.records import save_text

    profile_for = None if profile_file is None else profile_for_runs(load_profile(profile_file))
    rows = read_table(runs)
    with progress_bar("pricing runs") as progress:
        priced = price_runs(rows, progress, profile_for)
    if output is not None:
        save_text(output, table_text(priced), "table of predictions")
        counts = {s: sum(p.status == s for p in priced) for s in ("ok", "partial", "unsupported")}
        click.echo(
            f"{len(priced)} rows: " + ", ".join(f"{n} {s}" for s, n in counts.items()) + f"; written to {output}", err=True
        )
    if as_json:
        print_json([p.row() for p in priced])
    elif output is None:
        click.echo(table_text(priced), nl=False)
    return 0
