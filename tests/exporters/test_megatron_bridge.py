"""Export to Megatron-Bridge: overrides, what is refused, and what Bridge's own recipes and validation say to it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.model import Attention, LatentAttention
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError, FileError, MoeplanError
from moeplan.exporters.megatron import arguments, environment
from moeplan.exporters.megatron_bridge import DEMANDS, MegatronBridge, overrides, recipe_of
from moeplan.exporters.megatron_bridge_facts import bridge_facts, flags_of, overrides_of
from moeplan.exporters.reading.bridge import read_overrides, read_words
from moeplan.exporters.write import check_reading, export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters import judges
from tests.exporters.cases import capability, layout_of, problem_of, unpriced
from tests.exporters.random_targets import COUNT, changed, taken_plans

TARGET = MegatronBridge()
FACTS = bridge_facts()


def plan_of(
    model: str = "qwen3-30b-a3b",
    world: int = 16,
    cluster: str = "h100",
    problem: Mapping[str, Any] | None = None,
    **layout: Any,
) -> Plan:
    """A plan that Bridge runs, but for what is changed."""
    case = problem_of(model, f"{cluster}x{world}", **{"batch": 64, "seq_len": 4096, **(problem or {})})
    return unpriced(case, layout_of(case.model, world, **{"ep": 8 if case.model.moe else 1, **layout}))


def test_overrides_say_everything() -> None:
    plan = plan_of(world=32, tp=2, pp=2, vpp=2, dispatcher="deepep", ep_overlap=True, recompute=("moe_act", "layernorm"))
    found = overrides(plan)
    assert found["model.virtual_pipeline_model_parallel_size"] == "2" and found["model.overlap_p2p_comm"] == "true"
    assert found["model.moe_token_dispatcher_type"] == "flex" and found["model.moe_flex_dispatcher_backend"] == "deepep"
    assert found["model.recompute_modules"] == "[moe_act,layernorm]" and found["comm_overlap"] == "null"
    assert found["model.delay_wgrad_compute"] == "true" and found["mixed_precision"] == "bf16_mixed"
    plain = overrides(plan_of(dp_overlap=False))
    assert plain["model.recompute_modules"] == "null" and plain["ddp.overlap_grad_reduce"] == "false"


def test_splits_are_quoted() -> None:
    stages = "Et*12|t*16|t*16|t*17mL"
    found = overrides(plan_of("deepseek-v3", 64, ep=16, pp=4, stages=stages))
    assert found["model.pipeline_model_parallel_layout"] == f"'{stages}'"
    assert found["model.virtual_pipeline_model_parallel_size"] == "null" and found["model.mtp_num_layers"] == "1"


# What Bridge demands beside Megatron's rules: rule, what breaks it, what to write into a sound export, and what Bridge says to
# it or, where it says nothing, why the job would be another one than was priced.
REJECTED = [("recipe", {"model": "mixtral-8x7b"}, {"recipe": "mixtral_8x7b_pretrain_config"}, "has no attribute 'mixtral_8x7b")]
SILENT = [
    (
        "precision",
        {"problem": {"precision": "fp8-cs"}},
        {"mixed_precision": "bf16_with_fp8_current_scaling_mixed"},
        "first and last layers stay in bf16: a longer step",
    ),
    (
        "gradients",
        {"problem": {"gradient_bytes": 2}},
        {"ddp.grad_reduce_in_fp32": "false"},
        "the precision recipe sets fp32 again: twice the bytes",
    ),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [(row[0], row[1]) for row in (*REJECTED, *SILENT)]


@pytest.mark.parametrize(("rule", "change"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(rule: str, change: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=rf"Megatron-Bridge 0\.6\.2 cannot run this plan: .*\(rule {rule}: "):
        TARGET.check(plan_of(**change), "0.6.2")


def test_every_demand_has_a_row_in_one_of_the_lists() -> None:
    assert sorted(d.name for d in DEMANDS) == sorted(row[0] for row in REFUSED)


def test_rules_of_megatron_hold_where_bridge_checks_none() -> None:
    with pytest.raises(MoeplanError, match="ep=16, etp=1 do not suit a model with 64 experts|are not the|ep=12"):
        TARGET.check(plan_of("moonlight-16b-a3b", 48, ep=12), "0.6.2")


def test_versions() -> None:
    assert TARGET.version == judges.VERSIONS["megatron-bridge"]
    with pytest.raises(MoeplanError, match=r"Megatron-Bridge 1\.0 is not a version"):
        TARGET.check(plan_of(), "1.0")


@pytest.mark.parametrize("layers", ["", "2"])
def test_no_flag_is_lost(layers: str) -> None:
    more = {"recompute": ("full",), "recompute_layers": layers, "sharding": "fsdp"}
    plan = plan_of(world=32, tp=2, cp=2, pp=2, vpp=2, ep=4, dispatcher="hybridep", **more)
    flags = [f for name, part in arguments(plan).items() for f in part if name != "model"]
    there_and_back = {f[0]: f for f in flags_of(overrides_of(flags))}
    for flag in flags:
        assert flag[0] in FACTS.covered or there_and_back[flag[0]] == flag, flag


def test_covered_flags_have_no_override() -> None:
    assert not set(FACTS.covered) & {fact.flag for fact in FACTS.keys.values()}


def test_words() -> None:
    words = "--recipe r --mode pretrain -tp 4 -gb 256 model.tensor_model_parallel_size=2 +model.x=1 model.y=[a,b] -ep 8"
    assert read_words(words.split()) == (
        "r",
        {
            "model.tensor_model_parallel_size": "2",
            "train.global_batch_size": "256",
            "model.x": "1",
            "model.y": "[a,b]",
            "model.expert_model_parallel_size": "8",
        },
    )


def test_foreign_overrides() -> None:
    remarks: list[str] = []
    given = {
        "model.tensor_model_parallel_size": "2", "model.expert_model_parallel_size": "8", "dataset.seq_length": "4096",
        "model.expert_tensor_parallel_size": "1", "train.micro_batch_size": "1", "train.global_batch_size": "64",
        "model.sequence_parallel": "True", "mixed_precision": "bf16-with-fp8-current-scaling-mixed",
        "model.moe_token_dispatcher_type": "alltoall",
    }  # fmt: skip
    model, workload, layout = read_overrides("qwen3_30b_a3b_pretrain_config", given, 16, remarks, [])
    assert (model.name, layout.tp, layout.ep, layout.dp, layout.sequence_parallel) == ("qwen3-30b-a3b", 2, 8, 8, True)
    assert workload.global_batch == 64 and remarks[0].startswith("mixed_precision=bf16-with-fp8-current-scaling-mixed")
    with pytest.raises(FileError, match="recipe 'mine' of Megatron-Bridge is not one whose model is known"):
        read_overrides("mine", given, 16, [], [])


def test_whole_export(tmp_path: Path) -> None:
    case = problem_of("deepseek-v3", "h100x128", 256, 4096, "fp8-delayed")
    stages = "Et*6|t*8|t*8|t*8|t*8|t*8|t*8|t*7mL"
    plan = price_plan(case, layout_of(case.model, 128, tp=2, pp=8, ep=16, stages=stages, recompute=("mla_up_proj", "mlp")))
    export(plan, tmp_path / "out", exporter=TARGET, settings={"MEGATRON_BRIDGE": "/opt/bridge"})
    text = (tmp_path / "out" / "megatron_bridge.args").read_text()
    assert "mixed_precision=bf16_with_fp8_delayed_scaling_mixed" in text and "--recipe deepseek_v3_pretrain_config" in text


@pytest.mark.parametrize(
    ("was", "becomes", "difference"),
    [
        ("model.expert_model_parallel_size=8", "model.expert_model_parallel_size=4", "ep 4 for 8"),
        ("train.global_batch_size=64", "train.global_batch_size=32", "global_batch 32 for 64"),
        ("model.recompute_granularity=null", "model.recompute_granularity=full", "recompute"),
    ],
)
def test_a_changed_file_is_noticed(tmp_path: Path, was: str, becomes: str, difference: str) -> None:
    plan = plan_of()
    directory = changed(TARGET, plan, tmp_path, "megatron_bridge.args", lambda text: text.replace(was, becomes))
    with pytest.raises(ExportError, match=difference):
        check_reading(plan, TARGET.read(directory))


# Bridge's own code.


@functools.cache
def plans() -> list[Plan]:
    """Plans that the target takes: random ones, and some that have every feature."""
    return [
        *taken_plans(TARGET, list(FACTS.recipes)),
        plan_of("deepseek-v3", 64, ep=16, pp=4, stages="Et*12|t*16|t*16|t*17mL", ep_overlap=False),
        plan_of("deepseek-v3", 64, ep=16, pp=2, vpp=2, stages="Et*12|t*16|t*16|t*17mL", ep_overlap=True, dispatcher="deepep"),
        plan_of("qwen3-30b-a3b", 32, "gb200", {"precision": "fp8-mx"}, pp=2, vpp=2, dispatcher="hybridep"),
        plan_of("qwen3-30b-a3b", problem={"precision": "fp8-delayed"}, cuda_graphs=("attn", "moe_router", "moe_preprocess")),
        plan_of("llama3.1-8b", tp=4, tp_overlap=True, optimizer_offload=0.5, cuda_graphs=("full_iteration",)),
        plan_of("qwen3-235b-a22b", 64, sharding="fsdp", recompute=("full",), problem={"moment_bytes": 2}),
        plan_of("deepseek-v2-lite", shared_overlap=True, etp=2, ep=4, problem={"capacity_factor": 1.25}),
    ]


def _case(plan: Plan, **change: str) -> dict[str, Any]:
    said = {**overrides(plan), **change}
    return {
        "recipe": recipe_of(plan.problem.model),
        "config": json.loads(json.dumps(dict(plan.problem.model.config), default=str)),
        "overrides": [f"{key}={value}" for key, value in said.items()],
        "environment": environment(plan),
        "world": plan.layout.world,
        "capability": capability(plan.problem)[0],
    }


SPOILED = [
    ({"model.tensor_model_parallel": "2"}, "tensor_model_parallel"),
    ({"model.tensor_model_parallel_size": "3"}, ""),
    ({"model.expert_model_parallel_size": "7"}, ""),
    ({"train.global_batch_size": "63"}, ""),
    ({"model.recompute_granularity": "most"}, "most"),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Bridge's words on all cases of this file, said once."""
    parts = {
        "taken": [_case(plan) for plan in plans()],
        "spoiled": [_case(plan_of(), **change) for change, _ in SPOILED],
        "rejected": [{**_case(plan_of()), **change} for _, _, change, _ in REJECTED],
        "silent": [_case(plan_of(), **change) for _, _, change, _ in SILENT],
    }
    return judges.verdicts_of_parts("bridge", parts, tmp_path_factory.mktemp("bridge"), "transformers", "megatron-bridge")


def test_bridge_accepts_what_is_not_refused(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    assert len(plans()) > COUNT
    for plan, verdict in zip(plans(), verdicts["taken"], strict=True):
        TARGET.check(plan, "0.6.2")
        x, workload = plan.layout, plan.problem.workload
        assert verdict["accepted"], f"{plan.problem.model.name} {x.degrees()}: {verdict['message']}"
        assert verdict["degrees"] == [x.tp, x.cp, x.pp, x.ep, x.etp] and verdict["dp"] == x.dp
        assert verdict["batches"] == [workload.global_batch, x.micro_batch]
        letters = chunk_letters(plan.problem.model, x.pp, x.vpp, x.stages)
        assert verdict["layers"] == [[c.count("t") for c in letters[rank :: x.pp]] for rank in range(x.pp)]
        assert verdict["overlap"] == [x.ep_overlap, x.tp_overlap, x.dp_overlap]
        assert (verdict["mtp"] or 0) == len(plan.problem.model.mtp)


def test_bridge_refuses_what_is_wrong(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    for (change, words), verdict in zip(SPOILED, verdicts["spoiled"], strict=True):
        assert not verdict["accepted"] and words in verdict["message"], f"{change}: {verdict}"


def test_demands_that_bridge_enforces_and_does_not(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    for (_, _, _, words), verdict in zip(REJECTED, verdicts["rejected"], strict=True):
        assert not verdict["accepted"] and words in verdict["message"], verdict
    precision, gradients = verdicts["silent"]
    assert precision["accepted"] and precision["first_and_last_in_bf16"]
    assert gradients["accepted"] and gradients["gradients_in_fp32"]


def _plain(name: str) -> str:
    """A model's name without what writers differ in."""
    return re.sub(r"^meta|-hf$|-base$|-instruct$|[-_]", "", name.lower().rsplit("/", 1)[-1])


def test_recipes_are_of_the_models(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    found = {plan.problem.model.name: verdict for plan, verdict in zip(plans(), verdicts["taken"], strict=True)}
    assert set(found) == set(FACTS.recipes)
    for name, verdict in found.items():
        assert _plain(verdict["hub"]) == _plain(name)
        model = load_model(name)
        moe = dataclasses.replace(model, mtp=()).moe
        heads = {b.heads for b in model.blocks if isinstance(b, (Attention, LatentAttention))}
        shape = verdict["shape"]
        assert (shape["layers"], shape["hidden"], shape["vocab"]) == (len(model.layers), model.hidden, model.vocab), name
        assert shape["heads"] in heads, name
        if moe is not None:
            assert (shape["experts"], shape["topk"], shape["expert_width"]) == (moe.experts, moe.topk, moe.width), name
