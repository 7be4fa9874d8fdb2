"""Curves of one machine made into those of another: rates times a ratio of rates, fixed times as they are.

A `Source` is a machine that somebody measured, with its ratios to the machine that a profile is built for. Compute goes by
measured GEMM rates (else by peaks), memory by bandwidth, links by their raw rates. Units: those of the curves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeplan.profiles.curve_file import DeviceCurves, device_curves
from moeplan.profiles.curves import AttentionCurve, GroupedGemmCurve, QuantizedGemmCurve
from moeplan.profiles.hardware import Link

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
