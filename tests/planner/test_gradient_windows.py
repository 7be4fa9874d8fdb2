"""Gradients of a plan in the windows of its backward: the dynamic programme against the MILP, and what the windows are."""

import dataclasses

import numpy as np
import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.gradient_windows import _backward, _layers_of, _line, gradient_windows
from moeplan.planner.partition import gradients_by_milp
from moeplan.planner.plan import price_plan
from tests.planner import tiny

DEEPSEEK, MIXTRAL = load_model("deepseek-v2-lite"), load_model("mixtral-8x7b-4l-proxy")
CASES = [
    (DEEPSEEK, {"dp": 16, "ep": 16, "edp": 1}),
    (DEEPSEEK, {"dp": 16, "ep": 16, "edp": 1, "moe_schedule": "fsmoe 2/4"}),
    (MIXTRAL, {"dp": 16, "ep": 8, "edp": 2}),
    (MIXTRAL, {"dp": 8, "pp": 2, "ep": 4, "edp": 2, "moe_schedule": "fsmoe 1/2"}),
    (MIXTRAL, {"dp": 4, "pp": 2, "vpp": 2, "tp": 2, "ep": 8, "edp": 1, "sequence_parallel": True}),
]


def priced(model, fields):
    asked = tiny.problem(model, "h100x16", batch=32, target="research")
    return price_plan(asked, Layout(**{"dispatcher": "alltoall"} | fields))


@pytest.mark.parametrize(("model", "fields"), CASES)
def test_the_partition_is_the_optimum_of_the_milp(model, fields):
    plan = priced(model, fields)
    found = gradient_windows(plan.problem, plan.layout, plan.stage_s)
    assert 0 < found.exposed_s <= found.greedy_s * (1 + 1e-9) <= found.alone_s * (1 + 1e-9)
    line = _line(plan.problem, _group(plan))
    layers = [_backward(plan.problem, plan.layout, model.layers[place], line) for place in found.layers]
    milp = gradients_by_milp(layers, line)
    assert found.best.total_s == pytest.approx(milp.total_s, rel=1e-6)
    arrived = sum(layer.gradient_bytes for layer in layers)
    assert sum(map(sum, found.best.pieces_bytes)) + found.best.tail_bytes == pytest.approx(arrived)


def _group(plan):
    from moeplan.costmodels.layout import Layouts
    from moeplan.costmodels.step import dense_group

    return dense_group(plan.problem.profile, Layouts.of([plan.layout]))


def test_layers_of_a_stage_come_from_all_its_chunks():
    plan = priced(*CASES[4])
    stages = [_layers_of(plan.problem, plan.layout, rank) for rank in range(2)]
    assert stages == [[0, 2], [1, 3]]
    found = gradient_windows(plan.problem, plan.layout, plan.stage_s)
    assert list(found.layers) == stages[found.stage][::-1]


def test_windows_add_up_to_the_backward_of_the_stage():
    plan = priced(*CASES[0])
    line = _line(plan.problem, _group(plan))
    layers = [_backward(plan.problem, plan.layout, kind, line) for kind in DEEPSEEK.layers]
    alone = sum(layer.dense_s + layer.moe.alone_s[0] for layer in layers)
    passes = float(np.max(plan.stage_s))
    # backward is two thirds of a micro-batch or a little less, since head and router have no window
    assert 0.5 * passes < alone < 0.7 * passes


def test_nothing_to_cut_without_experts_or_without_a_reduction():
    dense = tiny.problem(tiny.DENSE, "h100x16", batch=32)
    assert gradient_windows(dense, Layout(dp=16, edp=16), (1.0,)) is None
    sharded = priced(DEEPSEEK, CASES[0][1] | {"sharding": "fsdp"})
    assert gradient_windows(sharded.problem, sharded.layout, sharded.stage_s) is None
    alone = tiny.problem(MIXTRAL, "h100x8", batch=8, target="research")
    layout = Layout(tp=8, ep=8, sequence_parallel=True, dispatcher="alltoall")
    assert gradient_windows(alone, layout, (1.0,)) is None


def test_a_plan_for_research_says_where_its_gradients_go():
    plan = priced(*CASES[1])
    said = plan.to_data()["predicted"]["gradients"]
    assert [row["layer"] for row in said["backward_order"]] == list(range(26, -1, -1))
    assert said["exposed_s"] <= said["greedy_s"] <= said["alone_s"]
    theirs = dataclasses.replace(plan, problem=dataclasses.replace(plan.problem, target="megatron"))
    assert "gradients" not in theirs.to_data()["predicted"]
