"""The overlapped exchange of S2, its gate, its padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.s2 import S2, padded_slots, repeated_gate_s, saa_s
from tests.costmodels.moe.vectors import QUICK, all_lines, seconds, sizes


def test_saa_by_hand():
    # Four phases of 2 s on the wire, each gathered in 1 s: 8 s and the last gather; and the other way round.
    assert saa_s(8.0, 4.0, 4) == 9.0 == saa_s(4.0, 8.0, 4)
    assert saa_s(8.0, 4.0, 1) == 12.0 == saa_s(8.0, 4.0, 4, 1.0)
    assert saa_s(8.0, 4.0, 4, 0.25) == 10.0


def test_a_gate_over_all_tokens_and_padding():
    assert repeated_gate_s(8.0, 4) == 6.0 and repeated_gate_s(8.0, 1) == 0.0
    assert padded_slots(np.array([15, 16, 17]), 4).tolist() == [16, 16, 20]


@given(a=seconds, g=seconds, phases=st.integers(1, 64), shared=st.floats(0, 1), more=st.floats(1, 10))
@QUICK
def test_saa(a, g, phases, shared, more):
    # An event simulation: each gather waits for its phase and for the gather before it.
    gathered = 0.0
    for phase in range(1, phases + 1):
        gathered = max(gathered, phase * a / phases) + g / phases
    took = saa_s(a, g, phases)
    assert took == pytest.approx(gathered, rel=1e-9)
    shared_s = saa_s(a, g, phases, shared)
    assert max(a, g) <= took <= shared_s <= a + g
    for other in (saa_s(a * more, g, phases, shared), saa_s(a, g * more, phases, shared)):
        assert other >= shared_s * (1 - 1e-12)
    assert saa_s(a, g, 1) == pytest.approx(a + g)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_the_phases_are_the_exchange(size, lines):
    parts, amounts = S2().parts(size, lines, 1, "forward"), S2().amounts(size, "forward")
    whole_s = lines.fused_exchange.among_s(amounts["C"], size.all_ranks)
    gather_s = lines.mp_gather.among_s(amounts["M"], size.mp_ranks)
    overlapped_s = saa_s(whole_s, gather_s, size.all_ranks)
    assert S2().seconds(1, parts, size) == pytest.approx(parts["D"] + parts["E"] + overlapped_s, rel=1e-9)
    assert len(S2().graph(1, size).tasks) == 3 + 2 * size.all_ranks
