"""What an export holds, what it refuses, and that it is written whole or not at all."""

from __future__ import annotations

import dataclasses
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import ExportError, FileError
from moeplan.exporters import megatron
from moeplan.exporters.megatron import ARGUMENTS, README, SLURM, TORCHRUN, arguments, environment, export
from moeplan.planner.plan import Plan, load_plan, price_plan
from moeplan.planner.solve import solve
from tests.exporters.cases import layout_of, problem_of, small_models, unpriced, words
from tests.exporters.random_layouts import random_case

FLAGS = yaml.safe_load(files("moeplan.exporters").joinpath("flags/megatron.yaml").read_text())["flags"]
# The flags of every export that plans do not decide.
ALWAYS = {"--mock-data", "--tokenizer-type", "--train-iters", "--lr"}


def plan_of(model: str = "dense", cluster: str = "h100x8", **fields: Any) -> Plan:
    problem = problem_of(small_models()[model], cluster, 64, 2048)
    return price_plan(problem, layout_of(problem.model, problem.profile.cluster.gpus, **fields))


def flags_of(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {flag[0]: flag[1:] for flags in arguments(plan).values() for flag in flags}


def test_every_degree_is_written_out() -> None:
    given = flags_of(plan_of())
    for name in ("tensor-model", "context", "pipeline-model", "expert-model", "expert-tensor"):
        assert given[f"--{name}-parallel-size"] == ("1",)
    assert given["--micro-batch-size"] == ("1",)
    assert given["--cuda-graph-impl"] == ("none",)
    assert flags_of(plan_of("experts"))["--moe-token-dispatcher-type"] == ("alltoall",)


@pytest.mark.parametrize("seed", range(60))
def test_every_flag_is_in_the_catalog_once(seed: int) -> None:
    sections = megatron.write_arguments(unpriced(*random_case(seed)))
    given = [flag for flags in sections.values() for flag in flags]
    names = [flag[0] for flag in given]
    assert len(set(names)) == len(names)
    for name, *values in given:
        assert len(values) == {"switch": 0, "value": 1}.get(FLAGS[name]["takes"], len(values)), name
        assert set(values) <= set(FLAGS[name].get("values", values)), name


ENVIRONMENT: list[
    tuple[str, str, dict[str, Any], dict[str, str]]
] = [  # model, cluster, layout, variables beside the allocator's
    ("dense", "h100x8", {}, {}),
    ("dense", "h100x8", {"tp": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ("dense", "h100x8", {"cp": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ("dense", "b200x8", {"tp": 2}, {}),
    ("dense", "h100x8", {"tp": 2, "sharding": "fsdp"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
    ("experts", "b200x8", {"ep": 2, "ep_overlap": True}, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}),
    ("dense", "b200x8", {"cuda_graphs": ("attn",)}, {"NCCL_GRAPH_REGISTER": "0"}),
]


@pytest.mark.parametrize(("model", "cluster", "fields", "variables"), ENVIRONMENT)
def test_environment(model: str, cluster: str, fields: dict[str, Any], variables: dict[str, str]) -> None:
    plan = plan_of(model, cluster, **fields)
    assert environment(plan) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **variables}


def test_exchange_of_context_parallelism() -> None:
    assert flags_of(plan_of("dense", cp=2))["--cp-comm-type"] == ("p2p",)
    assert flags_of(plan_of("sparse attention", cp=2))["--cp-comm-type"] == ("allgather",)
    assert flags_of(plan_of("biased experts", cp=2))["--cp-comm-type"] == ("a2a",)
    assert "--cp-comm-type" not in flags_of(plan_of("dense"))


ENGINES: list[tuple[dict[str, Any], str]] = [
    ({}, "2.8"),
    ({"sharding": "fsdp"}, "2.10"),
    ({"ep": 2, "ep_overlap": True}, "2.8"),
    ({"ep": 2, "ep_overlap": True, "cuda_graphs": ("attn",)}, "2.12"),
]


@pytest.mark.parametrize(("fields", "version"), ENGINES)
def test_version_of_transformer_engine(fields: dict[str, Any], version: str, tmp_path: Path) -> None:
    export(plan_of("experts", **fields), tmp_path / "launch")
    assert f"Transformer Engine {version} or later" in (tmp_path / "launch" / README).read_text()


def test_refuses_a_plan_that_breaks_a_rule(tmp_path: Path) -> None:
    plan = plan_of("experts", tp=2, sequence_parallel=False, vpp=2)
    with pytest.raises(ExportError) as caught:
        export(plan, tmp_path / "launch")
    assert "moe-sequence-parallel: tp=2 without sequence parallelism" in str(caught.value)
    assert "virtual-stages: vpp=2 with pp=1" in str(caught.value)
    assert not list(tmp_path.iterdir())


LACKING = [  # model, reason
    ("minimax-text-01", "no lightning attention (its linear attention is the gated delta net)"),
    ("longcat-flash", "no layers of LatentAttention + Mlp + LatentAttention + Mlp + Moe"),
    ("kimi-linear-48b-a3b", "no Kimi delta attention"),
    ("jamba-v0.1", "no Mamba-1 blocks (only Mamba-2 is known)"),
    ("arctic", "no layers of Attention + Mlp + Moe"),
    ("grok-1", "no layers with 4 norms"),
    ("phi-3.5-moe", "no biases in some linear layers only"),
    ("ernie-4.5-21b-a3b", "no selection biases beside softmax scores"),
    ("deepseek-v4-flash", "no 4 residual streams"),
    ("mimo-v2-flash", "no Attention blocks with kv_heads 4 in some layers and 8 in others"),
]


@pytest.mark.parametrize(("model", "reason"), LACKING)
def test_refuses_a_model_that_megatron_lacks(model: str, reason: str, tmp_path: Path) -> None:
    problem = problem_of(model, "h100x256", 256, 4096)
    plan = price_plan(problem, layout_of(problem.model, 256))
    with pytest.raises(ExportError) as caught:
        export(plan, tmp_path / "launch")
    assert f"model '{load_model(model).name}': Megatron-LM 0.19.2 has {reason}" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_refuses_what_does_not_start_on_whole_nodes(tmp_path: Path) -> None:
    plan = plan_of("dense", "h100x16")
    halved = dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, dp=8, edp=8))
    with pytest.raises(ExportError, match="world-size: tp.cp.dp.pp = 1.1.8.1 = 8 is not the 16 GPUs"):
        export(halved, tmp_path / "launch")


def test_writes_four_files(tmp_path: Path) -> None:
    paths = export(plan_of(), tmp_path / "made" / "launch")
    assert [p.name for p in paths] == [ARGUMENTS, TORCHRUN, SLURM, README]
    assert sorted(p.name for p in (tmp_path / "made" / "launch").iterdir()) == sorted(p.name for p in paths)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["launch"]
    assert (tmp_path / "made" / "launch").stat().st_mode & 0o777 == 0o755
    for path in paths:
        assert os.access(path, os.X_OK) == path.name.endswith((".sh", ".sbatch"))


def test_writes_into_an_empty_directory_only(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(export(plan_of(), tmp_path / "empty")) == 4
    before = {p.name: p.read_bytes() for p in (tmp_path / "empty").iterdir()}
    with pytest.raises(FileError, match="is not an empty directory"):
        export(plan_of(tp=2), tmp_path / "empty")
    assert {p.name: p.read_bytes() for p in (tmp_path / "empty").iterdir()} == before
    (tmp_path / "file").write_text("kept")
    for taken in ("file", "file/launch"):
        with pytest.raises(FileError):
            export(plan_of(), tmp_path / taken)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("failing", ["write_text", "chmod", "replace"])
def test_writes_all_or_nothing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_late(path: Path, *rest: object, **more: object) -> object:
        return fail() if path.name == README else kept(path, *rest, **more)

    if failing == "replace":
        monkeypatch.setattr(megatron.os, "replace", fail)
    else:
        kept = getattr(Path, failing)
        monkeypatch.setattr(Path, failing, fail_late)
    with pytest.raises(FileError, match="cannot write to .*No space left on device"):
        export(plan_of(), tmp_path / "launch")
    assert not list(tmp_path.iterdir())


def test_the_file_names_its_origin(tmp_path: Path) -> None:
    text = export(plan_of("experts", "h100x16", tp=2, ep=4), tmp_path / "launch")[0].read_text()
    assert text.startswith("# mixtral-8x7b-8l-proxy on H100x16: TP2 DP8 EP4\n# written by moeplan ")
    assert "megatron-core 0.19.2; 16 GPUs" in text
    assert text.endswith("\n")


def test_a_plan_file_exports_as_the_plan_did(tmp_path: Path) -> None:
    plan = solve(problem_of("moonlight-16b-a3b", "h100x32", 256, 4096), keep=1).plans[0]
    plan.save(tmp_path / "plan.yaml")
    again = load_plan(tmp_path / "plan.yaml")
    assert arguments(again) == arguments(plan)
    assert environment(again) == environment(plan)
    first, second = export(plan, tmp_path / "first"), export(again, tmp_path / "second")
    for one, two in zip(first, second, strict=True):
        assert one.read_text() == two.read_text()


def test_words_are_quoted_for_a_shell(tmp_path: Path) -> None:
    path = export(plan_of("prediction", pp=2, vpp=2, stages="Et*3|(t|)*2tmL"), tmp_path / "launch")[0]
    lines = path.read_text().splitlines()
    assert "--pipeline-model-parallel-layout 'Et*3|(t|)*2tmL'" in lines
    assert "--moe-layer-freq '([0]*3+[1]*3)'" in lines
    assert set(words(arguments(plan_of()))) >= ALWAYS
