"""What the tests of launchers share: jobs, one row a launcher, and exports of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from moeplan.exporters import write
from moeplan.exporters.base import Job
from moeplan.exporters.launchers.launchers import launcher
from moeplan.exporters.megatron import MEGATRON_CORE, Megatron
from moeplan.planner.plan import Plan, price_plan
from tests.exporters.cases import layout_of, problem_of, small_models

SETTINGS: dict[str, dict[str, str]] = {  # launcher, what it must be told; every launcher has a row
    "torchrun": {},
    "rendezvous": {},
    "slurm": {},
    "trainjob": {"image": "registry.example/megatron:0.19", "MEGATRON_LM": "/opt/megatron"},
    "pytorchjob": {"image": "registry.example/megatron:0.19", "MEGATRON_LM": "/opt/megatron"},
    "job": {"image": "registry.example/megatron:0.19", "MEGATRON_LM": "/opt/megatron"},
    "skypilot": {"MEGATRON_LM": "/opt/megatron"},
    "ray": {"MEGATRON_LM": "/opt/megatron"},
}
MORE: dict[str, dict[str, str]] = {  # options beside
    "torchrun": {"port": "6000"},
    "slurm": {"time": "2-00:00:00", "partition": "gpu", "account": "my-team"},
    "trainjob": {"namespace": "team", "claim": "data", "rdma": "rdma/hca_shared", "runtime": "torch-cuda"},
    "pytorchjob": {"namespace": "team", "claim": "data", "mount": "/data", "rdma": "rdma/hca_shared"},
    "job": {"namespace": "team", "claim": "data", "rdma": "rdma/hca_shared"},
    "skypilot": {"accelerator": "H100-SXM", "image": "registry.example/megatron:0.19"},
}
SIZES: dict[str, tuple[int, int]] = {
    "h100x32": (4, 8),
    "h100x8": (1, 8),
    "gb200x8": (2, 4),
    "mi300xx16": (2, 8),
    "h100x2": (1, 2),
}


@functools.cache
def plan_on(cluster: str) -> Plan:
    problem = problem_of(small_models()["dense"], cluster, 512, 2048)
    return price_plan(problem, layout_of(problem.model, problem.profile.cluster.gpus, tp=2))


def job_on(cluster: str) -> Job:
    return Megatron().job(plan_on(cluster), MEGATRON_CORE)


def texts_of(name: str, cluster: str = "h100x32", settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """The files of an export for one launcher."""
    return write.compose(plan_on(cluster), Megatron(), MEGATRON_CORE, [name], SETTINGS[name] | dict(settings or {}))


def text_of(name: str, cluster: str = "h100x32", settings: Mapping[str, str] | None = None) -> str:
    """The file of one launcher."""
    return texts_of(name, cluster, settings)[launcher(name).file]


def replaced(text: str, changes: Mapping[str, Any]) -> str:
    """A text with parts of it replaced, each of which must be there."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, str(new))
    return text
