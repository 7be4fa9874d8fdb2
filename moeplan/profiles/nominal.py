"""The profile that public measurements give for a cluster.

Where an operation was measured on the device, its curve is used as it is; elsewhere the curve of the nearest measured relative
is scaled (`catalog/relatives.yaml` names relatives and rules) and `origins` says so: such a curve carries lower confidence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import ClusterError
from moeplan.profiles.curve_file import DeviceCurves, device_curves
from moeplan.profiles.curves import AttentionCurve, CollectiveCurve, DispatchCurve, GemmCurve, GroupedGemmCurve
from moeplan.profiles.hardware import Cluster, Device, load_cluster
from moeplan.profiles.origin import Origin
from moeplan.profiles.profile import Profile
from moeplan.profiles.scaling import (
    PEAKS,
    Source,
    curves_of,
    ratio,
    scaled_attention,
    scaled_collective,
    scaled_gemm,
    scaled_grouped,
)
from moeplan.records import load_yaml


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
                out[op][int(ranks)] = scaled_collective(curve, source.scale_up)
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
