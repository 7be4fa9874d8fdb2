"""What to change in a layout that is in use: single edits by what each brings, then a path of them, smallest edits first.

An edit sets one field of the layout and what follows from it (data parallelism takes up the difference of a degree, a split
that no longer fits becomes the balanced one). Switches get values that a search takes, and what changes meets the conditions
of the problem. An edit counts if the framework accepts it, the devices hold it and the step gets shorter by `LEAST`; of a
layout that the devices do not hold, whatever makes it fit counts. The path takes features first, then
the micro-batch and virtual stages, then degrees, each time the edit that brings most; what is left to the best layout of all
comes last, as one edit. Units: seconds, bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.recompute import parse_counts
from moeplan.costmodels.stages import balanced_split, check_split, chunk_letters
from moeplan.errors import MoeplanError
from moeplan.planner.constraints import violations
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import FIELDS, Problem
from moeplan.planner.space import feature_options

LEAST = 0.005
"""Share of the step that an edit must bring."""
GROUPS: tuple[tuple[str, ...], ...] = (
    ("dispatcher", "ep_overlap", "shared_overlap", "tp_overlap", "dp_overlap", "cuda_graphs", "recompute",
     "recompute_layers", "sharding", "optimizer_offload", "sequence_parallel"),
    ("micro_batch", "vpp", "stages"),
    ("tp", "cp", "pp", "ep", "etp"),
)  # fmt: skip
"""Fields by how much an edit of them disturbs a run: features, the schedule of the pipeline, degrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """A change of a layout."""

    fields: tuple[str, ...]
    """Fields that change, what follows from them left out."""
    before: Plan
    after: Plan

    @property
    def gain(self) -> float:
        """Share of the step time that it takes away."""
        return 1.0 - self.after.step_s / self.before.step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Improvement:
    """What could be better about a plan."""

    plan: Plan
    singles: tuple[Edit, ...]
    """Edits of the plan as it is, the one that brings most first."""
    path: tuple[Edit, ...]
    """Edits one after the other, each of what those before have made."""
    best: Plan
    """The best plan of all."""

    @property
    def gain(self) -> float:
        """What all edits bring together."""
        return 1.0 - (self.path[-1].after.step_s if self.path else self.plan.step_s) / self.plan.step_s


def improve(plan: Plan, best: Plan) -> Improvement:
    """Edits of `plan` towards `best`, the best plan of the same problem."""
    best = dataclasses.replace(best, imported=plan.imported)
    priced = functools.cache(lambda layout: price_plan(plan.problem, layout, imported=plan.imported))
    singles = sorted(_edits(plan, best, [name for group in GROUPS for name in group], priced), key=lambda e: -e.gain)
    once = {edit.fields: edit for edit in reversed(singles)}  # of each field the value that brings most
    path, now = [], plan
    if now.excess_bytes > 0:  # what makes it fit comes first, or there is no way but the whole one
        path = [singles[0]] if singles else [Edit(fields=_differing(now.layout, best.layout), before=now, after=best)]
        now = path[0].after
    for group in GROUPS:
        left = [name for name in group if now.layout != best.layout]
        while left:
            found = max(_edits(now, best, left, priced), key=lambda edit: edit.gain, default=None)
            if found is None:
                break
            path.append(found)
            now = found.after
            left.remove(found.fields[0])
    if 1.0 - best.step_s / now.step_s > LEAST:
        path.append(Edit(fields=_differing(now.layout, best.layout), before=now, after=best))
    return Improvement(plan=plan, singles=tuple(sorted(once.values(), key=lambda e: -e.gain)), path=tuple(path), best=best)


def _edits(plan: Plan, best: Plan, names: Sequence[str], priced: Callable[[Layout], Plan]) -> list[Edit]:
    """Single edits of the named fields that bring something: time, or that a plan fits which does not."""
    out = []
    too_large = plan.excess_bytes > 0
    for name in names:
        for value in _values(plan.problem, plan.layout, best.layout, name):
            layout = _changed(plan.problem, plan.layout, name, value)
            if layout is None or layout == plan.layout or not _allowed(plan.problem, plan.layout, layout):
                continue
            edit = Edit(fields=(name,), before=plan, after=priced(layout))
            if edit.after.excess_bytes <= 0 and (too_large or edit.gain > LEAST):
                out.append(edit)
    return out


def _allowed(problem: Problem, before: Layout, after: Layout) -> bool:
    """Whether the framework accepts a changed layout and what changes meets the conditions of the problem."""
    changed = [name for name in FIELDS if getattr(before, name) != getattr(after, name)]
    return bool(problem.allows(Layouts.of([after]), changed)[0]) and not violations(problem, after)


def _values(problem: Problem, layout: Layout, best: Layout, name: str) -> Iterator[Any]:
    """Values that a field might have instead."""
    now, wanted = getattr(layout, name), getattr(best, name)
    found: list[Any] = [wanted]
    if name in ("tp_overlap", "ep_overlap"):
        found += feature_options(problem)[name]
    elif name == "shared_overlap":
        found.append(not now)
    elif name == "dp_overlap":
        found += problem.pinned(name) or [True]
    elif name == "sequence_parallel":
        found += problem.pinned(name) or [layout.tp > 1]
    elif name == "dispatcher":
        found += problem.workload.era.dispatchers if problem.model.moe is not None else ()
    elif name == "stages":
        found.append("")
    elif name == "recompute_layers":
        found += _fewer_or_more(problem, layout)
    elif name in ("recompute", "cuda_graphs"):
        found += [(), *((*now[:i], *now[i + 1 :]) for i in range(len(now)))]
    elif name not in ("sharding", "optimizer_offload"):
        found += [now * 2, *([now // 2] if now % 2 == 0 else [])]
    yield from (value for value in dict.fromkeys(found) if value != now)


def _fewer_or_more(problem: Problem, layout: Layout) -> list[str]:
    """Texts of recompute in all layers, in one more or one less of every chunk, in half of them, and in one."""
    if not layout.recompute:
        return [""]
    chunks = chunk_letters(problem.model, layout.pp, layout.vpp, layout.stages)
    most, now = max(chunk.count("t") for chunk in chunks), parse_counts(layout.recompute_layers)
    count = now if isinstance(now, int) else most
    return ["", *(str(n) for n in (count - 1, count + 1, count // 2, 1) if 1 <= n <= most)]


def _changed(problem: Problem, layout: Layout, name: str, value: Any) -> Layout | None:
    """The layout with one field set and what follows from it; None where no layout does."""
    degrees = {n: getattr(layout, n) for n in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    if name in degrees:
        degrees[name] = value
    world = layout.world
    stage, ways, lanes = world // degrees["pp"], degrees["tp"] * degrees["cp"], degrees["ep"] * degrees["etp"]
    if world % degrees["pp"] or stage % ways or stage % lanes:
        return None
    values: dict[str, Any] = {**degrees, "dp": stage // ways, "edp": stage // lanes}
    if name not in degrees:
        values[name] = value
    if name == "tp":
        values["sequence_parallel"] = degrees["tp"] > 1
    try:
        if "stages" not in values and not _split_fits(problem, layout.stages, degrees):
            chunks = degrees["pp"] * degrees["vpp"]
            values["stages"] = balanced_split(problem.model, problem.workload.seq_len, chunks)
        changed = dataclasses.replace(layout, **values)
    except MoeplanError:
        return None
    if name != "recompute_layers" and changed.recompute_layers and not _counts_fit(problem, changed):
        changed = dataclasses.replace(changed, recompute_layers="")
    return changed


def _counts_fit(problem: Problem, layout: Layout) -> bool:
    """Whether the number of recomputed layers still goes with what they recompute and with the chunks."""
    return all(v.rule != "recompute-layers" for v in violations(problem, layout))


def _split_fits(problem: Problem, stages: str, degrees: dict[str, int]) -> bool:
    model, chunks = problem.model, degrees["pp"] * degrees["vpp"]
    if not stages:
        return len(model.layers) % chunks == 0
    return check_split(stages, len(model.layers), len(model.mtp), degrees["pp"], degrees["vpp"]) is None


def _differing(first: Layout, second: Layout) -> tuple[str, ...]:
    """Fields in which two layouts differ, but for what follows from others."""
    names = [name for group in reversed(GROUPS) for name in group]
    return tuple(name for name in names if getattr(first, name) != getattr(second, name))
