"""Communication inside a layer: by hand with round rates, what hides it, laws."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.exchange import context_exchange, expert_exchange_s, exposed_expert_exchange_s, tensor_exchange
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import LinearAttention
from tests.conftest import ATTENTION, LATENT, MLP, MOE, PLAIN, TINY_DENSE, TINY_MOE, TWO_NODES, layouts_of, workload_of

QUICK = settings(max_examples=50, deadline=None)
WORKLOAD = workload_of()
RING, OUT, ALL_OUT, FAST_OUT, HOP_S = 100e9, 0.89 * 50e9, 0.86 * 50e9, 20e9, 1e-6
"""Bytes/s inside a domain, between domains (rings, all-to-all, fused dispatch), seconds of a small message between domains."""
TOKEN_BYTES = 128 * 2
"""A token of the tiny models in bf16."""


def one(**fields):
    """Columns of one layout over 16 ranks, data-parallel for what is not said."""
    dense = fields.get("tp", 1) * fields.get("cp", 1) * fields.get("pp", 1)
    expert = fields.get("ep", 1) * fields.get("etp", 1) * fields.get("pp", 1)
    return Layouts.of([Layout(**{"dp": 16 // dense, "edp": 16 // expert} | fields)])


def tensor(block, layouts, model=TINY_DENSE):
    times = tensor_exchange(block, model, PLAIN, WORKLOAD, layouts)
    return [float(sum(t.values())[0]) if t else 0.0 for t in (times.forward, times.backward)]


def experts_s(layouts, workload=WORKLOAD, block=MOE, profile=PLAIN):
    return float(expert_exchange_s(block, TINY_MOE, profile, workload, layouts)[0])


# ---------------------------------------------------------------- tensor parallelism


def test_tensor_exchange_by_hand():
    # 256 tokens of 256 bytes; one of four ranks gathers 3/4 of them. Forward: gather and scatter; backward: gather and
    # scatter the gradients, and gather the input again.
    once = 256 * TOKEN_BYTES * 3 / 4 / RING
    assert tensor(MLP, one(tp=4, sequence_parallel=True)) == pytest.approx([2 * once, 3 * once])
    assert tensor(ATTENTION, one(tp=4, sequence_parallel=True, micro_batch=2)) == pytest.approx([4 * once, 6 * once])
    # Without sequence sharding one all-reduce in each direction, which moves as much as a gather and a scatter.
    assert tensor(MLP, one(tp=4)) == pytest.approx([2 * once, 2 * once])
    # Half the tokens on each of two context-parallel ranks.
    assert tensor(MLP, one(tp=4, cp=2, sequence_parallel=True)) == pytest.approx([once, 1.5 * once])


def test_latent_attention_gathers_its_compressed_inputs():
    # 32 + 16 + 8 elements instead of 128 go in; 128 come out.
    into, back = (256 * width * 2 / 2 / RING for width in (56, 128))
    assert tensor(LATENT, one(tp=2, sequence_parallel=True)) == pytest.approx([into + back, back + into + into])


def test_tensor_overlap_leaves_a_third():
    whole = tensor(MLP, one(tp=4, sequence_parallel=True))
    assert tensor(MLP, one(tp=4, sequence_parallel=True, tp_overlap=True)) == pytest.approx([0.33 * t for t in whole])


def test_no_tensor_exchange_without_tensor_parallelism():
    assert tensor(MLP, one()) == [0.0, 0.0]
    # Routed experts alone have none; a shared expert beside them has.
    routed = dataclasses.replace(MOE, shared_width=0)
    assert tensor(routed, one(tp=4, sequence_parallel=True)) == [0.0, 0.0]
    assert tensor(MOE, one(tp=4, sequence_parallel=True)) == tensor(MLP, one(tp=4, sequence_parallel=True))


# ---------------------------------------------------------------- context parallelism


def context(block, layouts, core=(0.0, 0.0)):
    times = context_exchange(block, PLAIN, WORKLOAD, layouts, *core)
    return [float(sum(t.values())[0]) if t else 0.0 for t in (times.forward, times.backward)]


def test_context_exchange_by_hand():
    # 64 tokens a rank, 4 heads of 16 + 16 elements; 3 more blocks to fetch at 0.75 x 400 GB/s, gradients twice as much. Each
    # is joined to the 128 elements of a token's output at 10 bytes an element.
    step, join = 64 * 4 * 32 * 2 / 300e9, 64 * 128 * 10 * 1e-12
    assert context(ATTENTION, one(cp=4)) == pytest.approx([3 * (step + join), 3 * (2 * step + join)])
    # Two tensor-parallel ranks hold two heads each; eight hold one each, though there are but four, and reach their
    # context-parallel peer, with 128 tokens, in another domain.
    assert context(ATTENTION, one(cp=4, tp=2)) == pytest.approx([3 * (step + join) / 2, 3 * (2 * step + join) / 2])
    far, join = 128 * 32 * 2 / OUT, 128 * 16 * 10 * 1e-12
    assert context(ATTENTION, one(cp=2, tp=8)) == pytest.approx([far + join, 2 * far + join])
    # Latent attention expands keys and values: 8 heads of 24 + 16 elements.
    step, join = 64 * 8 * 40 * 2 / 300e9, 64 * 128 * 10 * 1e-12
    assert context(LATENT, one(cp=4))[0] == pytest.approx(3 * (step + join))


def test_context_exchange_hides_behind_attention():
    step, join = 64 * 4 * 32 * 2 / 300e9, 64 * 128 * 10 * 1e-12
    # Attention on one of four blocks takes half a step: the other half of three steps shows. Joins hide behind nothing.
    half = context(ATTENTION, one(cp=4), (2 * step, 4 * step))
    assert half == pytest.approx([1.5 * step + 3 * join, 3 * step + 3 * join])
    assert context(ATTENTION, one(cp=4), (4 * step, 8 * step)) == pytest.approx([3 * join, 3 * join])


def test_head_exchange_by_hand():
    # 64 tokens on each of four near ranks: 8 query heads and 4 + 4 of keys and values of 16, then 8 of the output; 3/4 leave.
    sinks = dataclasses.replace(ATTENTION, sinks=True)
    once = 64 * 2 * (8 * 16 + 4 * 32 + 8 * 16) * 3 / 4 / RING
    assert context(sinks, one(cp=4), (1.0, 1.0)) == pytest.approx([once, once])
    window = dataclasses.replace(ATTENTION, window=64)
    assert context(window, one(cp=4), (1.0, 1.0)) == pytest.approx([once, once])
    # A window as long as the sequence is none; one rank exchanges nothing.
    assert context(dataclasses.replace(ATTENTION, window=256), one(cp=4)) == context(ATTENTION, one(cp=4))
    assert context(sinks, one()) == [0.0, 0.0]


def test_what_has_no_context_exchange():
    state = LinearAttention(variant="gdn", key_heads=2, value_heads=4, key_dim=8, value_dim=8)
    for block in (MLP, MOE, state):
        assert context(block, one(cp=4)) == [0.0, 0.0]
    assert context(ATTENTION, one()) == [0.0, 0.0]


# ---------------------------------------------------------------- experts


def test_all_to_all_by_hand():
    # 256 tokens, 2 copies each among 8 near ranks: 7/8 of the copies leave, the buffer is all of them, 7/8 of it at 100 GB/s.
    copies = 2 * 256 * TOKEN_BYTES
    assert experts_s(one(ep=8, dispatcher="alltoall")) == pytest.approx(2 * copies * 7 / 8 / RING)
    # Two ranks in two domains, each a lane of 8 that share an expert: half of the copies go through the NIC, and the lane
    # gathers the rows of its 8 ranks and scatters their sums.
    far = one(ep=2, etp=8, dispatcher="alltoall")
    rows = copies * 8
    lanes = 2 * rows * 7 / 8 / RING
    assert experts_s(far) == pytest.approx(2 * (copies / 2 / ALL_OUT + HOP_S) + lanes)


def test_fused_dispatch_by_hand():
    # One copy to each of the 8 near ranks that are hit, but the own one; dispatch and combine.
    hit = 7 * (1 - (7 / 8) ** 2)
    near = 2 * 256 * TOKEN_BYTES * hit / RING
    assert experts_s(one(ep=8, dispatcher="deepep")) == pytest.approx(near)
    assert experts_s(one(ep=8, dispatcher="hybridep")) == pytest.approx(near)
    # 16 ranks in two domains: the other domain is hit with 1 - (1/2)^2, over the network's 20 GB/s.
    far = 2 * 256 * TOKEN_BYTES * 0.75 / FAST_OUT
    assert experts_s(one(ep=16, dispatcher="deepep"), block=dataclasses.replace(MOE, experts=16)) == pytest.approx(far)


def test_gathering_dispatcher_by_hand():
    # All 8 x 256 tokens to everyone, their sums back, however many experts a token has.
    whole = 8 * 256 * TOKEN_BYTES
    gathered = 2 * whole * 7 / 8 / RING
    assert experts_s(one(ep=8, dispatcher="allgather")) == pytest.approx(gathered)
    assert experts_s(one(ep=4, etp=2, dispatcher="allgather")) == pytest.approx(gathered)
    assert experts_s(one(ep=1, etp=8, dispatcher="allgather")) == pytest.approx(gathered)


def test_expert_overlap_leaves_about_half():
    layouts = one(ep=8, dispatcher="alltoall")
    whole = experts_s(layouts)
    plain = exposed_expert_exchange_s(MOE, TINY_MOE, PLAIN, WORKLOAD, layouts)
    assert plain[0] == whole
    hidden = exposed_expert_exchange_s(MOE, TINY_MOE, PLAIN, WORKLOAD, one(ep=8, dispatcher="alltoall", ep_overlap=True))
    assert hidden[0] == pytest.approx(0.48 * whole)


def test_narrow_tokens_travel_cheaper():
    narrow = dataclasses.replace(MOE, latent=32)
    layouts = one(ep=8, dispatcher="alltoall")
    assert experts_s(layouts, block=narrow) == pytest.approx(experts_s(layouts) * 32 / 128)


def test_imbalance_lengthens_the_exchange():
    layouts = one(ep=8, dispatcher="alltoall")
    assert experts_s(layouts, workload_of(imbalance=1.5)) == pytest.approx(1.5 * experts_s(layouts))


# ---------------------------------------------------------------- laws


@given(rows=st.lists(layouts_of(TINY_MOE), min_size=1, max_size=6))
@pytest.mark.parametrize("profile", [PLAIN, TWO_NODES], ids=lambda p: p.name)
@QUICK
def test_arrays_equal_numbers(profile, rows):
    layouts = Layouts.of(rows)
    together = expert_exchange_s(MOE, TINY_MOE, profile, WORKLOAD, layouts)
    single = [experts_s(Layouts.of([row]), profile=profile) for row in rows]
    assert together.tolist() == pytest.approx(single, rel=1e-12)
    core = np.linspace(0.0, 1e-5, len(rows))
    for block in (ATTENTION, LATENT, MOE):
        whole = tensor_exchange(block, TINY_MOE, profile, WORKLOAD, layouts)
        whole.merge(context_exchange(block, profile, WORKLOAD, layouts, core, core))
        for i, row in enumerate(rows):
            alone = tensor_exchange(block, TINY_MOE, profile, WORKLOAD, Layouts.of([row]))
            alone.merge(context_exchange(block, profile, WORKLOAD, Layouts.of([row]), core[i], core[i]))
            for name, seconds in whole.forward.items():
                assert seconds[i] == pytest.approx(float(alone.forward[name][0]), rel=1e-12, abs=1e-18)
                assert whole.backward[name][i] == pytest.approx(float(alone.backward[name][0]), rel=1e-12, abs=1e-18)


@given(row=layouts_of(TINY_MOE))
@QUICK
def test_only_a_lone_rank_exchanges_nothing(row):
    seconds = experts_s(Layouts.of([row]))
    assert seconds >= 0.0
    assert (seconds > 0.0) == (row.ep * row.etp > 1)
    for block in (ATTENTION, MLP):
        forward, backward = tensor(block, Layouts.of([row]), TINY_MOE)
        assert (forward > 0.0) == (backward > 0.0) == (row.tp > 1)
        assert backward >= forward * (1 - 1e-12)


@given(row=layouts_of(TINY_MOE, micro_batch=1))
@QUICK
def test_twice_the_tokens_take_no_less(row):
    twice = dataclasses.replace(row, micro_batch=2)
    assert experts_s(Layouts.of([twice])) >= experts_s(Layouts.of([row]))
    assert tensor(MLP, Layouts.of([twice])) >= tensor(MLP, Layouts.of([row]))


@given(row=layouts_of(TINY_MOE), topk=st.integers(1, 7))
@QUICK
def test_more_experts_a_token_take_no_less(row, topk):
    fewer, more = (dataclasses.replace(MOE, topk=k) for k in (topk, topk + 1))
    layouts = Layouts.of([row])
    assert experts_s(layouts, block=more) >= experts_s(layouts, block=fewer)
