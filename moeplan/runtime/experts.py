"""The local shards of the experts of one rank: forward, and both gradients, of rows that are grouped by expert.

SwiGLU: y = (silu(x V) * (x U)) W, V and U in one product; plain: y = gelu(x U) W. The shard holds a part of the inner width,
so y and the input's gradient are partial sums. A forward keeps its rows and its inner products, so that a backward, in any
number of chunks, costs twice a forward. Products are torch's grouped ones where it has them and they are right, else a loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime.reference import LayerShape, Shard
from moeplan.runtime.rows import Grouped, Ints, inverse


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """`rows.Grouped` on a device."""

    pick: Tensor
    back: Tensor
    sizes: list[int]
    ends: Tensor
    """[local experts]: end of the rows of each expert."""
    names: Ints

    @classmethod
    def of(cls, grouped: Grouped, device: torch.device) -> Rows:
        """The same numbers, copied."""
        return cls(
            pick=torch.from_numpy(grouped.pick).to(device),
            back=torch.from_numpy(grouped.back).to(device),
            sizes=grouped.sizes.tolist(),
            ends=torch.from_numpy(grouped.sizes.cumsum().astype(np.int32)).to(device),
            names=grouped.names,
        )


class Experts:
    """A forward and a backward of one rank's shards over the same rows."""

    def __init__(self, shape: LayerShape, shard: Shard) -> None:
        self.shape, self.shard = shape, shard
        # Of each chunk of the forward, then of the backward.
        self.names: dict[int, Ints] = {}
        self.rows: dict[int, Tensor] = {}
        self.pre: dict[int, Tensor] = {}
        self.inner_gradient, self.down_gradient = torch.zeros(0), torch.zeros(0)

    def forward(self, chunk: int, arrived: Tensor, rows: Rows) -> Tensor:
        """Partial outputs of a chunk of rows that arrived."""
        self.names[chunk], self.rows[chunk] = rows.names, arrived.index_select(0, rows.pick)
        self.pre[chunk] = _products(self.rows[chunk], self.shard.inner, rows)
        return _products(self._inner(self.pre[chunk]), self.shard.down, rows)

    def begin_backward(self, chunks: Sequence[Rows]) -> None:
        """Prepare a backward in these chunks, which may be others than the forward's."""
        self.inner_gradient, self.down_gradient = torch.zeros_like(self.shard.inner), torch.zeros_like(self.shard.down)
        if len(chunks) == len(self.rows):
            return
        names = np.concatenate([self.names[i] for i in range(len(self.names))])
        at = inverse(names, len(names))
        taken = [torch.from_numpy(at[chunk.names]).to(self.shard.inner.device) for chunk in chunks]
        for kept in (self.rows, self.pre):
            whole = torch.cat([kept[i] for i in range(len(kept))])
            kept.clear()
            kept.update((i, whole.index_select(0, t)) for i, t in enumerate(taken))

    def backward(self, chunk: int, arrived: Tensor, rows: Rows) -> Tensor:
        """Partial input gradients of a chunk of output gradients that arrived; adds to the gradients of the weights."""
        x, pre, dy = self.rows[chunk], self.pre[chunk], arrived.index_select(0, rows.pick)
        _add_gradients(self._inner(pre), dy, rows, self.down_gradient)
        dpre = self._inner_backward(pre, _products(dy, self.shard.down.transpose(1, 2), rows))
        _add_gradients(x, dpre, rows, self.inner_gradient)
        return _products(dpre, self.shard.inner.transpose(1, 2), rows)

    def taken_gradients(self, gate: Tensor, copies: int) -> Shard:
        """Gradients of the backward, with the gate's, where each slot entered its expert `copies` times."""
        return Shard(gate=gate, inner=self.inner_gradient / copies, down=self.down_gradient / copies)

    def flop(self, rows: int) -> float:
        """FLOP of `rows` rows forward; backward takes twice as many."""
        inner, down = self.shard.inner.shape[2], self.shard.down.shape[1]
        return 2.0 * rows * self.shape.hidden * (inner + down)

    def _inner(self, pre: Tensor) -> Tensor:
        if not self.shape.gated:
            return F.gelu(pre)
        gate, up = pre.chunk(2, dim=1)
        return F.silu(gate) * up

    def _inner_backward(self, pre: Tensor, grad: Tensor) -> Tensor:
        aten: Any = torch.ops.aten
        if not self.shape.gated:
            out: Tensor = aten.gelu_backward(grad, pre)
            return out
        gate, up = pre.chunk(2, dim=1)
        return torch.cat([aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=1)


def _products(x: Tensor, weights: Tensor, rows: Rows) -> Tensor:
    """Rows of each expert times its matrix [experts, in, out]."""
    if _groups(x, weights):
        return F.grouped_mm(x, weights, offs=rows.ends)
    out = x.new_empty(x.shape[0], weights.shape[2])
    for expert, (part, to) in enumerate(zip(torch.split(x, rows.sizes), torch.split(out, rows.sizes), strict=True)):
        torch.mm(part, weights[expert], out=to)
    return out


def _add_gradients(x: Tensor, grad: Tensor, rows: Rows, to: Tensor) -> None:
    """Add the products of the rows of each expert, transposed, and their gradients."""
    if _groups(x, to):
        to += F.grouped_mm(x.T, grad, offs=rows.ends)
        return
    for expert, (part, gradient) in enumerate(zip(torch.split(x, rows.sizes), torch.split(grad, rows.sizes), strict=True)):
        to[expert].addmm_(part.T, gradient)


def _groups(x: Tensor, weights: Tensor) -> bool:
    """Whether grouped products take these: some rows, of whole 16 bytes."""
    aligned = all(width * x.element_size() % 16 == 0 for width in weights.shape[1:])
    return aligned and x.shape[0] > 0 and offers_grouped(x.device.type, x.dtype)


@functools.cache
def offers_grouped(device: str, dtype: torch.dtype) -> bool:
    """Whether torch has grouped products on this kind of device, forward and of both gradients, and they are right."""
    if not hasattr(F, "grouped_mm"):
        return False
    # Three experts with 3, 0 and 6 rows.
    ends = torch.tensor([3, 3, 9], dtype=torch.int32, device=device)
    x = torch.linspace(-1, 1, 9 * 16, device=device).reshape(9, 16).to(dtype)
    weights = torch.linspace(-1, 1, 3 * 256, device=device).reshape(3, 16, 16).to(dtype)
    try:
        forward = F.grouped_mm(x, weights, offs=ends)
        inputs = F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
        gradients = F.grouped_mm(x.T, x, offs=ends)
    except RuntimeError:
        return False
    expected = [
        (forward, torch.cat([x[:3] @ weights[0], x[3:] @ weights[2]])),
        (inputs, torch.cat([x[:3] @ weights[0].T, x[3:] @ weights[2].T])),
        (gradients, torch.stack([x[:3].T @ x[:3], torch.zeros_like(weights[1]), x[3:].T @ x[3:]])),
    ]
    return all(torch.allclose(given, wanted, rtol=0.02, atol=0.02) for given, wanted in expected)
