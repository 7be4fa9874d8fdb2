"""Which schedule the MoE layers of a layout run, as text.

"fsmoe 2/4" is FSMoE's three streams in 2 chunks forward and 4 backward, "s1" takes no chunks; empty: what dispatcher and
overlap flags say. Where a model has several kinds of MoE blocks, choices stand in their order with ";" between, one choice
serves all. "best" leaves the choice to the price, which takes the quickest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeplan.errors import LayoutError, nearest_hint

BEST = "best"
CHUNKED = ("fsmoe", "tutel")
"""Schedules that work in chunks."""
NAMES = (*CHUNKED, "s1")
"""Schedules that a layout can choose beside what the framework's flags give; `costmodels/moe/` says what they are."""
IDEAL = "comet"
"""The bound of all overlap inside the layer: all exchange behind the experts, as far as they last. Priced, never chosen."""
DEGREES = (1, 2, 4, 8)
"""Numbers of chunks that are tried."""
MOST_CHUNKS = 64


@dataclass(frozen=True, slots=True)
class MoeChoice:
    """The schedule of one kind of MoE block."""

    name: str
    forward: int = 1
    """Chunks of the forward pass."""
    backward: int = 1
    """Chunks of the backward pass."""

    def __str__(self) -> str:
        return f"{self.name} {self.forward}/{self.backward}" if self.name in CHUNKED else self.name


def parse_choices(text: str) -> tuple[MoeChoice, ...]:
    """Choices that a text names; none for "" and "best". The inverse is "; ".join of their texts."""
    if text in ("", BEST):
        return ()
    return tuple(_choice(part.strip(), text) for part in text.split(";"))


def _choice(part: str, text: str) -> MoeChoice:
    match = re.fullmatch(r"([a-z0-9-]+)(?:\s+(\d+)/(\d+))?", part)
    if match is None:
        raise LayoutError(f"moe_schedule '{text}': '{part}' is not a schedule", hint="write it like 'fsmoe 2/4' or s1")
    name, chunks = match[1], (match[2], match[3])
    if name not in (*NAMES, IDEAL):
        raise LayoutError(f"moe_schedule '{text}': unknown schedule '{name}'", hint=nearest_hint(name, (*NAMES, IDEAL, BEST)))
    if name not in CHUNKED:
        if match[2]:
            raise LayoutError(f"moe_schedule '{text}': {name} takes no chunks", hint=f"write {name}")
        return MoeChoice(name)
    if not match[2]:
        raise LayoutError(f"moe_schedule '{text}': {name} needs its chunks", hint=f"write '{name} 2/4': forward/backward")
    forward, backward = (int(c) for c in chunks if c)
    for count in (forward, backward):
        if not 1 <= count <= MOST_CHUNKS:
            raise LayoutError(f"moe_schedule '{text}': {count} chunks, 1 to {MOST_CHUNKS} are possible")
    return MoeChoice(name, forward, backward)
