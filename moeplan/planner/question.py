"""Question: what `moeplan solve` is asked, in the words of its options, and the problem that it states.

The command line and sweep files state questions: names, files and sizes as a user writes them ("h100x256", "70GiB") become
model, profile, workload and limits. A field is called as the option, with "_" for "-". What goes together is checked by
`Problem`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.workload import Era, Workload, load_era, load_precision
from moeplan.errors import UsageError
from moeplan.planner.problem import Problem, parse_condition
from moeplan.profiles.hardware import Device, load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from moeplan.profiles.profile_file import load_profile, on_cluster
from moeplan.units import format_bytes, parse_bytes

_WIDTHS = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question as a user states it; the machine is a cluster, a profile, or a device with a count of GPUs."""

    model: str
    """Catalog name, config.json or a directory that holds one."""
    cluster: str = ""
    """Shorthand (h100x256), catalog name or a YAML file; beside a profile only its count of GPUs counts."""
    profile: str = ""
    """File of a profile."""
    device: str = ""
    """Device of the catalog, in its usual hosts."""
    gpus: int = 0
    """GPUs of the device, or to which cluster or profile are cut or extended; 0: as these say."""
    global_batch: int
    seq_len: int
    precision: str = "bf16"
    era: str = "latest"
    gradients: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "bf16"] = "fp32"
    imbalance: float = 1.0
    """See `Workload.imbalance`."""
    no_mtp: bool = False
    """Train without the model's multi-token-prediction layers."""
    memory_limit: str | None = None
    """Device memory that a plan may use, like "70GiB"; None: all of it."""
    target: Literal["megatron", "research"] = "megatron"
    """See `Problem.target`."""
    price_per_gpu_hour: float = 0.0
    """0: that of the cluster's file, if any."""
    pin: tuple[str, ...] = ()
    """Conditions that every layout meets."""
    forbid: tuple[str, ...] = ()
    """Conditions that none meets."""

    def __post_init__(self) -> None:
        if not 0 <= self.gpus <= 10**9:
            raise UsageError(f"gpus={self.gpus} is not a count of GPUs")
        if self.device and (self.cluster or self.profile):
            raise UsageError(f"device '{self.device}' beside a cluster or profile", hint="a device goes with gpus alone")
        if self.device and not self.gpus:
            raise UsageError(f"device '{self.device}' without gpus", hint="say how many, like gpus: 64")
        if not (self.device or self.cluster or self.profile):
            raise UsageError("no machine", hint="give a device and gpus, a cluster, or a profile")


def problem_of(question: Question, say: Callable[[str], None]) -> Problem:
    """The problem that a question states; `say` gets remarks."""
    q = question
    if not 0 <= q.price_per_gpu_hour < math.inf:
        raise UsageError(f"--price-per-gpu-hour {q.price_per_gpu_hour:g}: a price of 0 or more is needed")
    model, profile = load_model(q.model), machine_of(q)
    if q.no_mtp:
        if not model.mtp:
            say(f"{model.name} has no prediction layers; --no-mtp changes nothing")
        model = dataclasses.replace(model, mtp=())
    if q.price_per_gpu_hour:
        cluster = dataclasses.replace(profile.cluster, price_per_gpu_hour=q.price_per_gpu_hour)
        profile = dataclasses.replace(profile, cluster=cluster)
    for text in model.remarks:
        say(text)
    return Problem(
        model=model,
        profile=profile,
        workload=_workload(q, model),
        pins=tuple(parse_condition(p) for p in q.pin),
        forbidden=tuple(parse_condition(p) for p in q.forbid),
        memory_limit_bytes=_limit_bytes(q.memory_limit, profile.cluster.device, say),
        target=q.target,
    )


def machine_of(question: Question) -> Profile:
    """Profile of the machine that a question names, at its count of GPUs."""
    if question.device:
        return nominal(load_cluster(f"{question.device}x{question.gpus}"))
    profile = load_machine(question.cluster, question.profile)
    return profile.resized(question.gpus) if question.gpus else profile


def load_machine(cluster: str, profile: str) -> Profile:
    """The profile of a file, at the count of GPUs of the cluster if there is one too; without a file the nominal profile."""
    if not profile:
        return nominal(load_cluster(cluster))
    measured = load_profile(Path(profile))
    return on_cluster(measured, load_cluster(cluster)) if cluster else measured


def load_software(name: str) -> Era:
    """The era of a name, if plans can be made for it."""
    software = load_era(name)
    if software.framework != "megatron":
        raise UsageError(f"--era {name}: {software.source} serves to price tables of runs, plans are for Megatron")
    return software


def _workload(q: Question, model: Model) -> Workload:
    if q.imbalance != 1.0 and model.moe is None:
        raise UsageError(f"--imbalance {q.imbalance:g}: {model.name} has no experts to load unevenly")
    return Workload(
        seq_len=q.seq_len,
        global_batch=q.global_batch,
        precision=load_precision(q.precision),
        era=load_software(q.era),
        gradient_bytes=_WIDTHS[q.gradients],
        moment_bytes=_WIDTHS[q.moments],
        imbalance=q.imbalance,
    )


def _limit_bytes(text: str | None, device: Device, say: Callable[[str], None]) -> float:
    """Bytes of a memory limit; 0 where the device itself is the limit."""
    if text is None:
        return 0.0
    limit = parse_bytes(text)
    if limit <= 0:
        raise UsageError(f"--memory-limit {text} leaves no memory", hint="write it like 70GiB")
    if limit < device.memory_bytes:
        return limit
    if limit > device.memory_bytes:
        say(f"--memory-limit {text} is more than the {format_bytes(device.memory_bytes)} of a {device.name}, which counts")
    return 0.0
