"""The search finds what pricing everything finds, and accounts for every layout."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.planner import relief, space
from moeplan.planner import search as module
from moeplan.planner.constraints import RULES, violations
from moeplan.planner.levels import COPY, EXCLUDED, MEMORY, SLOWER
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem, parse_condition
from moeplan.planner.search import Search, search
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.planner import tiny
from tests.planner.brute import Prices, identity, least, needed_bytes, one_by_one, size_of_space

pytestmark = pytest.mark.usefixtures("coarse")

CASES: dict[str, Problem] = {
    "dense, two nodes": tiny.problem(tiny.DENSE, "h100x16", batch=8),
    "dense, uneven stages": tiny.problem(tiny.ODD, "a100x8", batch=6),
    "experts": tiny.problem(tiny.MIXED, "h100x4"),
    "experts, uneven load": tiny.problem(tiny.MIXED, "h100x4", seq=1024, imbalance=1.5, era="hybridep-2025"),
    "experts, eight GPUs": tiny.problem(tiny.MIXED, "b200x8", seq=2048, batch=2, precision="fp8-mx", era="te-2024"),
    "latent attention": tiny.problem(tiny.LATENT, "h100x4", precision="fp8-cs"),
    "experts, research": replace(
        tiny.problem(tiny.WIDE, "h100x4", era="te-2024"),
        profile=nominal(replace(load_cluster("h100x4"), name="pairs", gpus_per_node=2, domain_gpus=2, nics_per_node=1)),
        target="research",
    ),
    "published, cut": tiny.problem(load_model("deepseek-v2-lite-3l-proxy"), "h200x4", batch=2, era="te-2024"),
}
SHARES = (1.0, 0.4, 0.05, 0.0)
"""Share of the layouts that the memory limit lets through."""


@functools.cache
def prices(name: str) -> Prices:
    return Prices(CASES[name])


def limited(name: str, share: float) -> Problem:
    return replace(CASES[name], memory_limit_bytes=prices(name).limit(share))


def times(found: Search) -> list[float]:
    return [c.step_s for c in found.best]


def close(got: list[float], wanted: list[float]) -> None:
    assert len(got) == len(wanted)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", CASES)
def test_the_best_plans_are_those_of_pricing_everything(name: str, share: float) -> None:
    problem = limited(name, share)
    for keep in (1, 4, 25):
        close(times(search(problem, keep)), prices(name).best(problem.device_bytes, keep))


@pytest.mark.parametrize("share", (1.0, 0.02))
@pytest.mark.parametrize("name", CASES)
def test_the_same_when_little_is_opened_at_once(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small spaces are opened in one go; opening them bit by bit puts every bound to use.
    monkeypatch.setattr(module, "OPEN_AT_ONCE", 4)
    monkeypatch.setattr(module, "CLOSER_AT_ONCE", 20)
    problem = limited(name, share)
    found = search(problem, 3)
    close(times(found), prices(name).best(problem.device_bytes, 3))
    assert found.considered == sum(found.rejected.values()) + found.priced


ONE_BY_ONE = {
    "dense": tiny.problem(tiny.DENSE, "h100x4", batch=2),
    "uneven": tiny.problem(tiny.ODD, "a100x3", batch=3),
    "experts": tiny.problem(tiny.MIXED.cut(2), "h100x2", batch=1, era="te-2024"),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_the_best_plans_are_those_of_checking_and_pricing_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "SHARES", 1)
    problem, alone = ONE_BY_ONE[name], one_by_one(ONE_BY_ONE[name])
    assert len([x for x, _, _ in alone if not x.optimizer_offload]) == len(Prices(problem).layouts)
    for share in (1.0, 0.1):
        tight = replace(problem, memory_limit_bytes=Prices(problem).limit(share))
        fitting = [(x, step) for x, step, peak in alone if needed_bytes(peak) <= tight.device_bytes]
        close(times(search(tight, 7)), least(fitting, 7))


@pytest.mark.parametrize("name", CASES)
def test_nothing_fits_below_the_least_need(name: str) -> None:
    problem = replace(CASES[name], memory_limit_bytes=float(prices(name).least_bytes.min()) * (1 - 1e-3))
    found = search(problem, 3)
    assert found.best == [] and found.rejected[MEMORY] > 0
    assert 0 < found.nearest_excess_bytes <= prices(name).least_bytes.min() - problem.device_bytes + 1


def test_the_excess_is_that_of_the_smallest_layout() -> None:
    smallest = float(prices("experts").least_bytes.min())
    problem = replace(limited("experts", 0.0), memory_limit_bytes=smallest - 2e6)
    assert search(problem).nearest_excess_bytes == pytest.approx(smallest - problem.device_bytes, rel=1e-6)


def test_memory_makes_it_recompute() -> None:
    without = replace(limited("experts", 0.0), pins=(parse_condition("optimizer_offload=0"),))
    free, tight = search(limited("experts", 1.0), 1).best[0], search(without, 1).best[0]
    assert free.layout.recompute == () and tight.layout.recompute != ()
    plainly = [x.recompute == () for x in prices("experts").layouts]
    needs = [needed_bytes(p) for p, plain in zip(prices("experts").peak_bytes, plainly, strict=True) if plain]
    assert min(needs) > limited("experts", 0.0).device_bytes
    assert tight.step_s > free.step_s


@pytest.mark.parametrize("share", (1.0, 0.05))
@pytest.mark.parametrize("name", CASES)
def test_what_is_found_can_run_fits_and_has_its_price(name: str, share: float) -> None:
    problem = limited(name, share)
    found = search(problem, 6)
    assert len({c.identity for c in found.best}) == len(found.best)
    for candidate in found.best:
        plan = price_plan(problem, candidate.layout)
        assert violations(problem, candidate.layout) == []
        assert candidate.identity == identity(candidate.layout)
        assert plan.step_s == pytest.approx(candidate.step_s, rel=1e-9)
        assert plan.peak_bytes == pytest.approx(candidate.peak_bytes, rel=1e-9)
        assert plan.excess_bytes <= 0


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_accounted_for_once(name: str, share: float) -> None:
    problem = limited(name, share)
    found = search(problem, 2)
    assert found.considered == size_of_space(problem) * len(space.recompute_sets(problem))
    assert found.considered == sum(found.rejected.values()) + found.priced
    assert set(found.rejected) <= {rule.name for rule in RULES} | {MEMORY, SLOWER, COPY}
    assert min(found.rejected.values()) > 0


def test_a_limit_in_time_cuts_what_is_slower() -> None:
    problem = limited("experts", 0.4)
    everything = prices("experts").best(problem.device_bytes, 10**6)
    limit = everything[6]
    close(times(search(problem, 10**6, limit_s=limit)), [t for t in everything if t < limit])
    assert search(problem, 3, limit_s=everything[0]).best == []


def test_the_bound_is_the_last_plan_kept_or_what_was_left_closed() -> None:
    problem = limited("experts", 1.0)
    everything = prices("experts").best(problem.device_bytes, 10**6)
    for keep in (1, 3, 9):
        found = search(problem, keep)
        assert found.bound_s == pytest.approx(everything[keep - 1], rel=1e-9)
    assert search(problem, len(everything) + 1).bound_s == np.inf


CONDITIONS = [
    ("tp=2", "", lambda x: x.tp == 2),
    ("tp<=2 ep>=2", "", lambda x: x.tp <= 2 and x.ep >= 2),
    ("", "ep>2 pp=1", lambda x: not x.ep > 2 and not x.pp == 1),
    ("mbs=2 vpp=1", "dispatcher=deepep", lambda x: x.micro_batch == 2 and x.vpp == 1 and x.dispatcher != "deepep"),
    ("ep_overlap=yes", "", lambda x: x.ep_overlap),
    ("recompute=moe_act+layernorm", "", lambda x: set(x.recompute) == {"moe_act", "layernorm"}),
    ("dp!=1", "recompute=none", lambda x: x.dp != 1 and x.recompute != ()),
    ("edp=2 etp=1", "cp>1", lambda x: x.edp == 2 and x.etp == 1 and x.cp == 1),
]


@pytest.mark.parametrize(("pins", "forbid", "meets"), CONDITIONS, ids=[f"{p} / {f}" for p, f, _ in CONDITIONS])
@pytest.mark.parametrize("share", (1.0, 0.2))
def test_conditions_leave_what_meets_them(pins: str, forbid: str, meets: Any, share: float) -> None:
    problem = limited("experts", share)
    asked = tiny.problem(tiny.MIXED, "h100x4", pins=pins, forbid=forbid, memory_limit_bytes=problem.device_bytes)
    found = search(asked, 5)
    close(times(found), prices("experts").best(problem.device_bytes, 5, meets))
    assert all(meets(c.layout) for c in found.best)
    assert found.considered == sum(found.rejected.values()) + found.priced


@pytest.mark.parametrize(
    ("pin", "fixed"),
    [
        ("sharding=fsdp", {"sharding": "fsdp"}),
        ("sharding=ddp", {"sharding": "ddp"}),
        ("dp_overlap=no", {"dp_overlap": False}),
        ("cuda_graphs=attn+moe_router", {"cuda_graphs": ("attn", "moe_router")}),
        ("optimizer_offload=0.5", {"optimizer_offload": 0.5}),
        ("sp=no", {"sequence_parallel": False}),
        ("tp_overlap=yes", {"tp_overlap": True}),
    ],
)
def test_a_pin_on_a_field_that_is_not_searched_sets_it(pin: str, fixed: dict[str, Any]) -> None:
    found = search(tiny.problem(tiny.MIXED, "h100x4", pins=pin), 3)
    wanted = Prices(CASES["experts"], **fixed).best(1e12, 3)
    assert wanted
    close(times(found), wanted)


def test_a_pinned_recompute_set_outside_the_space_is_priced() -> None:
    found = search(tiny.problem(tiny.DENSE, "h100x4", pins="recompute=core_attn"), 2)
    assert [c.layout.recompute for c in found.best] == [("core_attn",)] * 2


def test_conditions_that_nothing_meets() -> None:
    found = search(tiny.problem(tiny.MIXED, "h100x4", pins="tp=3"))
    assert found.best == [] and found.considered == sum(found.rejected.values()) + found.priced
    later = search(tiny.problem(tiny.MIXED, "h100x4", pins="mbs=3"))
    assert later.best == [] and later.rejected[EXCLUDED] > 0


@pytest.mark.parametrize("name", ["experts", "latent attention"])
def test_the_same_question_has_the_same_answer(name: str) -> None:
    problem = limited(name, 0.4)
    first, second = search(problem, 8), search(problem, 8)
    assert first == second


def test_progress_only_grows() -> None:
    steps: list[tuple[int, int]] = []
    search(CASES["dense, two nodes"], 1, lambda done, total: steps.append((done, total)))
    assert steps and all(done <= total for done, total in steps) and steps == sorted(steps)
