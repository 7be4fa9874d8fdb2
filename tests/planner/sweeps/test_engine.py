"""Processes of this machine solve as this one does, and a process that dies gives back its problem."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from moeplan.planner.sweeps.answer import Answer, answer
from moeplan.planner.sweeps.engine import LocalEngine
from tests.planner.sweeps.cases import small


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    found = LocalEngine(1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sweep = small(tmp_path_factory.mktemp("sweep"))
    return sweep.problem_of(next(sweep.points()), print)


def outcome(engine: LocalEngine) -> Answer | str:
    """What comes next, however long it takes."""
    while True:
        for _, found in engine.completed(1.0):
            return found


def test_a_process_solves_as_this_one(engine: LocalEngine, problem: Any) -> None:
    engine.submit(7, problem)
    assert (engine.busy(), engine.room()) == (1, 0)
    found, here = outcome(engine), answer(problem)
    assert isinstance(found, Answer) and (found.layout, found.step_s) == (here.layout, here.step_s)
    assert (engine.busy(), engine.room()) == (0, 1)


def test_a_process_that_is_killed_at_work_and_one_that_is_killed_idle(engine: LocalEngine, problem: Any) -> None:
    engine.submit(0, problem)
    outcome(engine)
    idle = engine._workers[0].process
    os.kill(idle.pid, signal.SIGKILL)
    idle.join()
    engine.submit(1, problem)  # takes another process
    (worker,) = engine._workers
    os.kill(worker.process.pid, signal.SIGKILL)
    assert outcome(engine) == "signal 9" and engine._workers == [] and engine.room() == 1
    engine.submit(1, problem)
    assert isinstance(outcome(engine), Answer)


def test_closing_ends_what_is_at_work(problem: Any) -> None:
    engine = LocalEngine(1)
    engine.submit(0, problem)
    process = engine._workers[0].process.pid
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert engine.completed(0.0) == [] and engine.busy() == 0


def test_processes_end_with_the_one_that_started_them() -> None:
    script = """
import os, signal
from moeplan.planner.sweeps.engine import LocalEngine
if __name__ == "__main__":
    engine = LocalEngine(1)
    engine.submit(0, "no problem")
    print(engine._workers[0].process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=300)  # ends when the last process that holds the pipe has ended
    assert process.returncode == -signal.SIGKILL and int(out) != process.pid
