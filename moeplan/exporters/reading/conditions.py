"""Conditions of a shell: `[ ... ]`, `[[ ... ]]` and `test` on texts and numbers; files are not looked at."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from moeplan.exporters.reading.words import settled

_NUMBERS = {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}
_BINARY = {"=", "==", "!=", "<", ">", "=~", *_NUMBERS}
_UNARY = {"-z", "-n", "-v"}
_FILES = {f"-{letter}" for letter in "abcdefghkprstuwxLNOGS"}


def holds(words: Sequence[str]) -> bool | None:
    """Whether a condition holds; None if that depends on files, on commands or on what is not known."""
    for joint, decided in (("||", True), ("-o", True), ("&&", False), ("-a", False)):
        places = [i for i, word in enumerate(words) if word == joint and _outside(words, i)]
        if places and 0 < places[0] < len(words) - 1:
            left, right = holds(words[: places[0]]), holds(words[places[0] + 1 :])
            if decided in (left, right):
                return decided
            return None if None in (left, right) else not decided
    if words and words[0] == "!":
        inner = holds(words[1:])
        return None if inner is None else not inner
    if len(words) > 2 and words[0] == "(" and words[-1] == ")":
        return holds(words[1:-1])
    return _simple(words)


def _outside(words: Sequence[str], place: int) -> bool:
    return words[:place].count("(") == words[:place].count(")")


def _simple(words: Sequence[str]) -> bool | None:
    if not words:
        return False
    if len(words) == 1:
        text = settled(words[0])
        return True if text is None else bool(text)
    if len(words) == 2 and words[0] in _UNARY:
        text = settled(words[1])
        return (words[0] != "-z") if text is None else bool(text) == (words[0] != "-z")
    if words[0] in _FILES or len(words) < 3 or words[1] not in _BINARY:
        return None
    # A regular expression may have been taken apart.
    left, test, right = settled(words[0]), words[1], settled("".join(words[2:]))
    if left is None or right is None:
        return None
    if test in _NUMBERS:
        if not re.fullmatch(r"\s*-?\d+\s*", left) or not re.fullmatch(r"\s*-?\d+\s*", right):
            return None
        a, b = int(left), int(right)
        return {"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[_NUMBERS[test]]
    if test == "=~":
        try:
            return re.search(right, left) is not None
        except re.error:
            return None
    if test in ("<", ">"):
        return left < right if test == "<" else left > right
    return fnmatch.fnmatchcase(left, right) == (test != "!=")
