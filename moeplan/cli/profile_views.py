"""Curves of a profile as lines over one quantity, and the samples behind them as points.

A curve of several sizes is seen over its work (FLOP, bytes): the height is the rate, work over seconds, which for collectives
is the bus bandwidth of nccl-tests. The line of such a curve runs through typical shapes; every sample is compared with the
curve at its own shape. Units: FLOP or bytes, seconds, and their rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.profiles.curves import Curve, attention_bytes, causal_flop
from moeplan.profiles.origin import Origin
from moeplan.profiles.profile import Profile
from moeplan.profiles.samples import Sample
from moeplan.units import GB, TERA

FAMILIES = {
    "gemm": "dense GEMM", "grouped_gemm": "grouped GEMM", "attention": "attention", "collectives": "collectives in a domain",
    "multi_node": "collectives across domains", "dispatch": "MoE dispatch and combine", "streams": "passes over memory",
}  # fmt: skip
"""Kinds of curves in the order in which they are shown; the first part of a curve's name, and in words."""
POINTS = 200
"""Points of a line."""
HEADS, KV_HEADS = 32, 8
"""Heads of the attention whose line is drawn: grouped queries, one sequence."""
BACKWARD_FLOP = 2.5
"""FLOP of an attention backward over its forward, by custom."""
_LINE = {
    "gemm": "m = n = k", "attention": f"one sequence, {HEADS} heads, {KV_HEADS} of keys", "dispatch": "bytes that leave a rank",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One curve, ready to be drawn."""

    name: str
    """As in `Profile.origins`: "gemm/bf16", "collectives/all_reduce of 8"."""
    panel: str
    """Title of the plot that it shares with others of its kind."""
    label: str
    """What tells it from those."""
    curve: Curve
    origin: Origin | None
    unit: str
    """"FLOP" or "bytes"."""
    line_work: Any
    line_s: Any
    """Seconds along the line."""
    factor: float
    """Rate that is shown over work / seconds: of the bus, for collectives."""
    samples: tuple[Sample, ...]
    work: Any
    """Of each sample."""
    measured_s: Any
    curve_s: Any
    """Seconds that the curve gives at each sample."""

    @property
    def scale(self) -> float:
        """Rate of 1 TFLOP/s or 1 GB/s."""
        return TERA if self.unit == "FLOP" else GB

    @property
    def line_rate(self) -> Any:
        """TFLOP/s or GB/s along the line."""
        return self.factor * self.line_work / self.line_s / self.scale

    @property
    def rate(self) -> Any:
        """TFLOP/s or GB/s of each sample."""
        return self.factor * self.work / self.measured_s / self.scale

    @property
    def residuals(self) -> Any:
        """curve / measured - 1 of each sample; without samples those that the curve keeps."""
        return self.curve_s / self.measured_s - 1.0 if self.samples else np.array(self.curve.residuals)

    @property
    def family(self) -> str:
        """Key of `FAMILIES`."""
        return self.name.partition("/")[0]


def views(profile: Profile, samples: Sequence[Sample] = ()) -> list[View]:
    """Every curve of a profile, with the samples of each, family by family."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(_name_of(sample), []).append(sample)
    out = []
    for name, curve in _curves(profile):
        for suffix in ("", " backward") if name.startswith("attention/") else ("",):
            some = by_name.get(name + suffix, [])
            if some or not suffix:
                out.append(_view(name, suffix, curve, profile.origins.get(name), some))
    return out


def panels(shown: Sequence[View]) -> dict[str, list[View]]:
    """Views by the plot that they share."""
    out: dict[str, list[View]] = {}
    for view in shown:
        out.setdefault(view.panel, []).append(view)
    return out


def line_of(view: View) -> str:
    """Along which shapes the line of a view runs; empty: there is one size only."""
    if view.family == "grouped_gemm":
        groups, n, k = (_middle(view.curve, size) for size in ("groups", "n", "k"))
        return f"{groups:.0f} groups, n {n:.0f}, k {k:.0f}"
    return _LINE.get(view.family, "")


def _curves(profile: Profile) -> Iterator[tuple[str, Curve]]:
    yield from ((f"gemm/{key}", curve) for key, curve in profile.gemms.items())
    yield from ((f"grouped_gemm/{key}", curve) for key, curve in profile.grouped.items())
    yield from ((f"attention/{key}", profile.attentions[key]) for key in sorted(profile.attentions, key=_head_size))
    for op, by_ranks in profile.collectives.items():
        yield from ((f"collectives/{op} of {ranks}", by_ranks[ranks]) for ranks in sorted(by_ranks))
    for op, by_group in profile.multi_node.items():
        yield from ((f"multi_node/{op} of {group}", curve) for group, curve in by_group.items())
    yield from ((f"dispatch/{key}", curve) for key, curve in profile.dispatches.items())
    yield from ((f"streams/{key}", curve) for key, curve in profile.streams.items())


def _head_size(key: str) -> tuple[int, ...]:
    return tuple(int(part) for part in key.split("/"))


def _name_of(sample: Sample) -> str:
    """The curve that a sample belongs to; " backward" behind it for the other direction of attention."""
    if sample.op in ("gemm", "grouped_gemm", "attention"):
        return f"{sample.op}/{sample.key}"
    if sample.op == "attention-backward":
        return f"attention/{sample.key} backward"
    if sample.op == "stream":
        return f"streams/{sample.key}"
    ranks, _, domains = sample.group.partition("/")
    if sample.op == "deepep":
        return f"dispatch/deepep-{sample.key}" + "-scale-out" * (domains != "1")
    return f"collectives/{sample.op} of {ranks}" if domains == "1" else f"multi_node/{sample.op} of {sample.group}"


def _view(name: str, suffix: str, curve: Any, origin: Origin | None, samples: Sequence[Sample]) -> View:
    family, _, key = name.partition("/")
    op, _, group = key.partition(" of ")
    line = _line(family, key, curve)
    backward = bool(suffix)
    sizes = {size: np.array([_size(s, size) for s in samples]) for size in line}
    panel, label = _place(family, key)
    factor = _bus(op, int(group.split("/")[0])) if group else BACKWARD_FLOP if backward else 1.0
    return View(
        name=name + suffix,
        panel=panel,
        label=label + suffix,
        curve=curve,
        origin=origin,
        unit="FLOP" if family in ("gemm", "grouped_gemm", "attention") else "bytes",
        line_work=_work(family, line),
        line_s=_seconds(curve, family, line, backward),
        factor=factor,
        samples=tuple(samples),
        work=_work(family, sizes),
        measured_s=np.array([s.seconds for s in samples]),
        curve_s=_seconds(curve, family, sizes, backward) if samples else np.array([]),
    )


def _place(family: str, key: str) -> tuple[str, str]:
    """Plot and label of a curve."""
    op, _, group = key.partition(" of ")
    if group:
        return (op, f"{group} ranks") if family == "collectives" else (f"{op} across domains", group)
    if family == "grouped_gemm":
        found = re.fullmatch(r"(.+?)(?:-(dgrad|wgrad))?", key)
        assert found is not None
        return f"grouped GEMM, {found[1]}", found[2] or "forward"
    if family == "dispatch":
        library, _, phase = key.partition("-")
        return f"{library}, dispatch and combine", phase
    return FAMILIES[family], key


def _size(sample: Sample, name: str) -> float:
    return sample.sizes.get("message_bytes" if name == "link_bytes" else name, 0.0)


def _line(family: str, key: str, curve: Curve) -> dict[str, Any]:
    """Shapes along which a curve is drawn, over its measured range."""
    if family == "gemm":
        low, high = (float(np.prod([curve.valid.get(s, (64.0, 16384.0))[end] for s in "mnk"])) ** (1 / 3) for end in (0, 1))
        side = np.geomspace(low, high, POINTS)
        return {"m": side, "n": side, "k": side}
    if family == "grouped_gemm":
        low, high = curve.valid.get("m", (16.0, 8192.0))
        m = np.geomspace(low, high, POINTS)
        return {"groups": _middle(curve, "groups"), "m": m, "n": _middle(curve, "n"), "k": _middle(curve, "k")}
    if family == "attention":
        qk, _, v = key.partition("/")
        dims = float(qk), float(v or qk)
        low, high = curve.valid.get("flop", (1e8, 1e14))
        seq = np.sqrt(np.geomspace(low, high, POINTS) / causal_flop(1.0, 1.0, HEADS, *dims))
        return {"flop": causal_flop(1.0, seq, HEADS, *dims), "io_bytes": attention_bytes(1.0, seq, HEADS, KV_HEADS, *dims)}
    size = {"dispatch": "link_bytes", "streams": "bytes"}.get(family, "message_bytes")
    low, high = curve.valid.get(size) or curve.valid.get("message_bytes") or (2.0**16, 2.0**29)
    moved = np.geomspace(low, high, POINTS)
    if family != "dispatch":
        return {size: moved}
    return {size: moved, "tokens": moved / high * curve.valid.get("tokens", (0.0, 0.0))[1]}


def _work(family: str, sizes: Mapping[str, Any]) -> Any:
    if family in ("gemm", "grouped_gemm"):
        return 2.0 * sizes["m"] * sizes["n"] * sizes["k"] * sizes.get("groups", 1.0)
    return next(iter(sizes.values()))


def _seconds(curve: Any, family: str, sizes: Mapping[str, Any], backward: bool) -> Any:
    if backward:
        return curve.backward_seconds(**sizes)
    return curve.seconds(**sizes) if family in ("gemm", "grouped_gemm", "attention") else curve.seconds(*sizes.values())


def _middle(curve: Curve, size: str) -> float:
    """A typical value of a size: a power of two in the middle of what was measured."""
    low, high = curve.valid.get(size, {"groups": (8.0, 8.0)}.get(size, (4096.0, 4096.0)))
    return float(2.0 ** round(np.log2(np.sqrt(low * high))))


def _bus(op: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth."""
    return 1.0 if op == "send" else (2.0 if op == "all_reduce" else 1.0) * (ranks - 1.0) / ranks


def matching(shown: Sequence[View], name: str) -> list[View]:
    """The views that a user may mean: that very name, else all whose name has every word of it."""
    exact = [view for view in shown if view.name == name]
    words = re.split(r"[\s/]+", name.lower())
    return exact or [view for view in shown if all(word in re.split(r"[\s/]+", view.name.lower()) for word in words)]
