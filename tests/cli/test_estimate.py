"""`moeplan estimate`: a plan, a layout from options, or a table of runs."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from moeplan.planner.estimate import OUTPUT_COLUMNS
from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan, question
from tests.planner.published_rows import ROWS, SIMUMAX


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in ROWS for name in row)), restval="")
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def test_a_plan_file(moeplan: Moeplan, plan_file: Path) -> None:
    end = moeplan("estimate", plan_file)
    plan = load_plan(plan_file)
    assert (end.code, end.err) == (0, "")
    assert plan.layout.degrees() in end.out and "80 % of runs" in end.out and ": fits" in end.out
    data = json.loads(moeplan("estimate", plan_file, "--json").out)
    assert data["predicted"]["step_s"] == pytest.approx(plan.step_s, abs=1e-5)


def test_a_layout_from_options_is_that_of_the_plan(moeplan: Moeplan, plan_file: Path) -> None:
    wanted = yaml.safe_load(plan_file.read_text())
    x = load_plan(plan_file).layout
    options = [f"--{n.replace('_', '-')}={getattr(x, n)}" for n in ("tp", "cp", "pp", "vpp", "ep", "etp", "micro_batch")]
    options += [f"--dispatcher={x.dispatcher}", f"--recompute={'+'.join(x.recompute) or 'none'}"]
    options += ["--ep-overlap"] * x.ep_overlap + ([f"--stages={x.stages}"] if x.stages else [])
    data = json.loads(moeplan("estimate", *question(era="deepep-2025"), *options, "--json").out)
    assert data["layout"] == wanted["layout"] and data["predicted"] == wanted["predicted"]


def test_every_option_reaches_the_layout(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    end = moeplan(
        "estimate", *question(cluster="h100x16", global_batch=64), "--tp", 2, "--cp", 2, "--pp", 2, "--vpp", 2, "--ep", 4,
        "--etp", 2, "--micro-batch", 2, "--recompute", "layernorm+moe_act", "--dispatcher", "allgather", "--no-dp-overlap",
        "--cuda-graphs", "attn", "--optimizer-offload", "0.5", "--stages", "Et|t|t|tL", "-o", path,
    )  # fmt: skip
    assert end.code == 0
    x = load_plan(path).layout
    assert (x.tp, x.cp, x.pp, x.vpp, x.dp, x.ep, x.etp, x.edp, x.micro_batch) == (2, 2, 2, 2, 2, 4, 2, 1, 2)
    assert (x.recompute, x.dispatcher, x.dp_overlap) == (("moe_act", "layernorm"), "allgather", False)
    assert (x.cuda_graphs, x.optimizer_offload, x.stages) == (("attn",), 0.5, "Et|t|t|tL")
    dense = moeplan("estimate", *question(model="llama3-8b"), "--tp", 2, "--tp-overlap", "--sharding", "ddp", "-o", path)
    x = load_plan(path).layout
    assert dense.code == 0 and (x.tp_overlap, x.sharding, x.dispatcher) == (True, "ddp", "none")


def test_balanced_stages(moeplan: Moeplan) -> None:
    arguments = question(model="llama3.1-405b", cluster="h100x128", global_batch=64)
    even = moeplan("estimate", *arguments, "--pp", 8, "--tp", 8)
    assert even.code == 1 and "8*1 = 8 chunks do not divide the 126 layers" in even.complaint
    end = moeplan("estimate", *arguments, "--pp", 8, "--tp", 8, "--stages", "balanced", "--json")
    stages = json.loads(end.out)["layout"]["stages"]
    assert end.code == 0 and stages.startswith("Et") and stages.endswith("L")


def test_a_layout_that_does_not_fit_is_priced_and_says_so(moeplan: Moeplan) -> None:
    end = moeplan("estimate", *question(model="mixtral-8x7b"), "--ep", 8)
    assert end.code == 0 and "DOES NOT FIT: " in end.out


def test_remarks_of_a_plan_are_told(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.yaml"
    data = yaml.safe_load(plan_file.read_text())
    data["workload"]["global_batch"] *= 2
    path.write_text(yaml.safe_dump(data))
    end = moeplan("estimate", path)
    assert end.code == 0 and end.err == "note: the workload was changed by hand, so no search stands behind the plan\n"


def test_a_table_to_stdout(moeplan: Moeplan, runs: Path) -> None:
    end = moeplan("estimate", "--runs", runs)
    rows = list(csv.DictReader(end.out.splitlines()))
    assert (end.code, end.err) == (0, "")
    assert end.out.splitlines()[0] == ",".join(OUTPUT_COLUMNS)
    assert [r["id"] for r in rows] == [r["id"] for r in ROWS]


def test_a_table_to_a_file(moeplan: Moeplan, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "predicted.csv"
    end = moeplan("estimate", "--runs", runs, "-o", path)
    assert (end.code, end.out) == (0, "")
    assert end.err == f"10 rows: 2 ok, 6 partial, 2 unsupported; written to {path}\n"
    assert path.read_text() == moeplan("estimate", "--runs", runs).out


def test_a_table_as_json(moeplan: Moeplan, runs: Path) -> None:
    rows = json.loads(moeplan("estimate", "--runs", runs, "--json").out)
    assert [list(r) for r in rows] == [list(OUTPUT_COLUMNS)] * len(ROWS)
    assert next(r for r in rows if r["id"] == SIMUMAX["id"])["status"] == "ok"


@pytest.mark.parametrize(
    "also", (["--tp", "2"], ["--model", "x"], ["--era", "latest"], ["--no-mtp"], ["--dispatcher", "alltoall"])
)
@pytest.mark.parametrize("source", ("plan", "runs"))
def test_what_would_be_ignored_is_refused(moeplan: Moeplan, plan_file: Path, runs: Path, also: list[str], source: str) -> None:
    given = [plan_file] if source == "plan" else ["--runs", runs]
    end = moeplan("estimate", *given, *also)
    assert end.code == 2 and f"states the whole question; {also[0]} would be ignored" in end.complaint


def test_a_plan_and_a_table(moeplan: Moeplan, plan_file: Path, runs: Path) -> None:
    end = moeplan("estimate", plan_file, "--runs", runs)
    assert end.code == 2 and end.complaint == "error: give a plan file or --runs, not both"


def test_the_run_table_is_not_overwritten(moeplan: Moeplan, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(runs)
    before = runs.read_text()
    for path in (runs, tmp_path / "link.csv"):
        end = moeplan("estimate", "--runs", runs, "-o", path)
        assert end.code == 2 and "is the run table itself" in end.complaint and runs.read_text() == before
