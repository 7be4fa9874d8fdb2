"""Certified refinement: the best split of layers over pipeline chunks of any layout, with a proof of how good it is.

A search (`search.py`) prices even and FLOP-balanced splits. Here every layout that could beat what it found under another
split, under any set of recomputed modules, is looked at. `bounds.Reach` passes over those that cannot. Of the others all splits
are looked at for one chunk a rank, by an exact dynamic programme (`problem.split_by_programme`), and all level splits
(`level_splits.py`) for several or where part of the layers recompute: bounded in closed form, run pass by pass where that is
not enough, priced where that is not enough either. So no split among these is faster than the best.

What is known of all other splits, of chunks within one layer of their mean, is a bound. Mixed-integer programmes close it where
a proof is asked for (`proofs.py`). The answer does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.planner.constraints import violations
from moeplan.planner.levels import Levels, once_each, open_rows, with_recompute
from moeplan.planner.problem import Problem
from moeplan.planner.relief import FULL, counts_layers
from moeplan.planner.search import Candidate, Search
from moeplan.planner.stages.bounds import Reach
from moeplan.planner.stages.level_splits import LevelSplits
from moeplan.planner.stages.problem import split_by_programme, splits_within
from moeplan.planner.stages.proofs import Task, proofs
from moeplan.planner.stages.setup import Group, Rest, groups, least_rest, split_text

AT_ONCE = 4096
"""Layouts whose stage problems are made together."""
RUN = 256
"""Layouts under a split whose passes are run together, the most promising first."""
PRICED = 16
"""Layouts under a split that are priced together."""
MOST_COUNT = 32
"""Numbers of layers of a chunk that recompute, of which all below are looked at."""
WITHIN = 4096
"""Splits of one chunk a rank that are looked at one by one."""
HALVINGS = 9
"""Of the interval in which the bound of all layouts lies."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a refinement found."""

    best: Candidate
    """The best layout; if nothing fits, one that takes forever."""
    considered: int
    """Pipelines, each with all its splits and sets of recomputed modules, that take less than the best with perfect balance."""
    opened: int
    """Stage problems that closed forms of their splits left open, and dynamic programmes; the most promising first."""
    programmes: int
    """Mixed-integer programmes that were solved to prove the rest."""
    bound_s: float
    """No split of those looked at is faster: all of one chunk a rank, the level ones of several; infinite if none was left."""
    uneven_bound_s: float
    """No split at all is faster where all layers of a kind recompute alike."""
    remarks: tuple[str, ...] = ()
    """Which solvers stood in for others."""

    @property
    def gap(self) -> float:
        """Share by which a split that should have been looked at might be faster than the best: 0 unless time ran out."""
        return self._gap(self.bound_s)

    @property
    def uneven_gap(self) -> float:
        """Share by which any split, however uneven, might be faster than the best."""
        return self._gap(min(self.bound_s, self.uneven_bound_s))

    def _gap(self, bound_s: float) -> float:
        return max(0.0, 1.0 - bound_s / self.best.step_s) if self.best.step_s < np.inf else 0.0


def refine(
    problem: Problem,
    best: Candidate | None,
    *,
    found: Search | None = None,
    gap: float = 0.0,
    deadline_s: float = np.inf,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Refinement:
    """The best layout under any split, starting from the best that a search found, if any.

    `found`: that search, to spare some of its work. `gap`: share of the step time that need not be proven of splits that are
    not level; 1: nothing. `deadline_s`: `time.perf_counter()` at which to stop. `jobs`: processes for the programmes.
    """
    return _Refining(problem, best or Candidate(Layout(), np.inf, np.inf), deadline_s, progress).run(found, gap, jobs)


def resplit(problem: Problem, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each layout with the best split found of its own layers, recompute as it is."""
    out = list(candidates)
    places = [i for i, c in enumerate(candidates) if c.layout.pp > 1 and "|" not in c.layout.recompute_layers]
    if not places:
        return out
    rows = Layouts.of([candidates[i].layout for i in places])
    rest, every = least_rest(problem, rows), list(groups(problem, rows))
    for row, i in enumerate(places):
        state = _Refining(problem, candidates[i], np.inf, None)
        state.solve(rows, [group.take(group.rows == row) for group in every if row in group.rows], rest)
        out[i] = state.best
    return out


@dataclass(frozen=True, slots=True)
class _Open:
    """Layouts of which a split might be faster than the best."""

    rows: Layouts
    reach: Reach
    """Of the layouts, or of the same without recompute."""
    counted: bool = False
    """Whether part of the layers of a chunk recompute."""

    def take(self, keep: Any) -> _Open:
        """Some of them."""
        return dataclasses.replace(self, rows=self.rows.take(keep), reach=self.reach.take(keep))

    def below(self, limit_s: float) -> _Open:
        """Those that could take less under some split."""
        some = self.take(self.reach.least_s < limit_s)
        some = dataclasses.replace(some, reach=some.reach.with_memory())
        return some.take(some.reach.may_beat(limit_s))


class _Level:
    """Level splits of a group of layouts, with what a step takes under each at least."""

    def __init__(self, problem: Problem, rows: Layouts, group: Group, rest: Rest) -> None:
        """`rows`, `rest`: of all layouts, of which the group has some."""
        self.problem, self.rows, self.group, self.splits = problem, rows, group, LevelSplits(group)
        self.spans, self.longest_s = self.splits.spans()
        self.took_s = self.spans + rest.seconds(group.rows[:, None], self.longest_s)
        self.least_s = self.took_s.min(initial=np.inf)

    def below(self, limit_s: float) -> tuple[Any, Any]:
        """Layouts and splits that fit and could take less, [pairs, 2], with what they take beside the passes at least."""
        below = self.took_s < limit_s
        layouts, splits = np.flatnonzero(below.any(axis=1)), np.flatnonzero(below.any(axis=0))
        below[np.ix_(layouts, splits)] &= self.splits.fits(layouts, splits)
        layouts, splits = np.nonzero(below)
        rest_s = self._rest_s(layouts, splits)
        took_s = self.spans[layouts, splits] + rest_s
        order = np.argsort(took_s, kind="stable")[: int((took_s < limit_s).sum())]
        return np.stack([layouts, splits], axis=1)[order], rest_s[order]

    def _rest_s(self, layouts: Any, splits: Any) -> Any:
        """What a step takes beside its passes at least, given the parameters that ranks hold, [pairs]."""
        held = self.splits.most_parameters(layouts, splits)
        rest = least_rest(self.problem, self.rows.take(self.group.rows[layouts]), held)
        return rest.seconds(slice(None), self.longest_s[layouts, splits])


class _Refining:
    """State of one refinement."""

    def __init__(self, problem: Problem, best: Candidate, deadline_s: float, progress: Progress | None) -> None:
        self.problem, self.best, self.deadline_s, self.progress = problem, best, deadline_s, progress
        self.opened = 0
        self.left: list[tuple[_Open, Any]] = []
        """What splits of one chunk a rank left open, with bounds."""
        self.remarks: dict[str, None] = {}

    def run(self, found: Search | None, gap: float, jobs: int) -> Refinement:
        """All layouts."""
        # 1. layouts that could be faster under another split
        if found is not None and found.opened and self.best.step_s <= found.bound_s:
            rows = Layouts.joined([rows.take(rows.pp > 1) for rows in found.opened])
        else:
            rows = open_rows(self.problem, self.best.step_s)
        rows = once_each(rows)
        reach = Reach.of(self.problem, _without_recompute(rows), FULL)
        considered = int((reach.least_s < self.best.step_s).sum())
        every = _Open(rows, reach).below(self.best.step_s)
        # 2. their stage problems
        unseen = [self._through(self._sets(every)), self._through(self._counts(every))]
        # 3. what they leave open
        known = [bounds[some.rows.vpp == 1] for some, bounds in self.left if not some.counted]
        left = min([*unseen, *(float(bounds.min(initial=np.inf)) for bounds in known)])
        uneven = [some.take(some.rows.vpp > 1) for some, _ in self.left if not some.counted]
        aim = self.best.step_s * (1.0 - gap)
        programmes, proven = self._close([some.below(aim) for some in uneven], aim, jobs)
        bound = min([self._least_of(uneven, aim), *proven])
        return Refinement(self.best, considered, self.opened, programmes, left, bound, tuple(self.remarks))

    def _sets(self, every: _Open) -> _Open:
        """Layouts under every set of recomputed modules."""
        rows, source = with_recompute(self.problem, every.rows)
        if any(rows.recompute_counts):  # pinned
            return dataclasses.replace(every.take(source), rows=rows)
        return _Open(rows, every.reach.recomputing(rows, source)).below(self.best.step_s)

    def _counts(self, every: _Open) -> _Open:
        """Layouts whose chunks recompute whole layers, in each number of them that could be faster."""
        rows = every.rows
        if not counts_layers(self.problem) or any(rows.recompute_counts):
            return every.take(slice(0, 0))
        reach, source = every.reach.counted(MOST_COUNT - 1, self.best.step_s)
        texts = ("", *(str(k) for k in range(1, MOST_COUNT)))
        whole = rows.take(source).with_columns(recompute=np.full(len(source), FULL))
        counted = whole.with_columns(recompute_counts=texts, recompute_count=reach.columns["lean_layers"].astype(np.int64))
        # whether chunks have so many layers is seen when a split is priced
        accepted = Levels(self.problem).accepts_recompute(whole) & self.problem.allows(counted, ("recompute_layers",))
        return _Open(counted, reach, counted=True).take(accepted).below(self.best.step_s)

    def _through(self, some: _Open) -> float:
        """Solve the stage problems of layouts, the most promising first; a bound on those for which there was no time."""
        some, start, tested_s = some.take(np.argsort(some.reach.least_s, kind="stable")), 0, self.best.step_s
        bound = some.reach.least_s
        while start < len(bound) and bound[start] < self.best.step_s:
            if time.perf_counter() >= self.deadline_s:
                return float(bound[start])
            if self.best.step_s < tested_s:  # what a better layout rules out
                some, start = some.take(slice(start, None)).below(self.best.step_s), 0
                bound, tested_s = some.reach.least_s, self.best.step_s
                continue
            self.open(some.take(slice(start, start + AT_ONCE)))
            start += AT_ONCE
            if self.progress is not None:
                self.progress(min(start, len(some.rows)), len(some.rows))
        return np.inf

    def open(self, some: _Open) -> None:
        """Solve the stage problems of some layouts and price what comes out."""
        solved_s = self.solve(some.rows, groups(self.problem, some.rows), least_rest(self.problem, some.rows))
        bound = np.maximum(some.reach.least_s, solved_s)
        keep = bound < self.best.step_s
        self.left.append((some.take(keep), bound[keep]))

    def solve(self, rows: Layouts, forms: Iterable[Group], rest: Rest) -> Any:
        """Solve stage problems in groups, and price what comes out; a bound on what is left of one chunk a rank, [n]."""
        level, of_plain = list[_Level](), np.full(len(rows), np.inf)
        for group in forms:
            if group.chunks_per_rank > 1 or group.again is not None:
                level.append(_Level(self.problem, rows, group, rest))
                of_plain[group.rows] = 0.0
            else:
                of_plain[group.rows] = np.minimum(of_plain[group.rows], self._plain(rows, group, rest))
        for one in sorted(level, key=lambda one: one.least_s):
            self._level(rows, one)
        return of_plain

    def _plain(self, rows: Layouts, group: Group, rest: Rest) -> Any:
        """Price the splits of a group of one chunk a rank that could be faster than the best; a bound on what is left, [n]."""
        bounds = np.full(len(group.rows), np.inf)
        self.opened += len(group.rows)
        for i, row in enumerate(group.rows.tolist()):
            stages, rest_s = group.one(i), float(rest.seconds(row))
            sizes = split_by_programme(stages)
            least_s = np.inf if sizes is None else float(stages.spans(sizes)[0]) + rest_s
            if sizes is None or least_s >= self.best.step_s:
                continue
            self._price(rows, group, np.array([i]), [sizes])
            splits = splits_within(stages, self.best.step_s - rest_s, WITHIN)
            if splits is None:
                bounds[i] = least_s
                continue
            exact = stages.exact_spans(splits) + rest.seconds(row, stages.slowest_s(splits))
            self._price_all(rows, group, np.full(len(splits), i), splits, exact)
        return bounds

    def _price_all(self, rows: Layouts, group: Group, places: Any, splits: Any, least_s: Any) -> None:
        """Price layouts of a group under splits in the order of what they take at least, while that beats the best."""
        order = np.argsort(least_s, kind="stable")
        for start in range(0, len(order), PRICED):
            some = order[start : start + PRICED]
            some = some[least_s[some] < self.best.step_s]
            if not len(some):
                break
            self._price(rows, group, places[some], splits[some].tolist())

    def _level(self, rows: Layouts, level: _Level) -> None:
        """Price the level splits of a group that could be faster than the best, until none is left."""
        pairs, rest_s = level.below(self.best.step_s)
        self.opened += len(np.unique(pairs[:, 0]))
        for start in range(0, len(pairs), RUN):
            layouts, splits = pairs[start : start + RUN].T
            beside_s = rest_s[start : start + RUN]
            if level.spans[layouts[0], splits[0]] + beside_s[0] >= self.best.step_s:
                break
            exact_s = level.splits.exact_spans(layouts, splits) + beside_s
            self._price_all(rows, level.group, layouts, level.splits.splits[splits], exact_s)

    def _price(self, rows: Layouts, group: Group, places: Any, splits: Sequence[Sequence[int]]) -> None:
        """Exact prices of layouts of a group under splits; the best that the framework accepts and the devices hold is kept."""
        if not len(places):
            return
        texts = [split_text(self.problem, sizes, group.alone) for sizes in splits]
        known = tuple(dict.fromkeys(texts))
        split = rows.take(group.rows[places])
        split = split.with_columns(split=np.array([known.index(text) for text in texts]), stages=known)
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

    def _least_of(self, left: Sequence[_Open], low: float) -> float:
        """Seconds of a step above `low` that bounds leave none of the layouts below; infinite without any."""
        high = self.best.step_s
        left = [rest for some in left if len((rest := some.below(high)).rows)]
        if not left or high == np.inf:
            return np.inf
        low = max(low, high / 2.0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2.0
            below = [rest for some in left if len((rest := some.below(middle)).rows)]
            low, high, left = (low, middle, below) if below else (middle, high, left)
        return low

    def _close(self, left: Sequence[_Open], aim_s: float, jobs: int) -> tuple[int, list[float]]:
        """Programmes that were solved, and what they prove of each layout; splits that come out are priced."""
        tasks, at = [], []
        for some in left:
            rest, bound = some.reach.columns["rest_s"], some.reach.least_s
            for group in groups(self.problem, some.rows):
                for i, row in enumerate(group.rows.tolist()):
                    tasks.append(Task(group.one(i), float(rest[row]), float(bound[row]), aim_s, self.deadline_s))
                    at.append((some.rows, group, i))
        order = sorted(range(len(tasks)), key=lambda place: tasks[place].bound_s)
        programmes, bounds = 0, []
        for place, (task, proof) in enumerate(zip(order, proofs([tasks[i] for i in order], jobs), strict=True)):
            programmes += proof.programmes
            bounds.append(proof.bound_s)
            self.remarks |= {proof.remark: None} if proof.remark else {}
            rows, group, i = at[task]
            self._price(rows, group, np.full(len(proof.splits), i), proof.splits)
            if self.progress is not None:
                self.progress(place + 1, len(order))
        return programmes, bounds


def _without_recompute(rows: Layouts) -> Layouts:
    """The layouts without recompute."""
    return rows.with_columns(recompute=0 * rows.recompute, recompute_counts=("",), recompute_count=0 * rows.recompute_count)
