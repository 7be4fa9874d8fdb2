"""Options that several commands share, and how they become a problem."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moeplan.errors import FileError, UsageError

if TYPE_CHECKING:
    from moeplan.planner.problem import Problem
    from moeplan.profiles.profile import Profile

F = TypeVar("F", bound=Callable[..., Any])

MOST = 1_000_000_000
"""Larger counts are taken for slips."""


class Count(click.ParamType[int]):
    """A whole number of at least one."""

    name = "integer"

    def __init__(self, most: int = MOST) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; refuses fractions, zero, negative numbers and what can only be a slip."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"'{value}' is not a number", param, ctx)
        if not 1 <= number < math.inf or number != int(number):
            self.fail(f"{value} is not a whole number of at least 1", param, ctx)
        if number > self.most:
            self.fail(f"{value} is more than the {self.most} that are handled", param, ctx)
        return int(number)


class Share(click.ParamType[float]):
    """A share of something: 0.005 or 0.5%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share; refuses what is not between 0 and 1."""
        text = str(value)
        try:
            number = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
        except ValueError:
            self.fail(f"'{value}' is not a share", param, ctx)
        if not 0.0 <= number <= 1.0:
            self.fail(f"{value} is not between 0 and 1 (100%)", param, ctx)
        return number


COUNT = Count()

_PROBLEM = [
    click.option("--model", "model_ref", metavar="MODEL", help="Catalog name, config.json or a directory that holds one."),
    click.option("--cluster", "cluster_ref", metavar="CLUSTER", help="Shorthand (h100x256), catalog name or a YAML file."),
    click.option(
        "--profile",
        "profile_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Profile of a machine, in place of --cluster; with it, that one only gives the count of GPUs.",
    ),
    click.option("--global-batch", type=COUNT, metavar="N", help="Sequences of a step."),
    click.option("--seq-len", type=COUNT, metavar="N", help="Tokens of a sequence."),
    click.option(
        "--precision", default="bf16", show_default=True, help="bf16, fp8-cs, fp8-delayed, fp8-blockwise, fp8-mx or nvfp4."
    ),
    click.option(
        "--era",
        default="latest",
        show_default=True,
        help="Software features that exist: latest, a name like deepep-2025, or a Megatron-Core version.",
    ),
    click.option(
        "--gradients", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Gradient reduction."
    ),
    click.option("--moments", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Adam moments."),
    click.option(
        "--imbalance", type=float, default=1.0, show_default=True, help="Tokens of the fullest expert rank over the mean."
    ),
    click.option("--no-mtp", is_flag=True, help="Train without the model's multi-token-prediction layers."),
    click.option("--memory-limit", metavar="SIZE", help="Device memory that a plan may use, like 70GiB; default: all of it."),
    click.option(
        "--target",
        type=click.Choice(["megatron", "research"]),
        default="megatron",
        show_default=True,
        help="What the plan is to run on; research: with every published schedule of MoE layers, for comparison.",
    ),  # fmt: skip
    click.option("--price-per-gpu-hour", type=float, default=0.0, metavar="PRICE", help="Price of one GPU for an hour."),
]


def problem_options(function: F) -> F:
    """Add the options that state a problem."""
    for option in reversed(_PROBLEM):
        function = option(function)
    return function


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_json(data: Any) -> None:
    """Plain data as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, default=str))


def remark(text: str) -> None:
    """A remark on stderr."""
    click.echo(f"note: {text}", err=True)


def check_writable(path: Path, what: str) -> None:
    """Refuse an output path before work is spent on it; `what` names what would be written."""
    try:
        if path.is_dir():
            raise FileError(f"cannot write {what} '{path}': it is a directory", hint="give the path of a file")
        if not path.parent.is_dir():
            raise FileError(f"cannot write {what} '{path}': there is no directory '{path.parent}'", hint="create it first")
        if not os.access(path.parent, os.W_OK):
            raise FileError(f"cannot write {what} '{path}': directory '{path.parent}' is not writable")
    except OSError as error:
        raise FileError(f"cannot write {what} '{path}': {error.strerror}") from None


def need_torch(command: str) -> None:
    """Refuse to go on without torch, before anything else is looked at."""
    from importlib.util import find_spec

    from moeplan.errors import DeviceError

    if find_spec("torch") is None:
        raise DeviceError(f"moeplan {command} needs torch, which is not installed", hint="pip install 'moeplan[profile]'")


def make_problem(
    *,
    model_ref: str | None,
    cluster_ref: str | None,
    global_batch: int | None,
    seq_len: int | None,
    profile_file: Path | None = None,
    pins: tuple[str, ...] = (),
    forbidden: tuple[str, ...] = (),
    **how: Any,
) -> Problem:
    """The problem that the options state; every missing one is named. `how` are further fields of a `Question`."""
    machine = cluster_ref or profile_file
    needed = {"--model": model_ref, "--cluster": machine, "--global-batch": global_batch, "--seq-len": seq_len}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise UsageError(
            f"missing {', '.join(missing)}", hint="a plan file says all of them; `moeplan solve --help` shows an example"
        )
    from moeplan.planner.question import Question, problem_of

    question = Question(
        model=str(model_ref),
        cluster=cluster_ref or "",
        profile=str(profile_file or ""),
        global_batch=global_batch or 0,
        seq_len=seq_len or 0,
        pin=pins,
        forbid=forbidden,
        **how,
    )
    return problem_of(question, remark)


def load_machine(cluster_ref: str | None, profile_file: Path | None) -> Profile:
    """The profile of a file, at the count of GPUs of the cluster if there is one too; without a file the nominal profile."""
    from moeplan.planner.question import load_machine as load

    return load(cluster_ref or "", str(profile_file or ""))


def progress_bar(label: str) -> Any:
    """A context manager that yields a `report(done, total)`; the bar shows after a second if stderr is a terminal."""
    from moeplan.cli.render import Progress

    return Progress(label, enabled=sys.stderr.isatty())


__all__ = [
    "COUNT", "Count", "check_writable", "json_option", "load_machine", "make_problem", "need_torch", "print_json",
    "problem_options", "progress_bar", "remark",
]  # fmt: skip
