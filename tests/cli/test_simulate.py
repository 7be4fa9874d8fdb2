"""`moeplan simulate`: the chart, the files, the numbers, wrong use."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from moeplan.cli.render_timeline import gantt, shown_ranks, stage_states, summary_lines, time_axis
from moeplan.costmodels.timeline import StepTimeline, step_timeline
from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan, question


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with four pipeline stages."""
    from moeplan.costmodels.layout import Layout
    from moeplan.costmodels.model_catalog import load_model
    from moeplan.planner.plan import price_plan
    from tests.planner import tiny

    path = tmp_path_factory.mktemp("plans") / "piped.yaml"
    asked = tiny.problem(load_model("mixtral-8x7b-4l-proxy"), "h100x8", batch=32)
    price_plan(asked, Layout(pp=4, dp=2, ep=2, dispatcher="alltoall")).save(path)
    return path


def timeline_of(path: Path) -> StepTimeline:
    plan = load_plan(path)
    return step_timeline(plan.problem.model, plan.problem.profile, plan.problem.workload, plan.layout)


@pytest.mark.parametrize("columns", [20, 23, 50, 83, 200])
@pytest.mark.parametrize("step_s", [3e-5, 0.0999, 0.1, 0.535, 2.0, 999.0])
def test_time_axis(columns: int, step_s: float) -> None:
    text = time_axis(step_s, columns)
    assert text.startswith("0") and "|" in text and len(text) <= columns
    assert all(re.fullmatch(r"[\d.,]+ (us|ms|s)", label.strip()) for label in text[1:].rstrip("|").split("|"))


def test_chart_and_summary(moeplan: Moeplan, piped: Path) -> None:
    end = moeplan("simulate", piped)
    assert (end.code, end.err) == (0, "")
    lines = end.out.splitlines()
    rows = [line.split()[1] for line in lines if line[:6].strip().isdigit()]
    assert len(rows) == 4 and all(len(row) == len(rows[0]) >= 80 and set(row) <= set("FB=xo.") for row in rows)
    assert rows[3].startswith(".") and "=" in rows[0]
    axis = next(line for line in lines if line.startswith("stage  0"))
    for mark in re.finditer(r"(\d+) ms\|", axis):
        place = mark.end() - 1 - len("stage  ")
        assert place == int(int(mark[1]) / 1e3 / timeline_of(piped).step_s * len(rows[0]))
    assert "200 ms|" in axis and "x exchange" not in end.out
    for text in (
        "1f1b, 16 micro-batches",
        "F forward",
        "by its price: +0.0%",
        "stages wait ",
        "as in the plan; up to 71.2",
    ):
        assert text in end.out
    assert max(map(len, lines)) <= 120


def test_json(moeplan: Moeplan, piped: Path) -> None:
    data = json.loads(moeplan("simulate", piped, "--json").out)
    plan = load_plan(piped)
    assert data["plan_step_s"] == pytest.approx(plan.step_s)
    assert data["difference"] == pytest.approx(data["step_s"] / plan.step_s - 1)
    assert data["micro_batches"] == 16 and data["passes"] == 128 and data["schedule"] == "1f1b"
    for stage, expected in zip(data["stages"], plan.stages, strict=True):
        assert stage["peak_bytes"] == pytest.approx(stage["plan_peak_bytes"]) == pytest.approx(float(expected.parts.total))
        assert stage["busy_s"] + stage["waiting_s"] < data["step_s"]
    assert data == json.loads(moeplan("simulate", piped, "--json").out)


def test_slow_stages_and_spread_loads(moeplan: Moeplan, piped: Path) -> None:
    plain, slow, spread = (
        json.loads(moeplan("simulate", piped, "--json", *more).out)
        for more in ([], ["--slow", "1=1.5", "--slow", "3=1.1"], ["--load-spread", "0.5", "--seed", "7"])
    )
    assert plain["step_s"] < slow["step_s"] and plain["step_s"] < spread["step_s"]
    assert [s["slow"] for s in slow["stages"]] == [1.0, 1.5, 1.0, 1.1] and slow["busiest_stage"] == 1


def test_files(moeplan: Moeplan, piped: Path, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "step.html"
    end = moeplan("simulate", piped, "--trace", trace, "--html", page)
    assert end.code == 0 and end.err == f"note: wrote {trace}\nnote: wrote {page}\n"
    assert {e["ph"] for e in json.loads(trace.read_text())["traceEvents"]} == {"M", "X", "C", "s", "f"}
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "__" not in text
    assert not any(word in text for word in ("http:", "https:", "<link", " src=", "@import"))
    data = json.loads(text.split("const D = ", 1)[1].split(";\n", 1)[0])
    timeline = timeline_of(piped)
    assert data["step"] == pytest.approx(timeline.step_s * 1e6, abs=1)
    for rank, stage in enumerate(data["stages"]):
        assert len(stage["kind"]) == len(stage["start"]) == len(stage["length"]) == 32
        assert max(stage["held"]) == stage["peak"] == pytest.approx(timeline.peak_bytes[rank] / 2**20, abs=0.1)
        assert sum(stage["time"]) == pytest.approx(data["step"], abs=2)
        assert sum(stage["length"]) / 1e6 == pytest.approx(timeline.busy_s[rank], rel=1e-3)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_runs(moeplan: Moeplan, piped: Path, tmp_path: Path) -> None:
    page = tmp_path / "step.html"
    assert moeplan("simulate", piped, "--html", page).code == 0
    stub = Path(__file__).with_name("page_stub.js")
    end = subprocess.run(["node", stub, page], capture_output=True, text=True, timeout=60)
    assert end.returncode == 0, end.stderr
    found = json.loads(end.stdout)
    assert found["legend"].split() == "forward backward exposed exchange optimizer step overhead waits limit".split()
    assert {"0 ms", "500 ms", "stage 3", "0 GiB", "60 GiB"} <= set(found["first"])
    assert "253.020 ms" in found["zoomed"] and len(set(found["zoomed"])) > 8  # labels differ however far one zooms
    assert any(re.fullmatch(r"stage 0: forward of micro-batch \d+, chunk 0\n.* \+ .*", tip) for tip in found["tips"])
    assert "stage 3 waits" in found["tips"] and any(re.fullmatch(r".*: \d+\.\d\d GiB", tip) for tip in found["tips"])
    assert found["picked"].startswith("Memory of stage 1: peak 16.1 GiB allocated, up to 71.2 GiB of the device's 79.6 GiB fit")


def test_many_stages_are_drawn_in_part(piped: Path) -> None:
    from moeplan.costmodels.layout import Layout
    from moeplan.costmodels.model_catalog import load_model
    from moeplan.planner.plan import price_plan
    from tests.planner import tiny

    plan = load_plan(piped)
    assert shown_ranks(64) == sorted({0, 63, *shown_ranks(64)}) and len(shown_ranks(64)) == 32 and shown_ranks(3) == [0, 1, 2]
    asked = tiny.problem(load_model("llama-3.1-405b"), "h100x512", batch=64, seq=8192)
    large = price_plan(asked, Layout(tp=8, pp=63, sequence_parallel=True, dp=1, edp=8))
    for one in (plan, large):
        timeline = step_timeline(one.problem.model, one.problem.profile, one.problem.workload, one.layout)
        for colours in (False, True):
            out = Console(width=100, record=True, force_terminal=colours, file=io.StringIO())
            for block in (*gantt(one, timeline, 100, colours=colours), *summary_lines(one, timeline)):
                out.print(block)
            text = out.export_text()
            assert max(map(len, text.splitlines())) <= 100
            assert ("32 of 63 stages are shown" in text) == (one is large)


def test_states_of_a_stage(piped: Path) -> None:
    timeline = timeline_of(piped)
    fine = stage_states(timeline, 3, 4000)
    assert {"forward", "backward", "waiting"} <= set(fine) and fine[0] in ("waiting", "exchange")
    share = sum(state in ("forward", "backward", "both in turn") for state in fine) / 4000
    assert share == pytest.approx(timeline.busy_s[3] / timeline.step_s, abs=0.02)
    assert len(stage_states(timeline, 0, 20)) == 20


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'PLAN'"),
        (["none.yaml"], 1, "plan file 'none.yaml' does not exist"),
        (["PLAN", "--trace", "none/t.json"], 1, "cannot write trace 'none/t.json': there is no directory 'none'"),
        (["none.yaml", "--html", "none/t.html"], 1, "cannot write page 'none/t.html'"),
        (["PLAN", "--trace", "PLAN"], 2, "would overwrite the plan"),
        (["PLAN", "--trace", "x", "--html", "x"], 2, "--html x would overwrite what --trace writes"),
        (["PLAN", "--slow", "0=-1"], 2, "stage 0 cannot be -1 times as slow"),
        (["PLAN", "--slow", "0=1e9"], 2, "--slow 0=1e9: stages up to 1000 times as slow are simulated"),
        (["PLAN", "--load-spread", "nan"], 2, "a load spread of nan is not between 0 and 10"),
        (["PLAN", "--slow", "4=1.2"], 2, "stage 4 cannot be slow: the plan has 4 pipeline stages, 0 to 3"),
        (["PLAN", "--slow", "1"], 2, "--slow 1: not a stage and a factor"),
        (["PLAN", "--slow", "a=1.2"], 2, "--slow a=1.2: not a stage and a factor"),
        (["PLAN", "--slow", "1=0"], 2, "stage 1 cannot be 0 times as slow"),
        (["PLAN", "--slow", "1=nan"], 2, "stage 1 cannot be nan times as slow"),
        (["PLAN", "--slow", "1=2", "--slow", "1=3"], 2, "--slow 1=3: stage 1 is already 2 times as slow"),
        (["PLAN", "--load-spread", "-1"], 2, "a load spread of -1 is not between 0 and 10"),
        (["PLAN", "--load-spread", "x"], 2, "'x' is not a valid float"),
        (["PLAN", "--seed", "-1"], 2, "-1 is not in the range x>=0"),
        (["PLAN", "--sed", "1"], 2, "--seed"),
    ],
)
def test_wrong_use(
    moeplan: Moeplan,
    piped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = piped.read_bytes()
    end = moeplan("simulate", *[piped if a == "PLAN" else a for a in arguments])
    assert end.code == code and message in end.complaint and end.out == ""
    assert piped.read_bytes() == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["detour", "symbolic", "hard", "twice"])
def test_no_other_path_to_the_plan_is_written_over(moeplan: Moeplan, piped: Path, tmp_path: Path, way: str) -> None:
    plan, link = tmp_path / "plan.yaml", tmp_path / "link"
    shutil.copy(piped, plan)
    arguments: list[object] = ["--trace", link]
    if way == "detour":
        (tmp_path / "a").mkdir()
        arguments = ["--trace", tmp_path / "a" / ".." / "plan.yaml"]
    elif way == "symbolic":
        link.symlink_to(plan)
    elif way == "hard":
        link.hardlink_to(plan)
    else:
        arguments = ["--trace", tmp_path / "x", "--html", tmp_path / "." / "x"]
    end = moeplan("simulate", plan, *arguments)
    assert end.code == 2 and "would overwrite " in end.complaint
    assert plan.read_bytes() == piped.read_bytes() and not (tmp_path / "x").exists()


def test_what_holds_nothing_may_be_written_twice(moeplan: Moeplan, piped: Path) -> None:
    assert moeplan("simulate", piped, "--trace", "/dev/null", "--html", "/dev/null").code == 0
    assert Path("/dev/null").is_char_device()


def test_remarks_on_options_without_effect(moeplan: Moeplan, plan_file: Path, piped: Path, tmp_path: Path) -> None:
    assert "--seed changes nothing without --load-spread" in moeplan("simulate", piped, "--seed", "3").err
    dense = tmp_path / "dense.yaml"
    options = question(model="llama-3.1-8b", global_batch=64, cluster="h100x8")
    assert moeplan("solve", *options, "-o", dense).code == 0
    end = moeplan("simulate", dense, "--load-spread", "0.3")
    assert end.code == 2 and "has no experts to load unevenly" in end.complaint
    assert moeplan("simulate", dense).code == 0 and moeplan("simulate", plan_file).code == 0
