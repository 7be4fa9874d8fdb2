"""FSMoE: simulated vectors, the published solver's results, the paper's cases, windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe import fsmoe
from moeplan.costmodels.moe.base import Lines, MoeSize
from moeplan.costmodels.moe.choice import best_degree
from moeplan.costmodels.moe.fsmoe import DEGREES, FsMoe
from moeplan.costmodels.moe.two_stream import two_stream_s
from moeplan.costmodels.simulate import makespan_s, simulate
from tests.costmodels.moe.vectors import FP32, FREE, MS, QUICK, columns, degrees, line, seconds

SIZE = MoeSize(token_bytes=0, slot_bytes=0, expert_flop=0, mp_ranks=1, esp_ranks=1, ep_ranks=1)
chunks = st.fixed_dictionaries(dict.fromkeys("DGESC", seconds) | {"R": st.floats(0, 1e3)})


def test_vectors_of_the_exact_makespan():
    at = {k: np.array(v) for k, v in columns("fsmoe_exact_vectors").items()}
    assert len(at["r"]) == 150
    names = {"D": "t_a2a", "G": "t_ag", "E": "t_exp", "S": "t_rs", "C": "t_a2a", "R": "t_gar"}
    parts = {kind: at[name] for kind, name in names.items()}
    exact_s, paper_s = FsMoe().seconds(at["r"], parts, SIZE), fsmoe.paper_s(at["r"], parts)
    assert exact_s == pytest.approx(at["T_event_sim"], rel=1e-6)
    assert paper_s == pytest.approx(at["T_paper"], rel=1e-6)
    assert (fsmoe.paper_case(at["r"], parts) == at["paper_case"]).all()
    assert (np.isclose(exact_s, paper_s, rtol=1e-6) == (at["paper_is_exact"] == 1)).all()
    for i, r in enumerate(at["r"]):
        graph, one = FsMoe().graph(int(r), SIZE), {kind: float(v[i]) for kind, v in parts.items()} | {"M": 0.0}
        assert makespan_s(graph, one) == pytest.approx(at["T_event_sim"][i], rel=1e-6)
        assert simulate(graph, one).makespan_s == pytest.approx(at["T_event_sim"][i], rel=1e-6)


def solver_case(at):
    """Layers of the published solver's results: N_MP = N_ESP, elements of four bytes, MACs of two FLOP."""
    token_bytes = at["B"] * at["L"] * at["M"] * FP32
    slot_bytes = at["kf"] * token_bytes
    size = MoeSize(
        token_bytes=token_bytes,
        slot_bytes=slot_bytes,
        expert_flop=2 * at["n_gemm"] * slot_bytes / FP32 * at["H"],
        mp_ranks=at["N_ESP"],
        esp_ranks=at["N_ESP"],
        ep_ranks=2,
        sequence_parallel=True,
    )
    fits = {"exchange": ("a2a", FP32), "gather": ("ag", FP32), "experts": ("exp", 2), "scatter": ("rs", FP32)}
    lines = {part: line(at[f"alpha_{op}"], at[f"beta_{op}"], unit) for part, (op, unit) in fits.items()}
    return size, Lines(**lines, fused_exchange=FREE, reduce=FREE, mp_gather=FREE)


def by_paper(size, lines, direction, gradient_s):
    """Chunks and seconds by the paper's formula, which the published solver minimises by other means."""
    took = [fsmoe.paper_s(r, {**FsMoe().parts(size, lines, r, direction), "R": gradient_s}) for r in DEGREES]
    return np.array(DEGREES)[np.argmin(took, axis=0)], np.min(took, axis=0)


@pytest.mark.parametrize("when, gradient_s", [("fwd", 0.0), *((f"bwd_gar{t}", t * MS) for t in (0, 5, 20, 80))])
def test_results_of_the_published_solver(when, gradient_s):
    at = {k: np.array(v) for k, v in columns("fsmoe_reference_solver_goldens").items()}
    size, lines = solver_case(at)
    direction = "forward" if when == "fwd" else "backward"
    degree, exact_s = best_degree(FsMoe(), size, lines, direction, gradient_s=gradient_s)
    assert exact_s / MS == pytest.approx(at[f"exact_t_{when}_ms"], rel=1e-6)
    parts = {**FsMoe().parts(size, lines, degree, direction), "R": gradient_s}
    assert FsMoe().seconds(degree, parts, size) == pytest.approx(exact_s)
    # Enumeration: same chunks and time by the paper's formula, never above the solver.
    degree, paper_s = by_paper(size, lines, direction, gradient_s)
    assert paper_s / MS == pytest.approx(at[f"enum_t_{when}_ms"], rel=1e-6)
    assert (degree == at[f"enum_r_{when}"]).all()
    assert len(degree) == 48 and (paper_s / MS <= at[f"ref_t_{when}_ms"] * (1 + 1e-6)).all()
    assert (exact_s / MS <= at[f"ref_t_{when}_ms"] * (1 + 1e-6)).all()


def test_window_of_the_published_solver():
    at = {k: np.array(v) for k, v in columns("fsmoe_reference_solver_goldens").items()}
    size, lines = solver_case(at)
    degree = at["ref_r_bwd_gar0"]
    parts = FsMoe().parts(size, lines, degree, "backward")
    paper_s = fsmoe.paper_s(degree, parts) - fsmoe.inter_node_s(degree, parts)
    assert paper_s / MS == pytest.approx(at["ref_window_bwd_ms"], rel=1e-6, abs=1e-6)
    assert (fsmoe.window_s(degree, parts) >= paper_s * (1 - 1e-12)).all()


def test_by_hand():
    # Two chunks: all-to-all 2 s, gather 1 s, experts 4 s, scatter 1 s. The experts fill 3 to 11 s; then 1 s and 2 s.
    parts = {"D": 2.0, "G": 1.0, "E": 4.0, "S": 1.0, "C": 2.0}
    assert fsmoe.three_stream_s(2, parts) == 14.0 == fsmoe.paper_s(2, parts) == two_stream_s(2, parts)
    assert fsmoe.window_s(2, parts) == 6.0 and fsmoe.inter_node_s(2, parts) == 8.0
    assert fsmoe.three_stream_s(2, {**parts, "R": 6.0}) == 14.0 and fsmoe.three_stream_s(2, {**parts, "R": 7.0}) == 15.0
    assert (
        FsMoe().seconds(2, {**parts, "M": 3.0}, SIZE) == 17.0 and FsMoe().serial_seconds(2, {**parts, "R": 1.0}, SIZE) == 21.0
    )


def test_the_text():
    assert str(FsMoe().graph(2, SIZE)) == (
        "D1@inter G1@intra<D1 D2@inter G2@intra<D2 R1@inter E1@compute<G1 E2@compute<G2 "
        "S1@intra<E1 C1@inter<S1 S2@intra<E2 C2@inter<S2 M1@intra<C2"
    )


# ---------------------------------------------------------------- laws


@given(r=degrees, parts=chunks)
@QUICK
def test_the_paper_is_a_lower_bound_and_exact_for_equal_gather_and_scatter(r, parts):
    parts["C"] = parts["D"]
    assert fsmoe.paper_s(r, parts) <= fsmoe.three_stream_s(r, parts) * (1 + 1e-12)
    same = {**parts, "S": parts["G"]}
    assert fsmoe.paper_s(r, same) == pytest.approx(fsmoe.three_stream_s(r, same), rel=1e-9)


@given(r=degrees, parts=chunks)
@QUICK
def test_three_streams_and_two(r, parts):
    assert fsmoe.three_stream_s(r, parts) <= two_stream_s(r, parts) * (1 + 1e-12)
    window_s = fsmoe.window_s(r, parts)
    alone_s = fsmoe.three_stream_s(r, {**parts, "R": 0.0})
    assert window_s >= -1e-12 * alone_s
    assert fsmoe.three_stream_s(r, {**parts, "R": window_s}) == pytest.approx(alone_s, rel=1e-9)
    assert fsmoe.three_stream_s(r, {**parts, "R": window_s + 1.0}) == pytest.approx(alone_s + 1.0, rel=1e-9)
