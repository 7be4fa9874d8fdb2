"""Consistency classes: what may change between the layouts of two node counts, and what then stays the same.

    bitwise   pp, split, virtual stages, recompute, spares      the same floating-point numbers, if the hazards are closed
    order     also tp, dp, ep, etp                              the same mathematics, sums in another order
    batch     also the micro-batch and cp                       the same samples in every step
    none      also the global batch                             another optimisation problem
The first three keep the global batch, move between two steps only, and take the order of samples from (seed, index) alone, as
Megatron's sampler does: a step takes samples [c, c + G) under every dp and micro-batch. What recompute and overlap change is
when a kernel runs, not what it computes. The hazards are read in megatron-core 0.19.2 (norms, seeds, deterministic mode) or
follow from how sums are split; they hold for its newer versions as long as these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moeplan.costmodels.layout import GRAPH_SCOPES, Layout, mask_of
from moeplan.errors import LayoutError
from moeplan.planner.problem import NAMES, Condition, Problem

Consistency = Literal["bitwise", "order", "batch", "none"]
CLASSES: tuple[Consistency, ...] = ("bitwise", "order", "batch", "none")
"""From the strictest to the loosest."""

_KEPT_ALWAYS = ("sharding", "optimizer_offload")
_KEPT: dict[Consistency, tuple[str, ...]] = {
    "bitwise": (
        "tp", "cp", "dp", "ep", "etp", "micro_batch", "sequence_parallel", "dispatcher", "tp_overlap", "dp_overlap",
        *_KEPT_ALWAYS,
    ),
    "order": ("cp", "micro_batch", *_KEPT_ALWAYS),
    "batch": _KEPT_ALWAYS,
    "none": _KEPT_ALWAYS,
}  # fmt: skip
"""Fields of a layout that a class holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hazard:
    """A way in which results can differ although the class says that they do not."""

    name: str
    """Its short name, "H1"."""
    what: str
    """What differs and why."""
    fix: str
    """What closes it."""


def held_fields(consistency: Consistency, problem: Problem) -> tuple[str, ...]:
    """Fields of a layout that stay as they are under a class; dropped tokens depend on tp too."""
    fields = _KEPT[consistency]
    return ("tp", *fields) if consistency == "order" and problem.workload.capacity_factor else fields


def pins_of(consistency: Consistency, problem: Problem, base: Layout) -> tuple[Condition, ...]:
    """What a search for layouts of the same class as `base` is held to."""
    pins = [_pin(name, base) for name in held_fields(consistency, problem)]
    if base.tp > 1 and not base.sequence_parallel and consistency != "bitwise":
        pins.append(_pin("sequence_parallel", base))
    if base.cuda_graphs:
        pins.append(
            Condition("cuda_graphs", "=", mask_of(base.cuda_graphs, GRAPH_SCOPES), f"cuda_graphs={'+'.join(base.cuda_graphs)}")
        )
    return tuple(pins)


def _pin(name: str, base: Layout) -> Condition:
    value = getattr(base, name)
    known = NAMES.get(name)
    return Condition(name, "=", value if known is None else known.index(value), f"{name}={value}")


def changed(first: Layout, second: Layout, first_batch: int = 0, second_batch: int = 0) -> tuple[str, ...]:
    """Fields beyond pipeline, recompute and overlap in which two layouts differ; "global_batch" where the batches do."""
    differs = tuple(n for n in _KEPT["bitwise"] if getattr(first, n) != getattr(second, n))
    return differs + ("global_batch",) * (first_batch != second_batch)


def check_class(consistency: Consistency, problem: Problem, base: Layout, other: Layout, other_batch: int) -> None:
    """Refuse a layout that is not of the class of `base`, with the axes that it changes."""
    axes = changed(base, other, problem.workload.global_batch, other_batch)
    wrong = [name for name in axes if name in _all_held(consistency, problem)]
    if not wrong:
        return
    said = ", ".join(f"{name} {_value(base, problem, name)} -> {_value(other, problem, name, other_batch)}" for name in wrong)
    looser = next((c for c in CLASSES if not set(axes) & _all_held(c, problem)), None)
    raise LayoutError(
        f"class '{consistency}' does not let layouts differ in {', '.join(wrong)} ({said})",
        hint=f"--consistency {looser} allows it" if looser else "solve it again with these as pins",
    )


def _all_held(consistency: Consistency, problem: Problem) -> set[str]:
    return {*held_fields(consistency, problem), *(("global_batch",) if consistency != "none" else ())}


def _value(layout: Layout, problem: Problem, name: str, batch: int = 0) -> object:
    return getattr(layout, name) if name != "global_batch" else batch or problem.workload.global_batch


def hazards(consistency: Consistency, problem: Problem, layouts: Sequence[Layout]) -> tuple[Hazard, ...]:
    """What can make results of these layouts differ all the same; only what applies to them."""
    found = list(_numeric(problem, layouts)) if consistency == "bitwise" else [_RANDOM]
    moe = problem.model.moe
    if moe is not None and not moe.expert_bias and len({x.micro_batch for x in layouts}) > 1:
        found.append(_AUX)
    if problem.workload.capacity_factor and len({(x.micro_batch, x.cp, x.tp, x.ep) for x in layouts}) > 1:
        found.append(_CAPACITY)
    if consistency == "none":
        found.append(_BATCH)
    return tuple(found)


def _numeric(problem: Problem, layouts: Sequence[Layout]) -> Sequence[Hazard]:
    depths, shards = {x.pp for x in layouts}, max(x.dp * x.cp for x in layouts)
    found = [_NORM] if len(depths) > 1 else []
    found += [_REDUCTION] if shards > 2 and len(depths) > 1 else []
    found.append(_RANDOM)
    found += [_TIED] if problem.model.tied and 1 in depths and len(depths) > 1 else []
    return [*found, _RING, _KERNELS, _DEVICES]


_NORM = Hazard(
    name="H1",
    what="the gradient norm is summed per rank and then over ranks, so that its grouping follows pp",
    fix="norms of single tensors summed in a fixed order, or clipping that never takes effect",
)
_REDUCTION = Hazard(
    name="H2",
    what="where the sum of a gradient starts in a ring depends on its place in a bucket, and buckets follow the stage",
    fix="--ddp-reduce-scatter-with-fp32-accumulation, which adds in the order of ranks (compare two steps), or dp of 2 at most",
)
_RANDOM = Hazard(
    name="H3",
    what="random streams are seeded by pipeline, tensor and expert rank, and their states are dropped when tp or pp change",
    fix="no dropout and no router jitter",
)
_TIED = Hazard(
    name="H4",
    what="tied embeddings add both uses into one buffer at pp = 1, and two sums at the end from pp = 2 on",
    fix="keep pp at 2 or more in every layout, or untie",
)
_RING = Hazard(
    name="H5",
    what="NCCL may choose another algorithm or ring order on other hosts",
    fix="NCCL_ALGO=Ring, and the same order of ranks and nodes in every group",
)
_KERNELS = Hazard(
    name="H6",
    what="kernels may be tuned or add in no fixed order",
    fix="--deterministic-mode with NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 and CUBLAS_WORKSPACE_CONFIG=:4096:8",
)
_DEVICES = Hazard(name="H7", what="other devices round in another order", fix="the same kind of GPU in every node")
_AUX = Hazard(
    name="aux-loss",
    what="the auxiliary loss is taken per micro-batch, so that another micro-batch is another loss function",
    fix="--moe-router-load-balancing-type seq_aux_loss, or the same micro-batch everywhere (class order)",
)
_CAPACITY = Hazard(
    name="capacity",
    what="an expert's capacity counts the tokens of one rank, so that other tokens are dropped",
    fix="no capacity factor, or the same micro-batch, cp, tp and ep everywhere (class bitwise)",
)
_BATCH = Hazard(
    name="batch",
    what="the global batch follows the nodes",
    fix="a learning rate that follows the batch, with schedules counted in samples",
)
