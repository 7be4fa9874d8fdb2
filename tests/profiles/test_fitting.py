"""Fits: known curves come back, public tables are predicted, outliers do not rule, and scipy finds the same minimum."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import SchemaError
from moeplan.profiles.curve_fit import BLANK, folds
from moeplan.profiles.curves import (
    AttentionCurve,
    GemmCurve,
    GroupedGemmCurve,
    QuantizedGemmCurve,
)
from moeplan.profiles.fitting import fit
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.samples import Sample
from tests.profiles.synthetic import cases_of, sample

TWO_NODES = nominal(load_cluster("h100x16"))


def from_curve(op: str, key: str, curve: Any, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    names = {"attention": ("flop", "io_bytes"), "attention-backward": ("flop", "io_bytes")}.get(op)
    seconds = curve.backward_seconds if op == "attention-backward" else curve.seconds
    return [
        sample(op, key, float(seconds(**{n: s[n] for n in names or s})) * float(np.exp(noise * random.standard_normal())), **s)
        for s in cases_of(op, key)
    ]


def close_everywhere(found: Any, truth: Any, op: str, key: str, within: float) -> None:
    """Curves agree on the grid and between its points."""
    grid = cases_of(op, key)
    for a, b in zip(grid, grid[1:], strict=False):
        names = ("flop", "io_bytes") if op == "attention" else tuple(a)
        for sizes in (a, {n: (a[n] * b[n]) ** 0.5 for n in names}):
            args = [sizes[n] for n in names]
            assert found.seconds(*args) == pytest.approx(truth.seconds(*args), rel=within)
            if op == "attention":
                assert found.backward_seconds(*args) == pytest.approx(truth.backward_seconds(*args), rel=within)


# ---------------------------------------------------------------- curves that are known

rates = st.fixed_dictionaries(
    {
        "launch_s": st.floats(1e-6, 1e-5),
        "flop_per_s": st.floats(1e14, 2e15),
        "bytes_per_s": st.floats(1e12, 6e12),
        "sharpness": st.floats(1.2, 5.0),
    }
)


@settings(max_examples=10, deadline=None)
@given(rates)
def test_a_gemm_curve_is_recovered(parameters: dict[str, float]) -> None:
    truth = GemmCurve(**parameters, **BLANK)
    found = fit(from_curve("gemm", "bf16", truth)).gemms["bf16"]
    close_everywhere(found, truth, "gemm", "bf16", 0.01)
    assert found.error < 0.02 and len(found.residuals) == found.samples == len(cases_of("gemm", "bf16"))


@settings(max_examples=6, deadline=None)
@given(rates, st.floats(5e-13, 5e-12))
def test_a_quantised_gemm_curve_is_recovered(parameters: dict[str, float], quantize_s: float) -> None:
    truth = QuantizedGemmCurve(**parameters, quantize_s=quantize_s, result_s=0.1 * quantize_s, **BLANK)
    found = fit(from_curve("gemm", "fp8", truth)).gemms["fp8"]
    assert isinstance(found, QuantizedGemmCurve)
    close_everywhere(found, truth, "gemm", "fp8", 0.03)


@settings(max_examples=6, deadline=None)
@given(rates, st.floats(1e-8, 5e-6), st.sampled_from(["bf16", "bf16-dgrad", "bf16-wgrad"]))
def test_a_grouped_curve_is_recovered(parameters: dict[str, float], group_s: float, key: str) -> None:
    truth = GroupedGemmCurve(**parameters, group_s=group_s, **BLANK)
    found = fit(from_curve("grouped_gemm", key, truth)).grouped
    assert set(found) == {key}
    close_everywhere(found[key], truth, "grouped_gemm", key, 0.05)


@settings(max_examples=6, deadline=None)
@given(st.floats(1e-6, 3e-5), st.floats(1e14, 1e15), st.floats(5e11, 4e12), st.floats(2.0, 4.0))
def test_attention_is_recovered_in_both_directions(launch_s: float, flop: float, moved: float, ratio: float) -> None:
    truth = AttentionCurve(launch_s=launch_s, flop_per_s=flop, bytes_per_s=moved, backward_ratio=ratio, **BLANK)
    both = [*from_curve("attention", "128", truth), *from_curve("attention-backward", "128", truth)]
    found = fit(both).attentions["128"]
    close_everywhere(found, truth, "attention", "128", 0.02)
    assert found.backward_ratio == pytest.approx(ratio, rel=0.02)
    assert "backward" not in found.valid and found.valid["seq"] == (512, 32768)


def test_attention_without_a_backward_says_so() -> None:
    truth = AttentionCurve(launch_s=1e-5, flop_per_s=6e14, bytes_per_s=1e12, backward_ratio=2.0, **BLANK)
    found = fit(from_curve("attention", "128", truth)).attentions["128"]
    assert found.backward_ratio == 3.05 and found.source.endswith("backward not measured")


def test_passes_over_memory() -> None:
    sizes = (1e7, 1e8, 1e9)
    kinds = [("copy", "copy_"), ("norm", "add and rms_norm, torch 2.13"), ("swiglu", "silu and mul"),
             ("optimizer", "foreach AdamW and copy_")]  # fmt: skip
    samples = [sample("stream", key, 5e-6 + size / 2e12, how=how, bytes=size) for key, how in kinds for size in sizes]
    found = fit([*samples, sample("stream", "router", 1e-3, bytes=1e9), sample("host_copy", "device_to_host", 2e-2, bytes=1e9)])
    assert found.streams["copy"].bytes_per_s == pytest.approx(2e12, rel=1e-3)
    assert found.streams["copy"].launch_s == pytest.approx(5e-6, rel=1e-2)
    assert [key for key, _ in kinds if found.streams[key].fused] == ["copy", "norm"]
    # one size alone is a rate
    assert found.streams["router"].seconds(5e8) == pytest.approx(5e-4)
    assert found.host_copies == {"device_to_host": pytest.approx(5e10)}


# ---------------------------------------------------------------- public tables

LIMITS = {
    # Mean error allowed on rows that the fit did not see, in %. A study of the same tables reached, with fits on 40 random rows
    # judged on all: GEMM 9.3 (H100), 9.8 (B200), fp8 9.8; attention 5.9 with all rows; 7 knots of NCCL 2.9 over four GPUs.
    ("h100", "gemm", "bf16"): 9.3,
    ("h100", "gemm", "fp8"): 5.5,
    ("b200", "gemm", "bf16"): 9.8,
    ("h800", "grouped_gemm", "fp8-blockwise"): 2.0,
    ("h100", "attention", "128"): 10.0,
    ("h100", "all_gather", "8/1"): 4.0,
    ("a100", "all_gather", "8/1"): 4.5,
}


def table() -> dict[tuple[str, str, str], tuple[list[Sample], list[Sample]]]:
    """Rows of the public tables by machine, operation and key: those that a fit sees, and others."""
    out: dict[tuple[str, str, str], tuple[list[Sample], list[Sample]]] = {}
    text = (Path(__file__).parent / "public_times.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        sizes = {name: float(value) for name, value in (pair.split("=") for pair in row["sizes"].split())}
        group, key = (row["key"], "bf16") if row["op"] == "all_gather" else ("", row["key"])
        rows = out.setdefault((row["machine"], row["op"], row["key"]), ([], []))
        rows[row["seen"] == "0"].append(sample(row["op"], key, float(row["time_us"]) * 1e-6, group, **sizes))
    return out


def test_every_public_table_has_a_limit() -> None:
    assert set(table()) == set(LIMITS)


@pytest.mark.parametrize("place", LIMITS, ids=" ".join)
def test_few_points_predict_the_rows_that_the_fit_did_not_see(place: tuple[str, str, str]) -> None:
    _, op, key = place
    seen, others = table()[place]
    assert len(seen) <= 24
    found = fit(seen)
    curve = {
        "gemm": lambda: found.gemms[key],
        "grouped_gemm": lambda: found.grouped[key],
        "attention": lambda: found.attentions[key],
        "all_gather": lambda: found.collectives["all_gather"][8],
    }[op]()
    misses = np.array([abs(curve.seconds(*s.sizes.values()) / s.seconds - 1.0) for s in others])
    assert 100 * misses.mean() < LIMITS[place]
    # what the curve says of itself, from the few points alone, is what it does on the others
    assert 0.3 * misses.mean() < curve.error < 2.0 * misses.mean() + 0.01
    assert np.quantile(misses, 0.9) < 2.0 * curve.error_p90 + 0.02


# ---------------------------------------------------------------- outliers and too little


def test_folds_keep_repeats_together_and_are_even() -> None:
    shapes = [(m, k) for m in range(5) for k in range(4)] * 2
    found = folds(shapes)
    assert (found[:20] == found[20:]).all()
    assert np.bincount(found).tolist() == [8] * 5


@pytest.mark.parametrize("factor", [3.0, 0.4])
def test_outliers_are_named_and_do_not_rule(factor: float) -> None:
    truth = TWO_NODES.gemms["bf16"]
    samples = from_curve("gemm", "bf16", truth, noise=0.02)
    odd = (3, 11, 17)
    spoilt = [dataclasses.replace(s, seconds=factor * s.seconds) if i in odd else s for i, s in enumerate(samples)]
    found = fit(spoilt)
    close_everywhere(found.gemms["bf16"], truth, "gemm", "bf16", 0.15)
    assert "3 of 24 samples are outliers" in found.gemms["bf16"].source
    assert sum(text.startswith("outlier: gemm bf16 m=") for text in found.remarks) == 3
    assert found.gemms["bf16"].residuals[3] == pytest.approx(1.0 / factor - 1.0, abs=0.2)


def test_samples_that_were_not_steady_count_less() -> None:
    truth = TWO_NODES.gemms["bf16"]
    samples = from_curve("gemm", "bf16", truth)
    slow = range(0, len(samples), 3)

    def off(spread: float) -> float:
        some = [
            dataclasses.replace(s, seconds=1.3 * s.seconds, spread=spread) if i in slow else s for i, s in enumerate(samples)
        ]
        return abs(float(fit(some).gemms["bf16"].seconds(8192, 8192, 8192) / truth.seconds(8192, 8192, 8192)) - 1.0)

    assert off(0.5) < 0.3 * off(0.01)


@pytest.mark.parametrize(
    ("op", "key", "count"), [("gemm", "bf16", 3), ("grouped_gemm", "bf16", 3), ("attention", "128", 2)]
)  # fmt: skip
def test_too_few_shapes_give_no_curve(op: str, key: str, count: int) -> None:
    truth: Any = {
        "gemm": TWO_NODES.gemms["bf16"],
        "grouped_gemm": TWO_NODES.grouped["bf16"],
        "attention": TWO_NODES.attention(128, 128),
    }[op]
    few = from_curve(op, key, truth)[:count]
    found = fit([*few, *few])  # repeats are no shapes
    assert not found.gemms and not found.grouped and not found.attentions
    assert found.remarks == (f"{op} {key}: measured at {count} sizes, a fit needs {count + 1}",)
    enough = fit(from_curve(op, key, truth)[: count + 1])
    assert enough.gemms or enough.grouped or enough.attentions


def test_nothing_measured_is_an_empty_answer() -> None:
    found = fit([])
    assert not found.gemms and found.overlap_loss is None and found.launch_s is None and found.law.hop_s is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample("gemm", "bf16", 1e-3, m=1, n=2), "sample 'gemm bf16 m=1 n=2': k is missing"),
        (sample("gemm", "bf16", 1e-3, m=1, n=2, k=0), "k is 0"),
        (sample("gemm", "bf16", 0.0, m=1, n=2, k=3), "measured 0.0 s"),
        (sample("gem", "bf16", 1e-3), "unknown operation"),
        (sample("send", "bf16", 1e-3, "2", message_bytes=1), "'2' is no group"),
        (sample("send", "bf16", 1e-3, "2/4", message_bytes=1), "'2/4' is no group"),
    ],
)
def test_bad_samples_are_named(bad: Sample, message: str) -> None:
    with pytest.raises(SchemaError, match=message.replace("(", r"\(")):
        fit([bad])


# ---------------------------------------------------------------- overlap and launches


def test_overlap_loss_is_a_robust_mean_within_bounds() -> None:
    losses = (0.2, 0.3, 0.25, 0.35, 7.0, -0.4, 0.3, 0.3)
    samples = [
        sample("overlap", "all_to_all+gemm", 2e-3 + loss * 1e-3, "2/1", alone_compute_s=2e-3, alone_comm_s=1e-3)
        for loss in losses
    ]
    assert fit(samples).overlap_loss == pytest.approx((0.25 + 3 * 0.3) / 4)
    hidden = dataclasses.replace(samples[0], seconds=1.9e-3)
    assert fit([hidden]).overlap_loss == 0.0


def test_the_median_launch_counts() -> None:
    assert fit([sample("launch", "kernel", s) for s in (4e-6, 5e-6, 9e-4)]).launch_s == 5e-6
