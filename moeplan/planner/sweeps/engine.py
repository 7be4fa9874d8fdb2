"""Where the points of a sweep are solved: an engine takes problems and gives back answers as they are completed.

`LocalEngine` has processes of its own on this machine, started afresh (spawned) when there is work, each with one thread of
linear algebra. A process that dies gives back its problem and is replaced; when this process dies, its pipes close and the
others end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # processes that are spawned set their threads before numpy is loaded
    from moeplan.planner.problem import Problem
    from moeplan.planner.sweeps.answer import Answer

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Engine(Protocol):
    """Something that solves problems, several at a time."""

    def room(self) -> int:
        """How many problems more it takes now."""

    def busy(self) -> int:
        """How many it has."""

    def submit(self, place: int, problem: Problem) -> None:
        """Take a problem; `place` names it."""

    def completed(self, timeout_s: float) -> Sequence[tuple[int, Answer | str]]:
        """Answers that came, waiting no longer than that for the first; text: why the worker of a problem died."""

    def close(self) -> None:
        """End all work."""


@dataclass(slots=True)
class _Worker:
    """A process at the other end of a pipe."""

    process: Any
    pipe: Connection[Any, Any]
    place: int | None = None
    """What it works on."""


class LocalEngine:
    """Processes on this machine."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._workers: list[_Worker] = []

    def room(self) -> int:
        """See `Engine`."""
        return self.jobs - self.busy()

    def busy(self) -> int:
        """See `Engine`."""
        return sum(worker.place is not None for worker in self._workers)

    def submit(self, place: int, problem: Problem) -> None:
        """See `Engine`."""
        for worker in [w for w in self._workers if w.place is None]:
            try:
                worker.pipe.send((place, problem))
            except OSError:  # it died while it had nothing to do
                self._drop(worker)
                continue
            worker.place = place
            return
        worker = self._start()
        worker.place = place
        with contextlib.suppress(OSError):  # it died at once, which `completed` will tell
            worker.pipe.send((place, problem))

    def completed(self, timeout_s: float) -> Sequence[tuple[int, Answer | str]]:
        """See `Engine`."""
        by_pipe = {worker.pipe: worker for worker in self._workers if worker.place is not None}
        if not by_pipe:
            time.sleep(timeout_s)
        out: list[tuple[int, Answer | str]] = []
        for pipe in wait(list(by_pipe), timeout_s) if by_pipe else ():
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                out.append(worker.pipe.recv())
                worker.place = None
            except (EOFError, OSError):
                assert worker.place is not None
                out.append((worker.place, self._drop(worker)))
        return out

    def close(self) -> None:
        """See `Engine`."""
        for worker in list(self._workers):
            worker.process.terminate()
            self._drop(worker)

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()  # so that its end is noticed here
        worker = _Worker(process, here)
        self._workers.append(worker)
        return worker

    def _drop(self, worker: _Worker) -> str:
        """Forget a process that has ended; how it ended."""
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join()
        code = worker.process.exitcode
        worker.process.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(pipe: Connection[Any, Any]) -> None:
    """What a process does: solve what comes, until nobody is there to take the answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    from moeplan.planner.sweeps.answer import answer

    try:
        while True:
            place, problem = pipe.recv()
            pipe.send((place, answer(problem)))
    except (EOFError, OSError):
        return
