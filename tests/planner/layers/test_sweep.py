"""Sweeps: axes as text, the product counted before it is made, lines that equal the study of each point, files whole or not."""

import csv
import io

import numpy as np
import pytest

from moeplan.costmodels.moe.constants import load_constants
from moeplan.costmodels.moe.schedules import SCHEDULES, find_schedule
from moeplan.errors import UnknownNameError, UsageError
from moeplan.planner.layers import sweep as layer_sweep
from moeplan.planner.layers.question import SWEPT, Asked
from moeplan.planner.layers.study import study
from moeplan.planner.layers.sweep import header, parse_axis, points, rows

FITS = load_constants("fsmoe-b")
ASKED = Asked(
    numbers={"tokens": 1024, "hidden": 1024, "expert-hidden": 4096, "top-k": 2, "element-bytes": 4, **FITS.groups},
    schedules=tuple(find_schedule(name) for name in ("s1", "s2", "hierarchical", "fsmoe", "comet")),
)
AXES = [  # text, values
    ("tokens=1,2,5", [1, 2, 5]),
    ("tokens= 512:8192:x2", [512, 1024, 2048, 4096, 8192]),
    ("tokens=512:8191:x2", [512, 1024, 2048, 4096]),
    ("kappa=0:0.3:+0.1", [0.0, 0.1, 0.2, 0.3]),
    ("tokens=4:4:x2", [4]),
    ("capacity-factor=1.25", [1.25]),
]
BAD = [  # text, message
    ("tokens", "sweep 'tokens' has no '='"),
    ("tokens=", "sweep 'tokens=': '' is not a number"),
    ("tokens=1,,2", "'' is not a number"),
    ("tokens=1:2", "'1:2' is no range"),
    ("tokens=1:2:3", "'1:2:3' is no range"),
    ("tokens=1:8:x1", "never gets from 1 to 8"),
    ("tokens=0:8:x2", "never gets from 0 to 8"),
    ("tokens=8:1:x2", "never gets from 8 to 1"),
    ("tokens=1:8:+0", "never gets from 1 to 8"),
    ("tokens=1:8:+-1", "never gets from 1 to 8"),
    ("tokens=1:inf:+1", "inf is not a finite number"),
    ("tokens=nan", "nan is not a finite number"),
]


def asked(at):
    return ASKED.question(FITS, at)


def table(*texts, block=layer_sweep.BLOCK):
    axes = [parse_axis(text, SWEPT) for text in texts]
    text = header(axes, [s.name for s in ASKED.schedules]) + "".join(t for _, t in rows(axes, asked, block))
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize(("text", "values"), AXES)
def test_axes(text, values):
    axis = parse_axis(text, SWEPT)
    assert axis.values() == pytest.approx(values) and axis.count == len(values)


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_axes_that_are_refused(text, message):
    with pytest.raises(UsageError) as caught:
        parse_axis(text, SWEPT)
    assert message in caught.value.message and f"'{text}'" in caught.value.message


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        parse_axis("capacity=1,2", SWEPT)
    assert caught.value.message == "unknown number to sweep 'capacity'" and "'capacity-factor'" in caught.value.hint


def test_too_many_points_are_refused_before_they_are_made(monkeypatch):
    axes = [parse_axis("tokens=1:1e9:+1", SWEPT), parse_axis("top-k=1,2,3", SWEPT)]
    monkeypatch.setattr(layer_sweep.Axis, "values", lambda self: pytest.fail("allocated"))
    with pytest.raises(UsageError, match="has 1,000,000,000 x 3 = 3,000,000,000 points, more than the 10,000,000") as caught:
        points(axes)
    with pytest.raises(UsageError, match="points, more than"):
        next(rows(axes, asked))
    assert "fewer axes" in caught.value.hint


def test_an_axis_stands_once():
    with pytest.raises(UsageError, match="--sweep tokens is given twice"):
        points([parse_axis("tokens=1", SWEPT), parse_axis("tokens=2", SWEPT)])


def test_every_line_is_the_study_of_its_point():
    lines = table("tokens=512:4096:x2", "capacity-factor=1,1.5", "mp=2,4", block=5)
    assert len(lines) == 4 * 2 * 2
    assert [line["mp"] for line in lines[:4]] == ["2", "4", "2", "4"], "the last axis is the fastest"
    for line in lines:
        point = {name: float(line[name.replace("-", "_")]) for name in ("tokens", "capacity-factor", "mp")}
        found = study(asked(point))
        for row in found:
            name = row.schedule.name
            assert float(line[f"{name}_forward_s"]) == pytest.approx(float(row.forward_s), rel=1e-8)
            assert float(line[f"{name}_backward_s"]) == pytest.approx(float(row.backward_s), rel=1e-8)
            assert int(line[f"{name}_r_forward"]) == row.forward_degree
        real = [row for row in found if row.schedule.name != "comet"]
        assert line["winner"] == min(real, key=lambda row: float(row.total_s)).schedule.name


def test_blocks_make_no_difference():
    assert table("tokens=1:64:+1", block=7) == table("tokens=1:64:+1")


def test_all_schedules_can_be_swept():
    every = Asked(numbers=ASKED.numbers, schedules=SCHEDULES)
    axis = parse_axis("kappa=0,0.5", SWEPT)
    ((count, text),) = rows([axis], lambda at: every.question(FITS, at))
    assert count == 2 and all(len(line.split(",")) == 2 + 4 * len(SCHEDULES) for line in text.splitlines())


def test_memory_does_not_grow_with_the_grid():
    axes = [parse_axis("tokens=1:100000:+1", SWEPT), parse_axis("kappa=0:0.9:+0.1", SWEPT)]
    first, text = next(rows(axes, asked, 100))
    assert first == 100 == len(text.splitlines()) and points(axes) == 1_000_000
    assert np.isfinite([float(cell) for cell in text.splitlines()[0].split(",")[:-1]]).all()
