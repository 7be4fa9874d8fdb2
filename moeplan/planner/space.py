"""The space of layouts of one problem, generated level by level as columns.

    degrees    every tp * cp * pp that divides the GPUs, crossed with every etp * ep that divides a stage
    chunks     every number of virtual stages, with the framework's even split and with the balanced one
    batch      every micro-batch that divides the global batch
    features   dispatcher, overlaps and what else the workload's era offers
    recompute  every set of modules that the model has, and whole layers
A search filters each level before it spreads out the next; the size of the space is that of the full product all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplan.costmodels.activations import separate_norm
from moeplan.costmodels.layout import DISPATCHERS, RECOMPUTE_MODULES, SHARDINGS, Layouts, mask_of
from moeplan.costmodels.model import LatentAttention, Mlp
from moeplan.costmodels.moe_choice import BEST
from moeplan.costmodels.stages import balanced_split, format_split, split_letters
from moeplan.planner.problem import Problem
from moeplan.planner.relief import offload_shares

NOT_SEARCHED = ("sharding", "sequence_parallel", "dp_overlap", "cuda_graphs")
"""Fields with one value in the whole space: the one that is pinned, else the one that a search starts from."""


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def degree_grid(problem: Problem) -> Layouts:
    """Every pair of a dense and an expert grid over the GPUs that pins and forbidden conditions on degrees leave.

    Other fields have the values that a search starts from: what is pinned, else what suits most models.
    """
    world = problem.profile.cluster.gpus
    has_experts = problem.model.moe is not None
    columns = []
    for pp in problem.allowed_values("pp", divisors(world)):
        stage = world // pp
        dense = _pairs(problem, stage, "tp", "cp", "dp")
        expert = _pairs(problem, stage, "etp", "ep", "edp") if has_experts else np.array([[1, 1, stage]])
        # every dense grid with every expert grid: [dense * expert]
        left, right = np.repeat(dense, len(expert), axis=0), np.tile(expert, (len(dense), 1))
        columns.append(np.column_stack([left, np.full(len(left), pp), right]))
    tp, cp, dp, pp_, etp, ep, edp = np.concatenate([*columns, np.empty((0, 7), np.int64)]).astype(np.int64).T.copy()
    n = len(tp)
    no, yes, zero = np.zeros(n, np.bool_), np.ones(n, np.bool_), np.zeros(n, np.int64)
    grid = Layouts(
        tp=tp, cp=cp, pp=pp_, vpp=zero + 1, dp=dp, ep=ep, etp=etp, edp=edp, micro_batch=zero + 1,
        sequence_parallel=tp > 1, sharding=zero + SHARDINGS.index("optimizer"), recompute=zero,
        dispatcher=zero + DISPATCHERS.index("alltoall" if has_experts else "none"),
        ep_overlap=no, shared_overlap=no, tp_overlap=no, dp_overlap=yes, cuda_graphs=zero,
        optimizer_offload=np.full(n, offload_shares(problem)[0]),
        split=zero, schedules=("", BEST) if problem.target == "research" else ("",), schedule=zero,
        recompute_counts=tuple(str(text) for text in problem.pinned("recompute_layers")) or ("",), recompute_count=zero,
    )  # fmt: skip
    fixed = {name: value for name in NOT_SEARCHED for value in problem.pinned(name)}
    return grid.with_columns(**{name: np.full(n, value, getattr(grid, name).dtype) for name, value in fixed.items()})


def _pairs(problem: Problem, stage: int, first: str, second: str, rest: str) -> Any:
    """All (first, second, rest) with first * second * rest = stage that conditions leave, [pairs, 3]."""
    rows = [
        (a, b, stage // (a * b))
        for a in problem.allowed_values(first, divisors(stage))
        for b in problem.allowed_values(second, divisors(stage // a))
        if problem.allowed_values(rest, [stage // (a * b)])
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def cross(layouts: Layouts, options: dict[str, Sequence[Any]]) -> Layouts:
    """Every layout with every option: `options` are columns of equal length that replace the layouts' own, [n * options]."""
    count = len(next(iter(options.values())))
    rows = np.repeat(np.arange(len(layouts)), count)
    spread = layouts.take(rows)
    columns = {
        name: np.tile(np.asarray(values, getattr(layouts, name).dtype), len(layouts)) for name, values in options.items()
    }
    return spread.with_columns(**columns)


def chunk_options(problem: Problem) -> dict[str, Sequence[Any]]:
    """Virtual stages up to one layer a chunk, each with the even (split 0) and the balanced split (1)."""
    virtual = range(1, len(problem.model.layers) + 3)
    vpp, split = zip(*itertools.product(virtual, (0, 1)), strict=True)
    return {"vpp": vpp, "split": split}


def with_balanced_splits(problem: Problem, layouts: Layouts) -> Layouts:
    """Replace the mark of the balanced split by its text; where it cannot exist or equals the even one, the row is dropped."""
    marked = layouts.split == 1
    layers = len(problem.model.layers)
    chunks = layouts.pp * layouts.vpp
    texts: dict[int, str] = {}
    for count in np.unique(chunks[marked & (chunks <= layers + 2)]):
        texts[int(count)] = balanced_split(problem.model, problem.workload.seq_len, int(count))
    places = {count: i + 1 for i, count in enumerate(texts)}
    table = np.full(int(chunks.max(initial=0)) + 1, -1, np.int64)
    table[list(places)] = list(places.values())
    for count, text in texts.items():
        if text == even_split(problem, count):
            table[count] = -1
    split = np.where(marked, table[chunks], 0)
    kept = layouts.with_columns(split=split, stages=("", *texts.values()))
    return kept.take(split >= 0)


def even_split(problem: Problem, chunks: int) -> str:
    """Text of the even split over `chunks`; empty where the layers do not divide."""
    layers = len(problem.model.layers)
    if layers % chunks:
        return ""
    return format_split(split_letters([layers // chunks] * chunks, len(problem.model.mtp)))


def batch_options(problem: Problem) -> dict[str, Sequence[Any]]:
    """Every divisor of the global batch as micro-batch."""
    return {"micro_batch": divisors(problem.workload.global_batch)}


def feature_options(problem: Problem) -> dict[str, Sequence[Any]]:
    """Dispatchers of the era, with and without expert overlap, for research with the best schedule; tensor overlap for dense
    models."""
    era = problem.workload.era
    if problem.model.moe is None:
        return {"tp_overlap": [True, False], "dispatcher": [0, 0], "ep_overlap": [False, False]}
    ways = [(False, 0)] + [(True, 0)] * era.ep_overlap + [(False, 1)] * (problem.target == "research")
    rows = [(DISPATCHERS.index(d), *way) for d in era.dispatchers for way in ways]
    overlap = any(problem.pinned("tp_overlap"))
    return {
        "dispatcher": [r[0] for r in rows],
        "ep_overlap": [r[1] for r in rows],
        "schedule": [r[2] for r in rows],
        "tp_overlap": [overlap] * len(rows),
    }


def with_shared_overlap(problem: Problem, layouts: Layouts) -> Layouts:
    """Shared experts run beside dispatch and combine wherever the framework takes it: it never adds time."""
    moe = problem.model.moe
    if moe is None or not moe.shared_width or not problem.workload.era.shared_overlap:
        return layouts
    wanted = layouts.dispatches_with("alltoall", "deepep", "hybridep") & (layouts.ep * layouts.etp > 1)
    wanted &= ~layouts.ep_overlap & np.equal(layouts.schedule, 0) & ~layouts.recomputes("shared_experts")
    for value in problem.pinned("shared_overlap"):
        wanted = np.full(len(layouts), bool(value))
    return layouts.with_columns(shared_overlap=wanted)


def recompute_sets(problem: Problem) -> list[int]:
    """Masks of every set of modules that saves memory in this model, and of whole layers; the empty set first.

    Core attention is left out: fused attention keeps no scores, so there is nothing to save. A set that is pinned is in.
    """
    model = problem.model
    modules = ["layernorm"] if any(separate_norm(b) for b in model.blocks) else []
    if any(isinstance(b, LatentAttention) for b in model.blocks):
        modules.append("mla_up_proj")
    if any(isinstance(b, Mlp) for b in model.blocks):
        modules.append("mlp")
    inside = []
    if model.moe is not None:
        inside.append("moe_act")
        if model.moe.shared_width:
            inside.append("shared_experts")
    masks = []
    for chosen in _subsets(modules):
        for within in _subsets(inside):
            masks.append(mask_of((*chosen, *within), RECOMPUTE_MODULES))
        if inside:
            masks.append(mask_of((*chosen, "moe"), RECOMPUTE_MODULES))
    masks.append(mask_of(["full"], RECOMPUTE_MODULES))
    return [*masks, *(int(mask) for mask in problem.pinned("recompute") if mask not in masks)]


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names) + 1) for c in itertools.combinations(names, size)]
