"""Refinement finds the best split, its bounds are below every price, and the answer does not depend on processes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import pytest

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.pipeline.critical import critical_passes
from moeplan.costmodels.pipeline.waves import span_s
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import balanced_split
from moeplan.planner.constraints import violations
from moeplan.planner.levels import once_each, open_rows, with_recompute
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import parse_condition
from moeplan.planner.relief import FULL
from moeplan.planner.search import Candidate, search
from moeplan.planner.solve import Splits, solve
from moeplan.planner.stages.bounds import Reach
from moeplan.planner.stages.level_splits import LevelSplits, level_sizes
from moeplan.planner.stages.problem import StageProblem
from moeplan.planner.stages.refine import refine, resplit
from moeplan.planner.stages.setup import forms, groups, least_rest_s, split_text
from moeplan.units import GIB
from tests.exporters.cases import layout_of, problem_of
from tests.planner.stages.test_setup import random_sizes


def every_split(stages: StageProblem, chunk: int = 0, left: int = -1) -> Iterator[list[int]]:
    """Layers of each chunk in every way that a stage problem allows."""
    left = len(stages.kinds) if chunk == 0 else left
    if chunk == stages.chunks - 1:
        if stages.fewest[chunk] <= left <= stages.most[chunk]:
            yield [left]
        return
    for size in range(stages.fewest[chunk], min(left, stages.most[chunk]) + 1):
        yield from ([size, *rest] for rest in every_split(stages, chunk + 1, left - size))


def test_the_best_split_is_that_of_pricing_all_of_them() -> None:
    pins = ("vpp=1", "pp=4", "cp=1", "tp=1", "micro_batch<=2", "dispatcher=deepep", "ep_overlap=no")
    problem = problem_of("qwen3-30b-a3b", "h100x16", 64, 2048)
    problem = dataclasses.replace(problem, model=problem.model.cut(10), pins=tuple(map(parse_condition, pins)))
    found = search(problem, 1)
    proof = refine(problem, found.best[0])
    rows, _ = with_recompute(problem, once_each(open_rows(problem, np.inf)))
    assert len(rows) > 30
    form = next(forms(problem, rows.take([0])))
    texts = tuple(split_text(problem, sizes, False) for sizes in every_split(form.stages))
    best = np.inf
    for place in range(len(texts)):
        split = rows.with_columns(split=np.full(len(rows), place), stages=texts)
        pricing = Pricing(problem.model, problem.profile, problem.workload, split, exact=True)
        took = np.where(problem.excess_bytes(pricing.peak_bytes()) <= 0.0, pricing.step_seconds(), np.inf)
        if took.min() < best and not violations(problem, split.row(int(took.argmin()))):
            best = float(took.min())
    assert len(texts) == 165 and best < 0.9 * found.best[0].step_s  # the splits of the search are far from the best ones
    assert proof.best.step_s == pytest.approx(best, rel=1e-12) and proof.gap == proof.uneven_gap == 0.0
    assert proof.opened < len(rows) / 2


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("deepseek-v3", {"pp": 8, "ep": 16}),
        ("deepseek-v3", {"pp": 8, "vpp": 4, "ep": 16}),
        ("qwen3-235b-a22b", {"pp": 4, "vpp": 3, "ep": 8, "tp": 2}),
        ("mixtral-8x7b", {"pp": 4, "ep": 8}),
    ],
)
def test_no_split_beats_what_the_bound_rules_out(name: str, fields: dict[str, int]) -> None:
    problem = problem_of(name, "h100x128", 1024, 4096)
    rows = Layouts.of([layout_of(problem.model, 128, **fields)])
    rng = random.Random(1)
    for form in forms(problem, rows):
        sizes = [random_sizes(rng, form.stages) for _ in range(30)]
        layouts = [dataclasses.replace(rows.row(0), stages=split_text(problem, some, form.alone)) for some in sizes]
        pricing = Pricing(problem.model, problem.profile, problem.workload, Layouts.of(layouts), exact=True)
        took, fits = pricing.step_seconds(), problem.excess_bytes(pricing.peak_bytes()) <= 0.0
        assert (least_rest_s(problem, rows)[0] + form.stages.exact_spans(sizes) <= took * (1 + 1e-9)).all()
        for seconds in took[fits]:
            assert Reach.of(problem, rows).may_beat(seconds * (1 + 1e-9))[0]
    assert not Reach.of(problem, rows).may_beat(float(took.min()) / 3)[0]


@pytest.mark.parametrize(
    ("name", "batch", "fields"),
    [
        ("deepseek-v3", 64, {"pp": 8, "ep": 16}),  # fewer micro-batches than ranks
        ("deepseek-v3", 1024, {"pp": 8, "ep": 16}),
        ("deepseek-v3", 1024, {"pp": 4, "vpp": 5, "ep": 32}),
        ("qwen3-235b-a22b", 256, {"pp": 16, "ep": 8}),
        ("qwen3-235b-a22b", 256, {"pp": 8, "vpp": 3, "ep": 16}),
    ],
)
def test_no_level_split_beats_what_the_bound_rules_out_where_some_layers_recompute(
    name: str, batch: int, fields: dict[str, int]
) -> None:
    problem = problem_of(name, "b200x128", batch, 4096)
    rows = Layouts.of([layout_of(problem.model, 128, **fields)])
    reach = Reach.of(problem, rows, FULL)
    seen = 0
    most = level_sizes(len(problem.model.layers), int(rows.pp[0]), int(rows.vpp[0]))[1]
    for k in (k for k in (1, 2, 3, 5, 9) if k <= most):
        counted = rows.with_columns(recompute=np.array([FULL]), recompute_counts=("", str(k)), recompute_count=np.array([1]))
        for group in groups(problem, counted):
            splits = [s for s in LevelSplits(group).splits.tolist() if max(s) > k or problem.model.mtp]
            for sizes in random.Random(k).sample(splits, min(40, len(splits))):
                one = Layouts.of([dataclasses.replace(counted.row(0), stages=split_text(problem, sizes, group.alone))])
                pricing = Pricing(problem.model, problem.profile, problem.workload, one, exact=True)
                if problem.excess_bytes(pricing.peak_bytes())[0] > 0.0:
                    continue
                limit_s = float(pricing.step_seconds()[0]) * (1 + 1e-9)
                bounds, _ = reach.counted(9, limit_s)
                assert k in bounds.columns["lean_layers"][bounds.may_beat(limit_s)]
                seen += 1
    assert seen > 20


@pytest.mark.parametrize(("p", "v", "m"), [(1, 1, 3), (4, 1, 3), (4, 1, 9), (3, 2, 3), (4, 3, 12), (2, 5, 4)])
def test_a_longest_path_is_the_span_and_never_more(p: int, v: int, m: int) -> None:
    rng = np.random.default_rng(p * v * m)
    forward, backward = rng.uniform(1, 2, (p, v)), rng.uniform(2, 4, (p, v))
    there, back = critical_passes(forward, backward, m)
    assert (there * forward + back * backward).sum() == pytest.approx(span_s(forward[..., None], backward[..., None], m)[0])
    for _ in range(50):
        forward, backward = rng.uniform(0.1, 2, (p, v)), rng.uniform(0.1, 4, (p, v))
        span = span_s(forward[..., None], backward[..., None], m)[0]
        assert (there * forward + back * backward).sum() <= span * (1 + 1e-9)


def test_uneven_costs_give_a_real_gain() -> None:
    # FLOP weigh the three dense layers like the others; under recompute of the experts they are much cheaper
    problem = problem_of("deepseek-v3", "h100x1024", 4096, 4096, "fp8-cs")
    layout = layout_of(
        problem.model, 1024, pp=32, ep=32, dispatcher="deepep", recompute=("moe", "mla_up_proj"),
        stages=balanced_split(problem.model, 4096, 32),
    )  # fmt: skip
    plan = price_plan(problem, layout)
    (better,) = resplit(problem, [Candidate(layout, plan.step_s, plan.peak_bytes)])
    assert better.step_s < 0.99 * plan.step_s and better.layout.degrees() == layout.degrees()
    assert better.step_s == pytest.approx(price_plan(problem, better.layout).step_s, rel=1e-12)


def test_processes_and_programmes_change_nothing_but_the_gap() -> None:
    pins = ("tp=1", "cp=1", "pp=4", "micro_batch=1", "vpp=4", "ep=8", "dispatcher=deepep", "recompute=none")
    problem = dataclasses.replace(problem_of("mixtral-8x7b", "h100x32", 64, 4096), pins=tuple(map(parse_condition, pins)))
    plain = solve(problem, keep=2, splits=Splits())
    first, second = (solve(problem, keep=2, splits=Splits(gap=0.005, jobs=jobs)) for jobs in (1, 2))
    proofs = [s.plans[0].certificate for s in (plain, first, second)]
    assert proofs[0] is not None and proofs[1] is not None and proofs[2] is not None
    assert dataclasses.replace(proofs[1], seconds=0) == dataclasses.replace(proofs[2], seconds=0)
    assert [p.layout for p in first.plans] == [p.layout for p in second.plans]
    assert [p.gap for p in proofs] == [0.0, 0.0, 0.0]
    assert proofs[1].uneven_gap <= proofs[0].uneven_gap and proofs[1].programmes > 0 == proofs[0].programmes


def test_a_time_limit_leaves_a_gap_and_a_plan() -> None:
    solution = solve(problem_of("mixtral-8x7b", "h100x32", 64, 4096), keep=1, splits=Splits(gap=0.0, time_limit_s=0.001))
    proof = solution.plans[0].certificate
    assert proof is not None and proof.opened == proof.programmes == 0 and 0 < proof.gap < 1
    assert proof.status == solution.status == "bounded"


def test_pinned_counts_are_refined() -> None:
    pins = ("recompute_layers=1", "recompute=full", "pp=4", "tp=1", "cp=1", "micro_batch=1")
    problem = dataclasses.replace(problem_of("mixtral-8x7b", "h100x32", 64, 4096), pins=tuple(map(parse_condition, pins)))
    found = search(problem, 1).best[0]
    proof = refine(problem, found)
    assert proof.gap == 0.0 and proof.opened > 0 and proof.best.step_s <= found.step_s
    assert proof.best.layout.recompute_layers == "1"


def test_a_solver_that_stands_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import pulp

    pins = ("tp=1", "cp=1", "pp=4", "micro_batch=1", "vpp=4", "ep=8", "dispatcher=deepep", "recompute=none")
    problem = dataclasses.replace(problem_of("mixtral-8x7b", "h100x32", 64, 4096), pins=tuple(map(parse_condition, pins)))
    monkeypatch.setattr(pulp, "listSolvers", lambda **_: ["PULP_CBC_CMD"])
    solution = solve(problem, keep=1, splits=Splits(gap=0.005))
    assert "HiGHS is not installed, CBC solved the programmes" in solution.plans[0].remarks


@pytest.mark.parametrize(
    ("name", "layers", "cluster", "pins", "gib", "best_s"),
    [
        # no even or balanced split fits, another does
        ("llama3-8b", 5, "h100x8", ("pp=4", "tp=1", "cp=1", "etp=1", "vpp<=2", "optimizer_offload=0"), 11.8, 0.2345),
        # whole layers recomputed in one layer of each chunk, on a split with chunks of two
        ("llama3-8b", 4, "a100x8", ("pp=2", "vpp=2", "tp=1", "cp=1", "micro_batch=1", "optimizer_offload=0"), 15.7, 0.2919),
    ],
)
def test_splits_that_only_fit_uneven_are_found(
    name: str, layers: int, cluster: str, pins: tuple[str, ...], gib: float, best_s: float
) -> None:
    problem = problem_of(name, cluster, 8, 4096)
    problem = dataclasses.replace(
        problem, model=problem.model.cut(layers), pins=tuple(map(parse_condition, pins)), memory_limit_bytes=gib * GIB
    )
    solution = solve(problem, keep=1, splits=Splits())
    assert solution.status == "optimal" and min(p.step_s for p in solution.plans) == pytest.approx(best_s, rel=0.02)
    assert solution.plans[0].peak_bytes <= gib * GIB
