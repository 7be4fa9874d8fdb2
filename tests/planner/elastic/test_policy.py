"""What the words say of layouts that the framework cannot run."""

from __future__ import annotations

from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.consistency import Consistency
from moeplan.planner.elastic.elastic_plan import CountPlan
from moeplan.planner.elastic.policy import policy
from moeplan.planner.elastic.saves import Overheads, advised_saving
from moeplan.planner.plan import price_plan
from tests.planner.elastic.small import sized


def words(consistency: Consistency, nodes: int) -> str:
    one = sized(2, dp=16, ep=4, edp=4, pp=1)
    saving = advised_saving(one.problem, one.layout, one.step_s, Availability(), Overheads())
    plan = price_plan(one.problem, one.layout)
    count = CountPlan(nodes=nodes, uses=2, share=1.0, plan=plan, instances=1, saving=saving)
    return " | ".join(policy([count.nodes], [count], [], consistency, Overheads(), [one], []))


def test_unequal_replicas_are_reported_with_the_reason_against_them() -> None:
    assert "on 3 nodes pipelines of 1 and 2 stages" in words("order", 3)
    assert "Megatron builds equal replicas only" in words("order", 3)


def test_and_are_not_where_nothing_is_to_gain() -> None:
    assert "equal replicas" not in words("order", 2)  # no spare
    assert "equal replicas" not in words("bitwise", 3)  # the deal of micro-batches changes sums


def test_spares_are_named() -> None:
    assert words("bitwise", 3).startswith("3 nodes: DP16 EP4 on 2 of them, the rest are spares | below 3 nodes the job waits")
