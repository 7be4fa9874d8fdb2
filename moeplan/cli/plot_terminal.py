"""Curves on a terminal: lines in braille dots, samples as bullets, both axes logarithmic.

A cell holds 2 x 4 dots. Where a line runs through samples the bullet is bold, elsewhere it is thin; each line ends in a letter,
which the legend explains, so that lines can be told apart without colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from moeplan.cli.profile_views import View
from moeplan.units import GIB, KIB, MIB, TIB

COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan")
HEIGHT = 10
"""Rows of a small plot."""
LABEL = 6
"""Columns of the labels on the left."""
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Bits of a braille character by row and column of the dot."""
_LEAST_DECADES = 0.7
"""Decades of an axis, at least."""


class Axis:
    """Logarithmic axis over all values that are shown."""

    def __init__(self, values: Any) -> None:
        logs = np.log10(values[values > 0])
        low, high = float(logs.min()), float(logs.max())
        room = max(0.0, _LEAST_DECADES - (high - low)) / 2.0 + 0.02 * (high - low)
        self.low, self.high = low - room, high + room

    def share(self, values: Any) -> Any:
        """Place of values between 0 and 1."""
        return (np.log10(values) - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round values along a rate, at most so many."""
        first, last = math.floor(self.low), math.ceil(self.high)
        for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            values = [k * 10.0**power for power in range(first, last + 1) for k in steps]
            inside = [v for v in values if 0.0 <= self.share(v) <= 1.0]
            if len(inside) <= most:
                return inside
        return inside[:: math.ceil(len(inside) / most)]


def plot(shown: Sequence[View], width: int, height: int = HEIGHT) -> Iterator[Text]:
    """Title, plot, axis and legend of curves that share a plot, in lines of `width` columns at most."""
    columns = width - LABEL - 1
    x = Axis(np.concatenate([np.concatenate([v.line_work, v.work]) for v in shown]))
    y = Axis(np.concatenate([np.concatenate([v.line_rate, v.rate]) for v in shown]))
    bytes_too = shown[0].unit == "bytes"
    name = f"{rate_name(shown)} over {'bytes' if bytes_too else 'FLOP'}"
    head = Text(shown[0].panel, style="bold")
    head.truncate(width - len(name) - 2)
    head.append(f"  {name}", "dim not bold")
    yield head
    ticks = {min(height - 1, int((1.0 - y.share(v)) * height)): v for v in y.ticks(max(2, height // 2))}
    for row, cells in enumerate(_cells(shown, x, y, columns, height)):
        label = rate_label(ticks[row]) if row in ticks else ""
        line = Text(f"{label:>{LABEL}}", style="dim").append("┤" if row in ticks else "│", "dim")
        for mark, style in cells:
            line.append(mark, style)
        yield line
    yield Text(" " * LABEL + "└" + "─" * columns, style="dim")
    yield Text(" " * (LABEL + 1) + _work_axis(x, columns, bytes_too), style="dim")
    yield from _legend(shown, width)


def _cells(shown: Sequence[View], x: Axis, y: Axis, columns: int, height: int) -> Iterator[list[tuple[str, str]]]:
    """Mark and style of each cell, row by row."""
    bits = np.zeros((height, columns), int)
    owner = np.full((height, columns), -1)
    points = np.full((height, columns), -1)
    letters: dict[tuple[int, int], int] = {}
    for i, view in enumerate(shown):
        if view.samples:
            row, column = _place(x, y, view.work, view.rate, columns, height)
            points[row, column] = i
        work = np.geomspace(view.line_work[0], view.line_work[-1], 8 * columns)
        rate = np.exp(np.interp(np.log(work), np.log(view.line_work), np.log(view.line_rate)))
        down, right = _place(x, y, work, rate, 2 * columns, 4 * height)
        np.bitwise_or.at(bits, (down // 4, right // 2), _DOTS[down % 4, right % 2])
        owner[down // 4, right // 2] = i
        end = (int(down[-1]) // 4, min(int(right[-1]) // 2 + 1, columns - 1))
        while end in letters and end[1] > 0:
            end = (end[0], end[1] - 1)
        letters[end] = i
    for row in range(height):
        yield [_mark(row, column, bits, owner, points, letters) for column in range(columns)]


def _mark(row: int, column: int, bits: Any, owner: Any, points: Any, letters: dict[tuple[int, int], int]) -> tuple[str, str]:
    if (row, column) in letters:
        i = letters[row, column]
        return chr(ord("a") + i), f"bold {COLOURS[i % len(COLOURS)]}"
    line, point = int(owner[row, column]), int(points[row, column])
    if point >= 0:
        return ("●" if line >= 0 else "•"), COLOURS[point % len(COLOURS)]
    return (chr(0x2800 + int(bits[row, column])), COLOURS[line % len(COLOURS)]) if line >= 0 else (" ", "")


def _place(x: Axis, y: Axis, work: Any, rate: Any, columns: int, rows: int) -> tuple[Any, Any]:
    """Row and column of points on a grid."""
    column = np.clip((x.share(work) * columns).astype(int), 0, columns - 1)
    return np.clip(((1.0 - y.share(rate)) * rows).astype(int), 0, rows - 1), column


def _work_axis(x: Axis, columns: int, bytes_too: bool) -> str:
    """Labels of the axis of work, as many as fit."""
    out = ""
    for value in work_ticks(x, bytes_too, max(1, columns // 9)):
        label = work_label(value, bytes_too)
        begin = min(max(0, round(float(x.share(value)) * columns) - len(label) // 2), columns - len(label))
        if begin > len(out) or not out:
            out = f"{out:<{begin}}{label}"
    return out


def _legend(shown: Sequence[View], width: int) -> Iterator[Text]:
    """Letters of the lines and what they are, wrapped to the width."""
    line = Text()
    for i, view in enumerate(shown):
        part = Text().append(f"{chr(ord('a') + i)} ", f"bold {COLOURS[i % len(COLOURS)]}").append(view.label)
        if len(line) and len(line) + 2 + len(part) > width:
            yield line
            line = Text()
        line = line.append("  ").append_text(part) if len(line) else part
    yield line


def work_ticks(x: Axis, bytes_too: bool, most: int) -> list[float]:
    """Round sizes along an axis of work, at most so many."""
    values = [2.0**p for p in range(0, 60, 2)] if bytes_too else [10.0**p for p in range(0, 20)]
    inside = [v for v in values if 0.0 <= x.share(v) <= 1.0]
    return inside[:: max(1, math.ceil(len(inside) / most))]


def work_label(value: float, bytes_too: bool) -> str:
    """A message size or an amount of work, short."""
    units: tuple[tuple[float, str], ...] = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    if bytes_too:
        units = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1.0, "B"))
    size, name = next((u for u in units if value >= u[0]), units[-1])
    return f"{value / size:.3g} {name}".rstrip()


def rate_name(shown: Sequence[View]) -> str:
    """What stands at the axis of rates of a plot."""
    if shown[0].unit == "FLOP":
        return "TFLOP/s"
    return "bus GB/s" if shown[0].family in ("collectives", "multi_node") else "GB/s"


def rate_label(value: float) -> str:
    """A rate, short."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
