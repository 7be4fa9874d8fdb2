"""Forward and backward apart: together they are what the closed form says of every unit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layer import both_passes, fold, without_experts
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import Model
from moeplan.costmodels.passes import head_passes, unit_passes
from moeplan.costmodels.step import unit_times
from tests.conftest import PLAIN, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of

MODELS = (TINY_DENSE, TINY_MOE, TINY_LATENT)


@settings(deadline=None)
@given(st.sampled_from(MODELS).flatmap(lambda model: st.tuples(st.just(model), layouts_of(model))))
def test_both_passes_are_the_closed_form(given_: tuple[Model, Layout]) -> None:
    model, layouts = given_[0], Layouts.of([given_[1]])
    dense, routed = without_experts(layouts), fold(layouts)
    found = unit_passes(model, TWO_NODES, workload_of(), dense, routed)
    expected = unit_times(model, TWO_NODES, workload_of(), dense, routed)
    assert [unit.name for unit in found] == [unit.name for unit in expected]
    for one, two in zip(found, expected, strict=True):
        for passes, parts in ((one.dense, two.dense), (one.routed, two.routed)):
            assert sum(both_passes(passes).values()) == pytest.approx(sum(parts.values()), rel=1e-12)
            assert set(passes.forward) == set(passes.backward)


def test_the_head_on_paper() -> None:
    layouts = Layouts.of([Layout(micro_batch=2)])
    passes = head_passes(TINY_DENSE, PLAIN, workload_of(), layouts)
    # 512 tokens x 128 x 1024 (1000 padded to 128 x tp), 2 FLOP each at 1e15 FLOP/s; logits of 10 bytes at 1e12 bytes/s
    product, loss = 2 * 512 * 128 * 1024 / 1e15 / PLAIN.sustained_gemm("bf16"), 10 * 512 * 1024 / 1e12
    assert float(passes.forward["output GEMM"][0]) == pytest.approx(product)
    assert float(passes.backward["output GEMM"][0]) == pytest.approx(2 * product)
    assert float(passes.forward["loss"][0]) == pytest.approx(0.6 * loss)
    assert float(passes.backward["loss"][0]) == pytest.approx(0.4 * loss)


def test_recompute_belongs_to_the_backward() -> None:
    rows = [Layout(dispatcher="alltoall"), Layout(dispatcher="alltoall", recompute=("full",))]
    plain, full = (
        unit_passes(TINY_MOE, TWO_NODES, workload_of(), without_experts(one), fold(one))
        for one in (Layouts.of([row]) for row in rows)
    )
    for a, b in zip(plain[:-1], full[:-1], strict=True):  # the head is not recomputed
        for first, second in ((a.dense, b.dense), (a.routed, b.routed)):
            assert sum(first.forward.values()) == pytest.approx(sum(second.forward.values()))
            if first.forward:
                again = np.ravel(second.backward["recompute"])[0]
                assert again > 0 and sum(second.backward.values()) >= sum(first.backward.values()) + 0.99 * again
