"""Studies of one MoE layer: each schedule at its best chunks, what bounds it, where layouts change places, what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from moeplan.costmodels.moe.base import imperfect_s
from moeplan.costmodels.moe.constants import Constants, load_constants
from moeplan.costmodels.moe.lina import CHUNK_BYTES, Lina
from moeplan.costmodels.moe.schedules import PAIR_SCHEDULES, SCHEDULES, find_schedule
from moeplan.costmodels.simulate import makespan_s, simulate
from moeplan.errors import LayoutError, MoeplanError, ScheduleError, UsageError
from moeplan.planner.layers.crossover import LAYOUTS, RANGES, crossovers, order, terms
from moeplan.planner.layers.question import NUMBERS, SWEPT, Asked
from moeplan.planner.layers.study import Layer, best, compared, pair_s, shares, study

A, B = load_constants("fsmoe-a"), load_constants("fsmoe-b")
SIZES = {"batch": 4, "seq-len": 1024, "hidden": 4096, "expert-hidden": 14336, "top-k": 2}


def asked(constants=B, **numbers):
    own = {"element-bytes": constants.element_bytes, **constants.groups, **SIZES}
    return Asked(numbers=own | {name.replace("_", "-"): value for name, value in numbers.items()}, schedules=SCHEDULES)


def question(constants=B, **numbers):
    return asked(constants, **numbers).question(constants)


# -- the layer -----------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    layer = Layer(tokens=1000, hidden=10, expert_hidden=30, topk=2, capacity_factor=1.25, gemms=2, ep=4, element_bytes=4)
    assert layer.size.token_bytes == 40_000 and layer.size.slot_bytes == 100_000
    assert layer.size.expert_flop == 2 * 2 * 2500 * 10 * 30
    assert math.isinf(layer.capacity) and layer.takes(7)


def test_slots_are_whole_where_the_experts_are_stated():
    layer = Layer(tokens=1024, hidden=10, expert_hidden=30, topk=2, capacity_factor=1.2, experts=6, ep=6)
    assert layer.capacity == 410 and layer.size.slot_bytes == 6 * 410 * 10 * 2  # 2 x 1.2 x 1024 / 6 = 409.6
    assert [bool(layer.takes(r)) for r in (1, 2, 4, 5)] == [True, True, False, True]
    assert Layer(tokens=1000, hidden=1, expert_hidden=1, topk=3, capacity_factor=0.1, experts=3, ep=1).capacity == 100


BAD = [  # changes, error, message
    ({"tokens": 0}, UsageError, "tokens is 0, a number above 0 is needed"),
    ({"hidden": -4}, UsageError, "hidden is -4"),
    ({"expert_hidden": math.nan}, UsageError, "expert-hidden is nan"),
    ({"capacity_factor": math.inf}, UsageError, "capacity-factor is inf"),
    ({"esp": 1.5}, UsageError, "esp is 1.5, a whole number is needed"),
    ({"topk": 9, "experts": 8}, UsageError, "top-k 9 exceeds the 8 experts"),
    ({"mp": 3}, ScheduleError, "mp = 3 does not divide the ep x esp = 4 x 1 = 4 ranks"),
    ({"experts": 6}, ScheduleError, "ep = 4 does not divide the 6 experts"),
    ({"mp": np.array([1, 2, 3, 5])}, ScheduleError, "mp = 3 does not divide"),
    ({"tokens": np.array([5.0, -1.0])}, UsageError, "tokens is -1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_layers_that_cannot_be(changes, error, message):
    with pytest.raises(error) as caught:
        Layer(**({"tokens": 1024, "hidden": 8, "expert_hidden": 8, "topk": 2, "ep": 4} | changes))
    assert message in caught.value.message


# -- prices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constants", (A, B), ids=lambda c: c.name)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_prices_are_the_makespans_of_the_graphs(constants, schedule):
    asking = question(constants, gradient_bytes=21e6)
    size = asking.layer.size
    for direction in ("forward", "backward"):
        seconds, degree = best(asking, schedule, direction)
        spans = {}
        for r in asking.degrees if schedule.chunked else (1,):
            parts = dict(schedule.parts(size, asking.lines, r, direction))
            parts["R"] = asking.gradient_s() if direction == "backward" else 0.0
            graph = schedule.graph(r, size)
            spans[r] = makespan_s(graph, parts) if graph.in_order else simulate(graph, parts).makespan_s
        assert seconds == pytest.approx(min(spans.values()), rel=1e-12) and spans[int(degree)] == pytest.approx(seconds)


def test_arrays_equal_numbers():
    tokens = np.array([512, 1024, 4096])
    together = study(question(batch=1, seq_len=tokens, gradient_bytes=1e6))
    for i, n in enumerate(tokens):
        for row, alone in zip(together, study(question(batch=1, seq_len=int(n), gradient_bytes=1e6)), strict=True):
            assert row.total_s[i] == pytest.approx(float(alone.total_s), rel=1e-12)
            assert (row.forward_degree[i] if row.schedule.chunked else 1) == alone.forward_degree


def test_kappa_loses_part_of_what_overlap_gains():
    none, some, every = (study(question(kappa=kappa)) for kappa in (0.0, 0.4, 1.0))
    for ideal, real, serial in zip(none, some, every, strict=True):
        assert real.forward_s == pytest.approx(imperfect_s(ideal.forward_s, serial.forward_s, 0.4))
    by_name = {row.schedule.name: row for row in every}
    assert by_name["fsmoe"].forward_s == pytest.approx(by_name["hierarchical"].forward_s), "serial, in one chunk"


def test_chunks_that_do_not_divide_the_slots_are_left_out():
    rows = {row.schedule.name: row for row in study(question(experts=8, batch=1, seq_len=1026))}  # 257 slots, a prime
    assert rows["fsmoe"].forward_degree == rows["fsmoe"].backward_degree == 1
    none = best(
        dataclasses.replace(question(experts=8, batch=1, seq_len=1026), degrees=(2,)), find_schedule("fsmoe"), "forward"
    )
    assert none == (math.inf, 0)


def test_gradients_travel_in_the_backward_only():
    without, carried = (study(question(gradient_bytes=size)) for size in (0.0, 50e6))
    sent_s = B.given["gradient-all-reduce"].time_s(50e6)
    for old, new in zip(without, carried, strict=True):
        assert new.forward_s == old.forward_s
        gain = new.backward_s - old.backward_s
        assert -1e-12 <= gain <= sent_s * (2.0 if isinstance(new.schedule, Lina) else 1.0) + 1e-12
        if new.schedule.name in ("tutel", "s1", "hierarchical"):
            assert gain == pytest.approx(sent_s)


def test_lina_cuts_gradients_into_pieces():
    asking = question(gradient_bytes=3.5 * CHUNK_BYTES)
    assert [s.pieces for s in asking.schedules if isinstance(s, Lina)] == [4]
    assert 4 * asking.gradient_s(4) == pytest.approx(asking.gradient_s() + 3 * B.given["gradient-all-reduce"].startup_s)


def test_pairs_take_no_longer_than_one_direction_after_the_other():
    asking = dataclasses.replace(question(), pairs=PAIR_SCHEDULES)
    serial = next(row for row in study(asking) if row.schedule.name == "hierarchical")
    times = [pair_s(asking, pair) for pair in PAIR_SCHEDULES]
    assert times[1] <= times[0] <= serial.total_s
    assert pair_s(dataclasses.replace(asking, kappa=1.0), PAIR_SCHEDULES[0]) == pytest.approx(serial.total_s)


def test_compared_names_the_quickest_that_is_no_bound():
    found = compared(question(A, sequence_parallel=1), "s1")
    assert found.over.schedule.name == "s1"
    assert found.quickest.schedule.name == "fsmoe"
    assert min(found.rows, key=lambda row: float(row.total_s)).schedule.name == "comet"


def test_busy_shares():
    asking = question()
    for schedule in SCHEDULES:
        busy = shares(asking, schedule, 1, "forward")
        assert list(busy.values()) == sorted(busy.values(), reverse=True) and max(busy.values()) <= 1.0 + 1e-9
    serial = shares(asking, find_schedule("s1"), 1, "forward")
    assert sum(serial.values()) == pytest.approx(1.0)


# -- questions -----------------------------------------------------------------------------------------------------------

MISSTATED = [  # numbers, message
    ({"tokens": 5}, "tokens and batch x seq-len say the same"),
    ({"ranks": 30}, "ep x esp = 8 x 4 = 32 is not the 30 ranks"),
    ({"ranks": np.array([32, 33])}, "ep x esp = 8 x 4 = 32 is not the 33 ranks"),
    ({"kappa": 1.5}, "kappa is 1.5"),
    ({"kappa": np.array([0.1, -0.1])}, "kappa is -0.1"),
    ({"gradient_bytes": -1.0}, "gradient-bytes: a size of 0 or more"),
]


@pytest.mark.parametrize(("numbers", "message"), MISSTATED, ids=[message for _, message in MISSTATED])
def test_questions_that_contradict_themselves(numbers, message):
    with pytest.raises(MoeplanError) as caught:
        question(**numbers)
    assert message in caught.value.message


def test_ranks_give_the_groups():
    bare = Asked(numbers={**SIZES, "esp": 4, "ranks": 24}, schedules=())
    assert bare.layer().ep == 6
    with pytest.raises(LayoutError, match="esp = 5 does not divide the 24 ranks"):
        bare.layer({"esp": 5})


def test_every_missing_number_is_named():
    with pytest.raises(UsageError, match="missing --tokens, --hidden, --expert-hidden, --top-k, --ep"):
        Asked(numbers={"batch": 4}, schedules=()).layer()


def test_gradients_need_their_constant():
    bare = Constants(name="x", source="x", given={name: B.given[name] for name in B.given if name != "gradient-all-reduce"})
    with pytest.raises(UsageError, match="--gradient-bytes needs the constant gradient-all-reduce, which 'x' lacks"):
        asked(gradient_bytes=1e6).question(bare)


def test_swept_constants():
    assert {"a2a-us", "a2a-gb-per-s", "gemm-tflop-per-s", *NUMBERS} <= set(SWEPT)
    at = {"a2a-us": np.array([1.0, 2.0]), "gemm-tflop-per-s": 10.0}
    lines = asked().question(B, at).lines
    assert lines.exchange.startup_s.tolist() == [1e-6, 2e-6] and lines.exchange.unit_s == B.given["a2a"].unit_s
    assert lines.experts.unit_s == pytest.approx(1e-13) and lines.fused_exchange is lines.exchange
    with pytest.raises(UsageError, match="the sweep gives 'all-reduce' no all-reduce-gb-per-s"):
        asked().question(B, {"all-reduce-us": 1.0})
    with pytest.raises(UsageError, match="a2a-gb-per-s: rates above 0"):
        asked().question(B, {"a2a-gb-per-s": np.array([1.0, 0.0])})


# -- crossovers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", RANGES)
@pytest.mark.parametrize("constants", (A, B), ids=lambda c: c.name)
@pytest.mark.parametrize("groups", ({}, {"mp": 2}, {"esp": 1, "ep": 32}, {"mp": 1}), ids=str)
def test_another_layout_wins_on_each_side_of_a_crossover(constants, number, groups):
    if "ep" in groups:
        groups = {**groups, "mp": 4}
    asking = question(constants, **groups)
    changes = crossovers(asking, number)
    for change in changes:
        for factor, winner in ((1.0 - 1e-6, change.below), (1.0 + 1e-6, change.above)):
            layer = dataclasses.replace(asking.layer, **{number.replace("-", "_"): change.at * factor})
            rows = {r.schedule.name: float(r.total_s) for r in study(dataclasses.replace(asking, layer=layer))}
            assert rows[winner] <= min(rows[name] for name in LAYOUTS) * (1.0 + 1e-9)
    assert [c.above for c in changes[:-1]] == [c.below for c in changes[1:]]
    assert [c.at for c in changes] == sorted(c.at for c in changes)


def test_s1_passes_s2_at_the_large_size_inequality():
    """S1 and S2 with one expert shard: beta_g (1 - 1/kf) = beta_a / mp, without start-ups."""
    free = {name: dataclasses.replace(line, startup_s=0.0) for name, line in B.given.items()}
    fits = dataclasses.replace(B, given={**free, "a2a": dataclasses.replace(free["a2a"], unit_s=2e-10)})
    asking = asked(fits, mp=4, esp=1, ep=1024, hidden=4096).question(fits)
    asking = dataclasses.replace(asking, schedules=tuple(find_schedule(name) for name in LAYOUTS))
    gather, exchange = fits.given["all-gather"].unit_s, 2e-10
    kf = 1.0 / (1.0 - exchange / 4.0 / gather)
    low, high = (
        {r.schedule.name: float(r.total_s) for r in study(dataclasses.replace(asking, layer=layer))}
        for layer in (dataclasses.replace(asking.layer, capacity_factor=kf * f / 2.0) for f in (0.97, 1.03))
    )
    assert low["s2"] < low["s1"] and high["s1"] < high["s2"]


def test_terms_explain_the_order():
    for constants in (A, B):
        for groups in ({}, {"mp": 2}):
            asking = question(constants, **groups)
            rows = {row.schedule.name: float(row.forward_s) for row in study(asking)}
            t = terms(asking)
            assert rows["s1"] - rows["s2"] == pytest.approx(t.fused_s + t.token_gather_s - t.saa_s)
            inside = 2.0 * t.exchange_s + t.gather_s + t.scatter_s
            assert rows["s1"] - rows["hierarchical"] == pytest.approx(2.0 * t.fused_s - inside)
            assert order(asking) == tuple(sorted(LAYOUTS, key=lambda name: rows[name]))
    assert terms(question(A)).exchange_spared_s == pytest.approx(2.03e-9 / 4, rel=1e-3)  # per element in the source
