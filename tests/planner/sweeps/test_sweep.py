"""A sweep file states its points, and what is wrong with it is said before anything runs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from moeplan.errors import MoeplanError
from moeplan.planner.sweeps.sweep import load_sweep
from tests.planner.sweeps.cases import TEXT, small, write


def test_points_are_the_product_less_what_is_excluded(tmp_path: Path) -> None:
    points = list(small(tmp_path).points())
    every = itertools.product(("h100", "a100"), (8, 16), (16, 32), ("bf16", "fp8-cs"))
    wanted = [values for values in every if not (values[0] == "h100" and values[1] > 8)]
    assert [tuple(point.values()) for point in points] == wanted and len(points) == 12
    assert all(list(point) == ["device", "gpus", "global_batch", "precision"] for point in points)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("[4, 2]", (4, 2)),
        ("{from: 8, to: 64, times: 2}", (8, 16, 32, 64)),
        ("{from: 8, to: 63, times: 2}", (8, 16, 32)),
        ("{from: 8, to: 24, step: 8}", (8, 16, 24)),
        ("{from: 2, to: 4.5, times: 1.5}", (2, 3, 4.5)),
        ("{from: 1, to: 1.3, step: 0.1}", (1, 1.1, 1.2, 1.3)),
    ],
)
def test_lists_and_ranges(tmp_path: Path, given: str, values: tuple[float, ...]) -> None:
    axis = "global_batch" if all(isinstance(v, int) for v in values) else "imbalance"
    text = TEXT.replace("  global_batch: [16, 32]", f"  {axis}: {given}").replace("  seq_len", "  global_batch: 16\n  seq_len")
    text = text if axis == "imbalance" else text.replace("  global_batch: 16\n", "", 1)
    found = load_sweep(write(tmp_path, text)).axes[axis]
    assert found == values and [type(v) for v in found] == [type(v) for v in values]


def test_the_price_is_that_of_the_device(tmp_path: Path) -> None:
    sweep = small(tmp_path)
    prices = {
        p["device"]: sweep.problem_of(p, print).profile.cluster.price_per_gpu_hour
        for p in sweep.points()
        if p["precision"] == "bf16"
    }
    assert prices == {"h100": 2.5, "a100": 0.0}


def test_files_are_looked_for_beside_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.yaml").write_text("device: h100\ngpus: 8\n", encoding="utf-8")
    text = TEXT.replace("device: [h100, a100]", "cluster: [ours.yaml, a100x8]").split("exclude")[0]
    monkeypatch.chdir("/")
    sweep = load_sweep(write(tmp_path, text))
    assert sweep.problem_of(next(sweep.points()), print).profile.cluster.name == "ours"
    files = sweep.identity()["files"]
    assert list(files) == [str(tmp_path / "ours.yaml")]
    (tmp_path / "ours.yaml").write_text("device: h100\ngpus: 16\n", encoding="utf-8")
    assert load_sweep(tmp_path / "small.yaml").identity()["files"] != files


def test_the_identity_is_plain_and_does_not_depend_on_the_writing(tmp_path: Path) -> None:
    one = small(tmp_path).identity()
    other = load_sweep(write(tmp_path, "# a remark\n" + TEXT.replace("{from: 8, to: 16, times: 2}", "[8, 16]"))).identity()
    assert json.dumps(one) == json.dumps(other)


BAD = [
    ("moeplan.sweep/1", "moeplan.sweep/2", "has schema 'moeplan.sweep/2'"),
    ("question:", "questoin:", "unknown key 'questoin'.*did you mean 'question'"),
    ("  seq_len: 4096", "  sequence_len: 4096", "question: unknown key 'sequence_len'.*'seq_len'"),
    ("  seq_len: 4096\n", "", "missing key 'seq_len'"),
    ("  device: [", "  devise: [", r"axes: unknown axis 'devise' \(did you mean 'device'"),
    ("  global_batch: [16, 32]", "  seq_len: [16, 32]\n  global_batch: [16]", "'seq_len' stands in question and in axes"),
    ("[16, 32]", "[]", "axis 'global_batch': no values"),
    ("[16, 32]", "16", "axis 'global_batch': expected a list or a range, found 16"),
    ("[16, 32]", "[16, 16]", "axis 'global_batch': 16 stands twice"),
    ("[16, 32]", "[16, 0]", "axis 'global_batch': 0 is not a whole number of at least 1"),
    ("[16, 32]", "[16, 1.5]", "axis 'global_batch'.*expected int, found float 1.5"),
    ("[16, 32]", "[16, null]", "axis 'global_batch'.*expected int, found nothing"),
    ("[h100, a100]", "[h100, a1000]", "axis 'device': unknown device 'a1000'.*'A100'"),
    ("  precision: [bf16", "  era: [0.14]\n  precision: [bf16", "axis 'era': 0.14 is a number.*quotes: '0.14'"),
    ("  precision: [bf16", "  era: [latest, maxtext]\n  precision: [bf16", "axis 'era': unknown era"),
    ("[bf16, fp8-cs]", "[bf16, fp9]", "axis 'precision': unknown precision 'fp9'"),
    ("  precision: [bf16", "  pin: [tp=2, tpp=2]\n  precision: [bf16", "axis 'pin'.*unknown field 'tpp'"),
    ("  precision: [bf16", "  memory_limit: [70GiB, much]\n  precision: [bf16", "axis 'memory_limit': 'much' is not a size"),
    ("  precision: [bf16", "  price_per_gpu_hour: [-1]\n  precision: [bf16", "price_per_gpu_hour': -1: a price of 0 or more"),
    ("mixtral-8x7b-4l-proxy", "mixtrall", "question, key 'model': unknown model 'mixtrall'"),
    ("  model: mix", "  cluster: h100x8\n  model: mix", "device 'h100' beside a cluster"),
    ("times: 2", "by: 2", "unknown key 'by' of a range"),
    (", times: 2", "", "either step or times"),
    ("times: 2", "times: 1", "the range does not grow"),
    ("times: 2", "step: -8", "the range does not grow"),
    ("times: 2", "step: 0.0001", "more than 10,000 values"),
    ("from: 8", "from: 32", "from 32 to 16 holds no value"),
    ("from: 8", "from: many", "from 'many' is not a number"),
    ('gpus: ">8"', "gpus: 7", r"exclude\[0\]: no value of axis 'gpus' is 7.*8, 16"),
    ("{device: h100,", "{seq_len: 4096,", "'seq_len' is no axis of this sweep"),
    ('{device: h100, gpus: ">8"}', "h100", "expected axes and their values"),
    ('{device: h100, gpus: ">8"}', '{gpus: ">=8"}', "exclude leaves none of the 16 points"),
    ("{h100: 2.5}", "{h1000: 2.5}", "unknown device 'h1000'"),
    ("{h100: 2.5}", "{h100: -2.5}", "-2.5 for h100: a price of 0 or more"),
    ("{h100: 2.5}", "{h100: dear}", "expected float, found str 'dear'"),
    ("{from: 8, to: 16, times: 2}", "{from: 8, to: 72008, step: 8}\n  imbalance: {from: 1, to: 4, step: 0.001}", "are more"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(MoeplanError) as caught:
        load_sweep(write(tmp_path, TEXT.replace(old, new)))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "small.yaml" in str(caught.value)


def test_a_file_without_axes(tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=r"no axes \(`moeplan solve`"):
        load_sweep(write(tmp_path, "schema: moeplan.sweep/1\nquestion: {model: mixtral-8x7b}\naxes: {}\n"))
