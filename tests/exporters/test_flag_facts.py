"""Facts about flags agree with the parser that they were read from, and refuse what a version lacks."""

from __future__ import annotations

import pytest

from moeplan.errors import ExportError
from moeplan.exporters.flag_facts import FlagFact, FlagFacts, load_facts
from tests import megatron

FACTS = load_facts("megatron")
SMALL = FlagFacts(
    framework="Frame",
    written_for="2.0",
    versions=("1.0", "2.0", "3.0"),
    flags={
        "--old": FlagFact(field="a", takes="switch", last="1.0"),
        "--new": FlagFact(field="a", takes="switch", first="3.0"),
        "--kind": FlagFact(field="a", takes="value", values=("x", "y"), since={"y": "2.0"}),
    },
)


def test_versions() -> None:
    assert FACTS.written_for == megatron.VERSION and FACTS.written_for in FACTS.versions
    for name, fact in FACTS.flags.items():
        assert {fact.first, fact.last, *fact.since.values()} <= {"", *FACTS.versions}, name
        assert set(fact.since) <= set(fact.values), name


def test_the_parser_knows_these_flags() -> None:
    parser = megatron.known_flags()
    for name, fact in FACTS.flags.items():
        assert (name in parser) == FACTS.knows(name, megatron.VERSION), name
        action = parser.get(name)
        if action is None:
            continue
        takes = "switch" if action.nargs == 0 else "list" if action.nargs in ("+", "*") else "value"
        assert takes == fact.takes, name
        choices = {str(getattr(c, "name", c)) for c in action.choices or ()}
        known = {v for v in fact.values if not fact.since.get(v) or fact.since[v] <= megatron.VERSION}
        assert not choices or known <= choices, name


LACKS = [  # version, flags, complaint
    ("1.0", [("--new",)], r"Frame 1.0 lacks --new \(from 3.0 on\), which this plan needs"),
    ("3.0", [("--old",)], r"lacks --old \(up to 1.0\)"),
    ("1.0", [("--kind", "y"), ("--kind", "x")], r"lacks --kind y \(from 2.0 on\), which"),
    ("2.0", [("--old",), ("--new",)], r"lacks --old \(up to 1.0\), --new \(from 3.0 on\)"),
]


@pytest.mark.parametrize(("version", "flags", "message"), LACKS)
def test_refuses_what_a_version_lacks(version: str, flags: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        SMALL.check(flags, version)


def test_takes_what_a_version_has() -> None:
    SMALL.check([("--old",), ("--kind", "x")], "1.0")
    SMALL.check([("--new",), ("--kind", "y")], "3.0")
    assert [SMALL.knows("--kind", v) for v in SMALL.versions] == [True] * 3
