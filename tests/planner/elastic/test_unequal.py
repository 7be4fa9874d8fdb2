"""Replicas of unequal depth: the best deal of micro-batches, and when there is anything to report."""

from __future__ import annotations

import itertools

import pytest

from moeplan.planner.elastic.unequal import deal, unequal_replicas
from tests.planner.elastic.small import sized


@pytest.mark.parametrize("fixed", [(0.0, 0.0), (1.0, 0.0, 3.5), (2.0, 0.1, 0.7)])
@pytest.mark.parametrize("total", [3, 8, 11])
def test_the_deal_ends_as_early_as_any(fixed: tuple[float, ...], total: int) -> None:
    slopes = [1.0, 1.7, 0.6][: len(fixed)]
    dealt = deal(fixed, slopes, total)
    assert sum(dealt) == total and min(dealt) >= 1

    def end(deals: tuple[int, ...] | list[int]) -> float:
        return max(f + s * m for f, s, m in zip(fixed, slopes, deals, strict=True))

    every = [d for d in itertools.product(range(1, total), repeat=len(fixed)) if sum(d) == total]
    assert end(dealt) == pytest.approx(min(end(d) for d in every))


def test_nodes_that_equal_replicas_do_not_fill() -> None:
    one = sized(4, ep=4, edp=2, pp=4, recompute=("full",))  # two blocks of four ranks a stage
    assert unequal_replicas(one, 4) is None
    found = unequal_replicas(one, 5)  # ten stages for two blocks
    assert found is None
    five = sized(2, ep=2, edp=4, pp=2)  # four blocks of two ranks a stage: 12 stages on 3 nodes, 16 on 4
    assert unequal_replicas(five, 3) is None
    wide = sized(2, dp=16, ep=4, edp=4, pp=1)  # 16 ranks a stage: six stages of four ranks on 3 nodes
    found = unequal_replicas(wide, 3)
    assert found is not None and found.depths == (1, 1, 2, 2)
    assert sum(found.micro_batches) == 4 * 64 // 16 and found.micro_batches[0] < found.micro_batches[-1]
    assert found.step_s < wide.step_s
