"""The whole comparison as one value, and its figures by name, on which thresholds are set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import fit_spread
from benchmarks.accuracy import fitting
from benchmarks.accuracy.ablations import ABLATIONS, Ablation, Effect, effects
from benchmarks.accuracy.fitting import Parameters, Point
from benchmarks.accuracy.rows import TABLE, Memory, Result, compared, memories, published_rows, results
from benchmarks.accuracy.scores import (
    Errors,
    Ranking,
    Verdicts,
    error_figures,
    memory_errors,
    pooled_tau,
    rankings,
    verdicts,
)  # fmt: skip
from benchmarks.accuracy.validation import LeftOut, leave_out
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import MoeplanError

GOAL_GROUPS: Mapping[str, Callable[[Point], bool]] = {
    "all": lambda p: True,
    "dense": lambda p: p.kind == "dense" and p.source in ("mbridge", "nemo", "dgxc"),
    "MoE": lambda p: p.kind == "MoE" and p.source in ("mbridge", "folding"),
}
"""Rows for which goals are set."""
GROUP_NAMES = {
    "all": "all",
    "dense": "dense: Megatron-Bridge, NeMo, DGX Cloud",
    "MoE": "MoE: Megatron-Bridge, folding study",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that the page is made of."""

    results: tuple[Result, ...]
    """All rows."""
    compared: tuple[Result, ...]
    """Rows whose step time is compared."""
    points: tuple[Point, ...]
    """The same rows for fits."""
    memories: tuple[Memory, ...]
    rankings: tuple[Ranking, ...]
    """Groups large enough for a rank correlation."""
    small_rankings: tuple[Ranking, ...]
    """Groups of at least two layouts."""
    verdicts: Verdicts
    fitted: Parameters
    """Parameters fitted to all points."""
    by_model: LeftOut
    by_source: LeftOut
    inside_by_model: tuple[bool, ...]
    """Whether an interval from the runs of other models holds the measured time, for each point."""
    inside_by_source: tuple[bool, ...]
    unfitted: tuple[Point, ...]
    """The points priced at the rates of short benchmarks."""
    seen: tuple[bool, ...]
    """Whether the architecture of each point is among the published runs."""
    effects: tuple[Effect, ...] = ()
    """Ablations, if asked for."""

    def in_group(self, group: str) -> list[int]:
        """Places of the points of a goal group."""
        return [i for i, p in enumerate(self.points) if GOAL_GROUPS[group](p)]


def study(table: Path = TABLE, ablations: Sequence[Ablation] = ABLATIONS) -> Study:
    """Price all rows of a table and compare."""
    rows = published_rows(table)
    everything = results(rows)
    usable = compared(everything)
    points = fitting.points(usable, fitting.slopes(usable))
    with fitting.unfitted():
        bare = fitting.points(compared(results(rows)))
    by_model, by_source = leave_out(points, lambda p: p.model), leave_out(points, lambda p: p.source)
    spread = fit_spread.load(table)
    return Study(
        results=tuple(everything),
        compared=tuple(usable),
        points=tuple(points),
        memories=tuple(memories(everything)),
        rankings=tuple(rankings(usable)),
        small_rankings=tuple(rankings(usable, least=2)),
        verdicts=verdicts(everything),
        fitted=fitting.fit(points),
        by_model=by_model,
        by_source=by_source,
        inside_by_model=inside_left_out(spread, by_model, [p.model for p in points]),
        inside_by_source=inside_left_out(spread, by_source, [p.source for p in points]),
        unfitted=tuple(bare),
        seen=tuple(fitting.architecture(r.run.model) in published_architectures() for r in usable),
        effects=tuple(effects(rows, points, ablations)),
    )


def inside_left_out(spread: fit_spread.Runs, left: LeftOut, groups: Sequence[str]) -> tuple[bool, ...]:
    """Whether fit and interval from the runs of other groups hold the measured time; no where there are none."""
    if len(set(groups)) < 2:
        return (False,) * len(groups)
    return tuple(fit_spread.inside_left_out(spread, left.errors, np.array(groups)).tolist())


@functools.cache
def published_architectures() -> frozenset[tuple[object, ...]]:
    """Architectures of the published runs, on which everything was fitted."""
    found = set()
    for row in published_rows():
        with contextlib.suppress(MoeplanError):
            found.add(fitting.architecture(load_model(row["model"])))
    return frozenset(found)


def fit_errors(known: Study, group: str) -> dict[str, Errors]:
    """Errors of a goal group under every way to fit."""
    places = known.in_group(group)
    points = [known.points[i] for i in places]
    logs = {
        "rates of short benchmarks": fitting.errors([known.unfitted[i] for i in places], fitting.IN_USE),
        "constants in use": fitting.errors(points, fitting.IN_USE),
        "fitted again to all rows": fitting.errors(points, known.fitted),
        "fitted without the row's model": known.by_model.errors[places],
        "fitted without the row's source": known.by_source.errors[places],
    }
    return {name: error_figures(np.exp(-log)) for name, log in logs.items()}


def figures(known: Study) -> dict[str, float]:
    """Figures by name: percent, or Kendall's tau."""
    out = {}
    for group in GOAL_GROUPS:
        if not known.in_group(group):
            continue
        for name, errors in fit_errors(known, group).items():
            which = {"constants in use": "", "fitted without the row's source": ", source left out"}.get(name)
            if which is not None:
                out[f"step time, {group}{which}: median error"] = 100 * errors.median
                out[f"step time, {group}{which}: within 10 %"] = 100 * errors.within
    if known.memories:
        peak = memory_errors(known.memories)
        out["peak memory: median error"], out["peak memory: within 10 %"] = 100 * peak.median, 100 * peak.within
    if known.compared:
        out["intervals: rows inside"] = 100 * float(np.mean([r.covered for r in known.compared]))
        out["intervals, source left out: rows inside"] = 100 * float(np.mean(known.inside_by_source))
    if known.rankings:
        out["order: tau of the folding study"] = pooled_tau([g for g in known.rankings if g.family == "folding"])
        out["order: tau of the worst group"] = min(g.tau for g in known.rankings)
    out["fit: rows that ran said to fit"] = 100 * known.verdicts.ran_share
    out["fit: rows out of memory said not to fit"] = 100 * known.verdicts.failed_share
    return out
