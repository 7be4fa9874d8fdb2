"""A profile as one self-contained web page: curves against samples, residuals below them, and every parameter.

Each picture is SVG that stands in the page; nothing is loaded from elsewhere and nothing runs. Both axes are logarithmic; below
them lies, over the same axis of work, how far the curve is from each sample. The pointer on a sample tells its shape and times.
"""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moeplan.cli.page import page
from moeplan.cli.plot_terminal import COLOURS, Axis, rate_label, rate_name, work_label, work_ticks
from moeplan.cli.profile_views import FAMILIES, View, line_of, panels
from moeplan.cli.render_profile import heading, link_lines, origin_of, parameter_columns, remarks, shape_of, valid_range
from moeplan.profiles.profile import Profile
from moeplan.units import format_seconds

WIDTH, HEIGHT, STRIP = 480, 250, 90
"""Size of a plot, and height of its residuals, in units of the picture."""
LEFT, RIGHT, TOP, BOTTOM, GAP = 46, 8, 8, 22, 14
DENSE = 40
"""Samples from which on a curve has a plot of its own."""
OFF = np.log(2.0)
"""The residuals reach from half to twice; what is further off lies on the edge."""


def profile_page(profile: Profile, shown: Sequence[View]) -> str:
    """The page."""
    return page(f"profile {profile.name} of {profile.cluster.name}", _body(profile, shown))


def _body(profile: Profile, shown: Sequence[View]) -> Iterator[str]:
    first, *rest = heading(profile, datetime.datetime.now(datetime.UTC))
    yield f"<h1>{html.escape(first.plain)}</h1>"
    yield from (f"<p>{html.escape(line.plain)}</p>" for line in rest)
    yield from (f'<p class="yellow">{html.escape(text)}</p>' for text in remarks(profile, shown))
    yield '<p class="dim">Lines are curves, dots samples; below, how far the curve is above or below each sample.</p>'
    for family, title in FAMILIES.items():
        some = [view for view in shown if view.family == family]
        if not some:
            continue
        yield f'<h2>{html.escape(title)}</h2><div class="plots">'
        yield from (_figure(part) for views in panels(some).values() for part in _apart(views))
        yield "</div>"
        yield from _table([view for view in some if not view.name.endswith(" backward")], profile)
    yield "<h2>Memory, links, factors</h2><table>"
    for name, value in link_lines(profile):
        yield f'<tr><td class="dim">{html.escape(name)}</td><td class="left">{html.escape(value)}</td></tr>'
    yield "</table>"


# ---------------------------------------------------------------- pictures


def _apart(shown: list[View]) -> list[list[View]]:
    """Curves that share a plot, each in its own where samples would hide one another; those without samples stay together."""
    dense = [view for view in shown if len(view.samples) > DENSE]
    others = [view for view in shown if view not in dense]
    return [shown] if len(shown) == 1 or not dense else [*([view] for view in dense), *([others] if others else [])]


def _figure(shown: Sequence[View]) -> str:
    sampled = any(view.samples for view in shown)
    x = Axis(np.concatenate([np.concatenate([v.line_work, v.work]) for v in shown]))
    parts = [*_plot(shown, x), *(_strip(shown, x) if sampled else ())]
    height = HEIGHT + (GAP + STRIP if sampled else 0) + BOTTOM
    over = "bytes" if shown[0].unit == "bytes" else "FLOP"
    keys = "".join(
        f'<span class="key"><i class="b{i % len(COLOURS)}"></i>{html.escape(view.label)}</span>' for i, view in enumerate(shown)
    )
    name = shown[0].panel if len(shown) > 1 else f"{shown[0].panel}, {shown[0].label}"
    lines = " | ".join(dict.fromkeys(line_of(view) for view in shown))
    legend = (f"<p>{keys}</p>" if len(shown) > 1 else "") + (f'<p class="dim">line: {html.escape(lines)}</p>' if lines else "")
    return (
        f'<figure><h3>{html.escape(name)} <span class="dim">{rate_name(shown)} over {over}</span></h3>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(name)}">{"".join(parts)}'
        f"{''.join(_work_axis(shown, x, height - BOTTOM))}</svg>{legend}</figure>"
    )


def _plot(shown: Sequence[View], x: Axis) -> Iterator[str]:
    y = Axis(np.concatenate([np.concatenate([v.line_rate, v.rate]) for v in shown]))

    def up(rates: Any) -> Any:
        return TOP + (1.0 - y.share(rates)) * (HEIGHT - TOP)

    for rate in y.ticks(8):
        at = float(up(rate))
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{rate_label(rate)}</text>'
    yield from _verticals(shown, x, TOP, HEIGHT)
    for i, view in enumerate(shown):
        yield from _dots(view, i, _right(x, view.work), up(view.rate))
    for i, view in enumerate(shown):
        points = zip(_right(x, view.line_work).tolist(), up(view.line_rate).tolist(), strict=True)
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        yield f'<path class="line l{i % len(COLOURS)}" d="M{path}"/>'
    yield f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP}"/>'


def _strip(shown: Sequence[View], x: Axis) -> Iterator[str]:
    """Residuals over the axis of work, in logs."""
    top = HEIGHT + GAP

    def up(off: Any) -> Any:
        return top + (0.5 - np.clip(np.log1p(off), -OFF, OFF) / (2.0 * OFF)) * STRIP

    for off in (-0.5, -0.2, 0.0, 0.2, 1.0):
        at = float(up(off))
        yield f'<path class="{"grid" if off else "zero"}" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{f"{off:+.0%}" if off else "0"}</text>'
    yield from _verticals(shown, x, top, top + STRIP)
    for i, view in enumerate(shown):
        if view.samples:
            yield from _dots(view, i, _right(x, view.work), up(view.residuals))


def _dots(view: View, i: int, across: Any, down: Any) -> Iterator[str]:
    for sample, a, b, curve_s in zip(view.samples, across, down, view.curve_s, strict=True):
        off = f"{curve_s / sample.seconds - 1.0:+.1%}"
        times = f"measured {format_seconds(sample.seconds)}, curve {format_seconds(float(curve_s))} ({off})"
        tip = html.escape(f"{view.label}: {shape_of(sample.sizes)}\n{times}\n{sample.how}")
        yield f'<circle class="dot f{i % len(COLOURS)}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"><title>{tip}</title></circle>'


def _verticals(shown: Sequence[View], x: Axis, top: float, bottom: float) -> Iterator[str]:
    for value in work_ticks(x, shown[0].unit == "bytes", 8):
        yield f'<path class="grid" d="M{float(_right(x, value)):.1f} {top}V{bottom}"/>'


def _work_axis(shown: Sequence[View], x: Axis, bottom: float) -> Iterator[str]:
    in_bytes = shown[0].unit == "bytes"
    for value in work_ticks(x, in_bytes, 8):
        at = min(float(_right(x, value)), WIDTH - 16.0)
        yield f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{work_label(value, in_bytes)}</text>'


def _right(x: Axis, work: Any) -> Any:
    return LEFT + x.share(work) * (WIDTH - LEFT - RIGHT)


# ---------------------------------------------------------------- tables


def _table(shown: Sequence[View], profile: Profile) -> Iterator[str]:
    """Parameters, then the sources behind a line that opens them."""
    columns = parameter_columns(shown)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns, "error", "90th percentile", "samples"))
    yield f'<div class="wide"><table><tr>{heads}<th class="left">measured range</th><th class="left">from</th></tr>'
    for view in shown:
        curve = view.curve
        cells = [view.name.partition("/")[2], *(read(curve) for read in columns.values())]
        cells += [f"{curve.error:.1%}", f"{curve.error_p90:.1%}", str(curve.samples)]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        source, colour = origin_of(view, profile)
        row += f'<td class="left">{html.escape(valid_range(curve))}</td><td class="left {colour}">{html.escape(source)}</td>'
        yield f"<tr>{row}</tr>"
    yield "</table></div><details><summary>sources</summary><table>"
    for view in shown:
        note = view.curve.source if view.origin is None else view.origin.note
        yield f'<tr><td>{html.escape(view.name.partition("/")[2])}</td><td class="note dim">{html.escape(note)}</td></tr>'
    yield "</table></details>"
