"""The journal of a tune: every candidate, trial and decision in a SQLite file, each change on disk when it is made.

A tune that was killed goes on from its journal; one that belongs to another question is refused. Tables: `question` (hashes of
the inputs, settings), `candidates` (a row a plan), `events` (what happened, in words). Units: seconds, bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from moeplan.costmodels.layout import Layout
from moeplan.errors import ProblemError, SchemaError
from moeplan.planner.database import QUESTION, Database
from moeplan.planner.plan_data import layout_data, read_layout
from moeplan.runtime.outcomes import Outcome

SCHEMA = "moeplan.journal/1"
Phase = Literal["open", "skipped", "running", "ended"]
_COLUMNS = (
    "place, layout, predicted_s, predicted_bytes, phase, trial, attempt, directory, mark, handle, expected_s, outcome, why"
)
_TABLES = (
    QUESTION,
    f"CREATE TABLE candidates ({_COLUMNS.replace('place', 'place INTEGER PRIMARY KEY')})",
    "CREATE TABLE events (at TEXT NOT NULL, place INTEGER, what TEXT NOT NULL)",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A candidate as it stands in the journal."""

    place: int
    """Its rank by predicted time, the given plan first; from 0."""
    layout: Layout
    predicted_s: float
    predicted_bytes: float
    phase: Phase = "open"
    """Not tried; not to be tried (see `why`); started; ended with `outcome`."""
    trial: int = 0
    """Number of its trial, from 1; 0: none."""
    attempt: int = 0
    """Times that the trial was started."""
    directory: str = ""
    mark: str = ""
    """Name of the job, and mark of its processes."""
    handle: str = ""
    """Process or Slurm job."""
    expected_s: float = 0.0
    """What was expected when it was started, given the trials before; 0: nothing but the prediction."""
    outcome: Outcome | None = None
    why: str = ""
    """Why it is not tried."""


class Journal(Database):
    """A journal file that is open for writing."""

    schema, what, kind, option = SCHEMA, "journal", "a journal of a tune", "--journal"

    def begin(self, identity: Mapping[str, str], settings: Mapping[str, Any], entries: Sequence[Entry]) -> None:
        """Write down the question and its candidates, all or nothing."""
        rows = {"schema": SCHEMA, "settings": json.dumps(dict(settings)), **{f"sha256 {k}": v for k, v in identity.items()}}
        with self.change():
            for table in _TABLES:
                self.base.execute(table)
            self.base.executemany("INSERT INTO question VALUES (?, ?)", rows.items())
            for entry in entries:
                self._put(entry)
        self.is_new = False

    def check(self, identity: Mapping[str, str]) -> None:
        """Refuse to go on with another question than the one that the journal was begun with; both hashes are named."""
        then = self.question()
        for name, now in identity.items():
            was = then.get(f"sha256 {name}", "")
            if was != now:
                raise ProblemError(
                    f"journal '{self.path}' is of another {name}: sha256 {was or 'none'} there, {now} in the plan",
                    hint="give another --journal and -d to tune this plan",
                )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it was begun with."""
        return dict(json.loads(self.question().get("settings", "{}")))

    def entries(self) -> list[Entry]:
        """All candidates by place."""
        with self.told():
            rows = self.base.execute(f"SELECT {_COLUMNS} FROM candidates ORDER BY place").fetchall()
        return [self._entry(row) for row in rows]

    def put(self, entry: Entry, event: str) -> Entry:
        """Write down a candidate and what happened to it; on disk when this returns."""
        with self.change():
            self._put(entry)
            self._event(entry.place, event)
        return entry

    def note(self, event: str) -> None:
        """Write down what happened to no candidate in particular."""
        with self.told():
            self._event(None, event)

    def events(self) -> list[tuple[str, int | None, str]]:
        """When, to which candidate, and what; in order."""
        with self.told():
            return list(self.base.execute("SELECT at, place, what FROM events ORDER BY rowid"))

    def _event(self, place: int | None, what: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.base.execute("INSERT INTO events VALUES (?, ?, ?)", (now, place, what))

    def _put(self, entry: Entry) -> None:
        values = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        values["layout"] = json.dumps(layout_data(entry.layout))
        values["outcome"] = None if entry.outcome is None else json.dumps(dataclasses.asdict(entry.outcome))
        names = _COLUMNS.split(", ")
        marks = ", ".join("?" * len(names))
        self.base.execute(f"INSERT OR REPLACE INTO candidates VALUES ({marks})", [values[name] for name in names])

    def _entry(self, row: Sequence[Any]) -> Entry:
        values = dict(zip(_COLUMNS.split(", "), row, strict=True))
        try:
            values["layout"] = read_layout(json.loads(values["layout"]), f"journal '{self.path}'")
            if values["outcome"] is not None:
                data = json.loads(values["outcome"])
                values["outcome"] = Outcome(**{**data, "tail": tuple(data["tail"])})
        except (ValueError, TypeError, KeyError) as error:
            raise SchemaError(f"journal '{self.path}', candidate {values['place']}: {error}") from None
        return Entry(**values)
