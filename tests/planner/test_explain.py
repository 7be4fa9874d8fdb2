"""What binds a plan, and what one step away from it would bring."""

import dataclasses

import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.explain import DEGREES, bindings, difference, neighbours
from moeplan.planner.plan import price_plan
from moeplan.planner.search import search
from moeplan.planner.solve import solve
from moeplan.units import GIB
from tests.planner import tiny
from tests.planner.brute import Prices

pytestmark = pytest.mark.usefixtures("coarse")

PROBLEM = tiny.problem(tiny.MIXED, "h100x4")
PLAN = solve(PROBLEM, keep=2).plans[0]


def test_neighbours_are_one_step_away() -> None:
    near = neighbours(PLAN)
    values = {"vpp": range(1, 6), "micro_batch": (1, 2, 4)}
    for name in DEGREES:
        mine, options = getattr(PLAN.layout, name), values.get(name, (1, 2, 4))
        wanted = {*[v for v in options if v < mine][-1:], *[v for v in options if v > mine][:1]}
        assert {n.value for n in near if n.field == name} == wanted


def test_each_neighbour_is_the_best_of_its_kind() -> None:
    prices, held = Prices(PROBLEM), ("tp", "cp", "pp", "ep", "etp")
    checked = 0
    for n in neighbours(PLAN):
        asked = {name: getattr(PLAN.layout, name) for name in held} | {n.field: n.value}
        wanted = prices.best(PROBLEM.device_bytes, 1, lambda x, asked=asked: all(getattr(x, k) == v for k, v in asked.items()))
        assert [n.step_s] == pytest.approx(wanted, rel=1e-9) if wanted else n.best is None
        if n.best is not None:
            assert n.verdict == ("faster" if n.step_s < PLAN.step_s else "slower")
            checked += 1
    assert checked >= 3


def test_no_neighbour_of_the_best_plan_is_faster() -> None:
    assert "faster" not in {n.verdict for n in neighbours(PLAN)}


def test_a_neighbour_of_a_worse_plan_is_faster() -> None:
    worse = price_plan(PROBLEM, dataclasses.replace(PLAN.layout, recompute=("full",), ep_overlap=False))
    assert "faster" in {n.verdict for n in neighbours(worse)}


def test_neighbours_that_are_refused_say_the_rule() -> None:
    plan = solve(tiny.problem(tiny.DENSE, "h100x16", batch=8, pins="tp=8 cp=2")).plans[0]
    refused = [n for n in neighbours(plan) if n.verdict == "refused"]
    by_place = {(n.field, n.value): n.reason for n in refused}
    assert by_place["tp", 16] == "tp*cp*pp = 16*2*1 does not divide 16 GPUs"
    plan = solve(tiny.problem(tiny.DENSE, "h100x16", batch=8, pins="tp=8")).plans[0]
    alone = dataclasses.replace(plan.layout, cp=1, pp=1, dp=2, edp=16)
    by_place = {(n.field, n.value): n.reason for n in neighbours(price_plan(plan.problem, alone))}
    assert by_place["tp", 16] == "attention-heads: tp divides the attention heads"
    assert all(n.reason and n.best is None and n.step_s == 0.0 for n in refused) and refused
    assert not [n for n in neighbours(plan) if n.field in ("ep", "etp")]


def test_neighbours_that_are_too_large_say_by_how_much() -> None:
    problem = tiny.problem(load_model("mixtral-8x7b"), "h100x16", batch=32, memory_limit_bytes=4e10)
    plan = solve(problem).plans[0]
    large = [n for n in neighbours(plan) if n.verdict == "too large"]
    assert large and all("misses the device by" in n.reason and "iB at least" in n.reason for n in large)


def test_neighbours_keep_to_the_conditions_of_the_plan() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x4", pins="recompute=full dispatcher=alltoall tp=2", forbid="micro_batch=1")
    plan = solve(problem).plans[0]
    near = [n for n in neighbours(plan) if n.best is not None]
    assert near and {n.best.layout.recompute for n in near if n.best} == {("full",)}
    assert {n.best.layout.dispatcher for n in near if n.best} == {"alltoall"}
    assert all(n.best.layout.micro_batch > 1 for n in near if n.best)
    assert {n.value for n in near if n.field == "tp"} & {1, 4}


def test_memory_and_the_largest_losses_bind() -> None:
    problem = tiny.problem(load_model("deepseek-v3-8l-proxy"), "h100x64", batch=128, pins="pp=4 ep>=8")
    plan = solve(problem).plans[0]
    found = {b.what: b for b in bindings(plan)}
    needed = plan.excess_bytes + problem.device_bytes
    assert found["memory"].share == pytest.approx(needed / problem.device_bytes)
    assert 0.5 < found["memory"].share <= 1.0
    mean = sum(plan.stage_s) / len(plan.stage_s)
    assert found["slowest stage"].share == pytest.approx(1 - mean / max(plan.stage_s))
    shares = plan.time.shares()
    assert found["expert all-to-all"].share == pytest.approx(shares["layers/expert all-to-all"])
    losses = [b.share for b in bindings(plan)][2:]
    assert losses == sorted(losses, reverse=True) and min(losses) > 0.01


def test_a_plan_that_does_not_fit_binds_above_one() -> None:
    problem = tiny.problem(load_model("mixtral-8x7b"), "h100x16", batch=32, memory_limit_bytes=20 * GIB)
    layout = search(dataclasses.replace(problem, memory_limit_bytes=0.0), 1).best[0].layout
    assert bindings(price_plan(problem, layout))[0].share > 1.0


def test_the_difference_of_two_plans_adds_up() -> None:
    other = solve(tiny.problem(tiny.MIXED, "h100x4", pins="tp=2")).plans[0]
    rows = difference(PLAN, other)
    assert sum(a for _, a, _ in rows) == pytest.approx(PLAN.step_s)
    assert sum(b for _, _, b in rows) == pytest.approx(other.step_s)
    apart = [abs(a - b) for _, a, b in rows]
    assert apart == sorted(apart, reverse=True) and len({name for name, _, _ in rows}) == len(rows)
    assert all(a == b for _, a, b in difference(PLAN, PLAN))
