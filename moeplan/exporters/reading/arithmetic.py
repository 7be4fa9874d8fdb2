"""Whole-number arithmetic of a shell: `$((A * B))`, `expr`, `bc`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

_OPERATIONS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),  # towards zero
    ast.Mod: lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
}
_COMPARISONS: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LONGEST = 2000
_MOST = 2**63


def calculate(text: str) -> int | None:
    """The value of an expression of numbers; None for what is not one."""
    if len(text) > _LONGEST or not re.fullmatch(r"[\d\s+\-*/%()<>=!&|?:]*", text) or "**" in text:
        return None
    spelled = re.sub(r"\b0+(?=\d)", "", text)  # Python refuses leading zeros
    for theirs, ours in (("&&", " and "), ("||", " or "), ("/", "//")):
        spelled = spelled.replace(theirs, ours)
    spelled = re.sub(r"!(?!=)", " not ", spelled).strip()
    if choice := re.fullmatch(r"([^?:]*)\?([^?:]*):([^?:]*)", spelled):
        spelled = f"({choice[2]}) if ({choice[1]}) else ({choice[3]})"
    try:
        return _value(ast.parse(spelled, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: Any) -> int:
    match node:
        case ast.Constant(value=int(number)):
            value = int(number)
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            value = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
        case ast.UnaryOp(op=ast.USub()):
            value = -_value(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            value = _value(node.operand)
        case ast.UnaryOp(op=ast.Not()):
            value = int(not _value(node.operand))
        case ast.BoolOp():
            outcomes = [bool(_value(v)) for v in node.values]
            value = int(all(outcomes) if isinstance(node.op, ast.And) else any(outcomes))
        case ast.Compare(ops=[test], comparators=[right]) if type(test) in _COMPARISONS:
            value = int(_COMPARISONS[type(test)](_value(node.left), _value(right)))
        case ast.IfExp():
            value = _value(node.body if _value(node.test) else node.orelse)
        case _:
            raise ValueError("no arithmetic of whole numbers")
    if abs(value) >= _MOST:
        raise ValueError("more than a shell can hold")
    return value
