"""Profile: what the devices and links of one cluster do, as curves with their origin.

`nominal` builds one from public measurements. Where an operation was measured on the device, its curve is used as it is;
elsewhere the curve of the nearest measured relative is scaled (`catalog/relatives.yaml` names relatives and rules) and the
profile says so in `origins`: such a curve carries lower confidence. Units: seconds, bytes, FLOP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from moeplan.errors import ClusterError, ProblemError, SchemaError, nearest_hint
from moeplan.profiles.curves import (
    AttentionCurve,
    CollectiveCurve,
    DeviceCurves,
    DispatchCurve,
    GemmCurve,
    GroupedGemmCurve,
    QuantizedGemmCurve,
    device_curves,
)  # fmt: skip
from moeplan.profiles.hardware import Cluster, Device, load_cluster
from moeplan.profiles.origin import CalibratedOn, Origin
from moeplan.profiles.scaling import PEAKS, Source, curves_of, ratio, scaled_attention, scaled_gemm, scaled_grouped
from moeplan.records import load_yaml, save_text

C = TypeVar("C")

RING_SHARE = 0.89
"""Ring collectives across nodes over the NICs' rate: all-reduce of 512 MB on 8 nodes of 8 H100 (coreweave/nccl-tests)."""
ALL_TO_ALL_SHARE = 0.86
"""Plain all-to-all across nodes over the NICs' rate: 0.81 to 0.90 on 2 to 8 nodes of H100 (arXiv:2603.07685, table 7)."""
HOP_S = 5e-6
"""One hop between nodes where the fabric gives none: NCCL over InfiniBand, small messages."""
FLASH_ATTENTION_2_FLOP_PER_S = 327.9e12
"""FlashAttention-2 forward on H100, head size 128, 8192 tokens (Azure/AI-benchmarking-guide); nothing newer speeds it up."""
SEND_SHARE = 0.75
"""Point-to-point over NVLink, of the one-direction rate: NCCL rings reach 0.68 to 0.75 (A100, H100, B200)."""
SUSTAINED = ("bf16", "quantized", "attention")
"""Kinds of kernels with a sustained share: GEMMs in bf16 and with quantised inputs (grouped ones too), and attention."""
OVERLAP_LOSS = 0.33
"""Kappa where it was not measured: between what the speed-ups of FSMoE (arXiv:2501.10714, table 5) give for its testbeds, 0.372
(A6000, NVLink pairs) and 0.286 (2080Ti, PCIe)."""
MOST_FACTOR = 100.0
"""Larger factors and shares are taken for slips."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """Curves of one cluster; every method takes numbers or arrays."""

    cluster: Cluster
    name: str = "nominal"
    stream_bytes_per_s: float
    """Streaming rate of device memory."""
    gemms: Mapping[str, GemmCurve]
    """Dense GEMM by precision, quantisation of the input included."""
    grouped: Mapping[str, GroupedGemmCurve]
    """Grouped GEMM by precision, "-dgrad" and "-wgrad" for the gradients."""
    attentions: Mapping[str, AttentionCurve]
    """Attention by head size, "192/128" where keys and values differ."""
    collectives: Mapping[str, Mapping[int, CollectiveCurve]]
    """Collectives inside a scale-up domain by operation and ranks."""
    dispatches: Mapping[str, DispatchCurve]
    """De-duplicating dispatch and combine by library, "-scale-out" where nodes are crossed."""
    sustained: Mapping[str, float] = field(default_factory=dict)
    """Share of the curves' rates that a step sustains for minutes, by kind of kernel (`SUSTAINED`); 1: all."""
    host: float = 1.0
    """Factor on the host's time to launch a kernel: how this host compares with the one that the software era was timed on."""
    exposed: float = 1.0
    """Factor on the communication that overlap leaves exposed: tensor, context, expert and data parallelism."""
    overlap_loss: float = OVERLAP_LOSS
    """Kappa: share of what perfect overlap of MoE chunks would hide that stays exposed; 0: none, 1: nothing overlaps."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Where each curve comes from, by "operation/key"."""
    calibrated_on: tuple[CalibratedOn, ...] = ()
    """Measured runs that corrected `sustained`, `host` and `exposed`, oldest first."""
    path: str = ""
    """Absolute path of the file that it was read from; empty: it was made in this process."""
    sha256: str = ""
    """SHA-256 of that file."""

    def __post_init__(self) -> None:
        for kind in self.sustained:
            if kind not in SUSTAINED:
                raise SchemaError(
                    f"profile '{self.name}': unknown kind '{kind}' in sustained", hint=nearest_hint(kind, SUSTAINED)
                )
        factors = {"host": self.host, "exposed": self.exposed, **{f"sustained {k}": v for k, v in self.sustained.items()}}
        for what, value in {"stream_bytes_per_s": self.stream_bytes_per_s, **factors}.items():
            most = MOST_FACTOR if what in factors else math.inf
            if not 0.0 < value <= most or value == math.inf:
                raise SchemaError(f"profile '{self.name}': {what} is {value:g}, above 0 and up to {most:g} is needed")
        if not 0.0 <= self.overlap_loss <= 1.0:
            raise SchemaError(f"profile '{self.name}': overlap_loss is {self.overlap_loss:g}, 0 to 1 is needed")

    @property
    def scale_out_bytes_per_s(self) -> float:
        """What one GPU attains between nodes in ring collectives and sends."""
        return RING_SHARE * self.cluster.scale_out_bytes_per_s_per_gpu

    @property
    def all_to_all_bytes_per_s(self) -> float:
        """What one GPU attains between nodes in a plain all-to-all."""
        return ALL_TO_ALL_SHARE * self.cluster.scale_out_bytes_per_s_per_gpu

    @property
    def scale_out_latency_s(self) -> float:
        """One hop between nodes."""
        return self.cluster.scale_out.latency_s or HOP_S

    @property
    def scale_up_bytes_per_s(self) -> float:
        """What one GPU attains to one peer inside a domain."""
        return SEND_SHARE * self.cluster.scale_up.bytes_per_s

    def resized(self, gpus: int) -> Profile:
        """The same curves for another count of the same GPUs."""
        return replace(self, cluster=self.cluster.resized(gpus))

    def save(self, path: Path) -> None:
        """Write the profile file, whole or not at all."""
        from moeplan.profiles.profile_file import profile_text

        save_text(path, profile_text(self), "profile")

    def sustained_gemm(self, precision: str) -> float:
        """Share of a GEMM curve's rate that a step sustains."""
        return self.sustained.get("bf16" if precision == "bf16" else "quantized", 1.0)

    def stream_s(self, moved_bytes: Any) -> Any:
        """Seconds to read or write `moved_bytes` of device memory."""
        return moved_bytes / self.stream_bytes_per_s

    def gemm(self, precision: str) -> GemmCurve:
        """Dense GEMM in a precision; `ProblemError` where the device lacks it."""
        return self._curve(self.gemms, precision, "GEMM")

    def grouped_gemm(self, precision: str, direction: Literal["forward", "dgrad", "wgrad"]) -> GroupedGemmCurve:
        """Grouped GEMM of experts in one direction."""
        return self._curve(self.grouped, precision if direction == "forward" else f"{precision}-{direction}", "grouped GEMM")

    def quantize_s(self, precision: str, elements: Any) -> Any:
        """Seconds to quantise `elements` for a grouped GEMM; nothing in bf16."""
        curve = self.gemm(precision)
        return elements * (curve.quantize_s if isinstance(curve, QuantizedGemmCurve) else 0.0)

    def attention(self, qk_dim: int, v_dim: int, kernel: Literal["native", "fa2"] = "native") -> AttentionCurve:
        """Attention of a head size: the measured one, else the next smaller; FlashAttention-2 is no faster than on Hopper."""
        curve = self._attention(qk_dim, v_dim)
        if kernel == "native" or self.cluster.device.capability_number < 9.0:
            return curve
        return replace(curve, flop_per_s=min(curve.flop_per_s, FLASH_ATTENTION_2_FLOP_PER_S))

    def _attention(self, qk_dim: int, v_dim: int) -> AttentionCurve:
        if f"{qk_dim}/{v_dim}" in self.attentions:
            return self.attentions[f"{qk_dim}/{v_dim}"]
        sizes = sorted(int(k) for k in self.attentions if "/" not in k)
        return self.attentions[str(max((s for s in sizes if s <= (qk_dim + v_dim) / 2), default=sizes[0]))]

    def collective_s(self, op: str, message_bytes: Any, ranks: Any) -> Any:
        """Seconds of a collective among `ranks` of one domain; sizes between measured groups scale with (n - 1) / n."""
        curves = self.collectives[op]
        seconds: Any = 0.0
        for size in sorted(curves):
            share = ((ranks - 1.0) / ranks) / ((size - 1.0) / size)
            seconds = np.where(np.asarray(ranks) >= size, curves[size].seconds(message_bytes) * share, seconds)
        return seconds

    def dispatch_s(self, library: str, scale_up_bytes: Any, scale_out_bytes: Any, tokens: Any) -> Any:
        """Seconds of one dispatch and one combine; the slower link counts, both work at once."""
        inside = outside = 0.0 * scale_up_bytes
        for phase in ("dispatch", "combine"):
            inside = inside + self.dispatches[f"{library}-{phase}"].seconds(scale_up_bytes, tokens)
            outside = outside + self.dispatches[f"{library}-{phase}-scale-out"].seconds(scale_out_bytes, 0.0)
        return np.maximum(inside, np.where(scale_out_bytes > 0, outside, 0.0))

    def confidence(self) -> float:
        """Share of the curves that were measured on this device."""
        return sum(o.measured for o in self.origins.values()) / max(1, len(self.origins))

    def _curve(self, curves: Mapping[str, C], key: str, what: str) -> C:
        if key not in curves:
            device = self.cluster.device.name
            raise ProblemError(
                f"{device} has no {what} in {key}", hint=f"it has {', '.join(k for k in curves if '-' not in k)}"
            )
        return curves[key]


def nominal(cluster: Cluster) -> Profile:
    """The profile that public measurements give for `cluster`."""
    # Curves depend on device and links, not on the number of nodes: they are built once for clusters that differ in size only.
    one_node = replace(cluster, name="", gpus=min(cluster.gpus, cluster.gpus_per_node), price_per_gpu_hour=0.0)
    return replace(_built(one_node), cluster=cluster)


@functools.lru_cache(maxsize=64)
def _built(cluster: Cluster) -> Profile:
    return _Builder(cluster).build()


@functools.cache
def _catalog(name: str) -> dict[str, Any]:
    data: dict[str, Any] = load_yaml(Path(__file__).parent / "catalog" / f"{name}.yaml", "catalog file")
    return data


class _Builder:
    """Fills every operation of a profile from the device itself, else from its relatives in their order."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.device = cluster.device
        self.origins: dict[str, Origin] = {}
        rules = _catalog("relatives")
        chain = rules["relatives"].get(self.device.name)
        if chain is None:
            raise ClusterError(f"device '{self.device.name}' has neither measurements nor a measured relative")
        own = cluster.machine or self.device.name.lower()
        self.precisions: dict[str, list[str]] = rules["precisions"]
        self.machines: dict[str, str] = rules["machines"]
        names = [name for name in [own, *chain] if device_curves(name)]
        # Rates of all operations follow the target's dense GEMM, be it measured here or scaled from the nearest relative.
        first = next((name for name in names if "bf16" in curves_of(name).gemm), names[0])
        there = load_cluster(f"{self.machines.get(first, first)}x1").device
        self.gemm_flop_per_s = curves_of(first).gemm["bf16"].flop_per_s * self._nearest_ratio(own, first, there)
        self.sources = [self._source(name, own) for name in names]

    def _source(self, name: str, own: str) -> Source:
        there, curves = load_cluster(f"{self.machines.get(name, name)}x1"), curves_of(name)
        return Source(
            name=name,
            curves=curves,
            compute=self._compute_ratio(curves, there.device),
            memory=self.device.memory_bytes_per_s / there.device.memory_bytes_per_s,
            scale_up=ratio(self.cluster.scale_up, there.scale_up),
            scale_out=self.cluster.scale_out_bytes_per_s_per_gpu / there.scale_out_bytes_per_s_per_gpu,
            measured=name == own,
        )

    def _nearest_ratio(self, own: str, name: str, there: Device) -> float:
        """Compute rate of the target over that of the machine whose GEMM it takes: by best measured GEMM, else by peak."""
        best, other = curves_of(own).gemm_peak_flop_per_s.get("bf16"), curves_of(name).gemm_peak_flop_per_s.get("bf16")
        if own == name:
            return 1.0
        return best / other if best and other else self.device.peak_flop_per_s["bf16"] / there.peak_flop_per_s["bf16"]

    def _compute_ratio(self, curves: DeviceCurves, there: Device) -> float:
        """Compute rate of the target over that of a measured machine: by fitted GEMM, else by peak."""
        if "bf16" in curves.gemm:
            return self.gemm_flop_per_s / curves.gemm["bf16"].flop_per_s
        return self.device.peak_flop_per_s["bf16"] / there.peak_flop_per_s["bf16"]

    def build(self) -> Profile:
        gemms = {"bf16": self._find("gemm", "bf16", scaled_gemm)}
        for precision, (peak, _) in PEAKS.items():
            if precision != "bf16" and peak in self.device.peak_flop_per_s:
                gemms[precision] = self._quantized(precision, peak)
        grouped: dict[str, GroupedGemmCurve] = {}
        for precision, gemm in gemms.items():
            for direction in ("", "-dgrad", "-wgrad"):
                grouped[precision + direction] = self._grouped(precision, direction, gemm, gemms["bf16"])
        return Profile(
            cluster=self.cluster,
            stream_bytes_per_s=self._find(
                "rates", "memory", lambda r, s: replace(r, bytes_per_s=r.bytes_per_s * s.memory)
            ).bytes_per_s,
            gemms=gemms,
            grouped=grouped,
            attentions=self._attentions(),
            collectives=self._collectives(),
            dispatches=self._dispatches(),
            sustained=self._sustained(),
            origins=self.origins,
        )

    def _sustained(self) -> dict[str, float]:
        """By kind of kernel, from the machine or device itself, else from its relatives in their order."""
        shares = _catalog("sustained")
        out: dict[str, float] = {}
        for name in (self.cluster.machine, self.device.name, *_catalog("relatives")["relatives"][self.device.name], "h100"):
            known: dict[str, float] = next((v for k, v in shares.items() if k.lower() == name.lower()), {})
            out = {**known, **out}
        return out

    def _find(self, table: str, key: str, scale: Callable[[Any, Source], Any], label: str = "") -> Any:
        for source in self.sources:
            curve = getattr(source.curves, table).get(key)
            if curve is not None:
                self._note(f"{table}/{label or key}", source, curve, "")
                return curve if source.measured else scale(curve, source)
        raise ClusterError(f"no measurement of {table} '{key}' for {self.device.name} or its relatives")

    def _note(self, what: str, source: Source, curve: Any, rule: str) -> None:
        measured = source.measured and not rule
        how = rule or (
            "" if source.measured else f"scaled from {source.name}: compute x{source.compute:.2f}, memory x{source.memory:.2f}"
        )
        note = f"{curve.source}; {how}" if how else str(curve.source)
        self.origins[what] = Origin(source.name, measured, note, getattr(curve, "error", 0.0))

    def _quantized(self, precision: str, peak: str) -> GemmCurve:
        """The GEMM of a quantised precision, from the nearest precision where it was not measured."""
        for source in self.sources:
            for other in (precision, *self.precisions[precision]):
                curve = source.curves.gemm["bf16"] if other == "bf16" and "bf16" in source.curves.gemm else None
                curve = source.curves.quantized_gemm.get(other, curve)
                if curve is None:
                    continue
                gain = self.device.peak_flop_per_s[peak] / self.device.peak_flop_per_s.get(PEAKS[other][0], np.inf)
                rule = "" if other == precision else f"rate of {other} x{gain:.2f}"
                self._note(f"gemm/{precision}", source, curve, rule)
                scaled = curve if source.measured else scaled_gemm(curve, source)
                return replace(scaled, flop_per_s=scaled.flop_per_s * (gain if rule else 1.0))
        raise ClusterError(f"no measurement of a quantised GEMM for {self.device.name} or its relatives")

    def _grouped(self, precision: str, direction: str, gemm: GemmCurve, bf16: GemmCurve) -> GroupedGemmCurve:
        """A measured grouped GEMM, else the bf16 one with the rate and element sizes of the dense GEMM in this precision."""
        for source in self.sources:
            for key in (precision + direction, precision):
                curve = source.curves.grouped_gemm.get(key)
                if curve is not None:
                    self._note(
                        f"grouped_gemm/{precision}{direction}",
                        source,
                        curve,
                        "" if key == precision + direction else "as forward",
                    )
                    return curve if source.measured else scaled_grouped(curve, source)
        base: GroupedGemmCurve = self._find("grouped_gemm", f"bf16{direction}", scaled_grouped, label=precision + direction)
        origin = self.origins[f"grouped_gemm/{precision}{direction}"]
        self.origins[f"grouped_gemm/{precision}{direction}"] = replace(
            origin, measured=False, note=f"{origin.note}; dense {precision} over bf16"
        )
        weight = base.weight_bytes if direction == "-wgrad" else gemm.weight_bytes
        return replace(
            base,
            flop_per_s=base.flop_per_s * gemm.flop_per_s / bf16.flop_per_s,
            input_bytes=gemm.input_bytes,
            weight_bytes=weight,
        )

    def _attentions(self) -> dict[str, AttentionCurve]:
        sizes = {size for source in self.sources for size in source.curves.attention}
        return {size: self._find("attention", size, scaled_attention) for size in sorted(sizes)}

    def _collectives(self) -> dict[str, dict[int, CollectiveCurve]]:
        source = next(s for s in self.sources if s.curves.collectives)
        out: dict[str, dict[int, CollectiveCurve]] = {}
        for op, curves in source.curves.collectives.items():
            out[op] = {}
            for ranks, curve in curves.items():
                self._note(
                    f"collectives/{op} of {ranks}",
                    source,
                    curve,
                    "" if source.scale_up == 1.0 else f"link x{source.scale_up:.2f}",
                )
                first = curve.times_s[0]
                times = tuple(first + (t - first) / source.scale_up for t in curve.times_s)
                out[op][int(ranks)] = replace(curve, times_s=times)
        return out

    def _dispatches(self) -> dict[str, DispatchCurve]:
        out = {}
        for library in ("deepep", "hybridep"):
            for phase in ("dispatch", "combine"):
                for reach, link in (("", "scale_up"), ("-scale-out", "scale_out")):
                    key = f"{library}-{phase}{reach}"
                    curve, source = self._dispatch(key, f"deepep-{phase}{reach}")
                    out[key] = replace(curve, bytes_per_s=curve.bytes_per_s * getattr(source, link))
        return out

    def _dispatch(self, key: str, substitute: str) -> tuple[DispatchCurve, Source]:
        h100 = self._source("h100", self.device.name.lower())
        for name in (key, substitute):
            for source in (*self.sources, h100):
                if name in source.curves.dispatch:
                    curve = source.curves.dispatch[name]
                    rule = "" if name == key else f"as {substitute}"
                    self._note(f"dispatch/{key}", source, curve, rule)
                    return curve, source
        raise ClusterError(f"no measurement of '{key}'")
