"""The journal of an elastic run, a JSON object a line: what started with which layout, what each step consumed and lost.

A run that goes on from the checkpoint of step s drops the later steps of the runs before it and does them again: the kept
history is that of the lineage of checkpoints. A last line that was cut by a kill is no line. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from moeplan.errors import SchemaError


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A world was formed."""

    step: int
    """Steps of the checkpoint that it goes on from."""
    workers: int
    """Processes that are there."""
    active: int
    """Those that train; the others are in reserve."""
    layout: str
    """Degrees, as "PP2 DP2 EP2"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An optimizer step was done."""

    step: int
    """Its number, from 1."""
    loss: float
    """Mean over the tokens of the global batch."""
    samples: tuple[int, ...]
    """What the replicas consumed, one replica after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    notice: bool
    """Whether it was written because the world was about to change."""


Event: TypeAlias = Started | Step | Saved
_KINDS = {"start": Started, "step": Step, "save": Saved}


def append(path: Path, event: Event) -> None:
    """Add a line; a start first removes what is left of a line that a kill cut."""
    if isinstance(event, Started) and path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
    kind = next(name for name, cls in _KINDS.items() if isinstance(event, cls))
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"event": kind, **asdict(event)}) + "\n")


def read(path: Path) -> list[Event]:
    """All events; none where there is no file yet."""
    events: list[Event] = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            if "samples" in data:
                data["samples"] = tuple(data["samples"])
            events.append(_KINDS[data.pop("event")](**data))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SchemaError(f"journal '{path}', line {number}: not an event of an elastic run") from None
    return events


def kept(events: Iterable[Event]) -> list[Step]:
    """The steps of the history that was kept, in order."""
    steps: list[Step] = []
    for event in events:
        if isinstance(event, Started):
            steps = [step for step in steps if step.step <= event.step]
        elif isinstance(event, Step):
            steps.append(event)
    return steps


def summary(events: Sequence[Event]) -> str:
    """A line about a whole run."""
    done, stayed = sum(isinstance(event, Step) for event in events), len(kept(events))
    worlds = [f"{e.workers} ({e.layout}, {e.active} active)" for e in events if isinstance(e, Started)]
    return f"{stayed} steps kept, {done - stayed} done twice; workers: {' -> '.join(worlds)}"
