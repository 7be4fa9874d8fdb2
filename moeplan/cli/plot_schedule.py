"""Pictures of a study of schedules, drawn by matplotlib where the extra `plot` is installed."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.cli.options import check_writable
from moeplan.errors import FileError, UsageError
from moeplan.units import MS

if TYPE_CHECKING:
    from moeplan.planner.layers.study import Priced, Question

FORMATS = (".png", ".svg")
COLOURS = 10
"""Colours of lines; further lines are dashed."""
MOST_POINTS = 100_000
"""Points of a curve, which are priced at once."""


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn or written, before work is spent on it."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: only {' and '.join(FORMATS)} can be drawn", hint=f"write {path.stem or 'times'}.svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'moeplan[plot]'")
    check_writable(path, "plot")


def draw_bars(path: Path, rows: Sequence[Priced]) -> None:
    """Forward and backward of every schedule, the quickest on top."""
    rows = sorted(rows, key=lambda row: -float(row.total_s))
    figure, axes = _figure(0.35 * len(rows) + 1.2)
    names = [row.schedule.name for row in rows]
    forward = [float(row.forward_s) / MS for row in rows]
    axes.barh(names, forward, label="forward")
    axes.barh(names, [float(row.backward_s) / MS for row in rows], left=forward, label="backward")
    axes.set_xlabel("ms")
    _save(figure, axes, path)


def draw_curves(path: Path, name: str, values: Any, question: Question) -> None:
    """Forward and backward together of every schedule over one swept number."""
    import numpy as np

    from moeplan.planner.layers.study import study

    figure, axes = _figure(5.0)
    for i, row in enumerate(study(question)):
        style = "-" if i < COLOURS else "--"
        axes.plot(values, np.broadcast_to(row.total_s, values.shape) / MS, style, label=row.schedule.name)
    axes.set_xlabel(name)
    axes.set_ylabel("forward and backward, ms")
    if len(values) > 2 and values[0] > 0 and values[-1] / values[0] >= 8:
        axes.set_xscale("log")
        axes.set_yscale("log")
    _save(figure, axes, path)


def _figure(height: float) -> tuple[Any, Any]:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9.0, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower()[1:])
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(picture.getvalue())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"cannot write plot '{path}': {error.strerror}") from None
