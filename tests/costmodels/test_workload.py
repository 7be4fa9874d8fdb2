"""Workload: recipes and eras load and say what they mean, weight bytes by hand, what is refused."""

import dataclasses

import pytest

from moeplan.costmodels.layout import DISPATCHERS, GRAPH_SCOPES
from moeplan.costmodels.workload import (
    era_at,
    era_names,
    load_era,
    load_precision,
    precision_names,
)
from moeplan.errors import ProblemError, UnknownNameError
from moeplan.profiles.hardware import load_device
from tests.conftest import workload_of

# Recipe, bytes a weight element on A100 or H100 (tensor cores read FP8 in one orientation only), bytes on B200.
# MXFP8: one scale byte per 32 elements, 1 + 1/32 twice; NVFP4: half a byte and a scale byte per 16, twice, beside bf16.
WEIGHT_BYTES = [
    ("bf16", 2.0, 2.0),
    ("fp8-cs", 1 + 1, 1.0),
    ("fp8-delayed", 1 + 1, 1.0),
    ("fp8-blockwise", 2 * (1 + 1 / 32), 2 * (1 + 1 / 32)),
    ("fp8-mx", 2 * (1 + 1 / 32), 2 * (1 + 1 / 32)),
    ("fp8-cs-bf16-weights", 2 + 1 + 1, 2 + 1.0),
    ("fp8-delayed-bf16-weights", 2 + 1 + 1, 2 + 1.0),
    ("fp8-blockwise-bf16-weights", 2 + 2 * (1 + 1 / 32), 2 + 2 * (1 + 1 / 32)),
    ("fp8-mx-bf16-weights", 2 + 2 * (1 + 1 / 32), 2 + 2 * (1 + 1 / 32)),
    ("nvfp4", 2 * (1 / 2 + 1 / 16) + 2, 2 * (1 / 2 + 1 / 16) + 2),
]

# Month, era that was current.
MONTHS = [
    ("2019-01", "megatron-2021"), ("2023-12", "megatron-2021"),
    ("2024-01", "te-2024"), ("2025-02", "te-2024"), ("2025-03", "deepep-2025"),
    ("2025-10", "fsdp-2025"), ("2025-11", "hybridep-2025"), ("2026-06", "graphs-2026"), ("2099-12", "graphs-2026"),
]  # fmt: skip

# What a workload refuses, and what its message says.
REFUSED = [
    ({"seq_len": 0}, "seq_len=0"),
    ({"global_batch": 1.5}, "global_batch=1.5"),
    ({"seq_len": True}, "seq_len=True"),
    ({"gradient_bytes": 1}, "gradient_bytes=1 must be 2 (bf16) or 4 (fp32)"),
    ({"moment_bytes": 8}, "moment_bytes=8"),
    ({"imbalance": 0.9}, "imbalance=0.9 must be at least 1.0"),
    ({"imbalance": float("nan")}, "imbalance=nan"),
    ({"capacity_factor": -1.0}, "capacity_factor=-1.0"),
    ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
]


@pytest.mark.parametrize("name, hopper, blackwell", WEIGHT_BYTES)
def test_weight_bytes_by_hand(name, hopper, blackwell):
    recipe = load_precision(name)
    assert recipe.weight_bytes(load_device("H100")) == hopper
    assert recipe.weight_bytes(load_device("B200")) == blackwell


def test_every_recipe_has_a_row_above():
    assert sorted(precision_names()) == sorted(name for name, _, _ in WEIGHT_BYTES)


def test_recipes_by_name_and_alias():
    for name in precision_names():
        recipe = load_precision(name)
        assert recipe.name == name
        assert load_precision(name.upper()) is recipe
        assert all(load_precision(alias) is recipe for alias in recipe.aliases)
    assert load_precision("MXFP8").name == "fp8-mx"
    with pytest.raises(UnknownNameError, match="unknown precision 'fp9'.*'fp8'|unknown precision 'fp9'"):
        load_precision("fp9")


def test_saved_elements_are_as_wide_as_the_format():
    width = {name: load_precision(name).quantized_bytes for name in precision_names()}
    assert width["nvfp4"] < width["fp8-cs"] < width["fp8-blockwise"] == width["fp8-mx"] < width["bf16"] == 2.0


def test_each_era_keeps_what_the_one_before_had():
    every = [load_era(name) for name in era_names()]
    eras = [e for e in every if e.framework == "megatron"]
    assert [e.since for e in eras] == sorted(e.since for e in eras)
    for before, after in zip(eras, eras[1:], strict=False):
        assert set(before.dispatchers) <= set(after.dispatchers)
        assert set(before.graph_scopes) <= set(after.graph_scopes)
        assert before.ep_overlap <= after.ep_overlap
    for era in every:
        assert set(era.dispatchers) <= set(DISPATCHERS) and set(era.graph_scopes) <= set(GRAPH_SCOPES)
        assert all(0 <= seconds < 1e-4 for seconds in era.host_s_per_kernel.values())
        assert {"x86", "grace"} == set(era.host_s_per_kernel)
    assert load_era("latest") is eras[-1]
    with pytest.raises(UnknownNameError, match="deepep-2025"):
        load_era("deepep-2024")


@pytest.mark.parametrize("month, name", MONTHS)
def test_era_of_a_month(month, name):
    assert era_at(month).name == name


def test_tokens():
    assert workload_of(seq_len=4096, global_batch=512).tokens == 2_097_152


@pytest.mark.parametrize("fields, message", REFUSED, ids=[str(f) for f, _ in REFUSED])
def test_refused(fields, message):
    with pytest.raises(ProblemError) as caught:
        workload_of(**fields)
    assert message in str(caught.value)


def test_a_workload_is_a_key():
    # Runs with equal workloads are priced together.
    assert hash(workload_of()) == hash(workload_of())
    assert workload_of() == workload_of()
    assert dataclasses.replace(workload_of(), imbalance=1.1) != workload_of()


@pytest.mark.parametrize(
    "version, name",
    [
        ("0.6", "te-2024"),
        ("core-0.10.1", "te-2024"),
        ("0.14", "fsdp-2025"),
        ("v0.19.2", "graphs-2026"),
        ("Core_0.16", "hybridep-2025"),
    ],
)
def test_eras_by_version_of_megatron(version, name):
    assert load_era(version).name == name


def test_an_older_version_than_is_known_is_refused():
    with pytest.raises(UnknownNameError, match="from 0.6 on"):
        load_era("0.5")


def test_packed_documents_attend_to_themselves():
    assert workload_of(seq_len=4096).attended_len == 4096
    assert workload_of(seq_len=4096, document_len=512).attended_len == 512
    assert workload_of(seq_len=256, document_len=512).attended_len == 256
