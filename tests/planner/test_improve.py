"""Edits of a layout that is in use: each is legal, fits and brings what it says; the path ends at the best."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.constraints import violations
from moeplan.planner.improve import GROUPS, LEAST, Improvement, improve
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Problem, parse_condition
from moeplan.planner.solve import solve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import workload_of

PROBLEM = Problem(
    model=load_model("qwen3-30b-a3b"),
    profile=nominal(load_cluster("h100x64")),
    workload=workload_of(seq_len=4096, global_batch=512),
)
SLOW = Layout(tp=2, pp=4, dp=8, ep=8, etp=2, edp=1, sequence_parallel=True, dispatcher="allgather")


@pytest.fixture(scope="module")
def best() -> Plan:
    return solve(PROBLEM, keep=1).plans[0]


@pytest.fixture(scope="module")
def found(best: Plan) -> Improvement:
    return improve(price_plan(PROBLEM, SLOW), best)


def changed(first: Layout, second: Layout) -> set[str]:
    return {f.name for f in dataclasses.fields(Layout) if getattr(first, f.name) != getattr(second, f.name)}


def test_every_edit_is_legal_fits_and_brings_what_it_says(found: Improvement) -> None:
    assert len(found.singles) > 3
    for edit in (*found.singles, *found.path):
        assert not violations(PROBLEM, edit.after.layout) and edit.after.excess_bytes <= 0
        assert edit.gain > LEAST and edit.after.step_s == pytest.approx(price_plan(PROBLEM, edit.after.layout).step_s)
        assert edit.after.layout.world == 64


def test_a_dense_model() -> None:
    dense = dataclasses.replace(PROBLEM, model=load_model("llama3.1-8b"))
    slow = price_plan(dense, Layout(tp=8, dp=8, edp=64, sequence_parallel=True, dispatcher="none"))
    found = improve(slow, solve(dense, keep=1).plans[0])
    assert found.path and found.gain > 0.1 and all("dispatcher" not in edit.fields for edit in found.singles)


def test_no_layout_is_priced_twice(best: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeplan.planner import improve as module

    priced: list[Layout] = []

    def counted(problem: Problem, layout: Layout, **how: Any) -> Plan:
        priced.append(layout)
        return price_plan(problem, layout, **how)

    monkeypatch.setattr(module, "price_plan", counted)
    improve(price_plan(PROBLEM, SLOW), best)
    assert len(priced) == len(set(priced)) > 20


def test_a_single_edit_changes_one_field_and_what_follows(found: Improvement) -> None:
    follows: dict[str, set[str]] = {
        **{name: {"dp", "edp", "stages"} for name in ("cp", "pp", "vpp", "ep", "etp")},
        "tp": {"dp", "edp", "stages", "sequence_parallel"},
    }
    for edit in found.singles:
        assert edit.before is found.plan and len(edit.fields) == 1
        name = edit.fields[0]
        assert name in changed(SLOW, edit.after.layout) <= {name} | follows.get(name, set())
    gains = [edit.gain for edit in found.singles]
    assert gains == sorted(gains, reverse=True) and len({e.fields for e in found.singles}) == len(gains)


def test_the_path_goes_from_small_edits_to_large_ones_and_ends_at_the_best(found: Improvement, best: Plan) -> None:
    assert found.path[0].before is found.plan
    assert all(a.after is b.before for a, b in zip(found.path, found.path[1:], strict=False))
    level = {name: i for i, group in enumerate(GROUPS) for name in group}
    levels = [level[edit.fields[0]] for edit in found.path if len(edit.fields) == 1]
    assert levels == sorted(levels)
    assert found.path[-1].after.step_s <= best.step_s * (1 + LEAST)
    product = 1.0
    for edit in found.path:
        product *= 1.0 - edit.gain
    assert found.gain == pytest.approx(1.0 - product)


def test_the_best_plan_has_nothing_left(best: Plan) -> None:
    left = improve(best, best)
    assert left.path == () and left.gain == 0.0


def test_switches_get_values_that_a_search_takes(best: Plan, found: Improvement) -> None:
    names = {edit.fields[0] for edit in found.singles}
    assert "dispatcher" in names and "tp_overlap" not in names
    # the edit is legal and would bring time: it is left out since no search of a model with experts takes it
    faster = price_plan(PROBLEM, dataclasses.replace(SLOW, tp_overlap=True))
    assert not violations(PROBLEM, faster.layout) and faster.step_s < (1 - LEAST) * found.plan.step_s
    pinned = dataclasses.replace(PROBLEM, pins=(parse_condition("tp_overlap=true"),))
    assert "tp_overlap" in {edit.fields[0] for edit in improve(price_plan(pinned, SLOW), best).singles}


def test_edits_meet_the_conditions_of_the_problem(best: Plan, found: Improvement) -> None:
    wanted = {edit.fields[0]: getattr(edit.after.layout, edit.fields[0]) for edit in found.singles}
    conditions = tuple(parse_condition(text) for text in ("dispatcher=allgather", "etp>1", "tp=1"))
    pinned = dataclasses.replace(PROBLEM, pins=conditions[:2], forbidden=(parse_condition("micro_batch>1"),))
    assert wanted["dispatcher"] != "allgather" and wanted["etp"] == 1 and wanted["micro_batch"] > 1
    left = {edit.fields[0] for edit in improve(price_plan(pinned, SLOW), price_plan(pinned, best.layout)).singles}
    assert left and not left & {"dispatcher", "etp", "micro_batch"}
    # a condition that the layout in use breaks does not forbid edits of other fields
    broken = dataclasses.replace(PROBLEM, pins=conditions[2:])
    assert "dispatcher" in {edit.fields[0] for edit in improve(price_plan(broken, SLOW), best).singles}


def test_what_does_not_fit_is_made_to_fit_first(best: Plan) -> None:
    large: dict[str, Any] = {"micro_batch": 8, "dp": 64, "ep": 8, "edp": 8, "dispatcher": "alltoall"}
    plan = price_plan(PROBLEM, Layout(**large))
    assert plan.excess_bytes > 0
    found = improve(plan, best)
    assert found.path[0].after.excess_bytes <= 0
    assert all(edit.after.excess_bytes <= 0 for edit in found.singles)


def test_fewer_layers_recompute_where_memory_allows(best: Plan) -> None:
    plan = price_plan(PROBLEM, dataclasses.replace(SLOW, dispatcher="alltoall", recompute=("full",)))
    found = {edit.fields[0]: edit.after.layout for edit in improve(plan, best).singles}
    assert found["recompute_layers"].recompute_layers == "1" and found["recompute_layers"].recompute == ("full",)
    some = price_plan(PROBLEM, found["recompute_layers"])
    after = {edit.fields[0]: edit.after.layout for edit in improve(some, best).singles}
    assert (after["recompute"].recompute, after["recompute"].recompute_layers) == ((), "")
