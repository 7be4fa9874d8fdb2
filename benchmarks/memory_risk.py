"""How far predicted peaks are off, and what became of runs by the probability that was given to their running out of memory.

Part of `python -m benchmarks.fit_spread`. The scale is that of Student's law with 4 degrees of freedom under which the log of
measured over predicted peak of Megatron's allocator is most likely: each measurement once, without reserved pools, which hold
more than the peak, and without runs that failed, whose peak is not that of a whole step. Votes are shared as for step times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from benchmarks.accuracy.fitting import architecture
from benchmarks.accuracy.rows import Memory, Result, device_bytes, memories, outcome, says_out_of_memory
from moeplan.costmodels.uncertainty import student_tail
from moeplan.planner.robust import shared_votes
from moeplan.planner.robustness import out_of_memory

EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
"""Between these probabilities runs are counted together."""
EXCEEDED = (0.5, 0.25, 0.1, 0.05)
"""Probabilities of a larger peak that are compared with how many measured peaks are larger."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Measured peaks as arrays, [n] each."""

    error: Any
    """Log of measured over predicted."""
    weight: Any
    model: Any
    """Equal where the model is."""


def used(memory: Memory) -> bool:
    """Whether a measured peak takes part."""
    framework = memory.result.run.workload.era.framework
    failed = says_out_of_memory(memory.result.row)
    return not (memory.repeated or failed or memory.kind == "reserved pool") and framework == "megatron"


def peaks(results: Sequence[Result]) -> Peaks:
    """The peaks that take part."""
    rows = [m for m in memories(results) if used(m)]
    runs = [(m.result.family, m.result.run) for m in rows]
    votes = shared_votes([(f, r.model.name, r.cluster.device.name, r.workload.precision.name) for f, r in runs])
    places: dict[Any, int] = {}
    return Peaks(
        error=np.log([m.measured_bytes / m.predicted_bytes for m in rows]),
        weight=votes,
        model=np.array([places.setdefault(architecture(r.model), len(places)) for _, r in runs]),
    )


def scale(error: Any, weight: Any) -> float:
    """The scale under which the errors are most likely."""

    def unlikely(log: float) -> float:
        return float(weight @ (2.5 * np.log1p((error / np.exp(log)) ** 2 / 4.0) + log))

    return float(np.exp(minimize_scalar(unlikely, bounds=(-8.0, 0.0), method="bounded").x))


def left_out(found: Peaks) -> Any:
    """Probability of a larger peak than was measured, by a scale from the peaks of other models, [n]."""
    out = np.empty(len(found.error))
    for one in np.unique(found.model):
        mine = found.model == one
        out[mine] = student_tail(found.error[mine] / scale(found.error[~mine], found.weight[~mine]))
    return out


def probabilities(results: Sequence[Result]) -> tuple[Any, Any, Any]:
    """Of runs that ran or failed: the probability of failing, whether they did, and whether their recompute is known."""
    known = [r for r in results if outcome(r)]
    chance, failed, told = [], [], []
    for r in known:
        device = device_bytes(r, r.run.cluster.device.memory_bytes)
        chance.append(float(out_of_memory(device, r.priced.peak_bytes)))
        failed.append(outcome(r) == "out of memory")
        told.append(bool(r.row.get("recompute")))
    return np.array(chance), np.array(failed), np.array(told)


def tables(results: Sequence[Result]) -> tuple[float, list[str]]:
    """The scale, and tables of how peaks and outcomes meet their probabilities."""
    found = peaks(results)
    value = scale(found.error, found.weight)
    inside, other = student_tail(found.error / value), left_out(found)
    out = [
        f"Peak memory: {len(found.error)} measurements of {len(np.unique(found.model))} models, scale {100 * value:.1f} %.",
        "",
        "| measured peak exceeds what is exceeded with probability | expected | runs | model left out |",
        "|---|---:|---:|---:|",
    ]
    for p in EXCEEDED:
        out.append(f"| {p:g} | {100 * p:.0f} % | {100 * np.mean(inside < p):.0f} % | {100 * np.mean(other < p):.0f} % |")
    chance, failed, told = probabilities(results)
    out += ["", "| probability of running out of memory | runs, recompute known | expected to fail | failed | runs, all |"]
    out.append("|---|---:|---:|---:|---:|")
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        all_here = (chance >= low) & (chance < high if high < 1.0 else chance <= 1.0)
        here = all_here & told
        cells = (str(here.sum()), f"{chance[here].sum():.1f}", str(failed[here].sum()), str(all_here.sum()))
        out.append(f"| {100 * low:.0f} to {100 * high:.0f} % | {' | '.join(cells)} |")
    return value, out
