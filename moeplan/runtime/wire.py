"""The collectives of an MoE layer on one axis of its ranks.

Blocking for the lane that calls: its thread on CPUs, its stream on GPUs. A group of one rank copies or does nothing. Rows are
the first dimension; all-gathers and reduce-scatters have equal rows on all ranks, exchanges any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime.placement import LayerRanks

# The names of torch since 2.12 or so, which deprecates the older ones.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def exchange(ranks: LayerRanks, axis: str, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor) -> None:
    """All-to-all: `send[i]` rows go to rank i of the group, `receive[i]` come from it, into `out`."""
    group = ranks.groups[axis]
    if group is None:
        out.copy_(rows)
    else:
        dist.all_to_all_single(out, rows, list(receive), list(send), group=group)


def gather(ranks: LayerRanks, axis: str, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """All-gather: the rows of all ranks of the group, in their order."""
    group = ranks.groups[axis]
    if group is None:
        return rows if out is None else out.copy_(rows)
    if out is None:
        out = rows.new_empty(ranks.size(axis) * rows.shape[0], *rows.shape[1:])
    if rows.numel():
        _gather_into(out, rows, group=group)
    return out


def scatter(ranks: LayerRanks, axis: str, rows: Tensor) -> Tensor:
    """Reduce-scatter: this rank's part of the sum over the group."""
    group = ranks.groups[axis]
    if group is None:
        return rows
    out = rows.new_empty(rows.shape[0] // ranks.size(axis), *rows.shape[1:])
    if rows.numel():
        _scatter_into(out, rows, group=group)
    return out


def reduce(ranks: LayerRanks, axis: str, tensor: Tensor) -> Tensor:
    """All-reduce in place: the sum over the group."""
    group = ranks.groups[axis]
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_uneven(ranks: LayerRanks, axis: str, rows: Tensor) -> list[Tensor]:
    """The rows of every rank of the group, of any number each."""
    counts = gather(ranks, axis, torch.tensor([rows.shape[0]], device=rows.device)).tolist()
    padded = padded_rows(rows, max(counts))
    parts = torch.split(gather(ranks, axis, padded), max(counts)) if max(counts) else [padded] * len(counts)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def padded_rows(rows: Tensor, count: int) -> Tensor:
    """The rows, with undefined ones behind them up to `count`."""
    if rows.shape[0] == count:
        return rows
    out = rows.new_empty(count, *rows.shape[1:])
    out[: rows.shape[0]] = rows
    return out
