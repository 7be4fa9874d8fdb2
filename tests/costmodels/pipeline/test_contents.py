"""What chunks cost: together the rank's closed form, and named as the model has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import Model
from moeplan.costmodels.pipeline.contents import contents
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import all_ranks
from tests.conftest import TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of


@settings(deadline=None)
@given(st.sampled_from((TINY_DENSE, TINY_MOE, TINY_LATENT)).flatmap(lambda m: st.tuples(st.just(m), layouts_of(m))))
def test_chunks_of_a_rank_are_its_closed_form(given_: tuple[Model, Layout]) -> None:
    model, layout = given_
    pricing = Pricing(model, TWO_NODES, workload_of(), Layouts.of([layout]), every_rank=True)
    found = contents(pricing)
    assert found.dense_s.shape == found.routed_s.shape == (2, layout.pp, layout.vpp)
    rank_s = (found.dense_s + found.routed_s).sum(axis=(0, 2))
    assert rank_s == pytest.approx(pricing.step_cost().stage_s[:, 0], rel=1e-12)
    ranks = all_ranks(model, layout.pp, layout.vpp, layout.stages)
    for r, chunks in enumerate(found.pieces):
        names = [piece.name for chunk in chunks for piece in chunk]
        assert sum(name.startswith("layer ") for name in names) == ranks.kinds[r].sum()
        assert ("head" in names) == bool(ranks.head[r])
        assert sum(name.startswith("prediction ") for name in names) == ranks.mtp[r]


def test_layers_are_named_in_the_order_of_the_model() -> None:
    layout = Layout(pp=2, vpp=2, dp=8, edp=8, dispatcher="alltoall", stages="Ett|t*3|tt|tmL")
    found = contents(Pricing(TINY_LATENT, TWO_NODES, workload_of(), Layouts.of([layout])))
    names = [[[piece.name for piece in chunk] for chunk in rank] for rank in found.pieces]
    assert names == [
        [["layer 0", "layer 1"], ["layer 5", "layer 6"]],
        [["layer 2", "layer 3", "layer 4"], ["layer 7", "prediction 0", "head"]],
    ]
    assert (found.routed_s > 0).all() and (found.saved_bytes > 0).all()
    assert np.all(found.dense_s[1] > found.dense_s[0])
