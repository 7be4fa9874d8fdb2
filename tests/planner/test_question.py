"""A question in words becomes a problem, whichever way its machine is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeplan.errors import MoeplanError, UsageError
from moeplan.planner.question import Question, problem_of
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.units import GIB


def question(**changes: Any) -> Question:
    return Question(**{"model": "mixtral-8x7b-4l-proxy", "cluster": "h100x8", "global_batch": 16, "seq_len": 4096, **changes})


def silent(text: str) -> None:
    raise AssertionError(text)


def test_the_words_become_values() -> None:
    asked = question(
        gradients="bf16", imbalance=1.5, memory_limit="70GiB", price_per_gpu_hour=2.0, pin=("tp=2",), forbid=("ep>4",)
    )
    problem = problem_of(asked, silent)
    workload = problem.workload
    assert (workload.gradient_bytes, workload.moment_bytes, workload.imbalance) == (2, 4, 1.5)
    assert problem.memory_limit_bytes == 70 * GIB and problem.profile.cluster.price_per_gpu_hour == 2.0
    assert [c.text for c in problem.pins] == ["tp=2"] and [c.text for c in problem.forbidden] == ["ep>4"]


def test_one_machine_in_four_ways(tmp_path: Path) -> None:
    profile = nominal(load_cluster("h100x64"))
    profile.save(tmp_path / "ours.yaml")
    ours = str(tmp_path / "ours.yaml")
    ways = [{"cluster": "h100x16"}, {"cluster": "h100x64", "gpus": 16}, {"cluster": "", "device": "H100", "gpus": 16}]
    ways += [{"cluster": "", "profile": ours, "gpus": 16}, {"cluster": "h100x16", "profile": ours}]
    clusters = [problem_of(question(**way), silent).profile.cluster for way in ways]
    assert all((c.gpus, c.device, c.gpus_per_node) == (16, clusters[0].device, 8) for c in clusters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": ""}, "no machine"),
        ({"device": "h100", "gpus": 8}, "device 'h100' beside a cluster"),
        ({"cluster": "", "device": "h100"}, "device 'h100' without gpus"),
        ({"gpus": -8}, "gpus=-8 is not a count"),
    ],
)
def test_machines_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        question(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price_per_gpu_hour": float("nan")}, "a price of 0 or more"),
        ({"memory_limit": "0GiB"}, "leaves no memory"),
        ({"era": "nope"}, "unknown era 'nope'"),
        ({"model": "llama3-8b", "imbalance": 2.0}, "llama3-8b has no experts"),
    ],
)
def test_values_without_meaning(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeplanError, match=message):
        problem_of(question(**changes), silent)


def test_remarks_are_said() -> None:
    said: list[str] = []
    assert problem_of(question(no_mtp=True, memory_limit="900GiB"), said.append).memory_limit_bytes == 0
    assert "no prediction layers" in said[0] and "more than the" in said[1] and len(said) == 2
