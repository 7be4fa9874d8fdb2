"""FSMoE: simulated vectors, the published solver's results, an event simulation beside the closed forms, laws."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.moe import fsmoe
from moeplan.costmodels.moe.base import AlphaBeta, MoeSize
from moeplan.costmodels.moe.fsmoe import Chunk
from tests.costmodels.moe.vectors import FP32, MS, columns, line

QUICK = settings(max_examples=150, deadline=None)
PARTS = ("exchange_s", "gather_s", "expert_s", "scatter_s")
EXACT = [fsmoe.three_stream_s, fsmoe.two_stream_s, fsmoe.serial_s]
SCHEDULES = [*EXACT, fsmoe.paper_s]


def simulated(streams):
    """Makespan of streams that each run their tasks (name, seconds, predecessors) in the order given."""
    ends, waiting = {}, [list(tasks) for tasks in streams]
    free = [0.0] * len(streams)
    while any(waiting):
        for at, tasks in enumerate(waiting):
            while tasks and all(p in ends for p in tasks[0][2]):
                name, duration, before = tasks.pop(0)
                free[at] = ends[name] = max([free[at], *(ends[p] for p in before)]) + duration
    return max(ends.values())


def three_streams(r, part, gradient_s):
    a, g, e, s = (getattr(part, k) for k in PARTS)
    chunks = range(r)
    return simulated(
        [
            [*((("D", i), a, []) for i in chunks), ("R", gradient_s, []), *((("C", i), a, [("S", i)]) for i in chunks)],
            [*((("G", i), g, [("D", i)]) for i in chunks), *((("S", i), s, [("E", i)]) for i in chunks)],
            [(("E", i), e, [("G", i)]) for i in chunks],
        ]
    )


def two_streams(r, part, gradient_s):
    there, back = part.exchange_s + part.gather_s, part.scatter_s + part.exchange_s
    comm = [*(((i, "in"), there, []) for i in range(r)), ("R", gradient_s, [])]
    comm += [((i, "out"), back, [(i, "E")]) for i in range(r)]
    return simulated([comm, [((i, "E"), part.expert_s, [(i, "in")]) for i in range(r)]])


def test_vectors_of_the_exact_makespan():
    at = {k: np.array(v) for k, v in columns("fsmoe_exact_vectors").items()}
    assert len(at["r"]) == 150
    part = Chunk(exchange_s=at["t_a2a"], gather_s=at["t_ag"], expert_s=at["t_exp"], scatter_s=at["t_rs"])
    exact_s, paper_s = fsmoe.three_stream_s(at["r"], part, at["t_gar"]), fsmoe.paper_s(at["r"], part, at["t_gar"])
    assert exact_s == pytest.approx(at["T_event_sim"], rel=1e-6)
    assert paper_s == pytest.approx(at["T_paper"], rel=1e-6)
    assert (fsmoe.paper_case(at["r"], part, at["t_gar"]) == at["paper_case"]).all()
    assert (np.isclose(exact_s, paper_s, rtol=1e-6) == (at["paper_is_exact"] == 1)).all()
    for r, a, g, e, s, t, took in zip(*(at[k] for k in ("r", "t_a2a", "t_ag", "t_exp", "t_rs", "t_gar")), exact_s, strict=True):
        assert three_streams(int(r), Chunk(exchange_s=a, gather_s=g, expert_s=e, scatter_s=s), t) == pytest.approx(took)


def solver_case(at):
    """Layers of the published solver's results: N_MP = N_ESP, elements of four bytes, MACs of two FLOP."""
    token_bytes = at["B"] * at["L"] * at["M"] * FP32
    slot_bytes = at["kf"] * token_bytes
    flop = 2 * at["n_gemm"] * slot_bytes / FP32 * at["H"]
    size = MoeSize(
        token_bytes=token_bytes,
        slot_bytes=slot_bytes,
        expert_flop=flop,
        mp_ranks=at["N_ESP"],
        esp_ranks=at["N_ESP"],
        ep_ranks=2,
    )
    fits = {"exchange": ("a2a", FP32), "gather": ("ag", FP32), "experts": ("exp", 2), "scatter": ("rs", FP32)}
    lines = {part: line(at[f"alpha_{op}"], at[f"beta_{op}"], unit) for part, (op, unit) in fits.items()}
    return size, fsmoe.volumes(size), fsmoe.Lines(**lines)


@pytest.mark.parametrize("when, gradient_s", [("fwd", 0.0), *((f"bwd_gar{t}", t * MS) for t in (0, 5, 20, 80))])
def test_results_of_the_published_solver(when, gradient_s):
    at = {k: np.array(v) for k, v in columns("fsmoe_reference_solver_goldens").items()}
    size, work, forward = solver_case(at)
    lines = forward if when == "fwd" else fsmoe.backward(forward)
    degree, exact_s = fsmoe.best_degree(work, lines, size, gradient_s=gradient_s)
    assert exact_s / MS == pytest.approx(at[f"exact_t_{when}_ms"], rel=1e-6)
    assert fsmoe.three_stream_s(degree, fsmoe.chunk(work, lines, degree, size), gradient_s) == pytest.approx(exact_s)
    # By the paper's formula, which the published solver minimises by other means: same chunks as enumeration, never above it.
    degree, paper_s = fsmoe.best_degree(work, lines, size, gradient_s=gradient_s, schedule_s=fsmoe.paper_s)
    assert paper_s / MS == pytest.approx(at[f"enum_t_{when}_ms"], rel=1e-6)
    assert (degree == at[f"enum_r_{when}"]).all()
    assert len(degree) == 48 and (paper_s / MS <= at[f"ref_t_{when}_ms"] * (1 + 1e-6)).all()
    assert (exact_s / MS <= at[f"ref_t_{when}_ms"] * (1 + 1e-6)).all()


def test_window_of_the_published_solver():
    at = {k: np.array(v) for k, v in columns("fsmoe_reference_solver_goldens").items()}
    size, work, forward = solver_case(at)
    degree = at["ref_r_bwd_gar0"]
    part = fsmoe.chunk(work, fsmoe.backward(forward), degree, size)
    paper_s = fsmoe.paper_s(degree, part) - fsmoe.inter_node_s(degree, part)
    assert paper_s / MS == pytest.approx(at["ref_window_bwd_ms"], rel=1e-6, abs=1e-6)
    assert (fsmoe.window_s(degree, part) >= paper_s * (1 - 1e-12)).all()


def test_by_hand():
    # Two chunks: all-to-all 2 s, gather 1 s, experts 4 s, scatter 1 s. The experts fill 3 to 11 s; then 1 s and 2 s.
    part = Chunk(exchange_s=2.0, gather_s=1.0, expert_s=4.0, scatter_s=1.0)
    assert fsmoe.three_stream_s(2, part) == 14.0 == fsmoe.paper_s(2, part)
    assert fsmoe.window_s(2, part) == 6.0 and fsmoe.inter_node_s(2, part) == 8.0
    assert fsmoe.three_stream_s(2, part, 6.0) == 14.0 and fsmoe.three_stream_s(2, part, 7.0) == 15.0
    assert fsmoe.two_stream_s(2, part) == 14.0 and fsmoe.serial_s(2, part, 1.0) == 21.0
    # The experts twice, by both of their constants.
    lines = fsmoe.Lines(**dict.fromkeys(fsmoe.Lines.__slots__, AlphaBeta(startup_s=1.0, unit_s=2.0)))
    assert fsmoe.backward(lines).experts.time_s(5.0) == 22.0 and fsmoe.backward(lines).gather == lines.gather


def test_what_is_exposed_and_imperfect_overlap():
    assert fsmoe.exposed_gradient_s(5.0) == 5.0 and fsmoe.exposed_gradient_s(5.0, 2.0) == 3.0
    assert fsmoe.exposed_gradient_s(np.array([5.0, 1.0]), 2.0).tolist() == [3.0, 0.0]
    assert fsmoe.imperfect_s(10.0, 20.0, 0.3) == 13.0


# ---------------------------------------------------------------- laws

seconds = st.floats(1e-3, 1e3)
degrees = st.integers(1, 12)
chunks = st.builds(Chunk, **dict.fromkeys(PARTS, seconds))


@given(r=degrees, part=chunks, gradient_s=st.floats(0, 1e3))
@QUICK
def test_closed_forms_equal_the_event_simulation(r, part, gradient_s):
    assert fsmoe.three_stream_s(r, part, gradient_s) == pytest.approx(three_streams(r, part, gradient_s), rel=1e-9)
    assert fsmoe.two_stream_s(r, part, gradient_s) == pytest.approx(two_streams(r, part, gradient_s), rel=1e-9)


@given(r=degrees, part=chunks, gradient_s=st.floats(0, 1e3))
@QUICK
def test_the_paper_is_a_lower_bound_and_exact_for_equal_gather_and_scatter(r, part, gradient_s):
    exact_s = fsmoe.three_stream_s(r, part, gradient_s)
    assert fsmoe.paper_s(r, part, gradient_s) <= exact_s * (1 + 1e-12)
    same = replace(part, scatter_s=part.gather_s)
    assert fsmoe.paper_s(r, same, gradient_s) == pytest.approx(fsmoe.three_stream_s(r, same, gradient_s), rel=1e-9)


@given(r=degrees, part=chunks, gradient_s=st.floats(0, 1e3), name=st.sampled_from([*PARTS, "gradient"]), more=st.floats(1, 10))
@pytest.mark.parametrize("schedule_s", EXACT, ids=lambda s: s.__name__)
@QUICK
def test_longer_parts_take_no_less(schedule_s, r, part, gradient_s, name, more):
    if name == "gradient":
        longer_s = schedule_s(r, part, gradient_s * more)
    else:
        longer_s = schedule_s(r, replace(part, **{name: getattr(part, name) * more}), gradient_s)
    # Not so for the paper's cases: where a longer gather passes the all-to-all, another one holds and the time jumps.
    assert longer_s >= schedule_s(r, part, gradient_s) * (1 - 1e-12)


@given(r=degrees, part=chunks, gradient_s=st.floats(0, 1e3))
@QUICK
def test_between_the_busiest_stream_and_the_sum(r, part, gradient_s):
    a, g, e, s = (getattr(part, k) for k in PARTS)
    busiest = max(2 * r * a + gradient_s, r * (g + s), r * e)
    three_s, two_s = fsmoe.three_stream_s(r, part, gradient_s), fsmoe.two_stream_s(r, part, gradient_s)
    assert busiest <= three_s * (1 + 1e-12)
    assert three_s <= fsmoe.serial_s(r, part, gradient_s) * (1 + 1e-12)
    assert max(r * (2 * a + g + s) + gradient_s, r * e) <= two_s * (1 + 1e-12)
    assert two_s <= fsmoe.serial_s(r, part, gradient_s) * (1 + 1e-12)
    assert three_s <= two_s * (1 + 1e-12)
    window = fsmoe.window_s(r, part)
    assert fsmoe.three_stream_s(r, part, window) == pytest.approx(fsmoe.three_stream_s(r, part), rel=1e-9)


@given(part=chunks)
@pytest.mark.parametrize("schedule_s", SCHEDULES, ids=lambda s: s.__name__)
@QUICK
def test_one_chunk_is_the_sum(schedule_s, part):
    assert schedule_s(1, part) == pytest.approx(2 * part.exchange_s + part.gather_s + part.expert_s + part.scatter_s)


@given(r=degrees, d=seconds, e=seconds)
@QUICK
def test_pipemoe_has_no_gather(r, d, e):
    part = Chunk(exchange_s=d, gather_s=0.0, expert_s=e, scatter_s=0.0)
    assert fsmoe.two_stream_s(r, part) == pytest.approx(max(2 * d + e + (r - 1) * max(d, e), 2 * r * d))


@given(rows=st.lists(st.tuples(degrees, chunks, st.floats(0, 1e3)), min_size=1, max_size=6))
@pytest.mark.parametrize("schedule_s", [*SCHEDULES, fsmoe.paper_case], ids=lambda s: s.__name__)
@QUICK
def test_arrays_equal_numbers(schedule_s, rows):
    together = Chunk(**{k: np.array([getattr(part, k) for _, part, _ in rows]) for k in PARTS})
    took = schedule_s(np.array([r for r, _, _ in rows]), together, np.array([t for _, _, t in rows]))
    assert took.tolist() == pytest.approx([float(schedule_s(*row)) for row in rows])


fits = st.builds(AlphaBeta, startup_s=st.floats(1e-6, 1e-3), unit_s=st.floats(1e-12, 1e-9))
all_lines = st.builds(fsmoe.Lines, **dict.fromkeys(fsmoe.Lines.__slots__, fits))


@given(bytes_=st.lists(st.floats(1e3, 1e9), min_size=1, max_size=4), lines=all_lines, gradient_s=st.floats(0, 0.1))
@QUICK
def test_the_best_degree_is_the_best(bytes_, lines, gradient_s):
    size = MoeSize(
        token_bytes=1.0, slot_bytes=np.array(bytes_), expert_flop=np.array(bytes_) * 1e3, mp_ranks=2, esp_ranks=2, ep_ranks=4
    )
    work = fsmoe.volumes(size)
    degree, took = fsmoe.best_degree(work, lines, size, gradient_s=gradient_s, degrees=range(1, 9))
    for r in range(1, 9):
        other = fsmoe.three_stream_s(r, fsmoe.chunk(work, lines, r, size), gradient_s)
        assert (took <= other).all()
        assert (took[degree == r] == other[degree == r]).all()
    # The first axis counts degrees; one number for the exchange and several for the experts are one case each.
    degree, took = fsmoe.best_degree(fsmoe.volumes(replace(size, slot_bytes=1e6)), lines, size, gradient_s=gradient_s)
    assert took.shape == degree.shape == (len(bytes_),) and set(degree.tolist()) <= set(fsmoe.DEGREES)
