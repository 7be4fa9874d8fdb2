"""Gradients to windows by MILP: known optima, agreement with the dynamic programme, groups of equal layers, the time limit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pulp
import pytest

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.gradients import BackwardLayer, Partition, Slot, exposed_s, greedy, partition
from moeplan.planner.partition import gradients_by_milp
from tests.costmodels.moe.test_gradients import GOLDENS, PRINTED, instance
from tests.costmodels.moe.vectors import MS

SOLVERS = ["usual", "cbc"]
NOTHING = Slot(alone_s=(0.0,), busy_s=(0.0,))


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS where it is installed, and CBC."""
    if request.param == "cbc":
        monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])


def solved(layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    found = gradients_by_milp(layers, line)
    assert found is not None
    return found


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("row", GOLDENS, ids=lambda r: f"{r['testbed']}-{r['model']}-{r['B']:g}")
def test_instances_with_known_optima(row: dict[str, float]) -> None:
    layers, line = instance(row)
    assert solved(layers, line).total_s / MS == pytest.approx(row["t_milp_ms"], rel=1e-6, abs=PRINTED)


def random_layer(rng: random.Random, scale: float) -> BackwardLayer:
    longest_s = rng.choice([0, 1, 1, 1, 1]) * rng.uniform(0.5, 20.0)
    alone = [longest_s * rng.uniform(0.7, 1.0) for _ in range(rng.randint(1, 4))]
    moe = Slot(alone_s=tuple(alone), busy_s=tuple(t * rng.choice([0.0, rng.random(), rng.random(), 1.0]) for t in alone))
    dense_s = rng.choice([0.0, rng.uniform(0.0, 10.0)])
    return BackwardLayer(
        dense_s=dense_s, moe=moe, gradient_bytes=rng.choice([0.0, 0.1, 1.0, 1.0, 1e5]) * rng.uniform(1.0, 40.0)
    )


def random_layers(rng: random.Random, arrangement: str) -> list[BackwardLayer]:
    scale = rng.choice([0.1, 0.5, 1.0, 1e5])
    kinds = [random_layer(rng, scale) for _ in range(7)]
    if arrangement == "blocks":
        return [kind for kind in kinds[:3] for _ in range(rng.randint(1, 4))]
    if arrangement == "alternating":
        return kinds[:2] * rng.randint(1, 4)
    if arrangement == "all early":
        late = [replace(kind, gradient_bytes=0.0) for kind in kinds[:2]]
        return kinds[2:5] + [layer for layer in late for _ in range(rng.randint(1, 2))]
    return kinds


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("arrangement", ["unequal", "blocks", "alternating", "all early"])
def test_equals_the_dynamic_programme(arrangement: str) -> None:
    rng = random.Random(arrangement)
    better = 0
    for _ in range(80):
        layers = random_layers(rng, arrangement)
        line = AlphaBeta(startup_s=rng.choice([0.0, rng.uniform(0.0, 6.0)]), unit_s=rng.uniform(0.05, 2.0))
        best, found = partition(layers, line), solved(layers, line)
        assert found.total_s == pytest.approx(best.total_s, rel=1e-7)
        assert sum(map(sum, found.pieces_bytes)) + found.tail_bytes == pytest.approx(sum(x.gradient_bytes for x in layers))
        better += best.total_s < greedy(layers, line).total_s * (1.0 - 1e-6)
    assert better > 10  # the first step alone is not the answer


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e9])
def test_scale_does_not_matter(unit: float) -> None:
    rng = random.Random(4)
    layers, line = random_layers(rng, "unequal"), AlphaBeta(startup_s=0.5, unit_s=0.3)
    scaled = [
        BackwardLayer(
            dense_s=x.dense_s * unit,
            moe=Slot(alone_s=tuple(t * unit for t in x.moe.alone_s), busy_s=tuple(t * unit for t in x.moe.busy_s)),
            gradient_bytes=x.gradient_bytes,
        )
        for x in layers
    ]
    seconds = solved(scaled, AlphaBeta(startup_s=0.5 * unit, unit_s=0.3 * unit)).total_s
    assert seconds == pytest.approx(partition(layers, line).total_s * unit, rel=1e-7)


def test_nothing_to_choose() -> None:
    line = AlphaBeta(startup_s=1.0, unit_s=0.5)
    assert solved([], line).total_s == 0.0
    lone = [BackwardLayer(dense_s=3.0, moe=NOTHING, gradient_bytes=10.0)]
    assert solved(lone, line).total_s == exposed_s(lone, line) == 9.0
    quiet = [replace(lone[0], gradient_bytes=0.0)] * 2
    assert solved(quiet, line).total_s == 6.0


@pytest.mark.usefixtures("solver")
def test_the_rest_travels_in_a_window_rather_than_the_tail() -> None:
    # as in the test of the dynamic programme: 1 s more in the dense window after all has arrived, or 3 s of a tail
    line = AlphaBeta(startup_s=3.0, unit_s=1.0)
    last = BackwardLayer(dense_s=2.0, moe=Slot(alone_s=(1.0,), busy_s=(0.0,)), gradient_bytes=0.0)
    layers = [BackwardLayer(dense_s=0.0, moe=NOTHING, gradient_bytes=5.0), last]
    found = solved(layers, line)
    assert found.total_s == 9.0 and found.pieces_bytes == ((0.0, 0.0), (5.0, 0.0)) and found.tail_bytes == 0.0
    free = AlphaBeta(startup_s=3.0, unit_s=0.0)
    assert solved(layers, free).total_s == partition(layers, free).total_s == 4.0


@pytest.mark.usefixtures("solver")
def test_what_is_not_proven_in_time_is_no_answer() -> None:
    # a knapsack of 40 windows; solvers find good subsets at once and prove none the best for long
    rng = random.Random(3)
    rooms = [rng.uniform(1.0, 2.0) for _ in range(40)]
    moe = [Slot(alone_s=(2.0, 2.0 + x / 2), busy_s=(2.0, 2.0 - x / 2)) for x in rooms]
    layers = [BackwardLayer(dense_s=0.0, moe=NOTHING, gradient_bytes=sum(rooms) / 2)]
    layers += [BackwardLayer(dense_s=0.0, moe=m, gradient_bytes=0.0) for m in moe]
    layers += [BackwardLayer(dense_s=0.0, moe=NOTHING, gradient_bytes=1.0)]
    assert gradients_by_milp(layers, AlphaBeta(startup_s=0.0, unit_s=1.0), time_limit_s=0.3) is None
