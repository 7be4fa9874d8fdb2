"""The rule of growing onto GPUs that are free for a while."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Trace, stays_s
from moeplan.planner.elastic.elastic_plan import Transition
from moeplan.planner.elastic.growth import Growth, steps_up

HALF_MORE = Growth(rate=1.0, grown_rate=1.5, grow_s=60.0, shrink_s=60.0)


def test_published_check_values() -> None:
    assert HALF_MORE.least_s == 300.0
    assert HALF_MORE.mean_gain(120.0) < 0.0 < HALF_MORE.mean_gain(300.0)


@given(st.floats(0.1, 10.0), st.floats(1.01, 10.0), st.floats(2.0, 500.0), st.floats(0.0, 500.0))
def test_gain_is_positive_from_the_threshold_on(rate: float, more: float, grow_s: float, shrink_s: float) -> None:
    growth = Growth(rate=rate, grown_rate=rate * more, grow_s=grow_s, shrink_s=shrink_s)
    below, at, above = growth.gain(growth.least_s + np.array([-1.0, 0.0, 1.0]))
    assert below < 0.0 < above
    assert at == pytest.approx(0.0, abs=1e-6 * rate * more * (1.0 + growth.least_s))


def test_mean_gain_is_the_mean_over_exponential_times() -> None:
    stays = np.random.default_rng(5).exponential(200.0, 400_000)
    assert HALF_MORE.recorded_gain(list(stays)) == pytest.approx(HALF_MORE.mean_gain(200.0), abs=1.0)
    # what was idle for a while is as good as new
    assert HALF_MORE.recorded_gain(list(stays), idle_s=300.0) == pytest.approx(HALF_MORE.mean_gain(200.0), abs=3.0)


def test_recorded_times_that_were_long_stay_long() -> None:
    stays = [30.0] * 90 + [5000.0] * 10
    assert HALF_MORE.recorded_gain(stays) < HALF_MORE.recorded_gain(stays, idle_s=60.0) == HALF_MORE.gain(4940.0)
    with pytest.raises(ProblemError, match="no recorded time is above 6000 s; the longest of 100 is 5000 s"):
        HALF_MORE.recorded_gain(stays, idle_s=6000.0)


def test_growing_to_a_slower_layout_never_pays() -> None:
    assert Growth(rate=2.0, grown_rate=1.9, grow_s=1.0, shrink_s=1.0).least_s == float("inf")


def test_rates_that_cannot_be() -> None:
    with pytest.raises(ProblemError, match="from -1 to 2 samples/s"):
        Growth(rate=-1.0, grown_rate=2.0, grow_s=0.0, shrink_s=0.0)
    with pytest.raises(ProblemError, match="growing in -3 s"):
        Growth(rate=1.0, grown_rate=2.0, grow_s=-3.0, shrink_s=0.0)


def test_steps_to_layouts_that_are_no_faster_are_left_out() -> None:
    def change(before: int, after: int, seconds: float) -> Transition:
        kind: Any = "planned" if after > before else "unplanned"
        return Transition(
            before=before, after=after, kind=kind, moved_bytes=0.0, lost_bytes=0.0, rollback=False, seconds={"group": seconds}
        )

    changes = [change(3, 2, 60.0), change(2, 3, 60.0), change(4, 3, 9.0), change(3, 4, 0.0)]
    (one,) = steps_up(changes, {2: 1.0, 3: 1.5, 4: 1.5}, stay_s=120.0)
    assert (one.before, one.after, one.least_s) == (2, 3, 300.0) and one.gain == HALF_MORE.mean_gain(120.0) < 0.0
    trace = Trace(times_s=(0.0, 100.0, 250.0, 300.0, 450.0, 1050.0), nodes=(2, 3, 4, 2, 3, 2))
    assert stays_s(trace, 3) == [200.0, 600.0] and stays_s(trace, 5) == []
    (one,) = steps_up(changes, {2: 1.0, 3: 1.5, 4: 1.5}, trace=trace)
    assert one.stay_s == 400.0 and one.gain == HALF_MORE.recorded_gain([200.0, 600.0])
    (one,) = steps_up(changes, {2: 1.0, 3: 0.9, 4: 0.9}, stay_s=1e9)
    assert one.data()["pays_after_s"] is None and one.data()["grow"] is False
