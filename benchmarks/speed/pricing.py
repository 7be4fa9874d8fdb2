"""Candidate layouts priced per second on one core, time and memory together: `python -m benchmarks.speed.pricing`.

The candidates are a sample of the space of DeepSeek-V3 on 2,048 H100: all degrees, virtual stages, splits, micro-batches,
dispatchers, overlaps and recompute sets that the framework accepts, as independent rows.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner import space
from moeplan.planner.constraints import LEVELS, RULES
from moeplan.planner.problem import Problem
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal


def problem() -> Problem:
    """The question whose space is priced."""
    workload = Workload(seq_len=4096, global_batch=8192, precision=load_precision("fp8-cs"), era=load_era("latest"))
    return Problem(model=load_model("deepseek-v3"), profile=nominal(load_cluster("h100x2048")), workload=workload)


def candidates(asked: Problem, count: int, seed: int = 0) -> Layouts:
    """`count` accepted layouts drawn from the whole space."""
    rng = np.random.default_rng(seed)
    rows = accepted(asked, space.degree_grid(asked), "degrees")
    rows = space.cross(rows, space.chunk_options(asked))
    rows = rows.take(rows.pp * rows.vpp <= len(asked.model.layers) + 2)
    rows = accepted(asked, space.with_balanced_splits(asked, rows), "chunks")
    rows = accepted(asked, space.cross(rows, space.batch_options(asked)), "batch")
    rows = accepted(asked, space.cross(rows, space.feature_options(asked)), "features")
    sets = np.asarray(space.recompute_sets(asked), np.int64)
    drawn = rows.take(rng.integers(len(rows), size=2 * count))
    drawn = accepted(asked, drawn.with_columns(recompute=rng.choice(sets, size=2 * count)), "recompute")
    return drawn.take(slice(0, count))


def accepted(asked: Problem, rows: Layouts, level: str) -> Layouts:
    """Rows that break no rule of a level."""
    assert level in LEVELS
    for rule in RULES:
        if rule.level == level:
            rows = rows.take(~rule.broken(asked, rows))
    return rows


def rate(count: int) -> float:
    """Layouts per second, step time and peak memory of each."""
    asked = problem()
    rows = candidates(asked, count)
    started = time.perf_counter()
    pricing = Pricing(asked.model, asked.profile, asked.workload, rows)
    step, peak = pricing.step_seconds(), pricing.peak_bytes()
    seconds = time.perf_counter() - started
    assert np.isfinite(step).all() and np.isfinite(peak).all()
    return len(rows) / seconds


def main() -> None:
    """Print rates for growing numbers of layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 100_000, 1_000_000, 2_000_000])
    for count in parser.parse_args().counts:
        print(f"{count:>9,} layouts: {rate(count) / 1e6:.2f} million per second", flush=True)


if __name__ == "__main__":
    main()
