"""What each modelled effect is worth: the error of the same runs with one effect removed.

An effect outside the stages (exchange of gradients, bubble) is removed from the breakdown, which is exact; recompute and
overlap flags are removed from the rows; the others by replacing one function or constant while the runs are priced again.
The change is given in points of the mean |log(measured / predicted)| (100 points: a factor e), over all rows and over those
whose prediction moves by more than 0.1 %; and over all rows once more after the fitted numbers were fitted again, which shows
what other parts of the model cannot make up for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.accuracy import fitting
from benchmarks.accuracy.fitting import Point
from benchmarks.accuracy.patching import replaced
from benchmarks.accuracy.rows import compared, results
from moeplan.costmodels import constants, counts, exchange, routing, step
from moeplan.costmodels.kernels import PassTimes
from moeplan.costmodels.routing import LinkCopies

STAGE_PARTS = ("layers/", "head/", "prediction/")
"""Parts of a step that a pipeline stage repeats for every micro-batch; the bubble is made of them."""
BUBBLE = "pipeline bubble"
TOUCHED = 1e-3
"""A row is touched where its prediction moves by more than this share."""

Switch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """One effect and how it is removed."""

    name: str
    parts: tuple[str, ...] = ()
    """Parts of the breakdown to leave out; of stage parts the bubble shrinks in proportion."""
    cells: Mapping[str, str] = field(default_factory=dict)
    """Cells to overwrite in every row."""
    switch: Switch = nullcontext
    """Replaces something while the rows are priced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What removing an effect does, in points of the mean absolute log error; above zero: the effect helps."""

    name: str
    touched: int
    overall: float
    on_touched: float
    refitted: float


def _constant(group: str, **values: float) -> Switch:
    old = getattr(constants, group)
    return lambda: replaced(group, old, dataclasses.replace(old, **values))


def _no_times(*_: Any, **__: Any) -> PassTimes:
    return PassTimes()


def _nothing(*arguments: Any, **__: Any) -> Any:
    """Zero, in the shape of the last argument's columns."""
    return 0.0 * arguments[-1].tp


def _free_head(*arguments: Any, **__: Any) -> dict[str, Any]:
    return {"output GEMM": _nothing(*arguments), "loss": _nothing(*arguments)}


def _function(name: str, old: Any, new: Any, within: str = "moeplan.") -> Switch:
    return lambda: replaced(name, old, new, within=within)


def _every_copy(topk: float, ranks: Any, local: Any, *_: Any) -> LinkCopies:
    """One copy for every chosen expert, as without de-duplication."""
    return routing.all_to_all_copies(topk, ranks, local)


def _no_flops(*_: Any, **__: Any) -> float:
    return 0.0


def _attention(flops: Any) -> Switch:
    """Another count of attention FLOP, where time is made of it; pipelines stay split as they are."""
    return _function("attention_flops_per_token", counts.attention_flops_per_token, flops, "moeplan.costmodels.kernels")


_NOT_CAUSAL = functools.partial(counts.attention_flops_per_token, causal=False)
ABLATIONS = (
    Ablation(name="attention core: its FLOP", switch=_attention(_no_flops)),
    Ablation(name="causal half of attention", switch=_attention(_NOT_CAUSAL)),
    Ablation(
        name="norms, activations, permutes, router",
        parts=("layers/norms and activations", "layers/expert activation", "layers/permute", "layers/router"),
    ),
    Ablation(name="LM head and loss", switch=_function("_head", step._head, _free_head)),
    Ablation(name="recompute", cells={"recompute": "none"}),
    Ablation(
        name="expert all-to-all", switch=_function("exposed_expert_exchange_s", exchange.exposed_expert_exchange_s, _nothing)
    ),
    Ablation(
        name="de-duplication of dispatched tokens",
        switch=_function("deduplicated_copies", routing.deduplicated_copies, _every_copy),
    ),
    Ablation(name="overlap of the expert all-to-all", cells={"a2a_overlap": "no"}),
    Ablation(name="tensor-parallel exchange", switch=_function("tensor_exchange", exchange.tensor_exchange, _no_times)),
    Ablation(name="overlap of the tensor-parallel exchange", switch=_constant("OVERLAP", tensor_exposed=1.0)),
    Ablation(name="context-parallel exchange", switch=_function("context_exchange", exchange.context_exchange, _no_times)),
    Ablation(name="data-parallel exchange", parts=("data-parallel exchange",)),
    Ablation(name="pipeline bubble", parts=(BUBBLE,)),
    Ablation(name="pipeline sends", parts=("pipeline sends",)),
    Ablation(name="optimizer", parts=("optimizer",)),
    Ablation(name="fixed overhead of a step", parts=("step overhead",)),
    Ablation(name="host launches", parts=("layers/host launches",)),
    Ablation(name="sustained shares of kernel rates", switch=fitting.unfitted),
)
"""Effects in the order of a step's parts."""


def effects(rows: Sequence[Mapping[str, str]], known: Sequence[Point], chosen: Sequence[Ablation] = ABLATIONS) -> list[Effect]:
    """What removing each effect does to the rows, whose full predictions are `known`."""
    return [effect(rows, known, ablation) for ablation in chosen]


def effect(rows: Sequence[Mapping[str, str]], known: Sequence[Point], ablation: Ablation) -> Effect:
    """What removing one effect does."""
    without = ablated(rows, known, ablation)
    assert [p.id for p in without] == [p.id for p in known], f"{ablation.name}: other rows are priced"
    old, new = (np.abs(fitting.errors(p, fitting.IN_USE)) for p in (known, without))
    moved = np.array([abs(b.predicted_s / a.predicted_s - 1.0) > TOUCHED for a, b in zip(known, without, strict=True)])
    again, before = (np.abs(fitting.errors(p, fitting.fit(p))) for p in (without, known))
    return Effect(
        name=ablation.name,
        touched=int(moved.sum()),
        overall=100.0 * float(np.mean(new - old)),
        on_touched=100.0 * float(np.mean((new - old)[moved])) if moved.any() else 0.0,
        refitted=100.0 * float(np.mean(again - before)),
    )


def ablated(rows: Sequence[Mapping[str, str]], known: Sequence[Point], ablation: Ablation) -> list[Point]:
    """The points without one effect, with the slopes that they have with it."""
    if ablation.cells or ablation.switch is not nullcontext:
        with ablation.switch():
            priced = fitting.points(compared(results([{**row, **ablation.cells} for row in rows])), [p.slopes for p in known])
    else:
        priced = list(known)
    return [dataclasses.replace(p, parts=drop(p.parts, ablation.parts)) for p in priced]


def drop(parts: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Parts without those named; what leaves the stages leaves the bubble in proportion."""
    left = {n: v for n, v in parts.items() if n not in names}
    before, after = (sum(v for n, v in p.items() if n.startswith(STAGE_PARTS)) for p in (parts, left))
    if BUBBLE in left and before:
        left[BUBBLE] *= after / before
    return left
