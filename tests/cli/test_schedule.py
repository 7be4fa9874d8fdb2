"""`moeplan schedule`: the table, its JSON, sweeps, constants from every source, and what is refused."""

import csv
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from moeplan.costmodels.moe.schedules import PAIR_SCHEDULES, SCHEDULES
from tests.cli.conftest import Moeplan

SIZES = ["--batch", "4", "--seq-len", "1024", "--hidden", "4096", "--expert-hidden", "14336", "--top-k", "2"]
B = ["--constants", "fsmoe-b", *SIZES]
TYPED = ["--a2a", "175us,306ps/B", "--all-gather", "32us,168ps/B", "--reduce-scatter", "39.1us,167ps/B", "--gemm",
         "92.4us,88.4fs/FLOP", "--element-bytes", "4", "--mp", "4", "--esp", "4", "--ep", "8"]  # fmt: skip
H100 = ["--cluster", "h100x64", "--model", "mixtral-8x7b", "--tokens", "8192", "--mp", "8", "--esp", "8", "--ep", "8"]
MPL = importlib.util.find_spec("matplotlib") is not None


def test_table_of_every_schedule(moeplan: Moeplan) -> None:
    end = moeplan("schedule", *B)
    assert end.code == 0 and end.err == ""
    names = set(re.findall(r"[a-z0-9-]+", end.out))
    assert {schedule.name for schedule in (*SCHEDULES, *PAIR_SCHEDULES)} - names == {"shared-overlap"}
    lines = end.out.splitlines()
    assert lines[0].startswith("4096 tokens x 4096, experts of 14336, k f = 2; mp 4, esp 4, ep 8; constants fsmoe-b; kappa 0")
    assert any(line.startswith("baseline") and "1.00x" in line for line in lines)
    assert "s1 - s2 = A + G1 - O = 41.2 ms + 11.3 ms - 42.0 ms = +10.6 ms in 32 phases; A >= Gk" in end.out
    assert "beta_a (1 - 1/esp) = 230 ps/B > (beta_g + beta_s)/2 = 168 ps/B, so hierarchical" in end.out
    assert "capacity-factor: s2 up to 0.6558, then hierarchical" in end.out


def test_schedules_that_are_alike_share_a_row(moeplan: Moeplan) -> None:
    out = moeplan("schedule", *B).out
    assert "\nthe same as tutel: tutel-improved, pipemoe, lina, fsmoe-no-iio\n" in out and "\npipemoe " not in out
    assert "\npipemoe " in moeplan("schedule", *B, "--gradient-bytes", "50MB").out
    plain = moeplan("schedule", *B[:2], *SIZES, "--mp", "1", "--esp", "1").out
    assert "s1 = s2 = hierarchical" in plain and "with mp 1 and esp 1 s1, s2 and hierarchical move the same" in plain
    assert "the same as baseline: replicated-baseline, s1, s2" in plain  # hierarchical runs on Megatron: a row of its own
    assert "\nhierarchical " in plain and "megatron" in plain


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_columns_are_left_out_before_numbers_are_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    from moeplan.cli import render_schedule
    from moeplan.costmodels.moe.constants import load_constants
    from moeplan.planner.layers.question import Asked
    from moeplan.planner.layers.study import compared

    fits = load_constants("fsmoe-b")
    numbers = {"tokens": 4096, "hidden": 4096, "expert-hidden": 14336, "top-k": 2, **fits.groups}
    question = Asked(numbers=numbers, schedules=SCHEDULES, pairs=PAIR_SCHEDULES).question(fits)
    out = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(render_schedule, "console", lambda: out)
    render_schedule.show(question, fits, compared(question, "replicated-baseline"))
    text = out.file.getvalue()
    assert "…" not in text and "replicated-baseline" in text
    assert ("bound by" in text) == (width == 120)
    assert all(len(line) <= width for line in text.split("\n\n")[1].splitlines())


def test_json_holds_what_the_table_shows(moeplan: Moeplan) -> None:
    data = json.loads(moeplan("schedule", *B, "--json", "--gradient-bytes", "21MB").out)
    assert data["order"] == ["hierarchical", "s2", "s1"] and data["gradient_s"] == pytest.approx(83.7e-6 + 21e6 * 599e-12)
    rows = {row["name"]: row for row in data["schedules"]}
    assert rows["baseline"]["ratio"] == 1.0 and rows["fsmoe"]["ratio"] > rows["hierarchical"]["ratio"] > 1.0
    assert rows["hierarchical"]["runs_on"] == ["megatron"] and rows["s1"]["busy_forward"]["inter"] > 0.5
    assert [pair["name"] for pair in data["pairs"]] == [pair.name for pair in PAIR_SCHEDULES]
    assert data["quickest"] != "comet" and {c["number"] for c in data["crossovers"]} <= {"capacity-factor", "tokens"}


def test_typed_constants_equal_those_of_a_name_and_of_a_file(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: moeplan.constants/1\nname: mine\nelement_bytes: 4\nmp: 4\nesp: 4\nep: 8\nconstants:\n"
        "  a2a: 0.175 ms, 306 ps/B\n  all-gather: 0.032 ms, 168 ps/B\n  reduce-scatter: 0.0391 ms, 167 ps/B\n"
        "  gemm: 0.0924 ms, 88.4 fs/FLOP\n"
    )
    ends = [moeplan("schedule", *a, "--json") for a in (B, [*SIZES, *TYPED], [*SIZES, "--constants", path])]
    tables = [[(r["name"], r["total_s"]) for r in json.loads(end.out)["schedules"]] for end in ends]
    for other in tables[1:]:
        assert [n for n, _ in other] == [n for n, _ in tables[0]]
        assert [s for _, s in other] == pytest.approx([s for _, s in tables[0]])


def test_typed_constants_stand_in_place_of_others(moeplan: Moeplan) -> None:
    slow, fast = (
        {r["name"]: r["total_s"] for r in json.loads(moeplan("schedule", *B, *more, "--json").out)["schedules"]}
        for more in ([], ["--fused-a2a", "1us,100GB/s"])
    )
    assert fast["s1"] < slow["s1"] and fast["hierarchical"] == slow["hierarchical"]


def test_constants_fitted_to_a_profile(moeplan: Moeplan, tmp_path: Path) -> None:
    from moeplan.profiles.hardware import load_cluster
    from moeplan.profiles.nominal import nominal

    nominal(load_cluster("h100x64")).save(tmp_path / "own.yaml")
    ends = [moeplan("schedule", *H100, "--json"), moeplan("schedule", "--profile", tmp_path / "own.yaml", *H100[2:], "--json")]
    first, second = (json.loads(end.out) for end in ends)
    assert first["schedules"] == second["schedules"] and first["kappa"] == nominal(load_cluster("h100x64")).overlap_loss
    assert "lines fitted to the curves of H100x64, with a greatest error of a2a 0.0%" in ends[0].err
    assert set(first["constants"]["fit_errors"]) == set(first["constants"]["given"])
    assert json.loads(moeplan("schedule", *H100, "--kappa", "0", "--json").out)["kappa"] == 0.0


def test_a_model_gives_widths_experts_and_shared_experts(moeplan: Moeplan) -> None:
    end = moeplan("schedule", "--cluster", "h100x64", "--model", "deepseek-v3", "--tokens", "4096", "--ep", "64", "--json")
    layer = json.loads(end.out)["layer"]
    assert (layer["hidden"], layer["expert_hidden"], layer["experts"], layer["topk"]) == (7168, 2048, 256, 8)
    assert "shared-overlap includes the shared experts" in end.err
    assert "shared-overlap" in {row["name"] for row in json.loads(end.out)["schedules"]}


def test_chosen_schedules_and_reference(moeplan: Moeplan) -> None:
    data = json.loads(moeplan("schedule", *B, "--schedules", "s2, fsmoe,1f1b-overlap,s2", "--over", "s1", "--json").out)
    assert [row["name"] for row in data["schedules"]] == ["s2", "fsmoe"] and data["over"] == "s1"
    assert [pair["name"] for pair in data["pairs"]] == ["1f1b-overlap"]


def test_chunks(moeplan: Moeplan) -> None:
    rows = {r["name"]: r for r in json.loads(moeplan("schedule", *B, "--degrees", "3,5", "--json").out)["schedules"]}
    assert {rows["fsmoe"]["r_forward"], rows["fsmoe"]["r_backward"]} <= {3, 5}
    end = moeplan("schedule", *B, "--experts", "8", "--capacity-factor", "1.2", "--json")  # 1228.8 slots
    assert "note: 1228.8 slots for each expert are rounded up to 1229" in end.err
    assert {r["r_forward"] for r in json.loads(end.out)["schedules"]} == {1}


def test_swept_ranks_take_the_place_of_the_groups_of_the_constants(moeplan: Moeplan) -> None:
    end = moeplan("schedule", *B, "--sweep", "ranks=8,32")
    assert end.code == 0 and [line.split(",")[0] for line in end.out.splitlines()[1:]] == ["8", "32"]


def test_remarks_on_groups_that_constants_were_not_fitted_to(moeplan: Moeplan) -> None:
    end = moeplan("schedule", *B, "--esp", "2", "--ranks", "32")
    assert "note: the constants of fsmoe-b were fitted with esp 4, this layer has 2" in end.err
    assert "fitted with ep 8, this layer has 16" in end.err


def test_sweep_to_a_file_and_to_stdout(moeplan: Moeplan, tmp_path: Path) -> None:
    grid = ["--sweep", "capacity-factor=1:2:+0.5", "--sweep", "tokens=512:4096:x2"]
    sizes = ["--constants", "fsmoe-b", "--hidden", "4096", "--expert-hidden", "14336", "--top-k", "2"]
    path = tmp_path / "grid.csv"
    end = moeplan("schedule", *sizes, *grid, "-o", path)
    assert end.code == 0 and end.out == "" and "12 points of 13 schedules written to" in end.err
    assert moeplan("schedule", *sizes, *grid).out == path.read_text()
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(lines) == 12 and lines[0]["capacity_factor"] == "1" and lines[-1]["tokens"] == "4096"
    assert "lina_forward_s" not in lines[0] and {line["winner"] for line in lines} <= {s.name for s in SCHEDULES}
    one = moeplan("schedule", *sizes, "--tokens", "4096", "--capacity-factor", "2", "--json")
    by_name = {row["name"]: row for row in json.loads(one.out)["schedules"]}
    assert float(lines[-1]["s1_forward_s"]) == pytest.approx(by_name["s1"]["forward_s"], rel=1e-8)


def test_examples_of_the_page_run(moeplan: Moeplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    Path("constants.yaml").write_text(block, encoding="utf-8")
    lines = re.findall(r"^moeplan (schedule .*)$", page, flags=re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert moeplan(*shlex.split(line)).code == 0
    assert len(Path("grid.csv").read_text().splitlines()) == 1 + 5 * 3


REFUSED = [  # arguments, exit code, message, hint
    ([], 2, "no constants", "--constants fsmoe-a"),
    (["--constants", "fsmoe-b"], 2, "missing --tokens, --hidden, --expert-hidden, --top-k", "--model"),
    (["--constants", "fsmoe-c"], 2, "unknown constants 'fsmoe-c'", "did you mean 'fsmoe-"),
    (["--constants", "none.yaml"], 1, "constants file 'none.yaml' does not exist", ""),
    ([*B, "--cluster", "h100x8"], 2, "--constants and --cluster both give the constants", ""),
    ([*B, "--a2a", "-1us,3GB/s"], 2, "constant a2a '-1us,3GB/s': '-1us' is not a time of 0 or more", "287us,1.72GB/s"),
    ([*B, "--gemm", "1us,0"], 2, "'0' is not a rate above 0", "45.7TFLOP/s"),
    ([*SIZES, "--a2a", "1,1", "--gemm", "1,1", "--ep", "4", "--esp", "2"], 2,
     "constants 'options': missing all-gather, reduce-scatter", "ALPHA,BETA"),
    ([*SIZES, *TYPED, "--gradient-bytes", "1MB"], 2, "--gradient-bytes needs the constant gradient-all-reduce", ""),
    ([*B, "--gradient-bytes", "1e15B"], 2, "gradient-bytes is 909.5 TiB, at most 256.0 GiB of a rank are handled", ""),
    ([*H100[:6], "--ep", "8", "--mp", "8", "--gradient-bytes", "1GB"], 2,
     "--gradient-bytes: the 8 ranks of the layer are one tensor-parallel group, mp 8", "lower --mp"),
    ([*B, "--gradient-bytes", "much"], 2, "'much' is not a size", ""),
    ([*B, "--tokens", "7"], 2, "tokens and batch x seq-len say the same", ""),
    ([*B, "--ranks", "30"], 1, "esp = 4 does not divide the 30 ranks", ""),
    ([*B, "--ranks", "48", "--ep", "8"], 1, "ep x esp = 8 x 4 = 32 is not the 48 ranks", "ep must be 12"),
    ([*B, "--mp", "3"], 1, "mp = 3 does not divide the ep x esp = 8 x 4 = 32 ranks", "use a divisor of 32"),
    ([*B, "--ep", "1000000"], 2, "= 4,000,000 ranks, at most 65,536 are handled", ""),
    ([*B, "--experts", "8", "--degrees", "3"], 1, "r = 3 chunks do not divide a capacity of 1024 slots", "pad the capacity"),
    ([*B, "--degrees", "0"], 2, "--degrees 0: 0 is not a whole number of at least 1", "1,2,4"),
    ([*B, "--degrees", ""], 2, "--degrees : '' is not a number", "1,2,4"),
    ([*B, "--degrees", "9999"], 2, "9999 is more than the 4096", ""),
    ([*B, "--degrees", "2,x"], 2, "'x' is not a number", ""),
    ([*B, "--experts", "9"], 1, "ep = 8 does not divide the 9 experts", ""),
    ([*B, "--schedules", "fsmo"], 2, "unknown MoE schedule 'fsmo'", "'fsmoe'"),
    ([*B, "--over", "1f1b-overlap"], 2, "--over 1f1b-overlap: a pair of directions", "--over hierarchical"),
    ([*B, "--over", "basline"], 2, "unknown MoE schedule 'basline'", "'baseline'"),
    ([*B, "--kappa", "1.5"], 2, "kappa is 1.5, a number from 0", ""),
    ([*B, "--capacity-factor", "-1"], 2, "capacity-factor is -1, a number above 0 is needed", ""),
    ([*B, "--capacity-factor", "nan"], 2, "capacity-factor is nan", ""),
    ([*B, "--capacity-factor", "1e300"], 2, "capacity-factor is 1e+300, at most 1e+15 is handled", ""),
    ([*B, "--sweep", "batch=1e308,1"], 2, "sweep 'batch=1e308,1': 1e308 is more than the 1e+15", ""),
    ([*B, "--sweep", "kappa=0:1:+1e-310"], 2, "points, more than the 10,000,000", "larger steps"),
    ([*B, "--sweep", "shared-hidden=-5"], 2, "shared-hidden is -5, a number from 0 is needed", ""),
    ([*B, "--sweep", "experts=-8"], 2, "experts is -8, a number from 0 is needed", ""),
    ([*B, "-o", "x.csv"], 2, "-o takes the table of a sweep", "--json"),
    ([*B, "--json", "--sweep", "batch=1"], 2, "a sweep is a table, not JSON", ""),
    ([*B, "--sweep", "bacth=1"], 2, "unknown number to sweep 'bacth'", "'batch'"),
    ([*B, "--sweep", "batch=1:1e9:+1"], 2, "1,000,000,000 points, more than the 10,000,000", ""),
    ([*B, "--sweep", "batch=1,0"], 2, "tokens is 0, a number above 0", ""),
    ([*B, "--sweep", "mp=1,2,3"], 1, "mp = 3 does not divide", ""),
    ([*B, "--sweep", "tokens=1,2"], 2, "tokens and batch x seq-len say the same", ""),
    ([*B, "--sweep", "batch=1", "--schedules", "1f1b-overlap"], 2, "1f1b-overlap is a pair of directions", ""),
    ([*B, "--plot", "x.pdf"], 2, "--plot x.pdf: only .png and .svg can be drawn", "x.svg"),
    ([*B, "--plot", "x.svg", "--sweep", "batch=1", "--sweep", "mp=1"], 2, "--plot draws one swept number, 2 are given", ""),
    (["--cluster", "h100x64", "--model", "llama3-8b", "--tokens", "8", "--ep", "8"], 2, "llama3-8b has no experts", ""),
    (["--cluster", "h100x64", *SIZES, "--ep", "8"], 2, "missing --experts, which a profile needs", "--model"),
    (["--cluster", "h100x8", *H100[2:]], 1, "64 ranks are more than the 8 GPUs of H100x8", "larger cluster"),
    ([*H100, "--sweep", "esp=1,2"], 2, "--sweep esp: constants of a profile are fitted to one set of groups", ""),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message", "hint"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(moeplan: Moeplan, arguments: list[str], code: int, message: str, hint: str) -> None:
    end = moeplan("schedule", *arguments)
    assert end.code == code and end.out == ""
    assert end.complaint.lower().startswith("error: ") and end.complaint.count("\n") <= 1
    assert message in end.complaint and hint in end.complaint


@pytest.mark.parametrize("bad", ["kappa=0:1.2:+0.001", "gradient-bytes=0,-1"])
def test_a_sweep_that_fails_leaves_no_file(moeplan: Moeplan, tmp_path: Path, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.planner.layers.sweep.BLOCK", 100)
    end = moeplan("schedule", *B, "--sweep", bad, "-o", tmp_path / "grid.csv")
    assert end.code == 2 and list(tmp_path.iterdir()) == []


def test_paths_are_checked_before_work_is_spent(moeplan: Moeplan, tmp_path: Path) -> None:
    end = moeplan("schedule", *B, "--sweep", "batch=1", "-o", tmp_path / "none" / "grid.csv")
    assert end.code == 1 and "there is no directory" in end.complaint


@pytest.mark.skipif(MPL, reason="matplotlib is installed")
def test_plots_need_an_extra(moeplan: Moeplan) -> None:
    end = moeplan("schedule", *B, "--plot", "x.svg")
    assert end.code == 2 and "--plot needs matplotlib, which is not installed" in end.complaint
    assert "pip install 'moeplan[plot]'" in end.complaint and not Path("x.svg").exists()


@pytest.mark.skipif(not MPL, reason="matplotlib is not installed")
@pytest.mark.parametrize("name", ["times.svg", "times.png"])
@pytest.mark.parametrize("sweep", [[], ["--sweep", "batch=1:16:x2"]], ids=["bars", "curves"])
def test_plots(moeplan: Moeplan, tmp_path: Path, name: str, sweep: list[str]) -> None:
    end = moeplan("schedule", *B, *sweep, "--plot", tmp_path / name)
    assert end.code == 0 and [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")
