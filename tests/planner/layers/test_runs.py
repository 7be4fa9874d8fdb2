"""Runs of one MoE layer: their table, what a profile predicts for them, and what they say of the overlap that is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.collectives import all_gather_s, group
from moeplan.errors import ProblemError, SchemaError, UnknownNameError
from moeplan.planner.layers.runs import LayerRun, is_layer_table, predict, read_layer_runs, table_text
from moeplan.planner.overlap_calibration import calibrate_overlap
from tests.conftest import PLAIN, TWO_NODES

SIZES: dict[str, Any] = {"tokens": 4096, "hidden": 2048, "expert_hidden": 1024, "experts": 16, "topk": 2, "gemms": 3}
GROUPS = {"mp": 2, "esp": 2, "ep": 8}


def run(schedule: str, degree: int = 1, direction: Any = "forward", **changes: Any) -> LayerRun:
    name = f"{schedule} {degree} {direction}"
    values = {**SIZES, **GROUPS, "measured_layer_s": 1.0, **changes}
    return LayerRun(id=name, schedule=schedule, degree=degree, direction=direction, **values)


RUNS = [run("hierarchical"), run("fsmoe", 2), run("fsmoe", 4, "backward"), run("tutel", 2), run("baseline"), run("s1")]


def test_a_table_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(table_text(RUNS))
    assert is_layer_table(path) and read_layer_runs(path) == RUNS


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("4096", "many", "line 2, column tokens: 'many' is not a number"),
        ("4096", "0", "line 2, column tokens: 0 is out of range"),
        (",forward,", ",sideways,", "line 2, column direction: 'sideways' is neither"),
        ("tokens", "token", "lacks the column tokens"),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(table_text(RUNS[:1]).replace(old, new, 1))
    with pytest.raises(SchemaError, match=said):
        read_layer_runs(path)


def test_unknown_schedules_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(table_text(RUNS[:1]).replace(",hierarchical,", ",hierarchy,"))
    with pytest.raises(UnknownNameError, match="hierarchical"):
        read_layer_runs(path)


def test_a_chain_by_hand() -> None:
    # PLAIN: rings at 100 GB/s of the part that moves, 1e15 FLOP/s, two domains of 8 with 50 GB/s a NIC between them.
    said = predict(run("hierarchical"), PLAIN)
    slots = 2 * 4096 * 2048 * 2.0
    gathered = slots / 2 * 2
    assert said.tasks["G"] == pytest.approx(gathered / 2 / 100e9) == all_gather_s(PLAIN, gathered, group(PLAIN, 2, 1))
    assert said.tasks["E"] == pytest.approx(2 * 3 * 2 * 4096 * 2048 * 1024 / 2 / 1e15)
    back = predict(run("hierarchical", direction="backward"), PLAIN)
    assert back.tasks["E"] == pytest.approx(2 * said.tasks["E"])
    assert said.makespan_s == said.serial_s == pytest.approx(sum(said.tasks.values()) - said.tasks["R"])


def test_chunks_overlap_and_kappa_lies_between() -> None:
    said = predict(run("fsmoe", 4), TWO_NODES)
    assert said.makespan_s < said.serial_s
    assert said.seconds(0.0) == said.makespan_s and said.seconds(1.0) == pytest.approx(said.serial_s)


def test_gradients_ride_in_the_backward() -> None:
    plain = predict(run("hierarchical", direction="backward"), TWO_NODES)
    carried = predict(run("hierarchical", direction="backward", gradient_bytes=1e8), TWO_NODES)
    assert carried.tasks["R"] > 0.0 == plain.tasks["R"]
    assert carried.makespan_s == pytest.approx(plain.makespan_s + carried.tasks["R"])


def measured(kappa: float, noise: float = 0.0, factor: float = 1.7) -> list[LayerRun]:
    """Rows as a machine with this kappa would give them, all a factor slower than predicted."""
    rng = np.random.default_rng(1)
    out = []
    for direction in ("forward", "backward"):
        asked = [("hierarchical", 1), ("s1", 1), ("fsmoe", 2), ("fsmoe", 4), ("fsmoe", 8), ("tutel", 2), ("tutel", 4)]
        for schedule, degree in asked:
            row = run(schedule, degree, direction)
            took_s = predict(row, TWO_NODES).seconds(kappa) * factor * np.exp(noise * rng.standard_normal())
            out.append(dataclasses.replace(row, measured_layer_s=float(took_s)))
    return out


@pytest.mark.parametrize("kappa", [0.0, 0.12, 0.6, 1.0])
def test_kappa_is_found_again(kappa: float) -> None:
    result = calibrate_overlap(TWO_NODES, measured(kappa))
    assert result.accepted and result.after == pytest.approx(kappa, abs=0.011)
    assert result.profile.overlap_loss == result.after and result.error_after < 0.01 < result.error_before
    assert len(result.profile.calibrated_on) == 1


def test_kappa_that_is_right_stays() -> None:
    result = calibrate_overlap(TWO_NODES, measured(TWO_NODES.overlap_loss))
    assert not result.accepted and result.profile is TWO_NODES


def test_noise_alone_is_no_reason_to_correct() -> None:
    runs = [dataclasses.replace(r, measured_layer_s=np.exp(0.4 * (-1) ** i)) for i, r in enumerate(measured(0.33))]
    result = calibrate_overlap(TWO_NODES, runs)
    assert result.profile is TWO_NODES or result.error_after < result.error_before


def test_rows_without_overlap_say_nothing() -> None:
    with pytest.raises(ProblemError, match="none of the 2 rows overlaps"):
        calibrate_overlap(TWO_NODES, [run("hierarchical"), run("s1")])
