"""Pricing given layouts: one, or a table of training runs.

Rows of a table that share model, cluster and workload are priced together. A row is `ok`, `partial` (a cell was blank and a
stated default was used) or `unsupported` (with the reason; nothing is guessed).
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import interval
from moeplan.errors import ClusterError, MoeplanError, SchemaError, nearest
from moeplan.planner.cells import Unsupported
from moeplan.planner.constraints import violations
from moeplan.planner.problem import Problem
from moeplan.planner.runs import REQUIRED_COLUMNS, SURPLUS, Run, group_key, read_run
from moeplan.profiles.hardware import Cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from moeplan.records import read_text
from moeplan.units import GIB

OUTPUT_COLUMNS = (
    "id", "status", "reason", "predicted_step_s", "predicted_low_s", "predicted_high_s",
    "predicted_tokens_per_s_per_gpu", "predicted_peak_gib",
)  # fmt: skip
"""Columns of a table of predictions, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PricedRun:
    """One row with its prediction."""

    id: str
    status: Literal["ok", "partial", "unsupported"]
    reason: str
    run: Run | None = None
    cost: Breakdown | None = None
    """Seconds of a step by part."""
    peak_bytes: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0

    def row(self) -> dict[str, str]:
        """The row of the output table; numbers that do not exist are empty."""
        values = dict.fromkeys(OUTPUT_COLUMNS, "") | {"id": self.id, "status": self.status, "reason": self.reason}
        if self.cost is not None and self.run is not None:
            step = float(self.cost.total)
            values |= {
                "predicted_step_s": f"{step:.6g}",
                "predicted_low_s": f"{self.low_s:.6g}",
                "predicted_high_s": f"{self.high_s:.6g}",
                "predicted_tokens_per_s_per_gpu": f"{self.run.workload.tokens / step / self.run.cluster.gpus:.6g}",
                "predicted_peak_gib": f"{self.peak_bytes / GIB:.5g}",
            }
        return values


@functools.lru_cache(maxsize=256)
def profile_of(cluster: Cluster) -> Profile:
    """The nominal profile of a cluster, made once."""
    return nominal(cluster)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; refuses a file without the needed columns or with text that is no CSV."""
    reader = csv.DictReader(io.StringIO(read_text(path, "run table"), newline=""), strict=True)
    try:
        names = [n.strip() for n in reader.fieldnames or []]
        _check_columns(names, path)
        reader.fieldnames = names
        rows = list(reader)
    except csv.Error as error:
        raise SchemaError(f"run table '{path}', line {reader.reader.line_num}: {error}", hint="is it a CSV file?") from None
    for row in rows:
        surplus: Any = row.pop(None, [])
        if any(text.strip() for text in surplus):
            row[SURPLUS] = ",".join(surplus)
    return rows


def _check_columns(names: Sequence[str], path: Path) -> None:
    twice = [n for i, n in enumerate(names) if n and n in names[:i]]
    if twice:
        raise SchemaError(f"run table '{path}' has the column {twice[0]} twice", hint="remove one of them")
    missing = [c for c in REQUIRED_COLUMNS if c not in names]
    if missing:
        close = [f"'{n}' for '{c}'" for c in missing for n in nearest(c, [x for x in names if x], 1)]
        hint = f"found {', '.join(close)}?" if close else f"needed are {', '.join(REQUIRED_COLUMNS)}"
        if len(names) == 1 and re.search(r"[;\t|]", names[0]):
            hint = "separate cells by commas"
        raise SchemaError(
            f"run table '{path}' lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}", hint=hint
        )


def profile_for_runs(profile: Profile) -> Callable[[Cluster], Profile]:
    """What prices runs with one profile: its own hosts at the count of GPUs of a run; other machines are refused."""

    def use(cluster: Cluster) -> Profile:
        mine = profile.cluster
        for what, own, other, hint in (
            ("device", mine.device.name, cluster.device.name, None),
            ("machine", mine.machine or "any", cluster.machine or "any", None),
            ("GPUs of a domain", mine.domain_gpus, cluster.domain_gpus, "the cell gpus_per_node says them"),
        ):
            if own != other:
                raise ClusterError(f"the profile's {what}: {own}, that of the run: {other}", hint=hint)
        return profile.resized(cluster.gpus)

    return use


def price_runs(
    rows: Sequence[Mapping[str, str]],
    progress: Callable[[int, int], None] | None = None,
    profile_for: Callable[[Cluster], Profile] | None = None,
) -> list[PricedRun]:
    """Predictions for all rows, in their order; `profile_for` gives the profile of a cluster, by default the nominal one."""
    out: dict[int, PricedRun] = {}
    groups: dict[tuple[Any, ...], list[tuple[int, Run]]] = defaultdict(list)
    for i, row in enumerate(rows):
        try:
            run = read_run(row)
            groups[group_key(run)].append((i, run))
        except Unsupported as reason:
            out[i] = PricedRun(id=row.get("id", ""), status="unsupported", reason=str(reason))
    for members in groups.values():
        out |= _price_group(members, profile_for or profile_of)
        if progress is not None:
            progress(len(out), len(rows))
    return [out[i] for i in range(len(rows))]


def _price_group(members: list[tuple[int, Run]], profile_for: Callable[[Cluster], Profile]) -> dict[int, PricedRun]:
    """Runs of the same model, cluster and workload, priced as one array."""
    first = members[0][1]
    try:
        profile = profile_for(first.cluster)
        problem = Problem(model=first.model, profile=profile, workload=first.workload, extend_positions=True)
        layouts = Layouts.of([run.layout for _, run in members])
        pricing = Pricing(first.model, profile, first.workload, layouts, exact=True)
        step, peak = pricing.step_cost().time, pricing.peak_bytes()
    except MoeplanError as error:
        reason = str(error)
        return {i: PricedRun(id=run.id, status="unsupported", reason=reason) for i, run in members}
    low, high = interval(first.model, profile, first.workload, step)
    out = {}
    for place, (i, run) in enumerate(members):
        remarks = [
            *run.remarks,
            *(f"breaks rule {v.rule} of today's Megatron: {v.reason}" for v in violations(problem, run.layout)),
        ]
        out[i] = PricedRun(
            id=run.id,
            status="partial" if remarks else "ok",
            reason="; ".join(remarks),
            run=run,
            cost=step.at(place),
            peak_bytes=float(peak[place]),
            low_s=float(low[place]),
            high_s=float(high[place]),
        )
    return out


def table_text(priced: Sequence[PricedRun]) -> str:
    """CSV text of predictions."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, OUTPUT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(p.row() for p in priced)
    return stream.getvalue()
