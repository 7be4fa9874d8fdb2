"""One name of moeplan replaced for a while, in every module that imported it: for ablations and for pricing without a fit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch


@contextlib.contextmanager
def replaced(name: str, old: Any, new: Any, *, within: str = "moeplan.") -> Iterator[None]:
    """`name` stands for `new` in modules under `within` that hold `old` by that name; refused where none does."""
    holders = [m for path, m in sorted(sys.modules.items()) if path.startswith(within) and vars(m).get(name) is old]
    if not holders:
        raise LookupError(f"no module of {within} holds {name}")
    with contextlib.ExitStack() as stack:
        for module in holders:
            stack.enter_context(patch.object(module, name, new))
        yield
