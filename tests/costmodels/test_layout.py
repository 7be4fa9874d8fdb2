"""Layout: identities, names and codes, columns and back."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layout import (
    DEGREES,
    DISPATCHERS,
    GRAPH_SCOPES,
    RECOMPUTE_MODULES,
    SHARDINGS,
    Layout,
    Layouts,
    mask_of,
    names_of,
)
from moeplan.errors import LayoutError
from tests.conftest import TINY_MOE, layouts_of

QUICK = settings(max_examples=60, deadline=None)
INTEGERS = (
    "tp",
    "cp",
    "pp",
    "vpp",
    "dp",
    "ep",
    "etp",
    "edp",
    "micro_batch",
    "recompute",
    "dispatcher",
    "cuda_graphs",
    "split",
    "schedule",
    "recompute_count",
)

# What the constructor refuses: fields, and what its message must say.
REFUSED = [
    ({"tp": 2}, "tp*cp*dp = 2*1*1 = 2 ranks a stage, etp*ep*edp = 1*1*1 = 1"),
    ({"ep": 4, "edp": 2, "dp": 16}, "= 16 ranks a stage, etp*ep*edp = 1*4*2 = 8"),
    ({"dp": 0, "edp": 0}, "dp=0 must be a whole number of at least 1"),
    ({"pp": -2}, "pp=-2"),
    ({"cp": 2.0, "edp": 2}, "cp=2.0"),
    ({"tp": True}, "tp=True"),
    ({"micro_batch": 0}, "micro_batch=0"),
    ({"recompute": ("attn",)}, "unknown recompute module 'attn'"),
    ({"cuda_graphs": ("core_attn",)}, "unknown CUDA graph scope 'core_attn'"),
    ({"dispatcher": "nccl"}, "unknown dispatcher 'nccl'"),
    ({"sharding": "zero2"}, "unknown sharding 'zero2'"),
    ({"optimizer_offload": 1.5}, "optimizer_offload=1.5"),
    ({"optimizer_offload": -0.1}, "optimizer_offload=-0.1"),
    ({"optimizer_offload": float("nan")}, "optimizer_offload=nan"),
    ({"recompute_layers": "two"}, "'two' does not say how many layers of each chunk recompute"),
]


def code_of(layout):
    """All fields of a layout as the numbers that its columns hold; written apart from `Layouts.of`."""
    return {
        **{name: getattr(layout, name) for name in (*DEGREES, "micro_batch", "optimizer_offload")},
        **{name: getattr(layout, name) for name in ("sequence_parallel", "ep_overlap", "tp_overlap", "dp_overlap")},
        "sharding": SHARDINGS.index(layout.sharding),
        "dispatcher": DISPATCHERS.index(layout.dispatcher),
        "recompute": sum(2 ** RECOMPUTE_MODULES.index(m) for m in layout.recompute),
        "cuda_graphs": sum(2 ** GRAPH_SCOPES.index(m) for m in layout.cuda_graphs),
    }


# ---------------------------------------------------------------- one layout


def test_world_counts_every_rank():
    layout = Layout(tp=2, cp=2, pp=8, dp=16, ep=32, edp=2)
    assert layout.world == 2 * 2 * 16 * 8 == 1 * 32 * 2 * 8
    assert Layout().world == 1


@pytest.mark.parametrize("fields, message", REFUSED, ids=[str(f) for f, _ in REFUSED])
def test_refused(fields, message):
    with pytest.raises(LayoutError) as caught:
        Layout(**fields)
    assert message in str(caught.value)


def test_the_hint_of_differing_grids_can_be_followed():
    with pytest.raises(LayoutError) as caught:
        Layout(tp=2, dp=8, ep=4, etp=2, edp=1)
    assert caught.value.hint == "edp = 16/(etp*ep) must be a whole number"
    assert Layout(tp=2, dp=8, ep=4, etp=2, edp=16 // 8).world == 16


def test_order_and_repetition_of_modules_do_not_matter():
    one = Layout(recompute=("moe_act", "core_attn", "moe_act"), cuda_graphs=("moe_router", "attn"))
    assert one == Layout(recompute=("core_attn", "moe_act"), cuda_graphs=("attn", "moe_router"))
    assert one.recompute == ("core_attn", "moe_act")


@pytest.mark.parametrize(
    "layout, text",
    [
        (Layout(), "1 GPU"),
        (Layout(tp=2, pp=8, vpp=4, dp=16, ep=32), "TP2 PP8 VPP4 DP16 EP32"),
        (Layout(cp=4, etp=2, edp=2), "CP4 ETP2"),
    ],
)
def test_degrees_in_a_line(layout, text):
    assert layout.degrees() == text


@pytest.mark.parametrize(
    "fields, text",
    [
        ({}, "none"),
        ({"recompute_layers": "2"}, "none"),
        ({"recompute": ("mlp", "moe_act")}, "moe_act+mlp"),
        ({"recompute": ("full",), "recompute_layers": "2"}, "full in 2 layers of a chunk"),
        ({"recompute": ("full",), "recompute_layers": "1"}, "full in 1 layer of a chunk"),
        ({"recompute": ("moe",), "recompute_layers": "4*8|0*24"}, "moe in 4*8|0*24 layers"),
    ],
)
def test_recompute_in_a_line(fields, text):
    assert Layout(**fields).recompute_text() == text


@given(rows=st.lists(st.tuples(layouts_of(TINY_MOE), st.sampled_from(["", "0", "2", "1|0*3"])), min_size=1, max_size=6))
@QUICK
def test_recomputed_layers_as_columns_and_back(rows):
    rows = [dataclasses.replace(row, recompute_layers=text) for row, text in rows]
    columns = Layouts.of(rows)
    assert [columns.row(i) for i in range(len(rows))] == rows
    assert columns.take(slice(1, None)).recompute_counts == columns.recompute_counts
    assert [columns.recompute_counts[i] for i in columns.recompute_count] == [row.recompute_layers for row in rows]


@given(mask=st.integers(0, 2 ** len(RECOMPUTE_MODULES) - 1))
@QUICK
def test_masks_and_names_are_inverse(mask):
    names = names_of(mask, RECOMPUTE_MODULES)
    assert mask_of(names, RECOMPUTE_MODULES) == mask_of(reversed(names), RECOMPUTE_MODULES) == mask
    assert len(names) == mask.bit_count()


# ---------------------------------------------------------------- many layouts


@given(rows=st.lists(layouts_of(TINY_MOE), min_size=1, max_size=6))
@QUICK
def test_columns_and_back(rows):
    columns = Layouts.of(rows)
    assert len(columns) == len(rows)
    assert [columns.row(i) for i in range(len(rows))] == rows
    for i, row in enumerate(rows):
        for name, value in code_of(row).items():
            assert getattr(columns, name)[i] == value, name
        assert columns.stages[columns.split[i]] == row.stages


@given(parts=st.lists(st.lists(layouts_of(TINY_MOE), max_size=4), min_size=1, max_size=4))
@QUICK
def test_parts_joined_are_all_of_their_rows(parts):
    joined = Layouts.joined([Layouts.of(part) for part in parts])
    assert [joined.row(i) for i in range(len(joined))] == [row for part in parts for row in part]


def test_columns_of_one_type():
    columns = Layouts.of([Layout(), Layout(tp=2, edp=2, recompute=("full",), stages="EtL")])
    for field in dataclasses.fields(Layouts):
        if field.name not in ("stages", "schedules", "recompute_counts"):
            kind = np.int64 if field.name in (*INTEGERS, "sharding") else np.bool_
            expected = np.float64 if field.name == "optimizer_offload" else kind
            assert getattr(columns, field.name).dtype == expected, field.name
    assert columns.stages == ("", "EtL")


def test_no_layouts_at_all():
    columns = Layouts.of([])
    assert len(columns) == 0
    distinct, of_row = columns.distinct("tp", "pp")
    assert len(distinct) == len(of_row) == 0


def test_questions_about_names():
    columns = Layouts.of(
        [
            Layout(recompute=("moe_act",), cuda_graphs=("attn",), dispatcher="deepep"),
            Layout(recompute=("moe", "full"), dispatcher="alltoall", sharding="fsdp"),
        ]
    )
    assert columns.recomputes("moe_act").tolist() == [True, False]
    assert columns.recomputes("moe").tolist() == columns.recomputes("full").tolist() == [False, True]
    assert columns.graphs("attn").tolist() == [True, False]
    assert columns.dispatches_with("deepep", "hybridep").tolist() == [True, False]
    assert columns.shards_as("fsdp").tolist() == [False, True]


@given(rows=st.lists(layouts_of(TINY_MOE), min_size=2, max_size=6), data=st.data())
@QUICK
def test_taking_rows(rows, data):
    columns = Layouts.of(rows)
    places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))
    taken = columns.take(np.array(places, np.int64))
    assert [taken.row(i) for i in range(len(taken))] == [rows[p] for p in places]
    mask = np.array([p in places for p in range(len(rows))])
    assert [columns.take(mask).row(i) for i in range(mask.sum())] == [r for p, r in enumerate(rows) if p in places]
    assert columns.take(slice(1, None)).row(0) == rows[1]


def test_replacing_a_column():
    columns = Layouts.of([Layout(), Layout(tp=2, edp=2)])
    changed = columns.with_columns(micro_batch=np.array([3, 4]))
    assert [changed.row(i).micro_batch for i in range(2)] == [3, 4]
    assert columns.micro_batch.tolist() == [1, 1]


@given(
    rows=st.lists(layouts_of(TINY_MOE), min_size=1, max_size=8),
    names=st.sets(st.sampled_from([*INTEGERS, "sequence_parallel", "ep_overlap", "sharding"]), min_size=1),
)
@QUICK
def test_distinct_layouts_stand_for_every_row(rows, names):
    columns = Layouts.of(rows)
    distinct, of_row = columns.distinct(*names)
    combinations = list(zip(*(getattr(columns, n).tolist() for n in names), strict=True))
    found = list(zip(*(getattr(distinct, n).tolist() for n in names), strict=True))
    assert [found[place] for place in of_row] == combinations
    assert len(found) == len(set(found)) == len(set(combinations))
    # Every representative is the first row of its kind, all its other columns included.
    firsts = [rows[combinations.index(c)] for c in found]
    assert [distinct.row(i) for i in range(len(distinct))] == firsts


def test_distinct_of_many_sparse_combinations_needs_no_table():
    # 3 columns of 1,000 values each: a table of 1e9 combinations would not do.
    n = 1000
    ramp = np.arange(1, n + 1)
    one = Layouts.of([Layout()] * n)
    columns = one.with_columns(tp=ramp, dp=ramp[::-1].copy(), micro_batch=(ramp * 7) % n + 1)
    twice = columns.take(np.concatenate([np.arange(n), np.arange(n)]))
    distinct, of_row = twice.distinct("tp", "dp", "micro_batch")
    assert len(distinct) == n
    assert distinct.tp[of_row].tolist() == twice.tp.tolist()
    assert distinct.micro_batch[of_row].tolist() == twice.micro_batch.tolist()
