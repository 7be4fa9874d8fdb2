"""Stand-ins for packages and parts of packages that a judge's framework imports and its configuration does not need."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests import megatron_stand_ins as stand_ins


class _Finder(stand_ins._Finder):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(name == known or name.startswith(f"{known}.") for known in self.names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)


def stand_in(*names: str) -> None:
    """From now on imports of these modules, and of what is in them, find something in which every name exists."""
    sys.meta_path.insert(0, _Finder(names))


def no_compiler() -> None:
    """From now on `torch.compile` leaves functions as they are: asking for it imports a compiler, which takes seconds."""

    def compile(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else lambda later: later

    torch.compile = compile
