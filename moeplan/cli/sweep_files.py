"""A sweep as a table for other programs: CSV, or Parquet by pyarrow (an extra).

A row a point: its value on every axis, how it ended, the best plan. Units stand in the names; what a point lacks is empty.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeplan.cli.render_sweep import shown
from moeplan.errors import DeviceError, FileError
from moeplan.planner.plan_data import read_layout
from moeplan.planner.sweeps.store import Row
from moeplan.planner.sweeps.sweep import Sweep
from moeplan.records import save_text
from moeplan.units import GIB

_DEGREES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "micro_batch")


def need_pyarrow() -> None:
    """Refuse to go on without pyarrow."""
    if find_spec("pyarrow") is None:
        raise DeviceError("--parquet needs pyarrow, which is not installed", hint="pip install 'moeplan[parquet]', or --csv")


def columns(sweep: Sweep, rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Values by the name of their column, one a point."""
    records = [_record(row) for row in rows]
    names = list(dict.fromkeys(name for record in records for name in record))
    out = {name: [row.point[name] for row in rows] for name in sweep.axes}
    for name, values in out.items():
        if any(isinstance(value, list) for value in values):
            out[name] = [shown(value) for value in values]
    return out | {name: [record.get(name) for record in records] for name in names if name not in out}


def save_csv(path: Path, sweep: Sweep, rows: Sequence[Row]) -> None:
    """Write the table as CSV."""
    table = columns(sweep, rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    save_text(path, stream.getvalue(), "table")


def save_parquet(path: Path, sweep: Sweep, rows: Sequence[Row]) -> None:
    """Write the table as Parquet, whole or not at all."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns(sweep, rows)), temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"cannot write table '{path}': {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _record(row: Row) -> dict[str, Any]:
    """A point without its axes; every status has all columns."""
    answer = row.answer
    layout = None if answer is None or not answer.layout else read_layout(answer.layout, "the sweep")
    found: dict[str, Any] = {
        "status": "open" if answer is None else answer.status,
        "gpus": None if layout is None else layout.world,
        "plan": None if layout is None else layout.degrees(),
        **{name: None if layout is None else getattr(layout, name) for name in _DEGREES},
        "recompute": None if layout is None else layout.recompute_text(),
        "dispatcher": None if layout is None else layout.dispatcher,
    }
    figures: dict[str, Any] = {} if answer is None or layout is None else {
        "step_s": answer.step_s,
        "step_low_s": answer.low_s,
        "step_high_s": answer.high_s,
        "tokens_per_s_per_gpu": answer.tokens_per_s_per_gpu,
        "mfu_of_bf16_peak": answer.mfu,
        "peak_gib": answer.peak_bytes / GIB,
        "device_gib": answer.device_bytes / GIB,
        "cost_per_trillion_tokens": answer.cost or None,
        "tied_plans": answer.tied,
        "gap": answer.gap,
    }  # fmt: skip
    return {**found, **dict.fromkeys(_FIGURES), **figures, "reason": None if answer is None else answer.reason or None}


_FIGURES = (
    "step_s", "step_low_s", "step_high_s", "tokens_per_s_per_gpu", "mfu_of_bf16_peak", "peak_gib", "device_gib",
    "cost_per_trillion_tokens", "tied_plans", "gap",
)  # fmt: skip
