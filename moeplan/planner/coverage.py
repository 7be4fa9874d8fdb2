"""What of a plan is priced beyond what was measured.

A layout is priced twice. First every curve notes the sizes that it is asked for; those that lie outside its measured range by
more than a factor of 2, and curves that this machine was not measured for, are suspects. Then each suspect alone is slowed by
1 %: how much slower the step becomes is its share, and suspects without a share (a dispatcher that the layout does not use, a
message too short to count) are dropped. For profiles of `moeplan profile` only; nominal curves tell of their origin elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import KINDS
from moeplan.planner.problem import Problem
from moeplan.profiles.curves import Curve
from moeplan.profiles.origin import AS_NOMINAL
from moeplan.profiles.profile import Profile
from moeplan.units import format_bytes

FACTOR = 2.0
"""How far a size may lie outside the measured range, at which the forms of the curves still hold."""
LEAST_SHARE = 0.005
"""Share of a step below which nothing is said."""
MOST_NAMED = 3
"""Operations that the remark names."""
_SLOWER = 0.01
_BEGIN = "priced beyond what was measured: "
_NAMES = {"links/ring": "rings between domains", "links/all_to_all": "all-to-alls between domains", "rates/memory": "memory"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Beyond:
    """An operation of a layout that is priced beyond what was measured."""

    operation: str
    """As in `Profile.origins`: "grouped_gemm/bf16", "collectives/all_gather of 8"."""
    size: str
    """Argument that lies outside; empty: the operation was not measured at all."""
    value: float = 0.0
    """The furthest one."""
    low: float = 0.0
    high: float = 0.0
    """Measured range."""
    share: float = 0.0
    """Of the step."""

    @property
    def place(self) -> tuple[str, str, bool]:
        """What is told apart: operation, size, and whether that lies above."""
        return (self.operation, self.size, self.value > self.high)

    @property
    def distance(self) -> float:
        """Factor by which the size lies outside."""
        return max(self.value / self.high, self.low / self.value) if self.size else np.inf

    @property
    def text(self) -> str:
        """In words."""
        kind, _, name = self.operation.partition("/")
        what = _NAMES.get(self.operation) or (name if kind in ("collectives", "multi_node") else f"{kind} {name}")
        what = what.replace("_", " ")
        if not self.size:
            return f"{what} (not measured, {self.share:.1%} of the step)"
        shown = format_bytes if self.size.endswith("bytes") else "{:g}".format
        span = f"measured from {shown(self.low)} to {shown(self.high)}"
        return f"{what} at {self.size.replace('_', ' ')} {shown(self.value)} ({span}, {self.share:.1%} of the step)"


def beyond(problem: Problem, layout: Layout) -> tuple[Beyond, ...]:
    """What of a layout is priced beyond what was measured, the largest share first; nothing for profiles not measured here."""
    if problem.profile.measured_on is None:
        return ()
    found: dict[_Place, Beyond] = {}
    step_s = _step_s(problem, layout, _noting(found, problem.profile))
    out = []
    for place, one in found.items():
        slowed = _step_s(problem, layout, _slowing(place, problem.profile))
        out.append(dataclasses.replace(one, share=(slowed / step_s - 1.0) / _SLOWER))
    return tuple(sorted((b for b in out if b.share >= LEAST_SHARE), key=lambda b: -b.share))


def with_remark(remarks: Sequence[str], problem: Problem, found: Sequence[Beyond]) -> tuple[str, ...]:
    """Remarks of a plan, each once, with one about what lies beyond in place of what an earlier plan said of that."""
    named = [b.text for b in found[:MOST_NAMED]]
    if len(found) > MOST_NAMED:
        named.append(f"{len(found) - MOST_NAMED} more")
    again = f"measure with `moeplan profile --model {problem.model.name} --resume`"
    others = [text for text in remarks if not text.startswith(_BEGIN)]
    return tuple(dict.fromkeys([*others, *([f"{_BEGIN}{', '.join(named)}; {again}"] if named else [])]))


def kinds(found: Sequence[Beyond]) -> frozenset[str]:
    """Kinds of parts (`uncertainty.KINDS`) whose curves were asked for sizes outside their range."""
    names = [f"{b.operation}$" for b in found if b.size]
    return frozenset(
        kind
        for kind, prefixes in KINDS.items()
        if any(name.startswith(p.partition("{")[0]) for p in prefixes for name in names)
    )


# ---------------------------------------------------------------- which calls lie outside

Sizes = Mapping[str, Any]
Watch = Callable[[str, Sizes, Any], Any]
"""Operation, its sizes and its seconds to the seconds that shall count."""


_Place = tuple[str, str, bool]
"""Operation, size, and whether the size lies above what was measured: what is told apart."""


def _noting(found: dict[_Place, Beyond], profile: Profile) -> Watch:
    """A watch that notes what lies outside, of each place the furthest."""

    def watch(operation: str, sizes: Sizes, seconds: Any) -> Any:
        for one in _outside(profile, operation, sizes):
            known = found.get(one.place)
            if known is None or one.distance > known.distance:
                found[one.place] = one
        return seconds

    return watch


def _slowing(place: _Place, profile: Profile) -> Watch:
    """A watch under which the calls of one place take longer."""

    def watch(operation: str, sizes: Sizes, seconds: Any) -> Any:
        slow = operation == place[0] and any(one.place == place for one in _outside(profile, operation, sizes))
        return seconds * (1.0 + _SLOWER) if slow else seconds

    return watch


def _outside(profile: Profile, operation: str, sizes: Sizes) -> list[Beyond]:
    """Sizes of a call outside the measured range; one without a size where nothing was measured."""
    origin = profile.origins.get(operation)
    if origin is None or not origin.measured or origin.note.startswith(AS_NOMINAL):
        return [Beyond(operation=operation, size="")]
    out = []
    for name, (low, high) in _valid(profile, operation).items():
        values = np.ravel(sizes.get(name, 0.0))
        for far in (values[values > FACTOR * high], values[(values > 0.0) & (values < low / FACTOR)]):
            if len(far):
                furthest = float(far[np.argmax(np.abs(np.log(far / high)))])
                out.append(Beyond(operation=operation, size=name, value=furthest, low=low, high=high))
    return out


def _valid(profile: Profile, operation: str) -> Mapping[str, tuple[float, ...]]:
    """Measured range of the sizes of an operation; nothing for those that are linear in them."""
    table, _, key = operation.partition("/")
    op, _, group = key.partition(" of ")
    tables: Mapping[str, Mapping[Any, Curve]] = {
        "gemm": profile.gemms,
        "grouped_gemm": profile.grouped,
        "attention": profile.attentions,
        "collectives": {str(n): curve for n, curve in profile.collectives.get(op, {}).items()},
        "multi_node": profile.multi_node.get(op, {}),
    }
    curve = tables.get(table, {}).get(group or key)
    return {} if curve is None else curve.valid


# ---------------------------------------------------------------- a profile that is looked over the shoulder


def _step_s(problem: Problem, layout: Layout, watch: Watch) -> float:
    """Seconds of a step under a watch."""
    fields = {f.name: getattr(problem.profile, f.name) for f in dataclasses.fields(Profile)}
    pricing = Pricing(problem.model, _Watched(**fields, watch=watch), problem.workload, Layouts.of([layout]), exact=True)
    return float(pricing.step_seconds()[0])


class _WatchedCurve:
    """A curve under a watch; everything but its seconds is its own."""

    def __init__(self, curve: Any, operation: str, names: Sequence[str], watch: Watch) -> None:
        self._curve, self._operation, self._names, self._watch = curve, operation, names, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._curve, name)

    def seconds(self, *sizes: Any) -> Any:
        return self._watch(self._operation, dict(zip(self._names, sizes, strict=True)), self._curve.seconds(*sizes))

    def backward_seconds(self, *sizes: Any) -> Any:
        seconds = self._curve.backward_seconds(*sizes)
        return self._watch(self._operation, dict(zip(self._names, sizes, strict=True)), seconds)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watched(Profile):
    """A profile whose watch hears of every operation that is priced, and may change what it takes."""

    watch: Watch

    def gemm(self, precision: str) -> Any:
        return _WatchedCurve(super().gemm(precision), f"gemm/{precision}", ("m", "n", "k"), self.watch)

    def grouped_gemm(self, precision: str, direction: Literal["forward", "dgrad", "wgrad"]) -> Any:
        name = f"grouped_gemm/{precision}" + ("" if direction == "forward" else f"-{direction}")
        return _WatchedCurve(super().grouped_gemm(precision, direction), name, ("groups", "m", "n", "k"), self.watch)

    def attention(self, qk_dim: int, v_dim: int, kernel: Literal["native", "fa2"] = "native") -> Any:
        curve = super().attention(qk_dim, v_dim, kernel)  # that of another head size where this one was not measured
        own = str(qk_dim) if qk_dim == v_dim else f"{qk_dim}/{v_dim}"
        return _WatchedCurve(curve, f"attention/{own}", ("flop", "io_bytes"), self.watch)

    def quantize_s(self, precision: str, elements: Any) -> Any:
        return elements * getattr(self.gemms[precision], "quantize_s", 0.0)

    def stream_s(self, moved_bytes: Any, kind: str = "") -> Any:
        return self.watch("rates/memory", {}, super().stream_s(moved_bytes, kind))

    def collective_s(self, op: str, message_bytes: Any, ranks: Any) -> Any:
        seconds = super().collective_s(op, message_bytes, ranks)
        for count in np.unique(ranks[np.asarray(ranks) > 1] if np.ndim(ranks) else ranks):
            if count > 1:
                here = np.asarray(ranks) == count
                sizes = {"message_bytes": np.where(here, message_bytes, 0.0)}
                seconds = np.where(here, self.watch(f"collectives/{op} of {count:.0f}", sizes, seconds), seconds)
        return seconds

    def across_s(self, op: str, message_bytes: Any, ranks: Any, domains: Any, otherwise: Any) -> Any:
        seconds = super().across_s(op, message_bytes, ranks, domains, otherwise)
        counts = np.stack(np.broadcast_arrays(ranks, domains)).reshape(2, -1).T
        for ranks_, domains_ in np.unique(counts, axis=0):
            if domains_ > 1:
                here = (np.asarray(ranks) == ranks_) & (np.asarray(domains) == domains_)
                sizes = {"message_bytes": np.where(here, message_bytes, 0.0)}
                group = f"{ranks_:.0f}/{domains_:.0f}"
                law = "links/all_to_all" if op == "all_to_all" else "links/ring"
                name = f"multi_node/{op} of {group}" if group in self.multi_node.get(op, {}) else law
                seconds = np.where(here, self.watch(name, sizes, seconds), seconds)
        return seconds

    def dispatch_s(self, library: str, scale_up_bytes: Any, scale_out_bytes: Any, tokens: Any) -> Any:
        seconds = super().dispatch_s(library, scale_up_bytes, scale_out_bytes, tokens)
        reach = "-scale-out" if np.any(np.asarray(scale_out_bytes) > 0) else ""
        return self.watch(f"dispatch/{library}-dispatch{reach}", {}, seconds)
