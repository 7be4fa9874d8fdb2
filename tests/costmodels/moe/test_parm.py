"""Parm: counted message volumes, times by vector, the choice of S1 or S2, laws."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.moe import fsmoe, parm
from moeplan.costmodels.moe.base import AlphaBeta, MoeSize
from tests.costmodels.moe.vectors import FP32, MS, columns, line, rows_of

QUICK = settings(max_examples=100, deadline=None)
PRINTED = 5e-6
"""Half of the last digit of the printed times."""
FREE = AlphaBeta(startup_s=0.0, unit_s=0.0)
VOLUMES, TIMES = rows_of("parm_message_volumes"), columns("parm_derived_vectors")
LAYOUTS = {
    "baseP": parm.baseline, "baseD": parm.replicated_baseline, "S1": parm.s1, "S2": parm.s2, "FSMoE-H": fsmoe.volumes,
}  # fmt: skip
QUANTITIES = {
    "a2a": "exchange_bytes", "espag": "esp_gather_bytes", "espar": "esp_reduce_bytes", "mpag": "mp_gather_bytes",
    "expert_MAC_per_gpu": "expert_flop",
}  # fmt: skip
SCHEDULES = {
    parm.baseline: parm.baseline_s, parm.replicated_baseline: parm.replicated_baseline_s,
    parm.s1: parm.s1_s, parm.s2: parm.s2_s,
}  # fmt: skip


def sized(row, gemms=2):
    """The size of a row of the volumes: one element is one byte, one MAC is one FLOP."""
    slots = row["E"] * row["T"] * row["M"]
    return MoeSize(
        token_bytes=row["BL"] * row["M"],
        slot_bytes=slots,
        expert_flop=gemms * slots * row["H"],
        mp_ranks=row["N_MP"],
        esp_ranks=row["N_ESP"],
        ep_ranks=row["P"] / row["N_ESP"],
    )


@pytest.mark.parametrize("row", VOLUMES, ids=lambda r: "{layout}-{quantity}-{P:g}-{N_MP:g}-{N_ESP:g}-{E:g}".format(**r))
def test_counted_volumes(row):
    moved = LAYOUTS[row["layout"]](sized(row))
    names = QUANTITIES | ({"espag": "gather_bytes", "esprs": "gather_bytes"} if row["layout"] == "FSMoE-H" else {})
    assert getattr(moved, names[row["quantity"]]) == pytest.approx(row["elements_per_gpu"], rel=1e-6)


def test_times_by_vector():
    at = {k: np.array(v) for k, v in TIMES.items()}
    token_bytes = at["B"] * at["L"] * at["M"] * FP32
    ranks = {"mp_ranks": at["N_MP"], "esp_ranks": at["N_ESP"], "ep_ranks": at["P"] / at["N_ESP"]}
    size = MoeSize(token_bytes=token_bytes, slot_bytes=at["kf"] * token_bytes, expert_flop=0.0, **ranks)
    exchange, gather = line(at["alpha_a2a"], at["beta_a2a"]), line(at["alpha_ag"], at["beta_ag"])
    reduce = line(at["alpha_ar"], at["beta_ar"])
    lines = parm.Lines(
        exchange=exchange, fused_exchange=exchange, esp_gather=gather, esp_reduce=reduce, mp_gather=gather, experts=FREE
    )
    baseline_s, s1_s, s2_s = (SCHEDULES[kind](kind(size), size, lines) for kind in (parm.baseline, parm.s1, parm.s2))
    assert baseline_s / MS == pytest.approx(at["t_base_ms"], rel=1e-6, abs=PRINTED)
    assert s1_s / MS == pytest.approx(at["t_S1_ms"], rel=1e-6, abs=PRINTED)
    assert s2_s / MS == pytest.approx(at["t_S2_ms"], rel=1e-6, abs=PRINTED)
    # FSMoE's layout, one after the other.
    work = fsmoe.volumes(size)
    part = fsmoe.chunk(work, fsmoe.Lines(exchange=exchange, gather=gather, experts=FREE, scatter=gather), 1, size)
    serial_s = fsmoe.serial_s(1, part) + gather.among_s(work.mp_gather_bytes, size.mp_ranks)
    assert serial_s / MS == pytest.approx(at["t_hier_serial_ms"], rel=1e-6, abs=PRINTED)
    # The choice, also from its own formula; equal without tensor parallelism, where the table says S1.
    assert (np.where(s1_s <= s2_s, "S1", "S2") == at["best_of_S1_S2"]).all()
    quicker = parm.s1_is_quicker(
        exchange.time_s(parm.s1(size).exchange_bytes),
        gather.among_s(token_bytes, size.mp_ranks),
        gather.among_s(size.slot_bytes, size.mp_ranks),
        at["P"],
    )
    assert (quicker == (s1_s < s2_s)).all() and quicker.any()


def test_saa_by_hand():
    # Four phases of 2 s on the wire, each gathered in 1 s: 8 s and the last gather; and the other way round.
    assert parm.saa_s(8.0, 4.0, 4) == 9.0 == parm.saa_s(4.0, 8.0, 4)
    assert parm.saa_s(8.0, 4.0, 1) == 12.0 == parm.saa_s(8.0, 4.0, 4, 1.0)
    assert parm.saa_s(8.0, 4.0, 4, 0.25) == 10.0


def test_a_gate_over_all_tokens_and_padding():
    size = MoeSize(token_bytes=10.0, slot_bytes=20.0, expert_flop=0.0, mp_ranks=4, esp_ranks=1, ep_ranks=1)
    lines = parm.Lines(**dict.fromkeys(parm.Lines.__slots__, FREE))
    assert parm.s2_s(parm.s2(size), size, lines, gate_s=8.0) == 6.0
    assert parm.padded_slots(np.array([15, 16, 17]), 4).tolist() == [16, 16, 20]


# ---------------------------------------------------------------- laws

seconds = st.floats(1e-6, 1e3)
ranks = st.sampled_from([1, 2, 4, 8])
fits = st.builds(AlphaBeta, startup_s=st.floats(0, 1e-3), unit_s=st.floats(1e-12, 1e-8))
all_lines = st.builds(parm.Lines, **dict.fromkeys(parm.Lines.__slots__, fits))


@st.composite
def sizes(draw):
    tokens = draw(st.floats(1e3, 1e9))
    slots, flop = tokens * draw(st.floats(1, 16)), tokens * draw(st.floats(1e2, 1e5))
    return MoeSize(
        token_bytes=tokens,
        slot_bytes=slots,
        expert_flop=flop,
        mp_ranks=draw(ranks),
        esp_ranks=draw(ranks),
        ep_ranks=draw(ranks),
    )


@given(a=seconds, g=seconds, phases=st.integers(1, 64), shared=st.floats(0, 1), more=st.floats(1, 10))
@QUICK
def test_saa(a, g, phases, shared, more):
    # An event simulation: each gather waits for its phase and for the gather before it.
    gathered = 0.0
    for phase in range(1, phases + 1):
        gathered = max(gathered, phase * a / phases) + g / phases
    took = parm.saa_s(a, g, phases)
    assert took == pytest.approx(gathered, rel=1e-9)
    shared_s = parm.saa_s(a, g, phases, shared)
    assert max(a, g) <= took <= shared_s <= a + g
    for other in (parm.saa_s(a * more, g, phases, shared), parm.saa_s(a, g * more, phases, shared)):
        assert other >= shared_s * (1 - 1e-12)
    assert parm.saa_s(a, g, 1) == pytest.approx(a + g)


@given(a=seconds, g1=seconds, gk=seconds, phases=st.integers(1, 64))
@QUICK
def test_the_choice_is_the_quicker_one(a, g1, gk, phases):
    s1_s, s2_s = 2 * a + g1, a + parm.saa_s(a, gk, phases)
    if abs(s1_s - s2_s) > 1e-9 * s1_s:
        assert parm.s1_is_quicker(a, g1, gk, phases) == (s1_s < s2_s)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_the_choice_at_large_size(size, lines):
    flat = {k: replace(getattr(lines, k), startup_s=0.0) for k in parm.Lines.__slots__}
    large = parm.Lines(**flat)
    exchange_s = large.fused_exchange.time_s(parm.s1(size).exchange_bytes)
    token_s, slot_s = large.mp_gather.time_s(size.token_bytes), large.mp_gather.time_s(size.slot_bytes)
    spare = abs(slot_s - token_s - exchange_s) > 1e-6 * (slot_s + exchange_s)
    if exchange_s < slot_s and spare:
        assert parm.s1_is_quicker_at_large_size(large, size) == parm.s1_is_quicker(exchange_s, token_s, slot_s, 1e15)


@given(size=sizes(), lines=all_lines, more=st.floats(1, 10), name=st.sampled_from(["token_bytes", "slot_bytes", "expert_flop"]))
@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda k: k.__name__)
@QUICK
def test_larger_layers_take_no_less(kind, size, lines, more, name):
    larger = replace(size, **{name: getattr(size, name) * more})
    took = SCHEDULES[kind](kind(size), size, lines)
    assert SCHEDULES[kind](kind(larger), larger, lines) >= took * (1 - 1e-12)
    forward, back = kind(size), parm.backward(kind(size))
    assert back.expert_flop == 2 * forward.expert_flop and back.exchange_bytes == forward.exchange_bytes
    assert SCHEDULES[kind](back, size, lines) - took == pytest.approx(lines.experts.unit_s * forward.expert_flop, rel=1e-6)
    assert took >= lines.experts.time_s(forward.expert_flop)


@given(rows=st.lists(sizes(), min_size=1, max_size=5), lines=all_lines)
@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda k: k.__name__)
@QUICK
def test_arrays_equal_numbers(kind, rows, lines):
    together = MoeSize(**{k: np.array([getattr(row, k) for row in rows]) for k in MoeSize.__slots__})
    took = SCHEDULES[kind](kind(together), together, lines)
    assert took.tolist() == pytest.approx([float(SCHEDULES[kind](kind(row), row, lines)) for row in rows])


@given(size=sizes(), lines=all_lines)
@QUICK
def test_the_schedules_beat_the_baseline_where_all_are_shared(size, lines):
    # With tensor parallelism and shards, if the all-to-all over all ranks costs no more than the one over EP.
    size = replace(size, mp_ranks=max(size.mp_ranks, 2), esp_ranks=max(size.esp_ranks, 2), ep_ranks=max(size.ep_ranks, 2))
    same = replace(lines, fused_exchange=lines.exchange, mp_gather=lines.esp_gather)
    assert parm.s1_s(parm.s1(size), size, same) <= parm.baseline_s(parm.baseline(size), size, same)
