"""How far predictions are off, by kind of part and by regime, from published runs: `python -m benchmarks.fit_spread`.

Writes moeplan/costmodels/catalog/spread.yaml and the tables of docs/uncertainty.md. Run it after every change of a cost, curve
or fit.

1. Errors of runs left out. The constants in use were fitted to the same runs, so that their errors are too small. Log of
   measured over predicted is linear in the errors of the parts, with the parts' shares as slopes; a refit of compute by device
   and of all else by framework, with and without the runs of one model, gives what leaving that model out would change.
2. Deviations of the kinds of parts: those under which the errors of runs left out are most likely (Student's t with 4 degrees
   of freedom, variance common^2 + sum (share sigma)^2), each held to a value stated beforehand by a factor of e^0.5.
3. Regimes: the factor on these deviations that holds 80 % of its runs, drawn towards that of all runs where there are few; and
   a bias, only where the medians of its models lie on one side by more than twice their standard error.
4. Floor: what two layouts of one question differ by beside their parts, so that 80 % of such pairs are inside.
5. Memory: the scale of the error of peaks, and what became of runs by their probability of failing (`memory_risk.py`).

A run that was published by nine releases is not nine facts: the weight of runs of the same source, model, device and precision
is 1 / sqrt(their number).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

import moeplan.costmodels.uncertainty as model
from benchmarks import memory_risk
from benchmarks.accuracy.fitting import architecture
from benchmarks.accuracy.rows import TABLE, Result, compared, published_rows, results
from benchmarks.accuracy.spread import weighted_quantile
from moeplan.planner.estimate import profile_of
from moeplan.planner.robust import robust_change, shared_votes
from moeplan.records import dump_yaml, read_text, save_text

CATALOG = Path(model.__file__).parent / "catalog" / "spread.yaml"
HEADER = """\
# Written by `python -m benchmarks.fit_spread` from published runs; docs/uncertainty.md says how. Relative standard deviations.
"""
PAGE = Path(__file__).parents[1] / "docs" / "uncertainty.md"
BEGIN, END = "<!-- tables: python -m benchmarks.fit_spread -->", "<!-- end of tables -->"
KINDS = list(model.KINDS)
STATED = {
    "common": 0.05, "dense GEMM": 0.05, "attention core": 0.1, "state scan": 0.3, "expert GEMM": 0.15, "element-wise": 0.15,
    "permute": 0.2, "expert all-to-all": 0.2, "tensor-parallel exchange": 0.2, "context-parallel exchange": 0.3,
    "host launches": 0.4, "recompute": 0.15, "pipeline bubble": 0.15, "pipeline sends": 0.3, "data-parallel exchange": 0.2,
    "once a step": 0.3,
}  # fmt: skip
"""Deviations expected before any run is looked at: compute repeats what was measured alone, exposed exchange depends on
overlap."""
HELD_BY = 0.5
"""Deviation of the log of a deviation from the stated one."""
SCALED = 0.12
"""Deviation of a curve scaled from another device. Scaled to each other by the profile's rules, curves of A100, H100 and B200
miss the measured ones by 12 % in the median (GEMM 16, attention 18, collectives 12, memory 6), those of B200 and GB200 by 1 %:
most relatives lie between."""
LEAST_FLOOR = 0.015
"""Two runs of one configuration on one machine differ by 1 to 2 %."""
LEAST_COMMON = 0.04
"""Releases of the same software differ by about 5 %: an interval that is narrower than that claims too much."""
BY_DEVICE = {"dense GEMM": 0.15, "expert GEMM": 0.15, "attention core": 0.15}
"""Kinds refitted for each device and class of precision; deviation of the log of the factor."""
BY_FRAMEWORK = 0.3
"""The same for all other kinds, refitted for each framework."""
ROBUST = 0.06
"""Log error beyond which a run pulls no harder in a refit."""
LEAST_MODELS = 8
"""Models of a regime below which it shows no bias: with fewer, one model more or less moves it."""
DRAWN = 3.0
"""Weight with which all runs take part in the factor of each regime."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Published runs as arrays."""

    results: Sequence[Result]
    error: Any
    """Log of measured over predicted, [n]."""
    shares: Any
    """[n, kinds]."""
    curves: Any
    """Deviations of the curves, [n, kinds]."""
    regime: Any
    weight: Any

    def column(self, key: Callable[[Result], Hashable]) -> Any:
        """Numbers that are equal where the key is, [n]."""
        places: dict[Hashable, int] = {}
        return np.array([places.setdefault(key(r), len(places)) for r in self.results])


def load(path: Path) -> Runs:
    """Price the runs of a table."""
    rows = compared(results(published_rows(path)))
    profiles = [profile_of(r.run.cluster) for r in rows]
    group = [(r.family, r.run.model.name, r.run.cluster.device.name, r.run.workload.precision.name) for r in rows]
    pairs = list(zip(rows, profiles, strict=True))
    return Runs(
        results=rows,
        error=np.array([np.log(r.measured_s / r.predicted_s) for r in rows]),
        shares=np.stack([model.shares(r.priced.cost) for r in rows if r.priced.cost is not None]),
        curves=np.stack([model.curve_errors(p, r.run.workload, SCALED) for r, p in pairs]),
        regime=np.array([model.regime(r.run.model, p, r.run.workload) for r, p in pairs]),
        weight=shared_votes(group),
    )


# -- 1. errors of runs left out ------------------------------------------------------------------------------------------


def slopes(runs: Runs) -> tuple[Any, Any]:
    """Shares by the factor that scales them, [n, parameters], and the deviation of each factor's log."""
    columns, spreads = [], []
    for k, kind in enumerate(KINDS):
        if kind in BY_DEVICE:
            owner = runs.column(lambda r: (r.device, r.run.workload.precision.peak))
        else:
            owner = runs.column(lambda r: r.run.workload.era.framework)
        for one in np.unique(owner):
            columns.append(np.where(owner == one, runs.shares[:, k], 0.0))
            spreads.append(BY_DEVICE.get(kind, BY_FRAMEWORK))
    used = np.array([c.max() > 0.0 for c in columns])
    return np.array(columns).T[:, used], np.array(spreads)[used]


def refit(error: Any, slope: Any, spread: Any, weight: Any) -> Any:
    """Logs of the factors that explain the errors best."""
    return robust_change(-error, slope, weight, scale=ROBUST, spread=spread)


def left_out(runs: Runs, key: Any) -> Any:
    """Errors by constants fitted without the runs of the same key, [n]."""
    slope, spread = slopes(runs)
    everything = refit(runs.error, slope, spread, runs.weight)
    out = np.empty(len(key))
    for one in np.unique(key):
        mine = key == one
        without = refit(runs.error[~mine], slope[~mine], spread, runs.weight[~mine])
        out[mine] = runs.error[mine] - slope[mine] @ (without - everything)
    return out


# -- 2. to 4. ------------------------------------------------------------------------------------------------------------


def deviations(runs: Runs, error: Any, some: Any) -> Any:
    """Deviation common to all, and by kind, [1 + kinds]; from the runs in `some`."""
    square = np.hstack([np.ones((some.sum(), 1)), runs.shares[some] ** 2])
    known = ((runs.shares[some] * runs.curves[some]) ** 2).sum(axis=1)
    stated = np.log([STATED[name] for name in ("common", *KINDS)])

    def unlikely(log: Any) -> tuple[float, Any]:
        variance = known + square @ np.exp(2 * log)
        t = error[some] ** 2 / (2.0 * variance)  # 4 degrees of freedom, scaled to that variance
        loss = 0.5 * np.log(variance) + 2.5 * np.log1p(t)
        slope = (0.5 - 2.5 * t / (1.0 + t)) / variance * runs.weight[some]
        pull = (log - stated) / HELD_BY**2
        return float(runs.weight[some] @ loss + 0.5 * pull @ (log - stated)), 2 * np.exp(2 * log) * (square.T @ slope) + pull

    found = np.exp(minimize(unlikely, stated, jac=True, method="L-BFGS-B").x)
    found[0] = max(found[0], LEAST_COMMON)
    return found


def step_sigmas(runs: Runs, found: Any) -> Any:
    """Deviation of every run's step time, [n]."""
    return np.sqrt(found[0] ** 2 + ((runs.shares * np.hypot(runs.curves, found[1:])) ** 2).sum(axis=1))


def regimes(runs: Runs, error: Any, found: Any, some: Any) -> dict[str, model.Regime]:
    """Bias and factor of every regime, from the runs in `some`; a regime without runs takes the widest factor."""
    sigma, owner = step_sigmas(runs, found), runs.column(lambda r: (r.family, architecture(r.run.model)))
    pooled, share = np.abs(error[some]) / sigma[some], DRAWN * runs.weight[some] / runs.weight[some].sum()
    out = {}
    for name in np.unique(runs.regime):
        mine = some & (runs.regime == name)
        bias = _bias(error[mine], owner[mine])
        z = np.concatenate([np.abs(error[mine] - bias) / sigma[mine], pooled])
        scale = weighted_quantile(z, np.concatenate([runs.weight[mine], share]), 0.8) / model.Z_80
        out[str(name)] = model.Regime(bias=round(bias, 3), scale=round(scale, 3), runs=int(mine.sum()))
    widest = max(r.scale for r in out.values())
    words = itertools.product(("dense", "moe"), ("", "scaled device"), ("", "other framework"))
    names = (", ".join(filter(None, some_words)) for some_words in words)
    return {name: out.get(name, model.Regime(bias=0.0, scale=widest, runs=0)) for name in names}


def _bias(error: Any, owner: Any) -> float:
    """Median over models of the median error, where it lies further from 0 than twice its standard error."""
    medians = np.array([np.median(error[owner == one]) for one in np.unique(owner)])
    if len(medians) < LEAST_MODELS:
        return 0.0
    centre = float(np.median(medians))
    around = 1.2533 / model.MEDIAN_ERROR * np.median(np.abs(medians - centre)) / np.sqrt(len(medians))
    return centre if abs(centre) > 2.0 * around else 0.0


def inside(runs: Runs, error: Any, found: Any, held: dict[str, model.Regime]) -> Any:
    """Whether the interval of each run holds the measured time, [n]."""
    bias, scale = (np.array([getattr(held[n], what) for n in runs.regime]) for what in ("bias", "scale"))
    return np.abs(error - bias) <= model.Z_80 * scale * step_sigmas(runs, found)


def inside_left_out(runs: Runs, error: Any, key: Any) -> Any:
    """The same with deviations and regimes from the runs of other keys, [n]."""
    out = np.zeros(len(key), np.bool_)
    for one in np.unique(key):
        found = deviations(runs, error, key != one)
        mine = key == one
        out[mine] = inside(runs, error, found, regimes(runs, error, found, key != one))[mine]
    return out


def pairs(runs: Runs) -> tuple[Any, Any]:
    """Runs of one question and the same software under two layouts, places of both, [pairs]."""
    cells = ("source", "precision", "seq_len", "gbs", "num_gpus", "dispatcher", "cuda_graphs", "a2a_overlap")
    question = runs.column(
        lambda r: (*architecture(r.run.model), len(r.run.model.layers), r.device, *(r.row[c] for c in cells))
    )
    software, layout = runs.column(lambda r: r.run.workload.era.name), runs.column(lambda r: r.run.layout)
    first, second = np.triu_indices(len(question), 1)
    same = (question[first] == question[second]) & (software[first] == software[second]) & (layout[first] != layout[second])
    return first[same], second[same]


def floor(runs: Runs, found: Any) -> tuple[float, int]:
    """The least deviation beside the parts under which 80 % of pairs are inside, and the pairs."""
    first, second = pairs(runs)
    sigma = np.hypot(runs.curves[first], found[1:])
    parts = (((runs.shares[first] - runs.shares[second]) * sigma) ** 2).sum(axis=1)
    needed = np.maximum(((runs.error[first] - runs.error[second]) / model.Z_80) ** 2 - parts, 0.0)
    return max(LEAST_FLOOR, float(np.sqrt(np.quantile(needed, 0.8)))), len(first)


Columns = dict[str, Any]


def coverage(runs: Runs, found: Any, held: dict[str, model.Regime], columns: Columns) -> list[str]:
    """Table of the share of runs inside their intervals, by regime."""
    out = [
        f"| regime | runs | bias | scale | half width, median | {' | '.join(columns)} |",
        "|---|" + "---:|" * (4 + len(columns)),
    ]
    scale = np.array([held[n].scale for n in runs.regime])
    half = np.expm1(model.Z_80 * scale * step_sigmas(runs, found))
    for name in ("all", *sorted(set(runs.regime))):
        mine = runs.regime == name if name != "all" else np.ones(len(half), np.bool_)
        cells = [f"{100 * np.mean(inside[mine]):.0f} %" for inside in columns.values()]
        said = ["", ""] if name == "all" else [f"{100 * np.expm1(held[name].bias):+.0f} %", f"{held[name].scale:.2f}"]
        out.append(f"| {' | '.join((name, str(mine.sum()), *said, f'{100 * np.median(half[mine]):.0f} %', *cells))} |")
    return out


def by_kind(runs: Runs, found: Any) -> list[str]:
    """Table of deviations by kind, with that of its curves on the device of the median run."""
    out = ["| kind of part | curves, median run | added by a step | share of the step, mean |", "|---|---:|---:|---:|"]
    for k, kind in enumerate(KINDS):
        curve = float(np.median(runs.curves[:, k]))
        cells = (
            f"{100 * curve:.0f} %" if curve else "",
            f"{100 * found[1 + k]:.0f} %",
            f"{100 * runs.shares[:, k].mean():.1f} %",
        )
        out.append(f"| {kind} | {' | '.join(cells)} |")
    return out


def page(text: str, tables: str) -> str:
    """The text of docs/uncertainty.md with new tables."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=TABLE)
    parser.add_argument("-o", "--output", type=Path, default=CATALOG, help="elsewhere: docs/uncertainty.md stays as it is")
    options = parser.parse_args()
    runs = load(options.runs)
    by_model, by_source = runs.column(lambda r: architecture(r.run.model)), runs.column(lambda r: r.family)
    everyone = np.ones(len(runs.error), np.bool_)
    error, other = left_out(runs, by_model), left_out(runs, by_source)
    found = deviations(runs, error, everyone)
    held = regimes(runs, error, found, everyone)
    least, count = floor(runs, found)
    columns = {
        "inside": inside(runs, runs.error, found, held),
        "model left out": inside_left_out(runs, error, by_model),
        "source left out": inside_left_out(runs, other, by_source),
    }
    medians = ", ".join(
        f"{100 * np.median(np.abs(np.expm1(-errors))):.1f} % {name}"
        for name, errors in (("with the constants in use", runs.error), ("with the model left out", error))
    )
    said = (
        f"{len(runs.error)} runs; median error {medians}. `common` is {100 * found[0]:.1f} %, "
        f"`floor` {100 * least:.1f} %, from {count} pairs of layouts."
    )
    memory, judged = memory_risk.tables(results(published_rows(options.runs)))
    tables = "\n".join([said, "", *coverage(runs, found, held, columns), "", *by_kind(runs, found), "", *judged])
    print(tables)
    data = {
        "common": round(float(found[0]), 3),
        "scaled": SCALED,
        "floor": round(least, 3),
        "memory": round(memory, 3),
        "kinds": {kind: round(float(sigma), 3) for kind, sigma in zip(KINDS, found[1:], strict=True)},
        "regimes": {n: {"bias": r.bias, "scale": r.scale, "runs": r.runs} for n, r in held.items()},
    }
    save_text(options.output, HEADER + dump_yaml(data), "deviations")
    if options.output == CATALOG and options.runs == TABLE:
        save_text(PAGE, page(read_text(PAGE, "page"), tables), "page")


if __name__ == "__main__":
    main()
