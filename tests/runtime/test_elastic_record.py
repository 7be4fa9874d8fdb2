"""The journal of an elastic run and the history that is kept of it."""

from __future__ import annotations

import pytest

from moeplan.errors import SchemaError
from moeplan.runtime.elastic_record import Saved, Started, Step, append, kept, read, summary


def started(step, workers=4):
    return Started(step=step, workers=workers, active=workers, layout=f"DP{workers}")


def step(number, loss=1.0):
    return Step(step=number, loss=loss, samples=(number,))


EVENTS = [started(0), step(1), step(2), Saved(step=2, notice=False), step(3), started(2, 3), step(3, 2.0), step(4)]


def test_there_and_back(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert read(path) == []
    for event in EVENTS:
        append(path, event)
    assert read(path) == EVENTS


def test_steps_after_the_checkpoint_are_done_again():
    assert [(s.step, s.loss) for s in kept(EVENTS)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 1.0)]
    assert summary(EVENTS) == "4 steps kept, 1 done twice; workers: 4 (DP4, 4 active) -> 3 (DP3, 3 active)"
    assert kept([started(0), step(1), started(0), step(1, 3.0)]) == [step(1, 3.0)]


def test_a_cut_line_is_none_and_is_mended(tmp_path):
    path = tmp_path / "journal.jsonl"
    append(path, step(1))
    whole = path.read_text()
    path.write_text(whole + whole[:-5])
    assert read(path) == [step(1)]
    append(path, started(0))
    assert read(path) == [step(1), started(0)]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"event": "stop"}', '{"event": "save", "step": 3}', "3"])
def test_other_lines_are_refused(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    append(path, step(1))
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(SchemaError, match="line 2: not an event"):
        read(path)
