"""Refined plans are never worse, fit, and keep their degrees."""

from __future__ import annotations

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import balanced_split, rank_contents
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner.constraints import violations
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.refine import refine, stage_problem
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal


def deepseek(pp: int, vpp: int, *, gpus: int = 1024, recompute: tuple[str, ...] = ("full",)) -> Plan:
    workload = Workload(seq_len=4096, global_batch=4096, precision=load_precision("fp8-cs"), era=load_era("latest"))
    model = load_model("deepseek-v3")
    problem = Problem(model=model, profile=nominal(load_cluster(f"h100x{gpus}")), workload=workload)
    ways = gpus // pp
    layout = Layout(
        pp=pp, vpp=vpp, dp=ways, ep=32, edp=ways // 32, dispatcher="deepep", recompute=recompute,
        stages=balanced_split(model, 4096, pp * vpp),
    )  # fmt: skip
    return price_plan(problem, layout)


@pytest.mark.parametrize(("pp", "vpp"), [(8, 1), (16, 1), (32, 1), (8, 4), (16, 2)])
def test_never_slower_and_accepted(pp: int, vpp: int) -> None:
    plan = deepseek(pp, vpp)
    better = refine(plan)
    assert better.step_s <= plan.step_s
    assert violations(plan.problem, better.layout) == []
    assert (better.layout.pp, better.layout.vpp, better.layout.ep) == (pp, vpp, 32)
    if better is not plan:
        assert better.excess_bytes <= 0
        assert "layers split over the stages" in better.remarks[-1]


def test_uneven_costs_give_a_real_gain() -> None:
    # FLOP weigh the three dense layers like the others; under recompute of the experts they are much cheaper
    plan = deepseek(32, 1, recompute=("moe", "mla_up_proj"))
    assert refine(plan).step_s < 0.99 * plan.step_s


@pytest.mark.parametrize(("pp", "vpp"), [(8, 1), (8, 4)])
def test_stage_problem_prices_a_split_like_the_plan(pp: int, vpp: int) -> None:
    plan = deepseek(pp, vpp)
    problem = stage_problem(plan)
    model = plan.problem.model
    counts = rank_contents(model, pp, vpp, plan.layout.stages)
    first = {kind: model.kind_of_layer.index(kind) for kind in range(len(model.kinds))}
    for rank in range(pp):
        layers = [(first[k], counts[rank, k]) for k in first]
        seconds = problem.fixed_s[rank] + sum(n * problem.layer_s[x] for x, n in layers)
        assert seconds == pytest.approx(plan.stage_s[rank])
        needed = problem.base_bytes[rank] + sum(n * problem.need(x, rank) for x, n in layers)
        assert needed == pytest.approx(float(plan.stages[rank].parts.total))
        assert problem.base_bytes[rank] > 0


def test_nothing_to_refine_without_stages() -> None:
    plan = deepseek(1, 1, gpus=1024)
    assert refine(plan) is plan
