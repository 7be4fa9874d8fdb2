"""A lower bound on the step time of all layouts with given degrees.

The slowest pipeline rank does at least the mean share of the work, whatever the split: m micro-batches x (all layers, head and
prediction layers) / pp. Per sample that work depends on tp, cp, ep, etp, the micro-batch and the features; its least value over
micro-batches, dispatchers and overlaps, without recompute, bounds every layout of the group. The part
of gradient reduction that no overlap hides, the optimizer and the fixed overhead come on top. Tests hold it below every price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplan.costmodels.constants import OVERLAP, STEP
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import StageParameters, mean_parameters
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.step import data_parallel_times, dense_group, expert_group
from moeplan.planner import space
from moeplan.planner.problem import Problem


def least_step_seconds(problem: Problem, groups: Layouts, micro_batches: Sequence[int]) -> Any:
    """Seconds that no layout with the degrees of a group can beat, [n]; `micro_batches` are those to choose from."""
    if not len(groups):
        return np.zeros(0)
    model, profile, workload = problem.model, problem.profile, problem.workload
    keys, of_row = groups.distinct("tp", "cp", "ep", "etp", "sequence_parallel", "cuda_graphs")
    rows = space.cross(space.cross(keys, {"micro_batch": micro_batches}), space.feature_options(problem))
    rows = space.with_shared_overlap(problem, rows)
    whole = Pricing(model, profile, workload, rows).whole_micro_batch_s()
    per_sample: Any = np.asarray(whole / rows.micro_batch).reshape(len(keys), -1).min(axis=1)
    work = workload.global_batch / groups.dp * per_sample[of_row] / groups.pp
    return with_once_s(problem, groups, mean_parameters(model, groups), work + STEP.overhead_s)


def with_once_s(problem: Problem, rows: Layouts, held: StageParameters, seconds: Any) -> Any:
    """`seconds` with the optimizer and what no overlap hides of gradient reduction, if a rank holds these parameters, [n]."""
    profile, workload = problem.profile, problem.workload
    for parameters, where in ((held.dense, dense_group(profile, rows)), (held.expert, expert_group(profile, rows))):
        once = data_parallel_times(profile, workload, rows, parameters, where)
        reduced = np.where(rows.shards_as("fsdp"), 0.0, profile.exposed * OVERLAP.data_exposed * (once.scatter + once.gather))
        seconds = seconds + reduced + once.optimizer
    return seconds
