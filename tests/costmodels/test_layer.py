"""Time of a layer: parts by hand with round rates, recompute, host launches, folding of routed experts, laws."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.constants import HOST, OVERLAP
from moeplan.costmodels.exchange import expert_exchange_s, tensor_exchange
from moeplan.costmodels.kernels import dense_times, routed_times
from moeplan.costmodels.layer import fold, layer_time
from moeplan.costmodels.layout import DISPATCHERS, RECOMPUTE_MODULES, Layout, Layouts, names_of
from moeplan.costmodels.model import Layer, Mamba, Moe
from moeplan.costmodels.workload import load_era, load_precision
from tests.conftest import (
    ATTENTION,
    DENSE_LAYER,
    LATENT,
    LATENT_LAYER,
    MLP,
    MOE,
    MOE_LAYER,
    NODE,
    PLAIN,
    TINY_LATENT,
    TINY_MOE,
    TWO_NODES,
    layouts_of,
    workload_of,
)

QUICK = settings(max_examples=40, deadline=None)
TOKENS, HIDDEN = 256, 128
LAUNCH_S = load_era("latest").host_s_per_kernel["x86"]
"""Host time of one launch in every era."""
MAMBA = Mamba(version=2, inner=128, state=16, heads=8, groups=8)


def one(**fields):
    """Columns of one layout over 16 ranks, data-parallel for what is not said; no host time unless graphs are named."""
    dense = fields.get("tp", 1) * fields.get("cp", 1)
    expert = fields.get("ep", 1) * fields.get("etp", 1)
    return Layouts.of([Layout(**{"dp": 16 // dense, "edp": 16 // expert, "cuda_graphs": ("full_iteration",)} | fields)])


def timed(layer, layouts, profile=PLAIN, workload=None):
    """Seconds by part, one layout."""
    parts = layer_time(layer, TINY_MOE, profile, workload or workload_of(), layouts)
    return {name: float(np.ravel(value)[0]) for name, value in parts.items()}


def forward_of(block, layouts, *names):
    """Forward seconds of a block's parts under the plain profile, by name; everything if none is given."""
    times = dense_times(block, TINY_MOE, PLAIN, workload_of(), layouts).forward
    if block is MOE:
        times = times | routed_times(block, TINY_MOE, PLAIN, workload_of(), layouts).forward
    return sum(float(np.ravel(times[n])[0]) for n in names or times)


# ---------------------------------------------------------------- by hand


def test_a_layer_is_the_sum_of_its_blocks():
    layouts = one(tp=2, ep=4, sequence_parallel=True, dispatcher="alltoall")
    parts = timed(MOE_LAYER, layouts)
    for block in (ATTENTION, MOE):
        for times in (dense_times, routed_times)[: 1 + (block is MOE)]:
            found = times(block, TINY_MOE, PLAIN, workload_of(), layouts)
            for name in found.forward:
                if name != "norms and activations":  # both blocks have these
                    assert parts[name] == pytest.approx(float(found.forward[name][0] + found.backward[name][0])), name
    once = float(expert_exchange_s(MOE, TINY_MOE, PLAIN, workload_of(), layouts)[0])
    assert parts["expert all-to-all"] == pytest.approx(2 * once)
    exchange = [tensor_exchange(b, TINY_MOE, PLAIN, workload_of(), layouts) for b in (ATTENTION, MOE)]
    seconds = sum(float(sum(x.forward.values())[0] + sum(x.backward.values())[0]) for x in exchange)
    assert parts["tensor-parallel exchange"] == pytest.approx(seconds)
    assert parts["recompute"] == 0.0
    assert parts["host launches"] == pytest.approx(0.0, abs=1e-18)


# Layer, module, forward seconds that the backward repeats: blocks and names of their parts; None: 4 bytes a hidden element.
REPEATED = [
    (DENSE_LAYER, "core_attn", [(ATTENTION, ["attention core"])]),
    (DENSE_LAYER, "layernorm", []),  # not a kernel of its own here
    (DENSE_LAYER, "mla_up_proj", []),
    (DENSE_LAYER, "moe", []),
    (DENSE_LAYER, "full", [(ATTENTION, []), (MLP, [])]),
    (MOE_LAYER, "layernorm", [None]),
    (MOE_LAYER, "moe_act", [(MOE, ["expert activation"])]),
    (MOE_LAYER, "mlp", []),
]


@pytest.mark.parametrize("layer, module, repeated", REPEATED, ids=[f"{len(r)} {m}" for _, m, r in REPEATED])
def test_what_a_module_repeats_by_hand(layer, module, repeated):
    layouts = one(dispatcher="alltoall", recompute=(module,))
    norm = 4 * HIDDEN * TOKENS * 1e-12
    expected = sum(norm if x is None else forward_of(x[0], layouts, *x[1]) for x in repeated)
    assert timed(layer, layouts)["recompute"] == pytest.approx(expected)


def test_feed_forward_is_repeated_without_its_norm():
    norm = 4 * HIDDEN * TOKENS * 1e-12
    assert timed(DENSE_LAYER, one(recompute=("mlp",)))["recompute"] == pytest.approx(forward_of(MLP, one()) - norm)
    layouts = one(ep=4, dispatcher="alltoall", recompute=("moe",))
    exchange = float(expert_exchange_s(MOE, TINY_MOE, PLAIN, workload_of(), layouts)[0])
    assert timed(MOE_LAYER, layouts)["recompute"] == pytest.approx(forward_of(MOE, layouts) - norm + exchange)
    shared = dense_times(MOE, TINY_MOE, PLAIN, workload_of(), layouts).forward
    layouts = one(ep=4, dispatcher="alltoall", recompute=("shared_experts",))
    assert timed(MOE_LAYER, layouts)["recompute"] == pytest.approx(float(sum(v[0] for v in shared.values())) - norm)


def test_latent_up_projection_is_repeated():
    layouts = one(dispatcher="alltoall", recompute=("mla_up_proj",))
    # 8 heads of 24 from a rank of 32, and of 16 + 16 from a rank of 16.
    product = 2 * TOKENS * (8 * 24 * 32 + 8 * 32 * 16) / 1e15
    assert timed(LATENT_LAYER, layouts)["recompute"] == pytest.approx(product)


# ---------------------------------------------------------------- host launches

Q = HOST.sharpness
# Block, fields of the layout, precision: kernels of a forward pass; 8 experts.
LAUNCHES = [
    (ATTENTION, {}, "bf16", 11),
    (ATTENTION, {"cuda_graphs": ("attn",)}, "bf16", 1.1),
    (LATENT, {}, "bf16", 17),
    (MLP, {}, "bf16", 7),
    (MLP, {"cuda_graphs": ("mlp",)}, "bf16", 0),
    (MAMBA, {}, "bf16", 14),
    (MAMBA, {"cuda_graphs": ("mamba",)}, "bf16", 1.4),
    (MOE, {"ep": 4, "dispatcher": "alltoall"}, "bf16", 43 + 2.4 * 2),
    (MOE, {"ep": 1, "dispatcher": "deepep"}, "bf16", 28 + 2.4 * 8),
    (MOE, {"ep": 4, "dispatcher": "hybridep", "cuda_graphs": ("moe_router",)}, "bf16", 28 * 0.6 + 2.4 * 2),
    (MOE, {"ep": 4, "dispatcher": "hybridep", "cuda_graphs": ("full_iteration",)}, "bf16", 0),
    (MOE, {"ep": 4, "dispatcher": "alltoall"}, "fp8-delayed", 43 + 3.25 * 2.4 * 2),
    (MOE, {"ep": 4, "dispatcher": "alltoall"}, "fp8-blockwise", 43 + 3.25 * 2.4 * 2),
    (MOE, {"ep": 4, "dispatcher": "alltoall", "ep_overlap": True}, "bf16", 1.57 * (43 + 2.4 * 2)),
    (dataclasses.replace(MOE, bias=True), {"ep": 4, "dispatcher": "alltoall"}, "bf16", 43 + (2.4 + 6) * 2),
]


@pytest.mark.parametrize(
    "block, fields, precision, kernels", LAUNCHES, ids=[f"{type(r[0]).__name__} {r[1:3]}" for r in LAUNCHES]
)
def test_launches_by_hand(block, fields, precision, kernels):
    workload = workload_of(precision=load_precision(precision))
    layouts = one(**{"cuda_graphs": ()} | fields)
    device = [0.0, 0.0]
    dense = dense_times(block, TINY_MOE, NODE, workload, layouts)
    if not isinstance(block, Moe):
        device = [float(np.ravel(sum(t.values()))[0]) for t in (dense.forward, dense.backward)]
    else:
        routed = routed_times(block, TINY_MOE, NODE, workload, layouts)
        shown = OVERLAP.expert_exposed if layouts.ep_overlap[0] else 1.0
        once = shown * float(expert_exchange_s(block, TINY_MOE, NODE, workload, layouts)[0])
        device = [float(np.ravel(sum(t.values()))[0]) + once for t in (routed.forward, routed.backward)]
    host = kernels * LAUNCH_S
    # A pass takes (device^q + host^q)^(1/q); the backward launches 1.3 times as many kernels.
    visible = sum((d**Q + h**Q) ** (1 / Q) - d for d, h in zip(device, (host, 1.3 * host), strict=True))
    assert timed(Layer(blocks=(block,)), layouts, NODE, workload)["host launches"] == pytest.approx(visible, abs=1e-15)


def test_repeating_a_whole_layer_launches_it_again():
    plain, full = (timed(Layer(blocks=(MLP,)), one(cuda_graphs=(), recompute=r)) for r in ((), ("full",)))
    times = dense_times(MLP, TINY_MOE, PLAIN, workload_of(), one())
    f, b = (float(np.ravel(sum(t.values()))[0]) for t in (times.forward, times.backward))
    host = 7 * LAUNCH_S
    assert sum(plain.values()) == pytest.approx((f**Q + host**Q) ** (1 / Q) + (b**Q + (1.3 * host) ** Q) ** (1 / Q))
    repeated = ((f + b) ** Q + (2.3 * host) ** Q) ** (1 / Q)
    assert sum(full.values()) == pytest.approx((f**Q + host**Q) ** (1 / Q) + repeated)


def test_long_kernels_hide_their_launches():
    # A thousand times the tokens: launching 7 kernels is next to nothing beside running them.
    parts = timed(Layer(blocks=(MLP,)), one(cuda_graphs=(), micro_batch=10_000))
    assert parts["host launches"] < 7 * 2.3 * LAUNCH_S < 0.1 * sum(parts.values())
    assert HOST.sharpness >= 1.0


# ---------------------------------------------------------------- routed experts see only their tokens


@given(row=layouts_of(TINY_MOE))
@QUICK
def test_folding_keeps_the_tokens_of_a_rank(row):
    folded = fold(Layouts.of([row]))
    cp, micro_batch = int(folded.cp[0]), int(folded.micro_batch[0])
    assert folded.tp[0] == 1 and not folded.sequence_parallel[0]
    assert micro_batch / cp == row.micro_batch / (row.cp * (row.tp if row.sequence_parallel else 1))
    assert math.gcd(micro_batch, cp) == 1
    assert (folded.ep[0], folded.etp[0], DISPATCHERS[folded.dispatcher[0]]) == (row.ep, row.etp, row.dispatcher)


# ---------------------------------------------------------------- laws

LAYERS = [DENSE_LAYER, MOE_LAYER, LATENT_LAYER, Layer(blocks=(MAMBA, MLP))]
NAMES = ["dense", "moe", "latent", "scan"]


def contained(modules):
    """The modules with what they repeat inside them."""
    if "full" in modules:
        return set(RECOMPUTE_MODULES)
    return set(modules) | ({"moe_act", "shared_experts"} if "moe" in modules else set())


@given(row=layouts_of(TINY_LATENT), masks=st.lists(st.integers(0, 255), min_size=5, max_size=5))
@pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
@settings(max_examples=25, deadline=None)
def test_recompute_never_saves_time(layer, row, masks):
    sets = [set(), *(set(names_of(m, RECOMPUTE_MODULES)) for m in masks), {"full"}]
    rows = Layouts.of([dataclasses.replace(row, recompute=tuple(s)) for s in sets])
    parts = layer_time(layer, TINY_LATENT, TWO_NODES, workload_of(), rows)
    total = sum(np.broadcast_to(v, len(sets)) for v in parts.values())
    for i, some in enumerate(sets):
        assert (np.broadcast_to(parts["recompute"], len(sets)) >= 0).all()
        for j, more in enumerate(sets):
            if contained(some) <= contained(more):
                assert total[i] <= total[j] * (1 + 1e-12)


@given(row=layouts_of(TINY_MOE, micro_batch=1, tp_overlap=False))
@pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
@settings(max_examples=20, deadline=None)
def test_more_tokens_take_longer(layer, row):
    rows = Layouts.of([dataclasses.replace(row, micro_batch=m) for m in (1, 2, 4)])
    one, two, four = sum(np.broadcast_to(v, 3) for v in layer_time(layer, TINY_MOE, NODE, workload_of(), rows).values())
    assert one < two < four <= 2 * two * (1 + 1e-12)


@given(row=layouts_of(TINY_MOE))
@QUICK
def test_features_never_cost_time(row):
    # Overlap of experts is no such feature: it launches more kernels, which may take longer than what it hides.
    for changes in ({"tp_overlap": True}, {"cuda_graphs": ("full_iteration",)}):
        off = {"ep_overlap": False, "tp_overlap": False, "cuda_graphs": ()}
        rows = Layouts.of([dataclasses.replace(row, **off), dataclasses.replace(row, **off | changes)])
        without, using = sum(np.broadcast_to(v, 2) for v in layer_time(MOE_LAYER, TINY_MOE, NODE, workload_of(), rows).values())
        assert using <= without * (1 + 1e-12)


@given(rows=st.lists(layouts_of(TINY_LATENT), min_size=1, max_size=5))
@pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
@settings(max_examples=20, deadline=None)
def test_arrays_equal_numbers(layer, rows):
    together = layer_time(layer, TINY_LATENT, TWO_NODES, workload_of(), Layouts.of(rows))
    for i, row in enumerate(rows):
        alone = layer_time(layer, TINY_LATENT, TWO_NODES, workload_of(), Layouts.of([row]))
        assert {n: float(np.broadcast_to(v, len(rows))[i]) for n, v in together.items()} == pytest.approx(
            {n: float(np.ravel(v)[0]) for n, v in alone.items()}, rel=1e-12, abs=1e-18
        )
