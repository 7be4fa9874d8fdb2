"""A SQLite file of one kind: what a long command has done stands in it, each change on disk when it is made.

A finite list of rows needs a table and no server, so the standard library's sqlite3 does. Table `question` says by name and
value what the file belongs to, with the schema of the rest; a file of another kind or schema is refused and left as it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeplan.errors import FileError, SchemaError

QUESTION = "CREATE TABLE question (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
WAIT_S = 60.0
"""How long a change waits for that of another process."""


class Database:
    """A file that is open for writing."""

    schema: str
    what: str
    """Its role, in a word: "journal"."""
    kind: str
    """What it is, for one that takes another file for it: "a journal of a tune"."""
    option: str
    """Option that names it."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; refuses a file of another kind."""
        self.path = path
        with self.told():
            self.base = sqlite3.connect(path, isolation_level=None, timeout=WAIT_S)
            self.base.execute("PRAGMA synchronous = FULL")
        self.is_new = not self._tables()
        if not self.is_new:
            self._check_schema()

    def question(self) -> dict[str, str]:
        """What the file belongs to."""
        with self.told():
            return dict(self.base.execute("SELECT name, value FROM question"))

    def close(self) -> None:
        """Close the file."""
        self.base.close()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the database as errors of its file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                raise SchemaError(f"'{self.path}' is a database, but not {self.kind}") from None
            raise FileError(f"cannot use {self.what} '{self.path}': {error}") from None
        except sqlite3.DatabaseError as error:
            raise SchemaError(f"'{self.path}' is not {self.kind}: {error}", hint=f"give another {self.option}") from None

    @contextmanager
    def change(self) -> Iterator[None]:
        """All or nothing of what is written inside, after all that other processes wrote; on disk when it ends."""
        with self.told():
            self.base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.base.execute("ROLLBACK")
                raise
            self.base.execute("COMMIT")

    def _tables(self) -> set[str]:
        with self.told():
            return {name for (name,) in self.base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def _check_schema(self) -> None:
        found = self.question().get("schema", "none") if "question" in self._tables() else "none"
        if found != self.schema:
            raise SchemaError(f"'{self.path}' is not {self.kind} with schema '{self.schema}', it has '{found}'")
