"""`moeplan solve`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from moeplan.cli import NO_PLAN_FITS
from moeplan.cli.options import (
    Count,
    check_writable,
    json_option,
    make_problem,
    print_json,
    problem_options,
    progress_bar,
)
from moeplan.errors import UsageError
from moeplan.units import format_bytes, format_count


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
@click.option("--top", type=Count(100), default=5, show_default=True, help="Plans to show, up to 100.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the best plan to this file.")
@json_option
def solve(
    objective: Any,
    target_step_time: str | None,
    target_tokens_per_s: float | None,
    pins: tuple[str, ...],
    forbidden: tuple[str, ...],
    top: int,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Find the best layouts of a model on a cluster.

    \b
    Example:
      moeplan solve --model deepseek-v3 --cluster h100x256 --global-batch 2048 --seq-len 4096 \\
                    --precision fp8-cs -o plan.yaml

    All degrees, micro-batch, virtual stages, dispatcher, overlap and recompute are searched; the answer comes with a count of
    everything that was passed over and why. Exit code 3: no plan fits.
    """
    from moeplan.planner.solve import solve as solve_problem
    from moeplan.units import parse_seconds

    if objective == "throughput" and not (target_step_time is None and target_tokens_per_s is None):
        raise UsageError("a target goes with --objective gpus or cost, not with throughput")
    if target_tokens_per_s is not None and not 0 < target_tokens_per_s < math.inf:
        raise UsageError(f"--target-tokens-per-s {target_tokens_per_s:g}: a number above 0 is needed")
    target_step_s = parse_seconds(target_step_time) if target_step_time is not None else math.inf
    if target_step_s <= 0:
        raise UsageError(f"--target-step-time {target_step_time}: a time above 0 is needed")
    if output is not None:
        check_writable(output, "plan file")
    problem = make_problem(**options, pins=pins, forbidden=forbidden)
    with progress_bar("solving") as progress:
        solution = solve_problem(
            problem,
            objective=objective,
            keep=top,
            target_step_s=target_step_s,
            target_tokens_per_s=target_tokens_per_s or 0.0,
            progress=progress,
        )
    if as_json:
        print_json(_data(solution))
    if not solution.plans:
        click.echo(f"no plan fits: {_why(problem, solution)}", err=True)
        return NO_PLAN_FITS
    best = solution.plans[0]
    if output is not None:
        best.save(output)
    if not as_json:
        from moeplan.cli.render import certificate_lines, console, memory_table, solution_table, time_bars

        out = console()
        out.print(solution_table(solution))
        out.print()
        out.print(time_bars(best.time))
        out.print()
        out.print(memory_table(best))
        out.print()
        assert best.certificate is not None
        for line in certificate_lines(
            solution.considered, solution.priced, solution.rejected, solution.seconds, best.certificate.gap
        ):
            out.print(line)
    if output is not None:
        click.echo(f"plan written to {output}; next: moeplan export {output} --to megatron -d launch", err=True)
    return 0


def _why(problem: Any, solution: Any) -> str:
    """Why nothing fits, in one sentence."""
    name, cluster = problem.model.name, problem.profile.cluster
    if solution.nearest_excess_bytes < float("inf") and not solution.counts:
        reason = f"the best layout of {name} misses the {format_bytes(problem.device_bytes)} of a {cluster.device.name} by "
        reason += format_bytes(max(solution.nearest_excess_bytes, 0.0))
        if solution.gpus_that_fit:
            return f"{reason}; {solution.gpus_that_fit} GPUs would do"
        return f"{reason}, and up to 64 times the {cluster.gpus} GPUs do not help (conditions or lower precision may)"
    if solution.counts:
        return f"no size from {solution.counts[0]} to {solution.counts[-1]} GPUs reaches the target"
    parts = [f"{reason} ({format_count(count)})" for reason, count in list(solution.rejected.items())[:4]]
    return f"every layout of {name} on {cluster.gpus} GPUs is refused: {', '.join(parts)}"


def _data(solution: Any) -> dict[str, Any]:
    return {
        "status": solution.status,
        "considered": solution.considered,
        "priced": solution.priced,
        "rejected": dict(solution.rejected),
        "seconds": round(solution.seconds, 3),
        "gpus_that_fit": solution.gpus_that_fit,
        "plans": [plan.to_data() for plan in solution.plans],
    }
