"""Certified refinement: the best split of layers over pipeline chunks of any layout, with a proof of how good it is.

A search (`search.py`) prices even and FLOP-balanced splits. Here every layout that could beat what it found under another
split, under any set of recomputed modules, is looked at. `stage_bounds.may_beat` passes over those that cannot. For the others
the stage problem is solved: exactly for one chunk a rank (`stage_problem.split_by_programme`), by the best of many level splits
for several; its splits are priced like any layout. What the closed form of a stage problem leaves below the best price is
closed by mixed-integer programmes (`partition.py`): a split that comes out and takes longer than its closed form adds a longest
path through its passes to the programme, until what comes out is what it says, or nothing is left that would be faster.

The splits: any for one chunk a rank; for several, chunks within one layer of their mean and, but for the first and the last,
within one layer of each other in a virtual stage. The answer does not depend on the number of processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layout, Layouts, mask_of
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.price import Pricing
from moeplan.errors import ProblemError
from moeplan.planner.constraints import violations
from moeplan.planner.problem import Problem
from moeplan.planner.search import Candidate, open_rows, with_recompute
from moeplan.planner.stage_bounds import may_beat
from moeplan.planner.stage_problem import StageProblem, level_splits, split_by_programme
from moeplan.planner.stage_setup import Form, forms, least_rest_s, split_text

AT_ONCE = 512
"""Layouts whose stage problems are made together."""
OPENED = 2048
"""Stage problems that are solved where no proof is asked for."""
TRIED = 4
"""Level splits of a layout that are priced, the quickest of those that fit."""
PATHS = 12
"""Programmes of one stage problem, each with one path more."""
HALVINGS = 7
"""Of the interval in which the bound of a layout lies."""
SAME = 1e-6
"""Share by which a split may take longer than its programme says and still counts as what it says."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a refinement found."""

    best: Candidate
    """The best layout."""
    considered: int
    """Pipelines, each with all its splits and sets of recomputed modules, that the search had left open."""
    opened: int
    """Stage problems that were solved, the most promising first."""
    programmes: int
    """Mixed-integer programmes that were solved to prove the rest."""
    bound_s: float
    """No split of any layout is faster; infinite if none was left open."""

    @property
    def gap(self) -> float:
        """Share by which a split that was not found might be faster than the best."""
        return max(0.0, 1.0 - self.bound_s / self.best.step_s)


def refine(
    problem: Problem,
    best: Candidate,
    *,
    gap: float = 0.0,
    deadline_s: float = np.inf,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Refinement:
    """The best layout under any split, starting from the best that a search found.

    `gap`: share of the step time that need not be proven. `deadline_s`: `time.perf_counter()` at which to stop proving.
    `jobs`: processes for the programmes.
    """
    return _Refining(problem, best, deadline_s, progress).run(gap, jobs)


def resplit(problem: Problem, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each layout with the best split found of its own layers, recompute as it is."""
    out = list(candidates)
    for i, candidate in enumerate(candidates):
        if candidate.layout.pp > 1:
            state = _Refining(problem, candidate, np.inf, None)
            state.open(Layouts.of([candidate.layout]))
            out[i] = state.best
    return out


@dataclass(frozen=True, slots=True)
class _Left:
    """A form of a layout of which a split might still be faster than the best."""

    row: Layout
    form: Form
    rest_s: float
    """Seconds of a step beside its passes, at least."""
    bound_s: float
    """Seconds of a step, at least."""


class _Refining:
    """State of one refinement."""

    def __init__(self, problem: Problem, best: Candidate, deadline_s: float, progress: Progress | None) -> None:
        self.problem, self.best, self.deadline_s, self.progress = problem, best, deadline_s, progress
        self.opened = 0
        self.left: list[_Left] = []

    def run(self, gap: float, jobs: int) -> Refinement:
        """All layouts."""
        # 1. layouts that could be faster under another split, the most promising first
        rows = open_rows(self.problem, self.best.step_s)
        if any(rows.recompute_counts):
            raise ProblemError(
                "splits are not looked at where recompute_layers is pinned", hint="leave out --refine or --pin recompute_layers"
            )
        considered = len(rows)
        rows = rows.take(self._least_s(rows) < self.best.step_s)
        rows = rows.take(may_beat(self.problem, rows, self.best.step_s, leanest=mask_of(["full"], RECOMPUTE_MODULES)))
        rows = with_recompute(self.problem, rows)
        rows = rows.take(may_beat(self.problem, rows, self.best.step_s))
        bound = self._least_s(rows)
        order = np.argsort(bound, kind="stable")
        rows, bound = rows.take(order), bound[order]
        # 2. their stage problems
        start, tested_s = 0, self.best.step_s
        while start < len(rows) and bound[start] < self.best.step_s and time.perf_counter() < self.deadline_s:
            if gap >= 1.0 and self.opened >= OPENED:
                break
            if self.best.step_s < tested_s:  # what a better layout rules out
                left = may_beat(self.problem, rows, self.best.step_s)
                left[:start] = False
                rows, bound, start, tested_s = rows.take(left), bound[left], 0, self.best.step_s
                continue
            self.open(rows.take(slice(start, start + AT_ONCE)))
            start += AT_ONCE
            if self.progress is not None:
                self.progress(min(start, len(rows)), len(rows))
        unseen = float(bound[start]) if start < len(rows) else np.inf
        # 3. what their closed forms leave open
        self._tighten()
        aim = self.best.step_s * (1.0 - gap)
        open_ = [some for some in self.left if some.bound_s < aim]
        programmes, proven = self._close(open_, aim, jobs)
        known = [some.bound_s for some in self.left if aim <= some.bound_s < self.best.step_s]
        return Refinement(self.best, considered, self.opened, programmes, min([unseen, *known, *proven]))

    def _least_s(self, rows: Layouts) -> Any:
        """Seconds that no split of each layout can beat, memory aside, [n]."""
        pricing = Pricing(self.problem.model, self.problem.profile, self.problem.workload, rows)
        each = micro_batches(self.problem.workload, rows) * pricing.whole_micro_batch_s() / rows.pp
        return each + least_rest_s(self.problem, rows)

    def open(self, rows: Layouts) -> None:
        """Solve the stage problems of some layouts and price what comes out."""
        rest, least = least_rest_s(self.problem, rows), self._least_s(rows)
        places, texts = [], []
        for form in forms(self.problem, rows):
            self.opened += 1
            splits, bound = self._splits(form.stages, float(rest[form.row]))
            bound = max(bound, float(least[form.row]))
            if bound < self.best.step_s:
                self.left.append(_Left(rows.row(form.row), form, float(rest[form.row]), bound))
            places += [form.row] * len(splits)
            texts += [split_text(self.problem, sizes, form.alone) for sizes in splits]
        self._price(rows, places, texts)

    def _tighten(self) -> None:
        """Raise the bounds of what is left to the least time that `may_beat` does not rule out."""
        if not self.left:
            return
        rows = Layouts.of([some.row for some in self.left])
        low, high = np.array([some.bound_s for some in self.left]), np.full(len(rows), self.best.step_s)
        for _ in range(HALVINGS):
            middle = (low + high) / 2.0
            open_ = may_beat(self.problem, rows, middle)
            low, high = np.where(open_, low, middle), np.where(open_, middle, high)
        self.left = [dataclasses.replace(some, bound_s=float(b)) for some, b in zip(self.left, low, strict=True)]

    def _splits(self, stages: StageProblem, rest_s: float) -> tuple[Sequence[Any], float]:
        """Splits of a layout that are worth a price, and a bound on all of them."""
        if stages.chunks_per_rank == 1:
            sizes = split_by_programme(stages)
            if sizes is None:
                return [], np.inf
            bound = float(stages.spans(sizes)[0]) + rest_s
            return ([sizes] if bound < self.best.step_s else []), bound
        splits = level_splits(stages)
        splits = splits[(stages.excess_bytes(splits) <= 0.0) & (stages.spans(splits) + rest_s < self.best.step_s)]
        took = stages.exact_spans(splits) + rest_s if len(splits) else np.zeros(0)
        return [splits[i] for i in np.argsort(took, kind="stable")[:TRIED] if took[i] < self.best.step_s], rest_s

    def _price(self, rows: Layouts, places: Sequence[int], texts: Sequence[str]) -> None:
        """Exact prices of layouts under splits; the best that the framework accepts and the devices hold is kept."""
        if not places:
            return
        known = tuple(dict.fromkeys(texts))
        split = rows.take(np.array(places)).with_columns(split=np.array([known.index(t) for t in texts]), stages=known)
        pricing = Pricing(self.problem.model, self.problem.profile, self.problem.workload, split, exact=True)
        peak, took = pricing.peak_bytes(), pricing.step_seconds()
        took = np.where(self.problem.excess_bytes(peak) <= 0.0, took, np.inf)
        for i in np.argsort(took, kind="stable"):
            if took[i] >= self.best.step_s:
                break
            layout = split.row(int(i))
            if not violations(self.problem, layout):
                self.best = Candidate(layout, float(took[i]), float(peak[i]))
                break

    def _close(self, left: Sequence[_Left], aim_s: float, jobs: int) -> tuple[int, list[float]]:
        """Programmes that were solved, and what they prove of each layout; splits that come out are priced."""
        left = sorted(left, key=lambda some: some.bound_s)
        task = functools.partial(_proof, aim_s=aim_s, deadline_s=self.deadline_s)
        programmes, bounds = 0, []
        for place, (some, proof) in enumerate(zip(left, _mapped(task, left, jobs), strict=True)):
            programmes += proof.programmes
            bounds.append(proof.bound_s)
            texts = [split_text(self.problem, sizes, some.form.alone) for sizes in proof.splits]
            self._price(Layouts.of([some.row]), [0] * len(texts), texts)
            if self.progress is not None:
                self.progress(place + 1, len(left))
        return programmes, bounds


@dataclass(frozen=True, slots=True)
class _Proof:
    bound_s: float
    programmes: int
    splits: list[list[int]]


def _proof(left: _Left, *, aim_s: float, deadline_s: float) -> _Proof:
    """A bound on all splits of a layout, as far as it is below `aim_s`, and splits that came out on the way."""
    from moeplan.planner.partition import split_by_milp  # the solvers are loaded where they are needed

    stages, bound, splits = left.form.stages, left.bound_s, list[list[int]]()
    paths = _first_paths(stages)
    for count in range(PATHS):
        if time.perf_counter() > deadline_s:
            return _Proof(bound, count, splits)
        found = split_by_milp(stages, paths=paths, within_s=aim_s - left.rest_s)
        if found.sizes is None:
            return _Proof(np.inf if found.proven else bound, count + 1, splits)
        splits.append(found.sizes)
        said = max([float(stages.spans(found.sizes)[0]), *(stages.along(found.sizes, path) for path in paths)])
        bound = max(bound, said + left.rest_s)
        if float(stages.exact_spans(found.sizes)[0]) <= said * (1.0 + SAME):
            break
        paths.append(stages.critical(found.sizes))
    return _Proof(bound, count + 1, splits)


def _first_paths(stages: StageProblem) -> list[Any]:
    """Paths through the passes of the quickest level splits."""
    if stages.chunks_per_rank == 1:
        return []
    splits = level_splits(stages)
    if not len(splits):
        return []
    quickest = np.argsort(stages.exact_spans(splits), kind="stable")[:TRIED]
    return [stages.critical(splits[i]) for i in quickest]


def _mapped(task: Callable[[_Left], _Proof], items: Sequence[_Left], jobs: int) -> Iterable[_Proof]:
    if jobs == 1 or len(items) < 2:
        return map(task, items)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(items)), context) as pool:
        return list(pool.map(task, items))
