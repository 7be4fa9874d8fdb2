"""Options that several commands share, and how they become a problem."""

from __future__ import annotations

import dataclasses
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
    from moeplan.costmodels.model import Model
    from moeplan.costmodels.workload import Workload
    from moeplan.planner.problem import Problem
    from moeplan.profiles.hardware import Device
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
    no_mtp: bool,
    memory_limit: str | None,
    price_per_gpu_hour: float,
    profile_file: Path | None = None,
    target: str = "megatron",
    pins: tuple[str, ...] = (),
    forbidden: tuple[str, ...] = (),
    **how: Any,
) -> Problem:
    """The problem that the options state; every missing one is named. `how` are those of `_workload`."""
    machine = cluster_ref or profile_file
    needed = {"--model": model_ref, "--cluster": machine, "--global-batch": global_batch, "--seq-len": seq_len}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise UsageError(
            f"missing {', '.join(missing)}", hint="a plan file says all of them; `moeplan solve --help` shows an example"
        )
    assert model_ref is not None and global_batch is not None and seq_len is not None
    from moeplan.costmodels.model_catalog import load_model
    from moeplan.planner.problem import Problem, parse_condition

    if not 0 <= price_per_gpu_hour < math.inf:
        raise UsageError(f"--price-per-gpu-hour {price_per_gpu_hour:g}: a price of 0 or more is needed")
    model, profile = load_model(model_ref), load_machine(cluster_ref, profile_file)
    if no_mtp:
        if not model.mtp:
            remark(f"{model.name} has no prediction layers; --no-mtp changes nothing")
        model = dataclasses.replace(model, mtp=())
    if price_per_gpu_hour:
        cluster = dataclasses.replace(profile.cluster, price_per_gpu_hour=price_per_gpu_hour)
        profile = dataclasses.replace(profile, cluster=cluster)
    for text in model.remarks:
        remark(text)
    return Problem(
        model=model,
        profile=profile,
        workload=_workload(model, global_batch=global_batch, seq_len=seq_len, **how),
        pins=tuple(parse_condition(p) for p in pins),
        forbidden=tuple(parse_condition(p) for p in forbidden),
        memory_limit_bytes=_limit_bytes(memory_limit, profile.cluster.device),
        target=target,
    )


def load_machine(cluster_ref: str | None, profile_file: Path | None) -> Profile:
    """The profile of a file, at the count of GPUs of the cluster if there is one too; without a file the nominal profile."""
    from moeplan.profiles.hardware import load_cluster
    from moeplan.profiles.nominal import nominal
    from moeplan.profiles.profile_file import load_profile, on_cluster

    if profile_file is None:
        assert cluster_ref is not None
        return nominal(load_cluster(cluster_ref))
    profile = load_profile(profile_file)
    return profile if cluster_ref is None else on_cluster(profile, load_cluster(cluster_ref))


def _workload(
    model: Model, *, precision: str, era: str, gradients: str, moments: str, imbalance: float, **sizes: int
) -> Workload:
    from moeplan.costmodels.workload import Workload, load_era, load_precision

    if imbalance != 1.0 and model.moe is None:
        raise UsageError(f"--imbalance {imbalance:g}: {model.name} has no experts to load unevenly")
    software = load_era(era)
    if software.framework != "megatron":
        raise UsageError(f"--era {era}: {software.source} serves to price tables of runs, plans are for Megatron")
    return Workload(
        **sizes,
        precision=load_precision(precision),
        era=software,
        gradient_bytes={"fp32": 4, "bf16": 2}[gradients],
        moment_bytes={"fp32": 4, "bf16": 2}[moments],
        imbalance=imbalance,
    )


def _limit_bytes(text: str | None, device: Device) -> float:
    """Bytes of `--memory-limit`; 0 where the device itself is the limit."""
    from moeplan.units import format_bytes, parse_bytes

    if text is None:
        return 0.0
    limit = parse_bytes(text)
    if limit <= 0:
        raise UsageError(f"--memory-limit {text} leaves no memory", hint="write it like 70GiB")
    if limit < device.memory_bytes:
        return limit
    if limit > device.memory_bytes:
        remark(f"--memory-limit {text} is more than the {format_bytes(device.memory_bytes)} of a {device.name}, which counts")
    return 0.0


def progress_bar(label: str) -> Any:
    """A context manager that yields a `report(done, total)`; the bar shows after a second if stderr is a terminal."""
    from moeplan.cli.render import Progress

    return Progress(label, enabled=sys.stderr.isatty())


__all__ = [
    "COUNT", "Count", "check_writable", "json_option", "load_machine", "make_problem", "need_torch", "print_json",
    "problem_options", "progress_bar", "remark",
]  # fmt: skip
