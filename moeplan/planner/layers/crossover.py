"""Where the order of the serial layouts of an MoE layer changes: Parm's S1 and S2, and FSMoE's hierarchical one.

One number of the layer is varied, all else kept; the winner is found on a fine geometric grid, and every change of it bisected.
`terms` gives what decides, in the symbols of the inequalities:

    S1 - S2 = A + G1 - O,  O = A/p + Gk/p + (1 - 1/p) max(A, Gk)        S1 pays its gather, S2 what no phase hides
    S1 - hierarchical = 2 A - (2 a + g + s);  at large size hierarchical wins iff beta_a (1 - 1/esp) > (beta_g + beta_s) / 2

Both directions move the same bytes, so one inequality serves both. Units: seconds. Not valid where slots must be whole: the
varied number is real, and slots are not rounded up.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.planner.layers.study import Layer, Priced, Question, study

LAYOUTS = ("s1", "s2", "hierarchical")
"""Layouts that are compared."""
RANGES = {"capacity-factor": (0.25, 16.0), "tokens": (1.0 / 256.0, 256.0)}
"""Varied numbers with least and greatest factor on the asked value."""
GRID = 1025
HALVINGS = 50
EQUAL = 1e-9
"""Relative difference below which two layouts tie; the first one counts as the winner then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossover:
    """A value at which another layout becomes the quickest."""

    number: str
    at: float
    below: str
    """The quickest up to there."""
    above: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What decides between the layouts, one direction."""

    fused_s: float
    """A: all-to-all over all ranks."""
    token_gather_s: float
    """G1: gather of the tokens after S1."""
    slot_gather_s: float
    """Gk: gather of the slots in S2."""
    phases: int
    """p"""
    saa_s: float
    """O: all-to-all of S2 with its gather."""
    exchange_s: float
    """a: all-to-all among ep."""
    gather_s: float
    """g"""
    scatter_s: float
    """s"""
    exchange_spared_s: float
    """beta_a (1 - 1/esp): seconds for each byte of S1's all-to-all that the hierarchical layout spares."""
    gather_unit_s: float
    """(beta_g + beta_s) / 2: seconds that it pays for it."""


def crossovers(question: Question, number: str) -> tuple[Crossover, ...]:
    """Values of `number` (a key of `RANGES`), rising, at which the quickest layout changes."""
    question = dataclasses.replace(question, schedules=tuple(find_schedule(name) for name in LAYOUTS))
    least, most = RANGES[number]
    now = float(question.layer.capacity_factor if number == "capacity-factor" else question.layer.tokens)
    values = np.geomspace(least * now, most * now, GRID)
    winners = _winners(question, number, values)
    out = []
    for i in np.flatnonzero(winners[1:] != winners[:-1]):
        low, high = values[i], values[i + 1]
        for _ in range(HALVINGS):
            middle = np.sqrt(low * high)
            same = _winners(question, number, np.array([middle]))[0] == winners[i]
            low, high = (middle, high) if same else (low, middle)
        out.append(Crossover(number=number, at=float(high), below=LAYOUTS[winners[i]], above=LAYOUTS[winners[i + 1]]))
    return tuple(out)


def serial(question: Question) -> list[Priced]:
    """The layouts of the question with their times, the quickest first."""
    rows = study(dataclasses.replace(question, schedules=tuple(find_schedule(name) for name in LAYOUTS)))
    return sorted(rows, key=lambda row: float(row.total_s))


def order(question: Question) -> tuple[str, ...]:
    """The layouts of the question, the quickest first."""
    return tuple(row.schedule.name for row in serial(question))


def terms(question: Question) -> Terms:
    """What decides between the layouts of one question."""
    size, lines = question.layer.size, question.lines
    s1, s2, inner = (find_schedule(name).parts(size, lines, 1, "forward") for name in LAYOUTS)
    phases = int(size.all_ranks)
    sent, gathered = float(s2["C"]), float(s2["M"])
    return Terms(
        fused_s=float(s1["D"]),
        token_gather_s=float(s1["M"]),
        slot_gather_s=gathered * phases,
        phases=phases,
        saa_s=sent + gathered + (phases - 1) * max(sent, gathered),
        exchange_s=float(inner["D"]),
        gather_s=float(inner["G"]),
        scatter_s=float(inner["S"]),
        exchange_spared_s=float(lines.fused_exchange.unit_s * (1.0 - 1.0 / size.esp_ranks)),
        gather_unit_s=float((lines.gather.unit_s + lines.scatter.unit_s) / 2.0),
    )


def _winners(question: Question, number: str, values: Any) -> Any:
    """Place in `LAYOUTS` of the quickest at each value, [values]."""
    field = number.replace("-", "_")
    layer = _real(question.layer, **{field: values})
    rows = study(dataclasses.replace(question, layer=layer))
    # [layouts, values]
    times = np.stack([np.broadcast_to(row.total_s, values.shape) for row in rows])
    return np.argmax(times <= times.min(axis=0) * (1.0 + EQUAL), axis=0)


def _real(layer: Layer, **changes: Any) -> Layer:
    """The layer with slots that need not be whole."""
    return dataclasses.replace(layer, experts=0, **changes)
