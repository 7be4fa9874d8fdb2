"""The MoE layer on one rank, what it refuses, and its reference."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moeplan.costmodels.moe.schedules import SCHEDULES
from moeplan.errors import ScheduleError, UsageError
from moeplan.runtime import experts, wire
from moeplan.runtime.experts import Experts, Rows
from moeplan.runtime.moe_layer import MoeLayer
from moeplan.runtime.moe_tasks import WAYS
from moeplan.runtime.placement import LayerRanks, Placement, join
from moeplan.runtime.reference import LayerShape, dense_gradients, dense_layer, full_weights, shard

SHAPE = LayerShape(hidden=16, expert_hidden=8, experts=4, topk=2)
EXECUTABLE = [
    "baseline", "replicated-baseline", "deepspeed", "s1", "s2", "hierarchical", "tutel", "tutel-improved", "pipemoe",
    "fsmoe-no-iio", "fsmoe",
]  # fmt: skip
ALL = pytest.mark.parametrize("name", EXECUTABLE)


def layer_of(name, shape=SHAPE, dtype=torch.float32, **degrees):
    weights = full_weights(shape, 5, dtype)
    return MoeLayer(join(Placement()), shape, shard(weights, shape, Placement(), 0), name, **degrees), weights


def tokens_of(count, shape=SHAPE, seed=0):
    return torch.randn(count, shape.hidden, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- which schedules


def test_which_schedules_can_be_executed():
    assert list(WAYS) == EXECUTABLE
    layer, _ = layer_of("baseline")
    size = layer.size(8)
    for schedule in SCHEDULES:
        if schedule.name in WAYS:
            graph, kinds = schedule.graph(3, size), set(WAYS[schedule.name].tasks)
            assert graph.in_order and {task.kind for task in graph.tasks} - {"R", "N"} == kinds


@pytest.mark.parametrize("name", [schedule.name for schedule in SCHEDULES if schedule.name not in EXECUTABLE])
def test_others_are_refused_with_the_list(name):
    with pytest.raises(ScheduleError, match=f"schedule '{name}' cannot be executed.*these can: baseline, .*, fsmoe"):
        layer_of(name)


@ALL
def test_lanes_share_no_axis(name, monkeypatch):
    used: dict[str, set[str]] = {}
    for function in ("exchange", "gather", "scatter", "reduce"):
        original = getattr(wire, function)

        def noting(ranks, axis, *arguments, original=original):
            used.setdefault(axis, set()).add(threading.current_thread().name)
            return original(ranks, axis, *arguments)

        monkeypatch.setattr(wire, function, noting)
    layer, _ = layer_of(name)
    layer.forward(tokens_of(8))
    layer.backward(tokens_of(8), [torch.ones(2)])
    lanes = {axis: names - {threading.main_thread().name} for axis, names in used.items()}
    assert all(len(names) <= 1 for names in lanes.values()) and lanes["dense"]


# ---------------------------------------------------------------- results on one rank


@ALL
def test_one_rank_equals_the_dense_layer(name):
    layer, weights = layer_of(name)
    out, dx = layer.forward(tokens_of(11)), layer.backward(tokens_of(11, seed=1))
    expected = dense_gradients(tokens_of(11), weights, SHAPE, tokens_of(11, seed=1))
    assert torch.allclose(out, expected[0], rtol=1e-5, atol=1e-5) and torch.allclose(dx, expected[1], rtol=1e-5, atol=1e-5)
    own, whole = layer.reduce_gradients(), shard(expected[2], SHAPE, Placement(), 0)
    for name in ("gate", "inner", "down"):
        assert torch.allclose(getattr(own, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["s2", "fsmoe"])
def test_bf16_is_near(name):
    layer, weights = layer_of(name, dtype=torch.bfloat16)
    x, grad = tokens_of(64).bfloat16(), tokens_of(64, seed=1).bfloat16()
    out, dx = layer.forward(x), layer.backward(grad)
    assert out.dtype == dx.dtype == layer.gradients.inner.dtype == torch.bfloat16
    whole = replace(weights, **{k: getattr(weights, k).float() for k in ("gate", "inner", "down")})
    expected = dense_gradients(x.float(), whole, SHAPE, grad.float())
    own = shard(expected[2], SHAPE, Placement(), 0)
    pairs = [(out, expected[0]), (dx, expected[1]), (layer.gradients.inner, own.inner), (layer.gradients.down, own.down)]
    for given, wanted in pairs:
        assert float((given.float() - wanted).norm() / wanted.norm()) < 0.02


def test_weights_changed_in_place_are_seen():
    layer, weights = layer_of("s1")
    own = shard(weights, SHAPE, Placement(), 0)
    layer = MoeLayer(layer.ranks, SHAPE, own, "s1")
    before = layer.forward(tokens_of(5))
    own.down.mul_(2.0)
    assert torch.allclose(layer.forward(tokens_of(5)), 2.0 * before)


def test_a_task_that_fails_is_reported():
    layer, _ = layer_of("fsmoe", forward_degree=2)
    layer.shard = replace(layer.shard, down=layer.shard.down[:, :3])
    with pytest.raises(RuntimeError, match="mat1 and mat2|contraction|match"):
        layer.forward(tokens_of(6))


# ---------------------------------------------------------------- what is refused


def test_chunks_of_an_unchunked_schedule_are_refused():
    with pytest.raises(ScheduleError, match="s1 has no chunks, 2 are asked for"):
        layer_of("s1", backward_degree=2)
    with pytest.raises(ScheduleError, match="the number of chunks r is 0"):
        layer_of("fsmoe", forward_degree=0)


def test_bad_groups_are_refused():
    def ranks(**sizes):
        placement = Placement(**sizes)
        members = {axis: groups[0] for axis, groups in placement.groups().items()}
        return LayerRanks(placement=placement, rank=0, members=members, groups=dict.fromkeys(members))

    own = shard(full_weights(SHAPE, 5), SHAPE, Placement(), 0)
    with pytest.raises(ScheduleError, match="ep = 3 does not divide the 4 experts"):
        MoeLayer(ranks(ep=3), SHAPE, own, "s1")
    with pytest.raises(ScheduleError, match="replicated-baseline: of mp = 3 and esp = 2 neither divides"):
        MoeLayer(ranks(ep=3, esp=2, mp=3), replace(SHAPE, experts=6), own, "replicated-baseline")
    with pytest.raises(ScheduleError, match="esp = 9 ranks cannot share an expert's width of 8"):
        MoeLayer(ranks(esp=9), SHAPE, own, "s1")


def test_a_backward_needs_a_forward():
    layer, _ = layer_of("s1")
    with pytest.raises(ScheduleError, match="no gradients before a backward"):
        layer.reduce_gradients()
    layer.forward(tokens_of(4))
    layer.backward(tokens_of(4))
    with pytest.raises(ScheduleError, match="backward without a forward before it"):
        layer.backward(tokens_of(4))


def test_other_rows_are_refused():
    layer, _ = layer_of("s1")
    with pytest.raises(UsageError, match=r"are \[4, 15\] of torch.float32, the layer needs \[4, 16\] of torch.float32"):
        layer.forward(torch.zeros(4, 15))
    with pytest.raises(UsageError, match="of torch.bfloat16, the layer needs"):
        layer.forward(tokens_of(4).bfloat16())
    layer.forward(tokens_of(4))
    with pytest.raises(UsageError, match=r"are \[3, 16\] of torch.float32, the layer needs \[4, 16\]"):
        layer.backward(tokens_of(3))
    layer.backward(tokens_of(4))


def test_bad_shapes_are_refused():
    with pytest.raises(UsageError, match="top-k 5 exceeds the 4 experts"):
        replace(SHAPE, topk=5)
    with pytest.raises(UsageError, match="hidden of an MoE layer is 0"):
        replace(SHAPE, hidden=0)


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("renormalised", [True, False])
def test_the_reference_token_by_token(gated, renormalised):
    shape = replace(SHAPE, gated=gated, renormalised=renormalised)
    weights, tokens = full_weights(shape, 5), tokens_of(6)
    for x, out in zip(tokens, dense_layer(tokens, weights, shape), strict=True):
        scores = torch.exp(weights.gate @ x)
        scores = scores / scores.sum()
        best = sorted(range(shape.experts), key=lambda i: -scores[i])[: shape.topk]
        whole = sum(scores[i] for i in best) if renormalised else 1.0
        expected = torch.zeros(shape.hidden)
        for i in best:
            halves = [x @ weights.inner[i, :, j] for j in range(shape.halves)]
            inner = halves[0] * torch.sigmoid(halves[0]) * halves[1] if gated else F.gelu(halves[0])
            expected += scores[i] / whole * (inner @ weights.down[i])
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_a_seed():
    weights = full_weights(SHAPE, 5)
    assert torch.equal(weights.inner, full_weights(SHAPE, 5).inner)
    assert not torch.equal(weights.inner, full_weights(SHAPE, 6).inner) and not torch.equal(weights.down[0], weights.down[1])
    assert float(weights.inner.std()) == pytest.approx(SHAPE.hidden**-0.5, rel=0.1)


# ---------------------------------------------------------------- experts


def chunk(names, sizes):
    rows = torch.arange(len(names))
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return Rows(pick=rows, back=rows, sizes=sizes, ends=ends, names=torch.tensor(names, dtype=torch.int64).numpy())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_experts_by_autograd_in_other_chunks(gated, grouped, monkeypatch):
    assert not grouped or experts.offers_grouped("cpu", torch.float32)
    monkeypatch.setattr(experts, "offers_grouped", lambda *_: grouped)
    shape = replace(SHAPE, gated=gated)
    own = shard(full_weights(shape, 5), shape, Placement(), 0)
    # Seven rows of experts 0, 0, 1, 1, 1, 3, 3, numbered in this order.
    x, dy = tokens_of(7), tokens_of(7, seed=1)
    made = Experts(shape, own)
    first, second = [0, 2, 3, 5], [1, 4, 6]
    out = torch.empty(7, shape.hidden)
    out[first] = made.forward(0, x[first], chunk(first, [1, 2, 0, 1]))
    out[second] = made.forward(1, x[second], chunk(second, [1, 1, 0, 1]))
    later = [([0, 1], [2, 0, 0, 0]), ([2, 3], [0, 2, 0, 0]), ([4, 5, 6], [0, 1, 0, 2])]
    chunks = [chunk(names, sizes) for names, sizes in later]
    made.begin_backward(chunks)
    dx = torch.cat([made.backward(i, dy[names], chunks[i]) for i, (names, _) in enumerate(later)])
    leaves = [t.clone().requires_grad_() for t in (x, own.inner, own.down)]
    parts = []
    for expert, rows in enumerate([[0, 1], [2, 3, 4], [], [5, 6]]):
        pre = leaves[0][rows] @ leaves[1][expert]
        inner = F.silu(pre[:, : pre.shape[1] // 2]) * pre[:, pre.shape[1] // 2 :] if gated else F.gelu(pre)
        parts.append(inner @ leaves[2][expert])
    expected = torch.cat(parts)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    found = made.taken_gradients(own.gate, 2)
    given = (dx, 2.0 * found.inner, 2.0 * found.down)
    for mine, wanted in zip(given, torch.autograd.grad(expected, leaves, dy), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-6)


def test_grouped_products_are_not_used_where_they_fail(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("grouped gemm is not supported on this device")

    wrong = {"missing": None, "fails": fails, "wrong": lambda a, b, offs: torch.zeros(3, 16, 16) if b.dim() == 2 else a}
    for name, replacement in wrong.items():
        experts.offers_grouped.cache_clear()
        if replacement is None:
            monkeypatch.delattr(F, "grouped_mm")
        else:
            monkeypatch.setattr(F, "grouped_mm", replacement, raising=False)
        assert not experts.offers_grouped("cpu", torch.float32), name
    experts.offers_grouped.cache_clear()
