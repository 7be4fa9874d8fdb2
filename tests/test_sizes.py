"""Files and functions stay small enough to be read at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for room in ("moeplan", "benchmarks", "tests") for p in (ROOT / room).rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60
# Files that hold one idea which is a little longer than that; they may shrink, not grow.
LONGER = {"moeplan/profiles/hardware.py": 410}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    assert text.count("\n") <= LONGER.get(name, FILE_LINES), f"{name} is too long"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{name}: {node.name} has {lines} lines"


def test_the_longer_files_are_still_longer() -> None:
    for name in LONGER:
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") > FILE_LINES, f"{name} needs no exception"
