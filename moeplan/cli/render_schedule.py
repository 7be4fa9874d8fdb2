"""What people see of a study of schedules: the table, where the order changes, and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.render import console
from moeplan.costmodels.moe.base import Direction
from moeplan.costmodels.moe.constants import Constants
from moeplan.costmodels.moe_choice import IDEAL
from moeplan.planner.layers.crossover import LAYOUTS, RANGES, Terms, crossovers, order, serial, terms
from moeplan.planner.layers.study import Compared, Priced, Question, shares
from moeplan.units import format_bytes, format_seconds

WORDS = {"inter": "inter-node", "intra": "intra-node", "compute": "experts"}
"""Resources in words."""
PICO = 1e-12
EQUAL = 1e-9
"""Relative difference below which two times are one."""
CHUNKS = FORWARD_CHUNKS, BACKWARD_CHUNKS = "r forward", "r backward"
BOUND = "bound by\nforward", "bound by\nbackward"
OVER, RUNS_ON = "over", "runs on"
COLUMNS = ("forward", FORWARD_CHUNKS, "backward", BACKWARD_CHUNKS, "total", OVER, *BOUND, RUNS_ON)
"""Columns of the table beside the names."""
SPARED: tuple[tuple[str, ...], ...] = (BOUND, (RUNS_ON,), CHUNKS, ("forward", "backward"))
"""Columns that a narrow terminal goes without, the first of them first."""


def show(question: Question, constants: Constants, found: Compared) -> None:
    """The whole study on the terminal."""
    out = console()
    out.print(Text(title(question, constants), style="bold"), soft_wrap=True)
    out.print()
    rows = alike(question, found)
    for spared in range(len(SPARED) + 1):
        table = schedule_table(rows, found, without=list(chain.from_iterable(SPARED[:spared])))
        if out.measure(table, options=out.options.update(max_width=1000)).maximum <= out.width:
            break
    out.print(table)
    for row in rows:
        if len(row.names) > 1:
            out.print(Text(f"the same as {row.names[0]}: {', '.join(row.names[1:])}", style="dim"))
    out.print()
    for line in reasons(question, found):
        out.print(line, soft_wrap=True)


def title(question: Question, constants: Constants) -> str:
    """The layer and the machine in a line."""
    layer = question.layer
    slots = "" if math.isinf(layer.capacity) else f", {layer.capacity:.0f} slots each of {layer.experts:.0f} experts"
    sizes = f"{layer.tokens:.10g} tokens x {layer.hidden:.10g}, experts of {layer.expert_hidden:.10g}, k f = "
    sizes += f"{layer.topk * layer.capacity_factor:g}{slots}"
    carried = f", gradients {format_bytes(question.gradient_bytes)}" if question.gradient_bytes else ""
    groups = f"mp {layer.mp:g}, esp {layer.esp:g}, ep {layer.ep:g}"
    return f"{sizes}; {groups}; constants {constants.name}; kappa {question.kappa:g}{carried}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Schedules that are alike in all that the table shows."""

    names: list[str]
    total_s: float
    cells: Mapping[str, str]
    """By column, without the name."""


def alike(question: Question, found: Compared) -> list[Row]:
    """The rows of the table, the quickest first; one for all schedules that show the same."""
    over_s = float(found.over.total_s)
    every = [(row.schedule.name, float(row.total_s), _cells(question, row, over_s)) for row in found.rows]
    for pair in question.pairs:
        both_s = found.pairs[pair.name]
        cells = {"total": format_seconds(both_s), OVER: _ratio(over_s, both_s), RUNS_ON: f"{', '.join(pair.runs_on)} (pair)"}
        every.append((pair.name, both_s, cells))
    rows: list[Row] = []
    for name, total_s, cells in every:
        twin = next((row for row in rows if abs(row.total_s - total_s) <= EQUAL * total_s and row.cells == cells), None)
        if twin is None:
            rows.append(Row(names=[name], total_s=total_s, cells=cells))
        else:
            twin.names.append(name)
    return sorted(rows, key=lambda row: row.total_s)


def schedule_table(rows: Sequence[Row], found: Compared, without: Collection[str] = ()) -> Table:
    """Every row, without some columns and those in which nothing stands."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("schedule", no_wrap=True, vertical="bottom")
    shown = [name for name in COLUMNS if name not in without and any(row.cells.get(name) for row in rows)]
    for name in shown:
        head = {FORWARD_CHUNKS: "r", BACKWARD_CHUNKS: "r", OVER: f"over\n{found.over.schedule.name}"}.get(name, name)
        table.add_column(head, justify="left" if name in (*BOUND, RUNS_ON) else "right", no_wrap=True, vertical="bottom")
    for row in rows:
        style = "bold green" if found.quickest.schedule.name in row.names else ""
        table.add_row(row.names[0], *(row.cells.get(name, "") for name in shown), style=style)
    return table


def _cells(question: Question, row: Priced, over_s: float) -> dict[str, str]:
    degrees = (row.forward_degree, row.backward_degree)
    chunks = dict(zip(CHUNKS, (str(int(r)) for r in degrees), strict=True)) if row.schedule.chunked else {}
    return {
        "forward": format_seconds(float(row.forward_s)),
        "backward": format_seconds(float(row.backward_s)),
        "total": format_seconds(float(row.total_s)),
        OVER: _ratio(over_s, float(row.total_s)),
        BOUND[0]: bound(question, row, "forward"),
        BOUND[1]: bound(question, row, "backward"),
        RUNS_ON: "nothing: an ideal" if row.schedule.name == IDEAL else ", ".join(row.schedule.runs_on) or "research",
        **chunks,
    }


def _ratio(over_s: float, seconds: float) -> str:
    return f"{over_s / seconds:.2f}x" if seconds else "-"


def bound(question: Question, row: Priced, direction: Direction) -> str:
    """The resource that works longest, and for which part of the time."""
    degree = int(row.forward_degree if direction == "forward" else row.backward_degree)
    busy = shares(question, row.schedule, degree, direction)
    if not busy:
        return "-"
    share = next(iter(busy.values()))
    names = [WORDS[r] for r, s in busy.items() if s > share - 1e-9]
    merged = "both links" if {"inter-node", "intra-node"} <= set(names) else names[0]
    return f"{merged} {share:.0%}"


def reasons(question: Question, found: Compared) -> Iterator[str]:
    """What decides between the serial layouts, and where that changes."""
    best = found.quickest
    chunks = (
        f", r = {int(best.forward_degree)} forward and {int(best.backward_degree)} backward" if best.schedule.chunked else ""
    )
    yield f"quickest: {best.schedule.name}{chunks}; serial layouts in order: {_ordered(question)}"
    layer = question.layer
    if layer.mp == 1 and layer.esp == 1:
        yield f"  with mp 1 and esp 1 {LAYOUTS[0]}, {LAYOUTS[1]} and {LAYOUTS[2]} move the same"
    else:
        yield from (f"  {line}" for line in _equations(question, terms(question)))
    for number in RANGES:
        changes = crossovers(question, number)
        if changes:
            texts = [f"{c.below} up to {_amount(c.at)}" for c in changes] + [f"then {changes[-1].above}"]
            yield f"{number}: {', '.join(texts)}"
        else:
            least, most = RANGES[number]
            asked = layer.capacity_factor if number == "capacity-factor" else layer.tokens
            yield f"{number}: {order(question)[0]} all the way from {_amount(least * asked)} to {_amount(most * asked)}"


def _amount(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def _ordered(question: Question) -> str:
    """The serial layouts, "<" between them, "=" where they take the same."""
    rows = serial(question)
    text = rows[0].schedule.name
    for one, other in pairwise(rows):
        same = float(other.total_s) <= float(one.total_s) * (1.0 + EQUAL)
        text += f" {'=' if same else '<'} {other.schedule.name}"
    return text


def _equations(question: Question, t: Terms) -> Iterator[str]:
    """The inequalities with their numbers, one direction."""

    def ms(seconds: float) -> str:
        return format_seconds(seconds)

    s1, s2, inner = LAYOUTS
    difference = t.fused_s + t.token_gather_s - t.saa_s
    hidden = (
        "A >= Gk: the gather of slots hides behind the all-to-all"
        if t.fused_s >= t.slot_gather_s
        else ("A < Gk: the gather of slots is longer than the all-to-all that hides it")
    )
    yield (
        f"{s1} - {s2} = A + G1 - O = {ms(t.fused_s)} + {ms(t.token_gather_s)} - {ms(t.saa_s)} = {_signed(difference)} "
        f"in {t.phases} phases; {hidden}"
    )
    inside = t.gather_s + t.scatter_s
    yield (
        f"{s1} - {inner} = 2 A - (2 a + g + s) = {ms(2.0 * t.fused_s)} - ({ms(2.0 * t.exchange_s)} + {ms(inside)}) = "
        f"{_signed(2.0 * (t.fused_s - t.exchange_s) - inside)}"
    )
    if question.layer.esp > 1:
        sign = ">" if t.exchange_spared_s > t.gather_unit_s else "<="
        wins = inner if t.exchange_spared_s > t.gather_unit_s else s1
        yield (
            f"at large size: beta_a (1 - 1/esp) = {t.exchange_spared_s / PICO:.3g} ps/B {sign} (beta_g + beta_s)/2 = "
            f"{t.gather_unit_s / PICO:.3g} ps/B, so {wins}"
        )


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{format_seconds(abs(seconds))}"


def remarks(question: Question, constants: Constants, errors: Mapping[str, float]) -> Iterator[str]:
    """What to know about the numbers."""
    layer = question.layer
    for name, size in constants.groups.items():
        mine = int(getattr(layer, name))
        if mine != size:
            yield f"the constants of {constants.name} were fitted with {name} {size}, this layer has {mine}"
    if errors:
        listed = ", ".join(f"{name} {error:.1%}" for name, error in errors.items())
        yield f"lines fitted to the curves of {constants.name}, with a greatest error of {listed}"
    slots = layer.topk * layer.capacity_factor * layer.tokens / layer.experts if layer.experts else layer.capacity
    if layer.experts and layer.capacity - slots > 1e-6 * slots:
        yield f"{slots:.7g} slots for each expert are rounded up to {layer.capacity:.0f}"
    if any(row.name == "shared-overlap" for row in question.schedules):
        yield "shared-overlap includes the shared experts, the other schedules do not"


def data(question: Question, constants: Constants, errors: Mapping[str, float], found: Compared) -> dict[str, Any]:
    """The study as plain data: seconds."""
    layer = question.layer
    names = (
        "tokens",
        "hidden",
        "expert_hidden",
        "topk",
        "capacity_factor",
        "experts",
        "gemms",
        "mp",
        "esp",
        "ep",
        "element_bytes",
    )
    t = terms(question)
    return {
        "layer": {name: float(getattr(layer, name)) for name in names},
        "constants": {
            "name": constants.name,
            "source": constants.source,
            "given": {n: {"startup_s": c.startup_s, "unit_s": c.unit_s} for n, c in constants.given.items()},
            "fit_errors": dict(errors),
        },
        "kappa": float(question.kappa),
        "gradient_s": float(question.gradient_s()),
        "over": found.over.schedule.name,
        "quickest": found.quickest.schedule.name,
        "schedules": [_row_data(question, row, found) for row in found.rows],
        "pairs": [
            {"name": pair.name, "total_s": found.pairs[pair.name], "runs_on": list(pair.runs_on), "source": pair.source}
            for pair in question.pairs
        ],
        "order": list(order(question)),
        "crossovers": [
            {"number": c.number, "at": c.at, "below": c.below, "above": c.above}
            for number in RANGES for c in crossovers(question, number)
        ],
        "terms": {name: getattr(t, name) for name in t.__dataclass_fields__},
    }  # fmt: skip


def _row_data(question: Question, row: Priced, found: Compared) -> dict[str, Any]:
    total_s = float(row.total_s)
    return {
        "name": row.schedule.name,
        "forward_s": float(row.forward_s),
        "backward_s": float(row.backward_s),
        "r_forward": int(row.forward_degree),
        "r_backward": int(row.backward_degree),
        "total_s": total_s,
        "ratio": float(found.over.total_s) / total_s if total_s else None,
        "busy_forward": shares(question, row.schedule, int(row.forward_degree), "forward"),
        "busy_backward": shares(question, row.schedule, int(row.backward_degree), "backward"),
        "runs_on": list(row.schedule.runs_on),
        "source": row.schedule.source,
    }
