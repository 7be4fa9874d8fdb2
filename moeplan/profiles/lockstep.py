"""The ranks of a run: who they are, steps that all of them end together, and process groups of their devices.

Control goes through a store (TCP), data through NCCL (CUDA, ROCm) or gloo (CPUs), on the same path. A step is a piece of work
on every rank, done in a thread of its own while the main thread watches the clock; then each rank reports to rank 0, which
publishes one verdict: the combined values, or the failure with rank, host and reason, which all ranks raise. A rank that dies
or hangs is found when the time limit of the step is over, or soon after another rank noticed it. Units: seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from moeplan.errors import DeviceError, MoeplanError
from moeplan.profiles.cases import UnsupportedCase
from moeplan.profiles.ranks import Rank, placement

T = TypeVar("T")

TIMEOUT_S = 120.0
"""Longest step by default."""
GRACE_S = 3.0
"""What ranks wait for each other beyond a limit."""
LAST_WORDS_S = 10.0
"""What is left of a step after SIGTERM; launchers kill 30 s after it."""
_SLICE_S = 0.25
"""How often a wait looks for signals and for failures of others."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 200e-6, 5e-3
"""Pauses between questions to the store; the last one is longer for more than a hundred ranks."""
_SLOW = "a longer timeout helps if it was only slow"
_PEER_WORDS = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "connection refused")
"""Errors of a communication library that tell of another rank's end rather than of a fault of this one."""


class ToldElsewhere(DeviceError):
    """A failure of which another rank tells the user."""


class _Late(Exception):
    """A step that did not end in time."""


@dataclass(frozen=True, slots=True)
class _Report:
    """What one rank says at the end of a step."""

    kind: str = "done"
    """"done", "unsupported" (all can go on), "error" (of this rank), "peer" (of another one), "late"."""
    value: Any = None
    text: str = ""
    stop: bool = False
    """Whether this rank was asked to stop after the step."""


class _Hands:
    """A thread that does the work of the steps."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="moeplan-steps").start()

    def _serve(self) -> None:
        while True:
            self._tasks.get()()

    def do(self, work: Callable[[], T], until: Callable[[], bool]) -> T:
        """What `work` gives or raises; `_Late`, and the thread is lost, if `until()` turns true before."""
        done, box = threading.Event(), list[Any]()

        def task() -> None:
            try:
                box.extend((work(), None))
            except BaseException as error:  # handed to the other thread, whatever it is
                box.extend((None, error))
            done.set()

        self._tasks.put(task)
        while not done.wait(_SLICE_S):
            if until():
                raise _Late
        if box[1] is not None:
            raise box[1]
        value: T = box[0]
        return value


class World:
    """All ranks of a run as one of them sees them; `join` makes it, `leave` ends it."""

    def __init__(self, me: Rank, store: Any, timeout_s: float) -> None:
        self.rank, self.ranks, self.local_rank = me.rank, me.ranks, me.local_rank
        self.node, self.nodes, self.per_node = 0, 1, me.ranks
        self.device: Any = None
        self.timeout_s = timeout_s
        self.library = ""
        """Library of the collectives with its version; empty: a single process."""
        self.hosts: Sequence[str] = [socket.gethostname() if rank == me.rank else "" for rank in range(me.ranks)]
        """Name of the host of each rank; empty as long as it is not known."""
        self.stopped = False
        """Whether some rank was asked to stop, by Ctrl-C or SIGTERM."""
        self.asked = False
        """Whether this rank was; the others hear of it at the end of the step."""
        self.failed = False
        """Whether the ranks have lost each other; nothing can be done together any more."""
        self.store = store
        """Key-value store that all ranks reach; None: a single process."""
        self.now_s = time.monotonic()
        """Clock of rank 0 at the end of the last step, the same on all ranks."""
        self._steps = 0
        self._hands = _Hands()
        self._groups: dict[tuple[int, ...], Any] = {}
        self._terminated_at = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def collect(self, step: str, work: Callable[[], T], combine: Callable[[list[T]], Any]) -> Any:
        """What `combine` makes, on rank 0, of the values that `work` gives on each rank; plain data only.

        Raises on all ranks: UnsupportedCase if a rank did and none failed, DeviceError if one failed, died or hangs.
        """
        self._steps += 1
        deadline = time.monotonic() + self.timeout_s if self.ranks > 1 else float("inf")
        try:
            report, failure = self._attempt(work, deadline)
            verdict = self._exchange(step, report, combine, deadline)
        except BaseException:  # a second Ctrl-C
            self.failed = self.ranks > 1
            raise
        self.now_s, self.stopped = verdict.get("now_s", self.now_s), verdict.get("stop", self.stopped)
        if "failure" in verdict:
            self.failed = self.ranks > 1
            if isinstance(failure, MoeplanError) and verdict["rank"] == self.rank == 0:
                raise failure
            kind = DeviceError if verdict.get("teller", 0) == self.rank else ToldElsewhere
            raise kind(verdict["failure"], hint=verdict.get("hint")) from failure
        if "unsupported" in verdict:
            raise UnsupportedCase(verdict["unsupported"])
        return verdict["value"]

    def agree(self, value: T, combine: Callable[[list[T]], Any] = list) -> Any:
        """The values of all ranks in the order of the ranks, or what `combine` makes of them on rank 0."""
        return self.collect("exchange of values", lambda: value, combine)

    @contextlib.contextmanager
    def together(self, step: str) -> Iterator[None]:
        """A block that ends on all ranks or on none; it runs in the thread of the caller, without a limit of its own."""
        failure: list[Exception] = []
        try:
            yield
        except Exception as error:
            failure.append(error)

        def end() -> None:
            if failure:
                raise failure[0]

        self.collect(step, end, lambda _: None)

    def first(self, step: str, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, on all ranks; the others wait without spinning."""
        return self.collect(step, work if self.rank == 0 else lambda: None, lambda values: values[0])

    def group(self, name: str, per_domain: int) -> Any:
        """The process group of this rank in a placement "RANKS/DOMAINS", None if it is in none; all its ranks ask at once."""
        import torch.distributed as dist

        mine = next((g for g in placement(self.ranks, per_domain, name) if self.rank in g), None)
        if mine is None:
            return None
        if mine not in self._groups:
            # Only members take part: a placement of many ranks has hundreds of groups.
            limit = datetime.timedelta(seconds=self.timeout_s)
            self._groups[mine] = dist.new_group(list(mine), timeout=limit, use_local_synchronization=True)
        return self._groups[mine]

    def leave(self) -> None:
        """Part from the other ranks; after a failure the process ends without waiting for what hangs."""
        if self.ranks == 1 or not (self.failed or self.stopped):
            # Else launchers send SIGTERM as soon as one rank has ended, while rank 0 may still write.
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if self.ranks == 1:
            return
        with contextlib.suppress(Exception):
            # The store may be in the process of rank 0, which must outlive the last question.
            self.store.add("left", 1)
            deadline = time.monotonic() + GRACE_S
            while self.rank == 0 and self.store.add("left", 0) < self.ranks and time.monotonic() < deadline:
                time.sleep(0.02)
        if not self.failed:
            import torch.distributed as dist

            deadline = time.monotonic() + self.timeout_s
            with contextlib.suppress(Exception):
                self._hands.do(dist.destroy_process_group, lambda: time.monotonic() > deadline)
                return
        atexit.register(_end_now)

    def listen(self) -> None:
        """From now on Ctrl-C and SIGTERM ask for a stop after the present step; a second Ctrl-C ends at once."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if number == signal.SIGTERM and not self._terminated_at:
            self._terminated_at = time.monotonic()

    def _over(self, deadline: float) -> bool:
        if self._terminated_at and self.ranks > 1:
            deadline = min(deadline, self._terminated_at + LAST_WORDS_S)
        return time.monotonic() > deadline

    def _attempt(self, work: Callable[[], T], deadline: float) -> tuple[_Report, BaseException | None]:
        report: tuple[_Report, BaseException]
        try:
            value = self._hands.do(work, lambda: self._over(deadline) or self._failure_seen())
            return _Report(value=value, stop=self.asked), None
        except UnsupportedCase as error:
            return _Report("unsupported", text=error.message, stop=self.asked), error
        except MoeplanError as error:
            report = _Report("error", text=str(error)), error
        except _Late as error:
            report = _Report("late", text=f"no end within {self.timeout_s:g} s"), error
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {lines[0]}"
            peer = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER_WORDS)
            report = _Report("peer" if peer else "error", text=text), error
        if self.ranks > 1:
            with contextlib.suppress(Exception):
                self.store.set(f"{self._steps}/failed", str(self.rank))
        return report

    def _failure_seen(self) -> bool:
        """Whether another rank has failed in this step."""
        try:
            return self.ranks > 1 and bool(self.store.check([f"{self._steps}/failed"]))
        except Exception:  # the store is gone, and rank 0 with it
            return True

    def _exchange(self, step: str, report: _Report, combine: Callable[[list[Any]], Any], deadline: float) -> dict[str, Any]:
        """The verdict on a step."""
        if self.ranks == 1:
            return self._judged(step, [report], combine)
        verdict_key = f"{self._steps}/verdict"
        try:
            if self.rank == 0:
                reports = self._reports(report, deadline)
                verdict = self._judged(step, reports, combine)
                self.store.set(verdict_key, json.dumps(verdict))
                return verdict
            said = {"kind": report.kind, "value": report.value, "text": report.text, "stop": report.stop}
            self.store.set(f"{self._steps}/{self.rank}", json.dumps(said))
            if self._wait([verdict_key], deadline + 2 * GRACE_S):
                answer: dict[str, Any] = json.loads(self.store.get(verdict_key))
                return answer
        except RuntimeError as error:
            if self.rank == 0:
                return self._failure(step, 0, f"the launcher's store is gone: {error}")
        return {"failure": f"{self._named([0])} does not answer at the end of {step}", "rank": 0, "teller": 1}

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Whether all keys are in the store before the deadline, or soon after a rank has failed."""
        # Asked ever more seldom: a wait of the store itself writes warnings when its time is over, and hears no signals.
        pause_s, most_s = _FIRST_PAUSE_S, max(_LAST_PAUSE_S, _LAST_PAUSE_S * self.ranks / 100)
        failed_at, looked_at = 0.0, time.monotonic()
        while not self.store.check(keys):
            now = time.monotonic()
            if self._over(deadline) or (failed_at and self.rank == 0 and self._over(failed_at + GRACE_S)):
                return False
            if not failed_at and now - looked_at > _SLICE_S:
                failed_at, looked_at = (now if self._failure_seen() else 0.0), now
            time.sleep(pause_s)
            pause_s = min(most_s, 1.2 * pause_s)
        return True

    def _reports(self, mine: _Report, deadline: float) -> list[_Report | None]:
        keys = [f"{self._steps}/{rank}" for rank in range(1, self.ranks)]
        if not self._wait(keys, max(deadline, time.monotonic() + GRACE_S)):
            keys = [key if self.store.check([key]) else "" for key in keys]
        texts = iter(self.store.multi_get([key for key in keys if key]) if any(keys) else [])
        return [mine, *(_Report(**json.loads(next(texts))) if key else None for key in keys)]

    def _judged(self, step: str, reports: Sequence[_Report | None], combine: Callable[[list[Any]], Any]) -> dict[str, Any]:
        """Values combined, or the failure that is most likely the first of all."""

        def of_kind(kind: str) -> tuple[int, str] | None:
            return next(((rank, r.text) for rank, r in enumerate(reports) if r is not None and r.kind == kind), None)

        missing = [rank for rank, report in enumerate(reports) if report is None]
        error, unsupported = of_kind("error"), of_kind("unsupported")
        if error is not None:
            return self._failure(step, *error)
        if missing:
            verb = "does" if len(missing) == 1 else "do"
            text = f"{self._named(missing)} {verb} not answer at the end of {step}: dead, or hanging"
            return {"failure": text, "rank": missing[0], "hint": _SLOW}
        for failure in (of_kind("peer"), of_kind("late")):
            if failure is not None:
                return {**self._failure(step, *(unsupported or failure)), "hint": _SLOW}
        common = {"stop": any(r.stop for r in reports if r), "now_s": time.monotonic()}
        if unsupported is not None:
            return {"unsupported": unsupported[1], **common}
        try:
            value = combine([r.value for r in reports if r])
        except MoeplanError as wrong:
            return {"failure": wrong.message, "hint": wrong.hint, "rank": -1}
        return {"value": value, **common}

    def _failure(self, step: str, rank: int, text: str) -> dict[str, Any]:
        return {"failure": f"{self._named([rank])} failed at {step}: {text}", "rank": rank}

    def _named(self, ranks: Sequence[int]) -> str:
        """Ranks with their hosts, the first four of them."""
        if self.ranks == 1:
            return "this process"
        names = ", ".join(f"{rank} ({self.hosts[rank]})" if self.hosts[rank] else str(rank) for rank in ranks[:4])
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"


def _end_now() -> None:
    """End the process although a thread of it hangs in a library."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)
