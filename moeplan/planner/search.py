"""Best-first search of a problem's space that proves its answer.

Every layout of the full product is accounted for: refused by a named rule, excluded by a condition of the user, too large for
the device, a copy of another, out of the race because a lower bound on its step time exceeds what was found, or priced. A group
of layouts with the same degrees is opened in the order of its bound (`bounds.py`) and only while that bound beats the k-th best
plan found so far, so the result is that of pricing everything. Within a group, layouts are priced without recompute first:
recompute only adds time, so those that lose already need no closer look, and of two sets of modules that both fit, a proper
subset is never slower, so only the minimal fitting sets are priced. Layouts that do not fit without recompute are looked at
again in the end, with whole layers recomputed in part of each chunk and with part of the optimizer on the host (`relief.py`):
each stands for its variants in the counts, and the best variant of all enters the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.planner import relief
from moeplan.planner.levels import MEMORY, SLOWER, Levels
from moeplan.planner.problem import Problem

OPEN_AT_ONCE = 192
"""Groups opened together: enough to keep numpy busy, few enough to stop soon after the best is found."""
CLOSER_AT_ONCE = 4096
"""Layouts looked at closely together."""
EXACT_AT_ONCE = 16
"""Layouts whose pipelines are run pass by pass together."""
EASED_AT_ONCE = 1024
"""Variants of layouts that memory refused looked at together."""
LONGEST = 4
"""Times as many looked at together later on, when good plans are known and little is looked at in vain."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feasible layout with its price."""

    layout: Layout
    step_s: float
    peak_bytes: float

    @property
    def identity(self) -> tuple[int, ...]:
        """Layouts with the same identity are variants of one plan: same degrees and micro-batch."""
        x = self.layout
        return (x.tp, x.cp, x.pp, x.vpp, x.dp, x.ep, x.etp, x.micro_batch)


@dataclass(slots=True)
class Search:
    """What a search found and what it passed over."""

    best: list[Candidate] = field(default_factory=list)
    """The best distinct plans, fastest first."""
    considered: int = 0
    """Layouts of the whole space; equals `sum(rejected.values()) + priced`."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Layouts passed over, by the first reason met."""
    priced: int = 0
    """Layouts priced exactly, time and memory."""
    variants: int = 0
    """Priced besides: what memory refused, with recompute in part of the layers or part of the optimizer offloaded."""
    bound_s: float = 0.0
    """No plan beside the best can be faster than this: the k-th best step time or the limit; infinite if there is no other."""
    nearest_excess_bytes: float = np.inf
    """By how much the smallest layout that memory forbids misses the device."""
    opened: list[Layouts] = field(default_factory=list, compare=False, repr=False)
    """Layouts without recompute of the degrees that were looked at."""
    looked: list[tuple[Layouts, Any, Any]] = field(default_factory=list, compare=False, repr=False)
    """Those that were looked at closely, with their closed forms and the peaks that `_look` notes."""


def search(
    problem: Problem, keep: int = 5, progress: Callable[[int, int], None] | None = None, *, limit_s: float = np.inf
) -> Search:
    """The `keep` best distinct feasible layouts of `problem` that are faster than `limit_s`, with counts of everything else."""
    return _Search(problem, keep, progress, limit_s).run()


def search_again(problem: Problem, keep: int, known: Search) -> list[Candidate]:
    """The `keep` best of the layouts below `known.bound_s`, `known` a search of the problem with more memory."""
    return _Search(problem, keep, None, known.bound_s).run_again(known)


class _Search:
    """State of one search."""

    def __init__(self, problem: Problem, keep: int, progress: Callable[[int, int], None] | None, limit_s: float) -> None:
        self.problem, self.keep, self.progress, self.limit_s = problem, keep, progress, limit_s
        self.found = Search()
        self.by_identity: dict[tuple[int, ...], Candidate] = {}
        self.levels = Levels(problem, self._reject)
        self.sets = self.levels.sets
        self.room, self.counts = relief.Room(problem, relief.offload_shares(problem)), relief.counts_layers(problem)
        self.tight: list[tuple[Layouts, Any, Any]] = []
        self.some: list[relief.Partly] = []

    def run(self) -> Search:
        found = self.found
        # 1. degrees that the framework accepts and whose parameters alone fit
        groups, large, degrees = self.levels.groups()
        found.considered = degrees * self.levels.per_group
        # 2. open groups in the order of their bounds
        bound = self.levels.bounds(groups)
        order = np.argsort(bound, kind="stable")
        groups, bound = groups.take(order), bound[order]
        start = 0
        for part in self._promising(bound, OPEN_AT_ONCE):
            self._open(groups.take(part))
            start = part.stop
            if self.progress is not None:
                self.progress(start, len(groups))
        self._reject(SLOWER, (len(groups) - start) * self.levels.per_group)
        # 3. what memory refused
        self._relieve(large, alone=not len(groups))
        found.best = self._best()
        found.bound_s = min(self._limit(), float(bound[start]) if start < len(groups) else np.inf)
        return found

    def run_again(self, known: Search) -> list[Candidate]:
        """The best of the layouts that another search opened."""
        groups, large, _ = self.levels.groups()
        for rows, bound, peak in known.looked:
            below = bound < self._limit()
            self._look(rows.take(below), bound[below], peak[below])
        self._relieve(large, alone=not len(groups))
        return self._best()

    def _best(self) -> list[Candidate]:
        """The best distinct plans, fastest first."""
        return sorted(self.by_identity.values(), key=lambda c: c.step_s)[: self.keep]

    def _limit(self) -> float:
        """Step time that a layout must beat to enter the result."""
        times = sorted(c.step_s for c in self.by_identity.values())
        return min(self.limit_s, times[self.keep - 1] if len(times) >= self.keep else np.inf)

    def _promising(self, bound: Any, at_once: int) -> Iterator[slice]:
        """Parts of what is sorted by `bound`, ever longer ones, while that beats the k-th best plan."""
        start, most = 0, LONGEST * at_once
        while start < len(bound) and bound[start] < self._limit():
            stop = min(start + at_once, int(np.searchsorted(bound, self._limit())))
            yield slice(start, stop)
            start, at_once = stop, min(2 * at_once, most)

    def _open(self, groups: Layouts) -> None:
        """Look at every layout of the given degrees."""
        # 1. features, priced without recompute: a bound on every set of recomputed modules
        rows = self.levels.spread(groups, self._limit())
        bound = self._pricing(rows).step_seconds()
        self.found.opened.append(rows)
        # 2. a closer look in that order
        order, start = np.argsort(bound, kind="stable"), 0
        for part in self._promising(bound[order], CLOSER_AT_ONCE):
            self._look(rows.take(order[part]), bound[order[part]])
            start = part.stop
        self._reject(SLOWER, (len(rows) - start) * len(self.sets))

    def _look(self, rows: Layouts, bound: Any, noted: Any = None) -> None:
        """Memory under every set of recomputed modules, then the price of the minimal sets that fit.

        `noted`: peaks under these that an earlier search found, NaN where the framework refuses a set, [n, sets].
        """
        spread = self.levels.with_sets(rows)
        source = np.repeat(np.arange(len(rows)), len(self.sets))
        accepted = self.levels.accepts_recompute(spread) if noted is None else ~np.isnan(noted.ravel())
        spread, source = spread.take(accepted), source[accepted]
        if noted is None:
            noted = np.full((len(rows), len(self.sets)), np.nan)
            noted.ravel()[accepted] = self._pricing(spread).peak_bytes()
            self.found.looked.append((rows, bound, noted))
        peak = noted.ravel()[accepted]
        excess = self.problem.excess_bytes(peak)
        fits = excess <= 0
        self._nearest(excess)
        self._reject(MEMORY, int((~fits).sum()))
        tight = spread, source, peak
        spread, source, peak = spread.take(fits), source[fits], peak[fits]
        minimal = self._minimal(source, spread.recompute, len(rows))
        self._reject(SLOWER, int((~minimal).sum()))
        self._price(spread.take(minimal), peak[minimal])
        self._keep_tight(rows, bound, *tight)

    def _keep_tight(self, rows: Layouts, bound: Any, spread: Layouts, source: Any, peak: Any) -> None:
        """Keep for `_ease` what does not fit and might be a plan otherwise; `spread`: rows at `source` with sets of modules."""
        limit = self._limit()
        # 1. sets that fit with part of the optimizer on the host
        least_s = self.room.least_s(bound[source], peak)
        if (kept := (peak > self.problem.peak_limit_bytes) & (least_s < limit)).any():
            self.tight.append((spread.take(kept), least_s[kept], peak[kept]))
        # 2. rows that do not fit without recompute and recompute whole layers in some layers of a chunk
        if self.counts:
            plain, whole = np.full(len(rows), np.inf), np.full(len(rows), np.nan)
            for mask, of_row in ((0, plain), (relief.FULL, whole)):
                of_row[source[spread.recompute == mask]] = peak[spread.recompute == mask]
            kept = (plain > self.problem.peak_limit_bytes) & ~np.isnan(whole) & (self.room.least_s(bound, whole) < limit)
            if kept.any():
                self.some.append(relief.Partly(rows.take(kept), bound[kept], plain[kept], whole[kept]))
        if not np.isfinite(limit):
            self._ease()

    def _price(self, rows: Layouts, peak: Any) -> None:
        """Exact prices in the order of the closed form, which is below them, while that beats the k-th best plan."""
        pricing = self._pricing(rows)
        bound = pricing.step_seconds()
        order = np.argsort(bound, kind="stable")
        start = 0
        for part in self._promising(bound[order], EXACT_AT_ONCE):
            chosen = order[part]
            self._record(rows.take(chosen), pricing.exact_step_seconds(chosen), peak[chosen])
            start = part.stop
        self._reject(SLOWER, len(order) - start)

    def _relieve(self, large: Layouts, alone: bool) -> None:
        """Look again at what memory refused: layouts, then degrees whose parameters alone need part of the optimizer moved.

        `alone`: there are no other degrees.
        """
        self._ease()
        counted, self.found = self.found, Search()
        groups = self._with_least_states(large, alone)
        bound = self.levels.bounds(groups)
        order = np.argsort(bound, kind="stable")
        groups = groups.take(order)
        for part in self._promising(bound[order], OPEN_AT_ONCE):
            self._open(groups.take(part))
            self._ease()
        self._count_variants(counted)

    def _count_variants(self, counted: Search) -> None:
        """Go back to counting in `counted`, where what was priced in between counts as variants."""
        counted.variants += self.found.priced + self.found.variants
        counted.nearest_excess_bytes = min(counted.nearest_excess_bytes, self.found.nearest_excess_bytes)
        self.found = counted

    def _with_least_states(self, groups: Layouts, alone: bool) -> Layouts:
        """Degrees that may fit with a share of the optimizer offloaded, with the least for which they may."""
        shares = self.room.shares
        first, last = (
            self.levels.state_excess_bytes(groups.with_columns(optimizer_offload=np.full(len(groups), s)))
            for s in shares[[0, -1]]
        )
        if alone and len(groups) and (last > 0).all():
            self.found.nearest_excess_bytes = float(last.min())
        # States shrink in proportion to the share.
        least = shares[0] + (shares[-1] - shares[0]) * first / np.maximum(first - last, 1.0)
        place = np.minimum(np.searchsorted(shares, least - 1e-9), len(shares) - 1)
        groups = groups.with_columns(optimizer_offload=shares[place])
        return groups.take((last <= 0) & (len(shares) > 1))

    def _ease(self) -> None:
        """Price the variants of what does not fit in the order of a bound on them."""
        counted, self.found = self.found, Search()
        tight, some, self.tight, self.some = self.tight, self.some, [], []
        limit = self._limit()
        if tight:
            rows = Layouts.joined([rows.take(least_s < limit) for rows, least_s, _ in tight])
            peak = np.concatenate([peak[least_s < limit] for _, least_s, peak in tight])
            least_s = self.room.least_s(self._pricing(rows).step_seconds(), peak)
            order = np.argsort(least_s, kind="stable")
            for part in self._promising(least_s[order], EASED_AT_ONCE):
                self._fit(rows.take(order[part]))
        if some:
            self._fit(self.room.with_counts(some, self._limit()))
        self._count_variants(counted)

    def _fit(self, rows: Layouts) -> None:
        """Price rows with the least share of the optimizer offloaded that makes them fit."""
        rows, peak = self.room.with_least_share(rows)
        kept, excess = self.levels.accepts_recompute(rows, 0), self.problem.excess_bytes(peak)
        self._nearest(excess[kept])
        kept &= excess <= 0
        self._price(rows.take(kept), peak[kept])

    def _nearest(self, excess: Any) -> None:
        """Note by how much what does not fit misses the device."""
        least = float(excess.min(initial=np.inf, where=excess > 0))
        self.found.nearest_excess_bytes = min(self.found.nearest_excess_bytes, least)

    def _pricing(self, rows: Layouts) -> Pricing:
        return Pricing(self.problem.model, self.problem.profile, self.problem.workload, rows)

    def _record(self, rows: Layouts, step_s: Any, peak: Any) -> None:
        self.found.priced += len(rows)
        limit = self._limit()
        for i in np.argsort(step_s, kind="stable"):
            if step_s[i] >= limit:
                break
            candidate = Candidate(rows.row(int(i)), float(step_s[i]), float(peak[i]))
            known = self.by_identity.get(candidate.identity)
            if known is None or candidate.step_s < known.step_s:
                self.by_identity[candidate.identity] = candidate
                limit = self._limit()

    def _minimal(self, source: Any, masks: Any, rows: int) -> Any:
        """Whether no other fitting set of the same row is a proper subset, [n]."""
        places = np.searchsorted(np.sort(self.sets), masks)
        present = np.zeros((rows, len(self.sets)), np.float32)
        present[source, places] = 1.0
        wide = _widened(np.sort(self.sets))
        subset = (wide[:, None] & wide[None, :]) == wide[:, None]
        proper = (subset & (wide[:, None] != wide[None, :])).astype(np.float32)  # [i, j]: i is a proper subset of j
        smaller = present @ proper
        minimal: Any = smaller[source, places] == 0
        return minimal

    def _reject(self, reason: str, count: int) -> None:
        if count:
            self.found.rejected[reason] += count


def _widened(masks: Any) -> Any:
    """Masks with what a module repeats inside it: whole layers repeat everything, moe its activation.

    But for shared experts: recomputing these by name gives up their overlap, so that it may be slower than a larger set.
    """
    full, moe, act, shared = (1 << RECOMPUTE_MODULES.index(n) for n in ("full", "moe", "moe_act", "shared_experts"))
    wide = np.where(masks & moe > 0, masks | act, masks)
    return np.where(masks & full > 0, ((full << 1) - 1) & ~shared, wide)
