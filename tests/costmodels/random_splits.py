"""Pipelines of unequal chunks: any order of a tiny model's layers, cut anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from moeplan.costmodels.layout import RECOMPUTE_MODULES, Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.recompute import format_counts
from moeplan.costmodels.stages import check_split, chunk_letters, format_split


@st.composite
def with_counts(draw: st.DrawFn, split: st.SearchStrategy[tuple[Model, Layout]], *modules: str) -> tuple[Model, Layout]:
    """The same model and layout, recomputing in any number of layers of every chunk."""
    model, layout = draw(split)
    sizes = [chunk.count("t") for chunk in chunk_letters(model, layout.pp, layout.vpp, layout.stages)]
    one = st.integers(0, max(sizes) + 1).map(str)
    each = st.tuples(*(st.integers(0, size) for size in sizes)).map(format_counts)
    recompute = draw(st.sets(st.sampled_from(modules or RECOMPUTE_MODULES), min_size=1, max_size=3), label="recompute")
    counts = draw(st.one_of(one, each), label="counts")
    return model, dataclasses.replace(layout, recompute=tuple(recompute), recompute_layers=counts)


@st.composite
def unequal_splits(draw: st.DrawFn, base: Model, stages: tuple[int, ...], **fixed: Any) -> tuple[Model, Layout]:
    """A model of the layer kinds of `base` and a layout of it over one of `stages`."""
    pp = draw(st.sampled_from(stages), label="pp")
    vpp = draw(st.integers(1, 4), label="vpp") if pp > 1 else 1
    sizes = draw(st.lists(st.integers(0, 4), min_size=pp * vpp, max_size=pp * vpp), label="sizes")
    sizes[0] += not any(sizes)
    kinds = draw(st.lists(st.sampled_from(base.kinds), min_size=sum(sizes), max_size=sum(sizes)), label="kinds")
    model = dataclasses.replace(base, layers=tuple(kinds), vocab=draw(st.sampled_from([8, 1000, 50_000]), label="vocab"))
    chunks = ["t" * size for size in sizes]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "L"
    if model.mtp:
        # on the last virtual stage of a rank, behind all decoder layers
        last = max(c for c, size in enumerate(sizes) if size)
        place = draw(st.integers(max(last, len(chunks) - pp), len(chunks) - 1), label="prediction")
        chunks[place] = chunks[place].removesuffix("L") + "m" * len(model.mtp) + "L" * chunks[place].endswith("L")
    layout = Layout(pp=pp, vpp=vpp, stages=format_split(chunks), **fixed)
    assert check_split(layout.stages, len(model.layers), len(model.mtp), pp, vpp) is None
    return model, layout
