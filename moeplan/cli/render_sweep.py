"""What people see of a sweep: a line a point in the order of the axes, what is best, and the question of the best as a command.

Units change here: bytes become GiB. On narrow terminals the interval gives way.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from moeplan.cli.render import Progress
from moeplan.planner.plan_data import read_layout
from moeplan.planner.question import Question
from moeplan.planner.sweeps.answer import Answer
from moeplan.planner.sweeps.run import Stand, best_of
from moeplan.planner.sweeps.store import Row
from moeplan.planner.sweeps.sweep import Point, Sweep
from moeplan.units import GIB, format_seconds

WIDE = 112
"""Columns from which on the interval is shown."""
REASONS = 6
"""Most reasons that are listed."""
HEADS = {
    "global_batch": "batch", "seq_len": "seq", "price_per_gpu_hour": "price", "memory_limit": "limit", "imbalance": "imbal.",
    "no_mtp": "no MTP", "gpus": "GPUs", "precision": "prec.",
}  # fmt: skip
"""Axes whose columns are called otherwise."""
LESS = {"infeasible": "no plan", "refused": "refused", "failed": "failed"}
"""Ends of a point without a plan."""
_BELOW = ("refused", "failed")
"""Ends whose reasons stand below the table: many points share them."""
_STYLES = {"infeasible": "yellow", "refused": "dim", "failed": "red"}


class SweepBar(Progress):
    """A progress bar of points that also says the best so far."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__("points", enabled=enabled)

    def stand(self, stand: Stand) -> None:
        """Show how far a sweep is."""
        if stand.best is not None and stand.best.answer is not None:
            best = f"{stand.best.answer.tokens_per_s_per_gpu:,.0f} tokens/s/GPU: {named(stand.best.point)}"
            self.label = f"points (best so far {best})"
        self.report(stand.counts.done, stand.counts.total)
        if isinstance(self.bar, RichProgress):
            self.bar.update(self.bar.task_ids[0], description=self.label)


def shown(value: Any) -> str:
    """A value of an axis."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def named(point: Point) -> str:
    """A point in words."""
    return ", ".join(f"{HEADS.get(name, name)} {shown(value)}" for name, value in point.items())


def plan_text(answer: Answer, *, short: bool = False) -> str:
    """The best layout of a point, without its recompute if short; or why there is none."""
    if not answer.layout:
        return f"{LESS[answer.status]}: {answer.reason}"
    layout = read_layout(answer.layout, "the sweep")
    recompute = "" if short or not layout.recompute else f", recompute {layout.recompute_text()}"
    return f"{layout.degrees()}, micro {layout.micro_batch}{recompute}"


def sweep_table(sweep: Sweep, rows: Sequence[Row], width: int) -> Table:
    """A line a point; the best of each model stands out."""
    priced = any(row.answer is not None and row.answer.cost for row in rows)
    title = f"{_title(sweep)}; cost of 10^12 tokens" if priced else _title(sweep)
    table = Table(title=title, title_style="bold", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name, values in sweep.axes.items():
        number = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        table.add_column(HEADS.get(name, name), justify="right" if number else "left", no_wrap=number)
    table.add_column("best plan", min_width=12)
    heads = ("step", *(["80 % of runs"] if width >= WIDE else []), "tok/s/GPU", "GiB", *(["cost"] if priced else []))
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    best = {row.place for row in bests(sweep, rows)}
    for row in rows:
        answer = row.answer
        cells = [shown(value) for value in row.point.values()]
        if answer is None:
            table.add_row(*cells, "not solved yet", style="dim")
            continue
        cells.append(answer.status if answer.status in _BELOW else plan_text(answer, short=True))
        if not answer.layout:
            table.add_row(*cells, style=_STYLES[answer.status])
            continue
        cells.append(format_seconds(answer.step_s))
        if width >= WIDE:
            cells.append(f"{format_seconds(answer.low_s)} - {format_seconds(answer.high_s)}")
        cells += [f"{answer.tokens_per_s_per_gpu:,.0f}", f"{answer.peak_bytes / GIB:.1f}"]
        if priced:
            cells.append(f"{answer.cost:,.0f}" if answer.cost else "-")
        table.add_row(*cells, style="bold green" if row.place in best else None)
    return table


def bests(sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """The point of most tokens/s/GPU of each model."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(str(row.point.get("model", "")), []).append(row)
    return [best for some in by_model.values() if (best := best_of(some)) is not None]


def cheapest(rows: Sequence[Row]) -> Row | None:
    """The point of least cost, among those whose price is known."""
    priced = [(row.answer.cost, row) for row in rows if row.answer is not None and row.answer.cost]
    return min(priced, key=lambda found: found[0])[1] if priced else None


def summary_lines(sweep: Sweep, rows: Sequence[Row]) -> Iterator[Text]:
    """How the points ended, and the best."""
    ends = Counter("open" if row.answer is None else row.answer.status for row in rows)
    words = {
        "solved": "with a plan",
        "infeasible": "where no plan fits",
        "refused": "refused",
        "failed": "failed",
        "open": "open",
    }
    counts = ", ".join(f"{ends[status]:,} {word}" for status, word in words.items() if ends[status])
    spent = sum(row.answer.seconds for row in rows if row.answer is not None)
    yield Text(f"{len(rows):,} points: {counts}; {format_seconds(spent)} of solving", style="dim")
    why = Counter(
        (row.answer.status, row.answer.reason) for row in rows if row.answer is not None and row.answer.status in _BELOW
    )
    for (status, reason), count in why.most_common(REASONS):
        yield Text(f"{status} ({count:,}): {reason}", style=_STYLES[status])
    if len(why) > REASONS:
        yield Text(f"and {len(why) - REASONS:,} further reasons, see --csv", style="dim")
    for row in bests(sweep, rows):
        assert row.answer is not None
        yield Text(f"most tokens/s/GPU: {row.answer.tokens_per_s_per_gpu:,.0f} with {named(row.point)}")
    if "model" not in sweep.axes and (cheap := cheapest(rows)) is not None and cheap.answer is not None:
        yield Text(f"least cost: {cheap.answer.cost:,.0f} per 10^12 tokens with {named(cheap.point)}")


def command(sweep: Sweep, point: Point) -> str:
    """The `moeplan solve` that asks the question of a point; empty where its cluster is cut to a count of GPUs."""
    question = sweep.question_of(point)
    if question.gpus and not question.device:
        return ""
    problem = sweep.problem_of(point, lambda text: None)
    price = problem.profile.cluster.price_per_gpu_hour
    cluster = f"{question.device}x{question.gpus}" if question.device else question.cluster
    asked = dataclasses.replace(question, cluster=cluster, device="", gpus=0, price_per_gpu_hour=price)
    words = ["moeplan", "solve"]
    for field in dataclasses.fields(Question):
        value = getattr(asked, field.name)
        option = f"--{field.name.replace('_', '-')}"
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(option)
        else:
            words += [
                word
                for one in (value if isinstance(value, tuple) else (value,))
                for word in (option, f"{one:g}" if isinstance(one, float) else str(one))
            ]
    return shlex.join(words)


def sweep_data(sweep: Sweep, rows: Sequence[Row]) -> dict[str, Any]:
    """All of it as plain data."""
    points: list[Mapping[str, Any]] = []
    for row in rows:
        found = {} if row.answer is None else {k: v for k, v in dataclasses.asdict(row.answer).items() if v not in ("", {})}
        points.append({"point": dict(row.point), "status": "open", **found})
    return {
        "sweep": sweep.name,
        "question": dict(sweep.question),
        "axes": {n: list(v) for n, v in sweep.axes.items()},
        "points": points,
    }


def _title(sweep: Sweep) -> str:
    fixed = ", ".join(f"{HEADS.get(name, name)} {shown(value)}" for name, value in sweep.question.items())
    return f"{sweep.name}: {fixed}" if fixed else sweep.name
