"""A journal keeps every change, knows its question, and says what is wrong with a file."""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.errors import FileError, ProblemError, SchemaError
from moeplan.runtime.journal import Entry, Journal
from moeplan.runtime.outcomes import Outcome

LAYOUTS = [Layout(dp=8, edp=8), Layout(tp=2, dp=4, edp=8, recompute=("moe_act",)), Layout(pp=2, vpp=2, dp=4, edp=4, stages="")]
ENTRIES = [Entry(place=i, layout=x, predicted_s=1.0 + i / 3, predicted_bytes=1e9 / 3) for i, x in enumerate(LAYOUTS)]
IDENTITY = {"model": "aa", "cluster": "bb"}


def begun(path: Path) -> Journal:
    journal = Journal(path)
    journal.begin(IDENTITY, {"steps": 5}, ENTRIES)
    return journal


def test_what_is_put_is_there(tmp_path: Path) -> None:
    journal = begun(tmp_path / "j.sqlite")
    found = Outcome(kind="crash", exit_code=1, message="no", tail=("a", "b"), seconds=1.5)
    changed = dataclasses.replace(ENTRIES[1], phase="ended", trial=1, attempt=2, handle="77", outcome=found, expected_s=0.1)
    journal.put(changed, "crashed")
    journal.note("that is all")
    again = Journal(tmp_path / "j.sqlite")  # the first is still open: all is on disk
    assert again.entries() == [ENTRIES[0], changed, ENTRIES[2]] and again.settings == {"steps": 5} and not again.is_new
    assert [(place, what) for _, place, what in again.events()] == [(1, "crashed"), (None, "that is all")]


def test_a_journal_of_another_question(tmp_path: Path) -> None:
    begun(tmp_path / "j.sqlite").close()
    journal = Journal(tmp_path / "j.sqlite")
    journal.check(IDENTITY)
    with pytest.raises(ProblemError, match="is of another cluster: sha256 bb there, cc in the plan"):
        journal.check({**IDENTITY, "cluster": "cc"})


def test_a_begin_that_fails_leaves_no_half_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    with pytest.raises(FileError):
        journal.begin(IDENTITY, {}, [ENTRIES[0], dataclasses.replace(ENTRIES[1], why=object())])  # type: ignore[arg-type]
    journal.close()
    assert Journal(tmp_path / "j.sqlite").is_new


@pytest.mark.parametrize("content", [b"schema: moeplan.plan/1\n" * 200, b"\0" * 4096])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j.sqlite").write_bytes(content)
    with pytest.raises(SchemaError, match="is not a journal"):
        Journal(tmp_path / "j.sqlite")
    assert (tmp_path / "j.sqlite").read_bytes() == content


def test_another_database(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "j.sqlite") as base:
        base.execute("CREATE TABLE people (name TEXT)")
    base.close()
    with pytest.raises(SchemaError, match="not a journal of a tune"):
        Journal(tmp_path / "j.sqlite")


def test_a_journal_of_another_schema(tmp_path: Path) -> None:
    journal = begun(tmp_path / "j.sqlite")
    journal.base.execute("UPDATE question SET value = 'moeplan.journal/9' WHERE name = 'schema'")
    journal.close()
    with pytest.raises(SchemaError, match="it has 'moeplan.journal/9'"):
        Journal(tmp_path / "j.sqlite")


def test_an_entry_that_was_spoilt(tmp_path: Path) -> None:
    journal = begun(tmp_path / "j.sqlite")
    journal.base.execute("UPDATE candidates SET outcome = '{\"kind\": 3' WHERE place = 1")
    with pytest.raises(SchemaError, match="candidate 1"):
        journal.entries()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot use journal"):
        Journal(tmp_path / "none" / "j.sqlite")
