"""`moeplan tune`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli import NO_PLAN_FITS
from moeplan.cli.options import Count, check_writable, json_option, print_json, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.planner.plan import Plan
    from moeplan.runtime.launch import Launcher
    from moeplan.runtime.logs import LogForm
    from moeplan.runtime.tune import Tuned

POLL_S = {"local": 1.0, "slurm": 10.0}
"""Time between two looks at a trial."""


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--launch", required=True, metavar="COMMAND",
    help="Command of a trial, with {dir} or {plan}, and perhaps {gpus} and {trial}; with --launcher slurm an sbatch command.",
)  # fmt: skip
@click.option("--launcher", type=click.Choice(["local", "slurm"]), default="local", show_default=True, help="Where trials run.")
@click.option("--to", "target", type=click.Choice(["megatron", "none"]), default="megatron", show_default=True,
              help="Launch files beside the plan.yaml of a trial.")  # fmt: skip
@click.option("--trials", type=Count(1000), default=8, show_default=True, help="Most trials that are started.")
@click.option("--top", type=Count(100), default=16, show_default=True, help="Plans that are candidates.")
@click.option("--steps", type=Count(10_000), default=10, show_default=True, help="Steps that are measured in a trial.")
@click.option("--warmup", type=click.IntRange(0, 10_000), default=3, show_default=True, help="Steps before these.")
@click.option("--timeout", default="20m", show_default=True, metavar="TIME", help="Longest time that a trial may run.")
@click.option("--stall", default="10m", show_default=True, metavar="TIME", help="Longest time without a new line in its log.")
@click.option("--threshold", default="1%", show_default=True, metavar="SHARE",
              help="Expected gain below which no further plan is tried.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["megatron", "deepspeed"]), help="Who writes the log.  [default: megatron]")
@click.option("--regex", multiple=True, metavar="REGEX",
              help="Own log format: groups (?P<step_ms>..) or (?P<step_s>..), and (?P<memory_gib>..). Repeatable.")  # fmt: skip
@click.option("--poll", metavar="TIME", help="Time between two looks at a trial.  [default: 1s, with Slurm 10s]")
@click.option("--journal", "journal_file", type=click.Path(path_type=Path), metavar="FILE.sqlite",
              help="Journal of the trials, gone on with if it exists.  [default: journal.sqlite in the directory]")  # fmt: skip
@click.option("-d", "--directory", type=click.Path(path_type=Path), help="Directory of the trials.  [default: PLAN.tune]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan that wins to this file.")
@json_option
def tune(
    plan_file: Path, launch: str, launcher: str, target: str, log_format: str | None, regex: tuple[str, ...], poll: str | None,
    journal_file: Path | None, directory: Path | None, output: Path | None, as_json: bool, **numbers: Any,
) -> int:  # fmt: skip
    """Try the best plans for real, and keep the fastest.

    \b
    Examples:
      moeplan tune plan.yaml --launch "bash {dir}/run_torchrun.sh" -o winner.yaml
      moeplan tune plan.yaml --launcher slurm --launch "sbatch -p gpu {dir}/run_slurm.sbatch" -o winner.yaml

    Candidates are the plan and the best others of its problem. Each trial gets a directory with its plan.yaml and launch files;
    step time and peak memory are read from its log, and it is stopped when enough steps are done. Out of memory, hangs and
    crashes are results too: they rule out plans that would end alike. After each trial what is expected of the others is
    computed anew, and the tune ends when none promises to gain the threshold. It goes on from its journal if it is stopped.
    """
    from moeplan.runtime.launch import parse_template

    template = parse_template(launch, launcher)
    form = _form(log_format, regex)
    settings = _settings(launcher, poll, **numbers)
    for path, what in ((output, "plan file"), (journal_file, "journal")):
        if path is not None:
            check_writable(path, what)
            if path.exists() and plan_file.exists() and path.samefile(plan_file):
                raise UsageError(
                    f"the {what} '{path}' is the plan that is tuned, which would be lost", hint="choose another file"
                )
    from moeplan.planner.plan import load_plan
    from moeplan.runtime.tune import tune as tuned_by

    plan = load_plan(plan_file)
    for text in plan.remarks:
        remark(text)
    where = directory or plan_file.with_suffix(".tune")
    with _ended_by_signals(), _voices() as (say, report):
        tuned = tuned_by(
            plan,
            template=template,
            launcher=_launcher(launcher, settings.poll_s),
            form=form,
            settings=settings,
            directory=where,
            journal_file=journal_file or where / "journal.sqlite",
            write=_writer(target),
            say=say,
            report=report,
        )
    return _show(tuned, output, as_json)


def _show(tuned: Tuned, output: Path | None, as_json: bool) -> int:
    """Print what a tune found and write the winner; the exit code."""
    from moeplan.runtime.winner import winner_data

    data = winner_data(tuned)
    if output is not None and data is not None:
        from moeplan.records import dump_yaml, save_text

        save_text(output, dump_yaml(data), "plan file")
    if as_json:
        print_json(_data(tuned, data))
    else:
        from moeplan.cli.render import console
        from moeplan.cli.render_tune import trials_table, verdict_lines

        out = console()
        out.print(trials_table(tuned))
        out.print()
        for line in verdict_lines(tuned):
            out.print(line)
    if data is None:
        kinds = {e.outcome.kind for e in tuned.entries if e.outcome is not None}
        click.echo("no plan ran; no winner is written" if output is not None else "no plan ran", err=True)
        return NO_PLAN_FITS if kinds == {"out_of_memory"} else 1
    if output is not None:
        click.echo(f"winner written to {output}; next: moeplan export {output} --to megatron -d launch", err=True)
    return 0


def _form(log_format: str | None, regex: tuple[str, ...]) -> LogForm:
    from moeplan.runtime.logs import FORMS, custom_form

    if regex and log_format is not None:
        raise UsageError(f"--regex takes the place of --log-format {log_format}; give one of them")
    return custom_form(regex) if regex else FORMS[log_format or "megatron"]


def _settings(launcher: str, poll: str | None, *, timeout: str, stall: str, threshold: str, **counts: int) -> Any:
    from moeplan.runtime.tune import Settings
    from moeplan.units import parse_seconds

    poll_s = POLL_S[launcher] if poll is None else parse_seconds(poll)
    times = {"timeout": parse_seconds(timeout), "stall": parse_seconds(stall), "poll": poll_s}
    for name, value in times.items():
        if value <= 0:
            raise UsageError(f"--{name} is {value:g} s: a time above 0 is needed")
    text = threshold.strip()
    try:
        share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        raise UsageError(f"--threshold '{threshold}' is not a share", hint="write it like 1%") from None
    if not 0.0 <= share < 1.0:
        raise UsageError(f"--threshold {threshold}: 0% or more and less than 100% is needed")
    return Settings(**counts, timeout_s=times["timeout"], stall_s=times["stall"], poll_s=poll_s, threshold=share)


def _launcher(name: str, poll_s: float) -> Launcher:
    from moeplan.runtime.launch import LocalLauncher
    from moeplan.runtime.slurm import SlurmLauncher

    return SlurmLauncher(poll_s) if name == "slurm" else LocalLauncher()


def _writer(target: str) -> Callable[[Plan, Path], None]:
    """What writes the launch files of a plan into a new directory."""
    from moeplan.errors import FileError
    from moeplan.exporters.write import export

    def bare(plan: Plan, directory: Path) -> None:
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise FileError(f"cannot make '{directory}': {error.strerror}") from None

    def exported(plan: Plan, directory: Path) -> None:
        export(plan, directory)

    return bare if target == "none" else exported


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a request to end stop the running trial too, as Ctrl-C does."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Voice = Callable[[str], None]


@contextlib.contextmanager
def _voices() -> Iterator[tuple[Voice, Voice | None]]:
    """What happens, on stderr; and if that is a terminal, a line below that says where the running trial stands."""
    if not sys.stderr.isatty():
        yield lambda text: click.echo(text, err=True), None
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with console.status("") as line:
        yield lambda text: console.print(Text(text)), lambda text: line.update(Text(text))


def _data(tuned: Tuned, winner: Any) -> dict[str, Any]:
    from moeplan.runtime.winner import trial_data

    rows = []
    for entry in tuned.entries:
        row = trial_data(entry)
        if tuned.expected is not None and entry.phase != "ended":
            row["now_expected_s"] = round(float(tuned.expected.step_s[entry.place]), 6)
            row["chance"] = round(float(tuned.expected.chance[entry.place]), 4)
            row["expected_gain"] = round(float(tuned.expected.gain[entry.place]), 4)
        rows.append(row)
    best = tuned.best
    return {
        "verdict": tuned.verdict,
        "trials": tuned.trials,
        "best": None if best is None else best.trial,
        "correction": None if tuned.expected is None else tuned.expected.verdict,
        "deviations_widened": None if tuned.expected is None else round(tuned.expected.widened, 3),
        "candidates": rows,
        "winner": winner,
    }
