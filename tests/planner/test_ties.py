"""Ties: plans side by side, which one is preferred, what to measure, and what a plan file keeps of it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import KINDS, Z_80, deviations, sigmas
from moeplan.errors import SchemaError
from moeplan.planner.measurement import REPEAT, measurement
from moeplan.planner.plan import Plan, StageMemory, load_plan, price_plan
from moeplan.planner.solve import solve
from moeplan.planner.ties import CLIFF, PREFERRED, compare, distances, settled
from moeplan.units import GIB
from tests.planner import tiny

PROBLEM = tiny.problem(tiny.MIXED, "h100x16", batch=16)
ONE = Layout(dp=16, ep=8, edp=2, dispatcher="alltoall")
TWO = Layout(tp=2, dp=8, ep=4, edp=4, dispatcher="alltoall", sequence_parallel=True)
FLOOR = deviations().floor


def plan_of(step_s: float = 10.0, *, high: float = 1.2, peak_gib: float = 40.0, layout: Layout = ONE, **parts: float) -> Plan:
    """A plan of a given step time, upper end and peak; `parts` are seconds taken from the dense GEMM, "_" for spaces."""
    named = {f"layers/{n.replace('_', ' ')}": v for n, v in parts.items()}
    time = Breakdown(unit="seconds", parts={"layers/MLP GEMM": step_s - sum(parts.values()), **named})
    stages = (StageMemory(rank=0, chunks=("EttttL",), parts=Breakdown(unit="bytes", parts={"weights": peak_gib * GIB})),)
    return Plan(
        problem=PROBLEM,
        layout=layout,
        time=time,
        stages=stages,
        stage_s=(1.0,),
        low_s=step_s / high,
        high_s=step_s * high,
    )


def sigma_of(kind: str) -> float:
    return float(dict(zip(KINDS, sigmas(PROBLEM.profile, PROBLEM.workload), strict=True))[kind])


# -- two plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_ties_with_itself() -> None:
    found = compare(plan_of(), plan_of())
    assert (found.log_ratio, found.sigma, found.tie, found.shared) == (0.0, pytest.approx(FLOOR), True, True)


def test_one_part_more_by_hand() -> None:
    # A tenth of the step is expert GEMM instead of dense GEMM: the two kinds move against each other.
    found = compare(plan_of(), plan_of(expert_GEMM=1.0))
    parts = [(0.1 * sigma_of(kind)) ** 2 for kind in ("dense GEMM", "expert GEMM")]
    assert found.sigma == pytest.approx(math.sqrt(FLOOR**2 + sum(parts))) and found.tie


@pytest.mark.parametrize("side", (-1, 1))
def test_a_tie_ends_at_1_28_deviations(side: int) -> None:
    for factor, tie in ((0.99, True), (1.01, False)):
        found = compare(plan_of(10.0), plan_of(10.0 * math.exp(side * factor * Z_80 * FLOOR)))
        assert found.tie is tie and found.sigma == pytest.approx(FLOOR)


def test_comparisons_are_symmetric() -> None:
    there, back = compare(plan_of(10.0), plan_of(11.0, permute=2.0)), compare(plan_of(11.0, permute=2.0), plan_of(10.0))
    assert there.log_ratio == pytest.approx(-back.log_ratio) and there.sigma == pytest.approx(back.sigma)


def test_errors_of_other_problems_do_not_cancel() -> None:
    other = dataclasses.replace(plan_of(), problem=tiny.problem(tiny.MIXED, "b200x16", batch=16))
    found = compare(plan_of(), other)
    assert not found.shared and found.measurement is None
    assert found.sigma > math.sqrt(2) * deviations().common > FLOOR


def test_more_gpus_compare_by_their_time() -> None:
    wide = dataclasses.replace(plan_of(5.0), layout=dataclasses.replace(ONE, dp=32, edp=4))
    assert compare(plan_of(10.0), wide).log_ratio == pytest.approx(0.0)


def test_distances_of_many_are_those_of_each() -> None:
    plan = price_plan(PROBLEM, ONE)
    layouts = [ONE, TWO, dataclasses.replace(ONE, recompute=("layernorm",))]
    times = Pricing(PROBLEM.model, PROBLEM.profile, PROBLEM.workload, Layouts.of(layouts)).step_cost().time
    sigma, tie = distances(plan, layouts, times)
    for i, layout in enumerate(layouts):
        found = compare(plan, price_plan(PROBLEM, layout))
        assert (sigma[i], tie[i]) == (pytest.approx(found.sigma), found.tie)


# -- preference ----------------------------------------------------------------------------------------------------------


def first_of(*plans: Plan) -> int:
    """Place of the preferred plan."""
    chosen = settled(plans)[0]
    return next(i for i, p in enumerate(plans) if p.time is chosen.time)


PLAIN, FANCY = plan_of().layout, dataclasses.replace(ONE, recompute=("moe_act", "layernorm"))
PREFERENCES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("the lower upper end", {"high": 1.3}, {"step_s": 10.09, "high": 1.2}, 1),
    ("not for more than a percent of the speed", {"high": 1.3}, {"step_s": 10.2, "high": 1.2}, 0),
    ("not where it is no tie", {"high": 1.3}, {"step_s": 10.8, "high": 1.1}, 0),
    ("more free memory at the same end", {"peak_gib": 60.0}, {"peak_gib": 40.0}, 1),
    ("the end counts before memory", {"peak_gib": 60.0}, {"peak_gib": 40.0, "high": 1.21}, 0),
    ("the simpler layout at the same memory", {"layout": FANCY}, {"layout": PLAIN}, 1),
    ("memory counts before simplicity", {"layout": FANCY, "peak_gib": 40.0}, {"layout": PLAIN, "peak_gib": 50.0}, 0),
    ("the fastest otherwise", {"step_s": 10.0}, {"step_s": 10.0001}, 0),
    ("one that is sure to fit before the lower end", {"peak_gib": 72.0, "high": 1.1}, {"step_s": 10.09, "high": 1.3}, 1),
    ("one that is sure to fit for all that the noise leaves open", {"peak_gib": 72.0}, {"step_s": 10.3}, 1),
]


@pytest.mark.parametrize(("_", "one", "two", "place"), PREFERENCES, ids=[p[0] for p in PREFERENCES])
def test_preference(_: str, one: dict[str, Any], two: dict[str, Any], place: int) -> None:
    plans = plan_of(**one), plan_of(**two)
    assert first_of(*plans) == place
    remarks = settled(plans)[0].remarks
    assert len(remarks) == place and all(r.startswith(PREFERRED) and "tie within the noise" in r for r in remarks)


def test_a_cliff_is_said_and_why_another_comes_first() -> None:
    tight, safe, far = plan_of(peak_gib=72.0), plan_of(10.3), plan_of(10.8)
    (said,) = settled([tight, safe])[0].remarks
    assert said.startswith(PREFERRED) and "3.0% faster" in said
    assert said.endswith("on a cliff: it runs out of memory with a probability of 34%; the probability of this one is 0%")
    for plans in ([tight, far], [tight, plan_of(10.3, peak_gib=73.0)], [tight]):
        chosen = settled(plans)[0]
        assert chosen.step_s == 10.0 and len(chosen.remarks) == 1
        assert chosen.remarks[0].startswith(f"{CLIFF}it runs out of memory with a probability of 34%; ")
        assert "--memory-limit 77.2GiB" in chosen.remarks[0]
        cost = "; the fastest that is not, DP16 EP8, micro-batch 1, takes 8.0% longer, which is no tie;"
        assert (cost in chosen.remarks[0]) == (far in plans)
    assert settled(settled([tight]))[0].remarks == settled([tight])[0].remarks
    assert settled([*settled([tight]), safe])[1].remarks == ()


def test_settling_again_changes_nothing() -> None:
    once = settled([plan_of(high=1.3), plan_of(10.09), plan_of(13.0)])
    again = settled(once)
    assert [p.step_s for p in again] == [10.09, 10.0, 13.0]
    assert [p.remarks for p in again] == [p.remarks for p in once] and len(once[0].remarks) == 1


def test_runners_up_know_how_far_they_are() -> None:
    plans = settled([plan_of(10.0), plan_of(10.05, high=1.3), plan_of(13.0)])
    assert [[r.tie for r in p.runners_up] for p in plans] == [[True, False], [True, False], [False, False]]
    assert [p.measure is not None for p in plans] == [True, True, False]
    assert {round(r.sigma, 9) for p in plans for r in p.runners_up} == {round(FLOOR, 9)}
    assert settled([]) == () and settled([plan_of()])[0].runners_up == ()


def test_what_to_measure_is_of_the_first_tie_that_can_be_told_apart() -> None:
    copy, other = plan_of(10.01), plan_of(10.2, expert_GEMM=5.0, layout=TWO)
    plan = settled([plan_of(), copy, other])[0]
    assert [r.tie for r in plan.runners_up] == [True, True]
    assert plan.measure is not None and (plan.measure.kind, plan.measure.against) == (
        "expert GEMM",
        "TP2 DP8 EP4, micro-batch 1",
    )
    plan = settled([plan_of(), copy])[0]
    assert plan.measure is not None and (plan.measure.kind, plan.measure.against) == (REPEAT, "DP16 EP8, micro-batch 1")


def test_a_solution_is_settled() -> None:
    solution = solve(PROBLEM, keep=4)
    fastest = min(solution.plans, key=lambda p: p.step_s)
    assert compare(fastest, solution.plans[0]).tie
    assert [compare(solution.plans[0], p).tie for p in solution.plans[1:]] == [
        i in solution.tied for i in range(1, len(solution.plans))
    ]
    assert bool(solution.tied) == (solution.plans[0].measure is not None)
    assert solution.plans[0].certificate is not None and solution.plans[0].certificate.gap == 0.0


# -- what to measure -----------------------------------------------------------------------------------------------------


def telling(kind: str, first: Layout = ONE, second: Layout = TWO) -> str:
    found = measurement(PROBLEM, first, second, {k: float(k == kind) for k in KINDS}, 0.5)
    assert (found.kind, found.share) == (kind, pytest.approx(1 / 1.5, abs=1e-3))
    return found.run


def test_every_kind_has_a_measurement() -> None:
    for kind in KINDS:
        assert telling(kind).startswith("measure ")


def test_measurements_by_hand() -> None:
    # 4096 tokens of 1024 elements in bf16 are 8 MiB; tensor parallelism halves a rank's share of them.
    assert telling("expert all-to-all") == (
        "measure the expert all-to-all, dispatch and combine: alltoall over 8 ranks, 8 of them in a scale-up domain, "
        "4096 tokens of 1024 elements (8.0 MiB in bf16) to 2 experts each; and alltoall over 4 ranks, 4 of them in a scale-up "
        "domain, 2048 tokens of 1024 elements (4.0 MiB in bf16) to 2 experts each"
    )
    assert telling("expert GEMM") == (
        "measure the grouped GEMM of the experts: 1 groups of 8192 x 1024 by 1024 x 2048 in bf16, forward and both gradients; "
        "and 2 groups of 2048 x 1024 by 1024 x 2048 in bf16, forward and both gradients"
    )
    assert telling("tensor-parallel exchange") == "measure all-gather and reduce-scatter: 8.0 MiB over 2 ranks"
    assert telling("attention core", ONE, ONE) == ("measure attention: 1 x 4096 tokens, 8 heads of 128, forward and backward")
    assert telling("dense GEMM", ONE, TWO) == (
        "measure the dense GEMM: 4096 x 1024 by 1024 x 8192 in bf16, forward and both gradients; "
        "and 4096 x 1024 by 1024 x 4096 in bf16, forward and both gradients"
    )


def test_where_no_part_stands_out_the_plans_are_run() -> None:
    found = measurement(PROBLEM, ONE, TWO, dict.fromkeys(KINDS, 0.01), 0.5)
    assert found.kind == REPEAT and found.run.startswith("run both plans for some fifty steps on the same 16 GPUs")
    assert found.share == pytest.approx(0.5 / (0.5 + 0.01 * len(KINDS)), abs=1e-3)


def test_the_part_that_differs_most_is_measured() -> None:
    found = compare(plan_of(), plan_of(expert_GEMM=5.0)).measurement
    assert found is not None and found.kind == "expert GEMM" and 0.5 < found.share < 1.0


# -- the plan file -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    problem = tiny.problem(load_model("mixtral-8x7b-4l-proxy"), "h100x16", batch=16)
    settled([price_plan(problem, x) for x in (ONE, dataclasses.replace(ONE, recompute=("layernorm",)), TWO)])[0].save(path)
    return path


def test_a_plan_file_keeps_its_ties(file: Path, tmp_path: Path) -> None:
    plan = load_plan(file)
    assert plan.measure is not None and plan.runners_up[0].tie and plan.runners_up[0].sigma == pytest.approx(FLOOR, rel=0.2)
    plan.save(tmp_path / "again.yaml")
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == yaml.safe_load(file.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["measure"].update(kindd="x"), "key 'measure': unknown key 'kindd'"),
        (lambda d: d["measure"].pop("run"), "key 'measure': missing key 'run'"),
        (lambda d: d["runners_up"][0].update(tied=True), "unknown key 'tied'"),
        (lambda d: d["runners_up"][0].update(tie="yes"), "key 'tie': expected bool, found str 'yes'"),
    ],
)
def test_what_a_plan_file_may_not_say_of_ties(file: Path, tmp_path: Path, change: Any, message: str) -> None:
    data = yaml.safe_load(file.read_text())
    change(data)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SchemaError) as caught:
        load_plan(tmp_path / "plan.yaml")
    assert message in str(caught.value)


def test_an_edited_plan_ties_with_nothing(file: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(file.read_text())
    data["layout"]["recompute"] = ["moe_act"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.measure is None and plan.runners_up and not any(r.tie or r.sigma for r in plan.runners_up)


def test_files_from_before_ties_load(file: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(file.read_text())
    del data["measure"]
    for runner in data["runners_up"]:
        runner.pop("tie", None)
        del runner["sigma"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.measure is None and [r.tie for r in plan.runners_up] == [False, False]
