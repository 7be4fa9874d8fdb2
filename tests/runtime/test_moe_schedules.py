"""MoE layers on 2, 4 and 8 gloo ranks: every schedule gives the dense layer's output and gradients, as it was planned."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.moe.base import MoeSize
from moeplan.costmodels.moe.schedules import find_schedule
from tests.runtime.moe_cases import CASES, Case

LIMIT_S = 600
ROOT = Path(__file__).parent.parent.parent
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BALANCED = pytest.mark.parametrize("case", [case for case in CASES if case.balanced], ids=lambda case: case.name)


@functools.cache
def results(world: int) -> dict[str, list[dict[str, Any]]]:
    """What every rank of a world found, by case; the ranks run once."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-W", "error", "-m", "tests.runtime.moe_worker", str(world), directory]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            _, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, errors
        found: dict[str, list[dict[str, Any]]] = json.loads((Path(directory) / "results.json").read_text())
        return found


def found(case: Case) -> list[dict[str, Any]]:
    return results(case.placement.world)[case.name]


@EACH
def test_equal_to_the_dense_layer(case: Case) -> None:
    for what in ("output", "input gradient", "gate", "inner", "down"):
        assert max(rank[what] for rank in found(case)) <= 1.0, what


@EACH
def test_executed_as_planned(case: Case) -> None:
    groups = case.placement.world // case.placement.mp
    for rank, each in enumerate(found(case)):
        assert each["forward in order"] and each["backward in order"]
        # Task R adds up what it was given over data parallelism; within autograd it is given nothing.
        alone = [float(rank // case.placement.mp), 1.0]
        assert each["carried"] == (alone if case.as_module else [float(sum(range(groups))), float(groups)])


@BALANCED
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_amounts_are_those_of_the_cost_model(case: Case, direction: str) -> None:
    shape, placement = case.shape, case.placement
    token_bytes = 4.0 * case.tokens[0] * shape.hidden
    size = MoeSize(
        token_bytes=token_bytes,
        slot_bytes=shape.topk * token_bytes,
        expert_flop=2.0 * 3 * case.tokens[0] * shape.topk * shape.hidden * shape.expert_hidden,
        mp_ranks=placement.mp,
        esp_ranks=placement.esp,
        ep_ranks=placement.ep,
    )
    expected = dict(find_schedule(case.schedule).amounts(size, direction))
    # Three fp32 numbers and four more, in the backward only.
    expected["R"] = 28.0 if direction == "backward" else 0.0
    for rank in found(case):
        counted = dict.fromkeys(expected, 0.0)
        for name, amount in rank[f"{direction} amounts"].items():
            kind = name.rstrip("0123456789")
            if kind != "N":
                counted[kind] += amount
        assert counted == expected


def test_every_chunk_moves_its_part() -> None:
    case = next(case for case in CASES if case.balanced and case.schedule == "fsmoe")
    for rank in found(case):
        for direction, degree in zip(("forward", "backward"), case.degrees, strict=True):
            for kind in "DGESC":
                amounts = rank[f"{direction} amounts"]
                assert len({amounts[f"{kind}{i}"] for i in range(1, degree + 1)}) == 1
                assert f"{kind}{degree + 1}" not in amounts
