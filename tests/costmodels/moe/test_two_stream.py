"""Two streams: PipeMoE's solver, where gradients run, the order of FSMoE's comparison points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize, expert_line
from moeplan.costmodels.moe.choice import best_degree
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.costmodels.moe.two_stream import NO_IIO, PIPEMOE, TUTEL, TUTEL_IMPROVED, exposed_gradient_s, two_stream_s
from tests.costmodels.moe.vectors import FP32, FREE, LINES, MS, QUICK, columns, degrees, rows_of, seconds

SIZE = MoeSize(token_bytes=0, slot_bytes=0, expert_flop=0, mp_ranks=1, esp_ranks=1, ep_ranks=1)
chunks = st.fixed_dictionaries(dict.fromkeys("DGESC", seconds) | {"R": st.floats(0, 1e3), "M": st.floats(0, 10)})


def test_enumeration_against_the_solver_of_pipemoe():
    at = {k: np.array(v) for k, v in columns("pipemoe_goldens").items()}
    fits = {row["name"]: (row["alpha_s"], row["beta_s_per_byte"]) for row in rows_of("pipemoe_solver_constants")}
    exchange = np.array([fits[f"AlltoAll 100GbIB {p:g} GPUs"] for p in at["P"]]).T
    alpha, beta = fits["GEMM RTX 2080Ti (workload = MACs x 4 bytes)"]
    slot_bytes = at["k"] * at["f"] * at["B"] * at["L"] * at["M"] * FP32
    # Two GEMMs of slot_bytes / 4 x H multiply-adds each; the slope is per multiply-add x 4, of two FLOP.
    size = MoeSize(
        token_bytes=0.0,
        slot_bytes=slot_bytes,
        expert_flop=2 * 2 * slot_bytes / FP32 * at["H"],
        mp_ranks=1,
        esp_ranks=1,
        ep_ranks=at["P"],
    )
    lines = {
        "exchange": AlphaBeta(startup_s=exchange[0], unit_s=exchange[1]),
        "experts": expert_line(AlphaBeta(startup_s=alpha, unit_s=beta * 4 / 2), 2),
    }
    degree, took_s = best_degree(PIPEMOE, size, Lines(**(dict.fromkeys(LINES, FREE) | lines)), "forward", range(1, 65))
    assert took_s / MS == pytest.approx(at["t_exh_ms"], rel=1e-6)
    assert (degree == at["r_exh"]).all()
    solved = at["t_ref_ms"] > 0
    assert solved.sum() > 100 and (took_s / MS <= at["t_ref_ms"] * (1 + 1e-9))[solved].all()


@given(r=degrees, d=seconds, e=seconds)
@QUICK
def test_pipemoe_has_no_gather(r, d, e):
    parts = {"D": d, "E": e, "C": d}
    assert PIPEMOE.seconds(r, parts, SIZE) == pytest.approx(max(2 * d + e + (r - 1) * max(d, e), 2 * r * d))


@given(r=degrees, parts=chunks, dense_s=st.floats(0, 1e3))
@QUICK
def test_where_gradients_run(r, parts, dense_s):
    alone_s = two_stream_s(r, {**parts, "R": 0.0}) + parts["M"]
    tutel_s, improved_s = (s.seconds(r, {**parts, "N": dense_s}, SIZE) for s in (TUTEL, TUTEL_IMPROVED))
    assert tutel_s == pytest.approx(alone_s + exposed_gradient_s(parts["R"]))
    assert improved_s - dense_s == pytest.approx(alone_s + exposed_gradient_s(parts["R"], dense_s), rel=1e-9, abs=1e-9)
    # No overlap inside and between nodes, FSMoE: each hides no less than the one before.
    no_iio_s, fsmoe_s = NO_IIO.seconds(r, parts, SIZE), find_schedule("fsmoe").seconds(r, parts, SIZE)
    assert fsmoe_s <= no_iio_s * (1 + 1e-12) and no_iio_s <= tutel_s * (1 + 1e-12)


def test_what_is_exposed():
    assert exposed_gradient_s(5.0) == 5.0 and exposed_gradient_s(5.0, 2.0) == 3.0
    assert exposed_gradient_s(np.array([5.0, 1.0]), 2.0).tolist() == [3.0, 0.0]


def test_the_text():
    assert str(PIPEMOE.graph(1, SIZE)) == (
        "D1@inter+intra G1@inter+intra<D1 R1@inter+intra E1@compute<G1 S1@inter+intra<E1 C1@inter+intra<S1 M1@inter+intra<C1"
    )
    assert str(TUTEL_IMPROVED.graph(1, SIZE)).endswith("M1@inter+intra<C1 R1@inter<M1 N1@compute<M1")
