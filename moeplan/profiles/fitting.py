"""Samples to curves: what `moeplan profile` measured, in the forms of curves.py.

Starts of a fit come from the samples themselves (best rates, shortest times) and from the copy rate of the same machine, so
that no device needs constants of its own. `curve_fit.py` fits kernels, `links.py` what moves between ranks. Overlap: the loss
(together - longer) / shorter, as a mean over the middle half of the samples. Units: seconds, bytes, FLOP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moeplan.errors import SchemaError
from moeplan.profiles.curve_fit import BLANK, LOOSE, column, fit_curve, linear, named, seconds_of
from moeplan.profiles.curves import (
    AttentionCurve,
    CollectiveCurve,
    DispatchCurve,
    GemmCurve,
    GroupedGemmCurve,
    QuantizedGemmCurve,
    StreamCurve,
)
from moeplan.profiles.least_squares import Array
from moeplan.profiles.links import LinkLaw, collective_curves, dispatch_curves, link_law, placement, skewed_ratio
from moeplan.profiles.samples import Sample

LEAST = {"gemm": 4, "grouped_gemm": 4, "attention": 3}
"""Shapes that a fit needs."""
SIZES = {
    "gemm": ("m", "n", "k"), "grouped_gemm": ("groups", "m", "n", "k"), "attention": ("flop", "io_bytes"),
    "attention-backward": ("flop", "io_bytes"), "stream": ("bytes",), "host_copy": ("bytes",), "launch": (),
    "all_reduce": ("message_bytes",), "all_gather": ("message_bytes",), "reduce_scatter": ("message_bytes",),
    "all_to_all": ("message_bytes",), "all_to_all_skewed": ("message_bytes",), "send": ("message_bytes",),
    "deepep": ("message_bytes", "tokens", "topk"), "overlap": ("alone_compute_s", "alone_comm_s"),
}  # fmt: skip
"""Operations, and the sizes that a sample of each has at least."""
_IN_GROUPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_skewed", "send", "deepep")
BACKWARD_RATIO = 3.05
"""Attention's backward over its forward where only that was measured: a training trace of DeepSeek-V3 (deepseek-ai)."""
FUSED = ("rms_norm", "fused adamw")
"""Words in what ran that tell one kernel, as a training framework has it, from several; a copy is one."""
_RATES = {"flop_per_s": 4.0, "bytes_per_s": 10.0}
"""Factor by which a fitted rate may exceed the best one seen."""
_ROOFLINE = {"launch_s": 3.0, **_RATES, "sharpness": LOOSE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Curves of samples; what was not measured, or too little, is absent."""

    gemms: Mapping[str, GemmCurve] = field(default_factory=dict)
    """By precision."""
    grouped: Mapping[str, GroupedGemmCurve] = field(default_factory=dict)
    """By precision, "-dgrad" and "-wgrad" for the gradients."""
    attentions: Mapping[str, AttentionCurve] = field(default_factory=dict)
    """By head size."""
    collectives: Mapping[str, Mapping[int, CollectiveCurve]] = field(default_factory=dict)
    """Inside a domain, by operation and ranks."""
    multi_node: Mapping[str, Mapping[str, CollectiveCurve]] = field(default_factory=dict)
    """Across domains, by operation and "ranks/domains"."""
    dispatches: Mapping[str, DispatchCurve] = field(default_factory=dict)
    """By library and phase, "-scale-out" across domains."""
    law: LinkLaw = field(default_factory=LinkLaw)
    """Rates and latency of the links."""
    streams: Mapping[str, StreamCurve] = field(default_factory=dict)
    """By kind of pass."""
    host_copies: Mapping[str, float] = field(default_factory=dict)
    """Bytes/s by direction."""
    overlap_loss: float | None = None
    """Share that stays exposed of what perfect overlap would hide; None: not measured."""
    launch_s: float | None = None
    """Host's time to launch a small kernel."""
    remarks: tuple[str, ...] = ()
    """Outliers, and what was measured too little."""


def fit(samples: Sequence[Sample]) -> Fitted:
    """The curves that samples give."""
    by_curve: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        check(sample)
        by_curve[sample.op, sample.key].append(sample)
    remarks: list[str] = []
    streams = {
        key: linear(some, "bytes", remarks, fused=_fused(key, some)) for (op, key), some in by_curve.items() if op == "stream"
    }
    copies = {key: linear(some, "bytes", remarks) for (op, key), some in by_curve.items() if op == "host_copy"}
    memory = streams["copy"].bytes_per_s if "copy" in streams else 0.0
    gemms, grouped, attentions = {}, {}, {}
    for (op, key), some in by_curve.items():
        if op not in LEAST:
            continue
        if (shapes := len({s.case for s in some})) < LEAST[op]:
            remarks.append(f"{op} {key}: measured at {shapes} sizes, a fit needs {LEAST[op]}")
        elif op == "gemm":
            gemms[key] = _gemm(key, some, memory, remarks)
        elif op == "grouped_gemm":
            grouped[key] = _grouped(key, some, memory, remarks)
        else:
            attentions[key] = _attention(some, by_curve.get(("attention-backward", key), []), memory, remarks)
    moved = [s for s in samples if s.op in _IN_GROUPS]
    inside, across = collective_curves(moved, remarks)
    ratio = skewed_ratio(moved)
    if ratio is not None:
        remarks.append(f"a skewed all-to-all takes {ratio:.2f} times an even one of as many bytes")
    return Fitted(
        gemms=gemms,
        grouped=grouped,
        attentions=attentions,
        collectives=inside,
        multi_node=across,
        dispatches=dispatch_curves(moved, remarks),
        law=link_law(moved, inside, remarks),
        streams=streams,
        host_copies={key: curve.bytes_per_s for key, curve in copies.items()},
        overlap_loss=_overlap_loss([s for s in samples if s.op == "overlap"]),
        launch_s=float(np.median([s.seconds for s in samples if s.op == "launch"])) if _has(samples, "launch") else None,
        remarks=tuple(remarks),
    )


def check(sample: Sample) -> None:
    """Refuse a sample that no curve can take: unknown operation, a size that is missing, a time that is none."""
    what = f"sample '{named(sample)}'"
    if sample.op not in SIZES:
        raise SchemaError(f"{what}: unknown operation", hint=f"known are {', '.join(SIZES)}")
    for name in SIZES[sample.op]:
        if not 0 < sample.sizes.get(name, 0.0) < np.inf:
            raise SchemaError(f"{what}: {name} is {sample.sizes.get(name, 'missing')}, a number above 0 is needed")
    if not 0 < sample.seconds < np.inf:
        raise SchemaError(f"{what}: measured {sample.seconds} s, a time above 0 is needed")
    if sample.op in _IN_GROUPS:
        placement(sample)


def _gemm(key: str, samples: Sequence[Sample], memory: float, remarks: list[str]) -> GemmCurve:
    m, n, k = _columns(samples, "m", "n", "k")
    width = 2.0 if key == "bf16" else 1.0
    shared = _roofline(2.0 * m * n * k, width * (m * k + n * k) + 2.0 * m * n, seconds_of(samples), memory)
    if key == "bf16":
        return fit_curve(GemmCurve(**shared, **BLANK), samples, SIZES["gemm"], _ROOFLINE, remarks)
    rate = shared["bytes_per_s"]  # a pass that reads two bytes and writes one; a quarter of a byte on the result
    start = QuantizedGemmCurve(**shared, quantize_s=3.0 / rate, result_s=0.25 / rate, **BLANK)
    return fit_curve(start, samples, SIZES["gemm"], _ROOFLINE | {"quantize_s": LOOSE, "result_s": LOOSE}, remarks)


def _grouped(key: str, samples: Sequence[Sample], memory: float, remarks: list[str]) -> GroupedGemmCurve:
    groups, m, n, k = _columns(samples, *SIZES["grouped_gemm"])
    precision, _, direction = key.partition("-")
    widths: dict[str, Any] = (
        {} if precision == "bf16" else {"input_bytes": 1.0, "weight_bytes": 2.0 if direction == "wgrad" else 1.0}
    )
    seconds = seconds_of(samples)
    shared = _roofline(2.0 * groups * m * n * k, 2.0 * groups * (m * k + n * k + m * n), seconds, memory)
    each = 0.1 * float(np.min(seconds / groups))
    start = GroupedGemmCurve(**shared, **widths, group_s=each, **BLANK)
    return fit_curve(start, samples, SIZES["grouped_gemm"], _ROOFLINE | {"group_s": LOOSE}, remarks)


def _attention(there: Sequence[Sample], back: Sequence[Sample], memory: float, remarks: list[str]) -> AttentionCurve:
    """Forward and backward share a curve and are fitted together."""
    flop, moved = _columns(there, "flop", "io_bytes")
    shared = _roofline(flop, moved, seconds_of(there), memory)
    del shared["sharpness"]
    start = AttentionCurve(**shared, backward_ratio=BACKWARD_RATIO, **BLANK)
    free = {"launch_s": 3.0, **_RATES} | ({"backward_ratio": LOOSE} if back else {})
    samples = [replace(s, sizes={**s.sizes, "backward": 0.0}) for s in there]
    samples += [replace(s, sizes={**s.sizes, "backward": 1.0}) for s in back]
    curve = fit_curve(start, samples, ("flop", "io_bytes", "backward"), free, remarks, _both_ways)
    known = {name: span for name, span in curve.valid.items() if name != "backward"}
    return replace(curve, valid=known, source=curve.source if back else f"{curve.source}; backward not measured")


def _both_ways(curve: AttentionCurve, rows: Mapping[str, Array]) -> Any:
    sizes = rows["flop"], rows["io_bytes"]
    return np.where(rows["backward"] > 0, curve.backward_seconds(*sizes), curve.seconds(*sizes))


def _roofline(flop: Array, moved: Array, seconds: Array, memory: float) -> dict[str, Any]:
    """Where the fit of a roofline starts; `memory` is the rate of a copy, 0 where none was measured."""
    return {
        "launch_s": 0.5 * float(seconds.min()),
        "flop_per_s": float(np.max(flop / seconds)),
        "bytes_per_s": memory or float(np.max(moved / seconds)),
        "sharpness": 2.0,
    }


def _overlap_loss(samples: Sequence[Sample]) -> float | None:
    """Mean over the middle half of the losses, each within 0 and 1."""
    if not samples:
        return None
    compute, moved = _columns(samples, "alone_compute_s", "alone_comm_s")
    losses = np.sort(np.clip((seconds_of(samples) - np.maximum(compute, moved)) / np.minimum(compute, moved), 0.0, 1.0))
    cut = len(losses) // 4
    return float(losses[cut : len(losses) - cut].mean())


def _fused(key: str, samples: Sequence[Sample]) -> bool:
    return key == "copy" or all(any(word in s.how.lower() for word in FUSED) for s in samples)


def _columns(samples: Sequence[Sample], *names: str) -> list[Array]:
    return [column(samples, name) for name in names]


def _has(samples: Sequence[Sample], op: str) -> bool:
    return any(s.op == op for s in samples)
