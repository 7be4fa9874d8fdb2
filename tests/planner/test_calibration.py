"""Calibration finds out what is different about a machine, predicts better what it has not seen, and leaves the rest alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.price import Pricing
from moeplan.errors import ProblemError
from moeplan.planner.bounds import least_step_seconds
from moeplan.planner.calibration import MEASURED, SPREADS, Calibration, calibrate
from moeplan.planner.factors import ENOUGH
from moeplan.planner.solve import solve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from tests.planner import tiny
from tests.planner.measured import BUSY, NOMINAL, TALKING, WAITING, changed, measured, predicted, row

ALL = [*BUSY, *WAITING, *TALKING]
LONGEST = row("longest", "llama3-8b", 16, 32768, 16, cp=4)
FULL = row("full", "deepseek-v2-lite", 16, 4096, 64, ep=16)
RATES = ("stream_bytes_per_s", "gemms", "grouped", "attentions", "collectives", "dispatches", "cluster")


def factor(result: Calibration, name: str) -> float:
    """Change of a factor."""
    c = next(c for c in result.corrections if c.name == name)
    return c.after / c.before


def error(rows: Sequence[Mapping[str, str]], truth: Profile, guess: Profile) -> float:
    """Mean log error of a profile on layouts whose times are known."""
    pairs = zip(predicted(rows, guess), predicted(rows, truth), strict=True)
    return float(np.mean([abs(math.log(a / b)) for a, b in pairs]))


def untouched(before: Profile, after: Profile) -> bool:
    """Whether all curves and rates are the same objects."""
    return all(getattr(before, name) is getattr(after, name) for name in RATES)


# ---------------------------------------------------------------- a machine that is known


@pytest.mark.parametrize(
    ("name", "amount", "seen", "held"),
    [
        ("bf16", 0.75, [*BUSY[:2], *WAITING[:2]], BUSY[2:]),
        ("bf16", 1.3, [*BUSY[:2], *WAITING[:2]], BUSY[2:]),
        ("attention", 0.65, [*BUSY[:2], LONGEST, *BUSY[3:]], BUSY[2:3]),
        ("host", 1.9, [*WAITING[:2], BUSY[0]], WAITING[2:]),
        ("host", 0.5, [*WAITING[:2], BUSY[0]], WAITING[2:]),
        ("exposed", 1.6, [*TALKING[:2], FULL, *BUSY[:2]], TALKING[2:]),
    ],
)
def test_what_is_different_is_found(name: str, amount: float, seen: list[dict[str, str]], held: list[dict[str, str]]) -> None:
    truth = changed(NOMINAL, **{name: amount})
    result = calibrate(NOMINAL, measured(seen, truth, noise=0.01))
    moved = {n: abs(math.log(factor(result, n))) / SPREADS[n] for n in SPREADS}
    assert result.accepted, result.verdict
    assert max(moved, key=lambda n: moved[n]) == name and (factor(result, name) > 1) == (amount > 1)
    assert result.after.mean < 0.6 * result.before.mean
    assert error(held, truth, result.profile) < 0.75 * error(held, truth, NOMINAL)
    assert untouched(NOMINAL, result.profile)


def test_everything_different_at_once() -> None:
    truth = changed(NOMINAL, bf16=0.8, attention=0.8, host=1.6, exposed=1.4)
    result = calibrate(NOMINAL, measured(ALL, truth, noise=0.02))
    assert result.accepted and result.groups == len(ALL)
    assert all((factor(result, n) > 1) == (n in ("host", "exposed")) for n in ("bf16", "attention", "host", "exposed"))
    assert factor(result, "quantized") == 1.0
    assert result.left_out is not None and result.left_out.mean < 0.5 * result.before.mean
    assert error(ALL, truth, result.profile) < 0.35 * error(ALL, truth, NOMINAL)
    evidence = {c.name: c.evidence for c in result.corrections}
    assert evidence["quantized"] < 1e-12 and evidence["bf16"] > 0.75 and all(0 <= e <= 1 for e in evidence.values())


def test_more_runs_speak_louder() -> None:
    truth = changed(NOMINAL, bf16=0.8)
    few, many = (calibrate(NOMINAL, measured(rows, truth)) for rows in (BUSY[:2], BUSY))
    assert [c.evidence for c in few.corrections][0] < [c.evidence for c in many.corrections][0]
    assert 1 > factor(few, "bf16") > factor(many, "bf16") > 0.8


def test_the_same_run_published_often_is_one_fact() -> None:
    truth = changed(NOMINAL, bf16=0.8)
    rows = measured(BUSY[:2], truth)
    again = [{**rows[0], "id": f"again-{i}"} for i in range(8)]
    once, often = calibrate(NOMINAL, rows), calibrate(NOMINAL, [*rows, *again])
    lone = calibrate(NOMINAL, [*rows, *[{**r, "seq_len": str(8192 + 256 * i)} for i, r in enumerate(again)]])
    seen = [c.corrections[0].evidence for c in (once, often, lone)]
    assert seen[0] < seen[1] < seen[2]


# ---------------------------------------------------------------- what is left alone


def test_nothing_moves_where_predictions_are_right() -> None:
    result = calibrate(NOMINAL, measured(ALL, NOMINAL))
    assert not result.accepted and "nothing to correct" in result.verdict
    assert result.profile is NOMINAL
    assert all(factor(result, name) == pytest.approx(1.0, abs=1e-4) for name in SPREADS)
    assert result.before.mean == pytest.approx(0.0, abs=1e-8)


def test_noise_is_hardly_fitted() -> None:
    results = [calibrate(NOMINAL, measured(ALL, NOMINAL, noise=0.04, seed=seed)) for seed in (1, 2)]
    refused = [r for r in results if not r.accepted]
    assert len(refused) >= 1 and all(r.profile is NOMINAL and "which is no gain of 12%" in r.verdict for r in refused)
    assert all(error(ALL, NOMINAL, r.profile) < 0.02 for r in results)


def test_a_factor_that_no_row_shows_stays() -> None:
    truth = changed(NOMINAL, bf16=0.7, quantized=0.7)
    graphed = [{**r, "cuda_graphs": "full_iteration", "era": "graphs-2026"} for r in BUSY[:2]]
    result = calibrate(NOMINAL, measured(graphed, truth))
    assert result.accepted and factor(result, "bf16") < 0.95
    assert factor(result, "quantized") == factor(result, "host") == 1.0


def test_no_factor_runs_away() -> None:
    rows = [{**r, MEASURED: str(20 * float(r[MEASURED]))} for r in measured(BUSY, NOMINAL)]
    result = calibrate(NOMINAL, rows)
    assert all(0.6 < factor(result, name) < 1.7 for name in SPREADS)


@pytest.mark.parametrize("times", (0.2, 6.0))
@pytest.mark.parametrize("place", (0, 3))
def test_one_wrong_row_does_not_spoil_the_fit(times: float, place: int) -> None:
    truth = changed(NOMINAL, bf16=0.8, host=1.5)
    rows = measured([*BUSY, *WAITING], truth, noise=0.01)
    rows[place] = {**rows[place], MEASURED: str(times * float(rows[place][MEASURED]))}
    result = calibrate(NOMINAL, rows)
    rest = [r for i, r in enumerate([*BUSY, *WAITING]) if i != place]
    assert result.accepted, result.verdict
    assert error(rest, truth, result.profile) < 0.6 * error(rest, truth, NOMINAL)
    assert any(f"row '{rows[place]['id']}' stays off by " in text for text in result.remarks)


# ---------------------------------------------------------------- one run


@pytest.mark.parametrize("regime", ("busy", "waiting", "talking"))
@pytest.mark.parametrize("amount", (0.6, 0.85, 1.03, 1.6))
def test_one_run_never_makes_its_regime_worse(regime: str, amount: float) -> None:
    kind, rows = {"busy": ("bf16", BUSY), "waiting": ("host", WAITING), "talking": ("exposed", TALKING)}[regime]
    truth = changed(NOMINAL, **{kind: amount})
    for seen in rows:
        result = calibrate(NOMINAL, measured([seen], truth))
        others = [r for r in rows if r is not seen]
        before = error(others, truth, NOMINAL)
        after = error(others, truth, result.profile)
        assert after <= before + 1e-12
        assert result.left_out is None and result.groups == 1 and result.rows[0].left_out_s is None
        assert result.accepted == (result.before.mean >= ENOUGH), result.verdict
        if result.accepted:
            assert after < before and result.after.mean < result.before.mean


def test_one_run_within_what_right_profiles_leave_changes_nothing() -> None:
    result = calibrate(NOMINAL, measured(BUSY[:1], changed(NOMINAL, bf16=0.95)))
    assert not result.accepted and result.profile is NOMINAL
    assert result.verdict.startswith("not corrected: one layout alone, off by ")


# ---------------------------------------------------------------- the profile that comes out


def test_the_profile_says_what_corrected_it() -> None:
    rows = measured(BUSY[:2], changed(NOMINAL, bf16=0.7))
    first = calibrate(NOMINAL, rows, table_sha256="ab" * 32)
    assert (first.profile.name, first.profile.path, first.profile.sha256) == ("nominal, calibrated", "", "")
    (said,) = first.profile.calibrated_on
    assert (said.rows, said.table_sha256) == (("long", "longer"), "ab" * 32) and said.error_after < said.error_before
    assert NOMINAL.calibrated_on == ()
    second = calibrate(first.profile, rows, table_sha256="ab" * 32)
    assert "these runs corrected the profile before; they count twice now" in second.remarks
    assert abs(math.log(factor(second, "bf16"))) < abs(math.log(factor(first, "bf16")))
    if second.accepted:
        assert second.profile.name == first.profile.name and len(second.profile.calibrated_on) == 2


def test_errors_are_those_of_the_rows() -> None:
    rows = measured(BUSY, changed(NOMINAL, bf16=0.8))
    result = calibrate(NOMINAL, rows)
    for fit, base, after in zip(result.rows, predicted(BUSY, NOMINAL), predicted(BUSY, result.profile), strict=True):
        assert (fit.before_s, fit.after_s) == (pytest.approx(base), pytest.approx(after))
        assert fit.left_out_s is not None and base < fit.left_out_s < fit.measured_s
    off = [abs(math.log(r.before_s / r.measured_s)) for r in result.rows]
    assert result.before.median == pytest.approx(np.median(off)) and result.before.mean == pytest.approx(np.mean(off))


def test_other_counts_of_the_same_machine_are_priced_alike() -> None:
    cluster = dataclasses.replace(load_cluster("h100x64"), nics_per_node=4, name="half")
    profile = nominal(cluster)
    result = calibrate(profile, measured(TALKING, changed(profile, exposed=1.5)))
    assert factor(result, "exposed") > 1.1
    # The rows are of hosts with eight NICs by their cells, but the machine is the one of the profile.
    assert [r.before_s for r in result.rows] == pytest.approx(predicted(TALKING, profile))


def test_factors_act_on_what_they_name() -> None:
    problem = tiny.problem(tiny.MIXED, "h100x4", batch=16)
    plan = solve(problem, keep=1).plans[0]

    def parts(**factors: float) -> dict[str, float]:
        profile = changed(problem.profile, **factors)
        cost = Pricing(problem.model, profile, problem.workload, Layouts.of([plan.layout])).step_cost().time
        return {name: float(np.asarray(v).reshape(-1)[0]) for name, v in cost}

    usual, host, exposed, slow = parts(), parts(host=2.0), parts(exposed=2.0), parts(bf16=0.5)
    for name, seconds in usual.items():
        assert (host[name] > seconds) == (name.endswith("host launches") and seconds > 0) or "bubble" in name
        if name.split("/")[-1] in ("tensor-parallel exchange", "context-parallel exchange", "data-parallel exchange"):
            assert exposed[name] == pytest.approx(2 * seconds)
        if name.endswith("GEMM"):
            assert slow[name] > 1.5 * seconds and exposed[name] == host[name] == seconds


@pytest.mark.parametrize("factors", [{"exposed": 0.3}, {"exposed": 3.0}, {"host": 0.2}, {"bf16": 1.4, "exposed": 0.5}])
def test_bounds_hold_under_any_profile(factors: dict[str, float]) -> None:
    problem = tiny.problem(tiny.MIXED, "h100x4", batch=16)
    problem = dataclasses.replace(problem, profile=changed(problem.profile, **factors))
    for plan in solve(problem, keep=5).plans:
        bound = least_step_seconds(problem, Layouts.of([plan.layout]), [1, 2, 4, 8, 16])
        assert float(bound[0]) <= plan.step_s * (1 + 1e-9)


# ---------------------------------------------------------------- rows that cannot be used


def test_rows_of_other_machines_are_left_out_with_a_remark() -> None:
    rows = measured(BUSY, changed(NOMINAL, bf16=0.75))
    mixed = [
        *rows,
        {**rows[0], "id": "a100", "gpu": "A100"},
        {**rows[0], "id": "rack", "gpus_per_node": "4"},
        {**rows[0], "id": "untimed", MEASURED: ""},
        {**rows[0], "id": "negative", MEASURED: "-3"},
        {**rows[0], "id": "odd", MEASURED: "nan"},
        {**rows[0], "id": "lora", "notes": "task=lora"},
    ]
    result = calibrate(NOMINAL, mixed)
    assert [r.id for r in result.rows] == [r["id"] for r in rows]
    assert result.corrections == calibrate(NOMINAL, rows).corrections
    said = "\n".join(result.remarks)
    assert "3 of 11 rows not used: measured_step_s is not a time above 0" in said
    assert "the profile's device: H100, that of the run: A100" in said
    assert "the profile's GPUs of a domain: 8, that of the run: 4" in said and "LoRA" in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "it is empty"),
        ([BUSY[0]], "no column measured_step_s"),
        ([{**BUSY[0], MEASURED: ""}], "1 of 1 rows not used: measured_step_s is not a time above 0"),
        ([{**BUSY[0], MEASURED: "3", "gpu": "A100"}], "the profile's device: H100, that of the run: A100"),
        ([{**BUSY[0], MEASURED: "3", "model": "nothing"}], "1 of 1 rows not used: unknown model 'nothing'"),
    ],
)
def test_tables_without_a_usable_row(rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ProblemError) as caught:
        calibrate(NOMINAL, rows)
    assert message in str(caught.value)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    calibrate(NOMINAL, measured(BUSY[:2], changed(NOMINAL, bf16=0.8)), progress=lambda done, total: told.append((done, total)))
    assert told and all(0 < done <= total for done, total in told) and told == sorted(told)
