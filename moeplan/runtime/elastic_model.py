"""A small MoE language model on the ranks of a layout: what elastic runs train.

Embedding, layers of causal attention and a routed MoE with RMS norms before each, final norm and an untied head. Stages of the
pipeline hold consecutive layers; within a stage experts are shared by ep, all else is the same on all ranks. Weights are drawn
layer by layer and expert by expert from a seed, whatever the layout. No dropout, no capacity, no auxiliary loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.errors import LayoutError
from moeplan.runtime.moe_layer import MoeLayer, MoeModule
from moeplan.runtime.placement import LayerRanks
from moeplan.runtime.reference import LayerShape, drawn_shard

SCHEDULE = "pipemoe"
_STREAMS = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Sizes of the model."""

    layers: int = 3
    hidden: int = 32
    heads: int = 4
    experts: int = 12
    """Divisible by 2, 3 and 4, so that expert groups of these sizes exist."""
    topk: int = 2
    expert_hidden: int = 32
    vocabulary: int = 64
    seq_len: int = 16

    @property
    def moe(self) -> LayerShape:
        """One MoE layer."""
        return LayerShape(hidden=self.hidden, expert_hidden=self.expert_hidden, experts=self.experts, topk=self.topk)


class Stage(torch.nn.Module):
    """Consecutive layers, with the embedding or the head where they are the first or the last."""

    def __init__(self, size: ModelSize, ranks: LayerRanks, layers: range, seed: int) -> None:
        super().__init__()
        if not layers:
            raise LayoutError("a stage without layers cannot be trained", hint="give every stage one layer at least")
        self.size, self.first, self.last = size, layers.start == 0, layers.stop == size.layers
        if self.first:
            self.embedding = _drawn((size.vocabulary, size.hidden), 1.0, seed, 0)
        self.layers = torch.nn.ModuleDict({str(i): _Layer(size, ranks, seed * _STREAMS + i + 1) for i in layers})
        if self.last:
            self.norm = torch.nn.Parameter(torch.ones(size.hidden))
            self.head = _drawn((size.vocabulary, size.hidden), size.hidden**-0.5, seed, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[sequences, length] tokens or [sequences, length, hidden] states; logits at the last stage, else states."""
        if self.first:
            x = F.embedding(x, self.embedding)
        for layer in self.layers.values():
            x = layer(x)
        return F.linear(_normed(x, self.norm), self.head) if self.last else x


class _Layer(torch.nn.Module):
    def __init__(self, size: ModelSize, ranks: LayerRanks, seed: int) -> None:
        super().__init__()
        spread = size.hidden**-0.5
        self.heads = size.heads
        self.norms = torch.nn.Parameter(torch.ones(2, size.hidden))
        self.qkv = _drawn((3 * size.hidden, size.hidden), spread, seed, 0)
        self.out = _drawn((size.hidden, size.hidden), spread, seed, 1)
        shard = drawn_shard(size.moe, ranks.placement, ranks.rank, seed)
        self.moe = MoeModule(MoeLayer(ranks, size.moe, shard, SCHEDULE))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, hidden = x.shape
        # [3, rows, heads, length, hidden / heads]
        split = F.linear(_normed(x, self.norms[0]), self.qkv).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (split[0] @ split[1].transpose(2, 3)) / math.sqrt(hidden // self.heads)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(dim=3) @ split[2]
        x = x + F.linear(mixed.transpose(1, 2).reshape(rows, length, hidden), self.out)
        y: Tensor = self.moe(_normed(x, self.norms[1]).reshape(rows * length, hidden))
        return x + y.view(rows, length, hidden)


def is_expert(name: str) -> bool:
    """Whether a parameter of a stage is a part of the experts, the first axis of which counts them."""
    return name.endswith((".inner", ".down"))


def _normed(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * scale


def _drawn(shape: tuple[int, int], spread: float, seed: int, stream: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed * _STREAMS + stream)
    return torch.nn.Parameter(spread * torch.randn(shape, generator=generator))
