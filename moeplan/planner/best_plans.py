"""Best plans of many problems: solved once, kept in memory and on disk, in several processes where asked.

An entry is the best layout with its step time under a hash of everything that decides it: the whole problem, the version, the
constants and the files of the cost models. A layout that is read is priced anew; what does not give the same time, cannot be
read or cannot be written is solved as if it were not there. Entries lie in $XDG_CACHE_HOME/moeplan, else in ~/.cache/moeplan.
Units: seconds, bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.constants import HOST, MEMORY, OVERLAP, STEP
from moeplan.costmodels.layout import Layout
from moeplan.errors import MoeplanError
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.plan_data import layout_data, read_layout
from moeplan.planner.problem import Problem
from moeplan.planner.solve import Progress, solve
from moeplan.records import save_text

SCHEMA = "moeplan.best/1"
SAME = 1e-9
"""Share by which two prices of one layout may differ."""
WORTH_S = 3.0
"""Seconds of work from which on further processes are started: each takes about a second to come up."""
_ROOMS = ("costmodels", "planner", "profiles")
"""Rooms of the package whose files decide what the best plan is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best plan of one problem."""

    plan: Plan | None
    """None: nothing fits."""
    excess_bytes: float
    """By how much the smallest layout that memory forbids misses the device; infinite if no layout got that far."""
    seconds: float
    """What solving it took, be it now or when it was kept."""
    kept: bool
    """Whether it had been solved before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What is kept of an answer."""

    layout: Layout | None
    step_s: float
    excess_bytes: float
    seconds: float


_MEMORY: dict[str, _Entry] = {}


def cache_directory() -> Path | None:
    """Where answers are kept; None where the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "moeplan"
    except RuntimeError:
        return None


def key_of(problem: Problem) -> str:
    """Hash of everything that decides the best plan of a problem."""
    said = repr((SCHEMA, VERSION, _program(), OVERLAP, HOST, STEP, MEMORY, problem))
    return hashlib.sha256(said.encode()).hexdigest()


@functools.cache
def _program() -> str:
    """Hash of the files behind a price and a search: one version can have several while it is worked on."""
    package, found = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(p for room in _ROOMS for p in (package / room).rglob("*") if p.suffix in (".py", ".yaml")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def best_plans(problems: Sequence[Problem], *, jobs: int = 1, progress: Progress | None = None) -> list[Best]:
    """The best plan of each problem, in their order; `jobs` processes share what was not solved before."""
    keys = [key_of(p) for p in problems]
    asked = dict(zip(keys, problems, strict=True))
    found: dict[str, tuple[_Entry, Plan | None]] = {}
    for key, problem in asked.items():
        entry = _MEMORY.get(key) or _read(key)
        priced = None if entry is None else _priced(problem, entry)
        if entry is not None and priced is not None:
            found[key] = entry, priced[0]
    kept = set(found)
    for key, entry in _solved({k: p for k, p in asked.items() if k not in kept}, jobs):
        _write(key, entry)
        priced = _priced(asked[key], entry)
        assert priced is not None, "a layout just found has another price"
        found[key] = entry, priced[0]
        if progress is not None:
            progress(len(found), len(asked))
    for key, (entry, _) in found.items():
        _MEMORY[key] = entry
    return [
        Best(plan=plan, excess_bytes=entry.excess_bytes, seconds=entry.seconds, kept=key in kept)
        for key in keys
        for entry, plan in [found[key]]
    ]


def _priced(problem: Problem, entry: _Entry) -> tuple[Plan | None] | None:
    """The plan of an entry, or that there is none; None where it is not what was kept."""
    if entry.layout is None:
        return (None,)
    try:
        plan = price_plan(problem, entry.layout, remarks=problem.model.remarks)
    except (MoeplanError, ValueError, ArithmeticError, LookupError):  # of a layout that somebody edited
        return None
    same = math.isclose(plan.step_s, entry.step_s, rel_tol=SAME) and plan.layout.world == problem.profile.cluster.gpus
    return (plan,) if same and plan.excess_bytes <= 0 else None


def _solved(problems: Mapping[str, Problem], jobs: int) -> Iterator[tuple[str, _Entry]]:
    """Answers to problems as they are found, by the keys of the problems."""
    left = dict(problems)
    if jobs > 1 and len(left) > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(jobs, len(left)), mp_context=context, initializer=_ignore_interrupts)
        try:
            running = {pool.submit(_solve_one, problem): key for key, problem in left.items()}
            for done in as_completed(running):
                entry = done.result()
                del left[running[done]]
                yield running[done], entry
        except (BrokenProcessPool, OSError):  # a process was killed or could not be started: go on without
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for key, problem in left.items():
        yield key, _solve_one(problem)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one deals with them


def _solve_one(problem: Problem) -> _Entry:
    solution = solve(problem, keep=1)
    plan = solution.plans[0] if solution.plans else None
    return _Entry(
        layout=None if plan is None else plan.layout,
        step_s=0.0 if plan is None else plan.step_s,
        excess_bytes=float(solution.nearest_excess_bytes),
        seconds=round(solution.seconds, 3),
    )


def _read(key: str) -> _Entry | None:
    """What was kept under a key; None where there is nothing or nothing that makes sense."""
    directory = cache_directory()
    if directory is None:
        return None
    try:
        data: Any = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA or data["key"] != key:
            return None
        layout = None if data["layout"] is None else read_layout(data["layout"], "cache")
        numbers = {name: float(data[name]) for name in ("step_s", "excess_bytes", "seconds")}
        return _Entry(layout=layout, **numbers)
    except (OSError, ValueError, LookupError, TypeError, MoeplanError):
        return None


def _write(key: str, entry: _Entry) -> None:
    """Keep an answer; where that cannot be done, it is kept in memory alone."""
    directory = cache_directory()
    if directory is None:
        return
    data = {
        "schema": SCHEMA,
        "key": key,
        "layout": None if entry.layout is None else layout_data(entry.layout),
        "step_s": entry.step_s,
        "excess_bytes": entry.excess_bytes,
        "seconds": entry.seconds,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_text(directory / f"{key}.json", json.dumps(data), "cache entry")
    except (OSError, MoeplanError):
        pass
