"""A simulated step beside its prices: equal where these are exact, on the right side elsewhere; memory to the byte."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.timeline import BACKWARD, StepTimeline, fullest_loads, step_timeline
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.errors import LayoutError, MoeplanError
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import NODE, TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, layouts_of, workload_of
from tests.costmodels.random_splits import unequal_splits, with_counts

MODELS = st.sampled_from((TINY_DENSE, TINY_MOE, TINY_LATENT))
PLAIN_1F1B = Layout(pp=4, dp=4, ep=4, dispatcher="alltoall")


def layouts(**fixed: Any) -> Any:
    """A tiny model and any layout of it."""
    return MODELS.flatmap(lambda model: st.tuples(st.just(model), layouts_of(model, **fixed)))


def timeline_of(model: Model, layout: Layout, batch: int = 128, **more: Any) -> StepTimeline:
    return step_timeline(model, TWO_NODES, workload_of(global_batch=batch), layout, **more)


def model_peaks(model: Model, workload: Workload, layout: Layout, profile: Any = TWO_NODES) -> Any:
    """Peak of every rank by the memory model."""
    return Pricing(model, profile, workload, Layouts.of([layout]), every_rank=True).peak_memory().total[:, 0]


@settings(deadline=None)
@given(layouts(pp=1))
def test_one_stage_is_the_closed_form(given_: tuple[Model, Layout]) -> None:
    timeline = timeline_of(*given_)
    assert timeline.step_s == pytest.approx(timeline.priced_s, rel=1e-12)
    assert timeline.bubble_share == pytest.approx(0.0, abs=1e-12) and timeline.schedule == "1f1b"


@settings(deadline=None)
@given(layouts(), st.sampled_from([64, 128]))
def test_closed_form_bounds_1f1b_from_above(given_: tuple[Model, Layout], batch: int) -> None:
    model, layout = given_
    # without overlap of the gradients' exchange, which a stage that is not the slowest hides less of than the closed form says
    layout = dataclasses.replace(layout, vpp=1, stages="", dp_overlap=False)
    timeline = timeline_of(model, layout, batch)
    passes = timeline.passes
    if timeline.send_s > 0.5 * float((passes.end_s - passes.start_s).min()):
        return  # a busy link
    assert timeline.step_s <= timeline.priced_s * (1 + 1e-12)
    assert timeline.step_s >= timeline.batches * float(
        (timeline.contents.dense_s + timeline.contents.routed_s).sum((0, 2)).max()
    )


def test_equal_stages_are_the_closed_form() -> None:
    """Sixteen equal layers on four ranks, the head made light; what is left of the difference is the head's."""
    model = dataclasses.replace(TINY_DENSE, hidden=1024, vocab=8, layers=TINY_DENSE.layers * 2)
    for vpp, stages in ((1, ""), (2, ""), (4, "")):
        layout = Layout(pp=4, vpp=vpp, dp=4, edp=4, stages=stages)
        timeline = step_timeline(model, TWO_NODES, workload_of(seq_len=8192), layout)
        assert timeline.step_s == pytest.approx(timeline.priced_s, rel=2e-3), vpp


def test_unequal_chunks_of_equal_ranks_wait() -> None:
    """Ranks of equal sums whose first chunks are light, their last heavy: the price knows it as the simulation does."""
    model = dataclasses.replace(TINY_DENSE, hidden=1024, vocab=8, layers=TINY_DENSE.layers * 2)
    even = Layout(pp=4, vpp=2, dp=4, edp=4)
    uneven = dataclasses.replace(even, stages="Et|(t|)*3(t*3|)*3t*3L")
    one, two = (step_timeline(model, TWO_NODES, workload_of(seq_len=8192), x) for x in (even, uneven))
    assert two.priced_s == pytest.approx(two.step_s, rel=2e-3)
    assert two.step_s > 1.05 * one.step_s


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([64, 128]), st.sampled_from([2, 4]))
def test_peak_is_that_of_the_memory_model(given_: tuple[Model, Layout], batch: int, gradient_bytes: int) -> None:
    model, layout = given_
    workload = workload_of(global_batch=batch, gradient_bytes=gradient_bytes)
    timeline = step_timeline(model, TWO_NODES, workload, layout)
    assert timeline.peak_bytes == pytest.approx(model_peaks(model, workload, layout), rel=1e-12)


@settings(deadline=None)
@given(
    MODELS.flatmap(lambda model: unequal_splits(model, (1, 2, 3, 4, 5), dp=1)),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from([2, 4]),
    st.sampled_from(["latest", "llm-foundry"]),
)
def test_peak_of_unequal_chunks(given_: tuple[Model, Layout], rounds: int, gradient_bytes: int, era: str) -> None:
    """A rank of unequal chunks may be fullest long after its first backward; PyTorch's loss stands beside its working set."""
    model, layout = given_
    workload = workload_of(global_batch=rounds * layout.pp, gradient_bytes=gradient_bytes, era=load_era(era))
    timeline, expected = step_timeline(model, NODE, workload, layout), model_peaks(model, workload, layout, NODE)
    assert timeline.peak_bytes == pytest.approx(expected, rel=1e-12)
    binding = Pricing(model, NODE, workload, Layouts.of([layout]))
    assert binding.peak_bytes()[0] == pytest.approx(expected.max(), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    with_counts(MODELS.flatmap(lambda model: unequal_splits(model, (1, 2, 3, 4, 5), dp=1))),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from([2, 4]),
)
def test_recompute_of_some_layers(given_: tuple[Model, Layout], rounds: int, gradient_bytes: int) -> None:
    """Passes, their bytes and what they sum to are those of the price, whichever layers recompute."""
    model, layout = given_
    workload = workload_of(global_batch=rounds * layout.pp, gradient_bytes=gradient_bytes)
    timeline, layouts = step_timeline(model, NODE, workload, layout), Layouts.of([layout])
    assert timeline.peak_bytes == pytest.approx(model_peaks(model, workload, layout, NODE), rel=1e-12)
    pricing = Pricing(model, NODE, workload, layouts, every_rank=True)
    rank_s = (timeline.contents.dense_s + timeline.contents.routed_s).sum(axis=(0, 2))
    assert rank_s == pytest.approx(pricing.step_cost().stage_s[:, 0], rel=1e-12)


@pytest.mark.parametrize(
    ("vpp", "counts"), [(1, "2"), (1, "4*2|0*2"), (1, "0*2|4*2"), (2, "1"), (2, "2*4|0*4"), (2, "0|2|1*6")]
)
def test_recompute_of_some_layers_takes_as_long_as_priced(vpp: int, counts: str) -> None:
    model = dataclasses.replace(TINY_DENSE, hidden=1024, vocab=8, layers=TINY_DENSE.layers * 2)
    layout = Layout(pp=4, vpp=vpp, dp=4, edp=4, recompute=("full",), recompute_layers=counts)
    none, every = (dataclasses.replace(layout, recompute=r, recompute_layers="") for r in ((), ("full",)))
    some = step_timeline(model, TWO_NODES, workload_of(seq_len=8192), layout)
    assert some.step_s == pytest.approx(some.priced_s, rel=2e-3)
    low, high = (step_timeline(model, TWO_NODES, workload_of(seq_len=8192), x).step_s for x in (none, every))
    assert 1.01 * low < some.step_s <= high


CATALOG: list[tuple[str, str, int, int, Layout]] = [
    ("mixtral-8x7b", "h100x64", 256, 4096, Layout(pp=4, vpp=2, dp=16, ep=8, edp=2, dispatcher="alltoall")),
    ("mixtral-8x7b", "h100x64", 256, 4096, Layout(pp=4, dp=16, ep=8, edp=2, dispatcher="alltoall", stages="Et*7|t*9|t*9|t*7L")),
    ("deepseek-v3", "h100x256", 2048, 4096, Layout(
        pp=8, dp=32, ep=32, dispatcher="deepep", recompute=("mla_up_proj",), stages="Et*8|(t*8|)*6t*5mL")),
    ("deepseek-v3", "h100x256", 1024, 4096, Layout(pp=16, vpp=2, dp=16, ep=16, dispatcher="deepep",
        stages="Et|(t|)*15(t*3|)*15mL")),
    ("deepseek-v3", "h100x256", 1024, 4096, Layout(pp=8, vpp=4, dp=32, ep=32, dispatcher="deepep",
        stages="Et*3|(tt|)*29m|L")),
    ("qwen3-235b-a22b", "h100x256", 1024, 4096, Layout(
        tp=2, pp=8, dp=16, ep=32, sequence_parallel=True, dispatcher="alltoall", stages="Et*11|(t*12|)*6t*11L")),
    ("deepseek-v3", "h100x256", 1024, 4096, Layout(pp=8, vpp=4, dp=32, ep=32, dispatcher="deepep",
        stages="Et*3|(tt|)*29m|L", recompute=("full",), recompute_layers="1")),
    ("llama-3.1-405b", "h100x512", 512, 8192, Layout(tp=8, pp=16, vpp=7, cp=2, dp=2, edp=32, sequence_parallel=True,
        stages="Et|(t|)*96(tt|)*14tL")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cluster", "batch", "seq", "layout"),
    CATALOG,
    ids=[f"{c[0]}-vpp{c[4].vpp}-{c[4].recompute_layers}" for c in CATALOG],
)
def test_catalog_models(name: str, cluster: str, batch: int, seq: int, layout: Layout) -> None:
    model, profile = load_model(name), nominal(load_cluster(cluster))
    workload = Workload(seq_len=seq, global_batch=batch, precision=load_precision("bf16"), era=load_era("latest"))
    timeline = step_timeline(model, profile, workload, layout)
    assert timeline.peak_bytes == pytest.approx(model_peaks(model, workload, layout, profile), rel=1e-12)
    assert timeline.step_s == pytest.approx(timeline.priced_s, rel=5e-3)


@settings(deadline=None)
@given(layouts())
def test_memory_comes_and_goes(given_: tuple[Model, Layout]) -> None:
    timeline = timeline_of(*given_)
    for rank in range(timeline.ranks):
        times, held = timeline.memory(rank)
        assert held[0] == held[-1] == timeline.held.base[rank] and (held >= timeline.held.base[rank] * (1 - 1e-12)).all()
        assert (np.diff(times) >= 0).all() and times[-1] == timeline.step_s


@settings(deadline=None)
@given(layouts(), st.data())
def test_monotone_in_slow(given_: tuple[Model, Layout], data: st.DataObject) -> None:
    model, layout = given_
    rank = data.draw(st.integers(0, layout.pp - 1))
    factors = sorted(data.draw(st.lists(st.floats(0.5, 3.0), min_size=2, max_size=2)))
    one, two = (timeline_of(model, layout, slow={rank: factor}) for factor in factors)
    assert one.step_s <= two.step_s * (1 + 1e-12)
    assert timeline_of(model, layout, slow={rank: 1.0}).step_s == timeline_of(model, layout).step_s


def test_a_slow_stage_decides() -> None:
    plain, slow = timeline_of(TINY_MOE, PLAIN_1F1B), timeline_of(TINY_MOE, PLAIN_1F1B, slow={2: 2.0})
    assert slow.busiest == 2 and slow.busy_s[2] > 1.9 * plain.busy_s[2] and slow.bubble_share > plain.bubble_share
    assert (slow.peak_bytes == plain.peak_bytes).all()


def test_spread_loads() -> None:
    plain = timeline_of(TINY_MOE, PLAIN_1F1B)
    first, again, other = (timeline_of(TINY_MOE, PLAIN_1F1B, load_spread=0.3, seed=s) for s in (1, 1, 2))
    assert plain.step_s < first.step_s == again.step_s != other.step_s
    assert (plain.loads == 1.0).all() and (first.loads > 1.0).all() and (first.loads <= 4.0).all()
    assert timeline_of(TINY_MOE, PLAIN_1F1B, load_spread=0.6, seed=1).step_s > first.step_s
    assert timeline_of(TINY_DENSE, Layout(pp=4, dp=4, edp=4), load_spread=0.3).step_s == pytest.approx(
        timeline_of(TINY_DENSE, Layout(pp=4, dp=4, edp=4)).step_s
    )


def test_spread_loads_keep_their_sum() -> None:
    assert (fullest_loads(dataclasses.replace(PLAIN_1F1B, ep=1, edp=4), 8, 0.5, 0) == 1.0).all()
    loads = fullest_loads(PLAIN_1F1B, 2000, 0.3, 0)
    assert loads.shape == (4, 1, 2000)
    # The fullest of four log-normal loads: about exp(0.3 x 1.03), less what dividing by their mean takes
    assert 1.25 < loads.mean() < 1.45


def test_only_experts_grow_with_their_loads() -> None:
    layout = Layout(pp=4, dp=4, ep=4, dispatcher="alltoall", stages="Ettt|tt|tt|tL")
    plain, spread = timeline_of(TINY_MOE, layout), timeline_of(TINY_MOE, layout, load_spread=0.3)
    passes, inside = spread.passes, spread.contents
    for i in (0, 5, -1):
        rank, way = passes.rank[i], passes.kind[i]
        more = inside.routed_s[way, rank, 0] * (spread.loads[rank, 0, passes.batch[i]] - 1.0)
        length = passes.end_s[i] - passes.start_s[i]
        assert length == pytest.approx(plain.passes.end_s[i] - plain.passes.start_s[i] + more)
    assert (plain.passes.kind[plain.passes.of_rank(3)] == BACKWARD).sum() == plain.batches


def test_idle_and_busy_are_the_whole_step() -> None:
    timeline = timeline_of(TINY_MOE, PLAIN_1F1B)
    frame = timeline.frame
    parts = timeline.busy_s + timeline.idle_s + frame.gather_s + frame.scatter_s + frame.optimizer_s
    assert parts + 0.03 == pytest.approx(timeline.step_s) and (timeline.idle_s > -1e-12).all()


@pytest.mark.parametrize(
    ("layout", "batch", "more", "message"),
    [
        (PLAIN_1F1B, 128, {"slow": {4: 1.2}}, "stage 4 cannot be slow: the plan has 4 pipeline stages, 0 to 3"),
        (PLAIN_1F1B, 128, {"slow": {-1: 1.2}}, "stage -1 cannot be slow"),
        (PLAIN_1F1B, 128, {"slow": {1: 0.0}}, "stage 1 cannot be 0 times as slow"),
        (PLAIN_1F1B, 128, {"slow": {1: float("nan")}}, "stage 1 cannot be nan times as slow"),
        (PLAIN_1F1B, 128, {"slow": {1: float("inf")}}, "stage 1 cannot be inf times as slow"),
        (PLAIN_1F1B, 128, {"load_spread": -0.1}, "a load spread of -0.1 is not between 0 and 10"),
        (PLAIN_1F1B, 128, {"load_spread": float("nan")}, "a load spread of nan"),
        (PLAIN_1F1B, 6, {}, "global batch 6 is not a multiple of micro_batch\\*dp = 4"),
        (PLAIN_1F1B, 4_000_000, {}, "1000000 micro-batches on 4 stages of 1 chunks are 8000000 passes, more than the 4000000"),
        (dataclasses.replace(PLAIN_1F1B, vpp=2), 8, {}, "2 micro-batches do not fill one group of 4"),
    ],
)  # fmt: skip
def test_refusals(layout: Layout, batch: int, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeplanError, match=message):
        timeline_of(TINY_MOE, layout, batch, **more)


def test_a_refused_size_names_a_way_out() -> None:
    with pytest.raises(LayoutError) as caught:
        timeline_of(TINY_MOE, PLAIN_1F1B, 4_000_000)
    assert caught.value.hint == "simulate a smaller global batch: the steady state repeats itself"
