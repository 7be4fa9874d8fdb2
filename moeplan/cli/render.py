"""What people see: tables and bars on a terminal.

Units change here and only here: seconds become ms or s, bytes GiB, FLOP/s TFLOP/s. Wide tables are kept to 120 columns where
stdout is not a terminal.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeplan.cli.render_robustness import risk_text, says_something
from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.layout import Layout
from moeplan.planner.certificate import Certificate
from moeplan.planner.explain import Binding, Neighbour
from moeplan.planner.gradient_windows import GradientWindows
from moeplan.planner.plan import Plan, StageMemory
from moeplan.planner.schedules import Alternative, layer_groups
from moeplan.planner.solve import Solution, cost_per_trillion_tokens
from moeplan.planner.ties import Comparison
from moeplan.units import GIB, TERA, format_bytes, format_count, format_seconds

BAR = 28
"""Characters of a full bar."""
COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "bright_blue", "bright_cyan", "bright_green", "bright_yellow")


def console() -> Console:
    """The console for data, on stdout."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120, soft_wrap=False)


class Progress:
    """A progress bar on stderr that appears after a second."""

    def __init__(self, label: str, *, enabled: bool) -> None:
        self.label, self.enabled = label, enabled
        self.started = time.monotonic()
        self.bar: object | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self.report

    def report(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        if not self.enabled or time.monotonic() - self.started < 1.0:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        if self.bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            bar.add_task(self.label, total=total)
            bar.start()
            self.bar = bar
        assert isinstance(self.bar, RichProgress)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stop = getattr(self.bar, "stop", None)
        if stop is not None:
            stop()


def solution_table(solution: Solution) -> Table:
    """The best plans, one a row."""
    first = solution.plans[0]
    priced = bool(first.problem.profile.cluster.price_per_gpu_hour)
    table = Table(title=title(first), title_style="bold", title_justify="left", box=None, pad_edge=False, header_style="dim")
    sized = len({plan.layout.world for plan in solution.plans}) > 1
    for name in ("", *(["GPUs"] if sized else []), "layout", "micro", "recompute", "dispatch"):
        table.add_column(name)
    tied = {0, *solution.tied} if solution.tied else set()
    for name in ("step", *(["tie"] if tied else []), "80 % of runs", "tok/s/GPU", "MFU", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    risky = says_something(solution.plans)
    if risky:
        table.add_column("OOM risk", justify="right")
    if priced:
        table.add_column("per 10^12 tok", justify="right", no_wrap=True)
    for i, plan in enumerate(solution.plans):
        cells: list[str | Text] = [
            str(i + 1),
            plan.layout.degrees(),
            str(plan.layout.micro_batch),
            _recompute(plan.layout),
            dispatch_text(plan),
            format_seconds(plan.step_s),
            *((["tie"] if i in tied else [""]) if tied else []),
            f"{format_seconds(plan.low_s)} - {format_seconds(plan.high_s)}",
            f"{plan.tokens_per_s_per_gpu:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.peak_bytes / GIB:.1f}",
        ]
        if risky:
            cells.append(risk_text(plan))
        if sized:
            cells.insert(1, str(plan.layout.world))
        if priced:
            cells.append(f"{cost_per_trillion_tokens(plan.problem, plan.layout.world, plan.step_s):,.0f}")
        table.add_row(*cells, style="bold green" if i == 0 else None)
    return table


def title(plan: Plan) -> str:
    """What was asked: model, cluster, workload."""
    problem, workload = plan.problem, plan.problem.workload
    return (
        f"{problem.model.name} on {problem.profile.cluster.name}, {workload.global_batch} x {workload.seq_len} tokens, "
        f"{workload.precision.name}, era {workload.era.name}"
    )


def _recompute(layout: Layout) -> str:
    """What is recomputed, in how many layers of each chunk where these are not all, and what is offloaded: "full (2)"."""
    counts = f" ({layout.recompute_layers})" * bool(layout.recompute_layers)
    offload = f" offload {layout.optimizer_offload:.0%}" * bool(layout.optimizer_offload)
    return (" ".join(layout.recompute) + counts) * bool(layout.recompute) + offload or "-"


def dispatch_text(plan: Plan) -> str:
    """Dispatcher and overlap."""
    x = plan.layout
    name = "-" if x.dispatcher == "none" else x.dispatcher
    if x.moe_schedule:
        return f"{name}, {x.moe_schedule}"
    return f"{name}, overlap" if x.ep_overlap else "TP overlap" if x.tp_overlap else name


def certificate_lines(found: Certificate) -> Iterable[Text]:
    """What stands behind the answer."""
    yield Text(
        f"best of {format_count(found.considered)} layouts, {_gap(found)}, {found.seconds:.2f} s "
        f"({format_count(found.priced + found.variants)} priced in full)"
    )
    if found.pipelines:
        proofs = f", {found.programmes} integer programmes" if found.programmes else ""
        others = f"; no other split more than {found.uneven_gap:.1%} faster" if found.uneven_gap >= 0.0005 else ""
        yield Text(f"splits of {format_count(found.pipelines)} pipelines: {format_count(found.opened)} solved{proofs}{others}")
    names = {
        "memory": "too large for the device",
        "slower": "slower (by bound or by subset)",
        "excluded": "excluded by --pin / --forbid",
    }
    shown = sorted(found.rejected.items(), key=lambda kv: -kv[1])
    parts = [f"{names.get(reason, reason)} {format_count(count)}" for reason, count in shown]
    yield Text("passed over: " + ", ".join(parts), style="dim")


def _gap(found: Certificate) -> str:
    return f"no other more than {found.gap:.1%} faster" if found.gap >= 0.0005 else "gap 0%"


def tie_lines(plan: Plan) -> Iterable[Text]:
    """Which of the plans that lost are as good as this one, and what would tell."""
    sigmas = [r.sigma for r in plan.runners_up if r.tie]
    if not sigmas:
        return
    low, high = f"{min(sigmas):.1%}", f"{max(sigmas):.1%}"
    said = f"sigma {low}" if low == high else f"sigma {low} to {high}"
    yield Text(
        f"tie within the noise: {len(sigmas)} of the next {len(plan.runners_up)} plans may be as fast ({said} of the ratio)"
    )
    if plan.measure is not None:
        yield Text(f"to tell this plan from {plan.measure.against}: {plan.measure.run}", style="dim")


def comparison_lines(found: Comparison) -> Iterable[Text]:
    """Whether two plans differ by more than noise."""
    ratio, sigma = f"{math.expm1(found.log_ratio):+.1%}", f"sigma {found.sigma:.1%} of the ratio"
    if found.tie:
        yield Text(f"tie within the noise: the other takes {ratio} GPU time, {sigma}", style="yellow")
    else:
        yield Text(f"no tie: the other takes {ratio} GPU time, {sigma}")
    if not found.shared:
        yield Text(
            "the plans do not share model, device, precision and software, so that their errors do not cancel", style="dim"
        )
    if found.tie and found.measurement is not None:
        yield Text(f"to tell them apart: {found.measurement.run}", style="dim")


def time_bars(time_s: Breakdown) -> Table:
    """Parts of the step time as bars, largest first."""
    return _bars([(name, float(value)) for name, value in time_s], format_seconds, "step time")


def _bars(parts: list[tuple[str, float]], fmt: Callable[[float], str], heading: str) -> Table:
    total = sum(v for _, v in parts)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"{heading} {fmt(total)}", min_width=34)
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    table.add_column("")
    shown = sorted((p for p in parts if p[1] > 0.0005 * total), key=lambda p: -p[1])
    most = max((v for _, v in shown), default=1.0)
    for i, (name, value) in enumerate(shown):
        bar = Text("█" * max(1, round(BAR * value / most)), style=COLOURS[i % len(COLOURS)])
        table.add_row(name, fmt(value), f"{value / total:.1%}", bar)
    return table


def memory_table(plan: Plan) -> Table:
    """Memory of the pipeline stages by part; stages that hold the same stand in one row, as the fullest of them."""
    names = list(dict.fromkeys(n for s in plan.stages for n, v in s.parts if float(v) > 0.005 * GIB))
    table = Table(
        title="peak memory by pipeline stage, GiB", title_justify="left", box=None, pad_edge=False, header_style="dim"
    )
    table.add_column("stage", no_wrap=True)
    table.add_column("holds", overflow="fold", max_width=26)
    table.add_column("micro-batch", justify="right", no_wrap=True)
    for name in names:
        table.add_column(_SHORT.get(name, name), justify="right", no_wrap=True)
    table.add_column("peak", justify="right", style="bold")
    table.add_column("of device", no_wrap=True)
    device = plan.problem.device_bytes
    for first, last, stage, seconds in _stage_groups(plan):
        peak = float(stage.parts.total)
        filled = min(10, round(10 * peak / device))
        style = "red" if plan.problem.excess_bytes(peak) > 0 else "green" if peak < 0.85 * device else "yellow"
        bar = Text("█" * filled + "░" * (10 - filled), style=style)
        cells = [f"{float(stage.parts.parts.get(n, 0.0)) / GIB:.1f}" for n in names]
        ranks = str(first) if first == last else f"{first}-{last}"
        table.add_row(ranks, _short(stage.chunks), format_seconds(seconds), *cells, f"{peak / GIB:.1f}", bar)
    return table


_SHORT = {
    "optimizer states": "optimizer",
    "gathered weights": "gathered",
    "wgrad buffers": "wgrad buf",
    "working set": "working",
    "logits and loss": "logits",
}
"""Narrow column heads for parts of memory."""


def _stage_groups(plan: Plan) -> list[tuple[int, int, StageMemory, float]]:
    """First and last rank of each run of stages that hold the same, the fullest stage of the run and its seconds."""
    out: list[tuple[int, int, StageMemory, float]] = []
    keys: list[tuple[object, ...]] = []
    for stage, seconds in zip(plan.stages, plan.stage_s, strict=True):
        key = (_short(stage.chunks), round(seconds, 9), stage.parts.parts.get("weights"))
        if keys and keys[-1] == key:
            first, _, fullest, time_s = out[-1]
            more = stage if float(stage.parts.total) > float(fullest.parts.total) else fullest
            out[-1] = (first, stage.rank, more, time_s)
        else:
            keys.append(key)
            out.append((stage.rank, stage.rank, stage, seconds))
    return out


def _short(chunks: tuple[str, ...]) -> str:
    """Chunks with runs of letters counted: ("Ettt", "ttt") -> "E 3t | 3t"."""
    out = []
    for chunk in chunks:
        words = ["E"] if "E" in chunk else []
        if chunk.count("t"):
            words.append(f"{chunk.count('t')}t")
        words += [letter for letter in "mL" if letter in chunk]
        out.append(" ".join(words) or "-")
    if len(out) > 4 and len(set(out[1:-1])) == 1:
        return f"{out[0]} | {len(out) - 2} x ({out[1]}) | {out[-1]}"
    return " | ".join(out)


def bindings_table(bindings: list[Binding]) -> Table:
    """What limits a plan."""
    table = Table(title="what binds", title_justify="left", box=None, pad_edge=False, show_header=False)
    for binding in bindings:
        table.add_row(binding.what, f"{binding.share:.0%}", binding.detail)
    return table


def neighbours_table(plan: Plan, neighbours: list[Neighbour]) -> Table:
    """One step away in every degree."""
    table = Table(
        title="one step away (the rest chosen anew)", title_justify="left", box=None, pad_edge=False, header_style="dim"
    )
    for name in ("change", "step", "against this plan", "how, or why not"):
        table.add_column(name, overflow="fold")
    for n in neighbours:
        change = f"{n.field} {getattr(plan.layout, n.field)} -> {n.value}"
        if n.best is None:
            table.add_row(change, "-", Text(n.verdict, style="red"), n.reason)
            continue
        share = n.step_s / plan.step_s - 1
        x = n.best.layout
        how = f"micro {x.micro_batch}, VPP{x.vpp}, recompute {x.recompute_text()}"
        if x.dispatcher != "none":
            how += f", {x.dispatcher}{' overlap' if x.ep_overlap else ''}"
        style = "green" if share < 0 else "yellow" if share < 0.05 else ""
        against = f"{share:+.1%}, tie (sigma {n.sigma:.1%})" if n.tie else f"{share:+.1%}"
        table.add_row(change, format_seconds(n.step_s), Text(against, style=style), how)
    return table


def schedules_table(plan: Plan, schedules: list[Alternative]) -> Table:
    """The plan under every schedule of its MoE layers."""
    groups = ", ".join(f"layers {g.layers}" for g in layer_groups(plan.problem, plan.layout))
    table = Table(
        title=f"MoE schedules, all else equal ({groups})",
        title_justify="left", box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for name in ("schedule", "exposed exchange", "step", "against this plan", "against plain", "runs on"):
        table.add_column(name, justify="left" if name in ("schedule", "runs on") else "right", overflow="fold")
    for a in schedules:
        where = ", ".join(a.runs_on) or "research"
        if a.chosen:
            where = f"{where}: this plan"
        elif a.broken:
            where = f"{where}, not here: {a.broken}"
        shares = [round(a.step_s / other - 1, 6) + 0.0 for other in (plan.step_s, schedules[0].step_s)]
        exposed = f"{format_seconds(a.exposed_s)} a layer"
        against = [Text(f"{share:+.1%}", style="green" if share < -0.0005 else "") for share in shares]
        table.add_row(a.name, exposed, format_seconds(a.step_s), *against, where, style="bold" if a.chosen else None)
    return table


def gradient_line(found: GradientWindows, plan: Plan) -> Text:
    """What partitioning the gradients would bring, in a line."""
    now = format_seconds(float(plan.time.parts.get("data-parallel exchange", 0.0)))
    whole, greedy, best = (format_seconds(s) for s in (found.alone_s, found.greedy_s, found.exposed_s))
    return Text(
        f"gradients: {whole} of reduction on stage {found.stage}; cut into the windows of its last backward (FSMoE, research) "
        f"{best} stays exposed, {greedy} if cut greedily; this plan has {now} of data-parallel exchange",
        style="dim",
    )


def difference_table(first: Plan, second: Plan, rows: list[tuple[str, float, float]]) -> Table:
    """Two plans side by side."""
    table = Table(title="step time side by side", title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("part")
    for name in (f"this: {first.layout.degrees()}", f"other: {second.layout.degrees()}", "difference"):
        table.add_column(name, justify="right", overflow="fold")
    for name, a, b in rows:
        table.add_row(name, format_seconds(a), format_seconds(b), f"{'+' if b >= a else '-'}{format_seconds(abs(b - a))}")
    delta = second.step_s / first.step_s - 1
    table.add_row("total", format_seconds(first.step_s), format_seconds(second.step_s), f"{delta:+.1%}", style="bold")
    table.add_row("peak memory", format_bytes(first.peak_bytes), format_bytes(second.peak_bytes), "")
    return table


def plan_summary(plan: Plan) -> Iterable[Text]:
    """A plan in three lines."""
    x = plan.layout
    yield Text(title(plan), style="bold")
    yield Text(
        f"{x.degrees()}, micro-batch {x.micro_batch}, recompute {x.recompute_text()}, {dispatch_text(plan)}"
        + (f", split {x.stages}" if x.stages else "")
    )
    yield Text(
        f"step {format_seconds(plan.step_s)} (80 % of runs: {format_seconds(plan.low_s)} to {format_seconds(plan.high_s)}), "
        f"{plan.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {plan.model_flops_per_s / TERA:,.0f} TFLOP/s/GPU, "
        f"MFU {plan.mfu:.1%} of bf16 peak"
    )
    fit = "fits" if plan.excess_bytes <= 0 else f"DOES NOT FIT: {format_bytes(plan.excess_bytes)} too much"
    yield Text(
        f"peak {format_bytes(plan.peak_bytes)} allocated on stage {plan.fullest.rank} "
        f"of {format_bytes(plan.problem.device_bytes)}: {fit}",
        style="red" if plan.excess_bytes > 0 else "",
    )
