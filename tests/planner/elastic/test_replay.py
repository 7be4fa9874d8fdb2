"""A recorded history replayed by hand, against the published goodputs, and against the closed form."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Availability, Trace, occupancy
from moeplan.planner.elastic.choice import Choices, Option, choose, seconds_of
from moeplan.planner.elastic.replay import replay
from tests.planner.elastic.chances import option
from tests.planner.elastic.test_availability import simulated

DAY_S, REPAIR_S = 86400.0, 6 * 3600.0
FOUR, THREE = option("four", 8.0, 4), option("three", 6.0, 3)


def fixed(nodes: int, before: Option, then: int, after: Option) -> float:
    """10 s for a loss or a restart, 5 s for a return that changes the layout."""
    return 0.0 if then > nodes and before is after else 5.0 if then > nodes else 10.0


def test_by_hand() -> None:
    trace = Trace(times_s=(0.0, 100.0, 150.0, 250.0, 300.0, 400.0), nodes=(4, 3, 2, 3, 4, 4))
    elastic = replay(trace, "elastic", {4: FOUR, 3: THREE}, fixed)
    rigid = replay(trace, "rigid", {4: FOUR}, fixed)
    spared = replay(trace, "rigid with 1 spare", {3: THREE}, fixed)
    assert [r.name for r in (elastic, rigid, spared)] == ["elastic", "rigid", "rigid with 1 spare"]
    assert elastic.goodput == pytest.approx((8 * 100 + 6 * 40 + 6 * 40 + 8 * 95) / 400)
    assert (elastic.waiting_share, elastic.changing_share, elastic.changes) == pytest.approx((0.25, 25 / 400, 3))
    assert rigid.goodput == pytest.approx((8 * 100 + 8 * 90) / 400) and rigid.waiting_share == 0.5
    assert spared.goodput == pytest.approx(6 * (100 + 40 + 40 + 100) / 400) and spared.changes == 2


def test_a_change_that_outlasts_its_span_runs_on() -> None:
    trace = Trace(times_s=(0.0, 100.0, 104.0, 200.0), nodes=(4, 3, 4, 4))
    found = replay(trace, "elastic", {4: FOUR, 3: THREE}, fixed)
    # 6 of the 10 s are left when the fourth node is back, and the move back takes 5
    assert found.goodput == pytest.approx((800 + 8 * 90) / 200)
    assert found.changing_share == pytest.approx(10 / 200)


def test_failures_of_the_job_alone_slow_it_down() -> None:
    trace = Trace(times_s=(0.0, 1000.0), nodes=(4, 4))
    assert replay(trace, "rigid", {4: FOUR}, fixed, job_rate=0.01).goodput == pytest.approx(8.0 / 1.1)


def test_nothing_to_run() -> None:
    with pytest.raises(ProblemError, match="no option for elastic"):
        replay(Trace(times_s=(0.0, 1.0), nodes=(4, 4)), "elastic", {}, fixed)


def test_published_goodputs_of_rigid_jobs() -> None:
    """16 nodes that each fail every 20 days, 6 h of repair, 820 s lost a failure: a job that waits has 0.827 of full speed; two
    spares are always enough and give 0.882 of what 18 nodes would."""
    work_s = 20 * DAY_S / 16
    starts_s = np.arange(51) * (work_s + REPAIR_S)
    waits = Trace(times_s=tuple(np.stack([starts_s, starts_s + work_s]).T.ravel()[:-1]), nodes=(16, 15) * 50 + (16,))
    speed = option("on 16", 1.0, 16)
    assert replay(waits, "rigid", {16: speed}, lambda *_: 820.0).goodput == pytest.approx(0.827, abs=5e-4)
    ends_s = np.arange(51) * work_s
    covered = Trace(times_s=tuple(ends_s), nodes=tuple(18 - i % 2 for i in range(51)))

    def every_change(nodes: int, before: Option, then: int, after: Option) -> float:
        return 820.0

    spared = replay(covered, "rigid with 2 spares", {16: speed}, every_change)
    assert spared.goodput * 16 / 18 == pytest.approx(0.882, abs=5e-4)


def test_a_long_history_gives_the_closed_form() -> None:
    availability = Availability(node_mtbf_s=40_000.0, repair_s=2500.0)
    counts = (4, 5, 6)
    places = occupancy(availability, counts)
    options = [[option(f"on {n}", float(n), n)] for n in counts]

    def cost(nodes: int, before: Option, then: int, after: Option) -> float:
        return 40.0 if then > nodes else 60.0

    choices = Choices(occupancy=places, options=tuple(map(tuple, options)), seconds=seconds_of(places, options, cost))
    policy = {n: found[0] for n, found in zip(counts, options, strict=True)}
    found = replay(simulated(availability, 6, 30_000, 9), "elastic", policy, cost)
    # changes take time of the spans of a record, but come on top of those of the closed form
    assert found.goodput == pytest.approx(choose(choices).goodput * availability.running_share(4, 6), rel=5e-3)


def test_elastic_beats_rigid_where_moves_are_cheap() -> None:
    trace = simulated(Availability(node_mtbf_s=5 * DAY_S, repair_s=REPAIR_S), 16, 4000, 4)
    sized = {n: option(f"on {n}", float(n), n) for n in range(10, 17)}
    elastic = replay(trace, "elastic", sized, lambda *_: 300.0)
    rigid = [replay(trace, f"rigid with {k} spares", {16 - k: sized[16 - k]}, lambda *_: 300.0) for k in range(4)]
    assert elastic.goodput > max(r.goodput for r in rigid)
    assert [r.waiting_share for r in rigid] == sorted((r.waiting_share for r in rigid), reverse=True)
