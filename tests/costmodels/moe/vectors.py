"""Rows of the CSV files beside this one, each with its source, and the random values of the property tests."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize

FP32 = 4
MS = 1e-3
QUICK = settings(max_examples=100, deadline=None)
FREE = AlphaBeta(startup_s=0.0, unit_s=0.0)
LINES = tuple(Lines.__slots__)

seconds = st.floats(1e-3, 1e3)
degrees = st.integers(1, 12)
ranks = st.sampled_from([1, 2, 4, 8])
fits = st.builds(AlphaBeta, startup_s=st.floats(0, 1e-3), unit_s=st.floats(1e-12, 1e-8))
all_lines = st.builds(Lines, **dict.fromkeys(LINES, fits))


@st.composite
def sizes(draw):
    tokens = draw(st.floats(1e3, 1e9))
    return MoeSize(
        token_bytes=tokens,
        slot_bytes=tokens * draw(st.floats(1, 16)),
        expert_flop=tokens * draw(st.floats(1e2, 1e5)),
        mp_ranks=draw(ranks),
        esp_ranks=draw(ranks),
        ep_ranks=draw(ranks),
        shared_up_flop=tokens * draw(st.sampled_from([0.0, 1e3])),
        shared_down_flop=tokens * draw(st.sampled_from([0.0, 5e2])),
        sequence_parallel=draw(st.booleans()),
    )


def stacked(values):
    """One object of arrays in place of several of numbers."""
    return type(values[0])(**{k: np.array([getattr(v, k) for v in values]) for k in values[0].__slots__})


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
