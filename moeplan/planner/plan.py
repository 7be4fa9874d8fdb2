"""Plan: a layout with its price, where the numbers came from, and what else was considered.

A plan file holds the question (model, cluster, workload), the answer (layout) and what was predicted when it was written.
Loading one gives question and layout; the price is computed anew, so that an edited file is priced as it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.counts import flops_per_token
from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.layout import DEGREES, Layout, Layouts
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import chunk_letters
from moeplan.costmodels.uncertainty import interval
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.errors import MoeplanError, SchemaError, nearest
from moeplan.planner.problem import Problem
from moeplan.profiles.hardware import Cluster, load_cluster
from moeplan.profiles.profile import nominal
from moeplan.records import dump_yaml, from_mapping, load_yaml, save_text, to_mapping
from moeplan.units import GIB, TERA

SCHEMA = "moeplan.plan/1"
_KEYS = (
    "schema",
    "moeplan",
    "model",
    "cluster",
    "workload",
    "layout",
    "predicted",
    "certificate",
    "runners_up",
    "provenance",
    "remarks",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Peak memory of one pipeline stage."""

    rank: int
    """Pipeline rank."""
    chunks: tuple[str, ...]
    """Its chunks in layout letters."""
    parts: Breakdown
    """Allocated bytes by part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What stands behind the claim that a plan is the best."""

    status: str
    """"optimal": every layout of the space was priced, or refused by a named reason, or bounded away."""
    considered: int
    priced: int
    rejected: Mapping[str, int]
    """Layouts passed over by reason: rules of the framework, memory, slower by bound, excluded by the user."""
    gap: float = 0.0
    """Share by which an unpriced layout might still be faster."""
    seconds: float = 0.0
    """Time the search took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerUp:
    """A plan that lost."""

    layout: Layout
    step_s: float
    peak_bytes: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A priced layout of a problem."""

    problem: Problem
    layout: Layout
    time: Breakdown
    """Seconds of a step by part."""
    stages: tuple[StageMemory, ...]
    """Peak memory of every pipeline stage."""
    stage_s: tuple[float, ...]
    """Seconds of one micro-batch on every pipeline stage, forward and backward."""
    low_s: float
    high_s: float
    """Interval meant to hold the measured step time in 80 % of cases."""
    certificate: Certificate | None = None
    runners_up: tuple[RunnerUp, ...] = ()
    remarks: tuple[str, ...] = field(default=())

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step."""
        return float(self.time.total)

    @property
    def peak_bytes(self) -> float:
        """Peak allocation on the fullest stage."""
        return max(float(s.parts.total) for s in self.stages)

    @property
    def fullest(self) -> StageMemory:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda s: float(s.parts.total))

    @property
    def excess_bytes(self) -> float:
        """How far the fullest stage exceeds the device, reserve included; negative: it fits."""
        return float(self.problem.excess_bytes(self.peak_bytes))

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Training throughput of one GPU."""
        return self.problem.workload.tokens / self.step_s / self.layout.world

    @property
    def model_flops_per_s(self) -> float:
        """Useful FLOP/s of one GPU: causal attention halved, recompute not counted."""
        per_token = flops_per_token(self.problem.model, self.problem.workload.seq_len)
        return per_token * self.tokens_per_s_per_gpu

    @property
    def mfu(self) -> float:
        """Useful FLOP/s over the dense bf16 peak, whatever the precision."""
        return self.model_flops_per_s / self.problem.profile.cluster.device.peak_flop_per_s["bf16"]

    def to_data(self) -> dict[str, Any]:
        """The plan as plain data: what a plan file holds."""
        workload = self.problem.workload
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "moeplan": VERSION,
            "model": _model_data(self.problem.model),
            "cluster": cluster_data(self.problem.profile.cluster),
            "workload": _workload_data(workload),
            "layout": _layout_data(self.layout),
            "predicted": self._predicted(),
        }
        if self.certificate is not None:
            data["certificate"] = {
                **to_mapping(replace(self.certificate, rejected={})),
                "gap": self.certificate.gap,
                "rejected": dict(sorted(self.certificate.rejected.items(), key=lambda kv: -kv[1])),
            }
        data["runners_up"] = [
            {"step_s": round(r.step_s, 5), "peak_gib": round(r.peak_bytes / GIB, 2), "layout": _layout_data(r.layout)}
            for r in self.runners_up
        ]
        data["provenance"] = provenance(self.problem)
        if self.remarks:
            data["remarks"] = list(self.remarks)
        return data

    def _predicted(self) -> dict[str, Any]:
        return {
            "step_s": round(self.step_s, 5),
            "step_low_s": round(self.low_s, 5),
            "step_high_s": round(self.high_s, 5),
            "tokens_per_s_per_gpu": round(self.tokens_per_s_per_gpu, 2),
            "model_tflops_per_gpu": round(self.model_flops_per_s / TERA, 2),
            "mfu_of_bf16_peak": round(self.mfu, 4),
            "peak_gib": round(self.peak_bytes / GIB, 3),
            "device_gib": round(self.problem.device_bytes / GIB, 3),
            "time_s": {name: round(float(value), 6) for name, value in self.time if float(value)},
            "stages": [
                {
                    "rank": s.rank,
                    "chunks": "|".join(s.chunks),
                    "micro_batch_s": round(seconds, 6),
                    "peak_gib": round(float(s.parts.total) / GIB, 3),
                    "memory_gib": {name: round(float(value) / GIB, 3) for name, value in s.parts if float(value)},
                }
                for s, seconds in zip(self.stages, self.stage_s, strict=True)
            ],
        }

    def text(self) -> str:
        """Text of the plan file."""
        return dump_yaml(self.to_data())

    def save(self, path: Path) -> None:
        """Write the plan file, whole or not at all."""
        save_text(path, self.text(), "plan file")


def price_plan(problem: Problem, layout: Layout, **more: Any) -> Plan:
    """The plan of one layout, with every stage priced; `more` are further fields of the plan."""
    one = Layouts.of([layout])
    parts = (problem.model, problem.profile, problem.workload, one)
    pricing = Pricing(*parts, every_rank=True)
    cost, memory = pricing.step_cost(), pricing.peak_memory()
    chunks = chunk_letters(problem.model, layout.pp, layout.vpp, layout.stages)
    stages = tuple(
        StageMemory(
            rank=rank,
            chunks=chunks[rank :: layout.pp],
            parts=Breakdown(unit="bytes", parts={name: float(value[rank][0]) for name, value in memory}),
        )
        for rank in range(layout.pp)
    )
    time = cost.time.at(0)
    low, high = interval(problem.model, problem.profile, float(time.total))
    return Plan(
        problem=problem,
        layout=layout,
        time=time,
        stages=stages,
        stage_s=tuple(float(s) for s in cost.stage_s[:, 0]),
        low_s=float(low),
        high_s=float(high),
        **more,
    )


def load_plan(path: Path) -> Plan:
    """The plan of a file, priced as the file stands; another schema version and unknown keys are refused."""
    where = f"plan file '{path}'"
    data = load_yaml(path, "plan file")
    if not isinstance(data, Mapping) or "schema" not in data:
        raise SchemaError(f"{where} is not a plan: it has no 'schema'", hint=f"plans begin with 'schema: {SCHEMA}'")
    if data["schema"] != SCHEMA:
        raise SchemaError(
            f"{where} has schema '{data['schema']}', this moeplan {VERSION} reads '{SCHEMA}'", hint="solve it again"
        )
    for key in data:
        if key not in _KEYS:
            close = nearest(str(key), _KEYS, 1)
            raise SchemaError(f"{where}: unknown key '{key}'", hint=f"did you mean '{close[0]}'?" if close else None)
    for key in ("model", "cluster", "workload", "layout"):
        if key not in data:
            raise SchemaError(f"{where}: missing key '{key}'")
    workload = _read_workload(data["workload"], where)
    layout = _read_layout(data["layout"], where)
    model = _read_model(data["model"], where)
    cluster = read_cluster(data["cluster"], where)
    problem = Problem(model=model, profile=nominal(cluster), workload=workload, extend_positions=True)
    runners = tuple(_read_runner(r, where) for r in data.get("runners_up") or [])
    certificate = data.get("certificate")
    return price_plan(
        problem,
        layout,
        certificate=None if certificate is None else from_mapping(Certificate, certificate, f"{where}, certificate"),
        runners_up=runners,
        remarks=(*(data.get("remarks") or ()), *_drift(data, problem)),
    )


def provenance(problem: Problem) -> dict[str, Any]:
    """Where the numbers come from: versions, hashes of the inputs, origin of the curves."""
    profile = problem.profile
    scaled = sorted(name for name, origin in profile.origins.items() if not origin.measured)
    return {
        "model_source": problem.model.source,
        "model_sha256": _digest(dict(problem.model.config)),
        "cluster_sha256": _digest(cluster_data(profile.cluster)),
        "profile": profile.name,
        "curves_measured_on_this_device": f"{len(profile.origins) - len(scaled)} of {len(profile.origins)}",
        "curves_scaled_from_relatives": scaled,
    }


def _drift(data: Mapping[str, Any], problem: Problem) -> list[str]:
    """Remarks where the inputs or the version are no longer those of the file."""
    out = []
    then = data.get("provenance") or {}
    if data.get("moeplan") not in (None, VERSION):
        out.append(f"written by moeplan {data['moeplan']}, priced by {VERSION}")
    if then.get("model_sha256") not in (None, _digest(dict(problem.model.config))):
        out.append(f"the configuration of {problem.model.name} is not the one that the plan was made for")
    return out


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _model_data(model: Model) -> Any:
    try:
        if load_model(model.name) == model:
            return model.name
    except MoeplanError:
        pass
    return {"name": model.name, "source": model.source, "config": json.loads(json.dumps(dict(model.config), default=str))}


def _read_model(data: Any, where: str) -> Model:
    if isinstance(data, str):
        return load_model(data)
    if not isinstance(data, Mapping) or "config" not in data:
        raise SchemaError(f"{where}, key 'model': expected a catalog name, or a mapping with name and config")
    return read_config(data["config"], name=str(data.get("name", "model")), source=str(data.get("source", "")))


def cluster_data(cluster: Cluster) -> Any:
    """A cluster as plain data: its shorthand or catalog name where that says it all, else every field."""
    try:
        if load_cluster(cluster.name) == cluster:
            return cluster.name
    except MoeplanError:
        pass
    return to_mapping(cluster)


def read_cluster(data: Any, where: str) -> Cluster:
    """The inverse of `cluster_data`."""
    return load_cluster(data) if isinstance(data, str) else from_mapping(Cluster, data, f"{where}, key 'cluster'")


def _workload_data(workload: Workload) -> dict[str, Any]:
    return {**to_mapping(workload), "precision": workload.precision.name, "era": workload.era.name}


def _read_workload(data: Any, where: str) -> Workload:
    if not isinstance(data, Mapping):
        raise SchemaError(f"{where}, key 'workload': expected a mapping")
    values = dict(data)
    for name in ("precision", "era"):
        if name not in values:
            raise SchemaError(f"{where}, key 'workload': missing key '{name}'")
    values["precision"] = to_mapping(load_precision(str(values["precision"])))
    values["era"] = to_mapping(load_era(str(values["era"])))
    return from_mapping(Workload, values, f"{where}, key 'workload'")


def _layout_data(layout: Layout) -> dict[str, Any]:
    """A layout with every degree written out, also those of 1."""
    degrees = {name: getattr(layout, name) for name in (*DEGREES, "micro_batch")}
    return {"world": layout.world, **degrees, **{k: v for k, v in to_mapping(layout).items() if k not in degrees}}


def _read_layout(data: Any, where: str) -> Layout:
    if not isinstance(data, Mapping):
        raise SchemaError(f"{where}, key 'layout': expected a mapping")
    values = {k: v for k, v in data.items() if k != "world"}
    layout = from_mapping(Layout, values, f"{where}, key 'layout'")
    if data.get("world") not in (None, layout.world):
        raise SchemaError(
            f"{where}: layout has world {data['world']}, but tp*cp*dp*pp = "
            f"{layout.tp}*{layout.cp}*{layout.dp}*{layout.pp} = {layout.world}"
        )
    return layout


def _read_runner(data: Any, where: str) -> RunnerUp:
    if not isinstance(data, Mapping) or not {"layout", "step_s", "peak_gib"} <= set(data):
        raise SchemaError(f"{where}, key 'runners_up': expected mappings with step_s, peak_gib and layout")
    return RunnerUp(
        layout=_read_layout(data["layout"], where), step_s=float(data["step_s"]), peak_bytes=float(data["peak_gib"]) * GIB
    )
