"""Proofs about stage problems by mixed-integer programmes, over processes.

A split that a programme (`partition.py`) finds and that takes longer than its closed form adds a longest path through its
passes to the programme, until what comes out is what it says, or nothing is left that would be faster. Units: seconds.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.planner.stages.problem import StageProblem

PATHS = 12
"""Programmes of one stage problem, each with one path more."""
SAME = 1e-6
"""Share by which a split may take longer than its programme says and still counts as what it says."""


@dataclass(frozen=True, slots=True)
class Task:
    """A stage problem to be closed."""

    stages: StageProblem
    rest_s: float
    """Seconds of a step beside its passes, at least."""
    bound_s: float
    """What is known: seconds of a step, at least."""
    aim_s: float
    """Splits that are no faster are of no interest."""
    deadline_s: float
    """`time.perf_counter()` at which to stop."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is known of all splits of a stage problem."""

    bound_s: float
    """None of them that is of interest is faster; infinite if none is."""
    programmes: int
    """Mixed-integer programmes that were solved."""
    splits: list[list[int]]
    """Splits that came out on the way."""
    remark: str = ""
    """Which solver stood in for another."""


def proof(task: Task) -> Proof:
    """A bound on all splits of a stage problem, as far as it is below what is aimed at, and splits that came out on the way."""
    from moeplan.planner.partition import split_by_milp  # the solvers are loaded where they are needed

    stages, bound, splits = task.stages, task.bound_s, list[list[int]]()
    paths = list[Any]()
    remark = ""
    for count in range(PATHS):
        if time.perf_counter() > task.deadline_s:
            return Proof(bound, count, splits, remark)
        found = split_by_milp(stages, paths=paths, within_s=task.aim_s - task.rest_s)
        remark = found.remark or remark
        if found.sizes is None:
            return Proof(np.inf if found.proven else bound, count + 1, splits, remark)
        splits.append(found.sizes)
        said = max([float(stages.spans(found.sizes)[0]), *(stages.along(found.sizes, path) for path in paths)])
        bound = max(bound, said + task.rest_s)
        if float(stages.exact_spans(found.sizes)[0]) <= said * (1.0 + SAME):
            break
        paths.append(stages.critical(found.sizes))
    return Proof(bound, count + 1, splits, remark)


def proofs(tasks: Sequence[Task], jobs: int) -> Iterable[Proof]:
    """What programmes prove of each stage problem, in order; `jobs`: processes."""
    if jobs == 1 or len(tasks) < 2:
        return map(proof, tasks)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks)), context) as pool:
        return list(pool.map(proof, tasks))
