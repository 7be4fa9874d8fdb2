"""S1, S2 and the baselines: which is quicker."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import Lines
from moeplan.costmodels.moe.s1 import S1, s1_is_quicker, s1_is_quicker_at_large_size
from moeplan.costmodels.moe.s2 import saa_s
from moeplan.costmodels.moe.schedules import find_schedule
from tests.costmodels.moe.vectors import FP32, LINES, QUICK, all_lines, columns, line, seconds, sizes


def took_s(name, size, lines):
    schedule = find_schedule(name)
    return schedule.seconds(1, schedule.parts(size, lines, 1, "forward"), size)


def test_the_choice_by_vector():
    at = {k: np.array(v) for k, v in columns("parm_derived_vectors").items()}
    tokens = at["B"] * at["L"] * at["M"] * FP32
    exchange, gather = line(at["alpha_a2a"], at["beta_a2a"]), line(at["alpha_ag"], at["beta_ag"])
    exchange_s = exchange.time_s(at["kf"] * tokens * at["N_ESP"] / at["N_MP"])
    gathers = (gather.among_s(tokens, at["N_MP"]), gather.among_s(at["kf"] * tokens, at["N_MP"]))
    quicker = s1_is_quicker(exchange_s, *gathers, at["P"])
    assert (quicker == (at["t_S1_ms"] < at["t_S2_ms"])).all() and quicker.any() and not quicker.all()


@given(a=seconds, g1=seconds, gk=seconds, phases=st.integers(1, 64))
@QUICK
def test_the_choice_is_the_quicker_one(a, g1, gk, phases):
    s1_s, s2_s = 2 * a + g1, a + saa_s(a, gk, phases)
    if abs(s1_s - s2_s) > 1e-9 * s1_s:
        assert s1_is_quicker(a, g1, gk, phases) == (s1_s < s2_s)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_the_choice_at_large_size(size, lines):
    large = Lines(**{k: replace(getattr(lines, k), startup_s=0.0) for k in LINES})
    exchange_s = large.fused_exchange.time_s(S1().amounts(size, "forward")["D"])
    token_s, slot_s = large.mp_gather.time_s(size.token_bytes), large.mp_gather.time_s(size.slot_bytes)
    spare = abs(slot_s - token_s - exchange_s) > 1e-6 * (slot_s + exchange_s)
    if exchange_s < slot_s and spare:
        assert s1_is_quicker_at_large_size(large, size) == s1_is_quicker(exchange_s, token_s, slot_s, 1e15)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_s1_beats_the_baseline_where_all_are_shared(size, lines):
    # With tensor parallelism and shards, if the all-to-all over all ranks costs no more than the one over EP.
    size = replace(size, mp_ranks=max(size.mp_ranks, 2), esp_ranks=max(size.esp_ranks, 2), ep_ranks=max(size.ep_ranks, 2))
    same = replace(lines, fused_exchange=lines.exchange, mp_gather=lines.gather)
    assert took_s("s1", size, same) <= took_s("baseline", size, same)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_without_tensor_parallelism_s1_is_s2(size, lines):
    size = replace(size, mp_ranks=1)
    assert took_s("s1", size, lines) == pytest.approx(took_s("s2", size, lines))


@given(size=sizes(), lines=all_lines)
@QUICK
def test_without_tensor_parallelism_and_shards_all_layouts_are_one(size, lines):
    size = replace(size, mp_ranks=1, esp_ranks=1)
    same = replace(lines, fused_exchange=lines.exchange)
    for name in ("replicated-baseline", "deepspeed", "s1", "s2", "hierarchical"):
        assert took_s(name, size, same) == pytest.approx(took_s("baseline", size, same))


@given(size=sizes(), lines=all_lines)
@QUICK
def test_hierarchical_against_s1_at_large_size(size, lines):
    free = Lines(**{k: replace(getattr(lines, k), startup_s=0.0) for k in LINES})
    even = replace(free, scatter=free.gather, fused_exchange=free.exchange)
    size = replace(size, esp_ranks=max(2, size.esp_ranks), ep_ranks=max(2, size.ep_ranks))
    spared = even.exchange.unit_s * (1 - 1 / size.esp_ranks)
    if abs(spared - even.gather.unit_s) > 1e-6 * spared:
        assert (took_s("hierarchical", size, even) < took_s("s1", size, even)) == (spared > even.gather.unit_s)
