"""Coverage: what a plan is priced with beyond what was measured is named with its share, widens the interval, and is shown."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.uncertainty import KINDS
from moeplan.costmodels.workload import load_precision
from moeplan.planner import coverage
from moeplan.planner.coverage import Beyond, beyond, kinds, with_remark
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem
from moeplan.profiles.origin import AS_NOMINAL, MeasuredOn, Origin
from moeplan.profiles.profile import Profile
from tests.conftest import NODE, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, workload_of

RUN = MeasuredOn(when="2026-11-22", device="a device", backend="cuda", software="torch", ranks=16, nodes=2)
WIDE = (1e-9, 1e18)


def measured(profile: Profile, **valid: tuple[float, float]) -> Profile:
    """The profile as if all of it had been measured, over any size but for those of `valid` ("gemm m": span)."""

    def with_span(table: str, curve: Any) -> Any:
        spans = {name: valid.get(f"{table}_{name}", WIDE) for name in curve.valid if name != "seq"}
        return dataclasses.replace(curve, valid=spans)

    collectives = {op: {n: with_span(op, c) for n, c in curves.items()} for op, curves in profile.collectives.items()}
    gemms = {key: with_span("gemm", c) for key, c in profile.gemms.items()}
    # every head size of the tiny models has a curve of its own
    attentions = {size: with_span("attention", profile.attentions["128"]) for size in ("16", "24/16", "128")}
    names = [f"attention/{size}" for size in attentions] + ["links/ring", "links/all_to_all"]
    names += [f"dispatch/{name}" for name in profile.dispatches] + [f"gemm/{name}" for name in gemms]
    names += [f"grouped_gemm/{name}" for name in profile.grouped]
    here = Origin("a device", True, "measured", 0.01)
    return dataclasses.replace(
        profile,
        gemms=gemms,
        grouped={key: with_span("grouped_gemm", c) for key, c in profile.grouped.items()},
        attentions=attentions,
        collectives=collectives,
        origins={**dict.fromkeys(profile.origins, here), **dict.fromkeys(names, here)},
        measured_on=RUN,
    )


PROXY = load_model("mixtral-8x7b-4l-proxy")


def problem_of(profile: Profile, model: Any = PROXY, **changes: Any) -> Problem:
    return Problem(model=model, profile=profile, workload=workload_of(**{"seq_len": 4096, **changes}))


MOE = Layout(dp=8, ep=8, dispatcher="alltoall")
ALL = measured(NODE)


def lacking(profile: Profile, *names: str, note: str = "") -> Profile:
    """The profile with some operations that were not measured."""
    origins = {n: Origin("h100", bool(note), note or "a rule", 0.05) if n in names else o for n, o in profile.origins.items()}
    return dataclasses.replace(profile, origins=origins)


# ---------------------------------------------------------------- what lies beyond


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (PROXY, MOE),
        (PROXY, Layout(tp=2, dp=4, ep=4, etp=2, dispatcher="allgather", sequence_parallel=True)),
        (PROXY, Layout(dp=8, ep=8, dispatcher="deepep")),
        (TINY_LATENT, Layout(tp=2, cp=2, dp=2, ep=8, dispatcher="alltoall", sequence_parallel=True)),
        (TINY_DENSE, Layout(dp=4, pp=2, edp=4)),
    ],
)
def test_nothing_lies_beyond_where_all_was_measured(model: Any, layout: Layout) -> None:
    assert beyond(problem_of(ALL, model), layout) == ()


def test_across_domains_the_law_or_the_groups_must_be_measured() -> None:
    layout = Layout(dp=16, ep=8, edp=2, dispatcher="alltoall", dp_overlap=False)
    assert beyond(problem_of(measured(TWO_NODES)), layout) == ()
    alone = measured(TWO_NODES)
    alone = dataclasses.replace(alone, origins={n: o for n, o in alone.origins.items() if not n.startswith("links/")})
    found = beyond(problem_of(alone), layout)
    assert [(b.operation, b.size) for b in found] == [("links/ring", "")]
    exchanged = dataclasses.replace(layout, ep=16, edp=1)
    assert {b.operation for b in beyond(problem_of(alone), exchanged)} == {"links/ring", "links/all_to_all"}
    # these very groups were measured: no law is needed for them
    groups = {op: {group: alone.collectives[op][8] for group in ("16/2", "2/2")} for op in alone.collectives}
    here = Origin("a device", True, "measured", 0.01)
    known = {f"multi_node/{op} of {group}": here for op in groups for group in groups[op]}
    with_groups = dataclasses.replace(alone, multi_node=groups, origins={**alone.origins, **known})
    assert beyond(problem_of(with_groups), layout) == ()
    assert beyond(problem_of(with_groups), exchanged) == ()


def test_nominal_profiles_are_not_looked_at() -> None:
    assert beyond(problem_of(dataclasses.replace(ALL, measured_on=None, origins={})), MOE) == ()


def test_a_size_outside_is_named_with_its_share() -> None:
    narrow = measured(NODE, grouped_gemm_m=(1.0, 64.0))
    found = beyond(problem_of(narrow), MOE)
    assert {b.operation for b in found} == {"grouped_gemm/bf16", "grouped_gemm/bf16-dgrad", "grouped_gemm/bf16-wgrad"}
    # 4096 tokens of each of 8 ranks go to 2 of 8 experts
    assert all((b.size, b.value, b.low, b.high) == ("m", 8192.0, 1.0, 64.0) for b in found)
    plan = price_plan(problem_of(NODE), MOE)
    share = sum(float(s) for part, s in plan.time if part.endswith("expert GEMM")) / plan.step_s
    assert sum(b.share for b in found) == pytest.approx(share, rel=0.1)
    assert [b.share for b in found] == sorted((b.share for b in found), reverse=True)


def test_a_factor_of_two_outside_is_still_within() -> None:
    assert beyond(problem_of(measured(NODE, grouped_gemm_m=(1.0, 4096.0))), MOE) == ()
    assert beyond(problem_of(measured(NODE, grouped_gemm_m=(16384.0, 32768.0))), MOE) == ()
    assert beyond(problem_of(measured(NODE, grouped_gemm_m=(16385.0, 32768.0))), MOE)


def test_sides_of_a_range_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(measured(NODE, gemm_n=(2048.0, 8192.0)))
    # the head lies above; the keys and values, half as wide as the least, are within
    assert [(b.operation, b.size, b.value) for b in beyond(problem, MOE)] == [("gemm/bf16", "n", 32000.0)]
    # the router lies far below, but hardly takes time
    monkeypatch.setattr(coverage, "LEAST_SHARE", 0.0)
    (head, router) = beyond(problem, MOE)
    assert (router.size, router.value) == ("n", 8.0) and 0.0 < router.share < 0.005 < head.share


def test_messages_have_a_range_too() -> None:
    found = beyond(problem_of(measured(NODE, all_to_all_message_bytes=(1.0, 1000.0))), MOE)
    assert [(b.operation, b.size) for b in found] == [("collectives/all_to_all of 8", "message_bytes")]
    # 4096 tokens, 2 copies of 4096 elements in bf16, of which 7 in 8 leave; the curve counts the whole buffer
    assert found[0].value == pytest.approx(4096 * 2 * 4096 * 2)


def test_what_a_layout_does_not_use_is_not_named() -> None:
    profile = lacking(ALL, "dispatch/deepep-dispatch", "dispatch/hybridep-dispatch", "collectives/all_gather of 4")
    assert beyond(problem_of(profile), MOE) == ()
    found = beyond(problem_of(profile), dataclasses.replace(MOE, dispatcher="deepep"))
    assert [b.operation for b in found] == ["dispatch/deepep-dispatch"]


def test_curves_that_were_taken_over_count_as_not_measured() -> None:
    for profile in (lacking(ALL, "gemm/bf16"), lacking(ALL, "gemm/bf16", note=AS_NOMINAL + "a table")):
        found = beyond(problem_of(profile), MOE)
        assert [(b.operation, b.size) for b in found] == [("gemm/bf16", "")]
        assert found[0].share > 0.05


def test_another_head_size_counts_as_not_measured() -> None:
    sizes = {size: curve for size, curve in ALL.attentions.items() if size != "16"}
    profile = dataclasses.replace(ALL, attentions=sizes, origins={n: o for n, o in ALL.origins.items() if n != "attention/16"})
    assert [b.operation for b in beyond(problem_of(profile, TINY_MOE), MOE)] == ["attention/16"]


def test_groups_between_measured_ones_count_as_not_measured() -> None:
    layout = Layout(tp=4, dp=2, ep=8, dispatcher="alltoall", sequence_parallel=True)
    names = [f"collectives/{op} of 4" for op in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")]
    profile = dataclasses.replace(
        ALL,
        collectives={op: {n: c for n, c in curves.items() if n != 4} for op, curves in ALL.collectives.items()},
        origins={n: o for n, o in ALL.origins.items() if n not in names},
    )
    assert {b.operation for b in beyond(problem_of(profile), layout)} == {
        "collectives/all_gather of 4",
        "collectives/reduce_scatter of 4",
    }


def test_watching_does_not_change_the_price() -> None:
    for layout in (MOE, dataclasses.replace(MOE, dispatcher="deepep"), dataclasses.replace(MOE, moe_schedule="fsmoe 2/4")):
        for precision in ("bf16", "fp8-cs"):
            problem = problem_of(ALL, precision=load_precision(precision))
            watched = coverage._step_s(problem, layout, lambda operation, sizes, seconds: seconds)
            assert watched == pytest.approx(price_plan(problem, layout).step_s, rel=1e-12)


# ---------------------------------------------------------------- words and intervals


def test_the_remark_names_the_largest_and_what_to_do() -> None:
    several = [
        Beyond(operation="grouped_gemm/bf16", size="m", value=512, low=1, high=64, share=0.2),
        Beyond(
            operation="collectives/all_to_all of 8", size="message_bytes", value=2.0**30, low=2.0**16, high=2.0**29, share=0.1
        ),
        Beyond(operation="links/ring", size="", share=0.05),
        Beyond(operation="gemm/bf16", size="", share=0.01),
    ]
    (text,) = with_remark([], problem_of(ALL), several)
    assert text == (
        "priced beyond what was measured: grouped gemm bf16 at m 512 (measured from 1 to 64, 20.0% of the step), "
        "all to all of 8 at message bytes 1.0 GiB (measured from 64.0 KiB to 512.0 MiB, 10.0% of the step), "
        "rings between domains (not measured, 5.0% of the step), 1 more; "
        "measure with `moeplan profile --model mixtral-8x7b-4l-proxy --resume`"
    )
    assert with_remark(["one", text, "one"], problem_of(ALL), []) == ("one",)
    assert with_remark([text, "two"], problem_of(ALL), several[2:3])[0] == "two"


def test_kinds_of_what_lies_outside() -> None:
    def of(operation: str, size: str = "m") -> set[str]:
        return set(kinds([Beyond(operation=operation, size=size)]))

    assert of("gemm/bf16") == of("gemm/fp8") == {"dense GEMM"}
    assert of("grouped_gemm/fp8-dgrad") == {"expert GEMM"}
    assert of("attention/192/128") == {"attention core"}
    assert of("collectives/all_gather of 4") == {"tensor-parallel exchange", "data-parallel exchange"}
    assert of("multi_node/all_to_all of 16/2") == {"expert all-to-all"}
    assert of("gemm/bf16", size="") == set()  # such a curve counts as scaled by its origin
    assert set().union(*(of(name) for name in NODE.origins)) <= set(KINDS)


def test_the_interval_widens() -> None:
    inside, outside = (price_plan(problem_of(p), MOE) for p in (ALL, measured(NODE, gemm_m=(1.0, 16.0))))
    assert inside.step_s == outside.step_s
    assert outside.low_s < inside.low_s < inside.high_s < outside.high_s
    assert not any("beyond" in text for text in inside.remarks) and sum("beyond" in text for text in outside.remarks) == 1
