"""The database of a sweep gives each point to one process, keeps what is done, and refuses what is not its own."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeplan.errors import FileError, MoeplanError, SchemaError
from moeplan.planner.sweeps import store as sweep_store
from moeplan.planner.sweeps.answer import Answer
from moeplan.planner.sweeps.store import DEATHS, Counts, Store
from moeplan.planner.sweeps.sweep import load_sweep
from tests.planner.sweeps.cases import TEXT, small, write

DONE = Answer(status="infeasible", reason="12 GiB too large")


def opened(directory: Path) -> Store:
    """The database of the small sweep, this process at work on it."""
    store = Store(directory / "s.sqlite")
    store.begin(small(directory))
    store.join()
    return store


def test_claims_do_not_overlap_and_are_recorded_once(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    first, second = one.claim(2), two.claim(20)
    assert [place for place, _ in first] == [0, 1] and [place for place, _ in second] == list(range(2, 12))
    assert first[1][1] == {"device": "h100", "gpus": 8, "global_batch": 16, "precision": "fp8-cs"}
    assert one.claim(1) == [] and one.counts() == Counts(claimed=12)
    assert one.record(0, DONE) and not one.record(0, DONE) and not two.record(1, DONE)
    one.close()
    rows = Store(tmp_path / "s.sqlite").rows()
    assert rows[0].answer == DONE and rows[1].answer is None and {row.tries for row in rows} == {1}


def test_leaving_gives_back_what_is_not_done(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    one.claim(3)
    one.record(1, DONE)
    one.leave()
    assert two.counts() == Counts(open=11, done=1)
    assert [place for place, _ in two.claim(2)] == [0, 2] and not one.record(0, DONE)


def test_points_of_a_process_that_is_gone_are_given_to_another(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.planner.sweeps.test_store import opened
store = opened(Path({str(tmp_path)!r}))
store.claim(20)
print("claimed", flush=True)
input()
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
        store = opened(tmp_path)
        assert store.claim(1) == []  # it lives
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
        assert [place for place, _ in store.claim(20)] == list(range(12))
    assert {row.tries for row in store.rows()} == {2}


def test_a_process_without_a_sign_of_life_has_lost_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, other = opened(tmp_path), opened(tmp_path)
    silent.claim(12)
    assert other.claim(1) == []
    now = time.time() + sweep_store.LEASE_S + 1
    monkeypatch.setattr(time, "time", lambda: now)
    other.beat()
    assert [place for place, _ in other.claim(1)] == [0]
    assert [place for place, _ in silent.claim(1)] == [1]  # it goes on as another owner
    assert not silent.record(0, DONE) and other.record(0, DONE)
    assert not silent.record(2, DONE) and silent.record(1, DONE)


def test_a_host_that_is_not_this_one_is_judged_by_its_signs_of_life(tmp_path: Path) -> None:
    store = opened(tmp_path)
    away = "INSERT INTO owners (id, host, pid, started, beat) VALUES (77, 'elsewhere', 1, 'x', ?)"
    store.base.execute(away, (time.time(),))
    store.base.execute("UPDATE points SET phase = 'claimed', owner = 77")
    assert store.claim(1) == []
    store.base.execute("UPDATE owners SET beat = ? WHERE id = 77", (time.time() - sweep_store.LEASE_S - 1,))
    assert len(store.claim(20)) == 12


def test_a_point_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for _ in range(DEATHS):
        assert store.claim(1)[0][0] == 0
        store.died(0, "signal 11")
    answer = store.rows()[0].answer
    assert (
        answer is not None
        and answer.status == "failed"
        and answer.reason == "its worker process died 3 times, last with signal 11"
    )
    assert store.claim(1)[0][0] == 1


CHANGES = [
    ("[16, 32]", "[16, 32, 64]", r"axis global_batch is \[16, 32\] there, \[16, 32, 64\] now"),
    ("seq_len: 4096", "seq_len: 2048", "key seq_len is 4096 there, 2048 now"),
    ("2.5", "3.5", "price of H100 is 2.5 there, 3.5 now"),
    (">8", ">=16", "exclude is"),
    ("axes:\n", "axes:\n  imbalance: [1]\n", r"axis imbalance is absent there, \[1\] now"),
    ("model: mixtral-8x7b-4l-proxy", "model: mixtral-8x7b", 'key model is "mixtral-8x7b-4l-proxy" there, "mixtral-8x7b" now'),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_a_database_of_another_sweep(tmp_path: Path, old: str, new: str, message: str) -> None:
    opened(tmp_path).close()
    before = (tmp_path / "s.sqlite").read_bytes()
    other = load_sweep(write(tmp_path, TEXT.replace(old, new)))
    store = Store(tmp_path / "s.sqlite")
    with pytest.raises(MoeplanError, match=f"is of another sweep: {message}"):
        store.begin(other)
    store.close()
    assert (tmp_path / "s.sqlite").read_bytes() == before


def test_the_order_of_axes_is_the_order_of_points(tmp_path: Path) -> None:
    opened(tmp_path).close()
    text = TEXT.replace("  global_batch: [16, 32]\n", "").replace("axes:\n", "axes:\n  global_batch: [16, 32]\n")
    with pytest.raises(
        MoeplanError, match="the order of axes is device, gpus, global_batch, precision there, global_batch, dev"
    ):
        Store(tmp_path / "s.sqlite").begin(load_sweep(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("schema", "moeplan.sweep.db/9", "with schema 'moeplan.sweep.db/1', it has 'moeplan.sweep.db/9'"),
        ("moeplan", json.dumps("9.9"), 'moeplan is "9.9" there'),
    ],
)
def test_a_database_of_another_version(tmp_path: Path, name: str, value: str, message: str) -> None:
    store = opened(tmp_path)
    store.base.execute("UPDATE question SET value = ? WHERE name = ?", (value, name))
    store.close()
    with pytest.raises(MoeplanError, match=message):
        Store(tmp_path / "s.sqlite").begin(small(tmp_path))
    with sqlite3.connect(tmp_path / "s.sqlite") as base:
        assert base.execute("SELECT COUNT(*) FROM points").fetchone() == (12,)
    base.close()


def test_files_that_are_no_database_of_a_sweep(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("nothing of the kind\n" * 100, encoding="utf-8")
    with pytest.raises(SchemaError, match="is not a database of a sweep: file is not a database"):
        Store(text)
    with sqlite3.connect(tmp_path / "people.sqlite") as base:
        base.execute("CREATE TABLE people (name TEXT)")
    base.close()
    with pytest.raises(SchemaError, match="is not a database of a sweep with schema"):
        Store(tmp_path / "people.sqlite")
    with pytest.raises(FileError, match="cannot use database"):
        Store(tmp_path / "none" / "s.sqlite")


def test_two_that_begin_at_once_make_one_database(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "s.sqlite"), Store(tmp_path / "s.sqlite")
    one.begin(small(tmp_path))
    one.join()
    one.claim(3)
    assert two.is_new
    two.begin(small(tmp_path))
    assert two.counts() == Counts(open=9, claimed=3)


def test_an_answer_that_was_spoilt(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.base.execute('UPDATE points SET answer = \'{"status": 3, "colour": 1}\' WHERE place = 4')
    with pytest.raises(SchemaError, match="point 4"):
        store.rows()
