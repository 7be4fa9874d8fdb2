"""Gradient partitioning of FSMoE: which gradients travel in which window of the backward pass.

FSMoE (ASPLOS 2025, arXiv 2501.10714), section 4.5. Backward, a layer is a dense part and then one MoE layer; the gradients of
a layer arrive at its end and may travel in any later window, cut anywhere, each piece at alpha + beta x bytes; what is left
travels exposed at the end (the tail). A dense window of W seconds takes max(W, piece); an MoE layer takes the least over its
chunkings r of max(T(r), busy(r) + piece), with busy(r) the all-to-alls of the inter-node stream.

`greedy` is the paper's first step with all of the rest in the tail; `partition` is the optimum, in place of the paper's
differential evolution; `planner/partition.py` finds the same by a MILP. Bytes are conserved, unlike in equation (4), which
loses alpha / beta bytes a cut, and the order is backward throughout, unlike in the index of equation (5). Units: bytes,
seconds. Beta may be 0: then a window that a start-up fits in takes any number of bytes. Windows add up: not valid where a
window hides behind another.

Why it is enough to choose a chunking of each window and fill it with what fits: a byte beyond that lengthens the window by
beta, as it does in the tail, so it may as well wait. Only the tail's start-up can make it travel earlier: after the last
arrival one window may take all that is left, in place of the tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.errors import ScheduleError

Array: TypeAlias = NDArray[np.float64]

TINY = 1e-12
"""Relative difference below which two amounts or times count as one."""
PROVEN = 1e-8
"""Share of the total by which the optimum may be missed."""
WIDTHS = (64, 4096, 1 << 18, None)
"""States that the dynamic programme keeps in its passes: the first find what the next need not look beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A window of the backward pass: seconds by number of chunks."""

    alone_s: tuple[float, ...]
    """Seconds without gradients, one for each number of chunks."""
    busy_s: tuple[float, ...]
    """Of them, seconds that gradients cannot use because the inter-node link is taken."""

    def __post_init__(self) -> None:
        if not self.alone_s or len(self.alone_s) != len(self.busy_s):
            counts = f"{len(self.alone_s)} times alone and {len(self.busy_s)} busy ones"
            raise ScheduleError(f"a window has {counts}", hint="give one of each for each number of chunks")
        for alone, busy in zip(self.alone_s, self.busy_s, strict=True):
            _check("a window alone", alone, "s")
            _check("the busy part of a window", busy, "s")
            if busy > alone * (1.0 + TINY):
                raise ScheduleError(f"a window of {alone:g} s is busy for {busy:g} s", hint="busy seconds are a part of it")

    def seconds(self, piece_bytes: float, line: AlphaBeta) -> float:
        """Seconds of the window with `piece_bytes` of gradients, at the best number of chunks."""
        piece_s = float(line.time_s(piece_bytes)) if piece_bytes > 0.0 else 0.0
        return min(max(alone, busy + piece_s) for alone, busy in zip(self.alone_s, self.busy_s, strict=True))

    def fits(self, line: AlphaBeta) -> Iterable[float]:
        """Bytes that do not lengthen the window, for each number of chunks."""
        return (float(fit_bytes(alone - busy, line)) for alone, busy in zip(self.alone_s, self.busy_s, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardLayer:
    """A dense part and the MoE layer after it, in backward order."""

    dense_s: float
    moe: Slot
    gradient_bytes: float
    """Gradients that arrive at the end of this layer."""

    def __post_init__(self) -> None:
        _check("the dense part of a layer", self.dense_s, "s")
        _check("the gradients of a layer", self.gradient_bytes, "bytes")

    @property
    def slots(self) -> tuple[Slot, Slot]:
        """The two windows, in their order."""
        return Slot(alone_s=(self.dense_s,), busy_s=(0.0,)), self.moe


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Where the gradients travel."""

    pieces_bytes: tuple[tuple[float, float], ...]
    """By layer in backward order: in its dense window, in its MoE layer."""
    tail_bytes: float
    total_s: float
    """Seconds of all layers and of the tail."""


def _check(what: str, amount: float, unit: str) -> None:
    if not 0.0 <= amount < math.inf:
        raise ScheduleError(f"{what}: {amount:g} {unit}", hint="give a finite number, at least 0")


def fit_bytes(window_s: Any, line: AlphaBeta) -> Any:
    """Bytes of gradients that travel within `window_s`, start-up included; numbers or arrays. Any number if beta is 0."""
    spare_s, unit_s = window_s - line.startup_s, np.asarray(line.unit_s)
    any_number = np.where(spare_s >= 0.0, math.inf, 0.0)
    return np.where(unit_s > 0.0, np.maximum(0.0, spare_s) / np.where(unit_s > 0.0, unit_s, 1.0), any_number)


def exposed_s(layers: Sequence[BackwardLayer], line: AlphaBeta) -> float:
    """Seconds with every all-reduce exposed: one for each layer, none hidden."""
    windows_s = sum(slot.seconds(0.0, line) for layer in layers for slot in layer.slots)
    return windows_s + sum(float(line.time_s(layer.gradient_bytes)) for layer in layers if layer.gradient_bytes > 0.0)


def priced(pieces: Sequence[tuple[float, float]], layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    """The partition that puts `pieces` bytes into the windows of `layers` and the rest into the tail."""
    gradient_bytes = sum(layer.gradient_bytes for layer in layers)
    left_bytes = gradient_bytes - sum(sum(pair) for pair in pieces)
    tail_bytes = left_bytes if left_bytes > TINY * gradient_bytes else 0.0
    windows_s = sum(
        slot.seconds(piece, line)
        for layer, pair in zip(layers, pieces, strict=True)
        for slot, piece in zip(layer.slots, pair, strict=True)
    )
    tail_s = float(line.time_s(tail_bytes)) if tail_bytes else 0.0
    return Partition(pieces_bytes=tuple(pieces), tail_bytes=tail_bytes, total_s=windows_s + tail_s)


def filled(rooms_bytes: Sequence[float], layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    """The partition that fills each window, two a layer, with what is pending, up to its room."""
    pending, pieces = 0.0, []
    for i, layer in enumerate(layers):
        dense = min(pending, rooms_bytes[2 * i])
        moe = min(pending - dense, rooms_bytes[2 * i + 1])
        pieces.append((dense, moe))
        pending += layer.gradient_bytes - dense - moe
    return priced(pieces, layers, line)


def greedy(layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    """Fill each window with what is pending and fits, at the number of chunks that is best without gradients (step 1)."""
    rooms = []
    for slot in (slot for layer in layers for slot in layer.slots):
        best = int(np.argmin(slot.alone_s))
        rooms.append(float(fit_bytes(slot.alone_s[best] - slot.busy_s[best], line)))
    return filled(rooms, layers, line)


# ---------------------------------------------------------------- the optimum


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The choices of a slot, cheapest first: numbers of chunks at which gradients travel, without those that others beat."""

    extra_s: tuple[float, ...]
    """Seconds by which each lengthens the slot, what does not fit of a start-up included; the first by 0."""
    room_bytes: tuple[float, ...]
    """Bytes that then travel at no further cost, at most all that have arrived. The first may be 0: nothing travels."""
    start_s: float
    """Seconds by which the slot lengthens at least if anything travels."""
    arriving_bytes: float
    """Gradients that arrive at its end."""
    closing: bool
    """Whether all gradients have arrived before it, so that it can take all that is left."""


def windows(layers: Sequence[BackwardLayer], line: AlphaBeta) -> list[Window]:
    """The windows of all layers, two a layer."""
    last = max((i for i, layer in enumerate(layers) if layer.gradient_bytes > 0.0), default=len(layers))
    out, arrived = [], 0.0
    for i, layer in enumerate(layers):
        for slot, arriving in zip(layer.slots, (0.0, layer.gradient_bytes), strict=True):
            out.append(_window(slot, line, arrived, arriving, i > last))
        arrived += layer.gradient_bytes
    return out


def _window(slot: Slot, line: AlphaBeta, arrived: float, arriving: float, closing: bool) -> Window:
    idle_s, startup_s, unit_s = min(slot.alone_s), float(line.startup_s), float(line.unit_s)
    sending = sorted((max(alone, busy + startup_s), busy) for alone, busy in zip(slot.alone_s, slot.busy_s, strict=True))
    extra, room = [0.0], [0.0]
    # A choice is worth what it hides less what it costs; a closing window may be worth its cost for the tail's start-up.
    best_s = -math.inf if closing else 0.0
    for seconds, busy in sending:
        fits = min(arrived, float(fit_bytes(seconds - busy, line)))
        fits = fits if fits > TINY * arrived else 0.0
        worth_s = unit_s * fits - (seconds - idle_s)
        if worth_s <= best_s:
            continue
        if seconds == idle_s:
            room[0] = fits
        else:
            extra.append(seconds - idle_s)
            room.append(fits)
        best_s = worth_s
    return Window(
        extra_s=tuple(extra),
        room_bytes=tuple(room),
        start_s=sending[0][0] - idle_s,
        arriving_bytes=arriving,
        closing=closing,
    )


def _bounds(all_windows: Sequence[Window], unit_s: float) -> list[tuple[Array, Array]]:
    """For each window, corners (bytes, seconds) of what the pending bytes after it can hide at most in all later ones.

    The relaxation of the choices: each window hides along the concave hull of its choices, steepest parts of all first.
    """
    pending, hidden = np.zeros(1), np.zeros(1)
    out = []
    for window in reversed(all_windows):
        out.append((pending, hidden))
        # 1. Of what will be pending, this much arrives at the end of the window.
        arriving = window.arriving_bytes
        hidden = np.append(np.interp(arriving, pending, hidden), hidden[pending > arriving])
        pending = np.append(0.0, pending[pending > arriving] - arriving)
        # 2. The hull.
        corners = [(0.0, 0.0)]
        for extra, room in zip(window.extra_s, window.room_bytes, strict=True):
            worth = unit_s * room - extra
            if worth <= corners[-1][1] or room <= corners[-1][0]:
                continue
            while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], (room, worth)):
                corners.pop()
            corners.append((room, worth))
        # 3. Both, steepest first.
        wide = np.append(np.diff(pending), [b[0] - a[0] for a, b in pairwise(corners)])
        high = np.append(np.diff(hidden), [b[1] - a[1] for a, b in pairwise(corners)])
        wide, high = wide[wide > 0.0], high[wide > 0.0]
        order = np.argsort(-high / wide, kind="stable")
        pending = np.append(0.0, np.cumsum(wide[order]))
        hidden = hidden[0] + np.append(0.0, np.cumsum(high[order]))
    return out[::-1]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walk:
    """One pass of the dynamic programme."""

    hidden_s: float
    """Seconds that the best state hides, net of what it costs."""
    rooms_bytes: list[float]
    """What it chose for each window."""
    whole: bool
    """Whether no state was dropped for want of width."""


def _undominated(pending: Array, hidden_s: Array, line: AlphaBeta, slack_s: float) -> NDArray[np.intp]:
    """States that no other beats: which hides as much with no less pending, or so much more that it pays for the difference."""
    order = np.lexsort((-hidden_s, -pending))
    # 1. Most pending first: fewer must have hidden more, or nothing be left and save the tail's start-up.
    value = hidden_s[order]
    ahead = np.append(-math.inf, np.maximum.accumulate(value)[:-1])
    order = order[value + np.where(pending[order] == 0.0, line.startup_s, 0.0) > ahead + slack_s][::-1]
    # 2. Fewest pending first: more must be worth more even if all of the difference is hidden.
    value = hidden_s[order] + line.unit_s * pending[order]
    ahead = np.append(-math.inf, np.maximum.accumulate(value)[:-1])
    return np.asarray(order[value > ahead + slack_s])


def _walk(
    all_windows: Sequence[Window],
    bounds: Sequence[tuple[Array, Array]],
    line: AlphaBeta,
    width: int | None,
    at_least_s: float,
    slack_s: float,
) -> _Walk | None:
    """The best of the states (pending bytes, hidden seconds) that may hide over `at_least_s`; None if there is none."""
    pending, hidden_s, whole, trail = np.zeros(1), np.zeros(1), True, []
    all_bytes = sum(window.arriving_bytes for window in all_windows)
    for window, bound in zip(all_windows, bounds, strict=True):
        extra, room = np.array(window.extra_s)[:, None], np.array(window.room_bytes)[:, None]
        # 1. Every choice in every state: [choices, states], flat.
        sent = np.minimum(pending, room)
        reached, after = hidden_s + line.unit_s * sent - extra, pending - sent
        rooms = list(window.room_bytes)
        if window.closing:
            # All that is left, at the best choice that sends.
            sends = window.extra_s.index(window.start_s)
            reached = np.vstack((reached, hidden_s + (line.unit_s * sent - extra)[sends:].max(axis=0)))
            after, rooms = np.vstack((after, np.zeros_like(pending))), [*rooms, math.inf]
        count = pending.size
        after, reached = np.where(after <= TINY * all_bytes, 0.0, after).ravel(), reached.ravel()
        # 2. Those that may be best, by what they can hide yet.
        hope_s = reached + np.interp(after + window.arriving_bytes, *bound)
        kept = np.flatnonzero(hope_s > at_least_s)
        kept = kept[_undominated(after[kept], reached[kept], line, slack_s)]
        if width is not None and kept.size > width:
            # Half by their hope, half by their pending bytes at even distances: many may hope for the same.
            best, even = np.argsort(-hope_s[kept], kind="stable"), np.linspace(0, kept.size - 1, width // 2).astype(int)
            kept, whole = kept[np.union1d(best[: width // 2], even)], False
        if not kept.size:
            return None
        pending, hidden_s = after[kept] + window.arriving_bytes, reached[kept]
        trail.append((rooms, kept // count, kept % count))
    # 3. The tail, unless a closing window took all; without closing windows every state has one.
    if all_windows and all_windows[-1].closing:
        hidden_s = hidden_s - np.where(pending > 0.0, line.startup_s, 0.0)
    state = int(np.argmax(hidden_s))
    found_s, chosen = float(hidden_s[state]), []
    for rooms, choice, parent in reversed(trail):
        chosen.append(rooms[choice[state]])
        state = parent[state]
    return _Walk(hidden_s=found_s, rooms_bytes=chosen[::-1], whole=whole)


def partition(layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    """The quickest partition, but for `PROVEN` of its time, by a dynamic programme over the pending bytes.

    A pass costs windows x states x choices. The states are few, as a bound on what is left to hide drops most: 64 layers take
    some 50 ms. At worst their number doubles with every window, since to choose windows that just take all bytes is a knapsack.
    """
    all_windows = windows(layers, line)
    bounds = _bounds(all_windows, float(line.unit_s))
    idle_s = sum(min(slot.alone_s) for layer in layers for slot in layer.slots)
    best: _Walk | None = None
    for width in WIDTHS:
        at_least_s = -math.inf if best is None else best.hidden_s + PROVEN * idle_s
        walk = _walk(all_windows, bounds, line, width, at_least_s, TINY * idle_s)
        if walk is not None and (best is None or walk.hidden_s > best.hidden_s):
            best = walk
        if walk is None or walk.whole:
            break
    assert best is not None
    return filled(best.rooms_bytes, layers, line)
