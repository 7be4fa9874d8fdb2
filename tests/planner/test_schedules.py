"""The schedules of a plan's MoE layers: what is chosen, what others would bring, what a plan file says of it."""

import dataclasses

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import ExportError, SchemaError
from moeplan.exporters.megatron import arguments
from moeplan.planner.constraints import violations
from moeplan.planner.plan import load_plan, price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.schedules import alternatives, layer_groups, with_schedule
from moeplan.planner.search import search
from tests.planner import tiny

MIXTRAL = load_model("mixtral-8x7b-4l-proxy")
DEEPSEEK = load_model("deepseek-v2-lite")


def problem(model=MIXTRAL, cluster: str = "h100x16", **more) -> Problem:
    return tiny.problem(model, cluster, batch=32, **{"target": "research", **more})


def over_nodes(model=MIXTRAL, **fields) -> tuple[Problem, Layout]:
    return problem(model), Layout(**{"dp": 16, "ep": 4, "etp": 4, "edp": 1, "dispatcher": "alltoall"} | fields)


def test_an_open_schedule_becomes_the_quickest_of_all() -> None:
    asked, layout = over_nodes(moe_schedule="best")
    plan = price_plan(asked, layout)
    assert plan.layout.moe_schedule.startswith("fsmoe ")
    others = [x for x in alternatives(asked, layout) if x.name == "plain" or x.name.startswith(("fsmoe", "tutel", "s1"))]
    assert plan.step_s == pytest.approx(min(x.step_s for x in others), rel=1e-12)
    assert with_schedule(asked, plan.layout) == plan.layout


def test_an_open_schedule_becomes_plain_where_nothing_is_faster() -> None:
    asked = problem()
    serial = dataclasses.replace(asked, profile=dataclasses.replace(asked.profile, overlap_loss=1.0))
    assert price_plan(serial, over_nodes(moe_schedule="best")[1]).layout.moe_schedule == ""


def test_alternatives_are_the_same_plan_with_other_schedules() -> None:
    asked, layout = over_nodes(DEEPSEEK, ep=16, etp=1, edp=1)
    found = {x.name.split()[0]: x for x in alternatives(asked, layout)}
    assert list(found) == ["plain", "shared-expert", "1F1B", "fsmoe", "comet"]
    assert [name for name, x in found.items() if x.runs_on == ("megatron",)] == ["plain", "shared-expert", "1F1B"]
    assert found["plain"].chosen and not any(x.chosen for name, x in found.items() if name != "plain")
    for x in found.values():
        free = dataclasses.replace(x.layout, ep_overlap=False, shared_overlap=False, moe_schedule="")
        assert free == layout and x.step_s == pytest.approx(price_plan(asked, x.layout).step_s, rel=1e-12)
        assert x.step_s <= found["plain"].step_s * (1 + 1e-12)
        assert x.exposed_s <= found["plain"].exposed_s
    assert found["comet"].step_s == min(x.step_s for x in found.values())


def test_what_this_plan_cannot_have_names_the_rule() -> None:
    asked, layout = over_nodes(pp=2, dp=8, etp=2)
    overlap = next(x for x in alternatives(asked, layout) if x.name == "1F1B overlap")
    assert overlap.broken == "ep_overlap with pp=2 and vpp=1" and overlap.step_s > 0


def test_nothing_to_choose_without_an_exchange() -> None:
    assert alternatives(problem(tiny.DENSE), Layout(dp=16, edp=16)) == []
    assert alternatives(problem(), Layout(dp=16, edp=16, dispatcher="alltoall")) == []
    assert alternatives(*over_nodes(dispatcher="allgather")) == []
    assert layer_groups(problem(tiny.DENSE), Layout(dp=16, edp=16)) == []


def test_layers_are_grouped_by_their_block() -> None:
    groups = layer_groups(*over_nodes(DEEPSEEK, ep=16, etp=1, shared_overlap=True))
    (group,) = groups
    assert (group.layers, group.count, group.runs) == ("1-26", 26, "alltoall, shared-expert overlap")
    assert 0 < group.exposed_s < group.plain_s
    narrow = dataclasses.replace(tiny.MOE_LAYER, blocks=(tiny.GQA, dataclasses.replace(tiny.MOE, width=512)))
    mixed = dataclasses.replace(tiny.WIDE, layers=(tiny.MOE_LAYER, narrow, tiny.MOE_LAYER, tiny.MOE_LAYER))
    layout = Layout(dp=16, ep=8, etp=2, edp=1, dispatcher="alltoall", moe_schedule="fsmoe 2/4; s1")
    first, second = layer_groups(problem(mixed), layout)
    assert (first.layers, first.runs, second.layers, second.runs) == ("0,2-3", "alltoall, fsmoe 2/4", "1", "alltoall, s1")


def test_a_plan_file_keeps_target_and_schedule(tmp_path) -> None:
    asked, layout = over_nodes(DEEPSEEK, ep=16, etp=1, moe_schedule="fsmoe 2/4")
    plan = price_plan(asked, layout)
    plan.save(tmp_path / "plan.yaml")
    read = load_plan(tmp_path / "plan.yaml")
    assert read.problem.target == "research" and read.layout == plan.layout and read.step_s == plan.step_s
    said = plan.to_data()["predicted"]["moe_layers"]
    assert [(g["layers"], g["runs"]) for g in said] == [("1-26", "alltoall, fsmoe 2/4")]
    text = (tmp_path / "plan.yaml").read_text().replace("limits: {target: research}\n", "")
    (tmp_path / "megatron.yaml").write_text(text)
    with pytest.raises(SchemaError, match="'fsmoe 2/4' is nothing that Megatron runs"):
        load_plan(tmp_path / "megatron.yaml")


def test_megatron_never_gets_a_schedule_that_it_does_not_run() -> None:
    asked, layout = over_nodes(DEEPSEEK, ep=16, etp=1, moe_schedule="fsmoe 2/4")
    assert [v.rule for v in violations(dataclasses.replace(asked, target="megatron"), layout)] == ["schedule-target"]
    with pytest.raises(ExportError, match="'fsmoe 2/4' is nothing that Megatron runs"):
        arguments(price_plan(asked, layout))
    flags = arguments(price_plan(asked, dataclasses.replace(layout, moe_schedule="", shared_overlap=True)))
    assert ("--moe-shared-expert-overlap",) in flags["mixture of experts"]
    for candidate in search(problem(DEEPSEEK, target="megatron"), 5).best:
        assert candidate.layout.moe_schedule == ""


def test_research_is_never_slower_than_megatron() -> None:
    for model in (DEEPSEEK, MIXTRAL):
        ours, theirs = (search(problem(model, target=t), 1).best[0].step_s for t in ("research", "megatron"))
        assert ours <= theirs * (1 + 1e-12)


def test_shared_experts_run_beside_the_exchange_wherever_megatron_takes_it() -> None:
    best = search(problem(DEEPSEEK, target="megatron", pins="ep_overlap=no dispatcher=alltoall ep=16"), 1).best[0].layout
    assert best.shared_overlap
    off = search(problem(DEEPSEEK, target="megatron", pins="ep_overlap=no dispatcher=alltoall ep=16 shared_overlap=no"), 1)
    assert not off.best[0].layout.shared_overlap
