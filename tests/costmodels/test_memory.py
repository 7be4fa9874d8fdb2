"""Bytes of parameters, gradients and states: against Megatron's numbers, and laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.megatron_counts import layer_held
from moeplan.costmodels.memory import (
    gradient_buffers,
    least_state_bytes,
    mean_parameters,
    micro_batches,
    rank_parameters,
    reserve_bytes,
    state_bytes,
    unit_parameters,
)
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.peak import head_bytes, sent_bytes
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import all_ranks
from moeplan.costmodels.workload import load_era, load_precision
from moeplan.profiles.hardware import load_cluster, load_device
from moeplan.profiles.nominal import nominal
from tests.conftest import DENSE_LAYER, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of

QUICK = settings(max_examples=60, deadline=None)
WORKLOAD = workload_of()
H100 = load_device("H100")
TIED = dataclasses.replace(TINY_DENSE, name="tiny-tied", tied=True)


def held(model, layout):
    """Dense and expert parameters of every pipeline rank."""
    columns = Layouts.of([layout])
    found = rank_parameters(model, all_ranks(model, layout.pp, layout.vpp, layout.stages), unit_parameters(model, columns))
    return found.dense[:, 0], found.expert[:, 0]


# ---------------------------------------------------------------- against Megatron


def test_states_of_qwen3_by_hand():
    # Megatron's own estimate for 64 GPUs, TP 2, PP 2, EP 8: 18.93 GB of weights, gradients and optimizer states on the
    # fullest rank. bf16 weight and fp32 gradient: 6 bytes; master and moments: 12, over dp = 16 and over edp = 4.
    layout = Layout(tp=2, pp=2, dp=16, ep=8, edp=4, sequence_parallel=True, dispatcher="alltoall")
    model = load_model("qwen3-30b-a3b")
    dense, expert = held(model, layout)
    assert (round(dense.max() / 1e6, 1), round(expert.max() / 1e6, 1)) == (388.6, 1811.9)
    by_hand = dense.max() * (6 + 12 / 16) + expert.max() * (6 + 12 / 4)
    peak = Pricing(model, TWO_NODES, WORKLOAD, Layouts.of([layout]), every_rank=True).peak_memory()
    states = peak["weights"] + peak["gradients"] + peak["optimizer states"]
    assert states.max() == pytest.approx(by_hand)
    assert states.max() / 1e9 == pytest.approx(18.93, abs=0.005)


def test_parameters_of_every_rank_of_deepseek_v3():
    # What Megatron builds on 8 ranks of 4 chunks with EP 32, in 1e9; the rank with the prediction layer holds a second
    # embedding.
    layout = Layout(pp=8, vpp=4, dp=32, ep=32, stages="Et*3|(tt|)*29m|L", dispatcher="alltoall")
    dense, expert = held(load_model("deepseek-v3"), layout)
    assert (dense / 1e9).round(3).tolist() == [4.075, 1.864, 1.864, 1.864, 1.864, 1.864, 2.66, 2.325]
    assert (expert / 1e9).round(3).tolist() == [2.114, 2.819, 2.819, 2.819, 2.819, 2.819, 2.466, 2.114]


def test_a_tied_matrix_on_one_stage_exists_once():
    embedding = 1024 * 128  # the vocabulary of 1000, padded to a multiple of 128
    alone = [held(model, Layout())[0][0] for model in (TINY_DENSE, TIED)]
    assert alone[0] - alone[1] == embedding
    split = [held(model, Layout(pp=2))[0] for model in (TINY_DENSE, TIED)]
    assert split[0].tolist() == split[1].tolist()  # the last stage has a copy of its own


# ---------------------------------------------------------------- states by hand

# Sharding, precision and other fields: bytes of a dense and of an expert parameter; dp 4, cp 2, edp 2.
STATES = [
    ({}, {}, 2 + 4 + 12 / 8, 2 + 4 + 12 / 2),
    ({"sharding": "ddp"}, {}, 2 + 4 + 12, 2 + 4 + 12),
    ({"sharding": "fsdp"}, {}, (2 + 4 + 12) / 8 + 2 * 2 / 8, (2 + 4 + 12) / 2 + 2 * 2 / 8),
    # Two stages: all of a stage stays gathered, and its gradients whole, until the last micro-batch.
    ({"sharding": "fsdp", "pp": 2}, {}, (2 + 4 + 12) / 8 + 2 + 4, (2 + 4 + 12) / 2 + 2 + 4),
    # PyTorch shards fp32 weights, which are the master copies; sharding the optimizer alone (ZeRO-2) shards gradients too.
    ({"sharding": "fsdp"}, {"era": load_era("pytorch-eager")}, (4 + 4 + 8) / 8 + 2 * 2 / 8, (4 + 4 + 8) / 2 + 2 * 2 / 8),
    ({}, {"era": load_era("pytorch-eager")}, 2 + (4 + 12) / 8, 2 + (4 + 12) / 2),
    ({"optimizer_offload": 0.75}, {}, 6 + 3 / 8, 6 + 3 / 2),
    ({}, {"gradient_bytes": 2}, 4 + 12 / 8, 4 + 12 / 2),
    ({}, {"moment_bytes": 2}, 6 + 8 / 8, 6 + 8 / 2),
    ({}, {"precision": load_precision("fp8-delayed")}, 6 + 12 / 8, 6 + 12 / 2),
]


@pytest.mark.parametrize("fields, work, dense, expert", STATES, ids=[f"{f} {list(w)}" for f, w, _, _ in STATES])
def test_bytes_of_a_parameter_by_hand(fields, work, dense, expert):
    layouts = Layouts.of([Layout(cp=2, dp=4, ep=4, edp=2, **fields)])
    states = state_bytes(TINY_MOE, H100, workload_of(**work), layouts)
    assert sum(states.dense.values()) == pytest.approx(dense)  # eight layers, of which FSDP gathers two at a time
    assert sum(states.expert.values()) == pytest.approx(expert)


def test_embedding_and_head_are_not_quantised():
    layouts = Layouts.of([Layout(cp=2, dp=4, ep=4, edp=2), Layout(cp=2, dp=4, ep=4, edp=2, sharding="fsdp")])
    fp8 = workload_of(precision=load_precision("fp8-delayed"))
    assert state_bytes(TINY_MOE, load_device("B200"), fp8, layouts).plain["weights"].tolist() == [1.0, 0.0]  # 2 B, not 1 B
    assert not state_bytes(TINY_MOE, H100, fp8, layouts.take([0])).plain  # two orientations of 1 B are as large
    # Under FSDP they stay gathered in bf16; the layers' part counts two of eight layers.
    assert state_bytes(TINY_MOE, H100, WORKLOAD, layouts).plain["gathered weights"].tolist() == [0.0, 2 - 2 * 2 / 8]
    columns = Layouts.of([Layout(pp=2, dp=8, edp=8)])
    found = rank_parameters(TINY_DENSE, all_ranks(TINY_DENSE, 2, 1, ""), unit_parameters(TINY_DENSE, columns))
    assert found.plain[:, 0].tolist() == [1024 * 128, 1024 * 128]


def test_optimizer_step_by_hand():
    # bf16 gradients are copied to fp32: 4 bytes of each of the 1/8 (dense) and 1/2 (experts) that a rank updates.
    layouts = Layouts.of([Layout(cp=2, dp=4, ep=4, edp=2), Layout(cp=2, dp=4, ep=4, edp=2, optimizer_offload=0.5)])
    step = state_bytes(TINY_MOE, H100, workload_of(gradient_bytes=2), layouts).step
    assert [part.tolist() for part in step] == [[4 / 8, 2 / 8], [4 / 2, 2 / 2]]
    assert state_bytes(TINY_MOE, H100, WORKLOAD, layouts).step == ()
    # Llama-3-70B on 32 H100 in FP8, TP 4, PP 4, VPP 5, feed-forward parts recomputed (Megatron-Bridge): 55.6e9 bytes, the same
    # with attention recomputed too, because the optimizer step is what needs most.
    layout = Layout(tp=4, pp=4, vpp=5, dp=2, edp=8, sequence_parallel=True, recompute=("mlp",))
    workload = workload_of(seq_len=4096, global_batch=32, gradient_bytes=2, precision=load_precision("fp8-cs"))
    peak = Pricing(load_model("llama3-70b"), nominal(load_cluster("h100x32")), workload, Layouts.of([layout])).peak_memory()
    assert peak["optimizer step"].max() > 0
    assert peak.total.max() == pytest.approx(55.6e9, rel=0.01)


def test_head_by_hand():
    # 256 tokens, 1024 rows, hidden size 128: logits that their gradient overwrites; the head's gradient; the final norm's
    # input, output and its gradient.
    layouts = Layouts.of([Layout(), Layout(tp=4, edp=4, sequence_parallel=True), Layout(tp=4, edp=4)])
    alone = 2 * 256 * 1024 + 2 * 1024 * 128 + 6 * 256 * 128
    cut = 2 * 256 * 256 + 2 * 256 * 128
    both = cut + 6 * 64 * 128 + 4 * 256 * 128, cut + 6 * 256 * 128  # gathered with sequence parallelism, whole without
    assert head_bytes(TINY_DENSE, WORKLOAD, layouts).tolist() == [alone, *both]
    eager = workload_of(era=load_era("pytorch-eager"))
    assert head_bytes(TINY_DENSE, eager, layouts)[0] == alone + 12 * 256 * 1024
    assert sent_bytes(TINY_DENSE, eager, layouts).tolist() == [4 * 256 * 128, 256 * 128, 4 * 256 * 128]
    assert sent_bytes(TINY_DENSE, WORKLOAD, layouts).tolist() == [0.0, 0.0, 0.0]


def test_gradient_buffers_by_hand():
    # One bf16 buffer for each shape: qkv 256 x 128, out 128 x 128, fc1 512 x 128, fc2 128 x 256.
    shapes = 256 * 128 + 128 * 128 + 512 * 128 + 128 * 256
    assert gradient_buffers(TINY_DENSE, Layouts.of([Layout(), Layout(tp=4, edp=4)])).tolist() == [2 * shapes, 2 * shapes / 4]
    # Experts of 128 x 128 and 128 x 64, cut over etp; shared experts have the same shapes but are cut over tp.
    experts, shared = 128 * 128 + 128 * 64, 128 * 128 + 128 * 64
    both = Layouts.of([Layout(tp=2, dp=2, etp=4, sequence_parallel=True), Layout(sharding="fsdp")])
    assert gradient_buffers(TINY_MOE, both).tolist() == [2 * ((shapes + shared) / 2 + experts / 4), 0.0]


def test_what_must_stay_free():
    assert reserve_bytes(0.0) == pytest.approx(2.0 * 2**30)
    assert reserve_bytes(np.array([1e9, 2e9])).tolist() == pytest.approx([2 * 2**30 + 0.09e9, 2 * 2**30 + 0.18e9])


# ---------------------------------------------------------------- laws


@given(rows=st.lists(layouts_of(TINY_LATENT), min_size=1, max_size=5))
@QUICK
def test_arrays_equal_numbers(rows):
    layouts = Layouts.of(rows)
    for price in (
        lambda x: micro_batches(WORKLOAD, x),
        lambda x: gradient_buffers(TINY_LATENT, x),
        lambda x: least_state_bytes(TINY_LATENT, H100, WORKLOAD, x),
        lambda x: mean_parameters(TINY_LATENT, x).expert,
    ):
        single = [float(price(Layouts.of([row]))[0]) for row in rows]
        assert price(layouts).tolist() == pytest.approx(single, rel=1e-12)


@given(row=layouts_of(TINY_MOE))
@QUICK
def test_the_mean_rank_holds_no_more_than_the_fullest(row):
    mean = mean_parameters(TINY_MOE, Layouts.of([row]))
    dense, expert = held(TINY_MOE, row)
    assert mean.dense[0] <= dense.max() and mean.expert[0] <= expert.max() * (1 + 1e-12)
    assert expert.sum() == pytest.approx(mean.expert[0] * row.pp)


@given(row=layouts_of(TINY_MOE, sharding="optimizer", optimizer_offload=0.0))
@QUICK
def test_more_replicas_hold_smaller_shards(row):
    twice = dataclasses.replace(row, dp=2 * row.dp, edp=2 * row.edp)
    shares = [Pricing(TINY_MOE, TWO_NODES, WORKLOAD, Layouts.of([x])).peak_memory() for x in (row, twice)]
    assert shares[1]["optimizer states"] == pytest.approx(shares[0]["optimizer states"] / 2)
    assert shares[1]["weights"].tolist() == shares[0]["weights"].tolist()
    sharded = [dataclasses.replace(row, sharding=s) for s in ("fsdp", "optimizer", "ddp")]
    states = [least_state_bytes(TINY_MOE, H100, WORKLOAD, Layouts.of([x]))[0] for x in sharded]
    assert states[1] <= states[2]


def test_dense_models_hold_no_experts():
    dense, expert = held(TINY_DENSE, Layout(pp=4))
    assert expert.tolist() == [0.0] * 4
    assert dense[1] == 2 * layer_held(DENSE_LAYER, TINY_DENSE, 1, 1, 1).dense
