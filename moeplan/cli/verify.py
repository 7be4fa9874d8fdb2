"""`moeplan verify`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from moeplan.cli.options import COUNT, Count, check_writable, json_option, need_torch, print_json, remark
from moeplan.errors import MoeplanError, UsageError

if TYPE_CHECKING:
    from moeplan.planner.layers.comparison import Comparison, TimedRun
    from moeplan.planner.layers.setup import LayerSetup
    from moeplan.profiles.profile import Profile
    from moeplan.profiles.world import World
    from moeplan.runtime.verify import Checked, Variant

DEFAULT = "baseline,s1,s2,hierarchical,fsmoe"
_SIZES = [
    click.option("--tokens", type=COUNT, metavar="N", help="Tokens of a tensor-parallel group. [default: the plan's]"),
    click.option("--hidden", type=COUNT, metavar="N", help="Width of a token. [default: the model's]"),
    click.option("--expert-hidden", type=COUNT, metavar="N", help="Width inside an expert. [default: the model's]"),
    click.option("--experts", type=COUNT, metavar="N", help="Experts. [default: as many a rank as in the plan]"),
    click.option("--topk", type=COUNT, metavar="N", help="Experts of a token. [default: the model's]"),
    click.option("--mp", type=COUNT, metavar="N", help="Tensor-parallel ranks. [default: the plan's tp, if there are as many]"),
    click.option("--esp", type=COUNT, metavar="N", help="Ranks that cut an expert. [default: the plan's etp, likewise]"),
    click.option("--ep", type=COUNT, metavar="N", help="Groups that share the experts. [default: the plan's ep, likewise]"),
]


def _options(function: Any) -> Any:
    for option in reversed(_SIZES):
        function = option(function)
    return function


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--profile", "profile_file", type=click.Path(path_type=Path), metavar="FILE", help="Predicts in place of the plan's own."
)
@_options
@click.option("--schedules", default=DEFAULT, show_default=True, metavar="A,B,...", help="Schedules to run.")
@click.option("--degrees", default="1,2,4", show_default=True, metavar="R,R,...", help="Numbers of chunks.")
@click.option("--gradient-bytes", default="0", show_default=True, metavar="SIZE", help="Gradients reduced inside the backward.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of the timed layer.")
@click.option("--budget", default="60s", show_default=True, metavar="TIME", help="Time for all measurements.")
@click.option("--check-only", is_flag=True, help="Check results, measure nothing.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="What runs.")
@click.option("--timeout", default="120s", show_default=True, metavar="TIME", help="Longest step before the run is given up.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE.csv", help="Measured rows, for `moeplan calibrate`."
)
@json_option
def verify(
    plan_file: Path,
    profile_file: Path | None,
    schedules: str,
    degrees: str,
    gradient_bytes: str,
    precision: str,
    budget: str,
    check_only: bool,
    device: Any,
    timeout: str,
    output: Path | None,
    as_json: bool,
    **sizes: int | None,
) -> int:
    """Run the MoE layers of a plan under their schedules, and compare results and times.

    \b
    Examples:
      moeplan verify plan.yaml --check-only
      torchrun --nproc-per-node 8 -m moeplan verify plan.yaml --profile ours.yaml -o measured.csv
      srun --ntasks-per-node 8 python -m moeplan verify plan.yaml --schedules hierarchical,fsmoe --degrees 1,2,4,8
      torchrun --nproc-per-node 4 -m moeplan verify plan.yaml --device cpu --tokens 512 --hidden 512 --expert-hidden 256

    Each schedule is run by the very task graph that is priced and simulated. Outputs and all gradients are held to a dense
    layer in one process (fp32, small widths), then both directions are timed on the full layer, scaled to the ranks that are
    there: a rank has as many experts and tokens as in the plan. The table has predicted and measured time of every task and
    schedule. Exit code 1 if a result is wrong.
    """
    need_torch("verify")
    from moeplan.profiles.ranks import this_rank
    from moeplan.profiles.world import ToldElsewhere, join
    from moeplan.units import parse_bytes, parse_seconds

    try:
        budget_s, timeout_s, carried = parse_seconds(budget), parse_seconds(timeout), int(parse_bytes(gradient_bytes))
        if output is not None and check_only:
            raise UsageError("-o takes what is measured", hint="leave --check-only out")
    except MoeplanError as error:
        if this_rank(os.environ).rank:  # of several ranks only one complains
            return error.exit_code
        raise
    given = {name: value for name, value in sizes.items() if value is not None}
    try:
        world = join(device, timeout_s)
        try:
            # On all ranks: files may be missing on one node alone.
            asked = _everywhere(
                world, lambda: _question(plan_file, profile_file, output, world.ranks, given, schedules, degrees)
            )
            return _verified(world, asked, budget_s, carried, precision, output, check_only=check_only, as_json=as_json)
        finally:
            world.leave()
    except ToldElsewhere as error:
        return error.exit_code


def _everywhere(world: World, read: Callable[[], _Question]) -> _Question:
    """What each rank reads; a failure of one ends all."""
    found: list[_Question] = []
    world.collect("reading the plan", lambda: found.append(read()), lambda _: None)
    return found[0]


def _verified(
    world: World,
    asked: _Question,
    budget_s: float,
    carried: int,
    precision: str,
    output: Path | None,
    *,
    check_only: bool,
    as_json: bool,
) -> int:
    """Verify on all ranks, show it on the first."""
    first = world.rank == 0
    say: Callable[[str], None] = remark if first else lambda text: None
    for text in asked.remarks:
        say(text)
    checks, timed = _run(world, asked.setup, asked.variants, say, budget_s, carried, precision, check_only=check_only)
    if first:
        comparison = _compared(world, timed, asked.profile, say)
        _show(asked.setup, checks, timed, comparison, output, as_json=as_json)
    return 0 if all(each.right for each in checks) else 1


class _Question(NamedTuple):
    """What is to be verified."""

    setup: LayerSetup
    profile: Profile
    variants: list[Variant]
    remarks: list[str]


def _question(
    plan_file: Path,
    profile_file: Path | None,
    output: Path | None,
    ranks: int,
    given: dict[str, int],
    schedules: str,
    degrees: str,
) -> _Question:
    from moeplan.planner.layers.setup import scaled_layer
    from moeplan.planner.plan import load_plan
    from moeplan.profiles.profile_file import load_profile

    if output is not None:
        check_writable(output, "table of runs")
    plan = load_plan(plan_file)
    profile = plan.problem.profile if profile_file is None else load_profile(profile_file)
    setup, remarks = scaled_layer(plan.problem.model, plan.problem.workload, plan.layout, ranks, given)
    return _Question(setup, profile, _variants(schedules, degrees), remarks)


def _variants(schedules: str, degrees: str) -> list[Variant]:
    from moeplan.runtime.verify import variants

    names = list(dict.fromkeys(part.strip() for part in schedules.split(",") if part.strip()))
    try:
        chunks = sorted({Count(64).convert(part.strip(), None, None) for part in degrees.split(",")})
    except click.BadParameter as error:
        raise UsageError(f"--degrees {degrees}: {error.message}", hint="write it like 1,2,4") from None
    if not names:
        raise UsageError("--schedules names none", hint=f"like {DEFAULT}")
    return variants(names, chunks)


def _run(
    world: World,
    setup: LayerSetup,
    asked: list[Variant],
    say: Callable[[str], None],
    budget_s: float,
    carried: int,
    precision: str,
    *,
    check_only: bool,
) -> tuple[list[Checked], list[TimedRun]]:
    """Check every variant, then time every one."""
    from moeplan.cli.options import progress_bar
    from moeplan.profiles.world import environment_of
    from moeplan.runtime.verify import check, check_memory, layer_ranks, time_variant

    if not check_only:
        bytes_ = {"bf16": 2, "fp32": 4}[precision]
        world.collect(
            "size of the layer", lambda: check_memory(setup, environment_of(world).memory_bytes, bytes_), lambda _: None
        )
    ranks = layer_ranks(world, setup)
    checks, timed = [], []
    with progress_bar("verifying") if world.rank == 0 else _silent() as progress:
        steps = len(asked) * (1 if check_only else 2)
        for done, variant in enumerate(asked):
            checks.append(check(world, ranks, setup, variant))
            progress(done + 1, steps)
        for done, variant in enumerate([] if check_only else asked):
            share_s = budget_s / len(asked)
            timed += time_variant(world, ranks, setup, variant, budget_s=share_s, gradient_bytes=carried, precision=precision)
            progress(len(asked) + done + 1, steps)
            if world.stopped:
                say("stopped by the user; what was measured is shown")
                break
    return checks, timed


class _silent:
    """The progress bar of the ranks that print nothing."""

    def __enter__(self) -> Callable[[int, int], None]:
        return lambda done, total: None

    def __exit__(self, *_: object) -> None:
        return None


def _compared(world: World, timed: list[TimedRun], profile: Profile, say: Callable[[str], None]) -> Comparison | None:
    """The runs beside the predictions of the profile; None where nothing was measured."""
    from moeplan.planner.layers.comparison import compare
    from moeplan.profiles.world import environment_of

    if not timed:
        return None
    here = environment_of(world).device
    there = profile.measured_on.device if profile.measured_on is not None else profile.cluster.device.name
    if here != there and there.lower() not in here.lower():
        say(f"predictions are for {there}, this is {here}: give --profile with what `moeplan profile` measured here")
    if (precision := timed[0].run.precision) not in profile.gemms:
        say(f"the profile prices no {precision}; predictions are for bf16")
        timed = [dataclasses.replace(t, run=dataclasses.replace(t.run, precision="bf16")) for t in timed]
    return compare(timed, profile)


def _show(
    setup: LayerSetup,
    checks: list[Checked],
    timed: list[TimedRun],
    comparison: Comparison | None,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    from moeplan.cli import render_verify
    from moeplan.planner.layers.runs import table_text
    from moeplan.records import save_text

    if output is not None:
        save_text(output, table_text([each.run for each in timed]), "table of runs")
    if as_json:
        print_json(render_verify.data(setup, checks, comparison))
    else:
        render_verify.show(setup, checks, comparison)
    if output is not None:
        click.echo(f"{len(timed)} measured rows written to {output}; `moeplan calibrate PROFILE --runs {output}`", err=True)
        sys.stderr.flush()
