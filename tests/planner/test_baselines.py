"""Baselines: the rule by which each is found, against pricing every layout, and the words for why it lost."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.planner import baselines as found_by
from moeplan.planner.baseline_data import Baseline
from moeplan.planner.baselines import baselines, with_baselines
from moeplan.planner.constraints import violations
from moeplan.planner.plan import Plan, load_plan, price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.recipes import Recipe
from moeplan.planner.search import search
from moeplan.planner.solve import solve
from tests.planner import brute, tiny
from tests.planner.test_recipes import asked

MIXED = tiny.problem(tiny.MIXED, "h100x8", batch=8)
DENSE = tiny.problem(tiny.DENSE, "h100x8", batch=8)
SMALL = {"experts": tiny.problem(tiny.MIXED), "dense": tiny.problem(tiny.DENSE)}
"""Few enough layouts to price all of them."""


def best(problem: Problem) -> Plan:
    return solve(problem, keep=1).plans[0]


def named(problem: Problem, plan: Plan | None = None) -> dict[str, Baseline]:
    return {b.name: b for b in baselines(plan or best(problem))}


def fitting(problem: Problem) -> list[tuple[Layout, float]]:
    """Every layout that fits with its step time."""
    prices = brute.Prices(problem)
    rows = zip(prices.layouts, prices.step_s, prices.peak_bytes, strict=True)
    return [(x, s) for x, s, peak in rows if brute.needed_bytes(peak) <= problem.device_bytes]


def least(layouts: list[tuple[Layout, float]], field: str) -> float:
    """The best time of those with the least value of a field."""
    lowest = min(getattr(x, field) for x, _ in layouts)
    return min(s for x, s in layouts if getattr(x, field) == lowest)


def test_baselines_of_experts_are_those_of_the_whole_space() -> None:
    found, layouts = named(SMALL["experts"]), fitting(SMALL["experts"])
    widest = max(x.ep for x, _ in layouts)
    there = [(x, s) for x, s in layouts if x.ep == widest and x.etp == 1]
    assert found["widest EP, least TP"].step_s == pytest.approx(least(there, "tp"))
    if inside := found.get("EP inside a domain, least PP"):
        assert inside.step_s == pytest.approx(least(there, "pp"))  # four GPUs are one domain


def test_baselines_of_dense_models_are_those_of_the_whole_space() -> None:
    found, layouts = named(SMALL["dense"]), fitting(SMALL["dense"])
    wide, flat = [(x, s) for x, s in layouts if x.tp == 4], [(x, s) for x, s in layouts if x.pp == 1]
    assert found["TP inside a domain, least PP"].step_s == pytest.approx(least(wide, "pp"))
    assert found["no pipeline, least TP"].step_s == pytest.approx(least(flat, "tp"))


def test_a_layout_is_named_once_and_the_plan_as_itself() -> None:
    found = baselines(best(MIXED))
    layouts = [b.layout for b in found if b.layout is not None]
    assert len(layouts) == len(set(layouts)) and len(found) <= 3
    plan = price_plan(MIXED, next(iter(layouts)))
    assert next(b for b in baselines(plan) if b.layout == plan.layout).verdict == "the plan"


def test_conditions_of_the_user_hold() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x8", batch=8, pins="tp=2", forbid="ep>4")
    for b in baselines(best(problem)):
        assert b.layout is not None and b.layout.tp == 2 and b.layout.ep <= 4
    none = tiny.problem(tiny.MIXED, "h100x8", batch=8, pins="tp=2 etp=2")
    assert "widest EP, least TP" not in named(none)


def test_what_is_too_large_says_by_how_much() -> None:
    problem = asked("deepseek-v3", "h100x256", batch=2048, precision="fp8-cs", pins=())
    plan = price_plan(problem, search(problem, 1).best[0].layout)
    tight = dataclasses.replace(problem, memory_limit_bytes=problem.device_bytes * 0.7)
    found = {b.name: b for b in baselines(dataclasses.replace(plan, problem=tight))}
    lost = found["EP inside a domain, least PP"]
    assert (lost.verdict, lost.layout) == ("too large", None)
    assert lost.why.startswith("ep=8 needs ") and lost.why.endswith(" of 55.8 GiB")
    vendor = found["Megatron-Bridge 25.09 for 1024 GPUs, batch 8192"]
    assert (vendor.verdict, vendor.why) == ("refused", "ep*etp*pp = 64*1*8 does not divide 256 GPUs")


def test_the_parts_that_make_the_difference_are_named() -> None:
    problem = asked("qwen3-30b-a3b", "h100x16", batch=512)
    plan = best(problem)
    slow = price_plan(problem, dataclasses.replace(plan.layout, recompute=("full",), ep_overlap=False))
    made = found_by._against(plan, "it", slow.layout)
    assert made.verdict == "slower" and made.why.split(", ")[0].startswith("recompute +") and made.step_s == slow.step_s
    assert len(made.why.split(", ")) == 2


# -- recipes -------------------------------------------------------------------------------------------------------------


def recipe(**layout: Any) -> Recipe:
    return Recipe(
        model="tiny-mixed", device="H100", gpus=8, global_batch=8, seq_len=4096, precision="bf16",
        vendor="Vendor", source="somewhere", run="", layout=layout,
    )  # fmt: skip


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"tp": 2, "ep": 8, "micro_batch": 3}, "refused", "global batch 8 is not a multiple of micro-batch*dp = 3*4"),
    ({"ep": 8, "etp": 4}, "refused", "ep*etp*pp = 8*4*1 does not divide 8 GPUs"),
    ({"tp": 16, "ep": 8}, "refused", "tp*cp*pp = 16*1*1 does not divide 8 GPUs"),
    ({"tp": 1, "ep": 8, "dispatcher": "hybridep"}, "refused", "era deepep-2025 has no hybridep"),
]


@pytest.mark.parametrize(("layout", "verdict", "why"), CASES)
def test_recipes_that_cannot_run(layout: dict[str, Any], verdict: str, why: str) -> None:
    found = found_by._published(best(MIXED), recipe(**layout))
    assert (found.verdict, found.why, found.layout, found.source) == (verdict, why, None, "somewhere")


def test_a_recipe_that_conditions_exclude() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x8", batch=8, pins="tp=2", forbid="ep>4")
    assert found_by._published(best(problem), recipe(tp=1)).why == "excluded by --pin tp=2"
    assert found_by._published(best(problem), recipe(tp=2, ep=8)).why == "excluded by --forbid ep>4"


def test_a_recipe_keeps_what_it_says_and_its_split() -> None:
    plan = best(MIXED)
    written = "Ett|ttL"
    made = found_by._published(plan, recipe(pp=2, vpp=1, tp=1, micro_batch=2, stages="Et|tttL"))
    assert made.layout is not None and (made.layout.pp, made.layout.micro_batch, made.layout.stages) == (2, 2, "Et|tttL")
    assert not violations(MIXED, made.layout) and made.name == "Vendor"
    even = found_by._published(plan, recipe(pp=2, vpp=1, tp=1, micro_batch=2, stages=written))
    assert even.layout is not None and even.layout.stages == written


def test_what_no_search_decides_is_said() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x8", batch=8, era="graphs-2026")
    plan = best(problem)
    graphs = {"cuda_graphs": ["attn", "moe_router"], "recompute": []}
    made = found_by._published(plan, recipe(**graphs, **{n: getattr(plan.layout, n) for n in ("tp", "pp", "ep", "etp")}))
    assert (made.verdict, made.why) == ("faster", "with what no search decides: --pin cuda_graphs=attn+moe_router")


# -- plan files ----------------------------------------------------------------------------------------------------------


def test_plan_files_keep_baselines(tmp_path: Path) -> None:
    plan = with_baselines(best(asked("mixtral-8x22b", "h100x128", batch=256)))
    plan.save(tmp_path / "plan.yaml")
    again = load_plan(tmp_path / "plan.yaml")
    assert len(plan.baselines) == 3 and [b.name for b in again.baselines] == [b.name for b in plan.baselines]
    for one, other in zip(plan.baselines, again.baselines, strict=True):
        assert (one.verdict, one.why, one.source, one.layout) == (other.verdict, other.why, other.source, other.layout)
        assert one.step_s == pytest.approx(other.step_s, abs=1e-5)
    text = (tmp_path / "plan.yaml").read_text().replace("global_batch: 256", "global_batch: 512")
    (tmp_path / "plan.yaml").write_text(text)
    assert load_plan(tmp_path / "plan.yaml").baselines == ()  # another question: they belong to the old one
