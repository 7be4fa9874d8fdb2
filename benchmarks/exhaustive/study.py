"""Exhaustive search beside the certified one: everything priced exactly.

A stage problem is a layout with what it recomputes whose split of layers is to be chosen; an exhaustive search opens them all.
Times in seconds, memory in bytes.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.exhaustive.everything import (
    Again,
    every_split,
    layouts,
    number_of_splits,
    recompute_counts,
    recompute_sets,
    searched_splits,
)
from benchmarks.exhaustive.questions import Question
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.planner.constraints import RULES
from moeplan.planner.problem import Problem
from moeplan.planner.solve import Splits, solve

SAME = 1e-12
"""Share by which two ways to add up one price may differ."""
AT_ONCE = 100_000
"""Rows priced together."""
MOST_SPLITS = 2000
"""Splits of a pipeline of which all are looked at for what the level ones lose."""


@dataclass(slots=True)
class Everything:
    """What pricing everything gives."""

    stage_problems: int = 0
    """Layouts with pp > 1, each with everything that it may recompute and both places of the head where there are two."""
    looked_at: int = 0
    """Layouts under splits that the framework accepts."""
    priced: int = 0
    """Those of them that the devices hold."""
    best: Layout | None = None
    """Among the splits that the certified search is to look at; None: nothing fits."""
    best_s: float = np.inf
    best_of_all: Layout | None = None
    """Among all splits."""
    best_of_all_s: float = np.inf
    losses: list[float] = field(default_factory=list)
    """Of each layout whose level splits only are searched: share of its step by which the best of all splits is faster."""
    only_uneven: int = 0
    """Such layouts that no level split makes fit and another one does."""
    unseen: int = 0
    """Such layouts with too many splits to look at all."""
    seconds: float = 0.0
    """Processor time."""


def everything(problem: Problem) -> Everything:
    """Price everything."""
    started, out = time.process_time(), Everything()
    found = list(layouts(problem))
    for pp, vpp in dict.fromkeys((x.pp, x.vpp) for x in found):
        rows = Layouts.of([x for x in found if (x.pp, x.vpp) == (pp, vpp)])
        _pipeline(problem, rows, pp, vpp, out)
    out.seconds = time.process_time() - started
    return out


def _pipeline(problem: Problem, rows: Layouts, pp: int, vpp: int, out: Everything) -> None:
    """All layouts of one pipeline."""
    model, forms = problem.model, 2 if problem.model.mtp and pp * vpp > 2 else 1
    for counted in (False, True):
        searched = searched_splits(problem, pp, vpp, counted)
        every = number_of_splits(model, pp * vpp) * forms <= MOST_SPLITS
        splits = tuple(searched | every_split(model, pp * vpp)) if every else tuple(searched)
        largest = max(max(sizes) for sizes in searched.values())
        some = _with_sets(problem, rows, recompute_counts(largest) if counted else recompute_sets(model))
        # level splits first, all others behind them
        table = _Least(problem, some, out)
        table.price(splits[: len(searched)])
        if table.least_s.min(initial=np.inf) < out.best_s:
            out.best_s, out.best = table.best()
        level_s = table.least_s.copy()
        table.price(splits[len(searched) :])
        if table.least_s.min(initial=np.inf) < out.best_of_all_s:
            out.best_of_all_s, out.best_of_all = table.best()
        if pp > 1:
            out.stage_problems += forms * int(table.accepted.sum())
        if vpp > 1 or (counted and pp > 1):
            both = np.isfinite(level_s)
            if every:
                out.losses += (1.0 - table.least_s[both] / level_s[both]).tolist()
                out.only_uneven += int((np.isfinite(table.least_s) & ~both).sum())
            else:
                out.unseen += int(both.sum())


def _with_sets(problem: Problem, rows: Layouts, sets: Sequence[Again]) -> Layouts:
    """Every layout with everything that it may recompute, as far as conditions allow."""
    row, place = (x.ravel() for x in np.indices((len(rows), len(sets))))
    texts = tuple(dict.fromkeys(again.layers for again in sets))
    counts = np.array([texts.index(again.layers) for again in sets])
    masks = np.array([again.mask for again in sets])
    spread = rows.take(row).with_columns(recompute=masks[place], recompute_counts=texts, recompute_count=counts[place])
    return spread.take(problem.allows(spread))


class _Least:
    """The least step time of each of n layouts under the splits that were priced."""

    def __init__(self, problem: Problem, rows: Layouts, out: Everything) -> None:
        self.problem, self.rows, self.out = problem, rows, out
        self.accepted = np.zeros(len(rows), np.bool_)
        self.least_s = np.full(len(rows), np.inf)
        self.split = [""] * len(rows)

    def price(self, splits: Sequence[str]) -> None:
        """Price all layouts under each split."""
        n = len(self.rows)
        at_once = max(1, AT_ONCE // max(n, 1))
        for start in range(0, len(splits) if n else 0, at_once):
            texts = tuple(splits[start : start + at_once])
            row, place = np.tile(np.arange(n), len(texts)), np.repeat(np.arange(len(texts)), n)
            took = self._step_s(self.rows.take(row).with_columns(split=place, stages=texts), row)
            took = took.reshape(len(texts), n)
            least = took.argmin(axis=0)
            for i in np.flatnonzero(took.min(axis=0) < self.least_s):
                self.least_s[i], self.split[i] = took[least[i], i], texts[least[i]]

    def _step_s(self, rows: Layouts, row: Any) -> Any:
        """Step time of layouts, infinite where the framework does not accept one or the devices do not hold it."""
        problem, took = self.problem, np.full(len(rows), np.inf)
        broken = functools.reduce(np.logical_or, [rule.broken(problem, rows) for rule in RULES])
        self.accepted[row[~broken]] = True
        places = np.flatnonzero(~broken)
        self.out.looked_at += len(places)
        if len(places):
            peak = _pricing(problem, rows.take(places)).peak_bytes()
            places = places[problem.excess_bytes(peak) <= 0.0]
        if len(places):
            took[places] = _pricing(problem, rows.take(places)).step_seconds()
        self.out.priced += len(places)
        return took

    def best(self) -> tuple[float, Layout]:
        """The least step time of all, and its layout."""
        i = int(self.least_s.argmin())
        return float(self.least_s[i]), replace(self.rows.row(i), stages=self.split[i])


def _pricing(problem: Problem, rows: Layouts) -> Pricing:
    return Pricing(problem.model, problem.profile, problem.workload, rows, exact=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Both searches of one problem."""

    question: Question
    everything: Everything
    found: Layout | None
    """The fastest plan of the certified search; None: it says that nothing fits."""
    found_s: float
    opened: int
    """Stage problems that it solved."""
    gap: float
    """What its certificate leaves open."""
    seconds: float
    """Its processor time."""

    @property
    def same(self) -> bool:
        """Whether both found the same optimum."""
        if self.found is None or self.everything.best is None:
            return self.found is None and self.everything.best is None
        return abs(self.found_s / self.everything.best_s - 1.0) <= SAME

    @property
    def fewer(self) -> float:
        """How many times fewer stage problems the certified search opens."""
        return self.everything.stage_problems / max(self.opened, 1)


def compare(question: Question) -> Comparison:
    """Search one problem in both ways."""
    problem, started = question.problem(), time.process_time()
    plans = solve(problem, keep=1, splits=Splits()).plans
    seconds = time.process_time() - started
    best = min(plans, key=lambda plan: plan.step_s) if plans else None
    proof = best.certificate if best is not None else None
    return Comparison(
        question=question,
        everything=everything(problem),
        found=best.layout if best is not None else None,
        found_s=best.step_s if best is not None else np.inf,
        opened=proof.opened if proof is not None else 0,
        gap=proof.gap if proof is not None else 0.0,
        seconds=seconds,
    )


def study(questions: Sequence[Question], jobs: int = 1) -> list[Comparison]:
    """Compare all, by several processes if asked for."""
    if jobs < 2 or len(questions) < 2:
        return [compare(question) for question in questions]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compare, questions))
