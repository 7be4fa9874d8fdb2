"""The command line: one file a command, loaded when it is called.

`moeplan --help` imports neither numpy nor pulp nor torch: command modules are imported by name only when they run or print
their own help, and their help texts for the overview stand here. Exit codes: 0 done, 1 error, 2 wrong usage, 3 no plan fits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

import click

from moeplan._version import VERSION
from moeplan.errors import MoeplanError

COMMANDS = {
    "solve": "Find the best layouts of a model on a cluster.",
    "estimate": "Price a given layout, or a table of training runs.",
    "explain": "Show what a plan's time and memory go to, and what its neighbours cost.",
    "schedule": "Compare the schedules of one MoE layer.",
    "sweep": "Solve a question over a grid of sizes, devices and workloads.",
    "elastic": "Plan for every node count, with what moving between them costs.",
    "simulate": "Run one step of a plan as a timeline of all stages and micro-batches.",
    "export": "Write launch files for a plan.",
    "import": "Read a launch script that is in use today.",
    "lint": "Find what a launch script breaks, and what it leaves on the table.",
    "tune": "Try the best plans for real, and keep the fastest.",
    "profile": "Measure the devices and links of this machine.",
    "calibrate": "Correct the profile of a machine by runs that were measured on it.",
    "verify": "Run the MoE layers of a plan under their schedules, and compare results and times.",
    "catalog": "List models, devices and clusters with the sources of their numbers.",
}
"""Commands with the line that the overview shows; a test holds these to the commands' own help."""

NO_PLAN_FITS = 3


class _LazyGroup(click.Group):
    """A group whose commands are imported from `moeplan.cli.<name>` when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = "import_" if cmd_name == "import" else cmd_name  # a word of Python's own
        command: click.Command = getattr(importlib.import_module(f"moeplan.cli.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        from moeplan.errors import nearest

        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            close = nearest(args[0], COMMANDS, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx) from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, message="%(prog)s %(version)s")
def cli() -> None:
    """Plan the training of Mixture-of-Experts models on GPU clusters.

    \b
    Example:
      moeplan solve --model deepseek-v3 --cluster h100x256 --global-batch 2048 --seq-len 4096 \\
                    --precision fp8-cs -o plan.yaml
      moeplan explain plan.yaml
      moeplan export plan.yaml --to megatron -d launch

    Exit codes: 0 done, 1 error, 2 wrong usage, 3 no plan fits.
    """


def main() -> Any:
    """Run the command line; errors that a user can mend end in one line on stderr."""
    _prepare_streams()
    try:
        code = cli(standalone_mode=False, prog_name="moeplan")
        return code if isinstance(code, int) else 0
    except MoeplanError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except OSError as error:  # files have errors of their own: this is stdout, on a full disk for one
        click.echo(f"error: cannot write {error.filename or 'the output'}: {error.strerror}", err=True)
        _drop_stdout()
        return 1


def _prepare_streams() -> None:
    """Let a stream that is closed swallow what it gets, and one of few letters show "?" for those that it lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _drop_stdout() -> None:
    """Send what is still buffered for stdout nowhere, so that leaving does not fail on it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Entry point of the `moeplan` program."""
    sys.exit(main())
