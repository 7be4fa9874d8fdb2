"""`moeplan solve`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import click

from moeplan.cli import NO_PLAN_FITS
from moeplan.cli.no_plan import why
from moeplan.cli.options import (
    Count,
    Share,
    check_writable,
    json_option,
    make_problem,
    print_json,
    problem_options,
    progress_bar,
    remark,
)
from moeplan.errors import UsageError


@click.command()
@problem_options
@click.option(
    "--objective", type=click.Choice(["throughput", "gpus", "cost"]), default="throughput", show_default=True,
    help="Fastest step; fewest GPUs that reach a target; least cost per 10^12 tokens.",
)  # fmt: skip
@click.option("--target-step-time", metavar="TIME", help="Step time to reach, like 20s.")
@click.option("--target-tokens-per-s", type=float, metavar="N", help="Tokens per second of the whole job to reach.")
@click.option(
    "--pin", "pins", multiple=True, metavar="COND", help="Keep only layouts that meet it: tp=2, 'pp<=8', recompute=none."
)
@click.option("--forbid", "forbidden", multiple=True, metavar="COND", help="Leave out layouts that meet it: 'ep>8'.")
@click.option(
    "--improve", type=click.Path(path_type=Path), metavar="PLAN",
    help="Say what to change in this plan (of `moeplan import`), in place of a question of your own.",
)  # fmt: skip
@click.option(
    "--refine/--no-refine", default=None,
    help="Look at further splits of layers over the stages than even and balanced ones.  [default: refine]",
)  # fmt: skip
@click.option(
    "--gap", type=Share(), metavar="SHARE", help="Prove by MILP that splits that are not level are no faster by 0.005 or 0.5%."
)
@click.option("--time-limit", metavar="TIME", help="Look no further for splits after this, like 30s.")
@click.option("--jobs", type=Count(256), default=1, show_default=True, help="With --gap: processes that prove.")
@click.option("--pareto", is_flag=True, help="Show the plans that no other beats in step time, GPUs and free memory at once.")
@click.option("--top", type=Count(100), default=5, show_default=True, help="Plans to show, up to 100.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the best plan to this file.")
@json_option
def solve(
    objective: Any,
    target_step_time: str | None,
    target_tokens_per_s: float | None,
    pins: tuple[str, ...],
    forbidden: tuple[str, ...],
    improve: Path | None,
    refine: bool | None,
    gap: float | None,
    time_limit: str | None,
    jobs: int,
    pareto: bool,
    top: int,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Find the best layouts of a model on a cluster.

    \b
    Examples:
      moeplan solve --model deepseek-v3 --cluster h100x256 --global-batch 2048 --seq-len 4096 \\
                    --precision fp8-cs -o plan.yaml
      moeplan solve --improve imported.yaml -o better.yaml

    All degrees, micro-batch, virtual stages, dispatcher, overlap and recompute are searched; the answer comes with a count of
    everything that was passed over and why. Plans that tie differ by less than the noise of their difference; of those that tie
    with the fastest, the most robust comes first. Exit code 3: no plan fits.
    """
    if output is not None:
        check_writable(output, "plan file")
    if pareto:
        _check_pareto(objective, improve, refine)
    if improve is not None:
        return _improve(improve, output, as_json=as_json)
    target = _target(objective, target_step_time, target_tokens_per_s)
    splits = _splits(refine, gap, time_limit, jobs, objective)
    problem = make_problem(**options, pins=pins, forbidden=forbidden)
    from moeplan.planner.solve import solve as solve_problem

    with progress_bar("solving") as progress:
        solution = solve_problem(problem, objective=objective, keep=top, progress=progress, splits=splits, **target)
    solution = _beside_baselines(solution)
    if output is not None and solution.plans:
        solution.plans[0].save(output)
    reason = None if solution.plans else why(problem, solution, bool(target))
    if pareto and solution.plans:
        _show_front(problem, as_json)
    elif as_json:
        print_json(_data(solution) | (reason.data() if reason else {}))
    elif solution.plans:
        _show(solution)
    if reason:
        click.echo(f"no plan fits: {reason.sentence}", err=True)
        return NO_PLAN_FITS
    if output is not None:
        click.echo(f"plan written to {output}; next: moeplan export {output} --to megatron -d launch", err=True)
    return 0


def _beside_baselines(solution: Any) -> Any:
    """The solution, its best plan with the obvious layouts beside it."""
    from moeplan.planner.baselines import with_baselines

    if not solution.plans:
        return solution
    return dataclasses.replace(solution, plans=(with_baselines(solution.plans[0]), *solution.plans[1:]))


def _check_pareto(objective: str, improve: Path | None, refine: bool | None) -> None:
    """Refuse what `--pareto` leaves no room for."""
    other = "--improve" if improve is not None else "--refine" if refine else f"--objective {objective}"
    if other != "--objective throughput":
        hint = "it weighs step time, GPUs, money and memory at once; leave one of the two out"
        raise UsageError(f"--pareto does not go with {other}", hint=hint)


def _improve(plan_file: Path, output: Path | None, *, as_json: bool) -> int:
    """Edits of a plan, and the best plan of its question."""
    from moeplan.cli import render_improve
    from moeplan.planner.improve import improve
    from moeplan.planner.plan import load_plan
    from moeplan.planner.solve import solve as solve_problem

    context = click.get_current_context()
    given = {p.name: p.opts[0] for p in context.command.params if _typed(context, p)}
    for name in ("improve", "output", "as_json"):
        given.pop(name, None)
    if given:
        names = ", ".join(given.values())
        raise UsageError(
            f"--improve takes the question from the plan, not from {names}", hint="leave it out, or edit the plan file"
        )
    plan = load_plan(plan_file)
    for text in plan.remarks:
        remark(text)
    with progress_bar("solving") as progress:
        solution = solve_problem(plan.problem, keep=1, progress=progress)
    if not solution.plans:
        click.echo(f"no plan fits: {why(plan.problem, solution, False).sentence}", err=True)
        return NO_PLAN_FITS
    found = improve(plan, solution.plans[0])
    if output is not None:
        (found.path[-1].after if found.path else plan).save(output)
    if as_json:
        print_json(render_improve.data(found))
    else:
        render_improve.show(found)
    if output is not None:
        click.echo(f"plan written to {output}; next: moeplan export {output} --to megatron -d launch", err=True)
    return 0


def _typed(context: click.Context, parameter: click.Parameter) -> bool:
    """Whether an option was given by the user."""
    assert parameter.name is not None
    return context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE


def _target(objective: str, step_time: str | None, tokens_per_s: float | None) -> dict[str, Any]:
    """What is to be reached, as arguments of `solve`; empty where nothing is."""
    from moeplan.units import parse_seconds

    if objective == "throughput" and not (step_time is None and tokens_per_s is None):
        raise UsageError("a target goes with --objective gpus or cost, not with throughput")
    target: dict[str, Any] = {}
    if step_time is not None:
        target["target_step_s"] = parse_seconds(step_time)
        if target["target_step_s"] <= 0:
            raise UsageError(f"--target-step-time {step_time}: a time above 0 is needed")
    if tokens_per_s is not None:
        target["target_tokens_per_s"] = tokens_per_s
        if not 0 < tokens_per_s < math.inf:
            raise UsageError(f"--target-tokens-per-s {tokens_per_s:g}: a number above 0 is needed")
    return target


def _splits(refine: bool | None, gap: float | None, time_limit: str | None, jobs: int, objective: str) -> Any:
    """How far splits are looked at; None: no further than the search does."""
    from moeplan.planner.solve import Splits
    from moeplan.units import parse_seconds

    given = [n for n, v in (("--gap", gap), ("--time-limit", time_limit), ("--jobs", jobs > 1 or None)) if v is not None]
    if objective != "throughput":
        if given or refine:
            name = "--refine" if refine else given[0]
            hint = "solve for the GPUs that it finds, then refine"
            raise UsageError(f"{name} does not go with --objective {objective}", hint=hint)
        return None
    if refine is False:
        if given:
            raise UsageError(f"{given[0]} does not go with --no-refine", hint="the search without it always ends with gap 0")
        return None
    limit_s = math.inf if time_limit is None else parse_seconds(time_limit)
    if limit_s <= 0.0:
        raise UsageError(f"--time-limit {time_limit}: a time above 0 is needed")
    return Splits(gap=1.0 if gap is None else gap, time_limit_s=limit_s, jobs=jobs)


def _show(solution: Any) -> None:
    """The best plans as a table, the time and memory of the first, and what was passed over."""
    from moeplan.cli.render import certificate_lines, console, memory_table, solution_table, tie_lines, time_bars
    from moeplan.cli.render_baselines import baselines_table

    best = solution.plans[0]
    out = console()
    for part in (solution_table(solution), baselines_table(best), time_bars(best.time), memory_table(best)):
        out.print(part)
        out.print()
    assert best.certificate is not None
    for line in certificate_lines(best.certificate):
        out.print(line)
    for line in tie_lines(best):
        out.print(line)
    for text in best.remarks:
        remark(text)


def _show_front(problem: Any, as_json: bool) -> None:
    from moeplan.cli import render_pareto

    render_pareto.report(problem, as_json)


def _data(solution: Any) -> dict[str, Any]:
    from moeplan.cli.render_robustness import data as robustness_data

    return {
        "status": solution.status,
        "considered": solution.considered,
        "priced": solution.priced,
        "rejected": dict(solution.rejected),
        "seconds": round(solution.seconds, 3),
        "gpus_that_fit": solution.gpus_that_fit,
        "tied": list(solution.tied),
        "plans": [plan.to_data() for plan in solution.plans],
        "robustness": [robustness_data(plan) for plan in solution.plans],
    }
