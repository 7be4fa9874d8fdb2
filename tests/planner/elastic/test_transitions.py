"""Seconds of changes by part, through storage and live, with notice and without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.counts import SizedLayout
from moeplan.planner.elastic.holdings import holdings
from moeplan.planner.elastic.movement import lost_bytes, move_seconds, movement
from moeplan.planner.elastic.saves import Overheads, advised_saving
from moeplan.planner.elastic.transitions import PARTS, Changes
from tests.planner.elastic.small import sized

FOUR, TWO = sized(4), sized(2, pp=2)
WIDE = sized(4, dp=16, edp=2, pp=2)
COSTS: dict[str, Any] = {"detect_s": 1.0, "group_s": 2.0, "warm_s": 4.0, "storage_bytes_per_s": 1e8}


def saving_of(one: SizedLayout, overheads: Overheads) -> Saving:
    return advised_saving(one.problem, one.layout, one.step_s, Availability(), overheads)


def changes(**more: Any) -> Changes:
    rates = {name: more.pop(name) for name in ("notice_s",) if name in more}
    return Changes(Overheads(**COSTS | more), Availability(**rates))


def test_a_failure_goes_back_to_the_last_checkpoint() -> None:
    found = changes()
    saving = saving_of(FOUR, found.overheads)
    kind, change = found.worst(FOUR, TWO, saving, 4, 3)
    assert kind == "unplanned" and change.rollback and tuple(change.seconds) == PARTS
    read_s = found.overheads.storage_s(TWO.problem)
    assert change.seconds == {"detect": 1.0, "drain": 0.0, "group": 2.0, "move": read_s, "warm": 4.0, "lost": saving.lost_s}
    problem = FOUR.problem
    held = holdings(problem.model, problem.workload, FOUR.layout)
    assert change.lost_bytes == max(lost_bytes(held, [node]) for node in range(4)) > 0.0


def test_a_planned_move_writes_and_reads() -> None:
    found = changes()
    saving = saving_of(TWO, found.overheads)
    kind, change = found.worst(TWO, FOUR, saving, 2, 4)
    assert (kind, change.rollback, change.lost_bytes) == ("planned", False, 0.0)
    assert change.seconds["drain"] == saving.persist_s and change.seconds["move"] == found.overheads.storage_s(FOUR.problem)
    assert change.seconds["detect"] == change.seconds["lost"] == 0.0
    problem = TWO.problem
    old = holdings(problem.model, problem.workload, TWO.layout)
    new = holdings(problem.model, problem.workload, FOUR.layout)
    assert change.moved_bytes == movement(old, new).moved_bytes


def test_notice_that_is_long_enough_makes_a_loss_planned() -> None:
    saving = saving_of(FOUR, changes().overheads)
    enough = FOUR.step_s + saving.persist_s
    assert changes(notice_s=enough).worst(FOUR, TWO, saving, 4, 3)[0] == "planned"
    assert changes(notice_s=0.99 * enough).worst(FOUR, TWO, saving, 4, 3)[0] == "unplanned"
    assert changes(notice_s=FOUR.step_s, live=True).worst(FOUR, TWO, saving, 4, 3)[0] == "planned"


def test_live_moves_cross_the_fabric_and_replicas_spare_going_back() -> None:
    found = changes(live=True)
    saving = saving_of(WIDE, found.overheads)
    alone = found.worst(WIDE, TWO, saving, 4, 3)[1]
    assert alone.rollback and alone.lost_bytes > 0.0
    twice = dataclasses.replace(WIDE, instances=2)
    spared = found.worst(twice, TWO, saving, 4, 3)[1]
    assert not spared.rollback and spared.lost_bytes == 0.0 and spared.seconds["lost"] == 0.5 * WIDE.step_s
    problem = TWO.problem
    old = holdings(problem.model, problem.workload, WIDE.layout, instances=2)
    new = holdings(problem.model, problem.workload, TWO.layout)
    left = [movement(old, new, alive=[n != dead for n in range(4)]) for dead in range(4)]
    assert spared.seconds["move"] in [pytest.approx(move_seconds(m, problem.profile.cluster)) for m in left]


def test_spares_cost_nothing_and_take_part_in_the_mean() -> None:
    found = changes()
    saving = saving_of(TWO, found.overheads)
    struck = sum(found.worst(TWO, TWO, saving, 3, 2)[1].seconds.values())
    assert found.mean_s(TWO, TWO, saving, 3, 2) == pytest.approx(2 / 3 * struck)  # one of three nodes is a spare
    assert found.mean_s(TWO, TWO, saving, 4, 2) == pytest.approx(3 / 4 * struck)  # both that leave are spares: 1 in 4
    assert found.mean_s(TWO, TWO, saving, 2, 3) == 0.0
    assert sum(found.worst(TWO, TWO, saving, 2, 3)[1].seconds.values()) == 0.0
    planned = sum(found.worst(TWO, FOUR, saving, 2, 4)[1].seconds.values())
    assert found.mean_s(TWO, FOUR, saving, 2, 4) == pytest.approx(planned)
    assert found.mean_s(TWO, TWO, saving, 2, 2) == pytest.approx(struck)  # the job alone fails


def test_moves_count_once_they_are_learnt_and_never_more_than_the_bound() -> None:
    found = changes(live=True)
    saving = saving_of(TWO, found.overheads)
    least = found.mean_s(TWO, FOUR, saving, 2, 4)
    assert found.learn(TWO, FOUR, 2, 4) and not found.learn(TWO, FOUR, 2, 4)
    assert least < found.mean_s(TWO, FOUR, saving, 2, 4) < found.most_s(TWO, saving) + found.most_s(FOUR, saving)
    assert not changes().learn(TWO, FOUR, 2, 4)  # what storage takes is known
    assert not found.learn(TWO, TWO, 2, 4) and not found.learn(TWO, TWO, 4, 3)
