"""Gradient partitioning: instances with known optima, a mixed-integer twin, every amount on a grid, laws."""

import functools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.fsmoe import DEGREES, inter_node_s, three_stream_s
from moeplan.costmodels.moe.gradients import BackwardLayer, Slot, exposed_s, fit_bytes, greedy, partition, priced
from moeplan.errors import ScheduleError
from tests.costmodels.moe.vectors import FP32, MS, line, rows_of

GOLDENS = rows_of("fsmoe_gradient_partition_goldens")
PRINTED = 5e-6
"""Half of the last digit of the printed times."""
LINE = AlphaBeta(startup_s=1.0, unit_s=0.5)
EXACT = {"mip_rel_gap": 0.0}
WINDOW = Slot(alone_s=(1.0,), busy_s=(0.0,))


def instance(row):
    """The equal layers of an instance, by the paper's chunk times, and the line of its all-reduce."""
    r = np.array(DEGREES)
    names = {"D": "a", "G": "g", "E": "e_bwd", "S": "s", "C": "a"}
    part = {k: (row[f"{v}_alpha"] + row[f"{v}_betan"] / r) * MS for k, v in names.items()}
    moe = Slot(alone_s=tuple(three_stream_s(r, part).tolist()), busy_s=tuple(inter_node_s(r, part).tolist()))
    layer = BackwardLayer(dense_s=row["dense_bwd_ms"] * MS, moe=moe, gradient_bytes=row["grad_elems_per_layer"] * FP32)
    return [layer] * int(row["n_layers"]), line(row["ar_alpha"], row["ar_beta"])


@pytest.mark.parametrize("row", GOLDENS, ids=lambda r: f"{r['testbed']}-{r['model']}-{r['B']:g}")
def test_instances_with_known_optima(row):
    layers, line = instance(row)
    assert row["r_set"] == "1;2;4;8" and row["t_milp_ms"] == row["t_dp_ms"]
    assert exposed_s(layers, line) / MS == pytest.approx(row["t_all_exposed_ms"], rel=1e-6, abs=PRINTED)
    assert greedy(layers, line).total_s / MS == pytest.approx(row["t_greedy_step1_ms"], rel=1e-6, abs=PRINTED)
    assert partition(layers, line).total_s / MS == pytest.approx(row["t_dp_ms"], rel=1e-6, abs=PRINTED)


def test_by_hand():
    # 10 bytes arrive after the first layer; all-reduce: 1 s and 0.5 s a byte. Dense windows of 2 s hold 2 bytes.
    moe = Slot(alone_s=(10.0, 9.0), busy_s=(4.0, 8.0))
    assert list(moe.fits(LINE)) == [10.0, 0.0]
    assert moe.seconds(0.0, LINE) == 9.0 and moe.seconds(10.0, LINE) == 10.0 and moe.seconds(12.0, LINE) == 11.0
    layers = [BackwardLayer(dense_s=2.0, moe=moe, gradient_bytes=10.0), BackwardLayer(dense_s=2.0, moe=moe, gradient_bytes=0.0)]
    # All exposed: 22 s and 6 s. Greedy: 2 bytes in the dense window, none at the 9 s chunking, 8 bytes exposed: 5 s.
    assert exposed_s(layers, LINE) == 28.0
    first = greedy(layers, LINE)
    assert first.total_s == 27.0 and first.pieces_bytes == ((0.0, 0.0), (2.0, 0.0)) and first.tail_bytes == 8.0
    # Best: the other chunking is 1 s longer and hides them all.
    best = partition(layers, LINE)
    assert best.total_s == 23.0 and best.tail_bytes == 0.0 and sum(best.pieces_bytes[1]) == 10.0
    assert partition([], LINE).total_s == 0.0


def test_what_fits():
    assert fit_bytes(np.array([0.0, 1.0, 3.0]), LINE).tolist() == [0.0, 0.0, 4.0]
    assert fit_bytes(3.0, AlphaBeta(startup_s=np.array([1.0, 2.0]), unit_s=np.array([0.5, 0.0]))).tolist() == [4.0, np.inf]


def test_bytes_at_no_cost():
    # A start-up of 1 s and nothing a byte: what arrives at the end of the first layer hides in any window of 1 s.
    free = AlphaBeta(startup_s=1.0, unit_s=0.0)
    moe = Slot(alone_s=(3.0,), busy_s=(2.5,))
    layers = [BackwardLayer(dense_s=0.9, moe=moe, gradient_bytes=n) for n in (10.0, 0.0)]
    # 0.9 s are too short by 0.1 s, the 0.5 s of the layer by 0.5 s.
    best = partition(layers, free)
    assert best.total_s == pytest.approx(7.9) and best.pieces_bytes == ((0.0, 0.0), (10.0, 0.0)) and best.tail_bytes == 0.0
    assert greedy(layers, free).total_s == pytest.approx(8.8)
    longer = [layers[0], replace(layers[1], dense_s=1.0)]
    assert partition(longer, free).total_s == greedy(longer, free).total_s == pytest.approx(7.9)


def test_the_rest_travels_in_a_window_rather_than_the_tail():
    # All has arrived before the second layer. Its windows lengthen by 1 s and 2 s if anything travels: less than 3 s of a tail.
    slow = AlphaBeta(startup_s=3.0, unit_s=1.0)
    layers = [
        BackwardLayer(dense_s=0.0, moe=Slot(alone_s=(0.0,), busy_s=(0.0,)), gradient_bytes=5.0),
        BackwardLayer(dense_s=2.0, moe=Slot(alone_s=(1.0,), busy_s=(0.0,)), gradient_bytes=0.0),
    ]
    best = partition(layers, slow)
    assert best.total_s == 9.0 and best.pieces_bytes == ((0.0, 0.0), (5.0, 0.0)) and best.tail_bytes == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slot(alone_s=(), busy_s=()), "a window has 0 times alone and 0 busy ones"),
        (lambda: Slot(alone_s=(1.0, 2.0), busy_s=(1.0,)), "a window has 2 times alone and 1 busy ones"),
        (lambda: Slot(alone_s=(-1.0,), busy_s=(0.0,)), "a window alone: -1 s"),
        (lambda: Slot(alone_s=(float("nan"),), busy_s=(0.0,)), "a window alone: nan s"),
        (lambda: Slot(alone_s=(1.0,), busy_s=(-0.5,)), "the busy part of a window: -0.5 s"),
        (lambda: Slot(alone_s=(1.0,), busy_s=(2.0,)), "a window of 1 s is busy for 2 s"),
        (lambda: BackwardLayer(dense_s=float("inf"), moe=WINDOW, gradient_bytes=1.0), "the dense part of a layer: inf s"),
        (lambda: BackwardLayer(dense_s=1.0, moe=WINDOW, gradient_bytes=-8.0), "the gradients of a layer: -8 bytes"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ScheduleError) as caught:
        make()
    assert caught.value.message == message and caught.value.hint


# ---------------------------------------------------------------- twins


def by_milp(layers, line):
    """Optimum of the same problem as a mixed-integer programme: one chunking a slot, start-up of each piece as a binary."""
    slots = [slot for layer in layers for slot in layer.slots]
    all_bytes = sum(layer.gradient_bytes for layer in layers)
    n, widths = len(slots), [len(slot.alone_s) for slot in slots]
    # Variables: T (slot times), x (pieces and the tail), w (pieces that are sent), z (chunkings of all slots).
    first_z = n + 2 * (n + 1)
    width = first_z + sum(widths)
    rows, low, high = [], [], []

    def require(terms, at_least, at_most=np.inf):
        row = np.zeros(width)
        for index, value in terms:
            row[index] += value
        rows.append(row)
        low.append(at_least)
        high.append(at_most)

    offset, arrived = first_z, 0.0
    for i, slot in enumerate(slots):
        z = range(offset, offset + widths[i])
        offset += widths[i]
        require([(k, 1.0) for k in z], 1.0, 1.0)
        # T >= alone(z) and T >= busy(z) + alpha w + beta x
        require([(i, 1.0), *((k, -a) for k, a in zip(z, slot.alone_s, strict=True))], 0.0)
        sent = [(2 * n + 1 + i, -line.startup_s), (n + i, -line.unit_s)]
        require([(i, 1.0), *sent, *((k, -b) for k, b in zip(z, slot.busy_s, strict=True))], 0.0)
        # Sent only after it arrived.
        require([(n + j, 1.0) for j in range(i + 1)], 0.0, arrived)
        arrived += layers[i // 2].gradient_bytes if i % 2 else 0.0
    for i in range(n + 1):
        require([(2 * n + 1 + i, all_bytes), (n + i, -1.0)], 0.0)
    require([(n + i, 1.0) for i in range(n + 1)], all_bytes, all_bytes)
    cost = np.zeros(width)
    cost[:n], cost[2 * n], cost[3 * n + 1] = 1.0, line.unit_s, line.startup_s
    binary = np.arange(width) >= 2 * n + 1
    top = np.where(binary, 1.0, np.inf)
    found = milp(cost, constraints=LinearConstraint(rows, low, high), integrality=binary, bounds=Bounds(0, top), options=EXACT)
    assert found.success, found.message
    return found.fun


@st.composite
def slots(draw, degrees=3):
    alone = draw(st.lists(st.floats(0.5, 20), min_size=1, max_size=degrees))
    return Slot(alone_s=tuple(alone), busy_s=tuple(t * draw(st.floats(0, 1)) for t in alone))


layers_ = st.builds(
    BackwardLayer,
    dense_s=st.just(0.0) | st.floats(0, 10),
    moe=slots(),
    gradient_bytes=st.just(0.0) | st.floats(0.1, 40),
)
lines = st.builds(AlphaBeta, startup_s=st.floats(0, 3), unit_s=st.floats(0.05, 2))


@given(layers=st.lists(layers_, min_size=1, max_size=5), line=lines)
@settings(max_examples=150, deadline=None)
def test_equals_the_mixed_integer_programme(layers, line):
    # The solver takes 1e-6 for zero, in binaries that stand for up to 200 bytes.
    assert partition(layers, line).total_s == pytest.approx(by_milp(layers, line), rel=1e-6, abs=1e-3)


def on_a_grid(layers, line):
    """Optimum over all whole numbers of bytes in every window; exact where all data are whole numbers and beta is 1."""
    slots = [(slot, place) for layer in layers for place, slot in enumerate(layer.slots)]

    @functools.cache
    def rest_s(i, pending):
        if i == len(slots):
            return line.time_s(pending) if pending else 0.0
        slot, place = slots[i]
        arriving = int(layers[i // 2].gradient_bytes) * place
        return min(slot.seconds(x, line) + rest_s(i + 1, pending - x + arriving) for x in range(pending + 1))

    return rest_s(0, 0)


@st.composite
def whole_layers(draw):
    alone = draw(st.lists(st.integers(0, 15), min_size=1, max_size=4))
    moe = Slot(alone_s=tuple(alone), busy_s=tuple(draw(st.integers(0, t)) for t in alone))
    return BackwardLayer(dense_s=draw(st.integers(0, 6)), moe=moe, gradient_bytes=draw(st.sampled_from([0, 0, 1, 3, 8, 20])))


@given(
    kinds=st.lists(whole_layers(), min_size=1, max_size=3),
    order=st.lists(st.integers(0, 2), max_size=6),
    alpha=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_best_on_a_grid(kinds, order, alpha):
    layers = [kinds[k % len(kinds)] for k in order]
    line = AlphaBeta(startup_s=alpha, unit_s=1)
    assert partition(layers, line).total_s == pytest.approx(on_a_grid(layers, line), rel=1e-8, abs=1e-9)


def test_many_unequal_layers():
    # Without the bound on what is left to hide, the states would double with every layer.
    rng = np.random.default_rng(7)
    layers = []
    for _ in range(64):
        alone = rng.uniform(0.5, 20, 8)
        moe = Slot(alone_s=tuple(alone), busy_s=tuple(alone * rng.uniform(0, 1, 8)))
        layers.append(BackwardLayer(dense_s=rng.uniform(0, 10), moe=moe, gradient_bytes=rng.uniform(1, 40)))
    line = AlphaBeta(startup_s=1.0, unit_s=0.4)
    started = time.perf_counter()
    best = partition(layers, line)
    assert time.perf_counter() - started < 5.0
    hidden_s = sum(slot.seconds(0.0, line) for layer in layers for slot in layer.slots)
    assert hidden_s < best.total_s < greedy(layers, line).total_s * 0.999


def test_a_knapsack():
    # Twelve windows, of which some subset holds what arrives first almost exactly, at half of what it hides.
    rooms = np.random.default_rng(3).uniform(1, 2, 12)
    sizes = np.array([bin(i).count("1") for i in range(1 << 12)])
    sums = np.array([rooms[[i >> k & 1 == 1 for k in range(12)]].sum() for i in range(1 << 12)])
    target = sums[sizes == 6].mean()
    moe = [Slot(alone_s=(2.0, 2.0 + x / 2), busy_s=(2.0, 2.0 - x / 2)) for x in rooms]
    first = BackwardLayer(dense_s=0.0, moe=Slot(alone_s=(0.0,), busy_s=(0.0,)), gradient_bytes=target)
    later = [BackwardLayer(dense_s=0.0, moe=m, gradient_bytes=0.0) for m in moe]
    layers = [first, *later, replace(first, gradient_bytes=1.0)]
    best_s = (np.minimum(sums, target) - sums / 2).max()
    total_s = partition(layers, AlphaBeta(startup_s=0.0, unit_s=1.0)).total_s
    assert total_s == pytest.approx(24.0 + target + 1.0 - best_s, rel=1e-8)


# ---------------------------------------------------------------- laws


@given(layers=st.lists(layers_, min_size=1, max_size=8), line=lines)
@settings(max_examples=200, deadline=None)
def test_bounds_and_bytes(layers, line):
    best, first = partition(layers, line), greedy(layers, line)
    hidden_s = sum(slot.seconds(0.0, line) for layer in layers for slot in layer.slots)
    assert hidden_s <= best.total_s <= first.total_s * (1 + 1e-9)
    assert first.total_s <= exposed_s(layers, line) + line.startup_s + 1e-9
    for found in (best, first):
        assert sum(map(sum, found.pieces_bytes)) + found.tail_bytes == pytest.approx(sum(x.gradient_bytes for x in layers))
        # Nothing travels before it has arrived; the last gradients travel in the tail.
        sent = np.cumsum([sum(pair) for pair in found.pieces_bytes])
        arrived = np.cumsum([0.0, *(x.gradient_bytes for x in layers)])
        assert (sent <= arrived[:-1] * (1 + 1e-9)).all()
        assert found.tail_bytes >= layers[-1].gradient_bytes * (1 - 1e-9)
        assert priced(found.pieces_bytes, layers, line).total_s == found.total_s


@given(layers=st.lists(layers_, min_size=1, max_size=6), line=lines, more=st.floats(1, 3), at=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_more_gradients_and_slower_links_take_no_less(layers, line, more, at):
    total_s = partition(layers, line).total_s
    slower = AlphaBeta(startup_s=line.startup_s * more, unit_s=line.unit_s * more)
    assert partition(layers, slower).total_s >= total_s * (1 - 1e-9)
    i = at % len(layers)
    for change in ({"gradient_bytes": layers[i].gradient_bytes * more}, {"dense_s": layers[i].dense_s * more}):
        changed = [*layers[:i], replace(layers[i], **change), *layers[i + 1 :]]
        assert partition(changed, line).total_s >= total_s * (1 - 1e-9)
