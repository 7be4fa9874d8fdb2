"""A plan's MoE layer on fewer ranks: what stays, what shrinks, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import LayoutError, ProblemError
from moeplan.planner.layers.setup import LayerSetup, scaled_layer
from tests.conftest import TINY_DENSE, workload_of

MODEL = load_model("deepseek-v3")
PLAN = Layout(tp=4, cp=1, pp=8, dp=8, ep=32, etp=1, edp=1, micro_batch=2, sequence_parallel=True, dispatcher="alltoall")
WORKLOAD = workload_of(seq_len=4096)


def scaled(ranks: int, layout: Layout = PLAN, **given: int) -> LayerSetup:
    return scaled_layer(MODEL, WORKLOAD, layout, ranks, given)[0]


def test_a_rank_keeps_its_experts_and_its_tokens() -> None:
    setup, remarks = scaled_layer(MODEL, WORKLOAD, PLAN, 8)
    assert (setup.mp, setup.esp, setup.ep, setup.replicas, setup.ranks) == (4, 1, 8, 1, 8)
    # 256 experts over 32 ranks are 8 a rank; 2 sequences of 4096 tokens are a group's.
    assert (setup.experts, setup.topk, setup.tokens, setup.hidden, setup.expert_hidden) == (64, 8, 8192, 7168, 2048)
    assert setup.weight_elements == 8 * 3 * 7168 * 2048
    assert remarks == ["scaled from the plan's 256 GPUs to 8 ranks: ep 32 -> 8, experts 256 -> 64"]


def test_shards_first_then_experts_then_replicas() -> None:
    cut = dataclasses.replace(PLAN, etp=4, ep=8)
    assert [(s.mp, s.esp, s.ep, s.replicas) for s in (scaled(n, cut) for n in (1, 2, 4, 8, 64, 6))] == [
        (1, 1, 1, 1), (2, 2, 1, 1), (4, 4, 1, 1), (4, 4, 2, 1), (4, 4, 8, 2), (2, 2, 1, 3),
    ]  # fmt: skip


def test_few_experts_bound_the_top_k() -> None:
    assert (scaled(1).experts, scaled(1).topk) == (8, 8)
    assert scaled(1, experts=4).topk == 4


def test_given_sizes_count() -> None:
    setup = scaled(8, tokens=100, hidden=64, expert_hidden=32, experts=16, topk=2, mp=2, esp=2, ep=4)
    assert dataclasses.asdict(setup) == {
        "tokens": 100, "hidden": 64, "expert_hidden": 32, "experts": 16, "topk": 2, "gated": True, "mp": 2, "esp": 2, "ep": 4,
        "replicas": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"esp": 3}, "esp = 3 does not divide the 8 ranks"),
        ({"ep": 3}, "ep x esp = 3 x 1 = 3 does not divide"),
        ({"mp": 3}, "mp = 3 does not divide the ep x esp = 8 x 1 = 8"),
        ({"experts": 12}, "ep = 8 does not divide the 12 experts"),
        ({"experts": 8, "topk": 9}, "topk = 9 exceeds the 8 experts"),
        ({"tokens": 0}, "tokens = 0"),
        ({"esp": 8, "expert_hidden": 12}, "esp = 8 does not divide the expert width 12"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        scaled(8, **given)


def test_unknown_sizes_and_dense_models_are_refused() -> None:
    with pytest.raises(ProblemError, match="did you mean 'tokens'"):
        scaled(8, token=1)
    with pytest.raises(ProblemError, match="tiny-dense has no experts"):
        scaled_layer(TINY_DENSE, WORKLOAD, PLAN, 8)
