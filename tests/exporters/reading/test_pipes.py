"""Pipes of `cat`, `echo` and `sed` give what a shell gives, or nothing."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from moeplan.exporters.reading.pipes import piped

TEMPLATES: list[Sequence[Sequence[str]]] = [
    [["sed", "s/A/1/", "t"]],
    [["cat", "t"], ["sed", "s/A/1/g"], ["sed", "-e", "s|B.x|2/3|", "-e", "s,D,\\&,"]],
    [["sed", "s/A/1/; s/B\\.x/4/g", "t"]],
    [["echo", "A B.x"], ["sed", "s#A#a/b#"]],
    [["sed", "-E", "s/\\[A\\]/x/", "t"]],
]


@pytest.mark.parametrize("steps", TEMPLATES, ids=range(len(TEMPLATES)))
def test_filled_in_as_sed_does(tmp_path: Path, steps: Sequence[Sequence[str]]) -> None:
    text = "A and A, B.x\nBax A [A]\nD\n"
    (tmp_path / "t").write_text(text)
    line = " | ".join(map(shlex.join, steps))
    theirs = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert piped(steps, lambda name: text if name == "t" else None) == theirs


@pytest.mark.parametrize(
    "steps",
    [[["sed", "s/[AB]/1/", "t"]], [["sed", "1d", "t"]], [["sed", "s/A/&&/", "t"]], [["sed", "s/A/1/", "gone"]], [["jq", "."]]],
)
def test_what_is_not_followed_is_not_known(steps: Sequence[Sequence[str]]) -> None:
    assert piped(steps, lambda name: "A\n" if name == "t" else None) is None
