"""Our rules refuse exactly what Megatron refuses: a row for every rule, and random layouts.

Judged is what the exporter writes for a layout, as if our rules had not been asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.stages import parse_split
from moeplan.errors import LayoutError
from moeplan.planner.constraints import RULES, violations
from moeplan.planner.problem import Problem
from tests import megatron
from tests.exporters.cases import judged, layout_of, problem_of, small_models, understood
from tests.exporters.random_layouts import random_case

Fields = Mapping[str, Any]
OVERLAP: Fields = {"ep": 2, "ep_overlap": True}
SHARED: Fields = {"ep": 2, "shared_overlap": True}
FSDP: Fields = {"sharding": "fsdp"}
PREPROCESS = ("moe_router", "moe_preprocess")


def case_of(model: str, cluster: str, fields: Fields, workload: Fields) -> tuple[Problem, Layout]:
    problem = problem_of(small_models()[model], cluster, **{"batch": 48, "seq_len": 2048, **workload})
    given = dict(fields)
    world = given.pop("world", problem.profile.cluster.gpus)
    return problem, layout_of(problem.model, world, **given)


# What Megatron refuses: rule, model, cluster, layout, workload, stage at which Megatron refuses, a part of its words.
REFUSED: list[tuple[str, str, str, Fields, Fields, str, str]] = [
    ("world-size", "dense", "gb200x12", {"tp": 8, "world": 16}, {}, "validate", "is not divisible by total_model_size"),
    ("attention-heads", "few groups", "h100x8", {"tp": 8}, {}, "config", "num_attention_heads (12) must be a multiple"),
    ("query-groups", "few groups", "h100x6", {"tp": 3}, {"seq_len": 1536}, "config", "num_query_groups (2)"),
    ("query-groups", "few groups", "h100x6", {"tp": 6}, {"seq_len": 1536}, "build", "2048 is not divisible by 6"),
    ("state-heads", "hybrid", "h100x48", {"tp": 16}, {}, "build", "ngroups"),
    ("state-heads", "hybrid with prediction", "h100x24", {"cp": 3}, {"seq_len": 1536}, "build", "nheads must be evenly"),
    ("state-heads", "linear attention", "h100x24", {"cp": 3}, {"seq_len": 1536}, "config", "linear_num_key_heads"),
    ("feed-forward-width", "experts", "h100x24", {"etp": 3}, {}, "build", "divisible"),
    ("experts", "many experts", "h100x24", {"ep": 24}, {}, "validate", "Number of experts should be a multiple"),
    ("experts", "dense", "h100x8", {"ep": 2}, {}, "validate", "num_experts must be non None"),
    ("expert-bias", "biased experts", "h100x8", {"etp": 2}, {}, "config", "Bias in Moe"),
    ("context-chunks", "dense", "h100x8", {"cp": 4}, {"seq_len": 1004}, "validate", "multiple of 2 * context-parallel-size"),
    ("rotary-table", "latent", "h100x24", {"cp": 3}, {"seq_len": 1536}, "build", "is invalid for input of size"),
    ("sequence-shards", "dense", "h100x8", {"tp": 4}, {"seq_len": 1002}, "step", "not divisible by TP x CP"),
    ("moe-sequence-parallel", "experts", "h100x8", {"tp": 2, "sequence_parallel": False}, {}, "step", "sequence parallelism"),
    ("quantized-ddp", "dense", "h100x8", {"sharding": "ddp"}, {"precision": "fp8-cs"}, "validate", "--fp8-param-gather only"),
    ("moments-ddp", "dense", "h100x8", {"sharding": "ddp"}, {"moment_bytes": 2}, "config", "precision-aware-optimizer only"),
    ("offload-sharding", "dense", "h100x8", {"sharding": "ddp", "optimizer_offload": 0.5}, {}, "config", "precision-aware"),
    ("offload-quantized", "dense", "h100x8", {"optimizer_offload": 0.5}, {"precision": "fp8-cs"}, "validate", "delayed"),
    ("graph-scopes", "experts", "h100x8", {"cuda_graphs": ("moe",)}, {}, "config", "only supported with drop-padding"),
    ("graph-scopes", "experts", "h100x8", {"cuda_graphs": ("mlp",)}, {}, "config", "only supported for dense layers"),
    ("graph-scopes", "hybrid with dense", "h100x8", {"cuda_graphs": ("mlp",)}, {}, "config", "only supported for dense layers"),
    ("graph-scopes", "experts", "h100x8", {"cuda_graphs": ("moe_preprocess",)}, {}, "config", "moe_router cuda graph"),
    ("graph-scopes", "dense", "h100x8", {"cuda_graphs": ("moe_router",)}, {}, "config", "only supported for MoE"),
    ("graph-scopes", "dense", "h100x8", {"cuda_graphs": ("attn", "full_iteration")}, {}, "validate", "full_iteration"),
    ("virtual-stages", "dense", "h100x8", {"vpp": 2}, {}, "validate", "should be greater than 1"),
    ("pipeline-split", "dense", "h100x16", {"pp": 8}, {}, "validate", "should be divisible"),
    ("pipeline-split", "dense", "h100x8", {"pp": 4, "vpp": 2}, {}, "layers", "divisible"),
    ("pipeline-split", "dense", "h100x8", {"pp": 2, "stages": "Et*5|t*6L"}, {}, "config", "Number of decoder layers 11"),
    ("pipeline-split", "dense", "h100x8", {"pp": 2, "stages": "tEt*5|t*6L"}, {}, "config", "first layer must be embedding"),
    ("pipeline-split", "dense", "h100x8", {"pp": 2, "stages": "Et*6()*2|t*6L"}, {}, "validate", "Invalid layer character"),
    ("pipeline-split", "prediction", "h100x8", {"pp": 2, "stages": "Et*3|t*3L"}, {}, "config", "Number of mtp layers"),
    ("pipeline-split", "prediction", "h100x8", {"pp": 2, "stages": "Et*3|ttmtL"}, {}, "config", "before MTP"),
    ("pipeline-split", "prediction", "h100x8", {"pp": 2, "vpp": 2, "stages": "Ett|ttm|t|tL"}, {}, "config", ""),
    ("pipeline-split", "two predictions", "h100x8", {"pp": 4, "stages": "Ett|tttt|m|mL"}, {}, "config", "MTP layers must"),
    ("global-batch", "dense", "h100x8", {"micro_batch": 5}, {}, "validate", "must be divisible by"),
    ("interleaving", "dense", "h100x8", {"pp": 4, "vpp": 3}, {"batch": 12}, "step", "2 micro-batches under PP=4"),
    ("interleaving", "dense", "h100x8", {"pp": 4, "vpp": 3}, {"batch": 4}, "step", "M=2"),
    ("tensor-overlap", "dense", "h100x8", {"tp_overlap": True}, {}, "validate", "only when sequence parallelism"),
    ("deepep-group", "experts", "h100x8", {"dispatcher": "deepep"}, {}, "build", "DeepEP dispatcher requires"),
    (
        "graph-capacity", "experts", "h100x8", {"cuda_graphs": PREPROCESS}, {"capacity_factor": 1.25},
        "config", "moe_preprocess cuda graph is not supported",
    ),
    ("overlap-experts", "experts", "h100x8", {"ep_overlap": True}, {}, "config", "only supported with expert model"),
    ("overlap-experts", "experts", "h100x8", {**OVERLAP, "dispatcher": "allgather"}, {}, "config", "alltoall"),
    ("overlap-pipeline", "experts", "h100x8", {**OVERLAP, "pp": 2}, {}, "config", "must be specified when"),
    ("overlap-prediction", "two predictions", "h100x8", OVERLAP, {}, "config", "at most one layer"),
    (
        "overlap-fsdp", "experts", "h100x8", {**OVERLAP, **FSDP, "pp": 2, "vpp": 2}, {},
        "step", "interleaved",
    ),
    (
        "overlap-fsdp", "experts", "h100x8", {**OVERLAP, **FSDP, "cuda_graphs": ("attn",)}, {},
        "step", "per-layer CUDA graphs",
    ),
    ("overlap-bias", "shared experts", "h100x8", {**OVERLAP, "cuda_graphs": ("attn",)}, {}, "validate", "bias"),
    ("overlap-graphs", "prediction", "h100x8", {**OVERLAP, "cuda_graphs": ("mlp",)}, {}, "config", "moe and mlp"),
    ("shared-overlap", "shared experts", "h100x8", {**SHARED, "dispatcher": "allgather"}, {}, "config", "alltoall or flex"),
    ("shared-overlap", "shared experts", "h100x8", {**SHARED, **OVERLAP}, {}, "config", "disable moe_shared_expert_overlap"),
    ("shared-recompute", "shared experts", "h100x8", {**SHARED, "recompute": ("shared_experts",)}, {}, "config", "cannot work"),
    ("overlap-recompute", "experts", "h100x8", {**OVERLAP, "recompute": ("moe",)}, {}, "config", "disable moe"),
    ("overlap-recompute", "experts", "h100x8", {**OVERLAP, "recompute": ("full",)}, {}, "config", "disable full"),
    ("recompute-full", "experts", "h100x8", {"recompute": ("full", "moe_act")}, {}, "config", "Invalid choices"),
    ("recompute-blocks", "experts", "h100x8", {"recompute": ("mla_up_proj",)}, {}, "config", "multi_latent_attention"),
    ("recompute-blocks", "dense", "h100x8", {"recompute": ("moe_act",)}, {}, "config", "only supported with moe_grouped_gemm"),
    ("recompute-delayed", "experts", "h100x8", {"recompute": ("moe_act",)}, {"precision": "fp8-delayed"}, "config", "Delayed"),
    ("recompute-graphs", "dense", "h100x8", {"recompute": ("full",), "cuda_graphs": ("attn",)}, {}, "config", "full recompute"),
    (
        "recompute-graphs", "experts", "h100x8", {"recompute": ("moe",), "cuda_graphs": ("moe_router",)}, {},
        "config", "moe recompute is not supported",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "model", "cluster", "fields", "workload", "stage", "words"), REFUSED)
def test_megatron_refuses_too(
    rule: str, model: str, cluster: str, fields: Fields, workload: Fields, stage: str, words: str
) -> None:
    case = case_of(model, cluster, fields, workload)
    assert [v.rule for v in violations(*case)] == [rule]
    verdict = judged(*case, build=True)
    assert (verdict.accepted, verdict.stage) == (False, stage), verdict
    assert words in verdict.message


# What Megatron's code lets pass and our rules do not: rule, where it goes beyond Megatron, and one such case.
Beyond = Callable[[Problem, Layout], bool]


def _always(problem: Problem, layout: Layout) -> bool:
    return True


def _divides(problem: Problem, layout: Layout) -> bool:
    """Megatron takes for dp what the other degrees leave."""
    return problem.profile.cluster.gpus % (layout.tp * layout.cp * layout.pp) == 0


def _without_shared_experts(problem: Problem, layout: Layout) -> bool:
    """Megatron ignores the overlap of experts that a model has not, but for what its own checks ask."""
    return layout.dispatcher != "allgather" and not layout.ep_overlap


def _split_contradicts(problem: Problem, layout: Layout) -> bool:
    """Megatron takes vpp from the text, puts embedding and head on the outer chunks, and knows no letters in hybrids."""
    if problem.model.is_hybrid:
        return True
    try:
        chunks = parse_split(layout.stages)
    except LayoutError:
        return False
    count = len(chunks)
    outer = chunks[0].startswith("E") and chunks[-1].endswith("L")
    return count != layout.pp * layout.vpp and count % layout.pp == 0 or not outer


BEYOND: list[tuple[str, Beyond, str, str, Fields, Fields]] = [
    ("world-size", _divides, "dense", "h100x16", {"world": 8}, {}),
    ("experts", lambda p, x: p.model.moe is None and x.ep == 1, "dense", "h100x8", {"etp": 2}, {}),
    ("context-heads", _always, "biased experts", "h100x16", {"cp": 16}, {}),
    ("offload-sharding", lambda p, x: x.sharding == "fsdp", "dense", "h100x8", {**FSDP, "optimizer_offload": 0.5}, {}),
    ("graph-era", _always, "dense", "h100x8", {"cuda_graphs": ("attn",)}, {"era": "te-2024"}),
    ("pipeline-chunks", _always, "few groups", "h100x16", {"pp": 16, "stages": "E" + "|" * 9 + "(t|)*6L"}, {}),
    ("pipeline-split", _split_contradicts, "dense", "h100x8", {"pp": 2, "stages": "Et*3|(t*3|)*2t*3L"}, {}),
    ("pipeline-split", _split_contradicts, "dense", "h100x8", {"pp": 4, "stages": "|Et*6|t*6L|"}, {}),
    ("pipeline-split", _split_contradicts, "hybrid", "h100x16", {"pp": 8}, {}),
    ("pipeline-split", _split_contradicts, "hybrid with prediction", "h100x8", {"pp": 2, "stages": "Et*6m|t*6L"}, {}),
    ("dispatcher-model", _always, "dense", "h100x8", {"dispatcher": "alltoall"}, {}),
    ("dispatcher-era", _always, "experts", "h100x8", {"ep": 2, "dispatcher": "hybridep"}, {"era": "te-2024"}),
    ("dispatcher-device", _always, "experts", "mi300xx8", {"ep": 2, "dispatcher": "deepep"}, {}),
    ("dispatcher-link", _always, "experts", "a100-pciex8", {"ep": 2, "dispatcher": "deepep"}, {}),
    ("deepep-domain", _always, "experts", "gh200x8", {"ep": 2, "dispatcher": "deepep"}, {}),
    ("overlap-era", _always, "experts", "h100x8", OVERLAP, {"era": "te-2024"}),
    ("shared-overlap", _without_shared_experts, "experts", "h100x8", SHARED, {}),
    ("shared-era", _always, "shared experts", "h100x8", SHARED, {"era": "te-2024"}),
    ("recompute-layers", _always, "dense", "h100x8", {"recompute": ("full",), "recompute_layers": "99"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "beyond", "model", "cluster", "fields", "workload"), BEYOND)
def test_stricter_than_megatron(rule: str, beyond: Beyond, model: str, cluster: str, fields: Fields, workload: Fields) -> None:
    case = case_of(model, cluster, fields, workload)
    assert [v.rule for v in violations(*case)] == [rule]
    assert beyond(*case)
    verdict = judged(*case, build=True)
    assert verdict.accepted, verdict


def test_every_rule_was_held_against_megatron() -> None:
    # No flag stands for a schedule of MoE layers (the exporter refuses those that Megatron does not run) or a host's memory.
    flags = {rule.name for rule in RULES if not rule.name.startswith("schedule-") and rule.name != "offload-host"}
    assert {row[0] for row in REFUSED} | {row[0] for row in BEYOND} == flags


# Layouts that rules or exporter once had wrong, and that both now accept.
ACCEPTED: list[tuple[str, str, Fields, Fields]] = [
    ("sparse attention", "h100x8", {"cp": 2}, {}),
    ("biased experts", "h100x8", {"cp": 8}, {}),
    ("experts", "h100x8", FSDP, {"moment_bytes": 2}),
    ("experts", "h100x8", {"cuda_graphs": PREPROCESS, "dispatcher": "allgather"}, {"capacity_factor": 1.25}),
    ("shared experts", "h100x8", {**OVERLAP, "cuda_graphs": ("attn",), "dp_overlap": False}, {}),
    ("shared experts", "h100x8", {**OVERLAP, "cuda_graphs": ("moe_router",)}, {}),
    ("experts", "h100x8", {**OVERLAP, **FSDP, "cuda_graphs": ("full_iteration",)}, {}),
    ("shared experts", "h100x8", {**SHARED, "tp": 2, "recompute": ("moe",)}, {}),
    ("shared experts", "h100x8", {**SHARED, "dispatcher": "deepep", "cuda_graphs": ("moe_router",)}, {}),
    ("hybrid with dense", "h100x8", {"cuda_graphs": ("attn", "mamba")}, {}),
    ("hybrid", "h100x16", {"tp": 2, "cp": 8}, {}),
    ("dense", "h100x8", {"pp": 2, "stages": "E,t*3|(t,)*1t*8L"}, {}),
    ("dense", "h100x8", {"pp": 2, "recompute": ("full",), "recompute_layers": "2"}, {}),
    ("experts", "h100x8", {"recompute": ("full",), "recompute_layers": "1"}, {}),
]


@pytest.mark.parametrize(("model", "cluster", "fields", "workload"), ACCEPTED)
def test_both_accept(model: str, cluster: str, fields: Fields, workload: Fields) -> None:
    case = case_of(model, cluster, fields, workload)
    assert violations(*case) == []
    verdict = judged(*case, build=True)
    assert verdict.accepted, verdict


def _chunks(text: str) -> tuple[str, ...] | None:
    try:
        return parse_split(text)
    except LayoutError:
        return None


def test_text_of_splits() -> None:
    rng = random.Random(0)
    parts = ["E", "t", "m", "L", "|", "(", ")", "*2", "*3", ",", "x", "(t|)*2", "t*4"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 7))) for _ in range(4000)]
    texts += ["Et()*2L", "E(t*2*3)*2L", "((t|)*2)*2", "Et*3|(tt|)*29m|L", "E,t|t,L"]
    texts = [text for text in texts if text.strip(",")]  # nothing at all is the even split
    theirs = megatron.split_chunks(texts)
    assert 800 < sum(chunks is not None for chunks in theirs) < 3200
    for text, chunks in zip(texts, theirs, strict=True):
        assert _chunks(text) == chunks, text


@pytest.mark.parametrize("block", range(8))
def test_random_layouts(block: int) -> None:
    beyond = {row[0]: row[1] for row in BEYOND}
    accepted = 0
    for seed in range(100 * block, 100 * (block + 1)):
        problem, layout = random_case(seed)
        broken = {v.rule for v in violations(problem, layout)}
        theirs = {rule for rule in broken if rule not in beyond or not beyond[rule](problem, layout)}
        verdict = judged(problem, layout, build=bool(broken) or seed % 3 == 0)
        said = (
            f"seed {seed}, {problem.model.name} on {problem.profile.cluster.name}, {layout}: {verdict}; ours: {sorted(broken)}"
        )
        if theirs:
            assert not verdict.accepted, said
        elif not broken:
            assert verdict.accepted, said
            assert (verdict.microbatches, verdict.layers) == understood(problem, layout), said
            accepted += 1
    assert 30 <= accepted <= 70  # neither all nor nothing
