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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layout, Layouts
from moeplan.costmodels.memory import least_state_bytes
from moeplan.costmodels.price import Pricing
from moeplan.planner import relief, space
from moeplan.planner.bounds import least_step_seconds
from moeplan.planner.constraints import RULES, Level
from moeplan.planner.problem import Problem

MEMORY, SLOWER, COPY, EXCLUDED = "memory", "slower", "same-split", "excluded"
"""Reasons for passing over a layout that are not rules of the framework; "memory": too large as it is, see `relief.py`."""
OPEN_AT_ONCE = 192
"""Groups opened together: enough to keep numpy busy, few enough to stop soon after the best is found."""
CLOSER_AT_ONCE = 2048
"""Layouts looked at closely together."""
EXACT_AT_ONCE = 64
"""Layouts whose pipelines are run pass by pass together."""
EASED_AT_ONCE = 1024
"""Variants of layouts that memory refused looked at together."""


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


def search(
    problem: Problem, keep: int = 5, progress: Callable[[int, int], None] | None = None, *, limit_s: float = np.inf
) -> Search:
    """The `keep` best distinct feasible layouts of `problem` that are faster than `limit_s`, with counts of everything else."""
    return _Search(problem, keep, progress, limit_s).run()


def open_rows(problem: Problem, limit_s: float) -> Layouts:
    """The pipelines that a bound leaves below `limit_s`, once each whatever their split, without recompute."""
    state = _Search(problem, 1, None, limit_s)
    groups = state.groups(1)
    groups = groups.take(least_step_seconds(problem, groups, state.batches["micro_batch"]) < limit_s)
    rows = state.spread(groups.take(groups.pp > 1), 1, 1)
    keys = [getattr(rows, name) for name in (*_FIELDS["degrees"][:7], "vpp", "micro_batch", *_FIELDS["features"], "schedule")]
    _, first = np.unique(np.stack(keys), axis=1, return_index=True)
    return rows.take(np.sort(first))


def with_recompute(problem: Problem, rows: Layouts) -> tuple[Layouts, Any]:
    """Each layout with every set of recomputed modules that the framework accepts, and its place among `rows`."""
    sets = space.recompute_sets(problem)
    spread = space.with_shared_overlap(problem, space.cross(rows, {"recompute": sets}))
    accepted = accepted_recompute(problem, spread)
    return spread.take(accepted), np.repeat(np.arange(len(rows)), len(sets))[accepted]


def accepted_recompute(problem: Problem, rows: Layouts) -> Any:
    """Whether conditions and the framework accept what layouts recompute, [n]."""
    accepted = np.ones(len(rows), np.bool_)
    _Search(problem, 1, None, np.inf)._settle(rows, "recompute", accepted)
    return accepted


class _Search:
    """State of one search."""

    def __init__(self, problem: Problem, keep: int, progress: Callable[[int, int], None] | None, limit_s: float) -> None:
        self.problem, self.keep, self.progress, self.limit_s = problem, keep, progress, limit_s
        self.found = Search()
        self.by_identity: dict[tuple[int, ...], Candidate] = {}
        self.chunks = space.chunk_options(problem)
        self.batches = space.batch_options(problem)
        self.features = space.feature_options(problem)
        self.sets: Any = np.asarray(space.recompute_sets(problem), np.int64)
        self.room, self.counts = relief.Room(problem, relief.offload_shares(problem)), relief.counts_layers(problem)
        self.tight: list[tuple[Layouts, Any, Any]] = []
        self.some: list[relief.Partly] = []

    def run(self) -> Search:
        found, problem = self.found, self.problem
        per_batch = len(self.sets) * len(next(iter(self.features.values())))
        per_chunk = per_batch * len(self.batches["micro_batch"])
        per_group = per_chunk * len(self.chunks["vpp"])
        # 1. degrees that the framework accepts and whose parameters alone fit
        groups = self.groups(per_group)
        # 2. open groups in the order of their bounds
        bound = least_step_seconds(problem, groups, self.batches["micro_batch"])
        order = np.argsort(bound, kind="stable")
        groups, bound = groups.take(order), bound[order]
        start = 0
        for part in self._promising(bound, OPEN_AT_ONCE):
            self._open(groups.take(part), per_chunk, per_batch)
            start = part.stop
            if self.progress is not None:
                self.progress(start, len(groups))
        self._reject(SLOWER, (len(groups) - start) * per_group)
        # 3. what memory refused
        self._relieve()
        found.best = sorted(self.by_identity.values(), key=lambda c: c.step_s)[: self.keep]
        found.bound_s = min(self._limit(), float(bound[start]) if start < len(groups) else np.inf)
        return found

    def _limit(self) -> float:
        """Step time that a layout must beat to enter the result."""
        times = sorted(c.step_s for c in self.by_identity.values())
        return min(self.limit_s, times[self.keep - 1] if len(times) >= self.keep else np.inf)

    def _promising(self, bound: Any, at_once: int) -> Iterator[slice]:
        """Parts of what is sorted by `bound`, while that beats the k-th best plan."""
        start = 0
        while start < len(bound) and bound[start] < self._limit():
            stop = min(start + at_once, int(np.searchsorted(bound, self._limit())))
            yield slice(start, stop)
            start = stop

    def _open(self, groups: Layouts, per_chunk: int, per_batch: int) -> None:
        """Look at every layout of the given degrees."""
        # 1. features, priced without recompute: a bound on every set of recomputed modules
        rows, bound = self._by_time(self.spread(groups, per_chunk, per_batch))
        # 2. a closer look in that order
        start = 0
        for part in self._promising(bound, CLOSER_AT_ONCE):
            self._look(rows.take(part), bound[part])
            start = part.stop
        self._reject(SLOWER, (len(rows) - start) * len(self.sets))

    def _by_time(self, rows: Layouts) -> tuple[Layouts, Any]:
        """Rows in the order of their closed forms, and these."""
        bound = self._pricing(rows).step_seconds()
        order = np.argsort(bound, kind="stable")
        return rows.take(order), bound[order]

    def spread(self, groups: Layouts, per_chunk: int, per_batch: int) -> Layouts:
        """Every layout of the given degrees that the framework accepts, without recompute."""
        # 1. virtual stages and splits, then micro-batches
        rows = space.cross(groups, self.chunks)
        rows = self._drop(rows, rows.pp * rows.vpp <= len(self.problem.model.layers) + 2, "pipeline-chunks", per_chunk)
        before = len(rows)
        rows = space.with_balanced_splits(self.problem, rows)
        self._reject(COPY, (before - len(rows)) * per_chunk)
        rows = self._accepted(rows, "chunks", per_chunk)
        rows = self._accepted(space.cross(rows, self.batches), "batch", per_batch)
        # 2. features
        rows = space.with_shared_overlap(self.problem, space.cross(rows, self.features))
        return self._accepted(rows, "features", len(self.sets))

    def groups(self, per_group: int) -> Layouts:
        """Degrees that the framework accepts and whose parameters alone fit."""
        groups = space.degree_grid(self.problem)
        self.found.considered = len(groups) * per_group
        groups = self._accepted(groups, "degrees", per_group)
        return self._by_parameters(groups, per_group)

    def _look(self, rows: Layouts, bound: Any) -> None:
        """Memory under every set of recomputed modules, then the price of the minimal sets that fit."""
        spread = self._with_sets(rows)
        source = np.repeat(np.arange(len(rows)), len(self.sets))
        accepted = np.ones(len(spread), np.bool_)
        self._settle(spread, "recompute", accepted)
        spread, source = spread.take(accepted), source[accepted]
        pricing = self._pricing(spread)
        peak = pricing.peak_bytes()
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

    def _relieve(self) -> None:
        """Look again at what memory refused: layouts, then degrees whose parameters alone need part of the optimizer moved."""
        self._ease()
        counted, self.found = self.found, Search()
        groups = self._with_least_states(self.large)
        bound = least_step_seconds(self.problem, groups, self.batches["micro_batch"])
        order = np.argsort(bound, kind="stable")
        groups = groups.take(order)
        for part in self._promising(bound[order], OPEN_AT_ONCE):
            self._open(groups.take(part), 1, 1)
            self._ease()
        self._count_variants(counted)

    def _count_variants(self, counted: Search) -> None:
        """Go back to counting in `counted`, where what was priced in between counts as variants."""
        counted.variants += self.found.priced + self.found.variants
        counted.nearest_excess_bytes = min(counted.nearest_excess_bytes, self.found.nearest_excess_bytes)
        self.found = counted

    def _with_least_states(self, groups: Layouts) -> Layouts:
        """Degrees that may fit with a share of the optimizer offloaded, with the least for which they may."""
        shares = self.room.shares
        first, last = (
            self._state_excess(groups.with_columns(optimizer_offload=np.full(len(groups), s))) for s in shares[[0, -1]]
        )
        if 0 < len(groups) == self.degrees and (last > 0).all():
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
        kept, excess = np.ones(len(rows), np.bool_), self.problem.excess_bytes(peak)
        self._settle(rows, "recompute", kept, 0)
        self._nearest(excess[kept])
        kept &= excess <= 0
        self._price(rows.take(kept), peak[kept])

    def _with_sets(self, rows: Layouts) -> Layouts:
        """Each row with every set of recomputed modules, [n * sets]."""
        return space.with_shared_overlap(self.problem, space.cross(rows, {"recompute": self.sets.tolist()}))

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

    def _accepted(self, rows: Layouts, level: Level, weight: int) -> Layouts:
        """Rows that conditions and rules of the level let pass; each stands for `weight` layouts."""
        kept = np.ones(len(rows), np.bool_)
        self._settle(rows, level, kept, weight)
        return rows if kept.all() else rows.take(kept)

    def _settle(self, rows: Layouts, level: Level, kept: Any, weight: int = 1) -> None:
        """Clear `kept` where a condition or rule of the level forbids a row, and count the first reason met."""
        allowed = self.problem.allows(rows, _FIELDS[level])
        self._reject(EXCLUDED, int((kept & ~allowed).sum()) * weight)
        kept &= allowed
        for rule in RULES:
            if rule.level == level:
                broken = kept & rule.broken(self.problem, rows)
                self._reject(rule.name, int(broken.sum()) * weight)
                kept &= ~broken

    def _by_parameters(self, groups: Layouts, weight: int) -> Layouts:
        excess = self._state_excess(groups)
        self.large, self.degrees = groups.take(excess > 0), len(groups)
        return self._drop(groups, excess <= 0, MEMORY, weight)

    def _state_excess(self, groups: Layouts) -> Any:
        problem = self.problem
        least = least_state_bytes(problem.model, problem.profile.cluster.device, problem.workload, groups)
        return problem.excess_bytes(least)

    def _drop(self, rows: Layouts, kept: Any, reason: str, weight: int) -> Layouts:
        self._reject(reason, int(len(rows) - kept.sum()) * weight)
        return rows.take(kept)

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


_FIELDS: Mapping[Level, tuple[str, ...]] = {
    "degrees": (
        "tp", "cp", "pp", "dp", "ep", "etp", "edp",
        "sharding", "sequence_parallel", "dp_overlap", "cuda_graphs", "optimizer_offload",
    ),
    "chunks": ("vpp",),
    "batch": ("micro_batch",),
    "features": ("dispatcher", "ep_overlap", "shared_overlap", "tp_overlap"),
    "recompute": ("recompute", "recompute_layers"),
}  # fmt: skip
"""Fields that are settled at each level."""
