"""Curves of operations that nobody measured, from those that were: the rules of a measured profile.

Only for devices that the catalog of public measurements lacks. Each rule has an error, added to that of the curve it starts
from: what it misses on machines where both sides were measured (the shipped curves), or 1 where there is nothing to hold it to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeplan.profiles.curve_fit import BLANK
from moeplan.profiles.curves import (
    KNOT_BYTES,
    AttentionCurve,
    CollectiveCurve,
    DispatchCurve,
    GemmCurve,
    GroupedGemmCurve,
)
from moeplan.profiles.fitting import BACKWARD_RATIO

MEMORY_ERROR = 0.12
"""Rate of a copy from that of memory-bound GEMMs: 0.81 to 1.25 of each other on six devices."""
GROUPED_ERROR = 0.14
"""Grouped GEMM from dense ones: medians of 4 to 14 % on B200, A100, H800 and H20 (SimuMax, InferSim)."""
ATTENTION_ERROR = 0.25
"""Attention from dense GEMM and memory, or from another head size: rates of 0.51 to 0.95 of each other."""
ATTENTION_FLOP_SHARE, ATTENTION_BYTES_SHARE = 0.85, 0.45
"""Rates of attention of head size 128 over those of the bf16 GEMM: 0.72 to 0.91, and 0.43 to 1.2."""
COPY_ERROR = 1.0
"""A collective from the rate of a copy: a guess."""
OTHER_COLLECTIVE_ERROR = 0.3
"""A collective from another one on the same links."""
FEWER_RANKS_ERROR = 0.3
"""A collective of 2 ranks from one of more by (n - 1) / n."""
DISPATCH_ERROR = 0.5
"""A de-duplicating dispatch from a plain all-to-all."""
COPY_LAUNCH_S = 2e-5
"""Fixed time of a collective that nobody measured."""
_LIKE = {"all_gather": ("reduce_scatter", "all_to_all"), "reduce_scatter": ("all_gather", "all_to_all"),
         "all_to_all": ("all_gather", "reduce_scatter")}  # fmt: skip


def grouped_from_dense(gemm: GemmCurve) -> GroupedGemmCurve:
    """One dense product for each group."""
    return GroupedGemmCurve(
        launch_s=0.0,
        group_s=gemm.launch_s,
        flop_per_s=gemm.flop_per_s,
        bytes_per_s=gemm.bytes_per_s,
        sharpness=gemm.sharpness,
        input_bytes=gemm.input_bytes,
        weight_bytes=gemm.weight_bytes,
        **{**BLANK, "error": gemm.error, "error_p90": gemm.error_p90, "source": gemm.source},
    )


def quantized_grouped(base: GroupedGemmCurve, gemm: GemmCurve, bf16: GemmCurve) -> GroupedGemmCurve:
    """The bf16 one with the rate and element sizes of the dense GEMM in another precision."""
    rate = base.flop_per_s * gemm.flop_per_s / bf16.flop_per_s
    return replace(base, flop_per_s=rate, input_bytes=gemm.input_bytes, weight_bytes=gemm.weight_bytes)


def attention_from_gemm(gemm: GemmCurve, memory_bytes_per_s: float) -> AttentionCurve:
    """Shares of the rates of dense products and of a copy."""
    return AttentionCurve(
        launch_s=gemm.launch_s,
        flop_per_s=ATTENTION_FLOP_SHARE * gemm.flop_per_s,
        bytes_per_s=ATTENTION_BYTES_SHARE * memory_bytes_per_s,
        backward_ratio=BACKWARD_RATIO,
        **{**BLANK, "error": gemm.error, "error_p90": gemm.error_p90, "source": gemm.source},
    )


def missing_collective(
    op: str, measured: Mapping[str, Mapping[int, CollectiveCurve]], copy_bytes_per_s: float, node: int
) -> tuple[dict[int, CollectiveCurve], str]:
    """Curves of an operation that was not measured, and the rule behind them.

    From one on the same links that moves as much, an all-reduce from two; with nothing measured every byte that arrives is
    copied once, which reads and writes it.
    """
    if op == "all_reduce":
        first, second = (measured.get(name) or measured.get(other, {}) for name, other in _HALVES)
        both = {n: _sum(first[n], second[n]) for n in sorted(first.keys() & second.keys())}
        if both:
            return both, "reduce-scatter and all-gather"
    for other in _LIKE.get(op, ()):
        if other in measured:
            return {n: _worse(c, OTHER_COLLECTIVE_ERROR) for n, c in measured[other].items()}, f"as {other}"
    ways = 2.0 if op == "all_reduce" else 1.0
    counts = sorted({2, max(2, node)})
    return {n: _copied(ways * (n - 1) / n, copy_bytes_per_s) for n in counts}, "the rate of a copy in memory"


_HALVES = (("reduce_scatter", "all_gather"), ("all_gather", "reduce_scatter"))


def _sum(first: CollectiveCurve, second: CollectiveCurve) -> CollectiveCurve:
    times = tuple(a + float(second.seconds(size)) for a, size in zip(first.times_s, first.sizes_bytes, strict=True))
    return _worse(replace(first, times_s=times), OTHER_COLLECTIVE_ERROR)


def _copied(share: float, copy_bytes_per_s: float) -> CollectiveCurve:
    times = tuple(COPY_LAUNCH_S + 2.0 * share * size / copy_bytes_per_s for size in KNOT_BYTES)
    blank = {**BLANK, "error": COPY_ERROR, "error_p90": COPY_ERROR, "source": "rate of a copy"}
    return CollectiveCurve(times_s=times, sizes_bytes=KNOT_BYTES, **blank)


def _worse(curve: CollectiveCurve, error: float) -> CollectiveCurve:
    return replace(curve, error=curve.error + error, error_p90=curve.error_p90 + error, residuals=())


def fewer_ranks(curve: CollectiveCurve, ranks: int, fewer: int) -> CollectiveCurve:
    """The curve of a smaller group: each rank sends (n - 1) / n of the buffer."""
    share = ((fewer - 1) / fewer) / ((ranks - 1) / ranks)
    return replace(curve, times_s=tuple(share * t for t in curve.times_s), residuals=())


def dispatch_from_all_to_all(curve: CollectiveCurve, ranks: int) -> DispatchCurve:
    """Latency of the smallest message and rate of the largest, in bytes that leave a rank."""
    leaving = (ranks - 1) / ranks * (curve.sizes_bytes[-1] - curve.sizes_bytes[0])
    seconds = max(curve.times_s[-1] - curve.times_s[0], 1e-3 * curve.times_s[-1])
    return DispatchCurve(
        latency_s=curve.times_s[0],
        bytes_per_s=leaving / seconds,
        **{**BLANK, "error": curve.error, "error_p90": curve.error_p90, "source": curve.source},
    )
