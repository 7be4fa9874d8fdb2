"""One MoE layer on the ranks of a placement, run by the task graph of a schedule.

`forward` and `backward` gate, tell all ranks of a replica each other's choices, execute the schedule's graph in the number of
chunks of that direction, and put tokens together. Tokens are the same on all ranks of a tensor-parallel group, whose output
gradients must be too. No slot is dropped, so all schedules give what `reference.py` gives. Weight gradients are sums over the
tokens that a rank saw; `reduce_gradients` makes them those of all tokens. Gating and ordering stand outside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeplan.costmodels.moe.base import Direction, MoeSize, check_degree
from moeplan.costmodels.simulate import Timeline
from moeplan.errors import ScheduleError, UsageError
from moeplan.runtime import wire
from moeplan.runtime.executor import Lanes, execute, lanes_for
from moeplan.runtime.experts import Experts, Rows
from moeplan.runtime.moe_passage import Load, Passage
from moeplan.runtime.moe_tasks import executable, size_of
from moeplan.runtime.placement import LayerRanks
from moeplan.runtime.reference import LayerShape, Shard, gate
from moeplan.runtime.rows import Routing, Traffic, cut, routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One direction that was executed."""

    timeline: Timeline
    amounts: Mapping[str, float]
    """By task: bytes that this rank held, FLOP of E; as `LayerSchedule.amounts` counts them."""


@dataclass(kw_only=True, slots=True)
class Saved:
    """What a backward needs of its forward."""

    group_tokens: int
    tokens: Tensor
    scores: Tensor
    probabilities: Tensor
    ids: Tensor
    routing: Routing
    scales: Tensor
    experts: Experts
    slots: Tensor
    """[tokens, top-k, hidden]: outputs of the experts."""


class MoeLayer:
    """A layer with a schedule; call `forward`, then `backward`."""

    def __init__(
        self,
        ranks: LayerRanks,
        shape: LayerShape,
        shard: Shard,
        schedule: str,
        *,
        forward_degree: int = 1,
        backward_degree: int = 1,
        lanes: Lanes | None = None,
    ) -> None:
        """`shard`: this rank's weights, on the device that is to work; refuses what the schedule or placement cannot do."""
        self.ranks, self.shape = ranks, shape
        self.shard = Shard(gate=shard.gate.detach(), inner=shard.inner.detach(), down=shard.down.detach())
        self.schedule, self.way = executable(schedule)
        self.degrees: dict[Direction, int] = {"forward": forward_degree, "backward": backward_degree}
        self.lanes = lanes or lanes_for(shard.gate.device)
        self.runs: dict[Direction, Run] = {}
        """The last run of each direction."""
        self.saved: Saved | None = None
        self.gradients: Shard | None = None
        """Weight gradients of the last backward."""
        self._check()

    def _check(self) -> None:
        placement, name = self.ranks.placement, self.schedule.name
        if self.shape.experts % placement.ep:
            hint = f"use a divisor of {self.shape.experts}"
            raise ScheduleError(f"ep = {placement.ep} does not divide the {self.shape.experts} experts", hint=hint)
        if placement.esp > self.shape.expert_hidden:
            raise ScheduleError(f"esp = {placement.esp} ranks cannot share an expert's width of {self.shape.expert_hidden}")
        if name == "replicated-baseline" and placement.mp % placement.esp and placement.esp % placement.mp:
            raise ScheduleError(
                f"{name}: of mp = {placement.mp} and esp = {placement.esp} neither divides the other", hint="use 'baseline'"
            )
        for degree in self.degrees.values():
            check_degree(degree)
            if degree > 1 and not self.schedule.chunked:
                raise ScheduleError(f"{name} has no chunks, {degree} are asked for", hint="use 1, or a schedule in chunks")

    def size(self, tokens: int) -> MoeSize:
        """The layer as the cost models see it, with `tokens` tokens a tensor-parallel group."""
        shape, placement = self.shape, self.ranks.placement
        token_bytes = float(tokens * shape.hidden * self.shard.down.element_size())
        slots = float(tokens * shape.topk)
        return MoeSize(
            token_bytes=token_bytes,
            slot_bytes=token_bytes * shape.topk,
            expert_flop=2.0 * (shape.halves + 1) * slots * shape.hidden * shape.expert_hidden,
            mp_ranks=placement.mp,
            esp_ranks=placement.esp,
            ep_ranks=placement.ep,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Outputs [tokens, hidden] for the tokens of the tensor-parallel group."""
        own = self._own(tokens.detach(), len(tokens))
        scores, probabilities, ids = gate(own, self.shard.gate, self.shape)
        plan = self._routing(ids)
        scales = self._scales(plan, probabilities)
        experts = Experts(self.shape, self.shard)
        kept: list[Tensor] = []

        def collect(rows: Tensor) -> Tensor:
            kept.append(rows)
            return torch.einsum("tk,tkm->tm", probabilities.to(rows.dtype), rows)

        def work(chunk: int, arrived: Tensor, rows: Rows) -> tuple[Tensor, float]:
            return experts.forward(chunk, arrived, rows), experts.flop(len(rows.names))

        passage = self._passage("forward", plan, len(tokens), own, None, work, collect)
        out = self._run("forward", passage)
        self.saved = Saved(
            group_tokens=len(tokens),
            tokens=own,
            scores=scores,
            probabilities=probabilities,
            ids=ids,
            routing=plan,
            scales=scales,
            experts=experts,
            slots=kept[0],
        )
        return out

    def backward(self, grad: Tensor, reduce: Sequence[Tensor] = (), saved: Saved | None = None) -> Tensor:
        """Input gradients for output gradients of the tensor-parallel group; task R sums up `reduce` over data parallelism.

        `saved`: of the forward that is meant, if not the last one; it serves once. Sets `gradients`.
        """
        kept = saved or self.saved
        if kept is None:
            raise ScheduleError("backward without a forward before it")
        own = self._own(grad.detach(), kept.group_tokens)
        from_gate, gate_gradient = self._gate_backward(kept, own)

        def collect(rows: Tensor) -> Tensor:
            return rows.sum(dim=1) + from_gate

        def work(chunk: int, arrived: Tensor, rows: Rows) -> tuple[Tensor, float]:
            return kept.experts.backward(chunk, arrived, rows), 2.0 * kept.experts.flop(len(rows.names))

        passage = self._passage("backward", kept.routing, kept.group_tokens, own, kept.scales, work, collect)
        self.saved = None
        kept.experts.begin_backward(passage.rows)
        out = self._run("backward", passage, reduce)
        if self.way.split == "tokens":
            wire.reduce(self.ranks, "mp", gate_gradient)
        self.gradients = kept.experts.taken_gradients(gate_gradient, self._copies())
        return out

    def reduce_gradients(self) -> Shard:
        """Add up the last backward's gradients over all tokens, in place: experts over replicas, the gate over all groups."""
        if self.gradients is None:
            raise ScheduleError("no gradients before a backward")
        wire.reduce(self.ranks, "dense", self.gradients.gate)
        for tensor in (self.gradients.inner, self.gradients.down):
            wire.reduce(self.ranks, "copies", tensor)
        return self.gradients

    def _own(self, tokens: Tensor, count: int) -> Tensor:
        """This rank's part of the rows of `count` tokens, where they are divided."""
        needed, dtype = (count, self.shape.hidden), self.shard.down.dtype
        if tuple(tokens.shape) != needed or tokens.dtype != dtype:
            raise UsageError(
                f"rows of tokens are {list(tokens.shape)} of {tokens.dtype}, the layer needs {list(needed)} of {dtype}"
            )
        if self.way.split != "tokens":
            return tokens
        start, size = cut(len(tokens), self.ranks.placement.mp, self.ranks.place("mp"))
        return tokens[start : start + size]

    def _routing(self, ids: Tensor) -> Routing:
        chosen = [each.cpu().numpy().astype(np.int64) for each in wire.gather_uneven(self.ranks, "all", ids.to(torch.int32))]
        first = self.ranks.members["all"][0]
        owners = [rank - first for rank in self.ranks.members[self.way.owners]]
        return routing(self.way.split, chosen, self.shape.experts, self.ranks.placement, self.ranks.place("all"), owners)

    def _scales(self, plan: Routing, probabilities: Tensor) -> Tensor:
        """Probabilities of the slots that `plan.order` counts."""
        if self.way.split == "none":
            probabilities = wire.gather(self.ranks, self.way.owners, wire.padded_rows(probabilities, plan.padded))
        return probabilities.ravel()

    def _copies(self) -> int:
        """How many times each slot enters its expert."""
        placement = self.ranks.placement
        return placement.mp * self.ranks.size(self.way.owners) // placement.esp if self.way.split == "none" else 1

    def _gate_backward(self, kept: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens through the gate, and of its weight."""
        p, scores = kept.probabilities, kept.scores
        dp = (grad[:, None] * kept.slots).sum(dim=2, dtype=torch.float32)
        if self.shape.renormalised:
            dp = (dp - (dp * p).sum(dim=1, keepdim=True)) / scores.gather(1, kept.ids).sum(dim=1, keepdim=True)
        dscores = torch.zeros_like(scores).scatter(1, kept.ids, dp)
        dlogits = scores * (dscores - (dscores * scores).sum(dim=1, keepdim=True))
        weight = self.shard.gate
        return (dlogits @ weight.float()).to(grad.dtype), (dlogits.T @ kept.tokens.float()).to(weight.dtype)

    def _passage(
        self,
        direction: Direction,
        plan: Routing,
        group_tokens: int,
        values: Tensor,
        scales: Tensor | None,
        experts: Callable[[int, Tensor, Rows], tuple[Tensor, float]],
        collect: Callable[[Tensor], Tensor],
    ) -> Passage:
        place = self.ranks.place("all")
        load = Load(
            ranks=self.ranks,
            routing=plan,
            traffic=Traffic(plan, self.ranks.placement, place, self.degrees[direction]),
            topk=self.shape.topk,
            group_tokens=group_tokens,
            values=values,
            scales=scales,
            experts=experts,
            collect=collect,
        )
        return Passage(self.way, load)

    def _run(self, direction: Direction, passage: Passage, reduce: Sequence[Tensor] = ()) -> Tensor:
        """Execute the graph of a direction."""
        amounts: dict[str, float] = {}

        def task(kind: str, do: Callable[[int], float]) -> Callable[[int], None]:
            def run(number: int) -> None:
                amounts[f"{kind}{number}"] = do(number)

            return run

        def moves(do: Callable[[Passage, int], float]) -> Callable[[int], float]:
            return lambda number: do(passage, number - 1)

        def gradients(number: int) -> float:
            return sum(size_of(wire.reduce(self.ranks, "dense", tensor)) for tensor in reduce)

        # N, the dense part of a backward, is not this layer's.
        kinds: dict[str, Callable[[int], float]] = {"R": gradients, "N": lambda number: 0.0}
        kinds |= {kind: moves(do) for kind, do in self.way.tasks.items()}
        graph = self.schedule.graph(self.degrees[direction], self.size(passage.load.group_tokens))
        # Ranks begin together, so that a host which comes late is no time of a task.
        wire.reduce(self.ranks, "all", passage.values.new_zeros(1))
        timeline = execute(graph, {kind: task(kind, do) for kind, do in kinds.items()}, self.lanes)
        self.runs[direction] = Run(timeline=timeline, amounts=amounts)
        return passage.result()


class MoeModule(torch.nn.Module):
    """A layer as a part of a model, whose parameters are the layer's own shard."""

    def __init__(self, layer: MoeLayer) -> None:
        super().__init__()
        self.layer = layer
        self.gate, self.inner, self.down = (
            torch.nn.Parameter(t) for t in (layer.shard.gate, layer.shard.inner, layer.shard.down)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Outputs for the tokens of the tensor-parallel group."""
        run: Any = _Differentiable.apply
        out: Tensor = run(self.layer, tokens, self.gate, self.inner, self.down)
        return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: MoeLayer, tokens: Tensor, *weights: Tensor) -> Tensor:
        out = layer.forward(tokens)
        ctx.layer, ctx.kept = layer, layer.saved
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.layer.backward(grads[0], saved=ctx.kept)
        own = ctx.layer.gradients
        return None, dx, own.gate, own.inner, own.down
