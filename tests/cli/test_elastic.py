"""`moeplan elastic`: tables, JSON, files, replay, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Moeplan, question


@pytest.fixture(scope="module")
def wide_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the small model with two stages on four nodes."""
    from moeplan.costmodels.model_catalog import load_model
    from moeplan.planner.plan import price_plan
    from moeplan.planner.solve import solve
    from tests.cli.conftest import SMALL
    from tests.planner import tiny

    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    model = load_model(str(SMALL["model"]))
    layout = solve(tiny.problem(model, "h100x32", batch=64, pins="pp=2")).plans[0].layout
    price_plan(tiny.problem(model, "h100x32", batch=64), layout).save(path)
    return path


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "availability.csv"
    path.write_text("time_s,nodes\n0,4\n50000,3\n60000,4\n100000,2\n120000,4\n200000,4\n", encoding="utf-8")
    return path


def test_tables_and_the_policy(moeplan: Moeplan, wide_plan: Path) -> None:
    end = moeplan("elastic", wide_plan, "--nodes", "2..4", "--node-mtbf", "2d", "--repair", "2h")
    assert end.code == 0
    for text in (
        "mixtral-8x7b-4l-proxy on 2 to 4 nodes of 8 H100",
        "layouts by nodes, class 'order'",
        "changes of layout, seconds without progress",
        "samples/s over nodes",
        "below 2 nodes the job waits",
        "a node fails every 2.0 days, is back after 2.0 h",
        "beside the best single layout",
        "checkpoints: torch_dist",
        "H3: random streams",
    ):
        assert text in " ".join(end.out.split()).replace("  ", " ") or text in end.out


def test_json_says_the_same(moeplan: Moeplan, wide_plan: Path, trace_file: Path) -> None:
    end = moeplan("elastic", wide_plan, "--nodes", "2..4", "--consistency", "bitwise", "--trace", trace_file, "--json")
    data = json.loads(end.out)
    assert [c["nodes"] for c in data["counts"]] == [2, 3, 4] and data["consistency"] == "bitwise"
    assert sum(c["pi"] for c in data["counts"]) == pytest.approx(1.0) == sum(c["goodput_share"] for c in data["counts"])
    assert {"H5", "H6", "H7"} <= {h["name"] for h in data["hazards"]}
    assert len(data["transitions"]) == 4 and data["transitions"][0]["kind"] == "unplanned"
    assert data["goodput"] >= data["best_single"] * (1.0 - 1e-9)
    assert [r["name"] for r in data["replay"]][:2] == ["elastic", "rigid"]
    assert data["availability"]["node_mtbf_s"] == pytest.approx((4 * 50000 + 3 * 10000 + 4 * 40000 + 2 * 20000 + 4 * 80000) / 3)


def test_the_trace_is_only_replayed_where_rates_are_given(moeplan: Moeplan, wide_plan: Path, trace_file: Path) -> None:
    end = moeplan("elastic", wide_plan, "--nodes", "2..4", "--trace", trace_file, "--node-mtbf", "20d", "--json")
    data = json.loads(end.out)
    assert data["availability"]["node_mtbf_s"] == 20 * 86400.0 and len(data["replay"]) >= 2
    shown = moeplan("elastic", wide_plan, "--nodes", "2..4", "--trace", trace_file).out
    assert "the recorded history" in shown and "rigid with 1 spare" in shown


def test_files_are_written(moeplan: Moeplan, wide_plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "launch"
    end = moeplan("elastic", wide_plan, "--nodes", "2,4", "-o", out, "--launcher", "torchrun")
    assert end.code == 0 and "start with its README.md" in end.err
    data = json.loads((out / "elastic.json").read_text(encoding="utf-8"))
    assert [c["nodes"] for c in data["counts"]] == [2, 4] and (out / "README.md").exists()
    again = moeplan("elastic", wide_plan, "--nodes", "2,4", "-o", out)
    assert again.code == 1 and "--force" in again.complaint


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--nodes", "a..b"], 2, "'a..b' are not node counts"),
        ([], 2, "Missing option '--nodes'"),
        (["--nodes", "2..4", "--node-mtbf", "-3h"], 2, "--node-mtbf -3h: a time cannot be negative"),
        (["--nodes", "2..4", "--node-mtbf", "0"], 1, "a mean time between failures of a node of 0 s"),
        (["--nodes", "2..4", "--job-mtbf", "0"], 2, "--job-mtbf must be above 0"),
        (["--nodes", "2..4", "--repair=-1"], 2, "--repair -1: a time cannot be negative"),
        (["--nodes", "2..4", "--storage-bandwidth", "0"], 2, "--storage-bandwidth must be above 0"),
        (["--nodes", "2..4", "--storage-bandwidth", "1MB", "--save-interval", "1s"], 1, "saves to storage every"),
        (["--nodes", "2..4", "--save-interval", "0"], 2, "--save-interval 0: a time above 0 is needed"),
        (["--nodes", "2..4", "--stay", "0"], 2, "--stay 0: a time above 0 is needed"),
        (["--nodes", "2..4000"], 2, "'2..4000' are more than 512 node counts"),
        (["--nodes", "4..2"], 2, "'4..2' are no node counts from low to high"),
        (["--nodes", "2..4", "--local-saves"], 2, "--local-saves helps only where the job fails"),
        (["--nodes", "2..4", "--force"], 2, "--launcher, --set and --force say how files are written"),
        (["--nodes", "2..4", "--trace", "none.csv"], 1, "none.csv"),
        (["--nodes", "2..4", "--consistency", "exact"], 2, "'exact' is not one of"),
        (["--nodes", "2..4", "--also", "OTHER", "--consistency", "bitwise"], 1, "'bitwise' does not let layouts differ in"),
    ],
)
def test_wrong_use(moeplan: Moeplan, wide_plan: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    other = tmp_path / "other.yaml"
    if "OTHER" in arguments:
        assert moeplan("solve", *question(cluster="h100x16", global_batch=64), "--pin", "tp=2", "-o", other).code == 0
    end = moeplan("elastic", wide_plan, *[other if a == "OTHER" else a for a in arguments])
    assert end.code == code and message in end.complaint and end.out == ""


def test_a_trace_with_unsorted_times_names_the_line(moeplan: Moeplan, wide_plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("time_s,nodes\n0,4\n50,3\n40,4\n", encoding="utf-8")
    end = moeplan("elastic", wide_plan, "--nodes", "2..4", "--trace", path)
    assert end.code == 1 and "line 4" in end.complaint and "40" in end.complaint


def test_how_long_nodes_must_stay(moeplan: Moeplan, wide_plan: Path, tmp_path: Path) -> None:
    end = moeplan("elastic", wide_plan, "--nodes", "2,4", "--stay", "10m", "-o", tmp_path / "out", "--json")
    (step,) = json.loads(end.out)["steps_up"]
    assert (step["from"], step["to"], step["stay_s"]) == (2, 4, 600.0) and step["grow"] == (step["gain_samples"] > 0.0)
    assert json.loads((tmp_path / "out" / "elastic.json").read_text())["steps_up"] == [step]
    shown = " ".join(moeplan("elastic", wide_plan, "--nodes", "2,4", "--stay", "10m").out.split())
    assert "from 2 to 4 nodes: pays where they stay" in shown and "they stay 10.0 min in the mean: " in shown


def test_a_plan_for_part_of_a_node(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    assert moeplan("solve", *question(cluster="h100x2", global_batch=64), "-o", path).code == 0
    end = moeplan("elastic", path, "--nodes", "1..2")
    assert end.code == 1 and "a plan for 2 of the 8 GPUs of a node" in end.complaint


def test_which_solver_stood_in_is_said(
    moeplan: Moeplan, wide_plan: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pulp

    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])
    end = moeplan("elastic", wide_plan, "--nodes", "2..4", "--trace", trace_file)
    assert end.code == 0 and "CBC solved the programmes" in end.err
