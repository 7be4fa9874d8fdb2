"""`moeplan solve --pareto`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moeplan.cli.render_pareto import HEIGHT, scatter
from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan, question

NODES = ["--cluster", "h100x16", "--memory-limit", "40GiB"]


def test_table_and_plots(moeplan: Moeplan, tmp_path: Path) -> None:
    output = tmp_path / "plan.yaml"
    end = moeplan("solve", *question(), *NODES, "--pareto", "-o", output)
    assert end.code == 0
    for text in (
        "fastest by GPUs",
        "step over GPUs",
        "fastest by memory, on 16 GPUs",
        "step over peak GiB",
        "gap 0%",
        "cheapest",
    ):
        assert text in end.out
    assert end.out.count("●") > 4 and "fastest" in end.out
    assert max(map(len, end.out.splitlines())) <= 120
    assert load_plan(output).layout.world == 16


def test_json_has_all_points(moeplan: Moeplan) -> None:
    data = json.loads(moeplan("solve", *question(), *NODES, "--pareto", "--price-per-gpu-hour", 2, "--json").out)
    points = data["points"]
    assert data["counts"] == [8, 16] and [p["gpus"] for p in points] == sorted(p["gpus"] for p in points)
    assert data["searches"] > len(points) and data["considered"] > 0
    for p in points:
        hours = p["gpus"] * p["step_s"] / (16 * 4096) * 1e12 / 3600
        assert p["gpu_hours_per_trillion_tokens"] == pytest.approx(hours)
        assert p["cost_per_trillion_tokens"] == pytest.approx(2 * hours)
        assert p["free_bytes"] >= 0 and p["peak_bytes"] < p["memory_limit_bytes"] <= 40 * 2**30
        assert p["layout"]["world"] == p["gpus"] and p["step_low_s"] < p["step_s"] < p["step_high_s"]
    fastest = json.loads(moeplan("solve", *question(), *NODES, "--json").out)["plans"]
    assert min(p["step_s"] for p in points) == pytest.approx(min(p["predicted"]["step_s"] for p in fastest), abs=1e-5)


def test_a_point_is_the_answer_to_its_own_question(moeplan: Moeplan) -> None:
    points = json.loads(moeplan("solve", *question(), *NODES, "--pareto", "--json").out)["points"]
    last = points[-1]
    limit = f"{last['memory_limit_bytes']:.0f}"
    again = json.loads(moeplan("solve", *question(cluster="h100x16"), "--memory-limit", limit, "--json").out)
    assert min(p["predicted"]["step_s"] for p in again["plans"]) == pytest.approx(last["step_s"], abs=1e-5)


def test_without_a_price_there_is_no_money(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(), "--pareto")
    assert end.code == 0 and "10^12" not in end.out and "step over GPUs" not in end.out


@pytest.mark.parametrize(
    ("more", "other"),
    [
        (["--objective", "cost"], "--objective cost"),
        (["--objective", "gpus", "--target-step-time", "9s"], "--objective gpus"),
        (["--refine"], "--refine"),
    ],
)
def test_what_it_does_not_go_with(moeplan: Moeplan, more: list[str], other: str) -> None:
    end = moeplan("solve", *question(), "--pareto", *more)
    assert end.code == 2 and f"--pareto does not go with {other}" in end.err and end.out == ""


def test_not_with_a_plan_to_improve(moeplan: Moeplan, plan_file: Path) -> None:
    end = moeplan("solve", "--improve", plan_file, "--pareto")
    assert end.code == 2 and "--pareto does not go with --improve" in end.err and end.out == ""


def test_nothing_fits(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(model="mixtral-8x22b"), "--pareto")
    assert end.code == 3 and "no plan fits" in end.err and end.out == ""


def test_points_lie_where_they_belong() -> None:
    lines = [line.plain for line in scatter("step over x", [1.0, 2.0, 11.0], [10.0, 5.0, 1.0], "{:.0f}".format, float, 60)]
    rows = lines[1 : 1 + HEIGHT]
    assert rows[0].startswith("  10.0 s┤●") and rows[-1].startswith("  1.00 s┤") and rows[-1].endswith("●")
    assert [len(line.rstrip()) for line in (rows[0], rows[-1])] == [10, 60]
    assert re.fullmatch(r" {9}1 +2 +11", lines[-1]) and max(map(len, lines)) == 60
    assert sum(line.count("●") for line in rows) == 3


def test_one_value_alone() -> None:
    lines = [line.plain for line in scatter("step over x", [3.0], [5.0], "{:.0f}".format, float, 60)]
    assert sum(line.count("●") for line in lines) == 1
