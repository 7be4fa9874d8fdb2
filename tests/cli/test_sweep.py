"""`moeplan sweep` as it is used: killed and gone on with, shared by processes, and as table, files and page."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Moeplan
from tests.planner.sweeps.cases import TEXT, write

POINTS = 12


def started(*arguments: object) -> subprocess.Popen[str]:
    """`moeplan sweep` in a process group of its own."""
    command = [sys.executable, "-m", "moeplan", "sweep", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def rows(base: Path) -> list[tuple[Any, ...]]:
    """Place, phase, owner, tries and answer of every point."""
    with sqlite3.connect(base, timeout=60) as connection:
        found = connection.execute("SELECT place, phase, owner, tries, answer FROM points ORDER BY place").fetchall()
    connection.close()
    return found


def wait_for_some(base: Path, process: subprocess.Popen[str], least: int) -> None:
    """Return when so many points are done."""
    while process.poll() is None:
        time.sleep(0.01)
        if base.exists():
            try:
                if sum(row[1] == "done" for row in rows(base)) >= least:
                    return
            except sqlite3.OperationalError:  # the table is not there yet
                continue
    raise AssertionError(f"it ended: {process.communicate()}")


def table(data: Any) -> list[Any]:
    """What a sweep found, without the time that it took."""
    return [{k: v for k, v in point.items() if k != "seconds"} for point in data["points"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Sweep file with a finished database beside it, and what it found."""
    path = write(tmp_path_factory.mktemp("whole"))
    with started(path, "--json") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    return path, table(json.loads(out))


def test_what_an_undisturbed_sweep_finds(undisturbed: tuple[Path, list[Any]]) -> None:
    path, found = undisturbed
    assert [row[:2] for row in rows(path.with_suffix(".sqlite"))] == [(place, "done") for place in range(POINTS)]
    ends = {(p["point"]["device"], p["point"]["precision"], p["status"]) for p in found}
    assert ends == {
        (d, p, "refused" if (d, p) == ("a100", "fp8-cs") else "solved") for d in ("h100", "a100") for p in ("bf16", "fp8-cs")
    }
    assert all(p["cost"] > 0 for p in found if p["point"]["device"] == "h100")


def test_killed_in_the_middle_and_gone_on_with(undisturbed: tuple[Path, list[Any]], tmp_path: Path, moeplan: Moeplan) -> None:
    path, base = write(tmp_path), tmp_path / "small.sqlite"
    with started(path, "--jobs", 2) as process:
        wait_for_some(base, process, 2)
        os.killpg(process.pid, signal.SIGKILL)
    before = rows(base)
    done = [row for row in before if row[1] == "done"]
    assert 2 <= len(done) < POINTS
    end = moeplan("sweep", path, "--jobs", 2, "--json")
    assert end.code == 0 and f"{len(done)} of {POINTS} points are solved, going on" in end.err
    assert table(json.loads(end.out)) == undisturbed[1]
    after = rows(base)
    assert all(row == after[row[0]] for row in done), "what was done is as it was, also the time that it took"
    again = {row[0] for row in before if row[1] == "claimed"}
    assert all(row[3] == (2 if row[0] in again else 1) for row in after) and len(again) <= 2


def test_two_processes_share_the_points(undisturbed: tuple[Path, list[Any]], tmp_path: Path) -> None:
    path, base = write(tmp_path), tmp_path / "small.sqlite"
    lock = sqlite3.connect(base, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")  # neither begins before both are there
    with started(path, "--jobs", 1, "--json") as one, started(path, "--jobs", 1, "--json") as two:
        for process in (one, two):
            fds = Path(f"/proc/{process.pid}/fd")
            while fds.parent.exists() and process.poll() is None and not any(holds(fd, base) for fd in fds.iterdir()):
                time.sleep(0.01)
        lock.execute("COMMIT")
        ends = [process.communicate() for process in (one, two)]
    lock.close()
    assert [one.returncode, two.returncode] == [0, 0], ends
    assert all(table(json.loads(out)) == undisturbed[1] for out, _ in ends)
    after = rows(base)
    assert {row[3] for row in after} == {1}, "every point was claimed once"
    assert len({row[2] for row in after}) == 2, "both had some"


def holds(fd: Path, path: Path) -> bool:
    """Whether a descriptor of another process is of that file."""
    try:
        return os.readlink(fd) == str(path)
    except OSError:
        return False


def test_interrupted(tmp_path: Path, moeplan: Moeplan) -> None:
    path, base = write(tmp_path), tmp_path / "small.sqlite"
    with started(path, "--jobs", 1) as process:
        wait_for_some(base, process, 1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130 and "the same command goes on with the rest" in err and "Traceback" not in err
    assert {row[1] for row in rows(base)} == {"open", "done"}
    shown = moeplan("sweep", path, "--show")
    assert shown.code == 0 and "not solved yet" in shown.out and " open" in shown.out


def test_a_finished_sweep_is_shown_at_once(undisturbed: tuple[Path, list[Any]], moeplan: Moeplan) -> None:
    path, found = undisturbed
    before = rows(path.with_suffix(".sqlite"))
    end = moeplan("sweep", path)
    assert end.code == 0 and rows(path.with_suffix(".sqlite")) == before
    lines = end.out.splitlines()
    assert lines[0].startswith("small: model mixtral-8x7b-4l-proxy, seq 4096; cost of 10^12 tokens")
    assert lines[1].split() == "device GPUs batch prec. best plan step 80 % of runs tok/s/GPU GiB cost".split()
    firsts = [line.split()[:4] for line in lines[2 : 2 + POINTS]]
    assert firsts == [[str(value) for value in point["point"].values()] for point in found]
    assert "12 points: 8 with a plan, 4 refused" in end.out and "refused (4): fp8-cs needs compute capability 8.9" in end.out
    best = max((p for p in found if p["status"] == "solved"), key=lambda p: p["tokens_per_s_per_gpu"])
    assert f"most tokens/s/GPU: {best['tokens_per_s_per_gpu']:,.0f} with device h100, GPUs 8" in end.out
    assert "moeplan solve --model mixtral-8x7b-4l-proxy --cluster h100x8 --global-batch 32" in end.err


def test_the_command_of_the_best_point_gives_its_plan(undisturbed: tuple[Path, list[Any]], moeplan: Moeplan) -> None:
    command = moeplan("sweep", undisturbed[0]).err.splitlines()[-1].partition(": moeplan ")[2].split()
    end = moeplan(*command[: command.index("-o")], "--json")
    best = max((p for p in undisturbed[1] if p["status"] == "solved"), key=lambda p: p["tokens_per_s_per_gpu"])
    plan = json.loads(end.out)["plans"][0]
    assert plan["predicted"]["step_s"] == pytest.approx(best["step_s"], abs=1e-5) and plan["layout"] == best["layout"]


def test_csv_and_parquet_hold_the_table(undisturbed: tuple[Path, list[Any]], tmp_path: Path, moeplan: Moeplan) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert moeplan("sweep", undisturbed[0], "--csv", tmp_path / "t.csv", "--parquet", tmp_path / "t.parquet").code == 0
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    records = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    for line, record, point in zip(lines, records, undisturbed[1], strict=True):
        assert {name: record[name] for name in point["point"]} == point["point"]
        assert record["status"] == line["status"] == point["status"] and list(line) == list(record)
        if point["status"] == "solved":
            assert float(line["step_s"]) == record["step_s"] == point["step_s"]
            assert record["tp"] == point["layout"].get("tp", 1) and record["micro_batch"] == point["layout"]["micro_batch"]
        else:
            assert record["step_s"] is None and line["step_s"] == "" and line["reason"] == point["reason"]


def test_the_page_draws_every_axis(undisturbed: tuple[Path, list[Any]], tmp_path: Path, moeplan: Moeplan) -> None:
    from xml.etree import ElementTree

    assert moeplan("sweep", undisturbed[0], "--html", tmp_path / "s.html").code == 0
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 * 3 and "http" not in page and "<script" not in page
    for name in ("device", "GPUs", "batch", "prec."):
        assert f"<h2>over {name}</h2>" in page and f'aria-label="step time over {name}"' in page
    pictures = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]
    dots = [len(ElementTree.fromstring(picture).findall("circle")) for picture in pictures]
    assert dots == [8, 8, 4] * 4, "a dot a plan; prices are known of h100 alone"
    assert page.count("<tr") == POINTS + 1


def test_many_lines_become_the_best_of_each_colour(tmp_path: Path) -> None:
    from moeplan.cli.sweep_page import sweep_page
    from moeplan.planner.sweeps.answer import Answer
    from moeplan.planner.sweeps.store import Row
    from moeplan.planner.sweeps.sweep import load_sweep

    text = TEXT.replace("[16, 32]", "{from: 16, to: 640, step: 16}")
    sweep = load_sweep(write(tmp_path, text))
    layout = {"world": 8, "dp": 8, "edp": 8}
    made = [
        Row(
            place=place,
            point=point,
            answer=Answer(
                status="solved", layout=layout, step_s=point["global_batch"] / point["gpus"], tokens_per_s_per_gpu=1.0
            ),
        )
        for place, point in enumerate(sweep.points())
    ]
    page = sweep_page(sweep, made)
    over = page.partition("<h2>over GPUs</h2>")[2].partition("<h2>")[0]
    assert "Lines join the best points" in over
    step_time = over.partition("<svg")[2].partition("</svg>")[0]
    assert step_time.count("<circle") == 3 and step_time.count("batch 16,") == 3, "the least batch is the quickest"


BAD: list[tuple[list[str], str, int, str]] = [
    (["--jobs", "0"], "", 2, "0 is not a whole number of at least 1"),
    (["--jobs", "2", "--scheduler", "tcp://127.0.0.1:1"], "", 2, "give one of them"),
    (["--show"], "", 1, "nothing is solved yet"),
    (["--csv", "none/t.csv"], "", 1, "there is no directory 'none'"),
    (["--html", "small.yaml"], "", 2, "the page 'small.yaml' is the sweep file, which would be lost"),
    (["--html", "small.sqlite"], "", 2, "is the database too"),
    (["--db", "small.yaml"], "", 2, "the database 'small.yaml' is the sweep file"),
    (["--db", "other.yaml"], "", 1, "is not a database of a sweep"),
    ([], "[16, 17]", 1, "unknown axis"),
    ([], "{from: 1, to: 5000, step: 1}", 2, "the axes of 'small.yaml' make 40,000 points"),
]


@pytest.mark.parametrize(("options", "batches", "code", "message"), BAD)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moeplan: Moeplan, options: list[str], batches: str, code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = TEXT.replace("[16, 32]", batches or "[16, 32]")
    path = write(Path(), text.replace("global_batch", "globalbatch") if message == "unknown axis" else text)
    write(Path(), name="other.yaml")
    end = moeplan("sweep", path, *options)
    assert end.code == code and message in end.complaint and "Traceback" not in end.err
    assert not Path("small.sqlite").exists(), "nothing was begun"
    assert Path("small.yaml").read_text() != "" and Path("other.yaml").read_text() == TEXT


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moeplan: Moeplan) -> None:
    monkeypatch.setattr("moeplan.cli.sweep_files.find_spec", lambda name: None)
    end = moeplan("sweep", write(tmp_path), "--parquet", tmp_path / "t.parquet")
    assert end.code == 1 and "needs pyarrow" in end.err and "pip install 'moeplan[parquet]'" in end.err
    assert not (tmp_path / "small.sqlite").exists()


def test_no_point_has_a_plan(tmp_path: Path, moeplan: Moeplan) -> None:
    text = TEXT.replace("[h100, a100]", "[a100]").replace("[bf16, fp8-cs]", "[fp8-cs]").split("exclude")[0]
    end = moeplan("sweep", write(tmp_path, text))
    assert end.code == 3 and "no point has a plan" in end.err and "refused (4)" in end.out
