"""Compute rates that runs sustain, and the spread of predictions: `python benchmarks/fit_spread.py RUNS.csv -o spread.yaml`.

One number is fitted: what a training step sustains of the compute rates that short benchmarks reach (power-limited clocks), as
the value that makes the median of log(measured / predicted) zero over the dense runs. It is printed for comparison with the
constant in moeplan/costmodels/constants.py, also with each source left out; the spread is then taken with that constant.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplan.costmodels.uncertainty import regime
from moeplan.planner.estimate import price_runs
from moeplan.planner.runs import Run
from moeplan.records import dump_yaml

COMPUTE_PARTS = ("GEMM", "core", "recompute", "prediction/")
"""Parts of a step that scale with the sustained compute rate."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured run with its prediction."""

    source: str
    regime: str
    measured_s: float
    compute_s: float
    rest_s: float

    def log_error(self, factor: float = 1.0) -> float:
        """log(measured / predicted) with compute slowed by `factor`."""
        return math.log(self.measured_s / (self.compute_s * factor + self.rest_s))


def points(rows: list[dict[str, str]]) -> list[Point]:
    """Every row that was measured and can be priced."""
    out = []
    for row, priced in zip(rows, price_runs(rows), strict=True):
        if priced.cost is None or priced.run is None or not row.get("measured_step_s"):
            continue
        compute = sum(float(v) for name, v in priced.cost if any(part in name for part in COMPUTE_PARTS))
        total = float(priced.cost.total)
        out.append(Point(source(row), _regime(priced.run), float(row["measured_step_s"]), compute, total - compute))
    return out


def source(row: dict[str, str]) -> str:
    """The family of a row: what stands before the first dash and number of its id."""
    return row["id"].split("-")[0]


def _regime(run: Run) -> str:
    from moeplan.planner.estimate import profile_of

    return regime(run.model, profile_of(run.cluster))


def slow_down(chosen: Iterable[Point]) -> float:
    """The factor on compute that centres the errors of `chosen` (bisection on a monotone median)."""
    chosen, low, high = list(chosen), 0.5, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.median([p.log_error(middle) for p in chosen]) > 0 else (low, middle)
    return (low + high) / 2


def spreads(all_points: list[Point]) -> dict[str, dict[str, float | int]]:
    """10th and 90th percentile of measured over predicted by regime, sources weighted alike within it."""
    by_regime: dict[str, list[Point]] = defaultdict(list)
    for point in all_points:
        by_regime[point.regime].append(point)
    out = {}
    for name, members in sorted(by_regime.items()):
        sizes = {s: sum(p.source == s for p in members) for s in {p.source for p in members}}
        errors = np.array([p.log_error() for p in members])
        weights = np.array([1.0 / math.sqrt(sizes[p.source]) for p in members])
        low, high = (math.exp(_weighted_quantile(errors, weights, q)) for q in (0.1, 0.9))
        out[name] = {"low": round(min(low, 0.95), 3), "high": round(max(high, 1.05), 3), "runs": len(members)}
    return out


def _weighted_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, q * cumulative[-1])])


def main() -> None:
    """Print the fit and write the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with options.runs.open(encoding="utf-8", newline="") as stream:
        found = points(list(csv.DictReader(stream)))
    dense = [p for p in found if p.regime.startswith("dense")]
    print(f"{len(found)} runs, {len(dense)} of dense models")
    print(f"compute slow-down beside the constant in use: {slow_down(dense):.3f}")
    for left_out in sorted({p.source for p in dense}):
        rest = [p for p in dense if p.source != left_out]
        factor = slow_down(rest)
        errors = [abs(math.expm1(-p.log_error(factor))) for p in dense if p.source == left_out]
        print(f"  without {left_out:14s} {factor:.3f}; its {len(errors):3d} runs then {100 * np.median(errors):5.1f} % off")
    errors = [abs(math.expm1(-p.log_error())) for p in found]
    print(f"error with the constant in use: median {100 * np.median(errors):.1f} %, mean {100 * np.mean(errors):.1f} %")
    header = (
        "# Written by benchmarks/fit_spread.py from published runs: factors on a predicted step time that hold 80 % of them.\n"
    )
    options.output.write_text(header + dump_yaml({"regimes": spreads(found)}), encoding="utf-8")


if __name__ == "__main__":
    main()
