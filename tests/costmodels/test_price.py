"""Price: many layouts at once equal one at a time, parts sum to totals, measured peaks of memory, laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels import price
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import balanced_split, chunk_letters, format_split
from moeplan.costmodels.workload import load_precision
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import NODE, PLAIN, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, neighbours_of, workload_of

SOME = settings(max_examples=25, deadline=None)
WORKLOAD = workload_of()
MODELS = [TINY_DENSE, TINY_MOE, TINY_LATENT]

# Model, layers kept, sequence length, layout over 8 x B200, peak allocated on the fullest and on the emptiest rank in GiB:
# MooreThreads/SimuMax v1.2, b200 release validation. Megatron-Core 0.14, bf16, gradients in fp32, no overlap; experts drop
# tokens above a capacity of 1.
MEASURED_PEAKS = [
    ("llama3-70b", 12, 4096, Layout(pp=2, dp=4, edp=4), 66.55, 62.97),
    ("llama3-70b", 12, 4096, Layout(tp=4, dp=2, edp=8, sequence_parallel=True), 39.07, 39.07),
    ("llama3-70b", 12, 4096, Layout(tp=8, edp=8, sequence_parallel=True), 28.29, 28.29),
    ("llama3-70b", 12, 32768, Layout(tp=2, cp=4, edp=8, sequence_parallel=True), 68.43, 68.43),
    ("llama3-70b", 12, 32768, Layout(cp=8, edp=8), 104.51, 104.51),
    ("llama3.1-405b", 4, 4096, Layout(pp=2, dp=4, edp=4), 87.08, 86.61),
    ("llama3.1-405b", 4, 4096, Layout(tp=2, dp=4, edp=8, sequence_parallel=True), 81.59, 81.59),
    ("llama3.1-405b", 4, 4096, Layout(tp=4, dp=2, edp=8, sequence_parallel=True), 52.89, 52.89),
    ("llama3.1-405b", 4, 4096, Layout(tp=8, edp=8, sequence_parallel=True), 38.57, 38.57),
    ("llama3.1-405b", 4, 32768, Layout(cp=8, edp=8), 139.22, 139.22),
    ("llama3.1-405b", 4, 131072, Layout(tp=2, cp=4, edp=8, sequence_parallel=True), 118.13, 118.13),
    ("deepseek-v2", 4, 4096, Layout(dp=8, ep=8, edp=1, dispatcher="alltoall"), 45.63, 45.63),
    ("deepseek-v2", 4, 4096, Layout(pp=2, dp=4, ep=4, edp=1, dispatcher="alltoall"), 44.70, 31.58),
]
# The same study at 131,072 tokens with the layout of an earlier row.
MEASURED_PEAKS.append(("llama3-70b", 12, 131072, Layout(cp=8, edp=8), 147.99, 147.99))


def totals(model, rows, profile=TWO_NODES, workload=WORKLOAD):
    """Step seconds and peak bytes of the rows, priced together."""
    pricing = Pricing(model, profile, workload, Layouts.of(rows))
    return pricing.step_seconds(), pricing.peak_bytes()


# ---------------------------------------------------------------- measured runs


@pytest.mark.parametrize("name, layers, seq_len, layout, fullest, emptiest", MEASURED_PEAKS)
def test_measured_peaks(name, layers, seq_len, layout, fullest, emptiest):
    capacity = 1.0 if name == "deepseek-v2" else 0.0
    workload = workload_of(seq_len=seq_len, global_batch=4 * layout.dp, capacity_factor=capacity)
    profile = nominal(load_cluster("b200x8"))
    peak = (
        Pricing(load_model(name).cut(layers), profile, workload, Layouts.of([layout]), every_rank=True)
        .peak_memory()
        .total[:, 0]
    )
    assert len(peak) == layout.pp
    assert peak.max() / 2**30 == pytest.approx(fullest, rel=0.026)
    assert peak.min() / 2**30 == pytest.approx(emptiest, rel=0.026)


# ---------------------------------------------------------------- many at once


@given(data=st.data())
@pytest.mark.parametrize("profile", [PLAIN, TWO_NODES], ids=lambda p: p.name)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@settings(max_examples=10, deadline=None)
def test_many_at_once_equal_one_at_a_time(model, profile, data):
    rows = data.draw(neighbours_of(model))
    seconds, peaks = totals(model, rows, profile)
    for i, row in enumerate(rows):
        alone = totals(model, [row], profile)
        assert seconds[i] == pytest.approx(alone[0][0], rel=1e-12)
        assert peaks[i] == pytest.approx(alone[1][0], rel=1e-12)


@given(data=st.data())
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@settings(max_examples=12, deadline=None)
def test_parts_of_many_equal_parts_of_one(model, data):
    rows = data.draw(neighbours_of(model))[:6]
    layouts = Layouts.of(rows)
    many = Pricing(model, TWO_NODES, WORKLOAD, layouts)
    time, memory = many.step_cost(), many.peak_memory()
    for i, row in enumerate(rows):
        one = Pricing(model, TWO_NODES, WORKLOAD, Layouts.of([row]))
        alone, held = one.step_cost(), one.peak_memory()
        assert time.time.at(i).parts == pytest.approx(alone.time.at(0).parts, rel=1e-12, abs=1e-15)
        ranks = len(alone.stage_s)
        assert time.stage_s[:ranks, i].tolist() == pytest.approx(alone.stage_s[:, 0].tolist(), rel=1e-12)
        for name, value in held:
            assert memory[name][:ranks, i].tolist() == pytest.approx(value[:, 0].tolist(), rel=1e-12), name
        # Layouts with fewer ranks to look at repeat their first.
        assert (memory.total[ranks:, i] == memory.total[0, i]).all()


@given(rows=st.lists(layouts_of(TINY_LATENT), min_size=12, max_size=24))
@settings(max_examples=8, deadline=None)
def test_blocks_do_not_matter(rows):
    whole = totals(TINY_LATENT, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(price, "BLOCK", 3)
        pieces = totals(TINY_LATENT, rows)
        layouts = Layouts.of(rows)
        passes = Pricing(TINY_LATENT, TWO_NODES, WORKLOAD, layouts).whole_micro_batch_s()
    assert [p.tolist() for p in pieces] == [w.tolist() for w in whole]
    assert passes.tolist() == Pricing(TINY_LATENT, TWO_NODES, WORKLOAD, layouts).whole_micro_batch_s().tolist()


def test_nothing_to_price():
    assert [len(x) for x in totals(TINY_MOE, [])] == [0, 0]


# ---------------------------------------------------------------- parts and totals


@given(data=st.data())
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@SOME
def test_parts_sum_to_the_total(model, data):
    layout = data.draw(layouts_of(model))
    layouts = Layouts.of([layout])
    seconds, peak = totals(model, [layout])
    time = Pricing(model, TWO_NODES, WORKLOAD, layouts).step_cost().time
    assert sum(float(v[0]) for _, v in time) == pytest.approx(seconds[0], rel=1e-12)
    assert all(v[0] >= -1e-15 * seconds[0] for _, v in time)
    memory = Pricing(model, TWO_NODES, WORKLOAD, layouts).peak_memory()
    assert sum(v for _, v in memory).max() == pytest.approx(peak[0], rel=1e-12)
    assert all((v >= 0).all() for _, v in memory)
    # The layer parts are those of the slowest stage, for all its micro-batches.
    slowest = Pricing(model, TWO_NODES, WORKLOAD, layouts).step_cost().stage_s.max()
    batches = WORKLOAD.global_batch / (layout.micro_batch * layout.dp)
    assert time["layers/"] + time["head/"] + time["prediction/"] == pytest.approx(batches * slowest)


@given(data=st.data())
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@SOME
def test_ranks_left_out_change_nothing(model, data):
    layouts = Layouts.of([data.draw(layouts_of(model))])
    few, every = (Pricing(model, TWO_NODES, WORKLOAD, layouts, every_rank=e).step_cost() for e in (False, True))
    assert few.time.total[0] == pytest.approx(every.time.total[0], rel=1e-12)
    assert few.stage_s.max() == pytest.approx(every.stage_s.max(), rel=1e-12)
    few, every = (Pricing(model, TWO_NODES, WORKLOAD, layouts, every_rank=e).peak_memory() for e in (False, True))
    assert few.total.max() == pytest.approx(every.total.max(), rel=1e-12)
    # All stages together take what a search's bound starts from.
    whole = Pricing(model, TWO_NODES, WORKLOAD, layouts).whole_micro_batch_s()[0]
    assert Pricing(model, TWO_NODES, WORKLOAD, layouts, every_rank=True).step_cost().stage_s.sum() == pytest.approx(
        whole, rel=1e-12
    )


@given(row=layouts_of(TINY_LATENT, stages=""))
@SOME
def test_the_even_split_may_be_written_out(row):
    written = format_split(chunk_letters(TINY_LATENT, row.pp, row.vpp, ""))
    seconds, peaks = totals(TINY_LATENT, [row, dataclasses.replace(row, stages=written)])
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-12) and peaks[0] == peaks[1]


# ---------------------------------------------------------------- laws

FP8 = load_precision("fp8-blockwise")
# Change of a layout, of which time (0), memory (1) or both must not fall.
NO_CHEAPER = [
    ({"dp_overlap": True}, {"dp_overlap": False}, [0]),
    ({"tp_overlap": True}, {"tp_overlap": False}, [0]),
    ({"recompute": ()}, {"recompute": ("layernorm",)}, [0]),
    ({"recompute": ("layernorm", "moe_act")}, {"recompute": ("layernorm", "moe")}, [0]),
    ({"recompute": ("layernorm", "moe", "mlp", "mla_up_proj")}, {"recompute": ("full",)}, [0]),
    ({"recompute": ("layernorm", "moe", "mlp", "mla_up_proj")}, {"recompute": ("layernorm", "mlp")}, [1]),
    ({"recompute": ("moe_act",)}, {"recompute": ()}, [1]),
    ({"optimizer_offload": 1.0}, {"optimizer_offload": 0.25}, [1]),
    ({"sharding": "optimizer"}, {"sharding": "ddp"}, [1]),
    ({"cuda_graphs": ("full_iteration",)}, {"cuda_graphs": ()}, [0]),
    ({"cuda_graphs": ("attn", "moe_router")}, {"cuda_graphs": ("attn",)}, [0]),
    ({"micro_batch": 1}, {"micro_batch": 2}, [1]),
]


@given(row=layouts_of(TINY_LATENT, pp=1))
@pytest.mark.parametrize("less, more, which", NO_CHEAPER, ids=[f"{a} {b}" for a, b, _ in NO_CHEAPER])
@settings(max_examples=15, deadline=None)
def test_what_must_not_be_cheaper(less, more, which, row):
    prices = totals(TINY_LATENT, [dataclasses.replace(row, **change) for change in (less, more)])
    for i in which:
        assert prices[i][0] <= prices[i][1] * (1 + 1e-12)


@given(row=layouts_of(TINY_MOE))
@SOME
def test_harder_work_and_slower_machines_are_no_cheaper(row):
    seconds, peaks = (x[0] for x in totals(TINY_MOE, [row]))
    for change in ({"imbalance": 1.5}, {"capacity_factor": 1.25}, {"seq_len": 512}):
        harder = totals(TINY_MOE, [row], workload=workload_of(**change))
        assert harder[0][0] >= seconds * (1 - 1e-12) and harder[1][0] >= peaks * (1 - 1e-12)
    cluster = TWO_NODES.cluster
    slow = dataclasses.replace(cluster, oversubscription=4.0)
    assert totals(TINY_MOE, [row], nominal(slow))[0][0] >= seconds * (1 - 1e-12)
    assert totals(TINY_MOE, [row], nominal(slow))[1][0] == peaks


@pytest.mark.parametrize("name, layout", [
    ("llama3-8b", Layout(tp=2, dp=8, edp=16, sequence_parallel=True)),
    ("qwen3-30b-a3b", Layout(dp=16, ep=8, edp=2, dispatcher="alltoall")),
], ids=["dense", "moe"])  # fmt: skip
def test_newer_machines_are_faster(name, layout):
    workload = workload_of(seq_len=4096, global_batch=128)
    times = [
        totals(load_model(name), [layout], nominal(load_cluster(f"{g}x16")), workload)[0][0] for g in ("a100", "h100", "b200")
    ]
    assert times[0] > 1.5 * times[1] > 1.5 * 1.2 * times[2]


@pytest.mark.parametrize("name, pp", [("llama3-8b", 4), ("llama3-8b", 8), ("llama3-70b", 8)])
def test_the_balanced_split_is_faster_than_the_even_one(name, pp):
    # Under the even split the last stage has the output head on top of its layers.
    model = load_model(name)
    dispatcher = "none" if model.moe is None else "alltoall"
    even = Layout(pp=pp, dp=16 // pp, edp=16 // pp, dispatcher=dispatcher)
    balanced = dataclasses.replace(even, stages=balanced_split(model, 4096, pp))
    seconds, _ = totals(model, [even, balanced], workload=workload_of(seq_len=4096, global_batch=128))
    assert seconds[1] < seconds[0]


def test_quantised_training_is_faster_and_keeps_less():
    model, layout = load_model("llama3-8b"), Layout(dp=8, edp=8)
    workload = workload_of(seq_len=8192, global_batch=128)
    slow, fast = (totals(model, [layout], NODE, dataclasses.replace(workload, precision=p)) for p in (WORKLOAD.precision, FP8))
    assert 1.15 < slow[0][0] / fast[0][0] < 2.0
    parts = [
        Pricing(model, NODE, dataclasses.replace(workload, precision=p), Layouts.of([layout])).peak_memory()
        for p in (WORKLOAD.precision, FP8)
    ]
    assert parts[1]["activations"].max() < parts[0]["activations"].max()
    assert np.ravel(parts[1]["gradients"]).tolist() == np.ravel(parts[0]["gradients"]).tolist()
