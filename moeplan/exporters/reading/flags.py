"""The words of a Megatron-LM command line as flags: what was given, with the last occurrence winning.

Which flags there are and what they take is data, `flags/megatron.yaml` and `flags/megatron_parser.yaml`. A flag that neither
knows keeps the words up to the next flag. `Flags` notes what it is asked for, so that what nobody asked for can be listed.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan.errors import FileError
from moeplan.exporters.megatron_deepspeed_facts import dialect
from moeplan.exporters.reading.words import is_unset, shown, unknowns
from moeplan.records import load_yaml

_FOLDER = Path(__file__).parent.parent / "flags"


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """The flags that Megatron's parser knows, and some that it once knew."""

    takes: Mapping[str, str]
    """"switch", "value" or "list" by flag."""
    gone: Mapping[str, str]
    """What became of flags that the parser no longer has."""
    idle: Mapping[str, str]
    """Why flags of the parser do nothing."""
    dumped: Mapping[str, str]
    """Flags by their names in the argument dump of a log, where these differ."""
    dumped_false: Mapping[str, str]
    """Flags by the names that are False in a dump where the flag was given."""
    planned: frozenset[str]
    """Flags that a plan decides."""
    version: str
    """Version of Megatron-Core whose parser it is."""


@functools.cache
def catalog() -> Catalog:
    """What the two files of flags say."""
    planned, parser = (load_yaml(_FOLDER / name, "catalog") for name in ("megatron.yaml", "megatron_parser.yaml"))
    takes = {flag: kind for kind in ("switch", "value", "list") for flag in parser[kind]}
    takes |= {flag: entry["takes"] for flag, entry in parser["gone"].items()}
    takes |= {flag: entry["takes"] for flag, entry in planned["flags"].items()}
    return Catalog(
        takes=takes,
        gone={flag: entry["note"] for flag, entry in parser["gone"].items()},
        idle=parser["idle"],
        dumped=parser["dumped"],
        dumped_false=parser["dumped_false"],
        planned=frozenset(planned["flags"]),
        version=parser["written_for"],
    )


@dataclass(frozen=True, slots=True)
class Given:
    """A flag as it was given."""

    flag: str
    values: tuple[str, ...] = ()
    line: int = 0
    """Line of the file; 0: not known."""

    def __str__(self) -> str:
        return " ".join([self.flag, *map(_spelled, self.values)])


def _spelled(value: str) -> str:
    """A value in quotes where a shell would not read it back as it is; what is not known stays a variable."""
    text = shown(value)
    plain = "$" in text or not re.search(r"""[\s'"\\]""", text) and text
    return text if plain else shlex.quote(text)


@dataclass(slots=True)
class Flags:
    """The flags of one command line."""

    given: Sequence[Given]
    stray: Sequence[str] = ()
    """Words that belong to no flag."""
    dropped: Sequence[str] = ()
    """Variables that nothing sets and that stand where no value is needed."""
    asked: set[str] = field(default_factory=set)
    defaults: dict[str, str] = field(default_factory=dict)
    """Defaults of Megatron that were needed, by flag."""
    unresolved: dict[str, str] = field(default_factory=dict)
    """Variables that a value needs and nothing sets, with the flag that needs them."""
    last: dict[str, Given] = field(init=False)

    def __post_init__(self) -> None:
        self.last = {g.flag: g for g in self.given}

    def find(self, *flags: str) -> Given | None:
        """The last occurrence of the first of `flags` that was given."""
        self.asked.update(flags)
        return next((self.last[f] for f in flags if f in self.last), None)

    def knows(self, flag: str) -> bool:
        """Whether the framework's parser has a flag."""
        return flag in catalog().takes and flag not in catalog().gone

    def has(self, *flags: str) -> bool:
        """Whether one of `flags` was given."""
        return self.find(*flags) is not None

    def values(self, *flags: str) -> tuple[str, ...]:
        """The values of a flag; empty where it was not given."""
        found = self.find(*flags)
        if found is None:
            return ()
        if not found.values and catalog().takes.get(found.flag) == "value":
            raise FileError(f"{found.flag} has no value", hint="Megatron refuses it too")
        for value in found.values:
            for name in unknowns(value):
                self.unresolved.setdefault(name, f"{found.flag}{f' in line {found.line}' if found.line else ''}")
        return () if any(unknowns(v) for v in found.values) else found.values

    def text(self, *flags: str, default: str | None = None) -> str | None:
        """The value of a flag; its default counts as needed."""
        values = self.values(*flags)
        if values:
            return values[0]
        if default is not None and not self.has(*flags):
            self.defaults[flags[0]] = default
        return default

    def word(self, *flags: str, default: str) -> str:
        """The value of a flag that always has one."""
        return self.text(*flags, default=default) or default

    def number(self, *flags: str, least: int = 0) -> int | None:
        """The value of a flag as a whole number, None where it was not given; a value that is none is an error."""
        value = self.text(*flags)
        if value is None:
            return None
        if not re.fullmatch(r"[+-]?\d{1,12}", value):
            raise FileError(f"{self.find(*flags)}: a whole number is needed", hint="Megatron refuses it too")
        if int(value) < least:
            raise FileError(f"{self.find(*flags)}: a whole number of at least {least} is needed")
        return int(value)

    def count(self, *flags: str, default: int, least: int = 0) -> int:
        """A whole number that always has a value; a default counts as needed."""
        found = self.number(*flags, least=least)
        if found is not None:
            return found
        if not self.has(*flags):
            self.defaults[flags[0]] = str(default)
        return default

    def real(self, *flags: str, default: float) -> float:
        """The value of a flag as a number."""
        value = self.text(*flags)
        if value is None:
            return default
        try:
            return float(value)
        except ValueError:
            raise FileError(f"{self.find(*flags)}: a number is needed", hint="Megatron refuses it too") from None


def split_words(words: Iterable[str]) -> Flags:
    """The flags of a command line; a known flag takes what the parser of Megatron-LM or Megatron-DeepSpeed lets it take."""
    words = list(words)
    takes = catalog().takes
    if not set(dialect().signs).isdisjoint(word.partition("=")[0] for word in words):
        takes = {**takes, **dialect().kinds}
    given: list[Given] = []
    stray: list[str] = []
    dropped: list[str] = []
    room = 0
    for word in words:
        if word.startswith("--") and len(word) > 2 and not word[2].isspace():
            flag, equals, value = word.partition("=")
            kind = takes.get(flag, "list")
            given.append(Given(flag, (value,) if equals else ()))
            room = 0 if equals else {"switch": 0, "value": 1}.get(kind, 10**6)
        elif is_unset(word) and (not room or given[-1].values):
            dropped += unknowns(word)
        elif room and given:
            given[-1] = Given(given[-1].flag, (*given[-1].values, word))
            room -= 1
        else:
            stray.append(word)
    return Flags(given, stray, dropped)


def with_lines(flags: Flags, text: str) -> Flags:
    """The same flags with the lines of a file on which they stand."""
    places: dict[str, list[int]] = {}
    rows = text.splitlines()
    for number, row in enumerate(rows, 1):
        bare = row.strip()
        if not bare.startswith("#"):
            for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", re.sub(r"\s#.*", "", bare)):
                places.setdefault(flag, []).append(number)
    seen: dict[str, int] = {}
    count: dict[str, int] = {}
    for g in flags.given:
        count[g.flag] = count.get(g.flag, 0) + 1
    out = []
    for g in flags.given:
        lines = places.get(g.flag, [])
        said = [n for n in lines if all(v in rows[n - 1] for v in g.values)]
        if len(lines) == count[g.flag]:
            line = lines[seen.get(g.flag, 0)]
        else:
            line = (said or lines or [0])[-1]
        seen[g.flag] = seen.get(g.flag, 0) + 1
        out.append(Given(g.flag, g.values, line))
    return Flags(out, flags.stray, flags.dropped)


def numbers_of(pattern: str, length: int, periodic: Any) -> list[int] | None:
    """A list that Megatron takes as text: "([0]*3+[1]*58)", "[0, 1]" or one whole number N; `periodic(N)` makes that list."""
    text = pattern.strip().strip("'\"")
    if re.fullmatch(r"\d+", text):
        return list(periodic(int(text))) if int(text) else None
    if len(text) > 10_000 or re.search(r"[^,\d\[\]()+*\s]", text):
        return None
    found = _list(re.sub(r"\s", "", text), 0)
    return found[0] if found and found[1] == len(re.sub(r"\s", "", text)) and len(found[0]) == length else None


def _list(text: str, at: int) -> tuple[list[int], int] | None:
    """Sums of lists from `at` on, each "[...]" or "(...)" and times a number, and the place behind them."""
    total: list[int] = []
    while at < len(text):
        if text[at] == "[":
            end = text.find("]", at)
            body = text[at + 1 : end] if end > 0 else "?"
            if not re.fullmatch(r"(\d{1,6}(,\d{1,6})*,?)?", body):
                return None
            part, at = [int(n) for n in body.split(",") if n], end + 1
        elif text[at] == "(":
            inner = _list(text, at + 1)
            if inner is None or text[inner[1] : inner[1] + 1] != ")":
                return None
            part, at = inner[0], inner[1] + 1
        else:
            return None
        if times := re.compile(r"\*(\d{1,5})").match(text, at):
            if len(part) * int(times[1]) > 100_000:
                return None
            part, at = part * int(times[1]), times.end()
        total += part
        if text[at : at + 1] != "+":
            break
        at += 1
    return total, at
