"""What ranks hold: against the memory model, by hand, and refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import rank_parameters, state_bytes, unit_parameters
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import all_ranks
from moeplan.costmodels.workload import load_era, load_precision
from moeplan.errors import LayoutError
from moeplan.planner.elastic.holdings import holdings
from moeplan.profiles.hardware import load_device
from tests.conftest import TINY_DENSE, TINY_LATENT, TINY_MOE, layouts_of, workload_of

WORKLOAD, H100 = workload_of(), load_device("H100")
# No padding under any tp up to 16.
FULL = [dataclasses.replace(m, vocab=2048) for m in (TINY_DENSE, TINY_MOE, TINY_LATENT)]
TIED = [dataclasses.replace(m, name=f"{m.name}-tied", tied=True) for m in FULL]


def priced(model, layout, workload=WORKLOAD):
    """Bytes of weights and states of a rank of each stage as the memory model has them, second copies of a matrix taken off."""
    columns = Layouts.of([layout])
    ranks = all_ranks(model, layout.pp, layout.vpp, layout.stages)
    states = state_bytes(model, H100, workload, columns)
    parts = states.of(rank_parameters(model, ranks, unit_parameters(model, columns)))
    both = ranks.embedding * ranks.head if model.tied else 0.0
    matrices = ranks.copies + ((ranks.head - both) if model.tied else 0.0)
    second = np.maximum(matrices - 1, 0) * model.vocab * model.hidden / layout.tp
    each = states.dense["weights"] + states.dense["optimizer states"]
    return (parts["weights"] + parts["optimizer states"])[:, 0] - second * each


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_holdings_equal_the_memory_model(data):
    model = data.draw(st.sampled_from(FULL + TIED))
    layout = data.draw(layouts_of(model, optimizer_offload=0.0))
    era = data.draw(st.sampled_from([WORKLOAD.era, load_era("latest")]))
    workload = dataclasses.replace(WORKLOAD, era=era, moment_bytes=data.draw(st.sampled_from([2, 4])))
    found = holdings(model, workload, layout)
    wanted = np.repeat(priced(model, layout, workload), found.positions)
    assert found.rank_bytes() == pytest.approx(wanted)


@pytest.mark.parametrize("name, layout", [
    ("deepseek-v3", Layout(pp=8, vpp=4, dp=32, ep=32, stages="Et*3|(tt|)*29m|L", dispatcher="alltoall")),
    ("mixtral-8x7b", Layout(tp=2, pp=4, dp=8, ep=8, edp=2, dispatcher="alltoall")),
    ("gpt-3-175b", Layout(tp=8, pp=8, dp=4, edp=32)),
    ("jamba-v0.1", Layout(tp=4, pp=4, dp=4, ep=4, edp=4)),
])  # fmt: skip
def test_catalog_models_equal_the_memory_model_but_for_padding(name, layout):
    model = load_model(name)
    found = holdings(model, WORKLOAD, layout)
    by_stage = found.rank_bytes().reshape(layout.pp, -1)
    real = dataclasses.replace(model, vocab=model.vocab // (128 * layout.tp) * 128 * layout.tp)
    if real.vocab == model.vocab:
        assert by_stage == pytest.approx(np.repeat(priced(model, layout)[:, None], found.positions, axis=1))
    else:
        # The last tensor-parallel rank has less of the vocabulary than a padded share.
        assert (by_stage <= priced(model, layout)[:, None] * (1 + 1e-12)).all()
        padding = -model.vocab % (128 * layout.tp) * model.hidden
        ends = sum(by_stage.sum(axis=1) < priced(model, layout) * found.positions * (1 - 1e-12))
        missing = (priced(model, layout) * found.positions - by_stage.sum(axis=1)).sum()
        assert missing == pytest.approx(ends * padding * (2 * layout.dp * layout.cp + 12))


def test_bytes_by_hand():
    # 2 bytes of weights and 12 of states for each parameter.
    model = FULL[0]
    one = holdings(model, WORKLOAD, Layout()).rank_bytes()
    assert one.tolist() == [14 * parameter_count(model).total]
    eight = holdings(model, WORKLOAD, Layout(dp=8, edp=8)).rank_bytes()
    assert eight == pytest.approx(np.full(8, one[0] / 14 * (2 + 12 / 8)))
    two = holdings(model, WORKLOAD, Layout(dp=8, edp=8), instances=2).rank_bytes()
    assert two == pytest.approx(np.full(8, one[0] / 14 * (2 + 12 / 4)))
    sharded = holdings(model, WORKLOAD, Layout(dp=8, edp=8, sharding="fsdp")).rank_bytes()
    assert sharded == pytest.approx(np.full(8, one[0] / 8))


def test_quantised_weights_move_as_they_are():
    model = FULL[0]
    bf16, fp8 = (holdings(model, workload_of(precision=load_precision(p)), Layout()) for p in ("bf16", "fp8-cs"))
    ends = 2 * model.vocab * model.hidden
    elements = bf16.rank_bytes()[0] / 14
    assert fp8.rank_bytes()[0] == 13 * elements + ends  # a byte less, but for embedding and head


def test_replicas_must_divide():
    with pytest.raises(LayoutError, match=r"3 optimizer replicas do not divide the dp\*cp = 8 ranks"):
        holdings(FULL[0], WORKLOAD, Layout(dp=8, edp=8), instances=3)
    with pytest.raises(LayoutError, match=r"4 optimizer replicas do not divide the edp = 2 ranks with the same experts"):
        holdings(FULL[1], WORKLOAD, Layout(dp=8, ep=4, edp=2), instances=4)
