"""Profile: what the devices and links of one cluster do, as curves with their origin.

`nominal` builds one from public measurements. Where an operation was measured on the device, its curve is used as it is;
elsewhere the curve of the nearest measured relative is scaled (`catalog/relatives.yaml` names relatives and rules) and the
profile says so in `origins`: such a curve carries lower confidence. Units: seconds, bytes, FLOP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from moeplan.errors import ProblemError, SchemaError, nearest_hint
from moeplan.profiles.curves import (
    AttentionCurve,
    CollectiveCurve,
    DispatchCurve,
    GemmCurve,
    GroupedGemmCurve,
    QuantizedGemmCurve,
    StreamCurve,
)
from moeplan.profiles.hardware import Cluster
from moeplan.profiles.origin import CalibratedOn, MeasuredOn, Origin
from moeplan.records import save_text

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
    multi_node: Mapping[str, Mapping[str, CollectiveCurve]] = field(default_factory=dict)
    """Collectives across scale-up domains that were measured, by operation and "ranks/domains"; others follow the law of
    `moeplan.costmodels.collectives`."""
    ring_share: float = RING_SHARE
    """What rings across domains attain of the NICs' rate."""
    all_to_all_share: float = ALL_TO_ALL_SHARE
    """What a plain all-to-all across domains attains of it."""
    send_share: float = SEND_SHARE
    """What a send to one peer inside a domain attains of the scale-up link's rate."""
    hop_s: float = 0.0
    """One hop between domains; 0: that of the cluster's link, else `HOP_S`."""
    streams: Mapping[str, StreamCurve] = field(default_factory=dict)
    """Passes over device memory that were measured, by kind ("copy", "norm", "swiglu", "permute", ...)."""
    host_copies: Mapping[str, float] = field(default_factory=dict)
    """Measured bytes/s between device and host by direction, "host_to_device" and "device_to_host"."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Where each curve comes from, by "operation/key"."""
    calibrated_on: tuple[CalibratedOn, ...] = ()
    """Measured runs that corrected `sustained`, `host` and `exposed`, oldest first."""
    measured_on: MeasuredOn | None = None
    """The run that measured it; None: nominal."""
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
        factors |= {name: getattr(self, name) for name in ("ring_share", "all_to_all_share", "send_share")}
        for what, value in {"stream_bytes_per_s": self.stream_bytes_per_s, **factors}.items():
            most = MOST_FACTOR if what in factors else math.inf
            if not 0.0 < value <= most or value == math.inf:
                raise SchemaError(f"profile '{self.name}': {what} is {value:g}, above 0 and up to {most:g} is needed")
        if not 0.0 <= self.overlap_loss <= 1.0:
            raise SchemaError(f"profile '{self.name}': overlap_loss is {self.overlap_loss:g}, 0 to 1 is needed")
        if not 0.0 <= self.hop_s < math.inf:
            raise SchemaError(f"profile '{self.name}': hop_s is {self.hop_s:g}, a time of 0 or more is needed")

    @property
    def scale_out_bytes_per_s(self) -> float:
        """What one GPU attains between nodes in ring collectives and sends."""
        return self.ring_share * self.cluster.scale_out_bytes_per_s_per_gpu

    @property
    def all_to_all_bytes_per_s(self) -> float:
        """What one GPU attains between nodes in a plain all-to-all."""
        return self.all_to_all_share * self.cluster.scale_out_bytes_per_s_per_gpu

    @property
    def scale_out_latency_s(self) -> float:
        """One hop between nodes."""
        return self.hop_s or self.cluster.scale_out.latency_s or HOP_S

    @property
    def scale_up_bytes_per_s(self) -> float:
        """What one GPU attains to one peer inside a domain."""
        return self.send_share * self.cluster.scale_up.bytes_per_s

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

    def stream_s(self, moved_bytes: Any, kind: str = "") -> Any:
        """Seconds to read or write `moved_bytes` of device memory, at the rate of a kind of pass if that was measured fused."""
        curve = self.streams.get(kind)
        return moved_bytes / (curve.bytes_per_s if curve is not None and curve.fused else self.stream_bytes_per_s)

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

    def across_s(self, op: str, message_bytes: Any, ranks: Any, domains: Any, otherwise: Any) -> Any:
        """Seconds of a collective among `ranks` of `domains` domains where just that was measured, else `otherwise`."""
        seconds = otherwise
        for group, curve in self.multi_node.get(op, {}).items():
            measured_ranks, _, measured_domains = group.partition("/")
            same = (np.asarray(ranks) == int(measured_ranks)) & (np.asarray(domains) == int(measured_domains))
            seconds = np.where(same, curve.seconds(message_bytes), seconds)
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
