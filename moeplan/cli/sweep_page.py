"""A sweep as one self-contained web page: step time, throughput and cost over every axis, and the table of all points.

A line joins points that differ in one axis alone; its colour is another axis. Where that would be too many lines, each colour
shows the best over all axes that are left. Heights are logarithmic, and so are axes of numbers. The pointer on a dot tells its
plan.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.cli.page import SERIES, page
from moeplan.cli.plot_terminal import Axis
from moeplan.cli.render_sweep import HEADS, bests, named, plan_text, shown, summary_lines
from moeplan.planner.sweeps.answer import Answer
from moeplan.planner.sweeps.store import Row
from moeplan.planner.sweeps.sweep import Sweep
from moeplan.units import GIB, format_seconds

WIDTH, HEIGHT = 480, 250
"""Size of a plot in units of the picture."""
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 8, 22
LINES = 36
"""More lines are replaced by the best of each colour."""
LABELS = 9
"""Most values that are written below a plot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Figure:
    """A quantity that is plotted."""

    title: str
    of: Callable[[Answer], float]
    text: Callable[[float], str]
    sign: float = 1.0
    """-1: more is better."""


_FIGURES = (
    _Figure(title="step time", of=lambda a: a.step_s, text=format_seconds),
    _Figure(
        title="tokens/s/GPU",
        of=lambda a: a.tokens_per_s_per_gpu,
        text=lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}",
        sign=-1.0,
    ),
    _Figure(title="cost of 10^12 tokens", of=lambda a: a.cost, text=lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """Points along one axis."""

    colour: int
    rows: Sequence[Row]


def sweep_page(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The page."""
    return page(f"sweep {sweep.name}", _body(sweep, rows))


def _body(sweep: Sweep, rows: Sequence[Row]) -> Iterator[str]:
    yield f"<h1>{html.escape(sweep.name)}</h1>"
    yield f'<p class="dim">{html.escape(named(sweep.question))}</p>'
    yield from (f"<p>{html.escape(line.plain)}</p>" for line in summary_lines(sweep, rows))
    solved = [row for row in rows if row.answer is not None and row.answer.layout]
    for axis, values in sweep.axes.items():
        if len({_key(row.point[axis]) for row in solved}) < 2:
            continue
        colour, lines, best = _lines(sweep, solved, axis)
        yield f"<h2>over {html.escape(HEADS.get(axis, axis))}</h2>"
        if best:
            yield '<p class="dim">Lines join the best points over all axes that are not shown.</p>'
        if colour:
            yield f"<p>{html.escape(HEADS.get(colour, colour))}: {_keys(sweep.axes[colour])}</p>"
        yield '<div class="plots">'
        for figure in _FIGURES:
            if any(figure.of(_answer(row)) for row in solved):
                yield _picture(figure, axis, values, [_best(figure, axis, line) if best else line for line in lines])
        yield "</div>"
    yield "<h2>points</h2>"
    yield from _table(sweep, rows)


def _lines(sweep: Sweep, solved: Sequence[Row], axis: str) -> tuple[str, list[_Line], bool]:
    """The axis that gives the colours, lines along `axis`, and whether they hold more than a point a value."""
    others = [name for name, values in sweep.axes.items() if name != axis and len(values) > 1]
    colour = next((name for name in others if len(sweep.axes[name]) <= SERIES), "")
    keys = [name for name in others if name != colour]
    places = [_key(value) for value in sweep.axes[colour]] if colour else []

    def of(row: Row) -> int:
        return places.index(_key(row.point[colour])) if colour else 0

    apart: dict[tuple[Any, ...], list[Row]] = {}
    for row in solved:
        apart.setdefault((of(row), *(_key(row.point[name]) for name in keys)), []).append(row)
    if len(apart) <= LINES:
        return colour, [_Line(colour=key[0], rows=some) for key, some in apart.items()], False
    groups = itertools.groupby(sorted(solved, key=of), of)
    return colour, [_Line(colour=i, rows=list(some)) for i, some in groups], True


def _best(figure: _Figure, axis: str, line: _Line) -> _Line:
    """The best point of a line at every value of its axis."""
    by_value: dict[Any, list[Row]] = {}
    for row in line.rows:
        if figure.of(_answer(row)):
            by_value.setdefault(_key(row.point[axis]), []).append(row)
    best = [min(some, key=lambda r: figure.sign * figure.of(_answer(r))) for some in by_value.values()]
    return _Line(colour=line.colour, rows=best)


def _picture(figure: _Figure, axis: str, values: Sequence[Any], lines: Sequence[_Line]) -> str:
    heights = np.array([figure.of(_answer(row)) for line in lines for row in line.rows])
    name = f"{figure.title} over {HEADS.get(axis, axis)}"
    return (
        f"<figure><h3>{html.escape(figure.title)}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + BOTTOM}" role="img" aria-label="{html.escape(name)}">'
        f"{''.join(_plot(figure, axis, values, lines, Axis(heights)))}</svg></figure>"
    )


def _plot(figure: _Figure, axis: str, values: Sequence[Any], lines: Sequence[_Line], y: Axis) -> Iterator[str]:
    across = _across(values)

    def up(value: float) -> float:
        return TOP + (1.0 - float(y.share(value))) * (HEIGHT - TOP)

    for tick in y.ticks(8):
        yield f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{up(tick) + 3.5:.1f}" text-anchor="end">{html.escape(_round(figure.text(tick)))}</text>'
    every = -(-len(values) // LABELS)
    for i, value in enumerate(values):
        if i % every == 0:
            right = across[_key(value)]
            yield f'<path class="grid" d="M{right:.1f} {TOP}V{HEIGHT}"/>'
            yield f'<text x="{right:.1f}" y="{HEIGHT + 14}" text-anchor="middle">{html.escape(shown(value)[:14])}</text>'
    places = sorted(across, key=lambda key: across[key])
    for line in lines:
        dots = sorted((places.index(_key(r.point[axis])), r.place, r) for r in line.rows if figure.of(_answer(r)))
        spots = [(across[places[i]], up(figure.of(_answer(row)))) for i, _, row in dots]
        colour = line.colour % SERIES
        for before, after, ends in zip(dots, dots[1:], itertools.pairwise(spots), strict=False):
            if after[0] == before[0] + 1:  # a value without a plan breaks the line
                (a, b), (c, d) = ends
                yield f'<path class="line l{colour}" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"/>'
        for (a, b), (_, _, row) in zip(spots, dots, strict=True):
            tip = f"{named(row.point)}\n{figure.title} {figure.text(figure.of(_answer(row)))}\n{plan_text(_answer(row))}"
            yield f'<circle class="dot f{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{html.escape(tip)}</title></circle>'
    yield f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP}"/>'


def _across(values: Sequence[Any]) -> dict[Any, float]:
    """Where the values of an axis stand: numbers above 0 by their logarithm, others side by side."""
    room = WIDTH - LEFT - RIGHT - 24
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values)
    at = np.log(np.array(values, float)) if numbers else np.arange(len(values), dtype=float)
    shares = (at - at.min()) / max(float(at.max() - at.min()), 1e-12)
    return {_key(v): LEFT + 12 + room * float(share) for v, share in zip(values, shares, strict=True)}


def _table(sweep: Sweep, rows: Sequence[Row]) -> Iterator[str]:
    """All points; the best of each model in green."""
    best = {row.place for row in bests(sweep, rows)}
    heads = [
        *(HEADS.get(n, n) for n in sweep.axes),
        "step",
        "80 % of runs",
        "tokens/s/GPU",
        "MFU",
        "peak GiB",
        "per 10^12 tokens",
    ]
    yield f'<div class="wide"><table><tr>{"".join(f"<th>{html.escape(h)}</th>" for h in heads)}<th class="left">plan</th></tr>'
    for row in rows:
        cells = [shown(value) for value in row.point.values()]
        a = row.answer
        if a is not None and a.layout:
            cells += [format_seconds(a.step_s), f"{format_seconds(a.low_s)} - {format_seconds(a.high_s)}"]
            cells += [f"{a.tokens_per_s_per_gpu:,.0f}", f"{a.mfu:.1%}", f"{a.peak_bytes / GIB:.1f}"]
            cells += [f"{a.cost:,.0f}" if a.cost else ""]
        else:
            cells += [""] * 6
        said = "not solved yet" if a is None else plan_text(a)
        style = "green" if row.place in best else "" if a is not None and a.layout else "dim"
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        yield f'<tr class="{style}">{line}<td class="left">{html.escape(said)}</td></tr>'
    yield "</table></div>"


def _keys(values: Sequence[Any]) -> str:
    return "".join(f'<span class="key"><i class="b{i}"></i>{html.escape(shown(v))}</span>' for i, v in enumerate(values))


def _answer(row: Row) -> Answer:
    assert row.answer is not None
    return row.answer


def _key(value: Any) -> Any:
    """A value of an axis as a key of a mapping."""
    return tuple(value) if isinstance(value, list) else value


def _round(text: str) -> str:
    """A tick without the zeros that say how exact a measurement is."""
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".strip()
