"""The fit of the memory error: it finds again what made-up peaks were drawn from, and counts outcomes by probability."""

from typing import Any

import numpy as np
import pytest

from benchmarks import memory_risk
from benchmarks.accuracy.rows import published_rows, results
from benchmarks.memory_risk import Peaks, left_out, scale


def test_the_scale_is_found_again() -> None:
    error = 0.04 * np.random.default_rng(0).standard_t(4, 20_000)
    assert scale(error, np.ones(len(error))) == pytest.approx(0.04, rel=0.03)
    doubled = scale(np.append(error, error), np.ones(2 * len(error)))
    assert doubled == pytest.approx(scale(error, np.ones(len(error))), rel=1e-4)


def test_a_peak_is_judged_by_the_others() -> None:
    error = np.concatenate([0.02 * np.random.default_rng(1).standard_t(4, 500), [0.5]])
    found = Peaks(error=error, weight=np.ones(501), model=np.append(np.zeros(500), 1.0))
    assert left_out(found)[-1] < 1e-4 and np.mean(left_out(found)[:500] < 0.1) < 0.1


@pytest.fixture(scope="module")
def few() -> Any:
    wanted = ("mbridge-recompute-007", "mbridge-recompute-011", "simumax-001", "simumax-005", "titan-001", "swift-006")
    return results([row for row in published_rows() if row["id"] in wanted])


def test_which_peaks_take_part(few: Any) -> None:
    used = [m.result.row["id"] for m in memory_risk.memories(few) if memory_risk.used(m)]
    # without the run that failed, PyTorch's pools, and reserved pools
    assert used == ["mbridge-recompute-011", "simumax-001", "simumax-005"]


def test_tables(few: Any) -> None:
    value, lines = memory_risk.tables(few)
    assert 0.0 < value < 0.1 and lines[0].startswith("Peak memory: 3 measurements of 3 models")
    rows = [line.split("|")[1:-1] for line in lines if " to " in line and line.startswith("|")][1:]
    told, failed, everyone = (sum(int(r[i]) for r in rows) for i in (1, 3, 4))
    assert (len(rows), failed, everyone) == (5, 1, 6) and told <= everyone
