"""`moeplan simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import check_writable, json_option, print_json, progress_bar, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.costmodels.timeline import StepTimeline
    from moeplan.planner.plan import Plan

MOST_SLOW = 1000
"""Larger factors are taken for slips."""


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write a trace that Perfetto opens.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with timeline and memory curve.")
@click.option("--slow", multiple=True, metavar="STAGE=FACTOR", help="Passes of a pipeline stage take FACTOR times as long.")
@click.option(
    "--load-spread",
    type=float,
    default=0.0,
    metavar="S",
    help="Draw the loads of the expert ranks log-normal with this deviation, for every stage and micro-batch.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of the drawn loads.")
@json_option
def simulate(
    plan_file: Path,
    trace: Path | None,
    html: Path | None,
    slow: tuple[str, ...],
    load_spread: float,
    seed: int,
    as_json: bool,
) -> int:
    """Run one step of a plan as a timeline of all stages and micro-batches.

    \b
    Examples:
      moeplan simulate plan.yaml
      moeplan simulate plan.yaml --trace trace.json --html step.html
      moeplan simulate plan.yaml --slow 3=1.2 --load-spread 0.3 --seed 1

    The times are those of the plan, pass by pass; sends and unequal exchanges meet as they do. Open a trace at
    https://ui.perfetto.dev or chrome://tracing.
    """
    factors = _factors(slow)
    _check_outputs(plan_file, {"--trace": trace, "--html": html})
    from moeplan.costmodels.timeline import step_timeline
    from moeplan.planner.plan import load_plan

    plan = load_plan(plan_file)
    for text in plan.remarks:
        remark(text)
    _check_spread(plan, load_spread, seed)
    given = (plan.problem.model, plan.problem.profile, plan.problem.workload, plan.layout)
    timeline = step_timeline(*given, slow=factors, load_spread=load_spread, seed=seed)
    if trace is not None:
        from moeplan.costmodels.trace import step_trace

        written = step_trace(timeline, plan.problem.profile, plan.layout)
        with progress_bar("writing the trace") as report:
            written.save(trace, report)
        if written.remark:
            remark(written.remark)
    if html is not None:
        from moeplan.cli.timeline_page import timeline_page
        from moeplan.records import save_text

        save_text(html, timeline_page(plan, timeline), "page")
    if as_json:
        print_json(_data(plan, timeline))
        return 0
    from moeplan.cli.render import console
    from moeplan.cli.render_timeline import gantt, summary_lines

    out = console()
    colours = out.color_system is not None and not out.no_color and out.encoding.startswith("utf")
    for block in (*gantt(plan, timeline, out.width, colours=colours), *summary_lines(plan, timeline)):
        out.print(block)
    for path in (trace, html):
        if path is not None:
            remark(f"wrote {path}")
    return 0


def _factors(slow: tuple[str, ...]) -> dict[int, float]:
    """Factors by stage; refuses what is not STAGE=FACTOR and a stage named twice."""
    out: dict[int, float] = {}
    for text in slow:
        stage, _, factor = text.partition("=")
        try:
            rank, value = int(stage), float(factor)
        except ValueError:
            raise UsageError(f"--slow {text}: not a stage and a factor", hint="write it like --slow 3=1.2") from None
        if value > MOST_SLOW:
            raise UsageError(f"--slow {text}: stages up to {MOST_SLOW} times as slow are simulated", hint="write it like 3=1.2")
        if rank in out:
            raise UsageError(f"--slow {text}: stage {rank} is already {out[rank]:g} times as slow")
        out[rank] = value
    return out


def _check_outputs(plan_file: Path, files: dict[str, Path | None]) -> None:
    """Refuse files that cannot be written, and one that would be written over another."""
    seen = [(plan_file, "the plan")]
    for option, path in files.items():
        if path is None:
            continue
        for other, what in seen:
            if _same_file(path, other):
                raise UsageError(f"{option} {path} would overwrite {what}", hint="give another path")
        seen.append((path, f"what {option} writes"))
        check_writable(path, "trace" if option == "--trace" else "page")


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, through links too; devices and pipes hold nothing to overwrite."""
    try:
        if one.exists() and other.exists():
            return one.is_file() and one.samefile(other)
        return one.resolve() == other.resolve()
    except OSError:  # one of them cannot even be looked at: opening it says why
        return False


def _check_spread(plan: Plan, load_spread: float, seed: int) -> None:
    """Refuse a spread that has nothing to act on; remark one without effect."""
    if load_spread and plan.problem.model.moe is None:
        raise UsageError(f"--load-spread {load_spread:g}: {plan.problem.model.name} has no experts to load unevenly")
    if load_spread and plan.layout.ep == 1:
        remark("every rank holds all experts (ep=1), so that --load-spread changes nothing")
    if seed and not load_spread:
        remark("--seed changes nothing without --load-spread")


def _data(plan: Plan, timeline: StepTimeline) -> dict[str, Any]:
    """The simulated step as plain data."""
    peaks = timeline.peak_bytes
    return {
        "schedule": timeline.schedule,
        "micro_batches": timeline.batches,
        "passes": len(timeline.passes.rank),
        "step_s": timeline.step_s,
        "plan_step_s": timeline.priced_s,
        "difference": timeline.step_s / timeline.priced_s - 1.0,
        "bubble_share": timeline.bubble_share,
        "busiest_stage": timeline.busiest,
        "peak_bytes": float(peaks.max()),
        "plan_peak_bytes": plan.peak_bytes,
        "send_s": timeline.send_s,
        "stages": [
            {
                "rank": rank,
                "chunks": "|".join(plan.stages[rank].chunks),
                "slow": float(timeline.factors[rank]),
                "busy_s": float(timeline.busy_s[rank]),
                "waiting_s": float(timeline.idle_s[rank]),
                "parameter_gather_s": float(timeline.frame.gather_s[rank]),
                "gradient_reduction_s": float(timeline.frame.scatter_s[rank]),
                "optimizer_s": float(timeline.frame.optimizer_s[rank]),
                "peak_bytes": float(peaks[rank]),
                "plan_peak_bytes": float(plan.stages[rank].parts.total),
            }
            for rank in range(timeline.ranks)
        ],
    }
