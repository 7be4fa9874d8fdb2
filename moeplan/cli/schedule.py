"""`moeplan schedule`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import COUNT, Count, check_writable, json_option, load_machine, print_json, progress_bar, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.costmodels.moe.constants import Constants
    from moeplan.planner.layers.question import Asked
    from moeplan.planner.layers.study import Question
    from moeplan.profiles.profile import Profile

CHUNKS = Count(4096)
"""A number of chunks."""
_SIZES = [
    click.option("--model", "model_ref", metavar="MODEL", help="Takes widths, experts and top-k of a model's MoE layer."),
    click.option("--tokens", type=COUNT, metavar="N", help="Tokens of a tensor-parallel group, or:"),
    click.option("--batch", type=COUNT, metavar="N", help="Sequences, and"),
    click.option("--seq-len", type=COUNT, metavar="N", help="tokens of a sequence."),
    click.option("--hidden", type=COUNT, metavar="N", help="Width of a token."),
    click.option("--expert-hidden", type=COUNT, metavar="N", help="Width inside an expert."),
    click.option("--experts", type=COUNT, metavar="N", help="Experts; needed for whole slots, and with a profile."),
    click.option("--top-k", type=COUNT, metavar="N", help="Experts of a token."),
    click.option(
        "--capacity-factor", type=float, metavar="F", help="Slots over those that balanced routing fills. [default: 1]"
    ),
    click.option("--gemms", type=click.Choice(["2", "3"]), help="GEMMs of an expert: 3 gated, 2 plain. [default: 3]"),
    click.option("--shared-hidden", type=COUNT, metavar="N", help="Width inside the shared experts together. [default: none]"),
    click.option("--mp", type=COUNT, metavar="N", help="Tensor-parallel ranks around the experts. [default: 1]"),
    click.option("--ep", type=COUNT, metavar="N", help="Groups that share the experts."),
    click.option("--esp", type=COUNT, metavar="N", help="Ranks among which an expert is cut. [default: 1]"),
    click.option("--ranks", type=COUNT, metavar="N", help="All ranks of a copy of the experts, ep x esp."),
    click.option("--element-bytes", type=COUNT, metavar="N", help="Bytes of an element. [default: 2, or as the constants say]"),
    click.option("--sequence-parallel", is_flag=True, help="Tokens stay split among the mp ranks around the layer."),
]
_CONSTANT = "ALPHA,BETA"
_MACHINE = [
    click.option("--constants", "constants_ref", metavar="NAME|FILE", help="Testbed (fsmoe-a, fsmoe-b) or YAML file."),
    click.option("--cluster", "cluster_ref", metavar="CLUSTER", help="Fit the constants to a cluster (h100x64)."),
    click.option("--profile", "profile_file", type=click.Path(path_type=Path), metavar="FILE", help="... or to a profile."),
    click.option("--a2a", metavar=_CONSTANT, help="All-to-all among ep, like 287us,1.72GB/s or 0.287ms,580ps/B."),
    click.option("--fused-a2a", metavar=_CONSTANT, help="All-to-all among all ranks. [default: that of --a2a]"),
    click.option("--all-gather", metavar=_CONSTANT, help="All-gather among esp, over the gathered bytes."),
    click.option("--reduce-scatter", metavar=_CONSTANT, help="Reduce-scatter among esp, over the bytes before it."),
    click.option("--all-reduce", metavar=_CONSTANT, help="All-reduce among esp. [default: the two before]"),
    click.option("--mp-all-gather", metavar=_CONSTANT, help="All-gather among mp. [default: that of --all-gather]"),
    click.option("--gemm", metavar=_CONSTANT, help="A GEMM of an expert, like 43us,21.8TFLOP/s."),
    click.option("--gradient-all-reduce", metavar=_CONSTANT, help="All-reduce of gradients; for --gradient-bytes."),
]  # fmt: skip
_CHOICES = [
    click.option("--schedules", metavar="A,B,...", help="Schedules to compare. [default: all]"),
    click.option("--over", default="baseline", show_default=True, metavar="NAME", help="Schedule that ratios are over."),
    click.option(
        "--degrees", metavar="R,R,...", help="Numbers of chunks to try. [default: those of 1,2,4,8 that divide the slots]"
    ),
    click.option(
        "--kappa", type=float, metavar="K", help="Part of the overlap that is lost, 0 to 1. [default: 0, or the profile's]"
    ),
    click.option(
        "--gradient-bytes", metavar="SIZE", help="Gradients that a rank all-reduces during the backward pass, like 21MB."
    ),
    click.option(
        "--sweep", "sweeps", multiple=True, metavar="NAME=VALUES", help="Vary a number; repeat for a grid. Goes with -o."
    ),
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.csv", help="Table of the sweep."),
    click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw times to a .png or .svg (extra: plot)."),
]


def _options(function: Any) -> Any:
    for option in reversed([*_SIZES, *_MACHINE, *_CHOICES]):
        function = option(function)
    return function


@click.command()
@_options
@json_option
def schedule(
    constants_ref: str | None,
    cluster_ref: str | None,
    profile_file: Path | None,
    sweeps: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    over: str,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare the schedules of one MoE layer.

    \b
    Examples:
      moeplan schedule --constants fsmoe-b --batch 4 --seq-len 1024 --hidden 4096 --expert-hidden 14336 --top-k 2
      moeplan schedule --cluster h100x64 --model mixtral-8x7b --tokens 8192 --mp 8 --esp 8 --ep 8
      moeplan schedule --constants fsmoe-a --model mixtral-8x7b --tokens 4096 --ep 4 --esp 8 \\
                       --sweep capacity-factor=1:4:+0.5 --sweep tokens=512:8192:x2 -o grid.csv

    Constants are ALPHA,BETA: the time of an empty operation, and a rate or its inverse (287us,1.72GB/s; 0.287ms,580ps/B);
    numbers without units are us and GB/s, for --gemm TFLOP/s. --sweep takes v1,v2,... or a:b:xN (times N) or a:b:+N, of the
    numbers above or of a constant (a2a-us, a2a-gb-per-s, gemm-tflop-per-s). Forward and backward choose their chunks apart.
    """
    _check_outputs(sweeps, output, plot, as_json=as_json)
    asked, constants, errors = _asked(options, constants_ref, cluster_ref, profile_file, [s.partition("=")[0] for s in sweeps])
    asked = _chosen(asked, options["schedules"], over, swept=bool(sweeps))
    if sweeps:
        return _sweep(_with_degrees(asked, options["degrees"]), constants, sweeps, output, plot, fitted=bool(errors))
    from moeplan.cli import render_schedule
    from moeplan.planner.layers.study import compared

    question = _dividing(asked, options["degrees"]).question(constants)
    found = compared(question, over)
    for text in render_schedule.remarks(question, constants, errors):
        remark(text)
    if as_json:
        print_json(render_schedule.data(question, constants, errors, found))
    else:
        render_schedule.show(question, constants, found)
    if plot is not None:
        from moeplan.cli.plot_schedule import draw_bars

        draw_bars(plot, found.rows)
    return 0


def _check_outputs(sweeps: tuple[str, ...], output: Path | None, plot: Path | None, *, as_json: bool) -> None:
    if output is not None and not sweeps:
        raise UsageError("-o takes the table of a sweep", hint="add --sweep, or use --json for a single layer")
    if sweeps and as_json:
        raise UsageError("a sweep is a table, not JSON", hint="leave --json out")
    if plot is not None and len(sweeps) > 1:
        raise UsageError(f"--plot draws one swept number, {len(sweeps)} are given", hint="leave one --sweep, or use -o")
    if output is not None:
        check_writable(output, "table of the sweep")
    if plot is not None:
        from moeplan.cli.plot_schedule import check_plot

        check_plot(plot)


def _asked(
    options: dict[str, Any],
    constants_ref: str | None,
    cluster_ref: str | None,
    profile_file: Path | None,
    swept: Sequence[str],
) -> tuple[Asked, Constants, dict[str, float]]:
    """What is asked, on which constants, and the errors of their fit where there is one; `swept` names what varies."""
    from moeplan.costmodels.moe.constants import OPERATIONS, Constants, load_constants, parse_constant
    from moeplan.planner.layers.question import NUMBERS, Asked

    if constants_ref is not None and (cluster_ref is not None or profile_file is not None):
        other = "--cluster" if profile_file is None else "--profile"
        raise UsageError(f"--constants and {other} both give the constants", hint="leave one of them")
    typed = {name: options[name.replace("-", "_")] for name in (*NUMBERS, *OPERATIONS)}
    given = {name: parse_constant(text, name) for name in OPERATIONS if (text := typed[name]) is not None}
    if constants_ref is not None:
        constants = load_constants(constants_ref)
    elif given or cluster_ref is not None or profile_file is not None:
        constants = Constants(name="options", source="options", given={})
    else:
        raise UsageError("no constants", hint="give --constants fsmoe-a, --cluster h100x64, or --a2a, --all-gather, ... each")
    numbers: dict[str, Any] = {"element-bytes": constants.element_bytes, **constants.groups}
    if typed["ranks"] is not None or "ranks" in swept:
        numbers.pop("ep", None)  # that of the constants
    numbers |= _model_numbers(options["model_ref"])
    numbers |= {name: typed[name] for name in NUMBERS if typed[name] is not None}
    numbers["gemms"] = int(numbers.get("gemms", 3))
    if typed["gradient-bytes"] is not None:
        from moeplan.units import parse_bytes

        numbers["gradient-bytes"] = parse_bytes(typed["gradient-bytes"])
    asked = Asked(numbers=numbers, schedules=(), sequence_parallel=options["sequence_parallel"])
    if cluster_ref is None and profile_file is None:
        return asked, constants.over(given), {}
    return _fitted(asked, load_machine(cluster_ref, profile_file), given)


def _fitted(asked: Asked, profile: Profile, given: dict[str, Any]) -> tuple[Asked, Constants, dict[str, float]]:
    """Constants from a profile, with those that were typed in place of its own."""
    from moeplan.costmodels.moe.fitted import Experts, fit_constants
    from moeplan.planner.layers.study import DEGREES

    layer = asked.layer()
    if not layer.experts:
        raise UsageError("missing --experts, which a profile needs to price their GEMMs", hint="or give --model")
    experts = Experts(
        hidden=int(layer.hidden), width=int(layer.expert_hidden), count=int(layer.experts), gemms=int(layer.gemms)
    )
    carried = float(asked.numbers.get("gradient-bytes", 0.0))
    fit = fit_constants(profile, layer.size, experts, most_chunks=DEGREES[-1], gradient_bytes=carried)
    if carried and "gradient-all-reduce" not in {**fit.constants.given, **given}:
        raise UsageError(
            f"--gradient-bytes: the {layer.ep * layer.esp} ranks of the layer are one tensor-parallel group, mp {layer.mp}, "
            "which reduces no gradients",
            hint="lower --mp, or give --gradient-all-reduce ALPHA,BETA",
        )
    numbers = {"kappa": profile.overlap_loss, **asked.numbers}
    errors = {name: error for name, error in fit.errors.items() if name not in given}
    return dataclasses.replace(asked, numbers=numbers), fit.constants.over(given), errors


def _model_numbers(ref: str | None) -> dict[str, Any]:
    """Widths, experts and top-k of the model's MoE layer."""
    if ref is None:
        return {}
    from moeplan.costmodels.model import Moe
    from moeplan.costmodels.model_catalog import load_model

    model = load_model(ref)
    blocks = [block for block in model.blocks if isinstance(block, Moe)]
    if not blocks:
        raise UsageError(f"{model.name} has no experts to schedule", hint="name a mixture-of-experts model")
    if len(blocks) > 1:
        remark(f"{model.name} has {len(blocks)} kinds of MoE layers; this is the first of them")
    block = blocks[0]
    return {
        "hidden": block.latent or model.hidden, "expert-hidden": block.width, "experts": block.experts, "top-k": block.topk,
        "gemms": 3 if block.gated else 2, "shared-hidden": block.shared_width,
    }  # fmt: skip


def _chosen(asked: Asked, text: str | None, over: str, *, swept: bool) -> Asked:
    """The question with the schedules that were typed; by default with all that differ for this layer.

    A sweep leaves out what is simulated point by point, and pairs of directions.
    """
    from moeplan.costmodels.moe.schedules import PAIR_SCHEDULES, SCHEDULES, find_schedule
    from moeplan.errors import UnknownNameError

    pairs = {schedule.name: schedule for schedule in PAIR_SCHEDULES}
    if over in pairs:
        raise UsageError(
            f"--over {over}: a pair of directions, and ratios are over one schedule", hint="use --over hierarchical"
        )
    find_schedule(over)
    if text is None:
        idle = {"lina"} if swept else set()
        idle |= set() if asked.numbers.get("shared-hidden") else {"shared-overlap"}
        chosen = tuple(schedule for schedule in SCHEDULES if schedule.name not in idle)
        return dataclasses.replace(asked, schedules=chosen, pairs=() if swept else PAIR_SCHEDULES)
    single = {schedule.name: schedule for schedule in SCHEDULES}
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in single and name not in pairs:
            raise UnknownNameError("MoE schedule", name, [*single, *pairs])
    if swept and any(name in pairs for name in names):
        raise UsageError(f"{next(n for n in names if n in pairs)} is a pair of directions, which a sweep does not hold")
    return dataclasses.replace(
        asked,
        schedules=tuple(single[name] for name in names if name in single),
        pairs=tuple(pairs[name] for name in names if name in pairs),
    )


def _with_degrees(asked: Asked, text: str | None) -> Asked:
    """The question with the chunks that were typed."""
    if text is None:
        return asked
    try:
        degrees = tuple(sorted({CHUNKS.convert(part.strip(), None, None) for part in text.split(",")}))
    except click.BadParameter as error:
        raise UsageError(f"--degrees {text}: {error.message}", hint="write it like 1,2,4") from None
    return dataclasses.replace(asked, degrees=degrees)


def _dividing(asked: Asked, text: str | None) -> Asked:
    """The question with the chunks that were typed, which must divide the slots, or with those of the default that do."""
    from moeplan.costmodels.moe.base import check_degree

    asked, layer = _with_degrees(asked, text), asked.layer()
    if text is not None and not math.isinf(layer.capacity):
        for degree in asked.degrees:
            check_degree(degree, int(layer.capacity))
    return dataclasses.replace(asked, degrees=tuple(r for r in asked.degrees if layer.takes(r)))


def _sweep(
    asked: Asked, constants: Constants, sweeps: tuple[str, ...], output: Path | None, plot: Path | None, *, fitted: bool
) -> int:
    """The table of a sweep on stdout or in a file, and its picture."""
    from moeplan.planner.layers import sweep as layer_sweep
    from moeplan.planner.layers.question import SWEPT
    from moeplan.records import save_text

    axes = [layer_sweep.parse_axis(text, SWEPT) for text in sweeps]
    count = layer_sweep.points(axes)
    held = next((axis.name for axis in axes if axis.name in ("mp", "ep", "esp", "ranks", "experts")), None)
    if fitted and held is not None:
        raise UsageError(
            f"--sweep {held}: constants of a profile are fitted to one set of groups",
            hint="ask for each on its own, or sweep with --constants or typed ones",
        )

    def ask(at: Mapping[str, Any]) -> Question:
        return asked.question(constants, at)

    if plot is not None:
        from moeplan.cli.plot_schedule import MOST_POINTS, draw_curves

        if count > MOST_POINTS:
            raise UsageError(f"--plot draws up to {MOST_POINTS:,} points, the sweep has {count:,}", hint="take larger steps")
        draw_curves(plot, axes[0].name, axes[0].values(), ask({axes[0].name: axes[0].values()}))
        if output is None:
            return 0
    names = [schedule.name for schedule in asked.schedules]
    first = layer_sweep.header(axes, names)
    if output is None:
        for _, text in layer_sweep.rows(axes, ask):
            click.echo(first + text, nl=False)
            first = ""
        return 0
    with progress_bar("sweeping") as progress:

        def texts() -> Iterator[str]:
            done = 0
            yield first
            for held, text in layer_sweep.rows(axes, ask):
                done += held
                progress(done, count)
                yield text

        save_text(output, texts(), "table of the sweep")
    click.echo(f"{count:,} points of {len(names)} schedules written to {output}", err=True)
    return 0
