"""elastic.json: the plan of every node count for programs, first of all for the entry script.

Schema `moeplan.elastic/1`: what runs on each count (layout, arguments, predicted step, share of the time), what moves between
counts cost, how checkpoints are written, and which files belong to the export. Units: seconds, bytes, steps, samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.layout import DEGREES
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import SchemaError
from moeplan.exporters.base import Job
from moeplan.exporters.elastic.arguments import arguments_file
from moeplan.exporters.preflight import expectations
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan
from moeplan.planner.plan_data import layout_data
from moeplan.records import check_schema, read_text

SCHEMA = "moeplan.elastic/1"
ELASTIC = "elastic.json"
"""Name of the file; a directory that holds one with `SCHEMA` is an export of an elastic plan."""


def elastic_data(
    elastic: ElasticPlan, jobs: Sequence[Job], settings: Mapping[str, str], version: str, files: Sequence[str]
) -> dict[str, Any]:
    """The contents of elastic.json; `jobs`: the job of every count."""
    largest, job = elastic.counts[-1], jobs[-1]
    batches = {count.plan.problem.workload.global_batch for count in elastic.counts}
    return {
        "schema": SCHEMA,
        "moeplan": VERSION,
        "framework": f"Megatron-LM {version}",
        "consistency": elastic.consistency,
        "hazards": [hazard.name for hazard in elastic.hazards],
        **({"global_batch": batches.pop()} if len(batches) == 1 else {}),
        "gpus_per_node": job.per_node,
        "surplus": settings["surplus"],
        "counts": [_count(count, one) for count, one in zip(elastic.counts, jobs, strict=True)],
        "transitions": [
            {
                "from": move.before,
                "to": move.after,
                "kind": move.kind,
                "moved_bytes": round(move.moved_bytes),
                "lost_bytes": round(move.lost_bytes),
                "rollback": move.rollback,
                "seconds": {name: round(float(seconds), 3) for name, seconds in move.seconds.items()},
            }
            for move in elastic.transitions
        ],
        "checkpoint": {
            "format": "torch_dist",
            "reshardable_optimizer": elastic.reshardable,
            "async": all(count.saving.asynchronous for count in elastic.counts),
            "local": elastic.local_saves,
        },
        "availability": dataclasses.asdict(elastic.availability),
        "goodput": {
            "samples_per_s": round(elastic.goodput, 5),
            "best_single_layout_samples_per_s": round(elastic.best_single, 5),
        },
        "steps_up": [one.data() for one in elastic.steps_up],
        "policy": list(elastic.policy),
        "expects": expectations(largest.plan, job.requirements),
        "files": sorted(files),
    }


def elastic_text(data: dict[str, Any]) -> str:
    """elastic.json as text."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load_elastic(path: Path) -> dict[str, Any]:
    """The contents of an elastic.json."""
    where = f"elastic plan '{path}'"
    try:
        data = json.loads(read_text(path, "elastic plan"))
    except ValueError as error:
        raise SchemaError(f"{where}: not JSON: {error}") from None
    return dict(check_schema(data, SCHEMA, where, "elastic plan", version=VERSION, remedy="write the elastic plan again"))


def _count(count: CountPlan, job: Job) -> dict[str, Any]:
    x, problem, saving = count.plan.layout, count.plan.problem, count.saving
    chunks = chunk_letters(problem.model, x.pp, x.vpp, x.stages)
    return {
        "nodes": count.nodes,
        "uses": count.uses,
        "pi": round(count.share, 6),
        "layout": {
            **{name: getattr(x, name) for name in (*DEGREES, "micro_batch")},
            "stages": [sum(chunk.count("t") for chunk in chunks[rank :: x.pp]) for rank in range(x.pp)],
            "opt_instances": count.instances,
        },
        "fields": layout_data(x),
        "global_batch": problem.workload.global_batch,
        "arguments": arguments_file(count),
        "args": job.arguments,
        "environment": dict(job.environment),
        "step_s": round(count.plan.step_s, 5),
        "ckpt_interval_steps": saving.interval_steps,
        "ckpt_local_interval_steps": saving.local_interval_steps,
        "ckpt_stall_s": round(saving.stall_s, 3),
        "ckpt_persist_s": round(saving.persist_s, 3),
        "efficiency": round(saving.efficiency, 6),
    }
