"""What the schedules of one MoE layer share: its size, fitted times, and what each schedule must say of itself.

Ranks that share a tensor-parallel group (`mp_ranks`) hold the same tokens; every expert is cut among `esp_ranks`, and
`ep_ranks` such groups share the experts. Sizes are those of one tensor-parallel group before any division: the schedules
divide. Units: bytes, FLOP, seconds; numbers or arrays. Not valid for unbalanced loads: the fullest expert counts for all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from moeplan.costmodels.tasks import Graph, parse_graph
from moeplan.errors import LayoutError, ScheduleError

Direction: TypeAlias = Literal["forward", "backward"]
Parts: TypeAlias = Mapping[str, Any]
"""Seconds of one task by its kind; numbers or arrays."""
_FACTORED = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class AlphaBeta:
    """A fitted time, alpha + beta x amount; numbers or arrays."""

    startup_s: Any
    """Alpha: seconds of an empty operation."""
    unit_s: Any
    """Beta: seconds of one more byte, or of one more FLOP where the amount is FLOP."""

    def __post_init__(self) -> None:
        _at_least(0, self.startup_s, "the start-up of a fitted time", "s")
        _at_least(0, self.unit_s, "the slope of a fitted time", "s per byte or FLOP")

    def time_s(self, amount: Any) -> Any:
        """Seconds of the operation on `amount` bytes, or FLOP."""
        return self.startup_s + self.unit_s * amount

    def among_s(self, amount: Any, ranks: Any) -> Any:
        """Seconds of a collective of `ranks` ranks on `amount` bytes; nothing where a rank is alone."""
        return self.time_s(amount) * (np.asarray(ranks) > 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSize:
    """One MoE layer as a tensor-parallel group sees it; numbers or arrays."""

    token_bytes: Any
    """B L M elements in bytes: the input of the layer, the same on every rank of the group."""
    slot_bytes: Any
    """E T M elements in bytes: all slots of all experts, E T = k f B L where T is not padded."""
    expert_flop: Any
    """FLOP of all slots through whole experts, forward: 2 x GEMMs x E T M H."""
    mp_ranks: Any
    esp_ranks: Any
    ep_ranks: Any
    shared_up_flop: Any = 0.0
    """FLOP of all tokens through the first products of the shared experts, forward; only `shared-overlap` runs them."""
    shared_down_flop: Any = 0.0
    """The same through their last products."""
    sequence_parallel: Any = False
    """Whether tokens stay split among the mp_ranks outside the layer. Then schedules that end with split tokens need no
    gather, which is a part of the attention after them."""

    def __post_init__(self) -> None:
        for name in ("token_bytes", "slot_bytes", "expert_flop", "shared_up_flop", "shared_down_flop"):
            _at_least(0, getattr(self, name), f"{name} of an MoE layer", name.rpartition("_")[2])
        for name in ("mp_ranks", "esp_ranks", "ep_ranks"):
            _at_least(1, getattr(self, name), f"{name} of an MoE layer", "ranks")

    @property
    def all_ranks(self) -> Any:
        """P: ranks among which one copy of the experts is spread."""
        return self.ep_ranks * self.esp_ranks

    @property
    def closing_ranks(self) -> Any:
        """Ranks that gather the tokens after a schedule that ends with split ones: 1 with sequence parallelism."""
        return np.maximum(1, self.mp_ranks * np.logical_not(self.sequence_parallel))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Fitted times of the operations of a layer, forward; over bytes of the whole buffer, experts over FLOP."""

    exchange: AlphaBeta
    """All-to-all among the ep_ranks."""
    fused_exchange: AlphaBeta
    """All-to-all among all ranks (S1, S2): a fit of its own, as its start-up is longer."""
    gather: AlphaBeta
    """All-gather among the esp_ranks, over the gathered size."""
    scatter: AlphaBeta
    """Reduce-scatter among the esp_ranks, over the size before it."""
    reduce: AlphaBeta
    """All-reduce among the esp_ranks."""
    mp_gather: AlphaBeta
    """All-gather among the mp_ranks, over the gathered size."""
    experts: AlphaBeta
    """All GEMMs of an expert, forward; both gradients take alpha and beta twice."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), AlphaBeta):
                raise ScheduleError(f"the fitted time of '{field.name}' is missing", hint="give its start-up and its slope")


class LayerSchedule(ABC):
    """A way to run one MoE layer: what it moves, its tasks, and how long they take together.

    Kinds of tasks: D first and C second all-to-all, G gather, S reduce-scatter and A all-reduce among ESP, E experts, M gather
    among the tensor-parallel ranks, R gradient all-reduce; a schedule may have others of its own. Backward has the same shape
    with conjugate collectives of the same size and both gradients of the experts: D is then the combine's mirror.
    """

    name: str
    """Word for options and files: "fsmoe"."""
    title: str
    """What it does, in a line."""
    source: str
    """Paper or code."""
    runs_on: tuple[str, ...] = ()
    """Export targets that can execute it; empty: none."""
    chunked: bool = False
    """Whether the number of chunks is a choice."""

    @abstractmethod
    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """Bytes (E, X, Y: FLOP) of one rank in one direction by kind, all chunks together: of each D, each C, and so on.

        The amount of a collective of one rank is what it holds, though nothing moves.
        """

    @abstractmethod
    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds of one task by kind at `degree` chunks; a group of one rank takes no time.

        What the size does not tell (R, and kinds that a schedule says) is 0: replace it by `{**parts, "R": gradient_s}`.
        """

    @abstractmethod
    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Tasks of one direction in `degree` chunks, on the resources compute, intra and inter."""

    @abstractmethod
    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """Closed form: the makespan of the graph with these durations; a kind that `parts` lacks takes 0."""

    @abstractmethod
    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """Seconds of the same tasks one after the other; `imperfect_s` takes those of one chunk for no overlap."""


def times(
    amounts: Parts,
    size: MoeSize,
    lines: Lines,
    degree: Any,
    direction: Direction,
    *,
    fused: bool = False,
    mp_ranks: Any = None,
) -> dict[str, Any]:
    """Seconds by kind of one of `degree` chunks of `amounts`, M unchunked; R takes 0.

    `fused`: the all-to-alls are among all ranks. `mp_ranks`: ranks of M, if not all of the tensor-parallel group.
    """
    exchange, ranks = (lines.fused_exchange, size.all_ranks) if fused else (lines.exchange, size.ep_ranks)
    passes = 2.0 if direction == "backward" else 1.0
    exchange_s = exchange.among_s(amounts["D"] / degree, ranks)
    out = {"D": exchange_s, "C": exchange_s, "R": 0.0}
    out["E"] = passes * lines.experts.startup_s + lines.experts.unit_s * (amounts["E"] / degree)
    for kind, line in (("G", lines.gather), ("S", lines.scatter), ("A", lines.reduce)):
        if kind in amounts:
            out[kind] = line.among_s(amounts[kind] / degree, size.esp_ranks)
    if "M" in amounts:
        out["M"] = lines.mp_gather.among_s(amounts["M"], size.mp_ranks if mp_ranks is None else mp_ranks)
    return out


def expert_flop(size: MoeSize, direction: Direction) -> Any:
    """FLOP of all slots through whole experts: backward has gradients of inputs and of weights."""
    return 2.0 * size.expert_flop if direction == "backward" else size.expert_flop


def total(parts: Parts, kinds: str) -> Any:
    """Seconds of one task of each kind, a letter each; a kind that `parts` lacks takes 0."""
    return sum((parts[kind] for kind in kinds if kind in parts), 0.0)


def chain(words: str) -> Graph:
    """Tasks like "D1@inter E1@compute", each after the one before."""
    texts = words.split()
    names = [text.partition("@")[0] for text in texts]
    return parse_graph(" ".join([texts[0], *(f"{text}<{name}" for text, name in zip(texts[1:], names[:-1], strict=True))]))


def expert_line(gemm: AlphaBeta, gemms: Any) -> AlphaBeta:
    """Time of an expert of `gemms` equal GEMMs, over the FLOP of all of them: only the start-up is paid again."""
    return AlphaBeta(startup_s=gemms * gemm.startup_s, unit_s=gemm.unit_s)


def imperfect_s(overlapped_s: Any, alone_s: Any, kappa: Any) -> Any:
    """Seconds between perfect overlap (kappa 0) and none (kappa 1, `alone_s`); kappa is measured, about 0.3 to 0.4.

    `alone_s` is the work in one chunk, whatever the chunks of `overlapped_s`: FSMoE's published speed-ups fit that alone, not a
    sum over chunks, whose start-ups one chunk spares.
    """
    return overlapped_s + kappa * (alone_s - overlapped_s)


def check_groups(ranks: int, mp: int, ep: int, esp: int) -> None:
    """Refuse group sizes that do not fit the `ranks` of one replica of an MoE layer: ep x esp = ranks, mp divides them."""
    for name, value in (("ranks", ranks), ("mp", mp), ("ep", ep), ("esp", esp)):
        if value < 1 or value != int(value):
            raise LayoutError(f"{name} = {value} is not a number of ranks", hint="give a whole number from 1")
    if ep * esp != ranks:
        hint = f"with esp {esp}, ep must be {ranks // esp}" if ranks % esp == 0 else f"esp must divide {ranks}"
        raise LayoutError(f"ep {ep} x esp {esp} = {ep * esp} ranks, but the MoE layer has {ranks}", hint=hint)
    if ranks % mp:
        hint = f"use a divisor of {ranks}, like {_divisor(ranks, mp)}"
        raise LayoutError(f"mp {mp} does not divide the {ranks} ranks of the MoE layer", hint=hint)


def check_degree(degree: Any, slots: Any = None) -> None:
    """Refuse numbers of chunks below 1, or that do not divide the `slots` of an expert on a rank; numbers or arrays."""
    _at_least(1, degree, "the number of chunks r", "chunks")
    r, held = np.broadcast_arrays(degree, 0 if slots is None else slots)
    if (uneven := r % 1 != 0).any():
        raise ScheduleError(f"r = {r[uneven].flat[0]} is not a number of chunks", hint="give a whole number from 1")
    _at_least(0, held, "the capacity of an expert", "slots")
    if (uneven := held % r != 0).any():
        chunks, capacity = int(r[uneven].flat[0]), float(held[uneven].flat[0])
        padded = -(-math.ceil(capacity) // chunks) * chunks
        hint = f"use r = {_divisor(int(capacity), chunks)}, or pad the capacity to {padded}"
        raise ScheduleError(f"r = {chunks} chunks do not divide a capacity of {capacity:g} slots", hint=hint)


def _divisor(number: int, most: int) -> int:
    """A divisor of a number, at most `most`: the greatest, but of numbers past `_FACTORED` one that `most` has too."""
    if number > _FACTORED:
        return math.gcd(number, most)
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return max(d for d in (*low, *(number // d for d in low)) if d <= most)


def _at_least(least: float, value: Any, what: str, unit: str) -> None:
    """Refuse what is no number, not finite or below `least`; numbers or arrays."""
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise ScheduleError(f"{what} is missing: {value!r} is no number")
    # A NaN is its own minimum and fails the comparison.
    if array.size and not (array.min() >= least and array.max() < np.inf):
        bad = array[~((array >= least) & (array < np.inf))].flat[0]
        raise ScheduleError(f"{what} is {bad:g} {unit}", hint=f"give a finite number from {least:g}")
