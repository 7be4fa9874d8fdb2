"""Vectors of the schedules: rows of the CSV files beside this one, each with its source."""

from __future__ import annotations

import csv
from pathlib import Path

from moeplan.costmodels.moe.base import AlphaBeta

FP32 = 4
MS = 1e-3


def columns(name):
    """Columns of a file as lists, numbers where every row has one."""
    with (Path(__file__).parent / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: numbers([row[key] for row in rows]) for key in rows[0]}


def rows_of(name):
    """Rows of a file, numbers where every row has one."""
    table = columns(name)
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def numbers(texts):
    try:
        return [float(text) for text in texts]
    except ValueError:
        return texts


def line(alpha_ms, beta_ms, unit=FP32):
    """A fit in ms over elements of `unit` bytes, or over MACs of 2 FLOP."""
    return AlphaBeta(startup_s=alpha_ms * MS, unit_s=beta_ms * MS / unit)
