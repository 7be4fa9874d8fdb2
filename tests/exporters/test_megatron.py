"""What is written for Megatron, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import ExportError, UsageError
from moeplan.exporters.base import Flag
from moeplan.exporters.megatron import MEGATRON_CORE, Megatron, arguments, environment
from moeplan.exporters.megatron_layout import FACTS, layout_sections
from moeplan.exporters.readme import README
from moeplan.exporters.write import export
from moeplan.planner.plan import Plan, load_plan, price_plan
from moeplan.planner.solve import solve
from tests.exporters.cases import judged, layout_of, problem_of, small_models, unpriced, words
from tests.exporters.random_layouts import random_case

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
    sections = layout_sections(unpriced(*random_case(seed)))
    given = [flag for flags in sections.values() for flag in flags]
    names = [flag[0] for flag in given]
    assert len(set(names)) == len(names)
    for name, *values in given:
        fact = FACTS.flags[name]
        assert len(values) == {"switch": 0, "value": 1}.get(fact.takes, len(values)), name
        assert set(values) <= set(fact.values or values), name


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


EXPLICIT: list[tuple[str, dict[str, Any], list[Flag]]] = [  # what Megatron would change by itself, written out
    ("dense", {"pp": 2}, [("--no-overlap-p2p-communication",)]),
    ("dense", {"pp": 2, "vpp": 3}, [("--microbatch-group-size-per-virtual-pipeline-stage", "2")]),
    (
        "dense",
        {},
        [("--accumulate-allreduce-grads-in-fp32",), ("--ckpt-format", "torch_dist"), ("--ckpt-fully-parallel-load",)],
    ),
    ("dense", {}, [("--async-save",), ("--use-persistent-ckpt-worker",), ("--async-strategy", "mcore")]),
    ("dense", {"sharding": "fsdp"}, [("--ckpt-format", "fsdp_dtensor")]),
    ("dense", {"optimizer_offload": 0.5}, [("--exp-avg-dtype", "fp32"), ("--main-params-dtype", "fp32")]),
    ("experts", {"tp": 2}, [("--expert-tensor-parallel-size", "1"), ("--sequence-parallel",)]),
]


@pytest.mark.parametrize(("model", "fields", "flags"), EXPLICIT)
def test_nothing_is_left_to_be_changed(model: str, fields: dict[str, Any], flags: list[Flag]) -> None:
    given = flags_of(plan_of(model, **fields))
    for name, *values in flags:
        assert given[name] == tuple(values)
    assert ("--no-overlap-p2p-communication" in given) == (fields == {"pp": 2})
    assert ("--async-save" in given) == (fields.get("sharding") != "fsdp")


def test_older_versions_get_their_names() -> None:
    plan = plan_of("experts", cuda_graphs=("attn", "moe_router"))
    words_of = {version: words(arguments(plan, version)) for version in FACTS.versions}
    assert "--cuda-graph-scope" in words_of["0.17.0"] and "--cuda-graph-modules" not in words_of["0.17.0"]
    assert words_of["0.18.0"] == words_of["0.19.2"] == words_of["0.20.0"]
    assert "--cuda-graph-modules" in words_of["0.18.0"]


def test_refuses_what_a_version_lacks() -> None:
    plan = plan_of("dense", cuda_graphs=("full_iteration",))
    assert arguments(plan, "0.18.0")
    with pytest.raises(ExportError, match=r"Megatron-LM 0.17.0 lacks --cuda-graph-impl full_iteration \(from 0.18.0 on\)"):
        arguments(plan, "0.17.0")
    with pytest.raises(UsageError, match=r"Megatron-LM 0.16.1 is not a version .*known: 0.17.0, 0.18.0, 0.19.2, 0.20.0"):
        Megatron().check(plan, "0.16.1")


def test_the_job_is_one_process() -> None:
    exporter = Megatron()
    job = exporter.job(plan_of("hybrid", "a100x16", pp=2, stages="Et*5|t*7L"), MEGATRON_CORE)
    assert (job.nodes, job.per_node, job.world, job.device, job.vendor) == (2, 8, 16, "A100", "nvidia")
    assert job.program == ("$PRETRAIN_SCRIPT",)
    assert [v.default for v in job.variables] == ["", "$MEGATRON_LM/pretrain_hybrid.py"]
    assert job.requirements == ("torch>=2.4", "megatron-core==0.19.*", "transformer-engine>=2.8")
    older = exporter.job(plan_of("hybrid", "a100x16", pp=2, stages="Et*5|t*7L"), "0.17.0")
    assert older.variables[1].default == "$MEGATRON_LM/pretrain_mamba.py" and "megatron-core==0.17.*" in older.requirements


def test_recompute_of_some_layers_is_megatrons_block() -> None:
    case = problem_of("qwen3-30b-a3b", "h100x16", 64, 4096)
    layout = layout_of(case.model, 16, pp=2, ep=8, recompute=("full",), recompute_layers="3")
    assert layout_sections(unpriced(case, layout))["recompute and CUDA graphs"][:3] == [
        ("--recompute-granularity", "full"),
        ("--recompute-method", "block"),
        ("--recompute-num-layers", "3"),
    ]
    verdict = judged(case, layout)
    assert verdict.accepted, verdict
