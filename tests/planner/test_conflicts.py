"""The smallest set of conditions that leaves no plan, against pricing every layout and trying every set."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.layout import Layouts
from moeplan.planner import conflicts
from moeplan.planner.conflicts import Conflict, smallest_conflict
from moeplan.planner.constraints import violations
from moeplan.planner.problem import Problem, parse_condition
from moeplan.planner.search import search
from tests.planner import tiny
from tests.planner.brute import Prices, without_recompute

pytestmark = pytest.mark.usefixtures("coarse")

ASKED: dict[str, Problem] = {
    "experts": tiny.problem(tiny.MIXED, "h100x4"),
    "dense": tiny.problem(tiny.ODD, "a100x4", batch=6),
    "latent": tiny.problem(tiny.LATENT, "h100x2", batch=2, era="te-2024"),
}
SHARES = (1.0, 0.3, 0.02)
"""Share of the layouts that the memory limit lets through."""
VALUES = {
    "tp": (1, 2, 3, 4), "pp": (1, 2, 4), "vpp": (1, 2, 3), "cp": (1, 2), "dp": (1, 2), "ep": (1, 2, 4), "etp": (1, 2),
    "mbs": (1, 2, 3, 5),
}  # fmt: skip
NAMED = ("ep_overlap=true", "ep_overlap=false", "dispatcher=allgather", "dispatcher=alltoall", "dispatcher=hybridep",
         "recompute=none", "recompute=full", "recompute!=none", "recompute=moe_act+layernorm")  # fmt: skip


@functools.cache
def prices(name: str) -> Prices:
    return Prices(ASKED[name])


def limited(name: str, share: float) -> Problem:
    needs = np.sort(prices(name).least_bytes)
    return replace(ASKED[name], memory_limit_bytes=float(needs[int(share * (len(needs) - 1))]) * (1 + 1e-12))


def some_condition(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(NAMED)
    field = rng.choice(list(VALUES))
    return f"{field}{rng.choice(('=', '=', '<=', '>=', '!='))}{rng.choice(VALUES[field])}"


def conditions(problem: Problem) -> tuple[str, ...]:
    return (*(c.text for c in problem.pins), *(f"forbidden {c.text}" for c in problem.forbidden))


def by_brute_force(name: str, problem: Problem) -> Callable[[tuple[int, ...]], bool]:
    """Whether some layout that fits meets the conditions at the given places: pins, then forbidden."""
    rows = Layouts.of(prices(name).layouts)
    fits = prices(name).least_bytes <= problem.device_bytes
    meets = [c.holds(rows) for c in problem.pins] + [~c.holds(rows) for c in problem.forbidden]
    return lambda chosen: bool(functools.reduce(np.logical_and, (meets[i] for i in chosen), fits).any())


@functools.cache
def conflicting(name: str, count: int = 20) -> list[tuple[Problem, Callable[[tuple[int, ...]], bool], Conflict]]:
    """Random problems that conditions leave without a plan, each with its oracle and the conflict that is found."""
    rng = random.Random(name)
    out: list[Any] = []
    while len(out) < count:
        pins, forbid = (" ".join(some_condition(rng) for _ in range(n)) for n in (rng.randint(1, 4), rng.randint(0, 2)))
        problem = replace(
            limited(name, rng.choice(SHARES)),
            pins=tuple(map(parse_condition, pins.split())),
            forbidden=tuple(map(parse_condition, forbid.split())),
        )
        leaves = by_brute_force(name, problem)
        if not leaves(tuple(range(len(conditions(problem))))):
            out.append((problem, leaves, smallest_conflict(problem)))
    return out


@pytest.mark.parametrize("name", ASKED)
def test_the_set_is_the_smallest_that_brute_force_finds(name: str) -> None:
    for problem, leaves, found in conflicting(name):
        texts = conditions(problem)
        places = range(len(texts))
        assert found is not None and found.smallest, texts
        asked = [texts.index(text) for text in found.conditions]
        assert not leaves(tuple(asked)), f"{texts}: {found.conditions} leave a plan"
        for part in itertools.combinations(asked, len(asked) - 1):
            assert leaves(part), f"{texts}: of {found.conditions} fewer conflict"
        assert all(leaves(some) for size in range(1, len(asked)) for some in itertools.combinations(places, size)), texts
        enough = {texts[i] for i in asked if leaves(tuple(j for j in places if j != i))}
        assert set(found.enough) == enough and found.others == (not enough), texts


def test_reasons_are_those_of_brute_force() -> None:
    kinds = set()
    for name in ASKED:
        everything = list(without_recompute(ASKED[name]))
        rows = Layouts.of(everything)
        for problem, _, found in conflicting(name):
            asked = found.problem
            if found.excess_bytes < np.inf:  # the least need of what the conditions leave
                kinds.add("memory")
                meets = asked.allows(Layouts.of(prices(name).layouts))
                least = prices(name).least_bytes[meets].min()
                assert found.excess_bytes == pytest.approx(least - problem.device_bytes, abs=1.0)
            elif not any(c.field == "recompute" for c in (*asked.pins, *asked.forbidden)):
                kinds.add("rules" if found.rules else "nothing left")
                meeting = [everything[i] for i in np.flatnonzero(asked.allows(rows))]
                broken = [{v.rule for v in violations(asked, x)} for x in meeting[:: max(1, len(meeting) // 50)]]
                assert all(broken) and bool(found.rules) <= bool(broken)
                assert set(found.rules) <= set().union(*broken)
    assert kinds == {"memory", "rules", "nothing left"}


def test_without_conditions_or_where_they_are_not_the_reason_there_is_none() -> None:
    small = replace(limited("experts", 0.0), memory_limit_bytes=limited("experts", 0.0).device_bytes * 0.9)
    assert not search(small, 1).best
    assert smallest_conflict(small) is None
    assert smallest_conflict(replace(small, pins=(parse_condition("tp=2"),))) is None


def said(model: Any = tiny.MIXED, cluster: str = "h100x4", pins: str = "", forbid: str = "", **more: Any) -> Conflict:
    found = smallest_conflict(tiny.problem(model, cluster, pins=pins, forbid=forbid, **more))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (
            {"pins": "tp=3 ep=2"},
            "tp=3 leaves no layout of tiny-mixed on 4 GPUs: tp must divide the 4 GPUs; without it there is a plan",
        ),
        (
            {"pins": "tp=2 pp=4 recompute=none"},
            "tp=2 and pp=4 leave no layout of tiny-mixed on 4 GPUs: tp*pp = 2*4 = 8 does not divide the 4 GPUs; without "
            "either there is a plan",
        ),
        ({"pins": "tp=1 cp=1 pp=1 dp=2"}, "tp*cp*pp*dp = 1*1*1*2 = 2 is not the 4 GPUs"),
        ({"pins": "ep=4 etp=1", "forbid": "pp=1"}, "tp*cp*dp*pp and etp*ep*edp*pp are the 4 GPUs"),
        ({"pins": "tp=2 tp=4"}, "tp=2 and tp=4 leave no layout of tiny-mixed on 4 GPUs: no tp meets both"),
        (
            {"pins": "mbs=3 vpp=1"},
            "mbs=3 leaves no layout of tiny-mixed on 4 GPUs: a micro-batch must divide the global batch 4",
        ),
        ({"pins": "vpp=9"}, "there are 1 to 6 virtual stages"),
        ({"pins": "dispatcher=hybridep"}, "era deepep-2025 has "),
        ({"pins": "ep_overlap=true", "era": "te-2024"}, "era te-2024 has no expert overlap"),
        ({"pins": "shared_overlap=true"}, "the model has no shared experts"),
        ({"pins": "shared_overlap=true", "model": tiny.LATENT, "era": "te-2024"}, "era te-2024 has no overlap of shared"),
        ({"pins": "ep=2", "model": tiny.DENSE}, "the model has no experts"),
        ({"forbid": "sharding=optimizer"}, "forbidden sharding=optimizer leaves no layout"),
        ({"forbid": "sharding=optimizer"}, "sharding is not searched but for a value that '=' pins"),
        ({"pins": "recompute=mlp recompute=none"}, "no recompute meets both"),
        ({"pins": "pp=1 vpp=2"}, "vpp=2 with pp=1 (rule virtual-stages)"),
        ({"pins": "ep=4 ep_overlap=true recompute=full"}, "ep_overlap with recompute of full (rule overlap-recompute)"),
        ({"pins": "ep=3", "cluster": "h100x24", "batch": 24}, "(rule experts)"),
        (
            {"pins": "tp=3 pp=8 vpp=2 mbs=3"},
            "tp=3 leaves no layout of tiny-mixed on 4 GPUs: tp must divide the 4 GPUs; other conditions conflict too",
        ),
        ({"pins": "tp=3", "forbid": "tp=3"}, "tp=3 leaves no layout"),
    ],
)
def test_words(question: dict[str, Any], sentence: str) -> None:
    assert sentence in said(**question).sentence()


def test_one_condition_may_be_enough_and_another_not() -> None:
    found = said(pins="tp=2 pp=4 pp<=4 pp>=3")  # without tp there is a plan, without pp=4 the last one still asks for it
    assert found.conditions == ("tp=2", "pp=4") and found.enough == ("tp=2",)
    assert found.sentence().endswith("; without tp=2 there is a plan")


def test_memory_is_named_with_what_misses() -> None:
    problem = replace(limited("experts", 0.0), pins=(parse_condition("recompute=none"), parse_condition("dp>=1")))
    found = smallest_conflict(problem)
    assert found is not None and found.conditions == ("recompute=none",) and found.rules == ()
    assert f" that fits: the smallest misses the {problem.device_bytes / 2**30:.1f} GiB of a H100 by " in found.sentence()


def test_a_pin_that_lets_more_in_does_not_make_others_conflict() -> None:
    """Without the pinned offload nothing fits, which is no reason to call what is pinned beside it a conflict."""
    asked = tiny.problem(tiny.MIXED, "h100x4", era="pytorch-2025")  # no search offloads there
    problem = replace(asked, memory_limit_bytes=Prices(asked).limit(0.0) * 0.999)
    assert not search(problem, 1).best
    found = smallest_conflict(replace(problem, pins=tuple(map(parse_condition, ("optimizer_offload=1", "mbs=1", "tp=3")))))
    assert found is not None and found.conditions == ("tp=3",) == found.enough


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[int, int]] = []
    monkeypatch.setattr(conflicts, "MOST_SEARCHES", 3)
    asked = "pp<=4 ep<=4 mbs<=2 vpp>=1 tp>=2 cp>=2 dp>=2 etp<=2 recompute=none"
    found = smallest_conflict(tiny.problem(tiny.MIXED, pins=asked), lambda done, total: reported.append((done, total)))
    assert reported == [(1, 3), (2, 3), (3, 3)]
    assert found is not None and not found.smallest
    assert not search(found.problem, 1).best, "a set that was not made smaller conflicts all the same"
    assert "; fewer of them may conflict already" in found.sentence()
