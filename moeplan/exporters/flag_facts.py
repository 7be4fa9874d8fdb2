"""Facts about a framework's flags: which field of a plan each carries, what it takes, and which versions know it.

The facts are YAML files in `flags/`. A flag, or one of its values, that a version lacks is refused with the versions that have
it: a parser would refuse it on the cluster, after the wait in the queue.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeplan.errors import ExportError, UsageError
from moeplan.exporters.base import Flag
from moeplan.records import from_mapping, load_yaml

_FOLDER = Path(__file__).parent / "flags"


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagFact:
    """One flag."""

    field: str
    """Field of a layout, a workload or a model that it carries."""
    takes: Literal["value", "list", "switch"]
    values: tuple[str, ...] = ()
    """Known values; empty: any."""
    since: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """First version of values that came later than the flag."""
    first: str = ""
    """First version that knows it; empty: all that were looked at."""
    last: str = ""
    """Last version that knows it; empty: the newest."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagFacts:
    """The flags of one framework."""

    framework: str
    """Its name in messages."""
    written_for: str
    """The version that arguments are written for by default."""
    versions: tuple[str, ...]
    """The versions whose parsers were looked at, oldest first."""
    flags: Mapping[str, FlagFact]

    def knows(self, name: str, version: str) -> bool:
        """Whether a version has a flag."""
        fact = self.flags[name]
        at = self.versions.index(version)
        return self._place(fact.first, 0) <= at <= self._place(fact.last, len(self.versions) - 1)

    def check(self, flags: Iterable[Flag], version: str) -> None:
        """Refuse flags and values that a version lacks, naming the first or the last version that has them."""
        faults = []
        for name, *values in flags:
            fact = self.flags[name]
            if not self.knows(name, version):
                late = self.versions.index(version) < self._place(fact.first, 0)
                faults.append(f"{name} ({f'from {fact.first} on' if late else f'up to {fact.last}'})")
            for value in values:
                first = fact.since.get(value, "")
                if self.versions.index(version) < self._place(first, 0):
                    faults.append(f"{name} {value} (from {first} on)")
        if faults:
            raise ExportError(
                f"{self.framework} {version} lacks {', '.join(faults)}, which this plan needs",
                hint="choose another --framework-version, or solve without the feature (--era, --forbid)",
            )

    def _place(self, version: str, other: int) -> int:
        return self.versions.index(version) if version else other


@functools.cache
def load_facts(name: str) -> FlagFacts:
    """The facts of `flags/<name>.yaml`."""
    return from_mapping(FlagFacts, load_yaml(_FOLDER / f"{name}.yaml", "flag file"), f"flags/{name}.yaml")


def check_version(title: str, version: str, versions: tuple[str, ...]) -> None:
    """Refuse a version that nothing is known of."""
    if version not in versions:
        known = f"known: {', '.join(versions)}" if versions else "leave --framework-version out"
        raise UsageError(f"{title} {version} is not a version that can be written for", hint=known)
