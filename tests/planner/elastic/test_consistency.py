"""Classes: what they hold, what they refuse and by which axis, and which hazards they leave."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeplan.costmodels.layout import Layouts
from moeplan.errors import LayoutError
from moeplan.planner.elastic.consistency import CLASSES, Consistency, changed, check_class, hazards, held_fields, pins_of
from tests.conftest import TINY_LATENT
from tests.planner import tiny
from tests.planner.elastic.small import LAYOUT, base, layout_of

# A change of the layout, and the strictest class that allows it.
CHANGES: list[tuple[dict[str, Any], Consistency]] = [
    ({"pp": 8}, "bitwise"),
    ({"vpp": 2}, "bitwise"),
    ({"stages": "Ett|tt|tt|ttL"}, "bitwise"),
    ({"recompute": ("moe_act",)}, "bitwise"),
    ({"ep_overlap": True}, "bitwise"),
    ({"dp": 16, "edp": 2}, "order"),
    ({"tp": 2, "edp": 2, "sequence_parallel": True}, "order"),
    ({"ep": 4, "edp": 2}, "order"),
    ({"ep": 4, "etp": 2}, "order"),
    ({"dispatcher": "deepep"}, "order"),
    ({"micro_batch": 2}, "batch"),
    ({"cp": 2, "edp": 2}, "batch"),
]


@pytest.mark.parametrize(("change", "strictest"), CHANGES, ids=lambda x: str(x))
def test_a_class_allows_its_changes_and_those_of_stricter_ones(change: dict[str, Any], strictest: Consistency) -> None:
    problem, other = base().problem, layout_of(**change)
    for consistency in CLASSES:
        allowed = CLASSES.index(consistency) >= CLASSES.index(strictest)
        pins = pins_of(consistency, problem, LAYOUT)
        assert all(pin.holds(Layouts.of([other]))[0] for pin in pins) == allowed
        if allowed:
            check_class(consistency, problem, LAYOUT, other, 64)
        else:
            with pytest.raises(LayoutError, match=changed(LAYOUT, other)[0]) as raised:
                check_class(consistency, problem, LAYOUT, other, 64)
            assert raised.value.hint == f"--consistency {strictest} allows it"


def test_the_axis_is_named_with_both_values() -> None:
    other = layout_of(dp=4, tp=2, sequence_parallel=True)
    with pytest.raises(LayoutError, match=r"'bitwise'.*tp, dp, sequence_parallel \(tp 1 -> 2, dp 8 -> 4"):
        check_class("bitwise", base().problem, LAYOUT, other, 64)


def test_another_batch_is_of_no_class_but_none() -> None:
    for consistency in CLASSES[:3]:
        with pytest.raises(LayoutError, match="global_batch 64 -> 32"):
            check_class(consistency, base().problem, LAYOUT, LAYOUT, 32)
    check_class("none", base().problem, LAYOUT, LAYOUT, 32)


def test_where_no_class_helps_the_hint_is_to_solve_again() -> None:
    with pytest.raises(LayoutError) as raised:
        check_class("none", base().problem, LAYOUT, layout_of(sharding="ddp"), 64)
    assert raised.value.hint == "solve it again with these as pins"


def test_dropped_tokens_hold_tensor_parallelism_too() -> None:
    workload = dataclasses.replace(base().problem.workload, capacity_factor=1.5)
    dropping = dataclasses.replace(base().problem, workload=workload)
    assert "tp" in held_fields("order", dropping) and "tp" not in held_fields("order", base().problem)


def names(consistency: Consistency, *changes: dict[str, Any], model: Any = None) -> list[str]:
    problem = base().problem if model is None else tiny.problem(model, "h100x32", batch=64)
    return [h.name for h in hazards(consistency, problem, [LAYOUT, *(layout_of(**change) for change in changes)])]


def test_hazards_are_those_that_apply() -> None:
    assert names("bitwise") == ["H3", "H5", "H6", "H7"]
    assert names("bitwise", {"pp": 2}) == ["H1", "H2", "H3", "H5", "H6", "H7"]
    small = layout_of(dp=2, ep=2)
    found = hazards("bitwise", base().problem, [small, dataclasses.replace(small, pp=2)])
    assert [h.name for h in found] == ["H1", "H3", "H5", "H6", "H7"]
    tied = dataclasses.replace(TINY_LATENT, tied=True)
    assert "H4" in names("bitwise", {"pp": 1}, model=tied)
    assert "H4" not in names("bitwise", {"pp": 2}, model=tied) and "H4" not in names("bitwise", {"pp": 1})
    assert names("order", {"pp": 2}) == ["H3"]
    assert names("batch", {"micro_batch": 2}) == ["H3", "aux-loss"]
    assert names("none") == ["H3", "batch"]


def test_capacity_is_a_hazard_where_what_it_counts_changes() -> None:
    workload = dataclasses.replace(base().problem.workload, capacity_factor=1.5)
    problem = dataclasses.replace(base().problem, workload=workload)
    assert "capacity" in [h.name for h in hazards("order", problem, [LAYOUT, layout_of(ep=4, edp=2)])]
    assert "capacity" not in [h.name for h in hazards("order", problem, [LAYOUT, layout_of(pp=2)])]
