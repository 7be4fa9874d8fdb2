"""Recompute in some layers: its text, and its price against recompute in all layers, in none, and layer by layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layer import layer_time
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import Layer, Mamba, Model
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.recompute import check_counts, format_counts, parse_counts, recomputed_layers
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import LayoutError
from tests.conftest import TINY_DENSE, TINY_LATENT, TINY_MOE, TWO_NODES, neighbours_of, workload_of
from tests.costmodels.random_splits import unequal_splits, with_counts

WORKLOAD = workload_of()
MAMBA_LAYER = Layer(blocks=(Mamba(version=2, inner=128, state=16, heads=8, groups=8),))
HYBRID = dataclasses.replace(TINY_MOE, name="tiny-hybrid", layers=(*TINY_MOE.layers[:2], MAMBA_LAYER) * 2)
WITHOUT_MTP = [TINY_DENSE, TINY_MOE, HYBRID, dataclasses.replace(TINY_LATENT, name="tiny-latent-only", mtp=())]
MODELS = [*WITHOUT_MTP, TINY_LATENT]
FEW = settings(max_examples=8, deadline=None)

# Text and what it says.
TEXTS = [
    ("", None),
    ("0", 0),
    ("2", 2),
    ("4*8|0*24", (4,) * 8 + (0,) * 24),
    ("3|1*2|0", (3, 1, 1, 0)),
    ("4*2", (4, 4)),
    ("5*1", (5,)),
]
NO_TEXTS = ["-1", "2.5", "all", "4*", "*4", "4x8", "4||1", "|4", "4|", "4 * 8", "1234567", "1*2*3", "１"]
# Text, layers of chunks, what is wrong with it (None: nothing).
CHECKS = [
    ("", (3, 2), None),
    ("7", (3, 2), None),
    ("3|2", (3, 2), None),
    ("0*2", (3, 2), None),
    ("3|2|1", (3, 2), "it is of 3 chunks, pp*vpp = 2 are needed"),
    ("3|4", (3, 2), "4 layers of chunk 1 recompute, it has 2"),
]


def counts_of(layout: Layout, model: Model, text: str | None) -> Layout:
    """The layout with other counts; None: the layers of every chunk, written out."""
    sizes = [chunk.count("t") for chunk in chunk_letters(model, layout.pp, layout.vpp, layout.stages)]
    return dataclasses.replace(layout, recompute_layers=format_counts(sizes) if text is None else text)


def price(model: Model, *layouts: Layout, **how: bool) -> Pricing:
    return Pricing(model, TWO_NODES, WORKLOAD, Layouts.of(layouts), **how)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(("text", "said"), TEXTS)
def test_texts(text: str, said: int | tuple[int, ...] | None) -> None:
    assert parse_counts(text) == said


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40))
def test_format_is_the_inverse_of_parse(counts: list[int]) -> None:
    assert parse_counts(format_counts(counts)) == tuple(counts)


@pytest.mark.parametrize("text", NO_TEXTS)
def test_what_is_no_text(text: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse_counts(text)
    assert repr(text)[1:-1] in caught.value.message and "4*8|0*24" in (caught.value.hint or "")


def test_a_text_of_a_million_chunks_is_refused() -> None:
    with pytest.raises(LayoutError, match="more than 100000 chunks"):
        parse_counts("1*999999")


@pytest.mark.parametrize(("text", "layers", "fault"), CHECKS)
def test_checks(text: str, layers: tuple[int, ...], fault: str | None) -> None:
    assert check_counts(text, layers) == fault


def test_no_chunk_recomputes_more_than_it_holds() -> None:
    assert recomputed_layers("2", [3, 1, 0]) == [2, 1, 0]
    assert recomputed_layers("", [3, 1, 0]) == [3, 1, 0]
    assert recomputed_layers("1|1|0", [3, 1, 0]) == [1, 1, 0]
    with pytest.raises(LayoutError, match="is of 2 chunks, there are 3"):
        recomputed_layers("1*2", [3, 1, 0])


# ---------------------------------------------------------------- price


@pytest.mark.parametrize("model", WITHOUT_MTP, ids=lambda m: m.name)
@FEW
@given(data=st.data())
def test_counts_of_all_layers_are_all_layers(model: Model, data: st.DataObject) -> None:
    model, some = data.draw(with_counts(unequal_splits(model, (1, 2, 4), dp=4, edp=4)))
    every, written = counts_of(some, model, ""), counts_of(some, model, None)
    largest = counts_of(some, model, "9")
    costs = [price(model, x, every_rank=True, exact=True) for x in (every, written, largest)]
    times = [dict(cost.step_cost().time.at(0).parts) for cost in costs]
    assert times[1] == times[2] == pytest.approx(times[0], rel=1e-12)
    peaks = [cost.peak_memory() for cost in costs]
    assert peaks[1].total.tolist() == peaks[2].total.tolist()
    # a rank without layers has nothing that recompute brings back
    holds = np.array([any(sizes) for sizes in _sizes_of_ranks(model, every)])
    assert peaks[1].total[holds, 0] == pytest.approx(peaks[0].total[holds, 0], rel=1e-12)
    assert peaks[1]["activations"] == pytest.approx(peaks[0]["activations"], rel=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@FEW
@given(data=st.data())
def test_counts_of_no_layers_are_no_recompute(model: Model, data: st.DataObject) -> None:
    model, some = data.draw(with_counts(unequal_splits(model, (1, 2, 4), dp=4, edp=4)))
    none = dataclasses.replace(some, recompute=(), recompute_layers="")
    for text in ("0", f"0*{some.pp * some.vpp}"):
        one, two = (price(model, x, every_rank=True, exact=True) for x in (none, counts_of(some, model, text)))
        assert dict(two.step_cost().time.at(0).parts) == pytest.approx(dict(one.step_cost().time.at(0).parts), rel=1e-12)
        assert two.peak_memory().total == pytest.approx(one.peak_memory().total, rel=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@FEW
@given(data=st.data())
def test_layers_add_up_one_by_one(model: Model, data: st.DataObject) -> None:
    """Seconds of a micro-batch on every rank: those without recompute, and what each recomputing layer takes more."""
    model, some = data.draw(with_counts(unequal_splits(model, (1, 2, 4), dp=4, edp=4)))
    none = dataclasses.replace(some, recompute=(), recompute_layers="")
    chunks = chunk_letters(model, some.pp, some.vpp, some.stages)
    counts = recomputed_layers(some.recompute_layers, [chunk.count("t") for chunk in chunks])
    expected = price(model, none, every_rank=True).step_cost().stage_s[:, 0].tolist()
    layers = iter(model.layers)
    for c, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
        for layer in [next(layers) for _ in range(chunk.count("t"))][:count]:
            again, once = (layer_time(layer, model, TWO_NODES, WORKLOAD, Layouts.of([x])) for x in (some, none))
            expected[c % some.pp] += float(np.sum(sum(again.values()) - sum(once.values())))
    pricing = price(model, some, every_rank=True)
    assert pricing.step_cost().stage_s[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert pricing.whole_micro_batch_s()[0] == pytest.approx(sum(expected), rel=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@FEW
@given(data=st.data())
def test_more_layers_take_more_time_and_less_memory(model: Model, data: st.DataObject) -> None:
    """One more layer of one chunk; all chunks between none and all."""
    model, some = data.draw(with_counts(unequal_splits(model, (1, 2, 4), dp=4, edp=4)))
    sizes = [chunk.count("t") for chunk in chunk_letters(model, some.pp, some.vpp, some.stages)]
    counts = recomputed_layers(some.recompute_layers, sizes)
    c = data.draw(st.sampled_from([c for c, size in enumerate(sizes) if size]))
    fewer = [min(count, sizes[c] - 1) if c == i else count for i, count in enumerate(counts)]
    more = [count + (c == i) for i, count in enumerate(fewer)]
    texts = ["0", format_counts(fewer), format_counts(more), format_counts(sizes)]
    rows = [counts_of(some, model, text) for text in texts] + [counts_of(some, model, "")]
    pricing = price(model, *rows, every_rank=True, exact=True)
    step, saved = pricing.step_seconds(), pricing.peak_memory()["activations"]
    assert (np.diff(step) >= -1e-12 * step[:-1]).all()
    assert (np.diff(saved, axis=-1) <= 1e-12 * saved[:, :-1]).all()


@pytest.mark.parametrize("model", [TINY_DENSE, TINY_LATENT], ids=lambda m: m.name)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_many_at_once_equal_one_at_a_time(model: Model, data: st.DataObject) -> None:
    rows = []
    for row in data.draw(neighbours_of(model))[:10]:
        chunks = len(chunk_letters(model, row.pp, row.vpp, row.stages))
        text = data.draw(st.sampled_from(["", "", "1", "2", f"0*{chunks}", "|".join(["1", "0"] * chunks)[: 2 * chunks - 1]]))
        rows.append(dataclasses.replace(row, recompute_layers=text))
    together = price(model, *rows, exact=True)
    step, peak, whole = together.step_seconds(), together.peak_bytes(), together.whole_micro_batch_s()
    parts = together.step_cost().time
    for i, row in enumerate(rows):
        alone = price(model, row, exact=True)
        assert step[i] == pytest.approx(alone.step_seconds()[0], rel=1e-12)
        assert peak[i] == pytest.approx(alone.peak_bytes()[0], rel=1e-12)
        assert whole[i] == pytest.approx(alone.whole_micro_batch_s()[0], rel=1e-12)
        assert parts.at(i).parts == pytest.approx(alone.step_cost().time.at(0).parts, rel=1e-12, abs=1e-15)
        assert float(parts.total[i]) == pytest.approx(step[i], rel=1e-12)
        bound = price(model, row).step_seconds()[0]
        assert bound <= step[i] * (1 + 1e-12)


@pytest.mark.parametrize("base", MODELS, ids=lambda m: m.name)
@FEW
@given(data=st.data())
def test_ranks_left_out_change_nothing(base: Model, data: st.DataObject) -> None:
    model, some = data.draw(with_counts(unequal_splits(base, (2, 4), dp=4, edp=4)))
    every, binding = (price(model, some, every_rank=every) for every in (True, False))
    assert binding.step_seconds()[0] == pytest.approx(every.step_seconds()[0], rel=1e-12)
    assert binding.peak_bytes()[0] == pytest.approx(every.peak_bytes()[0], rel=1e-12)


def test_prediction_layers_recompute_only_with_all_layers() -> None:
    layout = Layout(pp=2, dp=8, ep=8, dispatcher="alltoall", recompute=("full",))
    rows = [dataclasses.replace(layout, recompute=(), recompute_layers=""), counts_of(layout, TINY_LATENT, "4"), layout]
    pricing = price(TINY_LATENT, *rows, every_rank=True)
    first, last = pricing.step_cost().stage_s
    assert first[1] == pytest.approx(first[2], rel=1e-12)
    assert last[0] < last[1] < last[2]


def _sizes_of_ranks(model: Model, layout: Layout) -> list[list[int]]:
    """Layers of the chunks of every rank."""
    sizes = [chunk.count("t") for chunk in chunk_letters(model, layout.pp, layout.vpp, layout.stages)]
    return [sizes[rank :: layout.pp] for rank in range(layout.pp)]
