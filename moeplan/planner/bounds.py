"""A lower bound on the step time of all layouts with given degrees.

The slowest pipeline rank does at least the mean share of the work, whatever the split: m micro-batches x (all layers, head and
prediction layers) / pp. Per sample that work depends on tp, cp, ep, etp, the micro-batch and the features; its least value over
micro-batches, dispatchers and overlaps, without recompute, bounds every layout of the group. The part
of gradient reduction that no overlap hides, the optimizer and the fixed overhead come on top. Tests hold it below every price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.constants import STEP
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import StageParameters, mean_parameters
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.step import data_parallel_exposed_s, data_parallel_times, dense_group, expert_group
from moeplan.planner import space
from moeplan.planner.problem import Problem

LONG_S = 1e9
"""A micro-batch that hides all that can be hidden."""
WORK_FIELDS = ("tp", "cp", "ep", "etp", "sequence_parallel", "cuda_graphs")
"""What the work for a sample depends on, beside micro-batch and features."""
ONCE_FIELDS = ("tp", "cp", "pp", "dp", "ep", "etp", "edp", "sharding", "dp_overlap", "optimizer_offload")
"""What is done once a step depends on."""


def least_step_seconds(problem: Problem, groups: Layouts, micro_batches: Sequence[int] | None = None) -> Any:
    """Seconds that no layout with the degrees of a group can beat, [n].

    `micro_batches`: those to choose from; None: each group's own.
    """
    if not len(groups):
        return np.zeros(0)
    model, profile, workload = problem.model, problem.profile, problem.workload
    keys, of_row = groups.distinct(*WORK_FIELDS, *(() if micro_batches else ("micro_batch",)))
    rows = space.cross(keys, {"micro_batch": micro_batches}) if micro_batches else keys
    rows = space.with_shared_overlap(problem, space.cross(rows, space.feature_options(problem)))
    whole = Pricing(model, profile, workload, rows).whole_micro_batch_s()
    per_sample: Any = np.asarray(whole / rows.micro_batch).reshape(len(keys), -1).min(axis=1)
    work = workload.global_batch / groups.dp * per_sample[of_row] / groups.pp
    degrees, of_row = groups.distinct(*ONCE_FIELDS)
    return work + STEP.overhead_s + once(problem, degrees, mean_parameters(model, degrees)).seconds(slice(None))[of_row]


@dataclass(frozen=True, slots=True)
class Once:
    """What layouts do once a step, whatever their split of layers; arrays are [n]."""

    optimizer_s: Any
    scatter_s: Any
    """Reduction of all gradients, 0 where every micro-batch does its own."""
    gather_s: Any
    overlap: Any
    """Whether both run beside compute."""
    exposed: float
    """Factor on what stays visible of both."""

    def seconds(self, layouts: Any, micro_batch_s: Any = LONG_S) -> Any:
        """Seconds at some layouts if the slowest rank takes so long for a micro-batch, in the shape of the two together."""
        return self.optimizer_s[layouts] + self.exposed * data_parallel_exposed_s(
            self.scatter_s[layouts], self.gather_s[layouts], micro_batch_s, 1.0,
            overlap=self.overlap[layouts], every_batch=False, hidden_compute=0.0,
        )  # fmt: skip


def once(problem: Problem, rows: Layouts, held: StageParameters) -> Once:
    """What layouts do once a step, if a rank holds these parameters."""
    profile, workload = problem.profile, problem.workload
    dense = data_parallel_times(profile, workload, rows, held.dense, dense_group(profile, rows))
    expert = data_parallel_times(profile, workload, rows, held.expert, expert_group(profile, rows))
    sharded = rows.shards_as("fsdp")
    return Once(
        optimizer_s=dense.optimizer + expert.optimizer,
        scatter_s=np.where(sharded, 0.0, dense.scatter + expert.scatter),
        gather_s=np.where(sharded, 0.0, dense.gather + expert.gather),
        overlap=rows.dp_overlap,
        exposed=profile.exposed,
    )
