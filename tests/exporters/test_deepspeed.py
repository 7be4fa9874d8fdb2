"""Export to DeepSpeed: what is written, what is refused, what DeepSpeed's own code says to it, and that it trains."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model, model_names
from moeplan.errors import ExportError, MoeplanError
from moeplan.exporters.deepspeed import DeepSpeed
from moeplan.exporters.deepspeed_config import (
    DEMANDS,
    FACTS,
    config,
    flat,
    known_class,
    megatron_flags,
    model_config,
    native_layer,
)
from moeplan.exporters.deepspeed_script import SCRIPT
from moeplan.exporters.demands import broken_demands
from moeplan.exporters.write import check_reading, export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters import judges
from tests.exporters.cases import layout_of, problem_of, unpriced
from tests.exporters.random_targets import COUNT, changed, exported, refused_plans, taken_plans, write_files

TARGET = DeepSpeed()
MODELS = [name for name in model_names() if known_class(load_model(name))]


def plan_of(
    model: str | Model = "qwen3-30b-a3b", world: int = 16, problem: Mapping[str, Any] | None = None, **layout: Any
) -> Plan:
    """A plan that DeepSpeed runs, but for what is changed."""
    case = problem_of(model, f"h100x{world}", **{"batch": 64, "seq_len": 4096, **(problem or {})})
    if "moe_schedule" in layout:  # no plan for Megatron has one
        case = dataclasses.replace(case, target="research")
    return unpriced(case, layout_of(case.model, world, **{"ep": 8, "dp_overlap": False, **layout}))


def test_every_field_is_written() -> None:
    data = config(plan_of(recompute=("full",), optimizer_offload=1.0), "0.19.8")
    assert (data["train_batch_size"], data["train_micro_batch_size_per_gpu"], data["gradient_accumulation_steps"]) == (64, 1, 4)
    assert data["zero_optimization"]["stage"] == 1 and not data["zero_optimization"]["overlap_comm"]
    assert data["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert data["expert_parallel"]["autoep_size"] == 8 and data["expert_parallel"]["preset_model"] == "qwen3_moe"
    assert data["communication_data_type"] == data["data_types"]["grad_accum_dtype"] == "fp32"
    assert "activation_checkpointing" in data and "tensor_parallel" not in data


def test_dense_with_tensor_parallelism() -> None:
    plan = plan_of("qwen3-8b", ep=1, tp=4, sequence_parallel=False, sharding="fsdp", dp_overlap=True)
    data = config(plan, "0.19.8")
    assert data["tensor_parallel"] == {"autotp_size": 4} and "expert_parallel" not in data
    assert data["zero_optimization"]["stage"] == 3 and data["zero_optimization"]["overlap_comm"]


# Demands that DeepSpeed's own code enforces: rule, what breaks it, keys to write into an export that breaks nothing (none: the
# plan itself is written, past the check), a part of its words.
REJECTED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("model-class", {"model": "gpt-oss-20b"}, {"expert_parallel.preset_model": "gpt_oss"}, "Unknown preset_model"),
    ("pipeline", {"pp": 2}, {}, "train_batch_size is not equal"),
    ("context", {"cp": 2}, {}, "train_batch_size is not equal"),
    ("expert-tensor", {"etp": 2}, {"expert_parallel.expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size=2"),
    ("sharding", {"sharding": "ddp"}, {"zero_optimization.stage": 0}, "unsupported mix of model_dtype"),
    ("dispatcher", {"dispatcher": "hybridep"}, {"expert_parallel.comm_backend": "hybridep"}, "comm_backend must be one of"),
]

# Demands that it does not: rule, what breaks it, why the job would die or be another one than was priced.
SILENT: list[tuple[str, dict[str, Any], str]] = [
    (
        "model-config",
        {"model": dataclasses.replace(load_model("qwen3-30b-a3b"), hidden=1024)},
        "train.py builds what config.json says, and no config.json says this model",
    ),
    ("prediction-layers", {"model": "deepseek-v3"}, "the class leaves these layers out: another model is trained"),
    ("sequence-parallel", {"tp": 2}, "norms and residuals are whole on every rank: more memory than was counted"),
    ("zero-overlap", {"dp_overlap": True}, "the optimizer of ZeRO 1 in bf16 does not look at overlap_comm: a longer step"),
    ("ep-overlap-shared-overlap-tp-overlap", {"ep_overlap": True}, "no key asks for it: a longer step"),
    ("moe-schedule", {"moe_schedule": "s1"}, "no key asks for it: another step"),
    ("cuda-graphs", {"cuda_graphs": ("attn",)}, "only inference captures graphs: a longer step"),
    ("recompute", {"recompute": ("core_attn",)}, "whole layers would be recomputed: a longer step"),
    ("recompute-layers", {"recompute": ("full",), "recompute_layers": "2"}, "all layers would be recomputed: a longer step"),
    ("precision", {"problem": {"precision": "fp8-delayed"}}, "training is in bf16: more time and memory"),
    (
        "capacity",
        {"problem": {"capacity_factor": 1.25}},
        "no token is dropped: a crowded expert takes more memory than was counted",
    ),
    ("offload", {"optimizer_offload": 0.5}, "ZeRO 1 moves all states to the host: more host memory and a longer step"),
]
REFUSED = [(rule, change) for rule, change, *_ in (*REJECTED, *SILENT)]


@pytest.mark.parametrize(("rule", "change"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(rule: str, change: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=rf"DeepSpeed 0\.19\.8 cannot run this plan: .*\(rule {rule}: "):
        TARGET.check(plan_of(**change), "0.19.8")


def test_every_demand_has_a_row_in_one_of_the_lists() -> None:
    assert sorted(d.name for d in DEMANDS) == sorted([row[0] for row in REJECTED] + [row[0] for row in SILENT])


def test_rules_of_the_planner_come_first() -> None:
    with pytest.raises(MoeplanError, match="ep=16, etp=1 do not suit"):
        TARGET.check(plan_of("mixtral-8x7b", ep=16), "0.19.8")


def test_versions() -> None:
    assert TARGET.version == judges.VERSIONS["deepspeed"]
    assert "comm_backend" not in config(plan_of(), "0.19.6")["expert_parallel"]
    TARGET.check(plan_of(), "0.19.6")
    with pytest.raises(ExportError, match=r"0\.19\.6 lacks expert_parallel\.comm_backend \(from 0\.19\.7 on\)"):
        TARGET.check(plan_of(dispatcher="deepep"), "0.19.6")
    with pytest.raises(MoeplanError, match=r"DeepSpeed 0\.1 is not a version"):
        TARGET.check(plan_of(), "0.1")


def test_facts_cover_what_is_written() -> None:
    written = set()
    for plan in (plan_of(recompute=("full",), optimizer_offload=1.0, dispatcher="deepep"), plan_of(sharding="fsdp")):
        written |= {flag[0] for flag in flat(config(plan, "0.19.8"))}
    written |= {flag[0] for flag in flat(config(plan_of("qwen3-8b", ep=1, tp=2, sequence_parallel=False), "0.19.8"))}
    assert written == set(FACTS.flags)


def test_deepep_is_told_its_tokens() -> None:
    data = config(plan_of(dispatcher="deepep", micro_batch=2), "0.19.8")["expert_parallel"]
    assert (data["comm_backend"], data["comm_max_tokens_per_rank"]) == ("deepep", 8192)


def test_native_layer() -> None:
    native = native_layer(plan_of("mixtral-8x7b", ep=4))
    assert native is not None and (native["num_experts"], native["ep_size"], native["k"]) == (8, 4, 2)
    assert native_layer(plan_of(sharding="fsdp")) is None
    assert native_layer(plan_of("moonlight-16b-a3b")) is None  # its router is a sigmoid
    assert "native_moe.json" not in TARGET.files(plan_of(sharding="fsdp"), "0.19.8")


def test_flags_of_megatron_deepspeed() -> None:
    flags = megatron_flags(plan_of("mixtral-8x7b", ep=4, recompute=("full",)))
    assert flags is not None and {("--num-experts", "8"), ("--topk", "2"), ("--moe-expert-parallel-size", "4")} <= set(flags)
    assert ("--zero-stage", "1") in flags and ("--deepspeed-activation-checkpointing",) in flags
    assert megatron_flags(plan_of("qwen2-57b-a14b")) is None  # shared experts
    assert "megatron_deepspeed.args" in TARGET.files(plan_of("mixtral-8x7b", ep=4), "0.19.8")


def test_cut_models_have_a_configuration() -> None:
    model = load_model("qwen3-30b-a3b").cut(4)
    found = model_config(model)
    assert found is not None and found["num_hidden_layers"] == 4
    assert read_config(found, name=model.name).layers == model.layers


def test_the_script_compiles() -> None:
    compile(SCRIPT, "train.py", "exec")


def test_whole_export(tmp_path: Path) -> None:
    case = problem_of("qwen3-30b-a3b", "h100x16", 64, 4096)
    plan = price_plan(case, layout_of(case.model, 16, ep=8, dp_overlap=False))
    paths = export(plan, tmp_path / "out", exporter=TARGET, launchers=("torchrun", "slurm", "rendezvous"))
    names = {p.name for p in paths}
    assert {"ds_config.json", "config.json", "train.py", "deepspeed.args", "native_moe.json"} <= names
    text = (tmp_path / "out" / "README.md").read_text()
    assert "transformers>=5.0.0,<=5.18.0" in text and "deepspeed.moe.layer.MoE" in text
    assert "$here/ds_config.json" in (tmp_path / "out" / "run_torchrun.sh").read_text()


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("train_batch_size", 128, "global_batch 128 for 64"),
        ("zero_optimization", {"stage": 3, "overlap_comm": False}, "sharding fsdp for optimizer"),
        ("expert_parallel", {"enabled": True, "autoep_size": 4}, "ep 4 for 8"),
        ("bf16", {"enabled": True}, ""),
    ],
)
def test_a_changed_file_is_noticed(tmp_path: Path, key: str, value: Any, difference: str) -> None:
    plan = plan_of()
    steps = {"gradient_accumulation_steps": 8 if value == 128 else 4}
    directory = changed(TARGET, plan, tmp_path, "ds_config.json", lambda t: json.dumps({**json.loads(t), key: value, **steps}))
    if not difference:
        return check_reading(plan, TARGET.read(directory))
    with pytest.raises(ExportError, match=difference):
        check_reading(plan, TARGET.read(directory))


# DeepSpeed's own code.


@functools.cache
def plans() -> list[Plan]:
    """Plans that the target takes: random ones, and some that have every feature."""
    return [
        *taken_plans(TARGET, MODELS),
        plan_of(dispatcher="deepep", sharding="fsdp", dp_overlap=True),
        plan_of(optimizer_offload=1.0),
        plan_of("deepseek-v2-lite", recompute=("full",)),
    ]


@functools.cache
def refused() -> list[Plan]:
    """Refused plans of the set that can be written all the same."""
    return refused_plans(DEMANDS, "model-class", "model-config", "sharding", "dispatcher")


def write_by_hand(directory: Path, keys: Mapping[str, Any]) -> Path:
    """An export that breaks nothing, but for some keys."""
    write_files(TARGET, plan_of(), directory)
    data = json.loads((directory / "ds_config.json").read_text())
    for path, value in keys.items():
        part, _, key = path.rpartition(".")
        (data[part] if part else data)[key] = value
    (directory / "ds_config.json").write_text(json.dumps(data))
    return directory


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory, tiny: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """DeepSpeed's words on all cases of this file, said once."""
    work = tmp_path_factory.mktemp("deepspeed")
    judged = {
        "taken": plans(),
        "refused": refused(),
        "silent": [plan_of(**change) for _, change, _ in SILENT if "model" not in change],
        "rejected": [plan_of(**change) for _, change, keys, _ in REJECTED if not keys],
    }
    parts = exported("config", TARGET, judged, work)
    by_hand = [*(keys for _, _, keys, _ in REJECTED if keys), *({path: value} for path, value, _ in SPOILED)]
    parts["by_hand"] = [
        {"kind": "config", "directory": str(write_by_hand(work / f"hand{i}", keys)), "world": 16}
        for i, keys in enumerate(by_hand)
    ]
    parts["counts"] = [
        {"kind": "count", "config": model_config(dataclasses.replace(load_model(name), mtp=()))} for name in MODELS
    ]
    parts["train"] = [
        {"kind": "train", "directory": str(directory), "world": world, "seq_len": 32, "steps": STEPS}
        for directory, (world, _) in zip(tiny, TRAINED, strict=True)
    ]
    return judges.verdicts_of_parts("deepspeed", parts, work, "deepspeed", "transformers")


def test_deepspeed_accepts_what_is_not_refused(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    assert len(plans()) > COUNT
    for plan, verdict in zip(plans(), verdicts["taken"], strict=True):
        x = plan.layout
        assert verdict["accepted"], f"{plan.problem.model.name} {x.degrees()}: {verdict['message']}"
        assert (verdict["tp"], verdict["ep"], verdict["micro_batch"]) == (x.tp, x.ep, x.micro_batch)
        assert verdict["batch"] == plan.problem.workload.global_batch
        assert bool(verdict["moe_layers"]) == (plan.problem.model.moe is not None)
    assert {plan.layout.ep > 1 for plan in plans()} == {plan.layout.tp > 1 for plan in plans()} == {True, False}


def test_refused_plans_of_the_set(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    enforced = {rule for rule, _, keys, _ in REJECTED if not keys}
    for plan, verdict in zip(refused(), verdicts["refused"], strict=True):
        broken = {demand.name for demand in broken_demands(DEMANDS, plan)}
        assert verdict["accepted"] == (not broken & enforced), f"{plan.layout.degrees()}, {broken}: {verdict}"
    assert {verdict["accepted"] for verdict in verdicts["refused"]} == {True, False}


def test_demands_that_deepspeed_enforces_and_does_not(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    found = [*verdicts["rejected"], *verdicts["by_hand"]]
    rows = [*(row for row in REJECTED if not row[2]), *(row for row in REJECTED if row[2])]
    for (rule, _, _, words), verdict in zip(rows, found[: len(rows)], strict=True):
        assert not verdict["accepted"] and words in verdict["message"], f"{rule}: {verdict}"
    assert all(verdict["accepted"] for verdict in verdicts["silent"]), verdicts["silent"]


SPOILED = [
    ("expert_parallel.autoep_size", 3, "must divide the stage size"),
    ("train_batch_size", 65, "train_batch_size"),
    ("zero_optimization.stage_three", 1, "stage_three"),
    ("autotp", 1, "keys that DeepSpeed passes over"),
    ("expert_parallel.ep_size", 1, "keys that DeepSpeed passes over"),
]


def test_deepspeed_refuses_what_is_wrong(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    for (path, value, words), verdict in zip(SPOILED, verdicts["by_hand"][-len(SPOILED) :], strict=True):
        assert not verdict["accepted"] and words in verdict["message"], f"{path}={value}: {verdict}"


def test_classes_hold_the_published_parameters(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    for name, verdict in zip(MODELS, verdicts["counts"], strict=True):
        assert verdict["accepted"], f"{name}: {verdict['message']}"
        model = dataclasses.replace(load_model(name), mtp=())
        assert verdict["parameters"] == parameter_count(model).total, name


# The exported script trains.

TINY = {
    "model_type": "deepseek_v3", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_nextn_predict_layers": 0,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


START = """
import importlib, runpy, deepspeed
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # it would compile a kernel for CPUs
runpy.run_path("{script}", run_name="__main__")
"""


def _train(directory: Path, variables: dict[str, str]) -> list[float]:
    start = directory / "start.py"
    start.write_text(START.format(script=directory / "train.py"))
    done = subprocess.run(
        ["bash", str(directory / "run_torchrun.sh"), "--train_iters", str(STEPS)],
        env={
            **variables,
            "SKIP_PREFLIGHT": "1",
            "TRAIN_SCRIPT": str(start),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)", done.stdout, re.M)]


STEPS = 3


TRAINED: list[tuple[int, dict[str, Any]]] = [
    (2, {"ep": 2, "sharding": "fsdp", "recompute": ("full",)}),
    (4, {"ep": 4, "dp_overlap": False}),
]
"""Ranks, and a layout on them."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Exports of a tiny model."""
    model, out = read_config(TINY, name="tiny"), []
    for world, fields in TRAINED:
        directory = tmp_path_factory.mktemp("tiny") / "out"
        plan = price_plan(problem_of(model, f"h100x{world}", 4, 32), layout_of(model, world, **fields))
        export(plan, directory, exporter=TARGET, launchers=("torchrun",))
        data = json.loads((directory / "ds_config.json").read_text())
        data["optimizer"]["params"] |= {"torch_adam": True, "lr": 1e-2}  # there are no CUDA kernels here
        data["expert_parallel"]["use_grouped_mm"] = False
        (directory / "ds_config.json").write_text(json.dumps(data))
        out.append(directory)
    return out


@pytest.mark.parametrize("place", range(len(TRAINED)))
def test_an_export_trains_like_the_plain_model(place: int, tiny: list[Path], verdicts: dict[str, list[dict[str, Any]]]) -> None:
    found = _train(tiny[place], judges.environment("deepspeed", "transformers"))
    expected = verdicts["train"][place]["losses"]
    assert len(found) == len(expected) == STEPS and len(set(expected)) == STEPS
    assert found == pytest.approx(expected, rel=1e-3)
