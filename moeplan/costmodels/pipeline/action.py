"""Pipeline schedules as text: for every rank the passes that it makes, in their order.

    F0.0 F1.0 B0.0&F2.0 I1.0 W1.0
A word is an action: F forward, B backward, or its two halves I (gradient of the input) and W (gradient of the weights); then
the micro-batch and, after ".", the chunk of the rank. "&" joins two actions that run together. One line a rank. A micro-batch
passes the places (rank, chunk) of its route forward, and back in reverse. Reading is the inverse of printing; `check_orders`
refuses orders that cannot run, with the bad step marked; `run.py` runs them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from moeplan.errors import ScheduleError

KINDS = "FBIW"
"""Letters of actions."""
_WORD = re.compile(r"([FBIW])(\d{1,9})\.(\d{1,9})")
_SHOWN_ROWS, _SHOWN_STEPS = 16, 64

Place: TypeAlias = tuple[int, int]
"""Rank, and chunk on that rank."""


class Action(NamedTuple):
    """One pass of one micro-batch through one chunk of a rank."""

    kind: str
    """F forward, B backward, I gradient of the input, W gradient of the weights."""
    batch: int
    """Micro-batch, from 0."""
    chunk: int = 0
    """Chunk of the rank, from 0."""
    joined: bool = False
    """Runs together with the action that follows."""

    def __str__(self) -> str:
        return f"{self.kind}{self.batch}.{self.chunk}"


Order: TypeAlias = tuple[Action, ...]
"""What one rank does."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What every pipeline rank does, and the way of the micro-batches through the ranks."""

    rows: tuple[Order, ...]
    """One order a rank."""
    routes: tuple[tuple[Place, ...], ...]
    """Places that micro-batches pass; with several routes each serves an equal run of the micro-batches."""
    batches: int
    """Micro-batches of a step."""

    def __str__(self) -> str:
        return "\n".join(format_order(row) for row in self.rows)

    def route_of(self, batch: int) -> tuple[Place, ...]:
        """The places that a micro-batch passes."""
        return self.routes[batch * len(self.routes) // self.batches]


def loop_route(stages: int, chunks: int) -> tuple[Place, ...]:
    """Through all ranks `chunks` times: chunk c of the model stands on rank c mod stages, as its chunk c div stages."""
    return tuple((c % stages, c // stages) for c in range(stages * chunks))


def format_order(order: Sequence[Action]) -> str:
    """Text of one rank's order."""
    return "".join(f"{action}{'&' if action.joined else ' '}" for action in order).rstrip()


def parse_order(text: str) -> Order:
    """The order that a text describes; the inverse of `format_order`, refuses words that are no actions."""
    out = []
    for word in text.split():
        parts = word.split("&")
        for i, part in enumerate(parts):
            match = _WORD.fullmatch(part)
            if match is None or len(parts) > 2:
                raise ScheduleError(f"'{word}' is not an action", hint="write it like F3.1, or F3.1&B0.0")
            out.append(Action(match[1], int(match[2]), int(match[3]), i + 1 < len(parts)))
    return tuple(out)


def parse_orders(text: str, routes: Sequence[Sequence[Place]] = ()) -> Orders:
    """The schedule of a text, one line a rank, checked; without `routes` micro-batches loop through the ranks."""
    rows = tuple(parse_order(line) for line in text.strip().splitlines())
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError("a schedule without actions", hint="write one line a rank, like 'F0.0 B0.0'")
    batches, chunks = 1 + max(a.batch for a in actions), 1 + max(a.chunk for a in actions)
    ways = tuple(tuple(route) for route in routes) or (loop_route(len(rows), chunks),)
    if len(rows) * chunks * batches > len(actions):
        raise ScheduleError(
            f"{len(actions)} actions are too few for {batches} micro-batches through {chunks} chunks of {len(rows)} ranks"
        )
    orders = Orders(rows, ways, batches)
    check_orders(orders)
    return orders


def check_orders(orders: Orders) -> None:
    """Refuse orders that cannot run or leave work undone."""
    for rank in range(len(orders.rows)):
        _check_rank(orders, rank)
    _check_waits(orders)


def _check_rank(orders: Orders, rank: int) -> None:
    """Every pass once, forward before backward, I before W, and none that has no business on this rank."""
    seen: set[tuple[str, int, int]] = set()
    row = orders.rows[rank]
    for step, action in enumerate(row):
        kind, batch, chunk, _ = action
        before = {"F": "", "B": "F", "I": "F", "W": "I"}[kind]
        other = {"F": "", "B": "I", "I": "B", "W": "B"}[kind]
        if batch >= orders.batches or (rank, chunk) not in orders.route_of(batch):
            raise _refusal(orders, rank, step, f"has no business on rank {rank}")
        if (kind, batch, chunk) in seen:
            raise _refusal(orders, rank, step, "stands there twice")
        if other and (other, batch, chunk) in seen:
            raise _refusal(orders, rank, step, f"stands beside {other}{batch}.{chunk}: a backward is whole or in two halves")
        if before and (before, batch, chunk) not in seen:
            raise _refusal(orders, rank, step, f"stands before {before}{batch}.{chunk}")
        if action.joined and (step + 1 == len(row) or {kind, row[step + 1].kind} != {"F", "B"} or row[step + 1].joined):
            raise _refusal(orders, rank, step, "is joined to what is not its counterpart: one forward, one backward")
        seen.add((kind, batch, chunk))
    for batch in range(orders.batches):
        for chunk in (c for r, c in orders.route_of(batch) if r == rank):
            if ("B", batch, chunk) not in seen and ("W", batch, chunk) not in seen:
                raise _refusal(orders, rank, len(row), f"ends without the backward of micro-batch {batch} in chunk {chunk}")


def _check_waits(orders: Orders) -> None:
    """No rank waits for ever: each step of the orders comes when what it waits for has come."""
    done: set[tuple[str, int, Place]] = set()
    at = [0] * len(orders.rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(orders.rows):
            while at[rank] < len(row):
                pair = row[at[rank] : at[rank] + 1 + row[at[rank]].joined]
                if not all(_may_run(orders, rank, action, done) for action in pair):
                    break
                done.update(("B" if a.kind == "I" else a.kind, a.batch, (rank, a.chunk)) for a in pair)
                at[rank] += len(pair)
                moved = True
    for rank, row in enumerate(orders.rows):
        if at[rank] < len(row):
            raise _refusal(orders, rank, at[rank], "waits for ever")


def _may_run(orders: Orders, rank: int, action: Action, done: set[tuple[str, int, Place]]) -> bool:
    """Whether the neighbour on the route has done its part."""
    route = orders.route_of(action.batch)
    place = route.index((rank, action.chunk))
    if action.kind == "F":
        return not place or ("F", action.batch, route[place - 1]) in done
    return action.kind == "W" or place + 1 == len(route) or ("B", action.batch, route[place + 1]) in done


def _refusal(orders: Orders, rank: int, step: int, why: str) -> ScheduleError:
    """The error for one step, with the schedule, or what stands around the step in a long one."""
    row = orders.rows[rank]
    what = str(row[step]) if step < len(row) else "its order"
    lines = []
    for r, order in enumerate(orders.rows):
        if r != rank and len(orders.rows) > _SHOWN_ROWS:
            continue
        words = [f">>>{a}<<<" if (r, i) == (rank, step) else str(a) for i, a in enumerate(order)]
        words += [">>>end<<<"] if (r, len(order)) == (rank, step) else []
        first = max(0, min(step, len(words)) - _SHOWN_STEPS // 2) if len(words) > _SHOWN_STEPS else 0
        cut = words[first : first + _SHOWN_STEPS]
        text = ("... " if first else "") + " ".join(cut) + (" ..." if first + len(cut) < len(words) else "")
        lines.append(f"  {r}: {text}")
    return ScheduleError(f"rank {rank}, step {step}: {what} {why}\n" + "\n".join(lines))


__all__ = [
    "KINDS", "Action", "Order", "Orders", "Place", "check_orders", "format_order", "loop_route", "parse_order", "parse_orders",
]  # fmt: skip
