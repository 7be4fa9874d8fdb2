"""One MoE layer in plain torch: what every schedule must give, and the weights that all of them share.

y = sum over the top-k experts of probability x expert(x); probabilities are a softmax over all experts in fp32, over the chosen
ones again if renormalised. Experts are SwiGLU or plain GELU. Nothing is dropped. A process holds all of it, autograd gives the
gradients. Weights are drawn expert by expert from a seed, so that a rank can make its shard without the others'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.errors import UsageError
from moeplan.runtime import wire
from moeplan.runtime.placement import LayerRanks, Placement
from moeplan.runtime.rows import cut


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Sizes of one MoE layer."""

    hidden: int
    """M: width of a token."""
    expert_hidden: int
    """H: width inside a whole expert."""
    experts: int
    topk: int
    gated: bool = True
    """SwiGLU with three products, else GELU with two."""
    renormalised: bool = True
    """Whether the probabilities of the chosen experts are made to add up to 1."""

    def __post_init__(self) -> None:
        for name in ("hidden", "expert_hidden", "experts", "topk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of an MoE layer is {getattr(self, name)}, a whole number from 1 is needed")
        if self.topk > self.experts:
            raise UsageError(f"top-k {self.topk} exceeds the {self.experts} experts")

    @property
    def halves(self) -> int:
        """Products into the inner width: 2 gated, 1 plain."""
        return 2 if self.gated else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """All weights of a layer, or gradients of them."""

    gate: Tensor
    """[experts, hidden]."""
    inner: Tensor
    """[experts, hidden, halves, expert hidden]: the gate's half first."""
    down: Tensor
    """[experts, expert hidden, hidden]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What one rank holds of the weights, or of gradients of them."""

    gate: Tensor
    """[experts, hidden]: all of it."""
    inner: Tensor
    """[local experts, hidden, halves x part of the expert hidden]."""
    down: Tensor
    """[local experts, part of the expert hidden, hidden]."""


def _normal(shape: tuple[int, ...], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers of variance 1 / fan-in; `stream` 0 is the gate, then the experts."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + stream)
    return (torch.randn(shape, generator=generator) / math.sqrt(shape[0])).to(dtype)


def _expert(shape: LayerShape, seed: int, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inner = _normal((shape.hidden, shape.halves, shape.expert_hidden), seed, 2 * expert + 1, dtype)
    return inner, _normal((shape.expert_hidden, shape.hidden), seed, 2 * expert + 2, dtype)


def _gate(shape: LayerShape, seed: int, dtype: torch.dtype) -> Tensor:
    return _normal((shape.hidden, shape.experts), seed, 0, dtype).T.contiguous()


def full_weights(shape: LayerShape, seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    """All weights of a seed, on the host."""
    experts = [_expert(shape, seed, x, dtype) for x in range(shape.experts)]
    inner, down = (torch.stack(each) for each in zip(*experts, strict=True))
    return Weights(gate=_gate(shape, seed, dtype), inner=inner, down=down)


def drawn_shard(
    shape: LayerShape,
    placement: Placement,
    rank: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Shard:
    """The shard of a rank of `full_weights` of the same seed, without making the others."""
    local, (start, size) = _own(shape, placement, rank)
    inner, down = [], []
    for x in local:
        whole_inner, whole_down = _expert(shape, seed, x, dtype)
        inner.append(whole_inner[:, :, start : start + size].flatten(1))
        down.append(whole_down[start : start + size])
    return Shard(
        gate=_gate(shape, seed, dtype).to(device), inner=torch.stack(inner).to(device), down=torch.stack(down).to(device)
    )


def shard(weights: Weights, shape: LayerShape, placement: Placement, rank: int) -> Shard:
    """The part of all weights that a rank holds."""
    local, (start, size) = _own(shape, placement, rank)
    part, experts = slice(start, start + size), slice(local.start, local.stop)
    return Shard(
        gate=weights.gate.clone(),
        inner=weights.inner[experts, :, :, part].flatten(2).contiguous(),
        down=weights.down[experts, part].contiguous(),
    )


def _own(shape: LayerShape, placement: Placement, rank: int) -> tuple[range, tuple[int, int]]:
    """Experts of a rank, and start and size of its part of their inner width."""
    _, place, lane = placement.at(rank)
    local = shape.experts // placement.ep
    return range(place * local, (place + 1) * local), cut(shape.expert_hidden, placement.esp, lane)


def joined(shards: list[Shard], shape: LayerShape, placement: Placement) -> Weights:
    """All weights, from the shards of the ranks of one replica; the gate is the first one's."""
    inner, down = [], []
    for place in range(placement.ep):
        parts = shards[place * placement.esp : (place + 1) * placement.esp]
        inner.append(torch.cat([p.inner.view(*p.inner.shape[:2], shape.halves, p.down.shape[1]) for p in parts], dim=3))
        down.append(torch.cat([p.down for p in parts], dim=1))
    return Weights(gate=shards[0].gate, inner=torch.cat(inner), down=torch.cat(down))


def gathered(ranks: LayerRanks, shape: LayerShape, own: Shard) -> Weights:
    """All weights, from the shards of all ranks of a replica, on each of them."""
    widths = [cut(shape.expert_hidden, ranks.placement.esp, s)[1] for s in range(ranks.placement.esp)] * ranks.placement.ep
    inner = wire.gather_uneven(ranks, "all", own.inner.flatten())
    down = wire.gather_uneven(ranks, "all", own.down.flatten())
    shards = [
        Shard(
            gate=own.gate,
            inner=i.view(-1, shape.hidden, shape.halves * width),
            down=d.view(-1, width, shape.hidden),
        )
        for i, d, width in zip(inner, down, widths, strict=True)
    ]
    return joined(shards, shape, ranks.placement)


def gate(tokens: Tensor, weight: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all experts [tokens, experts], probabilities and numbers of the chosen ones [tokens, top-k]."""
    scores = torch.softmax(tokens.float() @ weight.float().T, dim=1)
    kept, ids = torch.topk(scores, shape.topk, dim=1)
    return scores, kept / kept.sum(dim=1, keepdim=True) if shape.renormalised else kept, ids


def dense_layer(tokens: Tensor, weights: Weights, shape: LayerShape) -> Tensor:
    """The layer's output for tokens [tokens, hidden]; differentiable in the tokens and all weights."""
    _, probabilities, ids = gate(tokens, weights.gate, shape)
    out = torch.zeros_like(tokens)
    for x in range(shape.experts):
        token, choice = (ids == x).nonzero(as_tuple=True)
        pre = torch.einsum("tm,mjh->tjh", tokens[token], weights.inner[x])
        inner = F.silu(pre[:, 0]) * pre[:, 1] if shape.gated else F.gelu(pre[:, 0])
        y = probabilities[token, choice, None].to(tokens.dtype) * (inner @ weights.down[x])
        out = out.index_add(0, token, y)
    return out


def dense_gradients(tokens: Tensor, weights: Weights, shape: LayerShape, grad: Tensor) -> tuple[Tensor, Tensor, Weights]:
    """Output, input gradient and weight gradients of the layer, by autograd, for an output gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in (tokens, weights.gate, weights.inner, weights.down)]
    out = dense_layer(leaves[0], Weights(gate=leaves[1], inner=leaves[2], down=leaves[3]), shape)
    given = torch.autograd.grad(out, leaves, grad)
    return out.detach(), given[0], Weights(gate=given[1], inner=given[2], down=given[3])
