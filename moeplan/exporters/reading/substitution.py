"""What a command in the place of a word prints, for the few that need no running: `$(expr 4 \\* 8)`, `$(dirname "$0")`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from moeplan.errors import SchemaError
from moeplan.exporters.reading.arithmetic import calculate
from moeplan.exporters.reading.script import Chain, Command, Node, parse
from moeplan.exporters.reading.words import mark


def printed(text: str, where: str, fields: Callable[[str], list[str]]) -> str:
    """The output of a command, or its mark; `fields` fills in a word of it."""
    spelled = mark(f"$({' '.join(text.split())[:60]})")
    try:
        block = parse(text, where)
    except SchemaError:
        return spelled
    steps = _steps(block[0]) if len(block) == 1 else []
    commands = [[f for w in step.words for f in fields(w.text)] for step in steps]
    if not commands or not all(commands):
        return spelled
    out = simple_output(commands[0])
    for following in commands[1:]:
        number = calculate(re.sub(r"scale\s*=\s*\d+\s*;", "", out or "")) if following == ["bc"] else None
        out = None if number is None else str(number)
    return spelled if out is None else out


def _steps(node: Node) -> list[Command]:
    """The commands of a pipeline; of "cd FOLDER && pwd" the first."""
    if isinstance(node, Command):
        return [node]
    if not isinstance(node, Chain) or node.negated:
        return []
    nodes = [node.first, *(following for _, following in node.rest)]
    commands = [n for n in nodes if isinstance(n, Command)]
    operators = {operator for operator, _ in node.rest}
    if len(commands) < len(nodes):
        return []
    if operators == {"|"}:
        return commands
    walks = operators == {"&&"} and len(commands) == 2 and [w.text for w in commands[1].words] == ["pwd"]
    return commands[:1] if walks else []


def simple_output(words: Sequence[str]) -> str | None:
    """What a command prints that needs nothing but its words."""
    name, given = words[0], [w for w in words[1:] if not w.startswith("-")]
    match name:
        case "echo":
            return " ".join(words[2:] if words[1:2] in (["-n"], ["-e"]) else words[1:])
        case "printf" if words[1:2] in (["%q "], ["%s "], ["%q"], ["%s"]):
            end = words[1][2:]
            return "".join((shlex.quote(w) if words[1][1] == "q" else w) + end for w in words[2:])
        case "expr":
            number = calculate(" ".join(words[1:]))
            return None if number is None else str(number)
        case "pwd":
            return "."
        case "cd" | "realpath" | "readlink" if given:
            return given[0]
        case "dirname" if given:
            return str(Path(given[0]).parent)
        case "basename" if given:
            return Path(given[0]).name.removesuffix(given[1] if len(given) > 1 else "")
    return None
