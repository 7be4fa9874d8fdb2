"""Elastic plans of a tiny model: what is promised of counts, transitions and goodput, and monotone in what is asked."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Availability, Trace
from moeplan.planner.elastic.consistency import CLASSES, Consistency, changed
from moeplan.planner.elastic.saves import Overheads
from moeplan.planner.elastic.solve_elastic import Elastic, Wish, plan_elastic, replayed
from tests.planner.elastic.small import base

OFTEN = Availability(node_mtbf_s=4 * 3600.0, repair_s=1800.0, job_rate=1e-5)
TRACE = Trace(times_s=(0.0, 5000.0, 9000.0, 14000.0, 30000.0), nodes=(4, 3, 2, 4, 4))


@functools.cache
def elastic(consistency: Consistency = "order", counts: tuple[int, ...] = (2, 3, 4), **more: Any) -> Elastic:
    wish = {"availability": OFTEN, "counts": counts, "consistency": consistency} | more
    return plan_elastic(base(), Wish(**wish))


@pytest.mark.parametrize("consistency", CLASSES)
def test_a_plan_for_every_count(consistency: Consistency) -> None:
    found = elastic(consistency).plan
    assert [c.nodes for c in found.counts] == [2, 3, 4] and found.consistency == consistency
    assert sum(c.share for c in found.counts) == pytest.approx(1.0)
    for c in found.counts:
        assert c.plan.layout.world == 8 * c.uses <= 8 * c.nodes == c.plan.problem.profile.cluster.gpus + 8 * (c.nodes - c.uses)
        assert c.plan.problem.pins == base().problem.pins
        assert c.plan.problem.workload.global_batch == (16 * c.uses if consistency == "none" else 64)
        assert c.saving.interval_s >= c.saving.persist_s and c.plan.excess_bytes <= 0.0
        if consistency == "bitwise":
            assert not changed(base().layout, c.plan.layout)
    assert found.goodput >= found.best_single * (1.0 - 1e-9) > 0.0
    assert found.reshardable == (len({(c.plan.layout.pp, c.plan.layout.tp, c.plan.layout.ep) for c in found.counts}) > 1)
    assert not found.local_saves


def test_transitions_link_neighbours_both_ways() -> None:
    found = elastic().plan
    assert {(t.before, t.after) for t in found.transitions} == {(4, 3), (3, 4), (3, 2), (2, 3)}
    for t in found.transitions:
        assert t.kind == ("unplanned" if t.after < t.before else "planned")
        assert t.rollback == (t.kind == "unplanned") and set(t.seconds) == {"detect", "drain", "group", "move", "warm", "lost"}


def test_goodput_falls_with_failures_and_costs_and_rises_with_layouts() -> None:
    usual = elastic().plan.goodput
    worse = dataclasses.replace(OFTEN, node_mtbf_s=OFTEN.node_mtbf_s / 4, repair_s=OFTEN.repair_s / 4)
    assert elastic(availability=worse).plan.goodput < usual  # as many nodes there, more changes
    assert elastic(overheads=Overheads(detect_s=600.0)).plan.goodput < usual
    assert elastic(overheads=Overheads(warm_s=0.0)).plan.goodput > usual
    limited = [elastic(templates=z).plan.goodput for z in (1, 2, 3)]
    assert limited == sorted(limited) and limited[-1] <= usual * (1.0 + 1e-9)
    one = elastic(templates=1).plan
    assert len({c.plan.layout for c in one.counts}) == 1
    strict, loose = elastic("bitwise").plan.goodput, elastic("batch").plan.goodput
    assert strict <= usual * (1.0 + 1e-9) <= loose * (1.0 + 1e-6)


def test_a_job_waits_where_running_costs_more_than_it_gives() -> None:
    # a node is back before the others have begun without it
    found = elastic(availability=Availability(node_mtbf_s=7200.0, repair_s=60.0), overheads=Overheads(warm_s=100.0))
    assert [c.nodes for c in found.plan.counts] == [4] == list(found.chosen) and not found.plan.transitions
    assert found.plan.goodput == pytest.approx(found.plan.best_single)
    assert "below 4 nodes the job waits: on 2 to 3 it would spend more" in " | ".join(found.plan.policy)


@pytest.mark.parametrize("templates", [0, 1, 2])
@pytest.mark.parametrize("mtbf_h", [0.5, 4.0, 1000.0])
def test_no_choice_is_below_the_best_single_layout(templates: int, mtbf_h: float) -> None:
    rates = Availability(node_mtbf_s=mtbf_h * 3600.0, repair_s=600.0)
    found = elastic(availability=rates, templates=templates).plan
    assert found.at_most * (1.0 + 1e-9) >= found.goodput >= found.best_single * (1.0 - 1e-9)
    assert templates != 1 or found.goodput == pytest.approx(found.best_single, rel=1e-9)


def test_steps_up_pay_from_a_time_on() -> None:
    for stay_s, grows in ((30.0, False), (30 * 86400.0, True)):
        found = elastic(stay_s=stay_s).plan
        rates = {c.nodes: c.plan.problem.workload.global_batch / c.plan.step_s * c.saving.pace for c in found.counts}
        seconds = {(t.before, t.after): sum(t.seconds.values()) for t in found.transitions}
        assert found.steps_up
        for one in found.steps_up:
            r, more = rates[one.before], rates[one.after]
            lost = more * seconds[one.before, one.after] + r * seconds[one.after, one.before]
            assert one.least_s == pytest.approx(lost / (more - r)) and (one.gain > 0.0) == grows
            assert f"from {one.before} to {one.after} nodes: pays where they stay" in " | ".join(found.policy)
    assert all(one.stay_s == 0.0 and one.data()["grow"] is None for one in elastic().plan.steps_up)
    recorded = elastic(availability=None, trace=TRACE).plan.steps_up
    # three nodes or more for 9000 s and 16000 s, four for 5000 s and 16000 s
    assert {one.after: one.stay_s for one in recorded} == {3: 12500.0, 4: 10500.0}


def test_listed_counts_stand_for_those_up_to_the_next() -> None:
    found = elastic(counts=(2, 4)).plan
    assert [c.nodes for c in found.counts] == [2, 4] and sum(c.share for c in found.counts) == pytest.approx(1.0)
    assert {(t.before, t.after) for t in found.transitions} == {(4, 2), (2, 4)}


def test_survivors_of_failures_hold_everything() -> None:
    found = elastic(overheads=Overheads(live=True), survive=1).plan
    assert all(t.lost_bytes == 0.0 and not t.rollback for t in found.transitions)
    assert any(c.instances > 1 for c in found.counts)
    with pytest.raises(ProblemError, match="no layout of class 'order' fits"):
        elastic(counts=(1, 2), overheads=Overheads(live=True), survive=1)


def test_replicas_are_a_choice_where_processes_outlive_failures() -> None:
    live, stored = elastic(overheads=Overheads(live=True)).plan, elastic().plan
    assert live.goodput > stored.goodput and all(c.instances == 1 for c in stored.counts)


def test_local_checkpoints_keep_all_but_data_parallelism() -> None:
    overheads = Overheads(storage_bytes_per_s=1e6)
    rates = dataclasses.replace(OFTEN, job_rate=1e-3)
    found = elastic(counts=(4, 8), availability=rates, overheads=overheads, local_saves=True).plan
    for c in found.counts:
        x, own = c.plan.layout, base().layout
        assert (x.tp, x.pp, x.vpp, x.ep, x.stages) == (own.tp, own.pp, own.vpp, own.ep, own.stages)
        assert bool(c.saving.local_interval_steps) == found.local_saves
    assert not found.reshardable


def test_an_interval_that_is_asked_for_is_used_or_refused() -> None:
    found = elastic(interval_s=60.0).plan
    assert all(c.saving.interval_s == pytest.approx(60.0, abs=c.plan.step_s) for c in found.counts)
    with pytest.raises(ProblemError, match="saves to storage every"):
        elastic(interval_s=0.5, overheads=Overheads(storage_bytes_per_s=1e6))


def test_a_trace_gives_the_rates_and_is_replayed() -> None:
    found = elastic(availability=None, trace=TRACE)
    assert [c.share for c in found.plan.counts] == pytest.approx(np.array([5.0, 4.0, 21.0]) / 30.0)
    results = {r.name: r for r in replayed(found, TRACE)}
    assert list(results) == ["elastic", "rigid", "rigid with 1 spare", "rigid with 2 spares"]
    assert results["rigid"].waiting_share == pytest.approx(0.3) and results["elastic"].waiting_share == 0.0
    assert results["elastic"].goodput > max(r.goodput for name, r in results.items() if name != "elastic")


def test_words_say_what_runs_and_what_happens() -> None:
    words = " | ".join(elastic().plan.policy)
    for c in elastic().plan.counts:
        assert c.plan.layout.degrees() in words
    assert "below 2 nodes the job waits" in words and "go back to the last checkpoint" in words
    live = " | ".join(elastic(overheads=Overheads(live=True), survive=1).plan.policy)
    assert "go on from the replicas that are left" in live and "move state to the new layout" in live
    noticed = dataclasses.replace(OFTEN, notice_s=600.0)
    assert "end the step, save and restart" in " | ".join(elastic(availability=noticed).plan.policy)
