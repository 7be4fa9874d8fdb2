"""What a pipeline rank holds at its fullest moment beside weights, gradients and states.

A rank is fullest in the backward of a layer or of the output head, with the activations of all micro-batches in flight, or in
the optimizer step, when these are gone but bf16 gradients are copied to fp32. In flight (arXiv:2104.04473): 1F1B holds p - r
micro-batches on rank r of p. Interleaved over v chunks a rank has run 2 (p - 1 - r) + (v - 1) p + 1 chunks forward when its
first backward starts, and is fullest then or, where its chunks differ, at a later moment (`moments.py`). Never more than the
micro-batches of the step. Units: bytes, [n]. Interleaved micro-batches are taken as a multiple of p.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import (
    dense_activation_bytes,
    dense_working_bytes,
    gathered_input_bytes,
    rank_tokens,
    routed_activation_bytes,
    routed_working_bytes,
    shard,
)  # fmt: skip
from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.megatron_counts import padded_vocab
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import Ranks
from moeplan.costmodels.workload import Workload


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one micro-batch in one part of the layers (dense or routed), [n] each."""

    kinds: list[Any]
    """Saved by one layer of each kind."""
    mtp: Any
    """Saved by one prediction layer."""
    working: Any
    """Held for a moment in the backward of the widest layer."""
    again: Any
    """What recompute brings back of one layer while its backward runs."""
    logits: Any
    """Held for a moment by the stage with the head (dense part only)."""
    sent: Any
    """Kept for every micro-batch of the step by a stage that sends and receives activations (dense part only)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchMemory:
    """Bytes of one micro-batch, dense and routed parts together, [n] each; see `LayerMemory`."""

    saved: Sequence[Any]
    """By one layer of each column of `Ranks.layers`."""
    working: Any
    again: Any
    logits: Any
    sent: Any


def moment_parts(
    workload: Workload, pp: int, vpp: int, ranks: Ranks, k: int, batch: MicroBatchMemory, batches: Any, step: Any
) -> dict[str, Any]:
    """Bytes by part, [n], that rank k of `ranks` holds at its fullest moment; `step`: in the optimizer step instead."""
    pytorch = workload.era.framework == "pytorch"
    parts = {"activations": activation_bytes(pp, vpp, ranks, k, batch.saved, batches)}
    if pytorch and pp > 1:
        parts["pipeline buffers"] = batches * batch.sent
    working = batch.working + batch.again * ranks.recomputes[k]
    if ranks.head[k]:
        parts["logits and loss"] = logits = _logits(pp, vpp, ranks, batch, batches, parts["activations"])
        # What PyTorch's FSDP runs report is the reserved pool: blocks that layers left are too small for the loss.
        working = working if pytorch else np.maximum(working - logits, 0.0)
    parts["working set"] = working
    if workload.gradient_bytes == 2 and not pytorch:
        parts["optimizer step"] = np.maximum(step - functools.reduce(np.add, parts.values()), 0.0)
    return parts


def dense_memory(model: Model, workload: Workload, layouts: Layouts) -> LayerMemory:
    """What one micro-batch keeps or needs for a moment outside routed experts, [n]."""
    tokens = rank_tokens(workload, layouts)
    kinds = [dense_activation_bytes(kind, model, workload, layouts) for kind in model.kinds]
    mtp: Any = 0.0 * tokens
    if model.mtp:
        layers = sum(dense_activation_bytes(x, model, workload, layouts) for x in model.mtp) / len(model.mtp)
        mtp = layers + 4.0 * tokens * model.hidden / shard(layouts)
    working = _most(dense_working_bytes(kind, model, workload, layouts) for kind in model.kinds)
    whole = [dense_activation_bytes(kind, model, workload, _kept_whole(layouts)) for kind in model.kinds]
    again = _most(w - k for w, k in zip(whole, kinds, strict=True)) + gathered_input_bytes(model, workload, layouts)
    return LayerMemory(kinds, mtp, working, again, head_bytes(model, workload, layouts), sent_bytes(model, workload, layouts))


def routed_memory(model: Model, workload: Workload, layouts: Layouts) -> LayerMemory:
    """What routed experts keep or need for a moment under folded layouts, [n]."""
    kinds = [routed_activation_bytes(kind, model, workload, layouts) for kind in model.kinds]
    none: Any = np.zeros(len(layouts))
    mtp = sum((routed_activation_bytes(x, model, workload, layouts) for x in model.mtp), none) / max(1, len(model.mtp))
    working = _most(routed_working_bytes(kind, model, workload, layouts) for kind in model.kinds)
    whole = [routed_activation_bytes(kind, model, workload, _kept_whole(layouts)) for kind in model.kinds]
    again = _most(w - k for w, k in zip(whole, kinds, strict=True))
    return LayerMemory(kinds, mtp, working, again, none, none)


def head_bytes(model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Final norm, logits, loss and the head's gradient while its backward runs, [n]."""
    tokens, vocab = rank_tokens(workload, layouts), padded_vocab(model, layouts.tp) / layouts.tp
    sharded = shard(layouts)
    kept = (MEMORY.head_tokens / sharded + np.where(sharded > 1, MEMORY.head_gathered, 0.0)) * tokens * model.hidden
    return workload.era.logit_bytes * tokens * vocab + MEMORY.head_gradient * vocab * model.hidden + kept


def sent_bytes(model: Model, workload: Workload, layouts: Layouts) -> Any:
    """Buffers of a PyTorch pipeline stage for each micro-batch of the step, [n].

    It makes those for what it receives, activations and gradients, when it is built, and keeps its outputs until their
    backward (torch.distributed.pipelining, stage.py). What it received is the first layer's input, counted there while in
    flight; Megatron frees outputs once sent and makes buffers when needed.
    """
    if workload.era.framework != "pytorch":
        return 0.0 * layouts.cp
    return 2.0 * 2.0 * rank_tokens(workload, layouts) * model.hidden / shard(layouts)


def in_flight(pp: Any, vpp: Any, rank: Any, batches: Any) -> Any:
    """Micro-batches whose activations a pipeline rank of equal chunks holds at its peak, in units of all its layers."""
    return np.minimum(batches, np.where(np.greater(vpp, 1), pp + (pp - 1 - 2 * rank) / vpp, pp - rank))


def activation_bytes(pp: int, vpp: int, ranks: Ranks, k: int, saved: Sequence[Any], batches: Any) -> Any:
    """Saved bytes of all micro-batches that rank k of `ranks` holds at its peak, [n].

    `saved`: of one layer of each column of `Ranks.layers`.
    """
    if vpp == 1:
        return np.minimum(batches, pp - ranks.rank[k]) * _weighted(ranks.layers[k], saved)
    once, longer = ranks.moments[k]
    most = _most(_weighted(moment, saved) for moment in longer)
    short = most if once is longer else _most(_weighted(moment, saved) for moment in once)
    return np.where(batches > pp, most, _share(pp, batches) * short)


def _logits(pp: int, vpp: int, ranks: Ranks, batch: MicroBatchMemory, batches: Any, activations: Any) -> Any:
    """What the loss takes beyond `activations`, which may be those of another moment, [n]."""
    if vpp == 1:
        return batch.logits
    meanwhile = _share(pp, batches) * _weighted(ranks.loss, batch.saved)
    return np.maximum(batch.logits + meanwhile - activations, 0.0)


def _share(pp: int, batches: Any) -> Any:
    """Of pp micro-batches, those that the step has."""
    return np.minimum(batches / pp, 1.0)


def _weighted(counts: Any, values: Sequence[Any]) -> Any:
    return sum((count * value for count, value in zip(counts, values, strict=True) if count), 0.0)


def _kept_whole(layouts: Layouts) -> Layouts:
    return layouts.with_columns(recompute=0 * layouts.recompute)


def _most(values: Iterable[Any]) -> Any:
    return functools.reduce(np.maximum, values)
