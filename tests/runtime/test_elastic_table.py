"""The table of layouts by node count, as a training script reads it."""

from __future__ import annotations

import json

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.errors import DeviceError, FileError, LayoutError, SchemaError
from moeplan.runtime.elastic_table import load_table

COUNT = {"nodes": 4, "uses": 4, "pi": 0.9, "layout": {"tp": 1, "pp": 2, "dp": 4, "ep": 2, "stages": [3, 1]}}
COUNT |= {"ckpt_interval_steps": 7, "step_s": 1.5, "args": []}


def written(path, *changes, **top):
    counts = [{**COUNT, **change} for change in changes]
    path.write_text(json.dumps({"schema": "moeplan.elastic/1", "global_batch": 16, "counts": counts, **top}))
    return path


def test_counts_and_layouts(tmp_path):
    table = load_table(written(tmp_path / "e.json", {}, {"nodes": 2, "layout": {"dp": 4, "ep": 4, "micro_batch": 2}}))
    assert [count.nodes for count in table.counts] == [2, 4] and table.global_batch == 16
    four = table.at(4)
    assert four.layout == Layout(pp=2, dp=4, ep=2, edp=2) and four.save_steps == 7
    assert [four.layers_of(stage, 4) for stage in (0, 1)] == [range(0, 3), range(3, 4)]
    assert table.at(2).layout == Layout(dp=4, ep=4, micro_batch=2)


def test_a_count_between_takes_the_smaller_one(tmp_path):
    table = load_table(written(tmp_path / "e.json", {}, {"nodes": 2}))
    assert [table.at(n).nodes for n in (2, 3, 4, 9)] == [2, 2, 4, 4]
    with pytest.raises(DeviceError, match=r"1 nodes are not a planned count \(planned are 2, 4\)"):
        table.at(1)


def test_stages(tmp_path):
    even = load_table(written(tmp_path / "e.json", {"layout": {"pp": 2}})).at(4)
    assert [even.layers_of(stage, 6) for stage in (0, 1)] == [range(0, 3), range(3, 6)]
    with pytest.raises(LayoutError, match="pp=2 does not divide 5 layers"):
        even.layers_of(0, 5)
    with pytest.raises(LayoutError, match=r"stages \[3, 1\] are not 2 stages with 6 layers"):
        load_table(written(tmp_path / "e.json", {})).at(4).layers_of(0, 6)


@pytest.mark.parametrize(
    "change, top, message",
    [
        ({}, {"schema": "moeplan.plan/1"}, "schema is 'moeplan.plan/1', 'moeplan.elastic/1' is needed"),
        ({}, {"counts": {}}, "'counts' is not a list"),
        ({}, {"counts": [3]}, "count 1: a mapping is needed"),
        ({}, {"global_batch": 0}, "global_batch is 0, a whole number from 1"),
        ({"nodes": True}, {}, "count 1: nodes is True"),
        ({"layout": {"dp": 2.5}}, {}, "count 1: layout: dp is 2.5"),
        ({"layout": {"stages": "E|t"}}, {}, "stages is 'E|t', a list"),
        ({"ckpt_interval_steps": -1}, {}, "ckpt_interval_steps is -1"),
    ],
)
def test_what_is_no_table(tmp_path, change, top, message):
    with pytest.raises(SchemaError, match=message):
        load_table(written(tmp_path / "e.json", change, **top))


def test_layouts_that_cannot_be(tmp_path):
    with pytest.raises(LayoutError, match=r"dp\*micro_batch = 3\*2 does not divide the 16.*lost or repeated"):
        load_table(written(tmp_path / "e.json", {"layout": {"dp": 3, "micro_batch": 2}}))
    with pytest.raises(LayoutError, match="dense and expert grids differ"):
        load_table(written(tmp_path / "e.json", {"layout": {"dp": 4, "ep": 3}}))
    with pytest.raises(LayoutError, match="0 node counts"):
        load_table(written(tmp_path / "e.json"))


def test_no_file(tmp_path):
    with pytest.raises(FileError, match="elastic table '.*' does not exist"):
        load_table(tmp_path / "e.json")
