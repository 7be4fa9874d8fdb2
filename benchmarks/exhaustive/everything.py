"""Everything that a problem leaves open, by plain loops: layouts, what they recompute, splits of their layers.

Nothing here comes from the search but what level splits are (`planner/stages/level_splits.py`): degrees are all factors that
multiply to the number of GPUs, recompute sets all subsets of what the model has, splits all ways to place the layers. Rules
of the framework are left to whoever prices them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layout, mask_of
from moeplan.costmodels.model import LatentAttention, Mlp, Model, Moe
from moeplan.costmodels.stages import balanced_split, chunk_letters, format_split, split_letters
from moeplan.planner.problem import Problem
from moeplan.planner.stages.level_splits import level_splits
from moeplan.planner.stages.problem import chunk_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """What a layout recomputes."""

    mask: int
    """Modules, see `RECOMPUTE_MODULES`."""
    layers: str = ""
    """In how many layers of each chunk, see `Layout.recompute_layers`; empty: in all."""


def factors(n: int, count: int) -> list[tuple[int, ...]]:
    """Every way to write `n` as an ordered product of `count` whole numbers."""
    if count == 1:
        return [(n,)]
    return [(a, *rest) for a in range(1, n + 1) if n % a == 0 for rest in factors(n // a, count - 1)]


def features(problem: Problem) -> list[dict[str, Any]]:
    """Dispatchers and overlaps that the software offers: with experts each of them, tensor overlap for dense models."""
    moe, era = problem.model.moe, problem.workload.era
    if moe is None:
        return [{"tp_overlap": tp} for tp in (False, True)]
    overlaps = (False, True) if era.ep_overlap else (False,)
    shared = (False, True) if moe.shared_width else (False,)
    ways = itertools.product(era.dispatchers, overlaps, shared)
    return [{"dispatcher": d, "ep_overlap": e, "shared_overlap": s} for d, e, s in ways]


def layouts(problem: Problem) -> Iterator[Layout]:
    """Every layout that the degree identities and the conditions on single fields allow; no split, nothing recomputed."""
    world, batch, layers = problem.profile.cluster.gpus, problem.workload.global_batch, len(problem.model.layers)

    def allowed(**values: int) -> bool:
        return all(problem.allowed_values(name, [value]) for name, value in values.items())

    for tp, cp, dp, pp in factors(world, 4):
        if not allowed(tp=tp, cp=cp, dp=dp, pp=pp):
            continue
        experts = factors(tp * cp * dp, 3) if problem.model.moe is not None else [(1, 1, tp * cp * dp)]
        for etp, ep, edp in (grid for grid in experts if allowed(etp=grid[0], ep=grid[1], edp=grid[2])):
            virtual = range(1, (layers + 2) // pp + 1 if pp > 1 else 2)
            micro = (m for m in range(1, batch + 1) if batch % (m * dp) == 0)
            for vpp, m, chosen in itertools.product(virtual, micro, features(problem)):
                if allowed(vpp=vpp, micro_batch=m):
                    yield Layout(
                        tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp, edp=edp, micro_batch=m,
                        sequence_parallel=tp > 1, **chosen,
                    )  # fmt: skip


def recompute_sets(model: Model) -> list[Again]:
    """Every set of modules that the model has, whole layers the last; whole expert blocks hold what stands inside them."""
    has = {
        "layernorm": any(isinstance(b, (Moe, LatentAttention)) for b in model.blocks),
        "mla_up_proj": any(isinstance(b, LatentAttention) for b in model.blocks),
        "mlp": any(isinstance(b, Mlp) for b in model.blocks),
    }
    outer = [name for name, there in has.items() if there]
    inner = ["moe_act"] * (model.moe is not None) + ["shared_experts"] * (model.moe is not None and model.moe.shared_width > 0)
    inside = [*_subsets(inner), *([("moe",)] if model.moe is not None else [])]
    sets = [(*a, *b) for a in _subsets(outer) for b in inside]
    return [Again(mask=mask_of(names, RECOMPUTE_MODULES)) for names in (*sets, ("full",))]


def _subsets(names: list[str]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


def recompute_counts(largest: int) -> list[Again]:
    """Whole layers in each number of layers of a chunk, where the largest holds so many."""
    full = mask_of(["full"], RECOMPUTE_MODULES)
    return [Again(mask=full, layers=str(k)) for k in range(1, largest + 1)]


def every_split(model: Model, chunks: int) -> dict[str, list[int]]:
    """All ways to place the layers of a model on chunks: text of each, with the layers of every chunk.

    Only the first and the last chunk may hold no layer, and the one before the last where it has the prediction layers.
    """
    count, mtp, out = len(model.layers), len(model.mtp), dict[str, list[int]]()
    for alone in (False, True) if mtp and chunks > 1 else (False,):
        fewest = [1] * chunks
        fewest[0] = fewest[-1] = 0
        if alone:
            fewest[-2] = 0
        for sizes in _sums(count, fewest[:-1] if alone else fewest):
            sizes = [*sizes, 0] if alone else sizes
            out[format_split(split_letters(sizes, mtp, head_alone=alone))] = sizes
    return out


def _sums(total: int, fewest: list[int]) -> Iterator[list[int]]:
    """Every list of whole numbers with a sum, each at least as large as said."""
    if len(fewest) == 1:
        yield from [[total]] if total >= fewest[0] else []
        return
    for first in range(fewest[0], total - sum(fewest[1:]) + 1):
        yield from ([first, *rest] for rest in _sums(total - first, fewest[1:]))


def number_of_splits(model: Model, chunks: int) -> int:
    """How many `every_split` has, without prediction layers in a chunk of their own."""
    free = len(model.layers) - max(chunks - 2, 0)
    return math.comb(free + chunks - 1, chunks - 1) if free >= 0 else 0


def searched_splits(problem: Problem, pp: int, vpp: int, again: bool) -> dict[str, list[int]]:
    """The splits that the certified search is to look at; `again`: where only some layers of a chunk recompute.

    All for one chunk a rank. Otherwise, and where only some layers recompute, the level ones, the even and the balanced one.
    """
    model, chunks = problem.model, pp * vpp
    if vpp == 1 and not again:
        return every_split(model, chunks)
    layers, mtp, out = len(model.layers), len(model.mtp), dict[str, list[int]]()
    low, high = chunk_sizes(layers, pp, vpp)
    for alone in (False, True) if mtp and chunks > 2 else (False,):
        fewest, most = [low] * chunks, [high] * chunks
        fewest[0] = fewest[-1] = 0
        if alone:
            fewest[-2] = most[-1] = 0
        for sizes in level_splits(pp, vpp, layers, tuple(fewest), tuple(most)).tolist():
            out[format_split(split_letters(sizes, mtp, head_alone=alone))] = sizes
    for text in ("", balanced_split(model, problem.workload.seq_len, chunks)):
        letters = chunk_letters(model, pp, vpp, text)
        out.setdefault(format_split(letters), [chunk.count("t") for chunk in letters])
    return out
