"""What saves and restarts of a layout cost, from the bytes of a checkpoint and the rate of storage.

    written = bytes / min(storage, nodes * NICs of a node),   stall of an asynchronous save = bytes / (GPUs * PCIe)
    restart = detect + group + read + warm
Every rank writes its share of one copy (fully parallel saves). The fixed parts are measurements of 2023 cloud nodes and
defaults of PyTorch; they outweigh the bytes, so give your own. Units: seconds, bytes. Not valid where storage is shared with
other jobs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.layout import Layout
from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.checkpoint import SaveCost, Saving, best_saving, saving_at, write_s
from moeplan.planner.problem import Problem

DETECT_S = 15.0
"""Three keep-alives of 5 s, after which torchrun's rendezvous gives a node up (torch.distributed.elastic, defaults)."""
RENDEZVOUS_S = 6.6
"""Rendezvous of a restarted job (Parcae's artifact, liveput/cost.py, AWS p3.2xlarge)."""
GROUP_S = 0.5
"""Building one process group when nodes are added (same source; 0.04 to 0.12 s when nodes leave)."""
WARM_S = 30.0
"""Process start, allocation and first step: whole restarts take 29 to 43 s (same source), less rendezvous."""
STORAGE_BYTES_PER_S_PER_NODE = 1e9
"""Rate of storage for each node: 2 TB/s sustained for 16,384 GPUs (Llama 3, arXiv:2407.21783, section 3.3.1)."""
HOST_SHARE = 0.5
"""Share of host memory that a copy of a checkpoint may take; beyond that saves block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """What a change costs beside moving bytes, and what bytes move over."""

    detect_s: float = DETECT_S
    """Seconds until a failure is noticed."""
    group_s: float | None = None
    """Seconds to build the process groups; None: rendezvous and one group for each axis."""
    warm_s: float = WARM_S
    """Seconds until the first step is done at full speed."""
    storage_bytes_per_s: float = 0.0
    """Rate of storage for the whole job; 0: `STORAGE_BYTES_PER_S_PER_NODE` for each node."""
    live: bool = False
    """Processes outlive a change and send state over the fabric; else they restart from storage."""

    def __post_init__(self) -> None:
        for name, word in (("detect_s", "detection"), ("group_s", "process groups"), ("warm_s", "warm-up")):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ProblemError(f"{value:g} s of {word}", hint="give 0 or more seconds")
        if not 0.0 <= self.storage_bytes_per_s < math.inf:
            raise ProblemError(f"storage of {self.storage_bytes_per_s:g} bytes/s", hint="give a rate above 0, like 20GB")

    def grouping_s(self, layout: Layout) -> float:
        """Seconds to build the process groups of a layout."""
        if self.group_s is not None:
            return self.group_s
        axes = sum(bool(getattr(layout, name) > 1) for name in ("tp", "cp", "pp", "dp", "ep", "etp", "edp"))
        return RENDEZVOUS_S + GROUP_S * (axes + 1)

    def storage_s(self, problem: Problem) -> float:
        """Seconds to write a checkpoint, or to read it: all ranks share the work."""
        nodes = problem.profile.cluster.nodes
        rate = self.storage_bytes_per_s or STORAGE_BYTES_PER_S_PER_NODE * nodes
        return float(write_s(checkpoint_bytes(problem), rate, nodes, node_bytes_per_s(problem)))


def checkpoint_bytes(problem: Problem) -> float:
    """Bytes of a checkpoint: bf16 weights, fp32 master weights and two moments, once each."""
    count = parameter_count(problem.model)
    return (count.total + count.mtp) * (2.0 + 4.0 + 2.0 * problem.workload.moment_bytes)


def node_bytes_per_s(problem: Problem) -> float:
    """Rate of all NICs of a node."""
    cluster = problem.profile.cluster
    return cluster.scale_out.bytes_per_s * cluster.nics_per_node


def save_cost(
    problem: Problem,
    layout: Layout,
    step_s: float,
    overheads: Overheads,
    *,
    blocking: bool = False,
    node_share: float = 1.0,
) -> SaveCost:
    """What saves and restarts of a layout cost.

    An asynchronous save stalls for the copy to the host. With a local level (`node_share` below 1: the share of failures that
    take a node along) every rank keeps its own copy on its host as well.
    """
    cluster, whole = problem.profile.cluster, checkpoint_bytes(problem)
    room = HOST_SHARE * cluster.host_memory_bytes * cluster.nodes
    waits = blocking or bool(room and whole > room)
    written_s = overheads.storage_s(problem)
    copied_s = whole / cluster.gpus / cluster.pcie.bytes_per_s
    restart_s = overheads.detect_s + overheads.grouping_s(layout) + written_s + overheads.warm_s
    local = not waits and node_share < 1.0
    return SaveCost(
        step_s=step_s,
        stall_s=written_s if waits else copied_s,
        persist_s=0.0 if waits else copied_s + written_s,
        restart_s=restart_s,
        asynchronous=not waits,
        local_stall_s=copied_s if local else 0.0,
        local_persist_s=copied_s if local else 0.0,
        storage_share=node_share if local else 1.0,
    )


def advised_saving(
    problem: Problem,
    layout: Layout,
    step_s: float,
    availability: Availability,
    overheads: Overheads,
    *,
    interval_s: float = 0.0,
    blocking: bool = False,
    local: bool = False,
) -> Saving:
    """When to save so that most of the time is kept work; `interval_s` above 0 asks for that interval.

    `local`: with a level on the nodes, which failures of the job alone leave.
    """
    nodes = problem.profile.cluster.nodes
    failures = float(availability.failures_per_s(nodes))
    node_share = 1.0 - availability.job_rate / failures if local else 1.0
    cost = save_cost(problem, layout, step_s, overheads, blocking=blocking, node_share=node_share)
    if interval_s:
        return saving_at(cost, 1.0 / failures, max(1, round(interval_s / step_s)))
    return best_saving(cost, 1.0 / failures)
