"""Gloo ranks that run MoE layers and tell, for each case, how far they are from the dense layer; started by the tests.

python -m tests.runtime.moe_worker RANKS DIRECTORY: loads torch once, forks the ranks, writes results.json.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime.moe_layer import MoeLayer, MoeModule
from moeplan.runtime.placement import LayerRanks, join
from moeplan.runtime.reference import LayerShape, Weights, dense_gradients, drawn_shard, full_weights, gathered, shard
from tests.runtime.moe_cases import CASES, SHAPE, Case

SEED = 3
WEIGHTS = ("gate", "inner", "down")


def distance(given: Tensor, expected: Tensor) -> float:
    """Largest difference over what is allowed, 1e-5 and 1e-5 of the value; at most 1 passes."""
    assert given.shape == expected.shape
    return float(((given - expected).abs() / (1e-5 + 1e-5 * expected.abs())).max()) if given.numel() else 0.0


@functools.cache
def dense(tokens: tuple[int, ...], shape: LayerShape, balanced: bool) -> tuple[Weights, list[Tensor], list[Tensor], list]:
    """Weights, tokens and output gradients of the groups, and what the dense layer makes of them all."""
    generator = torch.Generator().manual_seed(SEED)
    weights = full_weights(shape, SEED)
    x, grads = ([torch.randn(n, shape.hidden, generator=generator) for n in tokens] for _ in range(2))
    if balanced:
        # Token t has the experts t k, t k + 1, ..
        weights = replace(weights, gate=torch.eye(shape.experts, shape.hidden))
        for each in x:
            each[:, : shape.experts] = 0.0
            for choice in range(shape.topk):
                t = torch.arange(len(each))
                each[t, (t * shape.topk + choice) % shape.experts] = 2.0 - 0.5 * choice
    return weights, x, grads, list(dense_gradients(torch.cat(x), weights, shape, torch.cat(grads)))


def in_order(layer: MoeLayer, tokens: int, direction: str) -> bool:
    """Whether every lane ran its tasks in the order of the graph, one at a time, and none before what it waits for."""
    graph = layer.schedule.graph(layer.degrees[direction], layer.size(tokens))
    events = layer.runs[direction].timeline.events
    starts, ends = {e.name: e.start_s for e in events}, {e.name: e.end_s for e in events}
    for lane in graph.resources:
        planned = [task.name for task in graph.tasks if lane in task.on]
        ran = [event.name for event in events if lane in event.on]
        if ran != planned or any(starts[b] < ends[a] for a, b in zip(planned[:-1], planned[1:], strict=True)):
            return False
    return all(starts[task.name] >= ends[name] for task in graph.tasks for name in task.after)


def through_a_module(layer: MoeLayer, tokens: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient by autograd, with another forward in between."""
    module = MoeModule(layer)
    x = tokens.clone().requires_grad_()
    out = module(x)
    module(tokens * 2.0)
    (out * grad).sum().backward()
    assert layer.gradients is not None and x.grad is not None
    for name in WEIGHTS:
        assert torch.equal(getattr(module, name).grad, getattr(layer.gradients, name))
    return out.detach(), x.grad


def run(case: Case, ranks: LayerRanks) -> dict[str, object]:
    """One case on this rank."""
    group = ranks.rank // case.placement.mp
    weights, tokens, grads, (expected, expected_dx, expected_weights) = dense(case.tokens, case.shape, case.balanced)
    own = shard(weights, case.shape, case.placement, ranks.rank)
    forward_degree, backward_degree = case.degrees
    layer = MoeLayer(ranks, case.shape, own, case.schedule, forward_degree=forward_degree, backward_degree=backward_degree)
    carried = [torch.full((3,), float(group)), torch.full((2, 2), 1.0)]
    if case.as_module:
        out, dx = through_a_module(layer, tokens[group], grads[group])
    else:
        out, dx = layer.forward(tokens[group]), layer.backward(grads[group], carried)
    found = gathered(ranks, case.shape, layer.reduce_gradients())
    mine = slice(sum(case.tokens[:group]), sum(case.tokens[: group + 1]))
    result: dict[str, object] = {
        "output": distance(out, expected[mine]),
        "input gradient": distance(dx, expected_dx[mine]),
        "carried": [tensor.flatten()[0].item() for tensor in carried],
    }
    result |= {name: distance(getattr(found, name), getattr(expected_weights, name)) for name in WEIGHTS}
    for direction in ("forward", "backward"):
        result[f"{direction} in order"] = in_order(layer, case.tokens[group], direction)
        result[f"{direction} amounts"] = dict(layer.runs[direction].amounts)
    return result


def drawn_alike(ranks: LayerRanks, shape: LayerShape) -> bool:
    """Whether a rank draws the shard that it would cut from all weights, and all shards make these."""
    whole, own = full_weights(shape, SEED), drawn_shard(shape, ranks.placement, ranks.rank, SEED)
    cut, again = shard(whole, shape, ranks.placement, ranks.rank), gathered(ranks, shape, own)
    pairs = ((own, cut), (again, whole))
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in WEIGHTS)


def main(rank: int, world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    results: dict[str, list[object]] = {}
    ranks: LayerRanks | None = None
    for case in CASES:
        if case.placement.world != world:
            continue
        if ranks is None or ranks.placement != case.placement:
            if ranks is not None:
                ranks.leave()
            ranks = join(case.placement)
            assert drawn_alike(ranks, SHAPE)
        given: list[object] = [None] * world
        dist.all_gather_object(given, run(case, ranks))
        results[case.name] = given
    if rank == 0:
        (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def forked(rank: int, world: int, directory: Path) -> int:
    """Process of a rank."""
    if process := os.fork():
        return process
    code = 1
    try:
        main(rank, world, directory)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    processes = [forked(rank, int(sys.argv[1]), Path(sys.argv[2])) for rank in range(int(sys.argv[1]))]
    sys.exit(int(any([os.waitpid(process, 0)[1] for process in processes])))
