"""What makes a layout fit that memory refuses: whole layers recomputed in part of each chunk, an offloaded optimizer.

    k   whole layers are recomputed in the first k of every chunk (Megatron's recompute method `block`)
    s   share of the optimizer in host memory, in tenths: Megatron moves whole tensors, and a few are not worth the host's work
Peak memory falls with k and with s while the step takes longer, so of each set of modules and each k the least s that fits is
the best; it is found by bisection in arrays. A byte that an offload frees takes at least `Room.byte_s`. Both are looked at with
Megatron's software only and where nothing pins them. Units: seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.constants import MEMORY, OVERLAP, STEP
from moeplan.costmodels.layout import RECOMPUTE_MODULES, SHARDINGS, Layout, Layouts, mask_of
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import chunk_letters
from moeplan.costmodels.step import host_update_s
from moeplan.planner.constraints import RULES
from moeplan.planner.problem import Problem

FULL = mask_of(["full"], RECOMPUTE_MODULES)
"""Whole layers: no other set of modules leaves less."""
SHARES = 10
"""Parts of the optimizer that an offload counts in."""


def offload_shares(problem: Problem) -> Any:
    """Shares of the optimizer that may be offloaded, ascending; the first is the one that a search starts from."""
    if pinned := problem.pinned("optimizer_offload"):
        return np.array(pinned, np.float64)
    shares = np.arange(SHARES + 1) / SHARES if _offloads(problem) else np.zeros(1)
    meets = np.ones(len(shares), np.bool_)
    for condition in problem.pins:
        meets &= condition.field != "optimizer_offload" or condition.holds_for(shares)
    for condition in problem.forbidden:
        meets &= condition.field != "optimizer_offload" or ~condition.holds_for(shares)
    return shares[meets] if meets.any() else shares[:1]


def _offloads(problem: Problem) -> bool:
    """Whether no rule forbids an offload."""
    sharding: Any = (problem.pinned("sharding") or [SHARDINGS.index("optimizer")])[0]
    stays = Layouts.of([Layout()]).with_columns(sharding=np.array([sharding], np.int64))
    moved = stays.with_columns(optimizer_offload=np.ones(1))
    rules = [rule for rule in RULES if rule.name in ("offload-sharding", "offload-quantized")]
    forbidden = any((rule.broken(problem, moved) & ~rule.broken(problem, stays)).any() for rule in rules)
    return problem.workload.era.framework == "megatron" and not forbidden


def counts_layers(problem: Problem) -> bool:
    """Whether a search decides in how many layers of a chunk to recompute."""
    pinned = problem.pinned("recompute") or problem.pinned("recompute_layers")
    return problem.workload.era.framework == "megatron" and not pinned


@dataclass(frozen=True, slots=True)
class Partly:
    """Layouts that may fit with whole layers recomputed in part of their chunks."""

    rows: Layouts
    step_s: Any
    """Seconds of a step at least, [n]."""
    peak: Any
    """Without recompute, [n]; infinite where that is not allowed."""
    least_peak: Any
    """With whole layers recomputed everywhere, [n]."""

    def take(self, rows: Any) -> Partly:
        """The layouts at the given places."""
        return Partly(self.rows.take(rows), self.step_s[rows], self.peak[rows], self.least_peak[rows])


@dataclass(frozen=True, slots=True)
class Room:
    """What a problem leaves open for layouts that do not fit."""

    problem: Problem
    shares: Any
    """Shares of the optimizer that may be offloaded, see `offload_shares`."""

    @property
    def byte_s(self) -> float:
        """Seconds that an offload takes at least for each byte that it frees; infinite where there is none."""
        if len(self.shares) == 1:
            return float(np.inf)
        workload, profile = self.problem.workload, self.problem.profile
        freed = 4.0 + 2.0 * workload.moment_bytes + (MEMORY.step_gradient if workload.gradient_bytes == 2 else 0.0)
        return float(host_update_s(profile, workload) - profile.stream_s(STEP.optimizer_bytes, "optimizer")) / freed

    def least_s(self, step_s: Any, peak: Any) -> Any:
        """Seconds of a step at least if the optimizer is offloaded until a peak fits, [n]."""
        over = np.asarray(peak) - self.problem.peak_limit_bytes
        return np.where(over > 0, step_s + self.byte_s * np.maximum(over, 1.0), step_s)

    def with_least_share(self, rows: Layouts) -> tuple[Layouts, Any]:
        """Rows with the least share from theirs on that makes them fit, else with the largest, and their peaks, [n]."""
        low = np.searchsorted(self.shares, rows.optimizer_offload)
        share, peak = low.copy(), self.peak_bytes(rows)
        tight = np.flatnonzero(self.problem.excess_bytes(peak) > 0)
        if len(self.shares) > 1 and len(tight):
            # `low` does not fit, `high` does or is the last.
            some, low, high = rows.take(tight), low[tight], np.full(len(tight), len(self.shares) - 1)
            best = self.peak_bytes(some.with_columns(optimizer_offload=self.shares[high]))
            open_ = (high - low > 1) & (self.problem.excess_bytes(best) <= 0)
            while open_.any():
                at, middle = np.flatnonzero(open_), (low + high)[open_] // 2
                tried = self.peak_bytes(some.take(at).with_columns(optimizer_offload=self.shares[middle]))
                fits = self.problem.excess_bytes(tried) <= 0
                high[at[fits]], best[at[fits]], low[at[~fits]] = middle[fits], tried[fits], middle[~fits]
                open_ &= high - low > 1
            share[tight], peak[tight] = high, best
        return rows.with_columns(optimizer_offload=self.shares[share]), peak

    def with_counts(self, parts: Sequence[Partly], limit_s: float) -> Layouts:
        """Rows with whole layers recomputed in each number of layers that may be the best and take less than `limit_s`.

        Between two numbers k < l of layers a step takes no less than with k, and no less is to be freed than with l.
        """
        given = _joined([x.take(self.least_s(x.step_s, x.least_peak) < limit_s) for x in parts])
        most = _most_layers(self.problem, given.rows)
        open_ = (most > 0) & (self._least_with_counts(given, most) < limit_s)
        texts = ("", *(str(k) for k in range(1, int(most.max(initial=0)) + 1)))
        rows = given.rows.with_columns(recompute=np.full(len(most), FULL), recompute_counts=texts)
        # 1. intervals of numbers of layers, both ends known: row, k, l, seconds with k, peak with l; one layer, then halves
        row, low, high, step_s, peak = np.arange(len(most)), 0 * most, most + 1, given.step_s, given.least_peak
        middle, found, counts = low + 1, [row[:0]], [low[:0]]
        while open_.any():
            row, low, high, step_s, peak, middle = (x[open_] for x in (row, low, high, step_s, peak, middle))
            tried = rows.take(row).with_columns(recompute_count=middle)
            its_s = self._pricing(tried).step_seconds()
            # 2. what takes too long with fewer layers does so with more
            its_peak = np.full(len(row), np.inf)
            quick = self.least_s(its_s, peak) < limit_s
            its_peak[quick] = self.peak_bytes(tried.take(quick))
            good = quick & (self.least_s(its_s, its_peak) < limit_s)
            found.append(row[good])
            counts.append(middle[good])
            # 3. fewer layers, with what they leave to be freed; more where these do not fit
            more = quick & (its_peak > self.problem.peak_limit_bytes)
            its_peak = np.where(quick, its_peak, peak)
            row = np.concatenate([row, row[more]])
            low, high = np.concatenate([low, middle[more]]), np.concatenate([middle, high[more]])
            step_s, peak = np.concatenate([step_s, its_s[more]]), np.concatenate([its_peak, peak[more]])
            open_ = (high - low > 1) & (self.least_s(step_s, peak) < limit_s)
            middle = (low + high) // 2
        return rows.take(np.concatenate(found)).with_columns(recompute_count=np.concatenate(counts))

    def _least_with_counts(self, given: Partly, most: Any) -> Any:
        """Seconds that no number of layers can beat, [n].

        Every rank recomputes k layers of each chunk that has them, so each micro-batch takes longer by these; a layer frees its
        activations for every micro-batch in flight in its chunk.
        """
        rows = given.rows
        plain, whole = (self._pricing(rows.with_columns(recompute=0 * rows.recompute + mask)) for mask in (0, FULL))
        costs, saved = whole.kind_costs(), plain.kind_costs()
        longer_s = (costs.seconds - saved.seconds).min(axis=0)
        batches = micro_batches(self.problem.workload, rows)
        flying = np.where(rows.vpp > 1, 2.0 * (rows.pp - 1) + (rows.vpp - 1) * rows.pp + 2.0, rows.pp)
        freed = (saved.saved_bytes - costs.saved_bytes).max(axis=0) * np.minimum(flying, batches * rows.vpp)
        # What of it may hide gradient reduction, which is one micro-batch's at most, and with FSDP that of all.
        seen = np.where(rows.shards_as("fsdp"), 0.0, batches - self.problem.profile.exposed * OVERLAP.data_hidden_compute)
        over = np.where(np.isfinite(given.peak), given.peak - self.problem.peak_limit_bytes, 0.0)
        # Longer in proportion at most, and less to be freed in proportion: one of the ends is the least.
        least = np.full(len(rows), np.inf)
        for k in (np.ones(len(rows)), np.clip(over / np.maximum(freed, 1.0), 1.0, most)):
            took = given.step_s + np.maximum(seen, 0.0) * longer_s * _least_recomputed(self.problem, rows, k)
            least = np.minimum(least, self.least_s(took, self.problem.peak_limit_bytes + over - k * freed))
        return least

    def peak_bytes(self, rows: Layouts) -> Any:
        """Peak allocation of each row, [n]."""
        return self._pricing(rows).peak_bytes()

    def _pricing(self, rows: Layouts) -> Pricing:
        return Pricing(self.problem.model, self.problem.profile, self.problem.workload, rows)


def _joined(parts: Sequence[Partly]) -> Partly:
    columns = [np.concatenate(c) for c in zip(*((x.step_s, x.peak, x.least_peak) for x in parts), strict=True)]
    return Partly(Layouts.joined([x.rows for x in parts]), *columns)


def _most_layers(problem: Problem, rows: Layouts) -> Any:
    """Layers in which a chunk can recompute so that one of the largest chunk, or prediction layers, need not, [n]."""
    held, of_row = _held(problem, rows)
    return np.array([int(of_chunk.max()) for of_chunk in held], np.int64)[of_row] - (not problem.model.mtp)


def _least_recomputed(problem: Problem, rows: Layouts, k: Any) -> Any:
    """Layers that a rank recomputes at least if its chunks recompute k each or all that they have, [n]."""
    held, of_row = _held(problem, rows)
    out = np.empty(len(rows))
    for place, of_chunk in enumerate(held):
        its = of_row == place
        out[its] = np.minimum(of_chunk[..., None], k[its]).sum(axis=0).min(axis=0)
    return out


def _held(problem: Problem, rows: Layouts) -> tuple[list[Any], Any]:
    """Layers of every chunk of the distinct pipelines, [v, p] each, and the place of each row's pipeline."""
    keys, of_row = rows.distinct("pp", "vpp", "split")
    names = zip(keys.pp.tolist(), keys.vpp.tolist(), keys.split.tolist(), strict=True)
    return [
        np.array([c.count("t") for c in chunk_letters(problem.model, pp, vpp, keys.stages[s])]).reshape(vpp, pp)
        for pp, vpp, s in names
    ], of_row
