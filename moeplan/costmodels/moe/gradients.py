"""Gradient partitioning of FSMoE: which gradients travel in which window of the backward pass.

FSMoE (ASPLOS 2025, arXiv 2501.10714), section 4.5. Backward, a layer is a dense part and then one MoE layer; the gradients of
a layer arrive at its end and may travel in any later window, cut anywhere, each piece at alpha + beta x bytes; what is left
travels exposed at the end (the tail). A dense window of W seconds takes max(W, piece); an MoE layer takes the least over its
chunkings r of max(T(r), busy(r) + piece), with busy(r) the all-to-alls of the inter-node stream.

`greedy` is the paper's first step with all of the rest in the tail; `partition` is the optimum, in place of the paper's
differential evolution. Bytes are conserved, unlike in equation (4), which loses alpha / beta bytes a cut, and the order is
backward throughout, unlike in the index of equation (5). Units: bytes, seconds. Windows add up: not valid where a window hides
behind another.

Why few cuts suffice: all costs are flat or rise with beta, after one start-up. A piece in a flat stretch can grow at the
expense of later ones, and a piece in a rising stretch can give way to later ones, both at no cost, until it is nothing, all
that is pending, or just what fits without lengthening the layer at some r. A dynamic programme over those amounts is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta

TINY = 1e-12
"""Relative difference below which two amounts or times count as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A window of the backward pass: seconds by number of chunks."""

    alone_s: tuple[float, ...]
    """Seconds without gradients, one for each number of chunks."""
    busy_s: tuple[float, ...]
    """Of them, seconds that gradients cannot use because the inter-node link is taken."""

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


def fit_bytes(window_s: Any, line: AlphaBeta) -> Any:
    """Bytes of gradients that travel within `window_s`, start-up included; numbers or arrays."""
    return np.maximum(0.0, (window_s - line.startup_s) / line.unit_s)


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


def greedy(layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    """Fill each window with what is pending and fits, at the number of chunks that is best without gradients (step 1)."""
    pending, pieces = 0.0, []
    for layer in layers:
        filled = []
        for slot in layer.slots:
            best = int(np.argmin(slot.alone_s))
            filled.append(min(pending, float(fit_bytes(slot.alone_s[best] - slot.busy_s[best], line))))
            pending -= filled[-1]
        pieces.append((filled[0], filled[1]))
        pending += layer.gradient_bytes
    return priced(pieces, layers, line)


@dataclass(frozen=True, slots=True)
class _State:
    pending: float
    seconds: float
    pieces: tuple[float, ...]


def _undominated(states: Iterable[_State], line: AlphaBeta, all_bytes: float) -> list[_State]:
    """States that no other one equals or beats: quicker with no more pending, or so much quicker that its tail pays for it."""
    kept: list[_State] = []
    beaten_s = float("inf")
    # 1. By pending bytes, fewest first: a later state must be quicker than every earlier one.
    for state in sorted(states, key=lambda s: (s.pending, s.seconds)):
        if state.seconds < beaten_s * (1.0 - TINY):
            if kept and state.pending - kept[-1].pending <= TINY * all_bytes:
                kept.pop()
            kept.append(state)
            beaten_s = state.seconds
    # 2. Most pending first: one with fewer must be quicker than to send the difference exposed, in a piece of its own.
    front: list[_State] = []
    least_s = float("inf")
    for state in reversed(kept):
        sent_s = state.seconds + float(line.unit_s) * state.pending
        if sent_s < least_s:
            front.append(state)
        least_s = min(least_s, sent_s + float(line.startup_s))
    return front


def partition(layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition:
    """The quickest partition, exactly, by a dynamic programme over the pending bytes.

    Exponential at worst: 24 unequal layers of four chunkings take seconds, 48 equal ones about one.
    """
    all_bytes = sum(layer.gradient_bytes for layer in layers)
    states = [_State(0.0, 0.0, ())]
    for layer in layers:
        # 1. Each window takes nothing, all that is pending, or just what fits at some number of chunks.
        for slot in layer.slots:
            fits = {fit for fit in slot.fits(line) if fit > 0.0}
            reached = [
                _State(s.pending - piece, s.seconds + slot.seconds(piece, line), (*s.pieces, piece))
                for s in states
                for piece in {0.0, s.pending, *(f for f in fits if f < s.pending)}
            ]
            states = _undominated(reached, line, all_bytes)
        # 2. The gradients of the layer arrive.
        states = [_State(s.pending + layer.gradient_bytes, s.seconds, s.pieces) for s in states]
    found = [priced(list(zip(s.pieces[::2], s.pieces[1::2], strict=True)), layers, line) for s in states]
    return min(found, key=lambda p: p.total_s, default=Partition(pieces_bytes=(), tail_bytes=0.0, total_s=0.0))
