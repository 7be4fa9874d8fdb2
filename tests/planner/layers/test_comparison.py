"""Measured layers beside predictions: ratios, places and correlations by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from moeplan.planner.layers.comparison import TimedRun, compare
from moeplan.planner.layers.runs import predict
from tests.conftest import TWO_NODES
from tests.planner.layers.test_runs import run

ASKED = [("hierarchical", 1), ("s1", 1), ("fsmoe", 2), ("fsmoe", 4), ("baseline", 1)]
KAPPA = TWO_NODES.overlap_loss


def timed(factors: Mapping[str, float]) -> list[TimedRun]:
    """Runs that take `factors` times what is predicted, by schedule."""
    out = []
    for schedule, degree in ASKED:
        for direction in ("forward", "backward"):
            row = run(schedule, degree, direction)
            said = predict(row, TWO_NODES)
            factor = factors.get(schedule, 1.0)
            row = dataclasses.replace(row, measured_layer_s=factor * said.seconds(KAPPA))
            out.append(TimedRun(run=row, tasks={kind: factor * s for kind, s in said.tasks.items()}))
    return out


def test_what_is_right_by_a_factor_correlates() -> None:
    found = compare(timed(dict.fromkeys(("hierarchical", "s1", "fsmoe", "baseline"), 2.0)), TWO_NODES)
    assert found.correlation == pytest.approx(1.0) and found.rank_correlation == pytest.approx(1.0)
    assert found.median_ratio == pytest.approx(0.5) == found.runs[0].ratio
    assert all(s.predicted_place == s.measured_place == i for i, s in enumerate(found.schedules, 1))
    for each in found.runs:
        assert all(measured == pytest.approx(2.0 * predicted) for predicted, measured in each.tasks.values())


def test_a_schedule_takes_its_best_chunks_both_ways() -> None:
    found = compare(timed({}), TWO_NODES)
    runs = {(r.run.schedule, r.run.degree, r.run.direction): r.predicted_s for r in found.runs}
    fsmoe = next(s for s in found.schedules if s.name == "fsmoe")
    assert fsmoe.measured_s == sum(min(runs["fsmoe", r, way] for r in (2, 4)) for way in ("forward", "backward"))
    assert runs["fsmoe", fsmoe.forward_degree, "forward"] <= runs["fsmoe", 6 - fsmoe.forward_degree, "forward"]


def test_another_order_shows() -> None:
    found = compare(timed({"fsmoe": 50.0}), TWO_NODES)
    fsmoe = found.schedules[-1]
    assert (fsmoe.name, fsmoe.measured_place) == ("fsmoe", 4) and fsmoe.predicted_place < 4
    assert found.rank_correlation is not None and found.rank_correlation < 1.0


def test_two_runs_have_no_correlation() -> None:
    found = compare(timed({})[:2], TWO_NODES)
    assert found.correlation is None and found.rank_correlation is None and len(found.schedules) == 1
