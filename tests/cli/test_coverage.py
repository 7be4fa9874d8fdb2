"""What was not measured is said wherever a plan is priced with a measured profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moeplan.planner.plan import load_plan
from moeplan.profiles.measured import measured_profile
from tests.cli.conftest import Moeplan, question
from tests.conftest import NODE
from tests.profiles.synthetic import environment_of, samples_of

SAID = "note: priced beyond what was measured: "


def test_solve_estimate_and_explain_say_what_was_not_measured(moeplan: Moeplan, tmp_path: Path) -> None:
    profile, plan = tmp_path / "profile.yaml", tmp_path / "plan.yaml"
    small = [s for s in samples_of(NODE) if s.op != "gemm" or s.sizes["m"] <= 1024]
    measured_profile(small, environment_of(NODE)).save(profile)
    asked = question(profile=profile, cluster=None)
    commands = (
        ("solve", *asked, "--pin", "tp=1", "--pin", "ep=8", "-o", plan),
        ("estimate", *asked, "--ep", 8),
        ("estimate", plan),
        ("explain", plan),
    )
    for command in commands:
        shown = moeplan(*command)
        assert shown.code == 0, shown.err
        assert shown.err.count(SAID) == 1, command
        assert "gemm bf16 at m 32000 (measured from 64 to 1024, " in shown.err
        assert "measure with `moeplan profile --model mixtral-8x7b-4l-proxy --resume`" in shown.err
    assert sum(text.startswith("priced beyond") for text in load_plan(plan).remarks) == 1
    # with the whole grid only the head is left
    whole = measured_profile(samples_of(NODE), environment_of(NODE))
    dataclasses.replace(whole, name="whole").save(profile)
    said = moeplan("estimate", *asked, "--ep", 8).err
    assert said.count("gemm bf16 at") == said.count("gemm bf16 at n 32000 ") == 1
