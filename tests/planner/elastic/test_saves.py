"""What saves and restarts cost, from bytes and rates."""

from __future__ import annotations

import dataclasses

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.saves import (
    GROUP_S,
    RENDEZVOUS_S,
    Overheads,
    advised_saving,
    checkpoint_bytes,
    node_bytes_per_s,
    save_cost,
)
from tests.conftest import TINY_LATENT
from tests.planner import tiny
from tests.planner.elastic.small import LAYOUT, base

PROBLEM = base().problem
CLUSTER = PROBLEM.profile.cluster


def test_a_checkpoint_holds_every_parameter_once() -> None:
    assert checkpoint_bytes(PROBLEM) == 14 * parameter_count(PROBLEM.model).total
    latent = tiny.problem(TINY_LATENT, "h100x32", batch=64)
    count = parameter_count(latent.model)
    assert count.mtp and checkpoint_bytes(latent) == 14 * (count.total + count.mtp)
    bf16 = tiny.problem(TINY_LATENT, "h100x32", batch=64, moment_bytes=2)
    assert checkpoint_bytes(bf16) == 10 * (count.total + count.mtp)


def test_storage_is_a_rate_of_the_job_or_of_each_node_and_no_faster_than_the_nics() -> None:
    whole = checkpoint_bytes(PROBLEM)
    assert Overheads().storage_s(PROBLEM) == pytest.approx(whole / 4e9)
    assert Overheads(storage_bytes_per_s=2e9).storage_s(PROBLEM) == pytest.approx(whole / 2e9)
    assert Overheads(storage_bytes_per_s=1e15).storage_s(PROBLEM) == pytest.approx(whole / (4 * node_bytes_per_s(PROBLEM)))


def test_groups_are_counted_by_axis_unless_given() -> None:
    assert Overheads().grouping_s(LAYOUT) == RENDEZVOUS_S + 4 * GROUP_S  # pp, dp, ep, world
    assert Overheads(group_s=0.0).grouping_s(LAYOUT) == 0.0


def test_saves_stall_for_the_copy_or_for_the_write() -> None:
    overheads = Overheads(storage_bytes_per_s=1e9, detect_s=1.0, group_s=2.0, warm_s=3.0)
    whole = checkpoint_bytes(PROBLEM)
    copied_s, written_s = whole / 32 / CLUSTER.pcie.bytes_per_s, whole / 1e9
    cost = save_cost(PROBLEM, LAYOUT, 0.1, overheads)
    assert cost.asynchronous and cost.stall_s == pytest.approx(copied_s)
    assert cost.persist_s == pytest.approx(copied_s + written_s) and not cost.two_levels
    assert cost.restart_s == pytest.approx(6.0 + written_s)
    blocking = save_cost(PROBLEM, LAYOUT, 0.1, overheads, blocking=True)
    assert not blocking.asynchronous and blocking.stall_s == pytest.approx(written_s)
    local = save_cost(PROBLEM, LAYOUT, 0.1, overheads, node_share=0.25)
    assert local.two_levels and local.storage_share == 0.25 and local.local_stall_s == pytest.approx(copied_s)


def test_saves_block_where_the_host_has_no_room() -> None:
    poor = dataclasses.replace(CLUSTER, host_memory_bytes=checkpoint_bytes(PROBLEM) / 4)
    problem = dataclasses.replace(PROBLEM, profile=dataclasses.replace(PROBLEM.profile, cluster=poor))
    assert not save_cost(problem, LAYOUT, 0.1, Overheads()).asynchronous


def test_the_advised_interval_is_the_best() -> None:
    rates, overheads = Availability(node_mtbf_s=86400.0, job_rate=1e-5), Overheads()
    best = advised_saving(PROBLEM, LAYOUT, 0.1, rates, overheads)
    for factor in (0.5, 0.9, 1.1, 2.0):
        other = advised_saving(PROBLEM, LAYOUT, 0.1, rates, overheads, interval_s=max(factor * best.interval_s, best.persist_s))
        assert other.efficiency <= best.efficiency
    assert not best.local_interval_steps


def test_a_local_level_helps_where_storage_is_slow_and_nodes_stay() -> None:
    slow, rates = Overheads(storage_bytes_per_s=1e6), Availability(job_rate=1e-3)
    one = advised_saving(PROBLEM, LAYOUT, 0.1, rates, slow)
    two = advised_saving(PROBLEM, LAYOUT, 0.1, rates, slow, local=True)
    assert two.local_interval_steps < two.interval_steps and two.local_interval_steps and two.efficiency > one.efficiency
    nodes = advised_saving(PROBLEM, LAYOUT, 0.1, Availability(), slow, local=True)
    assert not nodes.local_interval_steps  # every failure takes a node, and its copy, along


def test_an_interval_shorter_than_a_save_is_refused() -> None:
    slow = Overheads(storage_bytes_per_s=1e6)
    with pytest.raises(ProblemError, match=r"saves to storage every 1 steps are 0\.1 s apart, but one takes"):
        advised_saving(PROBLEM, LAYOUT, 0.1, Availability(), slow, interval_s=0.1)


@pytest.mark.parametrize("field", ["detect_s", "group_s", "warm_s", "storage_bytes_per_s"])
def test_negative_costs_are_refused(field: str) -> None:
    with pytest.raises(ProblemError, match="-1"):
        Overheads(**{field: -1.0})
