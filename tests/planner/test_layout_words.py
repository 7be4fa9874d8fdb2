"""Differences of layouts in words."""

from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.planner.layout_words import differences, recomputing
from moeplan.planner.plan import Plan, price_plan
from tests.planner import tiny

PROBLEM = tiny.problem(tiny.MIXED, "h100x4", era="hybridep-2025")
BASE: dict[str, Any] = {"dp": 4, "ep": 2, "edp": 2, "dispatcher": "deepep", "recompute": ("moe_act", "layernorm")}


def plan(**changed: Any) -> Plan:
    return price_plan(PROBLEM, Layout(**BASE | changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"ep": 4, "edp": 1}, ["EP 4 instead of 2"]),
        ({"pp": 2, "dp": 2, "edp": 1}, ["PP 2 instead of 1"]),
        ({"tp": 2, "dp": 2, "sequence_parallel": True}, ["TP 2 instead of 1"]),
        ({"tp": 2, "pp": 2, "dp": 1, "ep": 1, "edp": 2}, ["TP2 PP2 instead of DP4 EP2"]),
        ({"recompute": ()}, ["recompute off"]),
        ({"recompute": ("layernorm",)}, ["no recompute of moe_act"]),
        ({"recompute": ("moe_act", "layernorm", "mlp")}, ["recompute of mlp too"]),
        ({"recompute": ("moe",)}, ["recompute moe instead of moe_act + layernorm"]),
        ({"recompute_layers": "3"}, ["recompute in 3 layers instead of 4"]),
        ({"recompute_layers": "0"}, ["recompute off"]),
        ({"micro_batch": 2}, ["micro-batch 2 instead of 1"]),
        ({"dispatcher": "hybridep", "ep_overlap": True}, ["dispatcher hybridep instead of deepep", "expert overlap on"]),
        ({"cuda_graphs": ("attn",)}, ["CUDA graphs over attn instead of nothing"]),
        ({"optimizer_offload": 0.5}, ["offloaded share of the optimizer 0.5 instead of 0"]),
        ({"sharding": "fsdp"}, ["sharding fsdp instead of optimizer"]),
    ],
)
def test_one_respect(changed: dict[str, Any], words: list[str]) -> None:
    assert [str(d) for d in differences(plan(), plan(**changed))] == words


PIPED = {"pp": 2, "dp": 2, "edp": 1}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("", "2|0", ["recompute off on stage 1"]),
        ("", "0|2", ["recompute off on stage 0"]),
        ("2|0", "0|2", ["recompute off on stage 0"]),
        ("2|0", "", ["recompute in 4 layers instead of 2"]),
        ("2", "", []),
        ("2|1", "1|2", ["recompute on other stages"]),
        ("0", "1", ["recompute moe_act + layernorm in 2 of 4 layers"]),
    ],
)
def test_layers_that_recompute(before: str, after: str, words: list[str]) -> None:
    plans = [plan(**PIPED, recompute_layers=text) for text in (before, after)]
    assert [str(d) for d in differences(*plans)] == words


def test_runs_of_stages() -> None:
    problem = tiny.problem(tiny.DENSE, "h100x4")
    plans = [price_plan(problem, Layout(pp=4, recompute=("mlp",), recompute_layers=t)) for t in ("", "0*2|1|0")]
    assert [str(d) for d in differences(*plans)] == ["recompute off on stages 0-1, 3"]
    assert [recomputing(p) for p in plans] == [[1, 1, 1, 1], [0, 0, 1, 0]]


def test_another_split() -> None:
    problem = tiny.problem(tiny.DENSE, "h100x4")
    plans = [price_plan(problem, Layout(pp=2, dp=2, edp=2, stages=text)) for text in ("Ett|ttL", "Ettt|tL")]
    assert [str(d) for d in differences(*plans)] == ["another split of the layers"]
