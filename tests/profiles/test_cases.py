"""The designed grid: what it holds, in which order, and that it fits the device and the curves."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels import kernels
from moeplan.costmodels.constants import STEP
from moeplan.profiles.cases import (
    MEMORY_SHARE,
    RING_OPS,
    SCALES,
    STREAM_BYTES,
    AttentionShape,
    Case,
    GemmShape,
    GroupedShape,
    ModelShapes,
    collective_cases,
    groups,
    kernel_cases,
    knots,
    tensor_bytes,
)
from moeplan.profiles.curves import KNOT_BYTES
from moeplan.profiles.samples import Sample
from moeplan.records import from_mapping, to_mapping

SHAPES = ModelShapes(
    name="a model",
    gemms=(GemmShape(n=1536, k=7168, tp=1), GemmShape(n=768, k=7168, tp=2), GemmShape(n=24, k=7168, tp=1)),
    grouped=(GroupedShape(groups=32, m=1024, n=4096, k=7168),),
    attentions=(AttentionShape(heads=16, kv_heads=16, qk_dim=192, v_dim=128, tp=1),),
)
DEVICES = {"cuda": 80e9, "cpu": 8e9}


def cases_of(device: str, op: str, *shapes: ModelShapes) -> list[Case]:
    return [case for case in kernel_cases(shapes, device, DEVICES[device]) if case.op == op]


@pytest.mark.parametrize("device", DEVICES)
def test_how_many(device: str) -> None:
    count = Counter((case.op, case.key) for case in kernel_cases([], device, DEVICES[device]))
    assert count["gemm", "bf16"] >= 20
    assert all(20 <= count["grouped_gemm", f"bf16{direction}"] <= 40 for direction in ("", "-dgrad", "-wgrad"))
    assert all(count[op, size] >= 8 for op in ("attention", "attention-backward") for size in ("64", "128"))
    assert {key for op, key in count if op == "stream"} == set(STREAM_BYTES)
    assert count["launch", "kernel"] == 1
    assert (count["gemm", "fp8"] >= 20) == (("host_copy", "host_to_device") in count) == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_a_short_budget_has_a_coarse_grid_of_everything(device: str) -> None:
    cases = kernel_cases([SHAPES], device, DEVICES[device])
    tiers = [case.tier for case in cases]
    assert tiers == sorted(tiers)
    everything = Counter((case.op, case.key) for case in cases)
    first = Counter((case.op, case.key) for case in cases if case.tier == 0)
    assert set(first) == set(everything)
    assert sum(first.values()) < len(cases) / 2
    # More points than a curve has parameters.
    assert first["gemm", "bf16"] > 4 and first["grouped_gemm", "bf16-wgrad"] > 5 and first["attention", "128"] >= 3


@pytest.mark.parametrize("device", DEVICES)
def test_no_case_twice(device: str) -> None:
    cases = kernel_cases([SHAPES, SHAPES], device, DEVICES[device])
    assert len({case.case for case in cases}) == len(cases)
    assert len(cases) == len(kernel_cases([SHAPES], device, DEVICES[device]))


@pytest.mark.parametrize("device", DEVICES)
def test_the_grid_reaches_into_every_corner(device: str) -> None:
    """Small m, n and k with the others large, and shapes whose compute and traffic, rows and groups vary apart."""
    gemms = np.array([[case.sizes[name] for name in "mnk"] for case in cases_of(device, "gemm") if case.key == "bf16"])
    for small in range(3):
        least = gemms[gemms[:, small].argmin()]
        assert np.delete(least, small).min() >= 8 * least[small]
        assert gemms[:, small].max() >= 32 * gemms[:, small].min()
    experts = np.array([[case.sizes[name] for name in ("groups", "m", "n", "k")] for case in cases_of(device, "grouped_gemm")])
    for table in (gemms, experts):
        logs = np.log(table) - np.log(table).mean(axis=0)
        assert np.linalg.svd(logs / np.linalg.norm(logs, axis=0), compute_uv=False)[-1] > 0.3, "sizes that vary together"


@pytest.mark.parametrize("memory_bytes", [2**26, 2**30, 80e9])
@pytest.mark.parametrize("device", DEVICES)
def test_a_share_of_the_memory(device: str, memory_bytes: float) -> None:
    cases = kernel_cases([SHAPES], device, memory_bytes)
    assert cases
    assert max(map(tensor_bytes, cases)) <= MEMORY_SHARE * memory_bytes


def test_memory_by_hand() -> None:
    assert tensor_bytes(Case(op="gemm", key="bf16", sizes={"m": 2, "n": 3, "k": 5})) == 2 * (10 + 15 + 6)
    assert tensor_bytes(Case(op="grouped_gemm", key="bf16", sizes={"groups": 7, "m": 2, "n": 3, "k": 5})) == 7 * 2 * 31


def test_shapes_of_models_come_second() -> None:
    gemms = {(case.key, *(case.sizes[name] for name in "mnk")): case.tier for case in cases_of("cuda", "gemm", SHAPES)}
    assert gemms["bf16", 4096, 1536, 7168] == gemms["fp8", 4096, 1536, 7168] == 1
    assert gemms["bf16", 4096, 768, 7168] == 3
    assert gemms["bf16", 4096, 24, 7168] == 1
    assert ("fp8", 4096, 24, 7168) not in gemms, "FP8 takes steps of 16"
    sizes = {"groups": 32, "m": 1024, "n": 4096, "k": 7168}
    assert Case(op="grouped_gemm", key="bf16-dgrad", sizes=sizes, tier=1) in cases_of("cuda", "grouped_gemm", SHAPES)
    latent = [case for case in cases_of("cuda", "attention", SHAPES) if case.key == "192/128"]
    assert len(latent) == 12
    assert all(case.sizes["heads"] == case.sizes["kv_heads"] for case in latent)


def test_cpus_take_fewer_rows_of_a_model() -> None:
    """4 GFLOP allow 181 rows of 2 x 1536 x 7168 FLOP each: 128 is the power of two below; and 4 GFLOP are not exceeded."""
    gemms = [case.sizes for case in cases_of("cpu", "gemm", SHAPES)]
    assert {"m": 128, "n": 1536, "k": 7168} in gemms
    assert all(2.0 * s["m"] * s["n"] * s["k"] <= SCALES["cpu"].most_flop for s in gemms)
    assert not [c for c in cases_of("cpu", "grouped_gemm", SHAPES) if c.tier == 1], "no room for 16 rows of 32 such experts"


def test_attention_by_hand() -> None:
    """Causal: heads x seq^2 x (192 + 128) FLOP; q and k of 192, v and the output of 128 elements, 2 bytes each."""
    sizes = next(c.sizes for c in cases_of("cuda", "attention", SHAPES) if c.tier == 1)
    assert sizes == {
        "flop": 16 * 4096**2 * 320,
        "io_bytes": 2 * 4096 * 16 * 2 * 320,
        "batch": 1, "seq": 4096, "heads": 16, "kv_heads": 16,
    }  # fmt: skip


def test_bytes_are_those_of_the_cost_models() -> None:
    assert STREAM_BYTES["norm"] == kernels.NORM_BYTES
    assert STREAM_BYTES["swiglu"] == kernels.ACTIVATION_BYTES
    assert STREAM_BYTES["permute"] + STREAM_BYTES["unpermute"] == 2.0 * kernels.PERMUTE_PASSES["fused"]
    assert STREAM_BYTES["cross_entropy"] == STEP.logit_bytes
    assert STREAM_BYTES["optimizer"] == STEP.optimizer_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_streams_count_their_bytes(device: str) -> None:
    for case in cases_of(device, "stream"):
        assert case.sizes["bytes"] == pytest.approx(STREAM_BYTES[case.key] * case.sizes["rows"] * case.sizes["width"])
        assert case.sizes["bytes"] == pytest.approx(
            min(SCALES[device].stream_bytes, key=lambda b: abs(b - case.sizes["bytes"])), rel=0.1
        )


def test_a_case_is_that_of_its_sample() -> None:
    for case in [*kernel_cases([SHAPES], "cuda", 80e9), *collective_cases(8, 4, "cuda")]:
        sample = Sample(op=case.op, key=case.key, sizes=case.sizes, group=case.group, seconds=1.0, spread=0.0)
        assert from_mapping(Sample, json.loads(json.dumps(to_mapping(sample))), "here").case == case.case


@pytest.mark.parametrize(
    ("ranks", "per_domain", "found"),
    [
        (1, 1, []),
        (4, 4, ["2/1", "4/1"]),
        (6, 6, ["2/1", "6/1"]),
        (2, 1, ["2/2"]),
        (4, 2, ["2/1", "2/2", "4/2"]),
        (32, 8, ["2/1", "4/1", "8/1", "2/2", "4/4", "16/2", "32/4"]),
        (24, 8, ["2/1", "4/1", "8/1", "3/3", "24/3"]),
        (4, 8, ["2/1", "4/1"]),
    ],
)  # fmt: skip
def test_groups(ranks: int, per_domain: int, found: list[str]) -> None:
    """Within a domain; one rank of each domain; all ranks of the domains."""
    assert groups(ranks, per_domain) == found


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 6, 8, 72]))
def test_groups_cut_the_world_evenly(domains: int, per_domain: int) -> None:
    for group in groups(domains * per_domain, per_domain):
        ranks, spanned = map(int, group.split("/"))
        assert domains % spanned == 0 and (domains * per_domain) % ranks == 0
        assert ranks % spanned == 0 and per_domain % (ranks // spanned) == 0


def test_seven_sizes_of_every_collective() -> None:
    cases = collective_cases(16, 8, "cuda")
    count = Counter((case.op, case.group) for case in cases if case.op in (*RING_OPS, "send"))
    assert set(count.values()) == {7}
    assert set(count) == {(op, g) for op in RING_OPS for g in ("2/1", "4/1", "8/1", "2/2", "16/2")} | {
        ("send", "2/1"),
        ("send", "2/2"),
    }
    assert {c.sizes["message_bytes"] for c in cases if c.op in RING_OPS} == set(KNOT_BYTES)
    first: Any = {(case.op, case.group) for case in cases if case.tier == 0}
    assert {("all_to_all", "8/1"), ("all_gather", "16/2"), ("send", "2/2"), ("overlap", "8/1")} <= first
    assert {case.group for case in cases if case.op == "deepep"} == {"8/1", "16/2"}
    assert [case.tier for case in cases] == sorted(case.tier for case in cases)


def test_one_rank_has_nobody_to_talk_to() -> None:
    assert collective_cases(1, 1, "cuda") == collective_cases(1, 1, "cpu") == []


def test_message_sizes() -> None:
    assert knots(2**40) == knots(2**29) == KNOT_BYTES
    assert [s / 2**10 for s in knots(2**24)] == [64, 128, 512, 1024, 2048, 8192, 16384]
    assert knots(1.0) == (2.0**16, 2.0**17, 2.0**18), "never a single size"
    assert max(c.sizes["message_bytes"] for c in collective_cases(2, 2, "cpu") if c.op != "overlap") == 2**24
    assert max(c.sizes["message_bytes"] for c in collective_cases(2, 2, "cpu", 2.0**20) if c.op != "overlap") == 2**20


@settings(deadline=None)
@given(st.floats(2**16, 2**28))
def test_message_sizes_end_near_the_largest(largest: float) -> None:
    found = knots(largest)
    assert found[0] == KNOT_BYTES[0]
    assert list(found) == sorted(set(found)) and 3 <= len(found) <= 7
    assert found[-1] == 2**18 or largest / 1.5 < found[-1] < largest * 1.5
