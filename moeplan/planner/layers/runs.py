"""Measured runs of one MoE layer as rows of a table, and what a profile predicts for them.

A row is one direction of one schedule in a number of chunks; `moeplan verify` writes such tables, `moeplan calibrate` reads
them. A prediction is T + kappa (serial - T): T the makespan with what the curves say of just these sizes, serial the layer in
one chunk with nothing overlapped. Gate and ordering of the tokens are in neither. Units: seconds, bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.costmodels.collectives import all_reduce_s, group
from moeplan.costmodels.moe.base import Direction, LayerSchedule, MoeSize, imperfect_s
from moeplan.costmodels.moe.fitted import Experts, lines_at
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.costmodels.tasks import duration
from moeplan.errors import SchemaError
from moeplan.planner.layers.study import Layer
from moeplan.profiles.profile import Profile
from moeplan.records import read_text

MEASURED = "measured_layer_s"
"""Column that tells a table of layers from one of training steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRun:
    """One direction of an MoE layer under one schedule."""

    id: str
    schedule: str
    direction: Direction
    degree: int
    """Chunks."""
    tokens: int
    """Of a tensor-parallel group."""
    hidden: int
    expert_hidden: int
    """Width inside a whole expert."""
    experts: int
    topk: int
    gemms: int
    mp: int
    esp: int
    ep: int
    precision: str = "bf16"
    gradient_bytes: float = 0.0
    """Gradients that a rank all-reduces inside the layer."""
    measured_layer_s: float
    """Median over the repeats of the slowest rank."""
    spread: float = 0.0
    """Half-width of the 95 % confidence interval of the median, over the median."""

    @property
    def size(self) -> MoeSize:
        """The layer in bytes and FLOP; no slot is padded or dropped."""
        layer = Layer(
            tokens=self.tokens, hidden=self.hidden, expert_hidden=self.expert_hidden, topk=self.topk, gemms=self.gemms,
            mp=self.mp, esp=self.esp, ep=self.ep,
        )  # fmt: skip
        return layer.size

    @property
    def layer(self) -> tuple[Any, ...]:
        """What rows of one layer on one set of groups share."""
        return (self.tokens, self.hidden, self.expert_hidden, self.experts, self.topk, self.gemms, self.mp, self.esp, self.ep)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What a profile says of a row."""

    makespan_s: float
    """With perfect overlap."""
    serial_s: float
    """The layer in one chunk with nothing overlapped; the makespan where the schedule overlaps nothing."""
    tasks: Mapping[str, float]
    """Seconds of one task by kind."""

    def seconds(self, kappa: float) -> float:
        """With imperfect overlap."""
        return float(imperfect_s(self.makespan_s, self.serial_s, kappa))


def predict(run: LayerRun, profile: Profile) -> Predicted:
    """Seconds of a row from the curves of a profile."""
    schedule = find_schedule(run.schedule)
    parts = _parts(run, schedule, run.degree, profile)
    whole = parts if run.degree == 1 else _parts(run, schedule, 1, profile)
    makespan_s = float(schedule.seconds(run.degree, parts, run.size))
    serial_s = max(makespan_s, float(schedule.serial_seconds(1, whole, run.size)))
    kinds = {task.kind: float(duration(task, parts)) for task in schedule.graph(run.degree, run.size).tasks}
    return Predicted(makespan_s=makespan_s, serial_s=serial_s, tasks=kinds)


def _parts(run: LayerRun, schedule: LayerSchedule, degree: int, profile: Profile) -> dict[str, Any]:
    experts = Experts(hidden=run.hidden, width=run.expert_hidden, count=run.experts, gemms=run.gemms, precision=run.precision)
    lines = lines_at(profile, run.size, experts, schedule, degree, run.direction)
    parts = dict(schedule.parts(run.size, lines, degree, run.direction))
    lanes = group(profile, run.ep * run.esp // run.mp, run.mp)
    carried = run.gradient_bytes > 0 and lanes.ranks > 1
    return {**parts, "R": float(all_reduce_s(profile, run.gradient_bytes, lanes)) if carried else 0.0}


def table_text(runs: Sequence[LayerRun]) -> str:
    """Rows as CSV."""
    names = [field.name for field in dataclasses.fields(LayerRun)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(run, name) for name in names] for run in runs)
    return out.getvalue()


def is_layer_table(path: Path) -> bool:
    """Whether a CSV file holds runs of layers, by its header."""
    return MEASURED in read_text(path, "run table").partition("\n")[0].split(",")


def read_layer_runs(path: Path) -> list[LayerRun]:
    """The inverse of `table_text`; a bad cell is named with its line and column."""
    where = f"run table '{path}'"
    fields = {field.name: field for field in dataclasses.fields(LayerRun)}
    reader = csv.DictReader(io.StringIO(read_text(path, "run table"), newline=""), strict=True)
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in (reader.fieldnames or [])]
    if missing:
        raise SchemaError(f"{where} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    try:
        rows = list(reader)
    except csv.Error as error:
        raise SchemaError(f"{where}, line {reader.reader.line_num}: {error}", hint="is it a CSV file?") from None
    out = []
    for number, row in enumerate(rows, 2):
        values: dict[str, Any] = {}
        for name, field in fields.items():
            text = (row.get(name) or "").strip()
            if not text and field.default is not dataclasses.MISSING:
                continue
            values[name] = _cell(text, str(field.type), f"{where}, line {number}, column {name}")
        find_schedule(values["schedule"])
        out.append(LayerRun(**values))
    return out


def _cell(text: str, kind: str, place: str) -> Any:
    if not text:
        raise SchemaError(f"{place}: the cell is empty")
    if kind == "Direction" and text not in ("forward", "backward"):
        raise SchemaError(f"{place}: '{text}' is neither forward nor backward")
    if kind not in ("int", "float"):
        return text
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        raise SchemaError(f"{place}: '{text}' is not a number") from None
    if not 0 <= number < math.inf or (kind == "int" and number < 1):
        raise SchemaError(f"{place}: {text} is out of range")
    return number
