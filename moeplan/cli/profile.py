"""`moeplan profile`, with the commands `show` and `import` below it."""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import check_writable, json_option, print_json, remark
from moeplan.errors import DeviceError, MoeplanError, UsageError
from moeplan.units import format_seconds, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from moeplan.profiles.cases import Case
    from moeplan.profiles.samples import Environment, SampleLog
    from moeplan.profiles.session import Outcome
    from moeplan.profiles.world import World

COMMANDS = {
    "show": ("show", "Show the curves of a profile beside its samples."),
    "import": ("import_", "Make a profile from the measurements of others."),
}
"""Commands below `profile`: the name in `moeplan.cli.profile_<command>`, and the line that the overview shows."""


class _Group(click.Group):
    """Measures by itself; its commands are imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"moeplan.cli.profile_{cmd_name}")
        command: click.Command = getattr(module, COMMANDS[cmd_name][0])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As usual, but of several ranks only one complains."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if _rank():
                ctx.exit(error.exit_code)
            raise


@click.group(cls=_Group, invoke_without_command=True, subcommand_metavar="[COMMAND ...]")
@click.option(
    "--model", "models", metavar="MODEL", multiple=True, help="Also measure the shapes of this model; may be given repeatedly."
)
@click.option("--cluster", "cluster_ref", metavar="CLUSTER", help="What this machine is, where it is not found by itself.")
@click.option("--budget", default="3m", show_default=True, metavar="TIME", help="When to end at the latest, like 90s.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--only", type=click.Choice(["kernels", "collectives"]), help="Measure one kind alone.")
@click.option("--largest", metavar="SIZE", help="Largest message of a collective; default: 512MiB, on CPUs 16MiB.")
@click.option("--resume", is_flag=True, help="Go on with the samples beside the profile: measure only what they lack.")
@click.option("--timeout", default="2m", show_default=True, metavar="TIME", help="How long ranks wait for one another.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the profile to this file, its samples beside it.")
@json_option
@click.pass_context
def profile(ctx: click.Context, /, **options: Any) -> int:
    """Measure the devices and links of this machine.

    \b
    Examples:
      moeplan profile --model deepseek-v3 -o profile.yaml
      torchrun --nproc-per-node 8 -m moeplan profile -o profile.yaml
      srun --ntasks-per-node 8 --gpus-per-node 8 moeplan profile --budget 10m -o profile.yaml
      moeplan solve --profile profile.yaml --model deepseek-v3 --global-batch 2048 --seq-len 4096 -o plan.yaml

    One process measures kernels; several, one a GPU, collectives as well, within and across nodes. What has been measured is
    kept when the budget ends, at Ctrl-C and when a rank dies: --resume goes on. Needs torch. docs/profile.md tells more.
    """
    if ctx.invoked_subcommand is not None:
        given = [p for p in ctx.params if ctx.get_parameter_source(p) is not click.core.ParameterSource.DEFAULT]
        if given:
            names = {p.name: p.opts[0] for p in ctx.command.params}
            raise UsageError(f"{names[given[0]]} has no meaning before '{ctx.invoked_subcommand}'")
        return 0
    try:
        question = _Question(**options)
    except MoeplanError as error:
        if _rank():
            return error.exit_code
        raise
    from moeplan.profiles.world import ToldElsewhere, join

    try:
        world = join(options["device"], question.timeout_s)
        return _profile(world, question)
    except ToldElsewhere as error:
        return error.exit_code


def _rank() -> int:
    from moeplan.profiles.ranks import this_rank

    return this_rank(os.environ).rank


class _Question:
    """The options, checked as far as they can be without a device."""

    def __init__(
        self,
        *,
        models: tuple[str, ...],
        cluster_ref: str | None,
        budget: str,
        device: str,
        only: str | None,
        largest: str | None,
        resume: bool,
        timeout: str,
        output: Path | None,
        as_json: bool,
    ) -> None:
        from moeplan.profiles.ranks import this_rank

        if output is None:
            raise UsageError("-o FILE is needed: where the profile goes", hint="moeplan profile -o profile.yaml")
        self.models, self.cluster, self.only, self.resume, self.as_json = models, cluster_ref or "", only, resume, as_json
        self.output = output
        self.budget_s, self.timeout_s = (
            _above_zero(name, text) for name, text in (("--budget", budget), ("--timeout", timeout))
        )
        self.largest_bytes = parse_bytes(largest) if largest is not None else 0.0
        if only == "collectives" and this_rank(os.environ).ranks == 1:
            raise UsageError("--only collectives: there is one rank", hint="torchrun --nproc-per-node 8 -m moeplan profile ...")


def _above_zero(option: str, text: str) -> float:
    seconds = parse_seconds(text)
    if seconds <= 0:
        raise UsageError(f"{option} {text} leaves no time", hint="write it like 90s or 3m")
    return seconds


class _Work:
    """What rank 0 keeps of a run."""

    environment: Environment
    log: SampleLog
    resumed = 0


def _profile(world: World, question: _Question) -> int:
    """Measure on all ranks, then write the profile on rank 0."""
    from moeplan.profiles.session import case_of, measure

    work = _Work()
    try:
        plan = world.first("preparations", lambda: _prepared(world, question, work))
        cases = [case_of(data) for data in plan["cases"]]
        with _Bar(world.rank == 0) as progress:
            outcome = measure(
                world,
                cases,
                work.log if world.rank == 0 else None,
                budget_s=question.budget_s,
                per_domain=plan["per_domain"],
                progress=progress,
            )
    finally:
        world.leave()
    if world.rank == 0:
        _finish(question, work, outcome)
    if outcome.failure is not None:
        raise outcome.failure
    return 130 if outcome.ended == "interrupted" else 0


def _prepared(world: World, question: _Question, work: _Work) -> dict[str, Any]:
    """Look at files and devices, choose the cases; on rank 0."""
    from dataclasses import replace

    from moeplan.costmodels.model_catalog import load_model
    from moeplan.costmodels.shapes import model_shapes
    from moeplan.profiles.cases import collective_cases, kernel_cases
    from moeplan.profiles.detect import detected_cluster
    from moeplan.profiles.samples import SampleLog, load_samples, samples_path
    from moeplan.profiles.session import check_same, done_cases, identity, plain_case
    from moeplan.profiles.world import environment_of

    check_writable(question.output, "profile")
    check_writable(path := samples_path(question.output), "samples")
    shapes = [model_shapes(load_model(ref)) for ref in question.models]
    environment, done = environment_of(world, question.cluster), frozenset[tuple[Any, ...]]()
    resumes = question.resume and path.exists()
    if resumes:
        before, samples = load_samples(path)
        check_same(before, replace(environment, cluster=question.cluster or before.cluster), f"samples '{path}'")
        environment, done, work.resumed = before, done_cases(samples), len(samples)
    elif question.resume:
        remark(f"there are no samples '{path}' to go on with: everything is measured")
    cluster = detected_cluster(environment)
    per_domain = min(cluster.domain_gpus, world.ranks)
    cases: list[Case] = []
    if question.only != "collectives":
        cases += kernel_cases(shapes, world.device.type, environment.memory_bytes)
    if question.only != "kernels" and world.ranks > 1:
        cases += collective_cases(world.ranks, per_domain, world.device.type, question.largest_bytes)
    work.environment, work.log = environment, SampleLog(path, environment, resume=resumes)
    return {"cases": [plain_case(c) for c in cases if identity(c) not in done], "per_domain": per_domain}


def _finish(question: _Question, work: _Work, outcome: Outcome) -> None:
    """Write the profile and say what was measured."""
    from moeplan.profiles.measured import measured_profile
    from moeplan.profiles.samples import load_samples
    from moeplan.records import sha256_of

    path, written = work.log.path, False
    skipped = Counter(reason for _, reason in outcome.skipped)
    remarks = [*outcome.remarks, *(f"skipped: {reason}" for reason in skipped)]
    if work.environment.ranks == 1 and question.only is None:
        remarks.append("one rank: no collectives were measured; torchrun --nproc-per-node N -m moeplan profile measures them")
    for text in remarks:
        remark(text)
    try:
        samples = load_samples(path)[1]
        made = measured_profile(samples, work.environment, samples_sha256=sha256_of(path, "samples"), remarks=remarks)
        made.save(question.output)
        written = True
    except MoeplanError as error:
        if outcome.ended == "complete":
            if question.only and isinstance(error, DeviceError):
                error.hint = f"the samples are kept: --resume without --only {question.only} measures the rest"
            raise
        remark(f"no profile was written: {error}")
    _report(question, work, outcome, written)


def _report(question: _Question, work: _Work, outcome: Outcome, written: bool) -> None:
    worst = max(outcome.samples, key=lambda s: s.spread, default=None)
    if question.as_json:
        print_json(
            {
                "profile": str(question.output) if written else None,
                "samples": str(work.log.path),
                "ended": outcome.ended,
                "measured": len(outcome.samples),
                "resumed": work.resumed,
                "left": outcome.left,
                "skipped": [{"op": c.op, "key": c.key, "group": c.group, "reason": why} for c, why in outcome.skipped],
                "worst_spread": worst.spread if worst is not None else None,
                "seconds": outcome.seconds,
                "remarks": list(outcome.remarks),
            }
        )
    else:
        parts = [f"{len(outcome.samples)} samples in {format_seconds(outcome.seconds)}"]
        if work.resumed:
            parts.append(f"{work.resumed} from before")
        if outcome.skipped:
            parts.append(f"{len(outcome.skipped)} cases skipped")
        if worst is not None:
            name = " ".join(filter(None, (worst.op, worst.key, worst.group)))
            parts.append(f"widest spread {worst.spread:.0%} ({name})")
        click.echo(", ".join(parts))
    if outcome.left:
        why = {"budget": "the budget is over", "interrupted": "stopped", "failed": "a rank failed"}[outcome.ended]
        remark(f"{why}: {outcome.left} cases were not measured; the same command with --resume goes on")
    if written:
        click.echo(f"profile written to {question.output}; use it with --profile {question.output}", err=True)


class _Bar:
    """A progress bar on stderr with the time left; drawn between cases, not beside them."""

    def __init__(self, speaks: bool) -> None:
        import sys

        self.enabled = speaks and sys.stderr.isatty()
        self.started = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Any:
        return self.report if self.enabled else None

    def report(self, done: int, total: int, left_s: float) -> None:
        """Show `done` of `total` cases and the seconds left."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if time.monotonic() - self.started < 1.0:
            return
        if self.bar is None:
            columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
            self.bar.add_task("", total=total)
            self.bar.start()
        minutes, seconds = divmod(round(left_s), 60)
        self.bar.update(0, completed=done, total=total, description=f"{minutes}:{seconds:02d} left", refresh=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
