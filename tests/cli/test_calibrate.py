"""`moeplan calibrate`, and profiles in the other commands."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from moeplan.planner.calibration import MEASURED, SPREADS
from moeplan.planner.plan import load_plan
from moeplan.profiles.profile_file import is_nominal, load_profile
from tests.cli.conftest import Moeplan, question
from tests.cli.test_bad_input import ODD, places, refused
from tests.planner.measured import BUSY, NOMINAL, WAITING, changed, measured, predicted


def table(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for r in rows for name in r)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a machine whose GEMMs are a quarter slower."""
    rows = measured([*BUSY[:3], WAITING[0]], changed(NOMINAL, bf16=0.75), noise=0.01)
    return table(tmp_path_factory.mktemp("runs") / "measured.csv", rows)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Path:
    """A calibrated profile."""
    from moeplan.planner.calibration import calibrate
    from moeplan.planner.estimate import read_table

    path = tmp_path_factory.mktemp("profiles") / "ours.yaml"
    calibrate(NOMINAL, read_table(runs)).profile.save(path)
    return path


# ---------------------------------------------------------------- calibrate


def test_from_a_cluster(moeplan: Moeplan, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    end = moeplan("calibrate", "--cluster", "h100x16", "--runs", runs, "-o", path)
    assert end.code == 0 and f"profile written to {path}, corrected; use it with --profile {path}" in end.err
    assert "corrected: layouts are off by" in end.out and "sustained share of GEMM rates, bf16" in end.out
    assert "layout left out" in end.out and "mean error" in end.out
    profile = load_profile(path)
    assert profile.cluster == NOMINAL.cluster and profile.sustained["bf16"] < 0.95 * NOMINAL.sustained["bf16"]
    (said,) = profile.calibrated_on
    assert said.table_sha256 == hashlib.sha256(runs.read_bytes()).hexdigest() and said.rows[0] == "long"


def test_from_a_file_and_as_json(moeplan: Moeplan, runs: Path, tmp_path: Path) -> None:
    NOMINAL.save(tmp_path / "start.yaml")
    end = moeplan("calibrate", tmp_path / "start.yaml", "--runs", runs, "--json")
    data = json.loads(end.out)
    assert (end.code, end.err) == (0, "") and data["accepted"] and data["groups"] == 4
    assert [f["name"] for f in data["factors"]] == list(SPREADS)
    assert data["error_after"]["mean"] < data["error_left_out"]["mean"] < data["error_before"]["mean"]
    assert [r["id"] for r in data["rows"]] == ["long", "longer", "tensor", "small"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start.yaml"]


def test_a_correction_that_does_not_help_leaves_the_profile(moeplan: Moeplan, tmp_path: Path) -> None:
    rows = table(tmp_path / "runs.csv", measured(BUSY[:1], changed(NOMINAL, bf16=0.97)))
    NOMINAL.save(tmp_path / "start.yaml")
    end = moeplan("calibrate", tmp_path / "start.yaml", "--runs", rows, "-o", tmp_path / "same.yaml")
    assert end.code == 0 and "not corrected: one layout alone" in end.out and "(not accepted)" in end.out
    assert "unchanged" in end.err
    assert (tmp_path / "same.yaml").read_text() == (tmp_path / "start.yaml").read_text()


def test_a_profile_may_replace_itself(moeplan: Moeplan, ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(ours.read_bytes())
    rows = table(tmp_path / "more.csv", measured(WAITING, changed(load_profile(ours), host=1.8)))
    end = moeplan("calibrate", path, "--runs", rows, "-o", path)
    assert end.code == 0 and len(load_profile(path).calibrated_on) == 2 and load_profile(path).host > 1.2


# ---------------------------------------------------------------- the other commands


def test_solve_with_a_profile(moeplan: Moeplan, ours: Path, tmp_path: Path) -> None:
    plan, usual = tmp_path / "plan.yaml", tmp_path / "usual.yaml"
    end = moeplan("solve", *question(cluster=None, profile=ours), "-o", plan)
    assert end.code == 0 and "on H100x16" in end.out and "note: priced with the profile 'nominal, calibrated'" in end.err
    assert moeplan("solve", *question(profile=ours), "-o", plan).code == 0  # eight of the same
    assert moeplan("solve", *question(), "-o", usual).code == 0
    assert load_plan(plan).problem.profile.cluster == load_plan(usual).problem.profile.cluster
    assert load_plan(plan).step_s > 1.03 * load_plan(usual).step_s
    assert load_plan(plan).problem.profile.sha256 == load_profile(ours).sha256
    for command in (["estimate", plan], ["explain", plan], ["export", plan, "-d", tmp_path / "launch"]):
        end = moeplan(*command)
        assert end.code == 0 and "note: priced with the profile 'nominal, calibrated' of 'ours.yaml'" in end.err


def test_estimate_with_a_profile(moeplan: Moeplan, ours: Path, runs: Path) -> None:
    options = question(profile=ours)
    end = moeplan("estimate", *options, "--ep", 8)
    assert end.code == 0 and end.err.count("note: priced with the profile 'nominal, calibrated'") == 1
    priced = moeplan("estimate", "--runs", runs, "--profile", ours)
    rows = list(csv.DictReader(priced.out.splitlines()))
    wanted = predicted([*BUSY[:3], WAITING[0]], load_profile(ours))
    assert priced.code == 0 and [float(r["predicted_step_s"]) for r in rows] == pytest.approx(wanted, rel=1e-5)


def test_sizes_are_priced_with_the_same_profile(moeplan: Moeplan, ours: Path, tmp_path: Path) -> None:
    target = ["--objective", "gpus", "--target-step-time", "100s"]
    end = moeplan("solve", *question(cluster="h100x16", profile=ours), *target, "-o", tmp_path / "plan.yaml")
    assert end.code == 0
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.layout.world == 8 and plan.problem.profile.sha256 == load_profile(ours).sha256


# ---------------------------------------------------------------- bad input


def test_questions_that_make_no_sense(moeplan: Moeplan, ours: Path, runs: Path, plan_file: Path) -> None:
    for arguments, code, message in (
        (["calibrate", "--runs", runs], 2, "give either a profile file or --cluster"),
        (["calibrate", ours, "--cluster", "h100x8", "--runs", runs], 2, "give either a profile file or --cluster"),
        (["calibrate", ours], 2, "Missing option '--runs'"),
        (["calibrate", ours, "--runs", runs, "-o", runs], 2, "is the run table itself"),
        (["calibrate", "--cluster", "q100x8", "--runs", runs], 2, "unknown device 'q100'"),
        (["calibrate", "--cluster", "a100x8", "--runs", runs], 1, "the profile's device: A100, that of the run: H100"),
        (["solve", *question(cluster="a100x8", profile=ours)], 1, "made for H100x16 with device H100, A100x8 has A100"),
        (["solve", *question(cluster="h100x12", profile=ours)], 1, "12 GPUs do not fill nodes of 8"),
        (["solve", *question(cluster=None)], 2, "missing --cluster"),
        (["solve", *question(profile=plan_file)], 1, "has schema 'moeplan.plan/1'"),
        (["estimate", plan_file, "--profile", ours], 2, "states the whole question; --profile would be ignored"),
        (["estimate", "--runs", runs, "--profile", ours, "--cluster", "h100x8"], 2, "--cluster would be ignored"),
        (["estimate", "--runs", runs, "--profile", runs], 1, f"profile '{runs}'"),
    ):
        refused(moeplan(*arguments), message, code=code)


def test_files_that_cannot_be_used(moeplan: Moeplan, ours: Path, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "future.yaml").write_text("schema: moeplan.profile/9\n")
    untimed = table(tmp_path / "untimed.csv", BUSY)
    blank = table(tmp_path / "blank.csv", [{**BUSY[0], MEASURED: ""}, {**BUSY[1], MEASURED: "soon"}])
    before = sorted(tmp_path.iterdir())
    for profile, rows, message in (
        ("none.yaml", runs, "profile 'none.yaml' does not exist"),
        (tmp_path, runs, "is a directory"),
        (tmp_path / "binary", runs, "not UTF-8 text"),
        (tmp_path / "future.yaml", runs, "has schema 'moeplan.profile/9', this moeplan"),
        (ours, "none.csv", "run table 'none.csv' does not exist"),
        (ours, tmp_path / "empty.csv", "lacks the columns id, model"),
        (ours, tmp_path / "binary", "not UTF-8 text"),
        (ours, ours, "run table"),
        (ours, untimed, "the run table has no column measured_step_s"),
        (ours, blank, "2 of 2 rows not used: measured_step_s is not a time above 0"),
    ):
        refused(moeplan("calibrate", profile, "--runs", rows, "-o", out), message, code=1)
    refused(moeplan("calibrate", ours, "--runs", runs, "-o", tmp_path / "none" / "p.yaml"), "there is no directory", code=1)
    refused(moeplan("calibrate", ours, "--runs", runs, "-o", tmp_path), "it is a directory", code=1)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_types_in_a_profile(moeplan: Moeplan, ours: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "p.yaml", ours.read_text()
    pick = random.Random(5)
    kept = [p for p in places(yaml.safe_load(text)) if p[0] != "origins" and "valid" not in p and pick.random() < 0.2]
    assert len(kept) > 30
    for place in kept:
        data = yaml.safe_load(text)
        where = data
        for key in place[:-1]:
            where = where[key]
        where[place[-1]] = pick.choice(ODD)
        path.write_text(yaml.safe_dump(data))
        end = moeplan("estimate", *question(cluster=None, profile=path), "--ep", 8, "--pp", 2, "--json")
        if end.code:
            refused(end, "error: ", code=1)
            assert f"profile '{path}'" in end.complaint or "cluster" in end.complaint or place[0] == "cluster"


def test_a_plan_whose_profile_is_gone(moeplan: Moeplan, ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(ours.read_bytes())
    moeplan("solve", *question(profile=path), "-o", tmp_path / "plan.yaml")
    path.unlink()
    for command in (["estimate"], ["explain"], ["export", "-d", tmp_path / "launch"]):
        end = moeplan(command[0], tmp_path / "plan.yaml", *command[1:])
        refused(end, "the plan was priced with '", "put that file there or beside the plan", code=1)
    assert not (tmp_path / "launch").exists()


def test_a_nominal_plan_says_nothing_of_profiles(moeplan: Moeplan, plan_file: Path) -> None:
    assert is_nominal(load_plan(plan_file).problem.profile)
    assert "profile_file" not in plan_file.read_text() and "profile" not in moeplan("estimate", plan_file).err
