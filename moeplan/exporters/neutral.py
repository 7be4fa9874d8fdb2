"""The framework-neutral form of a plan: `plan.json`, which every export holds and `--to plan-json` consists of.

It says question and answer in full (model, cluster, workload, layout and what each pipeline rank holds), what was predicted,
what the nodes must be like (`expects`, read by the preflight check), and which files belong to the export. docs/export.md
describes every key; a change of their meaning changes the schema.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import MoeplanError, SchemaError
from moeplan.exporters.base import Exporter, Job, Reading, node_size
from moeplan.exporters.flag_facts import check_version
from moeplan.exporters.preflight import expectations
from moeplan.planner.plan import Plan, check_layout
from moeplan.planner.plan_data import (
    cluster_data,
    layout_data,
    limits_data,
    model_data,
    read_cluster,
    read_layout,
    read_model,
    read_workload,
    workload_data,
)
from moeplan.records import check_schema, from_mapping, read_text

SCHEMA = "moeplan.export/1"
PLAN = "plan.json"
"""Name of the file; a directory that holds one with `SCHEMA` is an export."""


def plan_data(plan: Plan, target: str, version: str, job: Job | None, files: Sequence[str]) -> dict[str, Any]:
    """The contents of `plan.json`."""
    problem, x = plan.problem, plan.layout
    counts = parameter_count(problem.model)
    chunks = chunk_letters(problem.model, x.pp, x.vpp, x.stages)
    nodes, each = node_size(plan)
    return {
        "schema": SCHEMA,
        "moeplan": VERSION,
        "target": target,
        "framework_version": version,
        "gpus": x.world,
        "nodes": nodes,
        "gpus_per_node": each,
        "model": model_data(problem.model),
        "counts": {
            "layers": len(problem.model.layers),
            "prediction_layers": len(problem.model.mtp),
            "hidden": problem.model.hidden,
            "parameters": counts.total,
            "active_parameters": round(counts.active),
        },
        "cluster": cluster_data(problem.profile.cluster),
        "workload": workload_data(problem.workload),
        **({"limits": limits} if (limits := limits_data(problem)) else {}),
        "layout": layout_data(x),
        "stages": [
            {"rank": rank, "chunks": list(chunks[rank :: x.pp]), "layers": sum(c.count("t") for c in chunks[rank :: x.pp])}
            for rank in range(x.pp)
        ],
        "predicted": _predicted(plan),
        "environment": dict(job.environment) if job else {},
        "expects": expectations(plan, job.requirements if job else ()),
        "files": sorted(files),
        "remarks": list(plan.remarks),
    }


def _predicted(plan: Plan) -> dict[str, Any]:
    return {
        "step_s": round(plan.step_s, 5),
        "step_low_s": round(plan.low_s, 5),
        "step_high_s": round(plan.high_s, 5),
        "tokens_per_s_per_gpu": round(plan.tokens_per_s_per_gpu, 2),
        "peak_bytes": [round(float(s.parts.total)) for s in plan.stages],
    }


def plan_text(data: dict[str, Any]) -> str:
    """`plan.json` as text."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def load_export(path: Path) -> dict[str, Any]:
    """The contents of a `plan.json`."""
    where = f"plan file '{path}'"
    try:
        data = json.loads(read_text(path, "plan file"))
    except ValueError as error:
        raise SchemaError(f"{where}: not JSON: {error}") from None
    return dict(check_schema(data, SCHEMA, where, "export", version=VERSION, remedy="export the plan again"))


def export_of(path: Path) -> Path:
    """The export that a file belongs to; scripts and argument files, and files of no export, stand for themselves."""
    if path.suffix in (".sh", ".args") or not (path.parent / PLAN).is_file():
        return path
    try:
        return path.parent if path.name in load_export(path.parent / PLAN).get("files", ()) else path
    except MoeplanError:
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """The counts of a `plan.json` that must agree with its layout and cluster."""

    gpus: int
    nodes: int
    gpus_per_node: int


def read_plan(path: Path) -> Reading:
    """What a `plan.json` says; refuses one that contradicts itself, naming the identity that is broken."""
    where = f"plan file '{path}'"
    data = load_export(path)
    for key in ("model", "cluster", "workload", "layout"):
        if key not in data:
            raise SchemaError(f"{where}: missing key '{key}'")
    sizes = from_mapping(_Sizes, {f.name: data[f.name] for f in dataclasses.fields(_Sizes) if f.name in data}, where)
    layout, cluster = read_layout(data["layout"], where), read_cluster(data["cluster"], where)
    product = sizes.nodes * sizes.gpus_per_node
    for what, count in (
        (f"nodes*gpus_per_node = {sizes.nodes}*{sizes.gpus_per_node} = {product}", product),
        (f"tp*cp*dp*pp = {layout.tp}*{layout.cp}*{layout.dp}*{layout.pp} = {layout.world}", layout.world),
        (f"the cluster has {cluster.gpus} GPUs", cluster.gpus),
    ):
        if count != sizes.gpus:
            raise SchemaError(f"{where}: {what}, but gpus is {sizes.gpus}")
    return Reading(
        model=read_model(data["model"], where),
        workload=read_workload(data["workload"], where),
        layout=layout,
        world=sizes.gpus,
    )


class Neutral(Exporter):
    """No framework: `plan.json` alone, for programs that start training in their own way."""

    name = "plan-json"
    title = "plan.json"
    versions = ()
    version = ""

    def check(self, plan: Plan, version: str) -> None:
        """Refuse a layout that breaks a rule of the plan's target, and a version."""
        if version:
            check_version(self.title, version, self.versions)
        check_layout(plan.problem, plan.layout)

    def job(self, plan: Plan, version: str) -> None:
        """Nothing is run."""
        return None

    def files(self, plan: Plan, version: str) -> dict[str, str]:
        """None beside `plan.json`."""
        return {}

    def notes(self, plan: Plan, version: str) -> list[str]:
        """What reads it must do the rest."""
        return ["`plan.json` says what to run, not how: whatever reads it makes the arguments of its framework."]

    def read(self, directory: Path) -> Reading:
        """What `plan.json` says."""
        return read_plan(directory / PLAN)
