"""Layouts by node count: those of the class, searched where they can be best, and errors that name the count that works."""

from __future__ import annotations

import dataclasses

import pytest

from moeplan.costmodels.stages import parse_split
from moeplan.errors import LayoutError, ProblemError, UsageError
from moeplan.planner.elastic.consistency import CLASSES, Consistency, changed
from moeplan.planner.elastic.counts import KEEP, SizedLayout, layouts_by_size, parse_nodes
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import parse_condition
from moeplan.planner.search import search
from tests.conftest import TINY_LATENT
from tests.planner import tiny
from tests.planner.elastic.small import LAYOUT, base, layout_of


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("12..16", (12, 13, 14, 15, 16)),
        ("12..16:2", (12, 14, 16)),
        ("12..16:3", (12, 15)),
        ("16,8, 12", (8, 12, 16)),
        ("4", (4,)),
        ("2,4..6", (2, 4, 5, 6)),
    ],
)
def test_counts_are_read(text: str, counts: tuple[int, ...]) -> None:
    assert parse_nodes(text) == counts


@pytest.mark.parametrize("text", ["", "16..12", "0..4", "a", "4..", "4...6", "-4..6", "4..6:0", "1.5", "9999999999"])
def test_what_are_no_counts_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no"):
        parse_nodes(text)


@pytest.mark.parametrize("consistency", CLASSES)
def test_layouts_are_of_the_class_and_the_fastest_of_all_sizes_up_to_a_count(consistency: Consistency) -> None:
    found = layouts_by_size(base(), range(1, 6), consistency)
    for size, layouts in found.items():
        assert len({one.degrees for one in layouts}) == len(layouts) <= KEEP + (size == 4)
        for one in layouts:
            assert one.layout.world == 8 * size == one.problem.profile.cluster.gpus and one.nodes == size
            batch = one.problem.workload.global_batch
            assert batch == (16 * size if consistency == "none" else 64)
            if consistency == "bitwise":
                assert not changed(LAYOUT, one.layout)
            if consistency == "order":
                assert (one.layout.cp, one.layout.micro_batch) == (1, 1)
    for size in (1, 2, 3):
        problem = dataclasses.replace(next(iter(found.values()))[0].problem, profile=base().problem.profile.resized(8 * size))
        if consistency == "none":
            problem = dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, global_batch=16 * size))
        fastest = [problem.workload.global_batch / c.step_s for c in search(problem, 1).best]
        best = max(one.samples_per_s for nodes, layouts in found.items() if nodes <= size for one in layouts)
        assert best >= max(fastest, default=0.0) * (1.0 - 1e-12)


def test_stages_are_uneven_where_layers_do_not_divide() -> None:
    three = layouts_by_size(base(), [3], "bitwise")[3][0]
    chunks = parse_split(three.layout.stages)
    assert three.layout.pp == 3 and len({chunk.count("t") for chunk in chunks}) > 1


def test_a_count_without_a_layout_of_its_own_takes_a_smaller_one() -> None:
    deep = price_plan(tiny.problem(tiny.DENSE, "h100x64", batch=64), layout_of(dp=32, ep=1, edp=32, pp=2, dispatcher="none"))
    found = layouts_by_size(deep, [7], "bitwise")
    assert set(found) == {4}  # 32 GPUs a stage: one stage on four nodes, two on eight


def test_too_few_nodes_name_the_count_that_works() -> None:
    deep = price_plan(tiny.problem(tiny.DENSE, "h100x64", batch=64), layout_of(dp=32, ep=1, edp=32, pp=2, dispatcher="none"))
    with pytest.raises(ProblemError, match=r"^2 nodes: no layout of class 'bitwise' fits .* 16 GPUs") as raised:
        layouts_by_size(deep, [2, 3], "bitwise")
    assert raised.value.hint == "the smallest count that works is 4"


def test_memory_decides_too() -> None:
    problem = tiny.problem(TINY_LATENT, "h100x32", batch=64, memory_limit_bytes=2**20)
    plan = price_plan(problem, LAYOUT)
    with pytest.raises(ProblemError, match="1 node: no layout") as raised:
        layouts_by_size(dataclasses.replace(plan, problem=problem), [1], "order")
    assert raised.value.hint is not None


def test_plans_of_the_user_are_among_the_layouts() -> None:
    own = price_plan(base().problem, layout_of(recompute=("full",), dp=4, tp=2, sequence_parallel=True))
    found = layouts_by_size(base(), [4], "order", also=[own])[4]
    assert {(one.layout.tp, one.layout.dp, one.layout.pp) for one in found} >= {(1, 8, 4), (2, 4, 4)}
    assert [one.samples_per_s for one in found] == sorted((one.samples_per_s for one in found), reverse=True)
    with pytest.raises(LayoutError, match="tp 1 -> 2"):
        layouts_by_size(base(), [4], "bitwise", also=[own])


def test_plans_of_another_model_are_refused() -> None:
    problem = tiny.problem(TINY_LATENT, "h100x32", batch=64)
    with pytest.raises(ProblemError, match="a plan of tiny-latent beside one of tiny-moe"):
        layouts_by_size(base(), [4], "order", also=[price_plan(problem, LAYOUT)])


def test_pins_and_forms_are_kept() -> None:
    found = layouts_by_size(base(), range(2, 5), "order", pins=[parse_condition("ep=4")])
    own = [one for layouts in found.values() for one in layouts if one.layout is not base().layout]
    assert own and all(one.layout.ep == 4 for one in own)

    def twice(one: SizedLayout) -> list[SizedLayout]:
        return [one, dataclasses.replace(one, instances=2)] if one.layout.dp > 1 else []

    doubled = layouts_by_size(base(), range(2, 5), "order", fits=twice)
    assert all(len(layouts) % 2 == 0 for layouts in doubled.values())
    assert all(one.layout.dp > 1 for layouts in doubled.values() for one in layouts)
