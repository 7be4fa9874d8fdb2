"""Why conditions leave no plan: the smallest set of pins and forbidden conditions found that conflict.

A set conflicts if no layout that meets it passes the rules and fits, while every smaller part of it leaves one. QuickXplain
(Junker, AAAI 2004) finds one such set, then smaller ones are looked for in the order of their size; what a plan found on the
way meets cannot conflict. At most `MOST_SEARCHES` searches; beyond that the set conflicts still but may not be the smallest.
A field that is not searched has its pinned value or the one of every search: without its pin both count as possible.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.planner import space
from moeplan.planner.constraints import LEVELS, RULES, Level
from moeplan.planner.problem import FIELDS, Problem
from moeplan.planner.search import search
from moeplan.units import format_bytes

MOST_SEARCHES = 40
"""Searches for one conflict."""
LOOKED_AT = 4096
"""Layouts that are looked at on each level for the rules that refuse them."""
DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")
"""Degrees whose product is the number of GPUs."""
Chosen = frozenset[int]
"""Places of conditions: pins first, then the forbidden ones."""

_LATER: dict[str, Level] = {
    "vpp": "chunks", "micro_batch": "batch", "dispatcher": "features", "ep_overlap": "features",
    "shared_overlap": "features", "tp_overlap": "features", "recompute": "recompute",
}  # fmt: skip
"""Levels at which a search settles the fields that are no degrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """Conditions that together leave no plan."""

    problem: Problem
    """The question with these conditions alone."""
    rules: tuple[str, ...]
    """Rules that refuse all that the conditions leave; empty: they leave nothing, or memory alone refuses it."""
    excess_bytes: float
    """By how much the smallest layout that they leave misses the device; infinite where memory is not the reason."""
    reason: str
    """Rules, memory or identity in words."""
    enough: tuple[str, ...]
    """Conditions of the set without any one of which the whole question has a plan, as far as that is known."""
    others: bool
    """Whether other conditions conflict too, so that no one of these is enough."""
    smallest: bool
    """Whether all smaller sets are known not to conflict."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions as texts."""
        return _texts(self.problem)

    def sentence(self) -> str:
        """What conflicts, why, and what can be done, in one sentence."""
        names, name, gpus = self.conditions, self.problem.model.name, self.problem.profile.cluster.gpus
        listed = f"{', '.join(names[:-1])} and {names[-1]} leave" if len(names) > 1 else f"{names[0]} leaves"
        out = f"{listed} no layout of {name} on {gpus} GPUs{self.reason}"
        if not self.smallest:
            out += "; fewer of them may conflict already"
        if self.others:
            return f"{out}; other conditions conflict too"
        if self.enough == names:
            return f"{out}; without {('it', 'either')[len(names) - 1] if len(names) < 3 else 'any one of them'} there is a plan"
        return f"{out}; without {' or without '.join(self.enough)} there is a plan" if self.enough else out


def smallest_conflict(problem: Problem, progress: Callable[[int, int], None] | None = None) -> Conflict | None:
    """The conflict of a problem that has no plan; None where conditions are not the reason."""
    tried = _Tried(problem, progress)
    whole = tried.all
    if not whole or not tried.leaves_a_plan(frozenset()):
        return None
    found, smallest = _smallest(tried, _quickxplain(tried, frozenset(), False, sorted(whole)))
    texts = _texts(problem)
    without = {texts[i]: tried.leaves_a_plan(whole - {i}) for i in sorted(found)}
    asked = tried.asked(found)
    excess = search(asked, 1).nearest_excess_bytes
    refusing = () if math.isfinite(excess) else _refusing(asked)
    return Conflict(
        problem=asked,
        rules=tuple(name for name, _ in refusing),
        excess_bytes=excess,
        reason=_reason(asked, refusing, excess),
        enough=tuple(text for text, leaves in without.items() if leaves),
        others=all(leaves is False for leaves in without.values()),
        smallest=smallest,
    )


# -- sets of conditions --------------------------------------------------------------------------------------------------


class _Tried:
    """What is known of sets of conditions of one problem."""

    def __init__(self, problem: Problem, progress: Callable[[int, int], None] | None) -> None:
        self.problem, self.progress = problem, progress
        self.all: Chosen = frozenset(range(len(problem.pins) + len(problem.forbidden)))
        self.widening = [i for i, c in enumerate(problem.pins) if c.field in _PINNED_ONLY and c.operation in ("=", "==")]
        self.met: list[Chosen] = []
        """Conditions that plans found so far meet."""
        self.infeasible = {self.all}
        self.searches = 0

    def asked(self, chosen: Chosen) -> Problem:
        """The question with some of its conditions."""
        first = len(self.problem.pins)
        pins = tuple(c for i, c in enumerate(self.problem.pins) if i in chosen)
        return replace(
            self.problem, pins=pins, forbidden=tuple(c for i, c in enumerate(self.problem.forbidden, first) if i in chosen)
        )

    def leaves_a_plan(self, chosen: Chosen) -> bool | None:
        """Whether some plan meets the chosen conditions; None where searches are used up before that is known."""
        dropped = [i for i in self.widening if i not in chosen]
        for way in (chosen.union(more) for n in range(len(dropped) + 1) for more in itertools.combinations(dropped, n)):
            if any(chosen <= met for met in self.met):
                return True
            if way not in self.infeasible:
                if self.searches == MOST_SEARCHES:
                    return None
                self._search(way)
        return any(chosen <= met for met in self.met)

    def _search(self, chosen: Chosen) -> None:
        self.searches += 1
        if self.progress is not None:
            self.progress(self.searches, MOST_SEARCHES)
        best = search(self.asked(chosen), 1).best
        if best:
            self.met.append(self._met_by(best[0].layout))
        else:
            self.infeasible.add(chosen)

    def _met_by(self, layout: Layout) -> Chosen:
        one, pins = Layouts.of([layout]), self.problem.pins
        meets = [bool(c.holds(one)[0]) for c in pins] + [not c.holds(one)[0] for c in self.problem.forbidden]
        return frozenset(i for i, yes in enumerate(meets) if yes)


_PINNED_ONLY = (*space.NOT_SEARCHED, "optimizer_offload", "recompute", "shared_overlap", "tp_overlap")
"""Fields whose pin lets values in that no search looks at without it."""


def _quickxplain(tried: _Tried, known: Chosen, changed: bool, rest: Sequence[int]) -> Chosen:
    """Conditions of `rest`, none of which can be left out, that conflict with those in `known`."""
    if changed and tried.leaves_a_plan(known) is False:
        return frozenset()
    if len(rest) == 1:
        return frozenset(rest)
    first, second = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    right = _quickxplain(tried, known.union(first), True, second)
    return right | _quickxplain(tried, known | right, bool(right), first)


def _smallest(tried: _Tried, found: Chosen) -> tuple[Chosen, bool]:
    """The first set in the order of sizes that conflicts, and whether every smaller one is known to leave a plan."""
    known = True
    for size in range(1, len(found)):
        for some in itertools.combinations(sorted(tried.all), size):
            verdict = tried.leaves_a_plan(frozenset(some))
            if verdict is False:
                return frozenset(some), known
            known = known and verdict is True
    return found, known


# -- words ---------------------------------------------------------------------------------------------------------------


def _texts(problem: Problem) -> tuple[str, ...]:
    return (*(c.text for c in problem.pins), *(f"forbidden {c.text}" for c in problem.forbidden))


def _reason(problem: Problem, refusing: Sequence[tuple[str, str]], excess_bytes: float) -> str:
    """What follows "leave no layout"."""
    if math.isfinite(excess_bytes):
        device = f"the {format_bytes(problem.device_bytes)} of a {problem.profile.cluster.device.name}"
        return f" that fits: the smallest misses {device} by {format_bytes(max(excess_bytes, 0.0))}"
    if refusing:
        return f": {'; '.join(f'{why} (rule {name})' for name, why in refusing)}"
    return f": {_nothing_left(problem)}"


def _nothing_left(problem: Problem) -> str:
    """Why no layout at all meets the conditions."""
    conditions = (*problem.pins, *problem.forbidden)
    fields, gpus = {c.field for c in conditions}, problem.profile.cluster.gpus
    none_meets = "both" if len(conditions) == 2 else "all of them"
    if len(conditions) == 1:
        return _values_of(problem, conditions[0].field)
    if len(fields) == 1:
        return f"no {conditions[0].field} meets {none_meets}"
    for product in (DENSE, EXPERT):
        if fields <= set(product) and all(c.operation in ("=", "==") for c in problem.pins) and not problem.forbidden:
            values = [int(c.value) for c in problem.pins]
            names, factors = "*".join(c.field for c in problem.pins), "*".join(map(str, values))
            fault = "is not" if len(fields) == len(product) else "does not divide"
            return f"{names} = {factors} = {math.prod(values)} {fault} the {gpus} GPUs"
    if fields <= {*DENSE, *EXPERT}:
        return f"{'*'.join(DENSE)} and {'*'.join(EXPERT)} are the {gpus} GPUs"
    return f"none meets {none_meets}"


def _values_of(problem: Problem, field: str) -> str:
    """What values a field can have."""
    model, era = problem.model, problem.workload.era
    if model.moe is None and field in ("ep", "etp", "dispatcher", "ep_overlap"):
        return "the model has no experts"
    if field == "shared_overlap" and not (model.moe is not None and model.moe.shared_width):
        return "the model has no shared experts"
    if field in (*DENSE, *EXPERT):
        return f"{field} must divide the {problem.profile.cluster.gpus} GPUs"
    if field in space.NOT_SEARCHED:
        return f"{field} is not searched but for a value that '=' pins"
    return {
        "micro_batch": f"a micro-batch must divide the global batch {problem.workload.global_batch}",
        "vpp": f"there are 1 to {len(model.layers) + 2} virtual stages",
        "dispatcher": f"era {era.name} has {', '.join(era.dispatchers)}",
        "ep_overlap": f"era {era.name} has no expert overlap",
        "shared_overlap": f"era {era.name} has no overlap of shared experts",
    }.get(field, f"no value of {field} meets that")


# -- rules ---------------------------------------------------------------------------------------------------------------


def _refusing(problem: Problem) -> list[tuple[str, str]]:
    """Few rules that refuse whatever meets the conditions and passes the levels before, with the reason; at most `LOOKED_AT`
    layouts of each level are looked at."""
    rows = space.degree_grid(problem)
    for level in LEVELS:
        rows = _spread(problem, rows, level)
        rows = rows.take(problem.allows(rows, [f for f in FIELDS if _LATER.get(f, "degrees") == level]))
        rules = [rule for rule in RULES if rule.level == level]
        broken = np.array([rule.broken(problem, rows) for rule in rules], np.bool_)  # [rules, n]
        if broken.any(axis=0).all():
            return [(rules[i].name, _why(problem, rules[i].reason, rules[i].demands, rows, broken[i])) for i in _cover(broken)]
        rows = rows.take(~broken.any(axis=0))
        rows = rows.take(np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(np.int64)))
    return []


def _spread(problem: Problem, rows: Layouts, level: Level) -> Layouts:
    """Every layout with every option of a level."""
    if level == "chunks":
        return space.with_balanced_splits(problem, space.cross(rows, space.chunk_options(problem)))
    if level == "batch":
        return space.cross(rows, space.batch_options(problem))
    if level == "features":
        return space.with_shared_overlap(problem, space.cross(rows, space.feature_options(problem)))
    if level == "recompute":
        return space.with_shared_overlap(problem, space.cross(rows, {"recompute": space.recompute_sets(problem)}))
    return rows


def _cover(broken: Any) -> list[int]:
    """Places of rules that together refuse every layout: the one that refuses most, then of what it leaves, and so on."""
    out: list[int] = []
    left = np.ones(broken.shape[1], np.bool_)
    while left.any():
        out.append(int((broken & left).sum(axis=1).argmax()))
        left &= ~broken[out[-1]]
    return out


def _why(problem: Problem, reason: Callable[[Problem, Layout], str], demands: str, rows: Layouts, broken: Any) -> str:
    """What a rule says of all layouts, with the numbers where it says the same of each; else what it asks for."""
    said = {reason(problem, rows.row(int(i))) for i in np.flatnonzero(broken)[:: max(1, int(broken.sum()) // 50)]}
    return said.pop() if len(said) == 1 else demands
