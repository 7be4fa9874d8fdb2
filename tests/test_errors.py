"""Every error has its place in the tree that the module draws, a message and an exit code."""

from __future__ import annotations

import inspect
import re

import pytest

from moeplan import errors
from moeplan.errors import MoeplanError, UnknownNameError, UsageError, nearest, nearest_hint

TREE = [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, MoeplanError)]


def test_the_drawing_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^ *([│├└─ ]*)(\w+Error)  ", errors.__doc__, flags=re.MULTILINE)
    assert {name for _, name in drawn} == {c.__name__ for c in TREE}
    parents = {len(marks.rstrip("─ ").replace("├", "│").replace("└", "│")): name for marks, name in drawn[:1]}
    for marks, name in drawn:
        depth = len(re.sub(r"[─ ]*$", "", marks)) // 4 + bool(marks.strip())
        parents[depth] = name
        if depth:
            assert getattr(errors, name).__base__.__name__ == parents[depth - 1]


@pytest.mark.parametrize("error", TREE, ids=lambda c: c.__name__)
def test_exit_codes(error: type[MoeplanError]) -> None:
    assert error.exit_code == (2 if error in (UsageError, UnknownNameError) else 1)


def test_message_and_hint() -> None:
    assert str(MoeplanError("ep=3 does not divide 8", hint="use 2")) == "ep=3 does not divide 8 (use 2)"
    assert str(MoeplanError("no")) == "no"


def test_nearest_names() -> None:
    known = ["deepseek-v2", "deepseek-v3", "mixtral-8x7b"]
    assert nearest("DeepSeek-V33", known)[0] == "deepseek-v3"
    assert nearest("zzz", known) == []
    assert str(UnknownNameError("model", "mixtral", known)) == "unknown model 'mixtral' (did you mean 'mixtral-8x7b'?)"
    assert nearest_hint("zzz", known) == "known: deepseek-v2, deepseek-v3, mixtral-8x7b"
    assert nearest_hint("zzz", [f"n{i:02}" for i in range(20)]).endswith("n11, ...")
