"""The exception tree of moeplan.

    MoeplanError                 anything the user can mend; the command line prints it and exits with `exit_code`
    ├── UsageError               options that contradict each other or have no meaning (exit 2)
    ├── FileError                a file is missing, unreadable, unwritable or not what it claims to be
    │   └── SchemaError          a file is readable, but a key, type or schema version is wrong
    ├── UnknownNameError         a name that no catalog holds; offers the nearest ones
    ├── ModelError               a model description that cannot be understood
    ├── ClusterError             a cluster that cannot exist
    ├── ProblemError             model, cluster and workload that do not go together
    ├── LayoutError              a layout that breaks an identity or a rule of the framework
    ├── ScheduleError            a schedule that cannot run: a task that waits for itself, a duration below 0
    ├── ExportError              a plan that the target framework cannot run
    └── DeviceError              a device, a library or a rank that is not there or fails

A message names the object, the place and both numbers; `hint` says what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoeplanError(Exception):
    """Base of every error that a user can mend; `str()` gives the message followed by the hint."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"


class UsageError(MoeplanError):
    """Options that contradict each other or have no meaning."""

    exit_code = 2


class FileError(MoeplanError):
    """A file is missing, unreadable, unwritable or not what it claims to be."""


class SchemaError(FileError):
    """A file is readable, but one of its keys, types or its schema version is wrong."""


class UnknownNameError(MoeplanError):
    """A name that no catalog holds."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> None:
        super().__init__(f"unknown {kind} '{name}'", hint=hint or nearest_hint(name, known))


class ModelError(MoeplanError):
    """A model description that cannot be understood."""


class ClusterError(MoeplanError):
    """A cluster that cannot exist."""


class ProblemError(MoeplanError):
    """Model, cluster and workload that do not go together."""


class LayoutError(MoeplanError):
    """A layout that breaks an identity or a rule of the framework."""


class ScheduleError(MoeplanError):
    """A schedule that cannot run: a task that waits for itself, a duration below 0, chunks that do not divide."""


class ExportError(MoeplanError):
    """A plan that the target framework cannot run."""


class DeviceError(MoeplanError):
    """A device, a library or a rank that is not there or fails."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` known names that look most like `name`, best first, letter case ignored."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[m] for m in difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.5)]


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """A hint that offers the nearest names, or lists the known ones where nothing is near."""
    names = sorted(known)
    close = nearest(name, names)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    shown = ", ".join(names[:12])
    return f"known: {shown}{', ...' if len(names) > 12 else ''}"
