"""Shapes of models: published ones by hand, and laws for every model of the catalog."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.model import Attention, Layer, Model, Moe
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.shapes import TENSOR_PARALLEL, model_shapes
from moeplan.profiles.cases import MODEL_ROWS, AttentionShape, GemmShape, GroupedShape, kernel_cases
from tests.conftest import TINY_LATENT, TINY_MOE

DEEPSEEK, MIXTRAL = model_shapes(load_model("deepseek-v3")), model_shapes(load_model("mixtral-8x7b"))
MODELS = ("deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b")


def test_dense_weights_of_deepseek_v3() -> None:
    """Whole: q_a 7168 -> 1536, q_b 1536 -> 128 x 192, kv_a 7168 -> 512 + 64, kv_b 512 -> 128 x 256, o 128 x 128 -> 7168."""
    whole = {(g.n, g.k) for g in DEEPSEEK.gemms if g.tp == 1}
    assert {(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384), (256, 7168), (129280, 7168)} <= whole
    cut = {(g.n, g.k) for g in DEEPSEEK.gemms if g.tp == 8}
    # Columns are cut in n, rows in k; the replicated q_a, kv_a and router are not cut and do not stand twice.
    assert {(3072, 1536), (4096, 512), (16160, 7168)} <= cut
    assert (7168, 2048) in whole and (7168, 256) in cut, "the shared expert's second weight"
    assert not cut & {(1536, 7168), (576, 7168), (256, 7168)}


def test_experts_of_mixtral() -> None:
    """4096 tokens x 2 of 8 experts: 1024 rows for each of 8 experts of a rank, 8192 where a rank has one."""
    assert set(MIXTRAL.grouped) == {
        GroupedShape(groups=8, m=1024, n=2 * 14336, k=4096),
        GroupedShape(groups=8, m=1024, n=4096, k=14336),
        GroupedShape(groups=1, m=8192, n=2 * 14336, k=4096),
        GroupedShape(groups=1, m=8192, n=4096, k=14336),
    }


def test_attention() -> None:
    assert DEEPSEEK.attentions[0] == AttentionShape(heads=128, kv_heads=128, qk_dim=192, v_dim=128, tp=1)
    assert DEEPSEEK.attentions[0].key == "192/128" and MIXTRAL.attentions[0].key == "128"
    assert [(a.heads, a.kv_heads) for a in MIXTRAL.attentions] == [(32, 8), (16, 4), (8, 2), (4, 1)]
    few = Attention(heads=32, kv_heads=4, head_dim=128, v_head_dim=128)
    model = Model(name="few", hidden=4096, vocab=10, layers=(Layer(blocks=(few,)),))
    assert [(a.heads, a.kv_heads) for a in model_shapes(model).attentions][-1] == (4, 1), "a key head on each of 8 ranks"


def test_what_does_not_divide_is_left_out() -> None:
    odd = Attention(heads=6, kv_heads=3, head_dim=64, v_head_dim=64)
    experts = Moe(experts=12, topk=2, width=64)
    model = Model(name="odd", hidden=96, vocab=1001, layers=(Layer(blocks=(odd, experts)),))
    shapes = model_shapes(model)
    assert [(a.tp, a.heads, a.kv_heads) for a in shapes.attentions] == [(1, 6, 3)], "2 ranks cannot share 3 key heads"
    assert {g.tp for g in shapes.gemms if g.k == 96 and g.n == 1001} == {1}
    assert {g.groups for g in shapes.grouped} == {12}, "8 ranks cannot share 12 experts"


@pytest.mark.parametrize("name", MODELS)
def test_shapes_add_up_to_the_model(name: str) -> None:
    """Weights of the whole model: each distinct layer has its dense weights among the shapes of one rank."""
    model = load_model(name)
    shapes = model_shapes(model)
    whole = {(g.n, g.k) for g in shapes.gemms if g.tp == 1}
    assert len(shapes.gemms) == len({(g.n, g.k) for g in shapes.gemms})
    for gemm in shapes.gemms:
        assert {(gemm.n * gemm.tp, gemm.k), (gemm.n, gemm.k * gemm.tp)} & whole
    routed = {
        shape.groups * shape.n * shape.k for shape in shapes.grouped if shape.groups == max(s.groups for s in shapes.grouped)
    }
    moe_layers = sum(layer.is_moe for layer in model.layers)
    assert moe_layers * sum(routed) == parameter_count(model).routed


@settings(deadline=None)
@given(st.sampled_from([8, 16, 64]), st.sampled_from([1, 2, 4, 8]))
def test_every_rank_computes_its_share_of_the_pairs(experts: int, topk: int) -> None:
    model = Model(name="m", hidden=64, vocab=10, layers=(Layer(blocks=(Moe(experts=experts, topk=topk, width=32),)),))
    for shape in model_shapes(model).grouped:
        assert shape.groups * shape.m == MODEL_ROWS * topk
        assert experts % shape.groups == 0


@pytest.mark.parametrize("model", [TINY_MOE, TINY_LATENT], ids=lambda m: m.name)
def test_cases_are_made_of_them(model: Model) -> None:
    shapes = model_shapes(model)
    assert all(gemm.tp in TENSOR_PARALLEL for gemm in shapes.gemms)
    assert GemmShape(n=model.vocab, k=model.hidden, tp=1) in shapes.gemms
    cases = kernel_cases([shapes], "cpu", 4e9)
    assert {c.op for c in cases if c.tier == 1} == {"gemm", "grouped_gemm", "attention", "attention-backward"}
    assert {shape.key for shape in shapes.attentions} <= {c.key for c in cases if c.op == "attention"}
