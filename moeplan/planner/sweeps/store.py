"""The database of a sweep: every point, who works on it, and its answer; several processes may work on one file.

A process claims open points, and records an answer only while the claim is its own, so that each point is answered once.
Claims of a process that is gone are open again: at once where the process table of this host says so, else when it gave no
sign of life for `LEASE_S`. Tables: `question` (what the sweep is), `owners` (who works), `points`. Units: seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.errors import ProblemError, SchemaError
from moeplan.planner.database import QUESTION, Database
from moeplan.planner.sweeps.answer import Answer
from moeplan.planner.sweeps.sweep import Point, Sweep

SCHEMA = "moeplan.sweep.db/1"
LEASE_S = 120.0
"""Without a sign of life for so long, a process on another host is gone."""
DEATHS = 3
"""Workers that a point may take with it before it is given up."""
_TABLES = (
    QUESTION,
    "CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, host TEXT, pid INTEGER, started TEXT, beat REAL)",
    "CREATE TABLE points (place INTEGER PRIMARY KEY, point TEXT NOT NULL, phase TEXT NOT NULL DEFAULT 'open', owner INTEGER, "
    "tries INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, answer TEXT)",
    "CREATE INDEX phases ON points (phase)",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A point as it stands in the database."""

    place: int
    """From 0, in the order of the axes."""
    point: Point
    answer: Answer | None
    """None: it is not done."""
    tries: int = 1
    """Times that it was claimed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How many points are in which phase."""

    open: int = 0
    claimed: int = 0
    done: int = 0

    @property
    def total(self) -> int:
        """All points."""
        return self.open + self.claimed + self.done


class Store(Database):
    """A database of a sweep, open for writing."""

    schema, what, kind, option = SCHEMA, "database", "a database of a sweep", "--db"
    owner = 0
    """Number of this process among those that work on it; 0: it does not."""
    _beat_s = 0.0

    def begin(self, sweep: Sweep) -> None:
        """Write down a sweep and its points, all or nothing; or check that they are those of the file."""
        identity = {name: json.dumps(value) for name, value in sweep.identity().items()}
        with self.change():
            if self.is_new and not self._tables():  # else another process has begun it
                for table in _TABLES:
                    self.base.execute(table)
                self.base.executemany("INSERT INTO question VALUES (?, ?)", [("schema", self.schema), *identity.items()])
                points = ((place, json.dumps(point)) for place, point in enumerate(sweep.points()))
                self.base.executemany("INSERT INTO points (place, point) VALUES (?, ?)", points)
        self.is_new = False
        self._check_schema()
        self._check(identity)

    def join(self) -> None:
        """Take part in the work."""
        with self.change():
            self._alive()

    def leave(self) -> None:
        """Give back what is claimed and not done."""
        with self.change():
            self._free(self.owner)

    def beat(self) -> None:
        """Give a sign of life, some times a lease."""
        if time.monotonic() - self._beat_s > LEASE_S / 8:
            with self.change():
                self._alive()

    def claim(self, most: int) -> list[tuple[int, Point]]:
        """Up to `most` open points, which are this process's from now on; those of processes that are gone are open."""
        if most < 1:
            return []
        with self.change():
            self._alive()
            rows = self._open(most)
            if len(rows) < most:
                for owner in self._gone():
                    self._free(owner)
                rows = self._open(most)
            marks = [(self.owner, place) for place, _ in rows]
            self.base.executemany("UPDATE points SET phase = 'claimed', owner = ?, tries = tries + 1 WHERE place = ?", marks)
        return [(place, json.loads(point)) for place, point in rows]

    def record(self, place: int, answer: Answer) -> bool:
        """Write down the answer to a point; False if the claim was lost, and with it the answer."""
        return self._settle("phase = 'done', answer = ?", (json.dumps(dataclasses.asdict(answer)),), place)

    def died(self, place: int, why: str) -> None:
        """Open a point again whose worker died; when that happened too often, its answer is that."""
        self._settle("phase = 'open', owner = NULL, deaths = deaths + 1", (), place)
        reason = f"its worker process died {DEATHS} times, last with {why}"
        failed = json.dumps(dataclasses.asdict(Answer(status="failed", reason=reason)))
        with self.told():
            self.base.execute(
                "UPDATE points SET phase = 'done', answer = ? WHERE place = ? AND phase = 'open' AND deaths >= ?",
                (failed, place, DEATHS),
            )

    def counts(self) -> Counts:
        """How many points are in which phase."""
        with self.told():
            return Counts(**dict(self.base.execute("SELECT phase, COUNT(*) FROM points GROUP BY phase")))

    def finished(self) -> bool:
        """Whether every point is done."""
        with self.told():
            return self.base.execute("SELECT 1 FROM points WHERE phase IN ('open', 'claimed') LIMIT 1").fetchone() is None

    def rows(self, *, done: bool = False) -> list[Row]:
        """All points in the order of the axes, or those that are done."""
        which = "WHERE phase = 'done'" if done else ""
        with self.told():
            found = self.base.execute(f"SELECT place, point, answer, tries FROM points {which} ORDER BY place").fetchall()
        return [self._row(*row) for row in found]

    def _row(self, place: int, point: str, answer: str | None, tries: int) -> Row:
        try:
            known = None if answer is None else Answer(**json.loads(answer))
            return Row(place=place, point=json.loads(point), answer=known, tries=tries)
        except (ValueError, TypeError) as error:
            raise SchemaError(f"database '{self.path}', point {place}: {error}") from None

    def _check(self, identity: dict[str, str]) -> None:
        """Refuse another sweep, and say in what it differs."""
        then = self.question()
        for name, now in identity.items():
            was = then.get(name, "null")
            if was == now:
                continue
            what, before, after = _difference(name, json.loads(was), json.loads(now))
            raise ProblemError(
                f"database '{self.path}' is of another sweep: {what} {before} there, {after} now",
                hint="give another --db, or move that file away",
            )

    def _settle(self, change: str, values: Sequence[Any], place: int) -> bool:
        """Change a point that this process has claimed."""
        with self.told():
            found = self.base.execute(
                f"UPDATE points SET {change} WHERE place = ? AND phase = 'claimed' AND owner = ?",
                (*values, place, self.owner),
            )
        return found.rowcount == 1

    def _alive(self) -> None:
        """Say that this process lives; it is a new owner if it was given up, as when it was stopped for long."""
        found = self.base.execute("UPDATE owners SET beat = ? WHERE id = ?", (time.time(), self.owner))
        if not found.rowcount:
            values = (platform.node(), os.getpid(), _mark(os.getpid()), time.time())
            cursor = self.base.execute("INSERT INTO owners (host, pid, started, beat) VALUES (?, ?, ?, ?)", values)
            self.owner = int(cursor.lastrowid or 0)
        self._beat_s = time.monotonic()

    def _open(self, most: int) -> list[tuple[int, str]]:
        query = "SELECT place, point FROM points WHERE phase = 'open' ORDER BY place LIMIT ?"
        return self.base.execute(query, (most,)).fetchall()

    def _free(self, owner: int) -> None:
        self.base.execute("UPDATE points SET phase = 'open', owner = NULL WHERE phase = 'claimed' AND owner = ?", (owner,))
        self.base.execute("DELETE FROM owners WHERE id = ?", (owner,))

    def _gone(self) -> list[int]:
        """Owners that are no more."""
        rows = self.base.execute("SELECT id, host, pid, started, beat FROM owners WHERE id != ?", (self.owner,))
        here, now = platform.node(), time.time()
        return [
            owner
            for owner, host, pid, started, beat in rows
            if now - beat > LEASE_S or (host == here and _mark(pid) != started)
        ]


def _mark(pid: int) -> str:
    """What tells a running process from later ones of its number; empty: none runs."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        fields = stat.read_text().rpartition(")")[2].split()  # state is the first after the name, start time the 20th
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "runs"


def _difference(name: str, was: Any, now: Any) -> tuple[str, str, str]:
    """The first part that differs, and its two values."""
    if isinstance(was, dict) and isinstance(now, dict):
        if name == "axes" and list(was) != list(now) and set(was) == set(now):
            return "the order of axes is", ", ".join(was), ", ".join(now)
        for key in dict.fromkeys((*was, *now)):
            if was.get(key) != now.get(key):
                what = {"axes": "axis", "question": "key", "files": "sha256 of", "prices": "price of"}.get(name, name)
                return f"{what} {key} is", _short(was.get(key)), _short(now.get(key))
    return f"{name} is", _short(was), _short(now)


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
