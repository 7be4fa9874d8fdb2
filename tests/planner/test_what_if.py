"""What binds a plan: changed questions solved again, laws of relaxing, and the words."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.uncertainty import deviations
from moeplan.costmodels.workload import load_era
from moeplan.planner import best_plans
from moeplan.planner.layout_words import Difference
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.search import search
from moeplan.planner.solve import solve
from moeplan.planner.ties import compare
from moeplan.planner.what_if import Answer, WhatIf, changes, what_if
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.units import GIB
from tests.planner import tiny

SEARCHED = ("memory", "NIC", "scale-up link", "memory rate", "routing")
"""Constraints whose change only adds layouts or takes time away; a condition dropped is another."""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache directory of these tests alone, and nothing in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(best_plans, "_MEMORY", {})
        yield


def best(problem: Problem) -> Plan:
    return solve(problem, keep=1).plans[0]


def by_change(found: WhatIf) -> dict[str, Answer]:
    return {a.said: a for a in found.answers}


def on_pairs(problem: Problem) -> Problem:
    """On four GPUs of the same kind in two hosts, so that there is everything that a large cluster has."""
    kind = load_cluster(f"{problem.profile.cluster.device.name}x4")
    return dataclasses.replace(
        problem, profile=nominal(dataclasses.replace(kind, name="pairs", gpus_per_node=2, domain_gpus=2, nics_per_node=2))
    )


TWO_NODES = on_pairs(
    tiny.problem(tiny.MIXED, batch=8, seq=1024, era="te-2024", pins="tp<=2 pp=2", forbid="ep>4", imbalance=1.5)
)


def test_every_change_is_asked_and_answered_by_a_search_of_its_own() -> None:
    plan = best(TWO_NODES)
    found = what_if(plan)
    assert {a.said for a in found.answers} == {
        "4 GiB more per GPU", "16 GiB more per GPU", "twice the NIC rate", "twice the scale-up rate (nvlink4)",
        "1.5 times the memory rate", "scale-up domains of 4 GPUs", "without the pin tp<=2", "without the pin pp=2",
        "without forbidding ep>4", "twice the global batch", f"the newest software ({load_era('latest').name})",
        "perfectly balanced routing", "twice the GPUs (8)", "half the GPUs (2)",
    }  # fmt: skip
    assert [a.ratio for a in found.answers] == sorted(a.ratio for a in found.answers)
    answers = by_change(found)
    for change in changes(TWO_NODES):
        answer, wanted = answers[change.said], search(change.problem, 1).best
        assert answer.plan is not None
        assert answer.plan.step_s == pytest.approx(wanted[0].step_s, rel=1e-9)
        gpus, tokens = (
            f(change.problem) / f(TWO_NODES) for f in (lambda p: p.profile.cluster.gpus, lambda p: p.workload.tokens)
        )
        assert answer.ratio == pytest.approx(answer.plan.step_s / plan.step_s * gpus / tokens, rel=1e-9)


def test_what_does_not_exist_is_not_asked_about() -> None:
    one_gpu = {c.constraint for c in changes(tiny.problem(tiny.DENSE, "h100x1", era="latest"))}
    assert one_gpu == {"memory", "memory rate", "batch", "GPUs"}
    said = {c.said for c in changes(tiny.problem(tiny.DENSE, "h100x8", era="latest"))}
    assert not any("NIC" in s or "domain" in s for s in said) and "half the GPUs (4)" in said
    assert not any(c.said.startswith("half") for c in changes(tiny.problem(tiny.DENSE, "h100x24")))
    # Trays of 12 that two domains of 4 would not divide.
    odd = dataclasses.replace(load_cluster("h100x24"), name="odd", gpus_per_node=12, domain_gpus=4)
    profile = dataclasses.replace(tiny.problem(tiny.DENSE, "h100x24").profile, cluster=odd)
    asked = changes(dataclasses.replace(tiny.problem(tiny.DENSE, "h100x24"), profile=profile))
    assert "domain" not in {c.constraint for c in asked}


def test_each_change_is_in_one_respect() -> None:
    limited = dataclasses.replace(TWO_NODES, memory_limit_bytes=6e10)
    asked = {c.said: c.problem for c in changes(limited)}
    more = asked["4 GiB more per GPU"]
    assert more.device_bytes == 6e10 + 4 * GIB
    assert more.profile.cluster.device.memory_bytes == limited.profile.cluster.device.memory_bytes + 4 * GIB
    assert asked["without the memory limit of 55.9 GiB"].memory_limit_bytes == 0
    assert [c.text for c in asked["without the pin tp<=2"].pins] == ["pp=2"]
    assert asked["without forbidding ep>4"].forbidden == () and len(asked["without forbidding ep>4"].pins) == 2
    assert asked["scale-up domains of 4 GPUs"].profile.cluster.domain_gpus == 4
    assert asked["twice the GPUs (8)"].profile.cluster.gpus == 8
    for problem in asked.values():
        fields = [f.name for f in dataclasses.fields(Problem) if getattr(problem, f.name) != getattr(limited, f.name)]
        assert (
            fields in (["profile"], ["workload"], ["pins"], ["forbidden"], ["memory_limit_bytes"])
            or problem is more
            or (fields == ["profile", "memory_limit_bytes"])
        )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Questions with tight or loose memory, conditions, fast and slow links."""
    model = draw(st.sampled_from((tiny.MIXED, tiny.ODD, tiny.LATENT)))
    problem = tiny.problem(
        model,
        draw(st.sampled_from(("h100x4", "a100x3", "l40sx4"))),
        batch=draw(st.sampled_from((2, 6))),
        seq=draw(st.sampled_from((1024, 4096))),
        era=draw(st.sampled_from(("te-2024", "deepep-2025"))),
        pins=draw(st.sampled_from(("", "tp=2", "micro_batch=1 vpp=1", "pp<=2"))),
        forbid=draw(st.sampled_from(("", "ep>1", "recompute=full dp>=4"))),
        imbalance=draw(st.sampled_from((1.0, 1.4))) if model.moe is not None else 1.0,
    )
    problem = on_pairs(problem) if draw(st.booleans()) else problem
    return dataclasses.replace(problem, memory_limit_bytes=draw(st.floats(3.0, 12.0)) * GIB)


@settings(max_examples=6, deadline=None)
@given(problems())
def test_relaxing_never_makes_the_best_slower(problem: Problem) -> None:
    found = solve(problem, keep=1)
    if not found.plans:
        return
    for answer in what_if(found.plans[0]).answers:
        if answer.constraint in SEARCHED or answer.said.startswith("without"):
            assert answer.ratio <= 1.0 + best_plans.SAME, answer.words


@settings(max_examples=4, deadline=None)
@given(problems(), st.data())
def test_relaxing_never_makes_a_plan_beside_the_best_slower(problem: Problem, data: st.DataObject) -> None:
    # Also of a plan that is not the best, and of one that no search would look at.
    candidates = search(problem, 6).best
    if not candidates:
        return
    layout = data.draw(st.sampled_from(candidates)).layout
    sharding = data.draw(st.sampled_from(("optimizer", "ddp")))
    offload = layout.optimizer_offload if sharding == "optimizer" else 0.0
    plan = price_plan(problem, dataclasses.replace(layout, sharding=sharding, optimizer_offload=offload))
    found = what_if(plan)
    if plan.excess_bytes <= 0:
        assert found.best is not None and found.best.step_s <= plan.step_s * (1 + 1e-9)
    for answer in found.answers:
        if answer.constraint in SEARCHED or answer.said.startswith("without"):
            assert answer.ratio <= 1.0 + best_plans.SAME, answer.words


def test_kept_answers_are_the_computed_ones() -> None:
    plan = best(tiny.problem(tiny.MIXED, "h100x8", batch=12, seq=2048))
    first, second = what_if(plan), what_if(plan)
    assert first.kept == 0 and second.kept == 1 + len(second.answers)
    for one, two in zip(first.answers, second.answers, strict=True):
        rest = [dataclasses.replace(a, plan=None) for a in (one, two)]
        assert rest[0] == rest[1] and (one.plan and one.plan.to_data()) == (two.plan and two.plan.to_data())


def test_what_no_search_touches_stays() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x4", era="graphs-2026")
    plain = best(problem)
    graphed = price_plan(problem, dataclasses.replace(plain.layout, cuda_graphs=("attn",), sharding="ddp"))
    for answer in what_if(graphed).answers:
        assert answer.plan is not None and answer.plan.layout.cuda_graphs == ("attn",) and answer.plan.layout.sharding == "ddp"
    # But a pin of the user on it can be dropped.
    pinned = best(tiny.problem(tiny.DENSE, "h100x2", pins="sharding=ddp"))
    dropped = by_change(what_if(pinned))["without the pin sharding=ddp"]
    assert dropped.plan is not None and dropped.plan.layout.sharding == "optimizer"


def test_a_layout_beside_the_space_counts() -> None:
    problem = tiny.problem(tiny.ODD, "a100x4", batch=8, pins="pp=2")
    split = dataclasses.replace(best(problem).layout, stages="Ett|tL")
    plan = price_plan(problem, split)
    found = what_if(plan)
    assert found.best is not None
    assert found.best.step_s == pytest.approx(min(plan.step_s, search(problem, 1).best[0].step_s))
    for answer in found.answers:
        if answer.plan is not None and answer.plan.problem.profile.cluster.gpus == 4:
            here = price_plan(answer.plan.problem, split)
            assert answer.plan.step_s <= here.step_s * (1 + 1e-9) or here.excess_bytes > 0


def test_a_plan_that_does_not_fit() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x2", pins="tp=1 pp=1 ep=1")
    layout = best(problem).layout
    tight = dataclasses.replace(problem, memory_limit_bytes=3.0 * GIB)
    found = what_if(price_plan(tight, layout))
    answers = by_change(found)
    assert found.best is None and answers["16 GiB more per GPU"].plan is not None
    none = answers["twice the NIC rate"] if "twice the NIC rate" in answers else answers["1.5 times the memory rate"]
    assert none.plan is None and math.isinf(none.ratio) and "no plan fits, the smallest misses the device by" in none.words
    assert found.answers[-1].plan is None


def test_noise_is_that_of_ties() -> None:
    plan = best(TWO_NODES)
    seen = set()
    for answer in what_if(plan).answers:
        assert answer.plan is not None
        apart = compare(plan, answer.plan)
        if answer.layout or not apart.shared:
            assert answer.sigma == apart.sigma
        else:
            assert answer.sigma == pytest.approx(math.sqrt(max(0.0, apart.sigma**2 - deviations().floor ** 2)), abs=1e-9)
        apart_by = abs(math.log(answer.ratio))
        assert answer.noise == (1e-9 <= apart_by < max(1.2816 * answer.sigma, 0.01))
        seen.add(answer.noise)
    assert seen == {True, False}


def test_the_part_is_the_one_that_changes_most() -> None:
    plan = best(TWO_NODES)
    for answer in what_if(plan).answers:
        if answer.part == "":
            assert answer.ratio == pytest.approx(1.0, abs=1e-9)
            continue
        assert answer.plan is not None
        gpus, tokens = answer.plan.layout.world / 4, answer.plan.problem.workload.tokens / TWO_NODES.workload.tokens
        moved = {
            name: (float(answer.plan.time.parts.get(name, 0.0)) * gpus / tokens - float(plan.time.parts.get(name, 0.0)))
            for name in {*plan.time.parts, *answer.plan.time.parts}
        }
        name = (min if answer.ratio < 1 else max)(moved, key=lambda n: moved[n])
        assert answer.part == name.rsplit("/", 1)[-1]
        assert (answer.part_shares[1] - answer.part_shares[0]) * plan.step_s == pytest.approx(moved[name], rel=1e-6)


def answer_of(**changed: Any) -> Answer:
    values: dict[str, Any] = {
        "constraint": "NIC", "said": "twice the NIC rate", "plan": best(TWO_NODES), "ratio": 0.93, "sigma": 0.03,
        "noise": False, "layout": (),
    }  # fmt: skip
    return Answer(**values | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "twice the NIC rate: -7.0%"),
        ({"layout": (Difference("EP 64", "32"),)}, "twice the NIC rate: -7.0% and EP 64 instead of 32"),
        ({"ratio": 0.99, "noise": True}, "twice the NIC rate: -1.0%, within the noise (sigma 3.0%)"),
        (
            {"ratio": 0.99, "noise": True, "layout": (Difference("EP 64", "32"), Difference("recompute off"))},
            "twice the NIC rate: -1.0%, within the noise (sigma 3.0%), and EP 64 instead of 32, recompute off",
        ),
        ({"ratio": 1.0}, "twice the NIC rate: nothing changes"),
        ({"ratio": 1.05}, "twice the NIC rate: +5.0%"),
        (
            {"constraint": "memory", "said": "4 GiB more per GPU", "ratio": 0.969,
             "layout": (Difference("recompute off on stages 0-3"),)},
            "4 GiB more per GPU would allow recompute off on stages 0-3: -3.1%",
        ),
        ({"constraint": "memory", "said": "4 GiB more per GPU", "ratio": 1.0}, "4 GiB more per GPU: nothing changes"),
        ({"plan": None, "ratio": math.inf}, "twice the NIC rate: no plan fits"),
        (
            {"plan": None, "ratio": math.inf, "excess_bytes": 3 * GIB},
            "twice the NIC rate: no plan fits, the smallest misses the device by 3.0 GiB",
        ),
    ],
)  # fmt: skip
def test_words(changed: dict[str, Any], words: str) -> None:
    assert answer_of(**changed).words == words


def test_the_largest_entry_of_a_tight_device() -> None:
    # Memory just below what a layout without recompute needs: 16 GiB more lets it go.
    free = best(tiny.problem(tiny.LATENT, "h100x4", pins="pp=1"))
    tight = dataclasses.replace(free.problem, memory_limit_bytes=0.8 * (free.excess_bytes + free.problem.device_bytes))
    found = what_if(best(tight))
    memory = by_change(found)["16 GiB more per GPU"]
    assert memory.plan is not None and memory.plan.layout.recompute == free.layout.recompute
    assert memory.words.startswith("16 GiB more per GPU would allow ") and memory.ratio < 1.0
    first = found.answers[0]
    assert first.words.startswith(first.said) and f"{first.ratio - 1:+.1%}" in first.words


def test_what_binds_is_named_once_by_gain() -> None:
    found = what_if(best(TWO_NODES))
    names = [a.constraint for a in found.binding]
    assert names and len(set(names)) == len(names)
    assert all(a.ratio < 1 and not a.noise for a in found.binding)
    assert [a.ratio for a in found.binding] == sorted(a.ratio for a in found.binding)
    for name, group in itertools.groupby(sorted(found.answers, key=lambda a: a.constraint), key=lambda a: a.constraint):
        clear = [a.ratio for a in group if a.ratio < 1 - best_plans.SAME and not a.noise]
        assert (name in names) == bool(clear)
        if clear:
            assert next(a.ratio for a in found.binding if a.constraint == name) == min(clear)


def test_progress_grows_to_the_number_of_questions() -> None:
    seen: list[tuple[int, int]] = []
    found = what_if(best(tiny.problem(tiny.DENSE, "h100x2", batch=3)), progress=lambda done, total: seen.append((done, total)))
    total = 1 + len(found.answers)
    assert seen == [(i, total) for i in range(1, total + 1)]
    assert np.isfinite([a.sigma for a in found.answers]).all()
