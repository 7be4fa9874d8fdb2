"""Runs the MoE layer of a plan under its schedules: results against a dense reference, times for comparison with predictions.

Results are checked in fp32 on a layer of the same groups and experts that is small enough for every rank to compute all of it
alone (`reference.py`), with another number of tokens in every tensor-parallel group. Times are those of the full layer with
random tokens and gate; a direction takes as long as its slowest rank, median over the repeats. Units: seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed

from moeplan.costmodels.moe.base import Direction
from moeplan.costmodels.simulate import Timeline
from moeplan.errors import DeviceError
from moeplan.planner.layers.comparison import TimedRun
from moeplan.planner.layers.runs import LayerRun
from moeplan.planner.layers.setup import LayerSetup
from moeplan.profiles.timing import summary
from moeplan.profiles.world import World
from moeplan.runtime.executor import lanes_for
from moeplan.runtime.moe_layer import MoeLayer
from moeplan.runtime.moe_tasks import executable
from moeplan.runtime.placement import LayerRanks, Placement, join
from moeplan.runtime.reference import LayerShape, Weights, dense_gradients, drawn_shard, full_weights, shard

CHECKED_WIDTH, CHECKED_TOKENS = 64, 24
"""Widths and tokens of the layer whose results are checked, at most."""
TOLERANCE = 1e-5
"""Greatest error of a result over the greatest value of its tensor."""
SEED = 20
LEAST_REPEATS, MOST_REPEATS = 5, 50
MEMORY_SHARE = 0.5
"""Share of a device's memory that the layer may take."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A schedule in a number of chunks each way."""

    schedule: str
    forward_degree: int = 1
    backward_degree: int = 1

    def __str__(self) -> str:
        chunks = f" {self.forward_degree}/{self.backward_degree}"
        return self.schedule + (chunks if executable(self.schedule)[0].chunked else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Results of a variant beside the reference."""

    variant: Variant
    errors: Mapping[str, float]
    """Greatest error over the greatest value, worst rank, of the output and of every gradient."""
    in_order: bool
    """Whether every lane of every rank did its tasks in the order of the plan."""

    @property
    def right(self) -> bool:
        """Whether results and order are as they should be."""
        return self.in_order and all(error <= TOLERANCE for error in self.errors.values())  # a NaN is not


def placement_of(setup: LayerSetup) -> Placement:
    """Where the ranks of a layer stand."""
    return Placement(ep=setup.ep, esp=setup.esp, mp=setup.mp, replicas=setup.replicas)


def shape_of(setup: LayerSetup) -> LayerShape:
    """The layer's sizes."""
    return LayerShape(
        hidden=setup.hidden,
        expert_hidden=setup.expert_hidden,
        experts=setup.experts,
        topk=setup.topk,
        gated=setup.gated,
    )


def check_memory(setup: LayerSetup, memory_bytes: float, element_bytes: int = 2) -> None:
    """Refuse a layer whose weights, gradients and slots a rank has no room for."""
    weights = 2.0 * setup.weight_elements * element_bytes
    rows = setup.tokens * setup.topk / setup.mp * setup.esp
    slots = rows * element_bytes * (6.0 * setup.hidden + 4.0 * setup.gemms * setup.expert_hidden / setup.esp)
    needed, room = weights + slots, MEMORY_SHARE * memory_bytes
    if needed > room:
        raise DeviceError(
            f"the layer needs about {needed / 2**30:.1f} GiB on a rank, {room / 2**30:.1f} GiB are meant for it",
            hint="lower --tokens, --experts, --hidden or --expert-hidden",
        )


def variants(schedules: Sequence[str], degrees: Sequence[int]) -> list[Variant]:
    """Every schedule in every number of chunks that it takes, the same both ways."""
    out = []
    for name in schedules:
        chunks = degrees if executable(name)[0].chunked else (1,)
        out += [Variant(schedule=name, forward_degree=r, backward_degree=r) for r in chunks]
    return out


def layer_ranks(world: World, setup: LayerSetup) -> LayerRanks:
    """The process groups of a layer."""
    found: list[LayerRanks] = []
    world.collect("process groups", lambda: found.append(join(placement_of(setup), world.timeout_s)), lambda _: None)
    return found[0]


# ---------------------------------------------------------------- results


def check(world: World, ranks: LayerRanks, setup: LayerSetup, variant: Variant) -> Checked:
    """Output and all gradients of a variant against the reference, on every rank."""

    def worst(found: list[tuple[dict[str, float], bool]]) -> Any:
        errors = {name: float(np.max([each[name] for each, _ in found])) for name in found[0][0]}
        return {"errors": errors, "in_order": all(ordered for _, ordered in found)}

    told = world.collect(f"check of {variant}", lambda: _checked(world, ranks, setup, variant), worst)
    return Checked(variant=variant, errors=told["errors"], in_order=told["in_order"])


def _checked(world: World, ranks: LayerRanks, setup: LayerSetup, variant: Variant) -> tuple[dict[str, float], bool]:
    width = min(setup.expert_hidden, max(CHECKED_WIDTH, setup.esp))
    shape = LayerShape(
        hidden=min(setup.hidden, CHECKED_WIDTH),
        expert_hidden=width,
        experts=setup.experts,
        topk=setup.topk,
        gated=setup.gated,
    )
    weights = full_weights(shape, SEED)
    groups, mine = setup.ranks // setup.mp, world.rank // setup.mp
    counts = [max(1, min(setup.tokens, CHECKED_TOKENS) - group % 3) for group in range(groups)]
    generator = torch.Generator().manual_seed(SEED)
    tokens, grad = (torch.randn(sum(counts), shape.hidden, generator=generator) for _ in range(2))
    own = slice(sum(counts[:mine]), sum(counts[: mine + 1]))
    # 1. All tokens by the reference, in this process alone.
    out, dx, gradients = dense_gradients(tokens, weights, shape, grad)
    # 2. This rank's part by the schedule.
    device = world.device
    layer = _layer(ranks, shape, shard(weights, shape, ranks.placement, world.rank), variant, device)
    made = layer.forward(tokens[own].to(device))
    made_dx = layer.backward(grad[own].to(device))
    made_gradients = layer.reduce_gradients()
    # 3. Both side by side.
    said = shard(Weights(gate=gradients.gate, inner=gradients.inner, down=gradients.down), shape, ranks.placement, world.rank)
    errors = {
        "output": _error(made, out[own]),
        "input gradient": _error(made_dx, dx[own]),
        "gate gradient": _error(made_gradients.gate, said.gate),
        "inner gradient": _error(made_gradients.inner, said.inner),
        "down gradient": _error(made_gradients.down, said.down),
    }
    return errors, all(in_planned_order(layer, direction) for direction in DIRECTIONS)


def _layer(ranks: LayerRanks, shape: LayerShape, own: Any, variant: Variant, device: Any) -> MoeLayer:
    moved = type(own)(gate=own.gate.to(device), inner=own.inner.to(device), down=own.down.to(device))
    return MoeLayer(
        ranks,
        shape,
        moved,
        variant.schedule,
        forward_degree=variant.forward_degree,
        backward_degree=variant.backward_degree,
        lanes=lanes_for(device),
    )


def _error(made: torch.Tensor, said: torch.Tensor) -> float:
    """Greatest difference over the greatest value of a tensor."""
    if not said.numel():
        return 0.0
    greatest = max(float(said.abs().max()), 1e-30)
    return float((made.detach().cpu().float() - said).abs().max()) / greatest


def in_planned_order(layer: MoeLayer, direction: Direction) -> bool:
    """Whether every lane did its tasks in the order of the schedule's graph in the last run of a direction."""
    graph = layer.schedule.graph(layer.degrees[direction], layer.size(1))
    done: Timeline = layer.runs[direction].timeline
    return all(
        [e.name for e in done.events if lane in e.on] == [t.name for t in graph.tasks if lane in t.on]
        for lane in graph.resources
    )


# ---------------------------------------------------------------- times


def time_variant(
    world: World,
    ranks: LayerRanks,
    setup: LayerSetup,
    variant: Variant,
    *,
    budget_s: float,
    gradient_bytes: int = 0,
    precision: str = "bf16",
) -> list[TimedRun]:
    """Both directions of a variant on the full layer, repeated for about `budget_s`; `gradient_bytes` are reduced in R."""
    prepared: list[_Repeats] = []

    def prepare() -> float:
        prepared.append(_Repeats(world, ranks, setup, variant, gradient_bytes, precision))
        prepared[0].once()  # warm-up
        return prepared[0].once()

    longest_s = world.collect(f"warm-up of {variant}", prepare, max)
    repeats = int(np.clip(budget_s / max(longest_s, 1e-9), LEAST_REPEATS, MOST_REPEATS))
    for _ in range(repeats):
        world.collect(f"run of {variant}", prepared[0].once, lambda _: None)
    return prepared[0].results(world, repeats)


class _Repeats:
    """A variant on the full layer that is run again and again."""

    def __init__(
        self, world: World, ranks: LayerRanks, setup: LayerSetup, variant: Variant, gradient_bytes: int, precision: str
    ) -> None:
        self.setup, self.variant, self.gradient_bytes, self.precision = setup, variant, gradient_bytes, precision
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        shape = shape_of(setup)
        own = drawn_shard(shape, ranks.placement, world.rank, SEED, dtype=dtype, device=world.device)
        self.layer = _layer(ranks, shape, own, variant, world.device)
        group = world.rank // setup.mp
        generator = torch.Generator().manual_seed(SEED + group)
        size = (setup.tokens, setup.hidden)
        self.tokens, self.grad = (torch.randn(size, generator=generator).to(world.device, dtype) for _ in range(2))
        count = gradient_bytes // self.tokens.element_size()
        self.reduced = [torch.zeros(count, dtype=dtype, device=world.device)] if count else []
        self.meeting = torch.zeros(1, device=world.device)
        self.timelines: dict[Direction, list[Timeline]] = {"forward": [], "backward": []}

    def once(self) -> float:
        """Both directions once; seconds of their graphs."""
        self._meet()
        self.layer.forward(self.tokens)
        self._meet()
        self.layer.backward(self.grad, self.reduced)
        lasted = 0.0
        for direction, timelines in self.timelines.items():
            timelines.append(self.layer.runs[direction].timeline)
            lasted += timelines[-1].makespan_s
        return lasted

    def _meet(self) -> None:
        """Begin together: what a rank comes late is no time of a schedule."""
        if self.setup.ranks > 1:
            torch.distributed.all_reduce(self.meeting)
            float(self.meeting)  # waits for it

    def results(self, world: World, repeats: int) -> list[TimedRun]:
        """What the last `repeats` took, all ranks together."""
        out = []
        for direction, timelines in self.timelines.items():
            kept = timelines[-repeats:]
            spans = [line.makespan_s for line in kept]
            slowest = world.agree(spans, lambda all_: np.max(all_, axis=0).tolist())
            tasks = world.agree(_by_kind(kept), _slowest)
            timing = summary(slowest)
            out.append(TimedRun(run=self._run(direction, timing.seconds, timing.spread), tasks=tasks))
        return out

    def _run(self, direction: Direction, seconds: float, spread: float) -> LayerRun:
        setup, variant = self.setup, self.variant
        degree = variant.forward_degree if direction == "forward" else variant.backward_degree
        return LayerRun(
            id=f"{variant} {direction}", schedule=variant.schedule, direction=direction, degree=degree, tokens=setup.tokens,
            hidden=setup.hidden, expert_hidden=setup.expert_hidden, experts=setup.experts, topk=setup.topk, gemms=setup.gemms,
            mp=setup.mp, esp=setup.esp, ep=setup.ep, precision=self.precision,
            gradient_bytes=float(self.gradient_bytes) if direction == "backward" else 0.0,
            measured_layer_s=seconds, spread=spread,
        )  # fmt: skip


def _by_kind(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Seconds of one task by kind: mean over chunks, median over repeats."""
    out: dict[str, list[float]] = {}
    for line in timelines:
        kinds: dict[str, list[float]] = {}
        for event in line.events:
            kinds.setdefault(event.name.rstrip("0123456789"), []).append(event.end_s - event.start_s)
        for kind, spans in kinds.items():
            out.setdefault(kind, []).append(float(np.mean(spans)))
    return {kind: float(np.median(means)) for kind, means in out.items()}


def _slowest(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: max(each[kind] for each in found) for kind in found[0]}
