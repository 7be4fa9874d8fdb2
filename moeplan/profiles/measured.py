"""The profile of a machine that was measured.

Every curve is the measured one. Where an operation was not measured: the nominal curve of a device that the catalog knows; on
others a rule from what was measured (`substitutes.py`), which the origin of the curve names, with an error of its own.
`sustained` is nominal, at most 1 where the curve is no longer scaled from elsewhere; how fast the host launches comes from the
measured launch of a small kernel. Units: seconds, bytes, FLOP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeplan.errors import ClusterError, DeviceError
from moeplan.profiles import substitutes as rules
from moeplan.profiles.curves import AttentionCurve, CollectiveCurve, Curve, DispatchCurve, GroupedGemmCurve
from moeplan.profiles.detect import detected_cluster, in_catalog, with_measured_rates
from moeplan.profiles.fitting import LEAST, Fitted, fit
from moeplan.profiles.hardware import Cluster
from moeplan.profiles.links import COLLECTIVES
from moeplan.profiles.nominal import nominal
from moeplan.profiles.origin import AS_NOMINAL, MeasuredOn, Origin
from moeplan.profiles.profile import ALL_TO_ALL_SHARE, MOST_FACTOR, OVERLAP_LOSS, RING_SHARE, SEND_SHARE, Profile
from moeplan.profiles.samples import Environment, Sample
from moeplan.profiles.scaling import PEAKS

LAUNCH_S = {"x86": 6e-6, "grace": 3e-6}
"""A bare launch on the hosts for which the software eras give their time per kernel (costmodels/catalog/eras.yaml)."""
MOST_REMARKS = 20
"""Remarks that a profile keeps."""
_DIRECTIONS = ("", "-dgrad", "-wgrad")


def measured_profile(
    samples: Sequence[Sample],
    environment: Environment,
    cluster: Cluster | None = None,
    *,
    samples_sha256: str = "",
    remarks: Sequence[str] = (),
) -> Profile:
    """The profile that samples give; without a cluster it is found from the environment.

    `samples_sha256` and `remarks` go into `Profile.measured_on`.
    """
    fitted = fit(samples)
    cluster = cluster or detected_cluster(environment)
    usual = nominal(cluster) if in_catalog(cluster) else None
    if usual is None:
        if "bf16" not in fitted.gemms:
            raise DeviceError(
                f"{cluster.device.name}: too few bf16 GEMMs were measured for a profile, {LEAST['gemm']} shapes are needed",
                hint="measure on with --resume and a longer --budget",
            )
        cluster = with_measured_rates(cluster, fitted)
    told = tuple(dict.fromkeys((*remarks, *fitted.remarks)))
    if len(told) > MOST_REMARKS:
        told = (*told[: MOST_REMARKS - 1], f"and {len(told) - MOST_REMARKS + 1} further remarks")
    software = [f"torch {environment.torch}" if environment.torch else "", environment.communication]
    run = MeasuredOn(
        when=environment.when,
        device=environment.device,
        backend=environment.backend,
        software=", ".join(filter(None, software)),
        ranks=environment.ranks,
        nodes=-(-environment.ranks // environment.per_node),
        samples=len(samples),
        samples_sha256=samples_sha256,
        remarks=told,
    )
    both_ways = frozenset(s.key for s in samples if s.op == "attention-backward")
    return _Builder(cluster, fitted, usual, both_ways).build(run)


class _Builder:
    """Fills every operation of a profile: measured, else nominal, else by a rule."""

    def __init__(self, cluster: Cluster, fitted: Fitted, usual: Profile | None, both_ways: frozenset[str]) -> None:
        self.cluster, self.fitted, self.usual, self.both_ways = cluster, fitted, usual, both_ways
        self.origins: dict[str, Origin] = {}

    def build(self, run: MeasuredOn) -> Profile:
        fitted = self.fitted
        gemms = self._either("gemm", {p: c for p, c in fitted.gemms.items() if p in PEAKS}, "gemms")
        memory = self._memory()
        self._note_measured("streams", fitted.streams)
        shares = self._shares()
        return Profile(
            cluster=self.cluster,
            name="measured",
            stream_bytes_per_s=memory,
            gemms=gemms,
            grouped=self._grouped(gemms),
            attentions=self._attentions(gemms["bf16"], memory),
            collectives=(collectives := self._collectives(memory)),
            dispatches=self._dispatches(collectives["all_to_all"]),
            sustained=self._sustained(),
            host=self._host(),
            overlap_loss=OVERLAP_LOSS if fitted.overlap_loss is None else round(fitted.overlap_loss, 4),
            multi_node=self._multi_node(),
            streams=fitted.streams,
            host_copies=fitted.host_copies,
            ring_share=shares["ring"],
            all_to_all_share=shares["all_to_all"],
            send_share=shares["send"],
            hop_s=fitted.law.hop_s or 0.0,
            origins=self.origins,
            measured_on=run,
        )

    # -- notes of where a curve comes from ---------------------------------------------------------------------------------

    def _measured(self, what: str, source: str, error: float) -> None:
        self.origins[what] = Origin(self.cluster.device.name, True, source, error)

    def _note_measured(self, table: str, curves: Mapping[Any, Curve], of: str = "") -> None:
        for key, curve in curves.items():
            self._measured(f"{table}/{of}{key}", curve.source, curve.error)

    def _ruled(self, what: str, rule: str, error: float) -> None:
        self.origins[what] = Origin(self.cluster.device.name, False, rule, error)

    def _as_nominal(self, what: str) -> None:
        """Take over the origin of a nominal curve; its note says so."""
        assert self.usual is not None
        if what in self.usual.origins:
            origin = self.usual.origins[what]
            self.origins[what] = replace(origin, note=AS_NOMINAL + origin.note)

    def _either(self, table: str, measured: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Measured curves over the nominal ones."""
        usual = getattr(self.usual, name) if self.usual is not None else {}
        for key in usual:
            self._as_nominal(f"{table}/{key}")
        self._note_measured(table, measured)
        return {**usual, **measured}

    # -- operations --------------------------------------------------------------------------------------------------------

    def _memory(self) -> float:
        copy = self.fitted.streams.get("copy")
        if copy is not None:
            self._measured("rates/memory", copy.source, copy.error)
            return copy.bytes_per_s
        if self.usual is not None:
            self._as_nominal("rates/memory")
            return self.usual.stream_bytes_per_s
        gemm = self.fitted.gemms["bf16"]
        self._ruled("rates/memory", "rate of memory-bound bf16 GEMMs", rules.MEMORY_ERROR + gemm.error)
        return gemm.bytes_per_s

    def _grouped(self, gemms: Mapping[str, Any]) -> dict[str, GroupedGemmCurve]:
        known = {
            key: curve
            for key, curve in self.fitted.grouped.items()
            if key.removesuffix("-dgrad").removesuffix("-wgrad") in gemms
        }
        out = self._either("grouped_gemm", known, "grouped")
        for precision, gemm in gemms.items():
            for direction in _DIRECTIONS:
                key = precision + direction
                if key in out:
                    continue
                if direction and precision in out:
                    curve, rule = out[precision], "as the forward product"
                elif precision != "bf16" and f"bf16{direction}" in out:
                    base = out[f"bf16{direction}"]
                    curve, rule = rules.quantized_grouped(base, gemm, gemms["bf16"]), f"dense {precision} over bf16"
                else:
                    curve, rule = rules.grouped_from_dense(gemm), "dense GEMMs, one for each expert"
                out[key] = curve
                self._ruled(f"grouped_gemm/{key}", rule, curve.error + rules.GROUPED_ERROR)
        return out

    def _attentions(self, gemm: Any, memory: float) -> dict[str, AttentionCurve]:
        measured = dict(self.fitted.attentions)
        usual = self.usual.attentions if self.usual is not None else {}
        for size, curve in measured.items():
            if size not in self.both_ways and size in usual:
                source = curve.source.replace("backward not measured", "backward over forward nominal")
                measured[size] = replace(curve, backward_ratio=usual[size].backward_ratio, source=source)
        out: dict[str, AttentionCurve] = self._either("attention", measured, "attentions")
        if not any(size.isdecimal() for size in out):
            if out:
                other = min(out)
                curve, rule = out[other], f"as head size {other}"
            else:
                curve, rule = rules.attention_from_gemm(gemm, memory), "dense bf16 GEMM and memory"
            self._ruled("attention/128", rule, curve.error + rules.ATTENTION_ERROR)
            out["128"] = curve
        return out

    def _collectives(self, memory: float) -> dict[str, dict[int, CollectiveCurve]]:
        measured = self.fitted.collectives
        out: dict[str, dict[int, CollectiveCurve]] = {}
        for op in COLLECTIVES:
            usual = self.usual.collectives[op] if self.usual is not None else {}
            for ranks in usual:
                self._as_nominal(f"collectives/{op} of {ranks}")
            self._note_measured("collectives", measured.get(op, {}), of=f"{op} of ")
            out[op] = {**usual, **measured.get(op, {})}
        for op, curves in out.items():
            if not curves:
                ruled, rule = rules.missing_collective(op, measured, memory, self.cluster.gpus_per_node)
                for ranks, curve in ruled.items():
                    curves[ranks] = curve
                    self._ruled(f"collectives/{op} of {ranks}", rule, curve.error)
            if (least := min(curves)) > 2:
                curves[2] = rules.fewer_ranks(curves[least], least, 2)
                error = curves[2].error + rules.FEWER_RANKS_ERROR
                self._ruled(f"collectives/{op} of 2", f"that of {least} by (n - 1) / n", error)
        return {op: dict(sorted(curves.items())) for op, curves in out.items()}

    def _multi_node(self) -> Mapping[str, Mapping[str, CollectiveCurve]]:
        for op, curves in self.fitted.multi_node.items():
            self._note_measured("multi_node", curves, of=f"{op} of ")
        return self.fitted.multi_node

    def _shares(self) -> dict[str, float]:
        """What was attained of the links' raw rates."""
        law, cluster = self.fitted.law, self.cluster
        raw = {"ring": cluster.scale_out_bytes_per_s_per_gpu, "send": cluster.scale_up.bytes_per_s}
        raw["all_to_all"] = raw["ring"]
        out = {"ring": RING_SHARE, "all_to_all": ALL_TO_ALL_SHARE, "send": SEND_SHARE}
        if self.usual is None:  # its links are what was measured, see `with_measured_rates`
            out = dict.fromkeys(out, 1.0)
        rates = {"ring": law.ring_bytes_per_s, "all_to_all": law.all_to_all_bytes_per_s, "send": law.send_bytes_per_s}
        for name, rate in rates.items():
            if rate is None:
                continue
            out[name] = rate / raw[name]
            source, error = (law.send_source, law.send_error) if name == "send" else (law.source, law.error)
            self._measured(f"links/{name}", source, error)
            if out[name] > MOST_FACTOR:
                raise ClusterError(
                    f"cluster '{cluster.name}': {name} attains {out[name]:g} times the raw rate of its link",
                    hint="say with --cluster what this machine is",
                )
        return out

    def _dispatches(self, exchanges: Mapping[int, CollectiveCurve]) -> dict[str, DispatchCurve]:
        out: dict[str, DispatchCurve] = self._either("dispatch", self.fitted.dispatches, "dispatches")
        law = self.fitted.law
        for library in ("deepep", "hybridep"):
            for phase in ("dispatch", "combine"):
                for reach in ("", "-scale-out"):
                    key = f"{library}-{phase}{reach}"
                    if key in out:
                        continue
                    ranks = max(exchanges)
                    curve = rules.dispatch_from_all_to_all(exchanges[ranks], ranks)
                    rule = f"all-to-all of {ranks}"
                    rate = law.all_to_all_bytes_per_s or law.ring_bytes_per_s
                    if reach and rate is not None:
                        curve = replace(curve, latency_s=law.hop_s or curve.latency_s, bytes_per_s=rate)
                        rule = "all-to-all across domains"
                    out[key] = curve
                    self._ruled(f"dispatch/{key}", rule, curve.error + rules.DISPATCH_ERROR)
        return out

    # -- factors -----------------------------------------------------------------------------------------------------------

    def _sustained(self) -> dict[str, float]:
        if self.usual is None:
            return {}
        measured = {
            "bf16": "bf16" in self.fitted.gemms,
            "quantized": any(key != "bf16" for key in self.fitted.gemms),
            "attention": bool(self.fitted.attentions),
        }
        return {k: min(share, 1.0) if measured[k] else share for k, share in self.usual.sustained.items()}

    def _host(self) -> float:
        launch = self.fitted.launch_s
        if launch is None:
            return self.usual.host if self.usual is not None else 1.0
        return min(max(launch / LAUNCH_S.get(self.cluster.device.host, LAUNCH_S["x86"]), 1.0 / MOST_FACTOR), MOST_FACTOR)
