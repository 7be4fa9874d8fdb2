"""Plan: a layout with its price, where the numbers came from, and what else was considered.

A plan file holds the question (model, cluster, workload), the answer (layout) and what was predicted when it was written.
Loading one gives question and layout; the price is computed anew, so that an edited file is priced as it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.counts import flops_per_token
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import chunk_letters
from moeplan.costmodels.uncertainty import interval
from moeplan.errors import LayoutError, SchemaError, nearest
from moeplan.planner import coverage
from moeplan.planner.baseline_data import Baseline, BaselineRow, baseline_data, read_baseline
from moeplan.planner.certificate import Certificate
from moeplan.planner.constraints import violations
from moeplan.planner.gradient_windows import gradient_windows
from moeplan.planner.measurement import Measurement
from moeplan.planner.plan_data import (
    cluster_data,
    layout_data,
    limits_data,
    located,
    model_data,
    profile_data,
    profile_remarks,
    read_cluster,
    read_imported,
    read_layout,
    read_limits,
    read_model,
    read_profile,
    read_workload,
    workload_data,
)
from moeplan.planner.problem import Problem
from moeplan.planner.schedules import layer_groups, with_schedule
from moeplan.records import check_schema, dump_yaml, from_mapping, load_yaml, save_text, to_mapping
from moeplan.units import GIB, MIB, TERA

SCHEMA = "moeplan.plan/1"
_KEYS = (
    "schema", "moeplan", "model", "cluster", "workload", "limits", "layout", "predicted", "certificate", "runners_up",
    "baselines", "measure", "provenance", "remarks",
)  # fmt: skip


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
class RunnerUp:
    """A plan that lost."""

    layout: Layout
    step_s: float
    peak_bytes: float
    sigma: float = 0.0
    """Standard deviation of the log of its step time over that of the plan; 0: not known."""
    tie: bool = False
    """Whether it differs from the plan by less than what is not known of the difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runner:
    """A runner-up in a plan file."""

    step_s: float
    peak_gib: float
    sigma: float = 0.0
    tie: bool = False
    layout: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rest:
    """What a plan file holds beside question, answer and prediction."""

    certificate: Certificate | None = None
    runners_up: tuple[_Runner, ...] = ()
    baselines: tuple[BaselineRow, ...] = ()
    measure: Measurement | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


_REST = ("certificate", "runners_up", "baselines", "measure", "provenance", "remarks")


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
    baselines: tuple[Baseline, ...] = ()
    measure: Measurement | None = None
    """What would tell the plan from the first runner-up that ties with it and that a microbenchmark could tell from it."""
    remarks: tuple[str, ...] = field(default=())
    imported: Mapping[str, Any] = field(default_factory=dict)
    """Of a launch script that the plan was read from: its file, environment, and the flags that no layout decides."""

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
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "moeplan": VERSION,
            "model": model_data(self.problem.model),
            "cluster": cluster_data(self.problem.profile.cluster),
            "workload": workload_data(self.problem.workload),
        }
        if limits := limits_data(self.problem):
            data["limits"] = limits
        data["layout"] = layout_data(self.layout)
        data["predicted"] = self._predicted()
        if self.certificate is not None:
            data["certificate"] = {
                **to_mapping(replace(self.certificate, rejected={})),
                "gap": round(self.certificate.gap, 6),
                "uneven_gap": round(self.certificate.uneven_gap, 6),
                "rejected": dict(sorted(self.certificate.rejected.items(), key=lambda kv: -kv[1])),
            }
        data["runners_up"] = [_runner_data(r) for r in self.runners_up]
        if self.baselines:
            data["baselines"] = [baseline_data(b) for b in self.baselines]
        if self.measure is not None:
            data["measure"] = to_mapping(self.measure)
        data["provenance"] = provenance(self.problem, self.layout)
        if self.imported:
            data["provenance"]["imported"] = dict(self.imported)
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
            "moe_layers": [
                {
                    "layers": g.layers,
                    "runs": g.runs,
                    "exposed_exchange_s": round(g.exposed_s, 7),
                    "plain_exchange_s": round(g.plain_s, 7),
                }
                for g in layer_groups(self.problem, self.layout)
            ],
            **self._gradients(),
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

    def _gradients(self) -> dict[str, Any]:
        """Where gradients travel, for a target that can be told."""
        found = gradient_windows(self.problem, self.layout, self.stage_s) if self.problem.target == "research" else None
        if found is None:
            return {}
        pieces = [
            {"layer": layer, "beside_dense_mib": round(dense / MIB, 3), "beside_moe_mib": round(moe / MIB, 3)}
            for layer, (dense, moe) in zip(found.layers, found.best.pieces_bytes, strict=True)
        ]
        times = {name: round(getattr(found, name), 6) for name in ("alone_s", "greedy_s", "exposed_s")}
        tail = round(found.best.tail_bytes / MIB, 3)
        return {"gradients": {"stage": found.stage, **times, "after_backward_mib": tail, "backward_order": pieces}}

    def text(self) -> str:
        """Text of the plan file."""
        return dump_yaml(self.to_data())

    def save(self, path: Path) -> None:
        """Write the plan file, whole or not at all."""
        save_text(path, self.text(), "plan file")


def _runner_data(r: RunnerUp) -> dict[str, Any]:
    row = _Runner(
        step_s=round(r.step_s, 5),
        peak_gib=round(r.peak_bytes / GIB, 2),
        sigma=round(r.sigma, 4),
        tie=r.tie,
        layout=layout_data(r.layout),
    )
    return to_mapping(row)


def _read_runner(r: _Runner, where: str, drift: Sequence[str]) -> RunnerUp:
    """The inverse; how far it is from the plan is forgotten where the plan is another one now."""
    layout, peak_bytes = read_layout(r.layout, where), r.peak_gib * GIB
    if drift:
        return RunnerUp(layout=layout, step_s=r.step_s, peak_bytes=peak_bytes)
    return RunnerUp(layout=layout, step_s=r.step_s, peak_bytes=peak_bytes, sigma=r.sigma, tie=r.tie)


def price_plan(problem: Problem, layout: Layout, *, remarks: Sequence[str] = (), **more: Any) -> Plan:
    """The plan of one layout, with every stage priced; `more` are further fields of the plan.

    A MoE schedule that is left open ("best") becomes the quickest one.
    """
    layout = with_schedule(problem, layout)
    one = Layouts.of([layout])
    parts = (problem.model, problem.profile, problem.workload, one)
    pricing = Pricing(*parts, every_rank=True, exact=True)
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
    beyond = coverage.beyond(problem, layout)
    low, high = interval(problem.model, problem.profile, problem.workload, time, coverage.kinds(beyond))
    return Plan(
        problem=problem,
        layout=layout,
        time=time,
        stages=stages,
        stage_s=tuple(float(s) for s in cost.stage_s[:, 0]),
        low_s=float(low),
        high_s=float(high),
        remarks=coverage.with_remark((*remarks, *profile_remarks(problem.profile)), problem, beyond),
        **more,
    )


def load_plan(path: Path) -> Plan:
    """The plan of a file, priced as the file stands; another schema version and unknown keys are refused."""
    where = f"plan file '{path}'"
    data = check_schema(load_yaml(path, "plan file"), SCHEMA, where, "plan", version=VERSION, remedy="solve it again")
    for key in data:
        if key not in _KEYS:
            close = nearest(str(key), _KEYS, 1)
            raise SchemaError(f"{where}: unknown key '{key}'", hint=f"did you mean '{close[0]}'?" if close else None)
    for key in ("model", "cluster", "workload", "layout"):
        if key not in data:
            raise SchemaError(f"{where}: missing key '{key}'")
    layout = read_layout(data["layout"], where)
    with located(where):
        problem = Problem(
            model=read_model(data["model"], where),
            profile=read_profile(data.get("provenance"), read_cluster(data["cluster"], where), path),
            workload=read_workload(data["workload"], where),
            extend_positions=True,
            **read_limits(data.get("limits"), where),
        )
        check_layout(problem, layout)
    rest = from_mapping(_Rest, {k: v for k, v in data.items() if k in _REST and v is not None}, where)
    drift = _drift(data.get("moeplan"), rest.provenance, problem, layout)
    return price_plan(
        problem,
        layout,
        certificate=None if drift else rest.certificate,
        runners_up=tuple(_read_runner(r, where, drift) for r in rest.runners_up),
        baselines=() if drift else tuple(read_baseline(b, where) for b in rest.baselines),
        measure=None if drift else rest.measure,
        remarks=tuple(dict.fromkeys((*rest.remarks, *drift))),
        imported=read_imported(rest.provenance.get("imported"), where),
    )


def check_layout(problem: Problem, layout: Layout) -> None:
    """Refuse a layout that breaks a rule of the framework, with all the rules that it breaks."""
    broken = violations(problem, layout)
    if broken:
        rules = "; ".join(f"{v.reason} (rule {v.rule})" for v in broken)
        raise LayoutError(rules, hint=next((v.hint for v in broken if v.hint), None))


def provenance(problem: Problem, layout: Layout) -> dict[str, Any]:
    """Where the numbers come from: versions, hashes of the inputs, origin of the curves."""
    profile = problem.profile
    scaled = sorted(name for name, origin in profile.origins.items() if not origin.measured)
    return {
        "model_source": problem.model.source,
        "model_sha256": _digest(dict(problem.model.config)),
        "cluster_sha256": _digest(cluster_data(profile.cluster)),
        "workload_sha256": _digest({**workload_data(problem.workload), **limits_data(problem)}),
        "layout_sha256": _digest(layout_data(layout)),
        **profile_data(profile),
        "curves_measured_on_this_device": f"{len(profile.origins) - len(scaled)} of {len(profile.origins)}",
        "curves_scaled_from_relatives": scaled,
    }


def _drift(version: Any, then: Mapping[str, Any], problem: Problem, layout: Layout) -> list[str]:
    """Remarks where version, inputs or layout are not those of the search behind the file, whose certificate then is void."""
    out = []
    if version not in (None, VERSION):
        out.append(f"written by moeplan {version}, priced by {VERSION}")
    if then.get("model_sha256") not in (None, _digest(dict(problem.model.config))):
        out.append(f"the configuration of {problem.model.name} is not the one that the plan was made for")
    now = provenance(problem, layout)
    for what in ("cluster", "workload", "layout"):
        if then.get(f"{what}_sha256") not in (None, now[f"{what}_sha256"]):
            out.append(f"the {what} was changed by hand, so no search stands behind the plan")
    return out


def _digest(data: Any) -> str:
    plain = json.loads(json.dumps(data, default=str, skipkeys=True))  # keys become text, which has an order
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
