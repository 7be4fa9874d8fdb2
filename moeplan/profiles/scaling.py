"""Curves of one machine made into those of another: rates times a ratio of rates, fixed times as they are.

A `Source` is a machine that somebody measured, with its ratios to the machine that a profile is built for. Compute goes by
measured GEMM rates (else by peaks), memory by bandwidth, links by their raw rates. `with_link_rate` and `with_memory_rate`
ask what a whole profile would be on a machine that is better in one respect. Units: those of the curves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from moeplan.profiles.curve_file import DeviceCurves, device_curves
from moeplan.profiles.curves import AttentionCurve, CollectiveCurve, GroupedGemmCurve, QuantizedGemmCurve
from moeplan.profiles.hardware import Link
from moeplan.profiles.profile import Profile

PEAKS = {
    "bf16": ("bf16", 2.0), "fp8": ("fp8", 1.0), "fp8-blockwise": ("fp8", 1.0), "fp8-mx": ("fp8", 1.0), "nvfp4": ("fp4", 0.5),
}  # fmt: skip
"""Precision of a GEMM: the device peak that bounds it, and bytes of an element."""


@dataclass(frozen=True, slots=True)
class Source:
    """A measured machine that curves are taken from, and the ratios that scale them to the target."""

    name: str
    curves: DeviceCurves
    compute: float
    memory: float
    scale_up: float
    scale_out: float
    measured: bool


def curves_of(name: str) -> DeviceCurves:
    """What was measured on a machine; empty if nothing was."""
    return device_curves(name) or DeviceCurves()


def ratio(mine: Link, other: Link) -> float:
    """Raw rate of one link over that of another."""
    return mine.bytes_per_s / other.bytes_per_s


def scaled_gemm(curve: Any, source: Source) -> Any:
    """A GEMM curve of `source` on the target; the casts of a quantised one move memory."""
    scaled = replace(curve, flop_per_s=curve.flop_per_s * source.compute, bytes_per_s=curve.bytes_per_s * source.memory)
    if isinstance(scaled, QuantizedGemmCurve):
        scaled = replace(scaled, quantize_s=scaled.quantize_s / source.memory, result_s=scaled.result_s / source.memory)
    return scaled


def scaled_grouped(curve: GroupedGemmCurve, source: Source) -> GroupedGemmCurve:
    """A grouped GEMM curve of `source` on the target."""
    return replace(curve, flop_per_s=curve.flop_per_s * source.compute, bytes_per_s=curve.bytes_per_s * source.memory)


def scaled_attention(curve: AttentionCurve, source: Source) -> AttentionCurve:
    """An attention curve of `source` on the target."""
    return replace(curve, flop_per_s=curve.flop_per_s * source.compute, bytes_per_s=curve.bytes_per_s * source.memory)


def scaled_collective(curve: CollectiveCurve, factor: float) -> CollectiveCurve:
    """A collective over links `factor` times as fast; the time of its smallest message is fixed."""
    first = curve.times_s[0]
    return replace(curve, times_s=tuple(first + (t - first) / factor for t in curve.times_s))


def with_link_rate(profile: Profile, level: Literal["scale_up", "scale_out"], factor: float) -> Profile:
    """The profile if the links of one level were `factor` times as fast: raw rates and what every curve attains of them.

    Collectives that were measured across domains are taken to wait for the scale-out links.
    """
    cluster, out = profile.cluster, level == "scale_out"
    link = getattr(cluster, level)
    faster = replace(link, name=f"{link.name} x{factor:g}", bytes_per_s=link.bytes_per_s * factor)
    collectives, across = profile.collectives, profile.multi_node
    if out:
        across = {op: {g: scaled_collective(c, factor) for g, c in curves.items()} for op, curves in across.items()}
    else:
        collectives = {op: {n: scaled_collective(c, factor) for n, c in curves.items()} for op, curves in collectives.items()}
    dispatches = {
        key: replace(curve, bytes_per_s=curve.bytes_per_s * factor) if key.endswith("-scale-out") == out else curve
        for key, curve in profile.dispatches.items()
    }
    cluster = replace(cluster, **{level: faster})
    return replace(profile, cluster=cluster, collectives=collectives, multi_node=across, dispatches=dispatches)


def with_memory_rate(profile: Profile, factor: float) -> Profile:
    """The profile if device memory were `factor` times as fast and the matrix units as they are."""
    device = profile.cluster.device
    device = replace(device, memory_bytes_per_s=device.memory_bytes_per_s * factor)
    here = Source(profile.name, DeviceCurves(), compute=1.0, memory=factor, scale_up=1.0, scale_out=1.0, measured=False)
    return replace(
        profile,
        cluster=replace(profile.cluster, device=device),
        stream_bytes_per_s=profile.stream_bytes_per_s * factor,
        gemms={key: scaled_gemm(curve, here) for key, curve in profile.gemms.items()},
        grouped={key: scaled_grouped(curve, here) for key, curve in profile.grouped.items()},
        attentions={key: scaled_attention(curve, here) for key, curve in profile.attentions.items()},
        streams={key: replace(curve, bytes_per_s=curve.bytes_per_s * factor) for key, curve in profile.streams.items()},
    )
