"""What people see of a front: the plans that save GPUs, those that save memory, and step time against each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.options import print_json, progress_bar
from moeplan.cli.render import console, title
from moeplan.planner.pareto import Front, Point, front
from moeplan.planner.plan_data import layout_data
from moeplan.planner.problem import Problem
from moeplan.units import GIB, HOUR_S, format_count, format_seconds

MOST_ROWS = 12
"""Plans of one table; of more the first, the last and some between are shown."""
HEIGHT, WIDTH = 8, 78
"""Rows of a plot, and its columns at most."""
_LABEL = 8
"""Columns of the labels on the left."""


def data(found: Front) -> dict[str, Any]:
    """The same for machines."""
    return {
        "counts": list(found.counts),
        "searches": found.searches,
        "considered": found.considered,
        "points": [_point_data(p) for p in found.points],
    }


def _point_data(point: Point) -> dict[str, Any]:
    plan = point.plan
    return {
        "gpus": point.gpus,
        "step_s": point.step_s,
        "step_low_s": plan.low_s,
        "step_high_s": plan.high_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "gpu_hours_per_trillion_tokens": 1e12 / plan.tokens_per_s_per_gpu / HOUR_S,
        "cost_per_trillion_tokens": point.cost or None,
        "peak_bytes": plan.peak_bytes,
        "free_bytes": point.free_bytes,
        "memory_limit_bytes": point.limit_bytes,
        "layout": layout_data(plan.layout),
    }


def report(problem: Problem, as_json: bool) -> None:
    """Find the front of a problem and print it."""
    with progress_bar("searching the front") as progress:
        found = front(problem, progress)
    if as_json:
        print_json(data(found))
    else:
        show(found)


def show(found: Front) -> None:
    """Print the plans that save GPUs and those that save memory, each with a plot."""
    out = console()
    fastest, by_gpus, by_memory = found.by_memory[0], found.by_gpus, found.by_memory
    out.print(Text(title(fastest.plan), style="bold"))
    out.print(_table(f"fastest by GPUs; the others of {len(found.counts)} counts gain nothing", by_gpus, found, sized=True))
    if len(by_gpus) > 1:
        steps = [p.step_s for p in by_gpus]
        for line in scatter("step over GPUs", [p.gpus for p in by_gpus], steps, str, math.log, out.width):
            out.print(line)
    if len(by_memory) > 1:
        out.print()
        out.print(_table(f"fastest by memory, on {fastest.gpus} GPUs", by_memory, found))
        peaks, steps = [p.plan.peak_bytes / GIB for p in by_memory], [p.step_s for p in by_memory]
        for line in scatter("step over peak GiB", peaks, steps, "{:.0f}".format, float, out.width):
            out.print(line)
    out.print(
        f"no plan is better than one of these {len(found.points)} in everything, gap 0%: {found.searches} searches of "
        f"{format_count(found.considered)} layouts"
    )
    out.print(
        Text("a plan of these: the same question with its GPUs as --cluster, or with --memory-limit as in --json", style="dim")
    )


def _table(heading: str, points: Sequence[Point], found: Front, *, sized: bool = False) -> Table:
    priced = bool(points[0].cost)
    left_out = len(points) - MOST_ROWS
    if left_out > 0:
        heading += f" ({left_out} of {len(points)} plans not shown, --json has all)"
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, header_style="dim")
    if sized:
        table.add_column("GPUs", justify="right", no_wrap=True)
    for name in ("layout", "recompute"):
        table.add_column(name, overflow="fold")
    for name in ("step", "tok/s/GPU", *(["per 10^12 tok"] if priced else []), "peak GiB", "free"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in _some(points):
        plan = point.plan
        marks = [m for m, p in (("fastest", found.by_memory[0]), ("cheapest", found.cheapest)) if p is point]
        table.add_row(
            *([str(point.gpus)] if sized else []),
            plan.layout.degrees(),
            " ".join(plan.layout.recompute) or "-",
            format_seconds(point.step_s),
            f"{plan.tokens_per_s_per_gpu:,.0f}",
            *([f"{point.cost:,.0f}"] if priced else []),
            f"{plan.peak_bytes / GIB:.1f}",
            f"{point.free_bytes / GIB:.1f}",
            ", ".join(marks),
            style="bold green" if "fastest" in marks else None,
        )
    return table


def _some(points: Sequence[Point]) -> list[Point]:
    """The first, the last and evenly placed points between, `MOST_ROWS` at most."""
    count = min(MOST_ROWS, len(points))
    places = sorted({round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)})
    return [points[i] for i in places]


def scatter(
    name: str,
    xs: Sequence[float],
    seconds: Sequence[float],
    label: Callable[[Any], str],
    scale: Callable[[float], float],
    width: int,
    *,
    value: Callable[[float], str] = format_seconds,
) -> Iterator[Text]:
    """Points of times, or of another `value`, between the least and the greatest of both; `scale` is that of both axes."""
    columns = min(width, WIDTH) - _LABEL - 1
    right = _places([scale(x) for x in xs], columns)
    down = [HEIGHT - 1 - row for row in _places([scale(s) for s in seconds], HEIGHT)]
    cells = [[" "] * columns for _ in range(HEIGHT)]
    for row, column in zip(down, right, strict=True):
        cells[row][column] = "●"
    labels = {0: value(max(seconds)), HEIGHT - 1: value(min(seconds))}
    yield Text(f"{name}", style="dim")
    for row, marks in enumerate(cells):
        line = Text(f"{labels.get(row, ''):>{_LABEL}}{'┤' if row in labels else '│'}", style="dim")
        yield line.append("".join(marks).rstrip(), "not dim green")
    yield Text(" " * _LABEL + "└" + "─" * columns, style="dim")
    axis = ""
    for column, x in sorted(zip(right, xs, strict=True)):
        text = label(x)
        begin = min(max(0, column - len(text) // 2), columns - len(text))
        if begin > len(axis) or not axis:
            axis = f"{axis:<{begin}}{text}"
    yield Text(" " * (_LABEL + 1) + axis, style="dim")


def _places(values: Sequence[float], count: int) -> list[int]:
    """Places of values among `count` between the least and the greatest."""
    low, high = min(values), max(values)
    return [round((v - low) / ((high - low) or 1.0) * (count - 1)) for v in values]
