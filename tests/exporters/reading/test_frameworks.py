"""Files of DeepSpeed, torchtitan and Megatron-Bridge are told apart and read: our exports come back, and what others write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import MoeplanError
from moeplan.exporters.lint import lint
from moeplan.exporters.reading.imported import read_file
from moeplan.exporters.targets import exporter
from moeplan.exporters.write import export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters.cases import layout_of, problem_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "deepspeed": {"ep": 8, "dp_overlap": False, "recompute": ("full",)},
    "torchtitan": {"ep": 4, "pp": 2, "vpp": 2, "tp": 2, "sharding": "fsdp", "dispatcher": "deepep"},
    "megatron-bridge": {"ep": 4, "tp": 2, "pp": 2, "vpp": 2, "ep_overlap": True, "recompute": ("moe_act",)},
}


def plan_for(target: str) -> Plan:
    case = problem_of("qwen3-30b-a3b", "h100x16", 64, 4096)
    return price_plan(case, layout_of(case.model, 16, **LAYOUTS[target]))


@pytest.mark.parametrize("name", ["", "run_torchrun.sh", "run_slurm.sbatch", "{}.args"])
@pytest.mark.parametrize("target", LAYOUTS)
def test_exports_come_back(tmp_path: Path, target: str, name: str) -> None:
    plan = plan_for(target)
    export(plan, tmp_path / "out", exporter=exporter(target))
    found = read_file(tmp_path / "out" / name.format(target.replace("-", "_")))
    assert found.framework == f"{exporter(target).title} {exporter(target).version}"
    assert (found.model, found.workload, found.layout) == (plan.problem.model, plan.problem.workload, plan.layout)
    assert not found.unknown and not found.remarks and not found.faults
    assert lint(found) == []


BRIDGE = """#!/bin/bash
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
EP=${EP:-16}
srun torchrun --nnodes 4 --nproc-per-node 8 scripts/training/run_recipe.py \\
  --recipe qwen3_30b_a3b_pretrain_config --dataset mock -tp 2 -gb 256 -mb 1 -sl 4096 -etp 1 \\
  model.expert_model_parallel_size=$EP model.sequence_parallel=true ddp.use_distributed_optimizer=true \\
  model.moe_token_dispatcher_type=alltoall model.surprise=1
"""


def test_a_script_with_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    path.write_text(BRIDGE)
    found = read_file(path, settings={"EP": "8"})
    x = found.layout
    assert (found.model.name, x.world, x.tp, x.ep, x.dp, x.sharding) == ("qwen3-30b-a3b", 32, 2, 8, 16, "optimizer")
    assert found.workload.global_batch == 256 and x.dispatcher == "alltoall"
    assert [g.flag for g in found.unknown] == ["model.surprise"]
    assert "not overridden" in found.remarks[-1]


def _settings(**change: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "expert_parallel": {"enabled": True, "autoep_size": 4, "preset_model": "mixtral"},
        "wall_clock_breakdown": True,
        **change,
    }


def _write(folder: Path, settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(dict(load_model("mixtral-8x7b").config)))
    (folder / "zero2.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return folder / "zero2.json"


def test_a_foreign_configuration(tmp_path: Path) -> None:
    found = read_file(_write(tmp_path, _settings()), add=["--seq_length", "4096"], gpus=16)
    x = found.layout
    assert (found.model.name, x.dp, x.ep, x.edp, x.micro_batch, x.sharding) == ("mixtral-8x7b", 16, 4, 4, 2, "optimizer")
    assert (found.workload.global_batch, found.workload.gradient_bytes, found.workload.seq_len) == (256, 2, 4096)
    assert found.remarks == ("ZeRO 2 is priced as ZeRO 1: gradients are counted whole",)
    assert [g.flag for g in found.unknown] == ["wall_clock_breakdown"]


FAULTS: list[tuple[Any, dict[str, Any], str]] = [
    (_settings(), {"gpus": 16}, "does not say the sequence length"),
    (_settings(), {"add": ["--seq_length", "4096"]}, "do not say the number of GPUs"),
    (_settings(train_batch_size=255), {"add": ["--seq_length", "4096"], "gpus": 16}, "train_batch_size = 255 is not"),
    (_settings(zero_optimization={"stage": 4}), {"add": ["--seq_length", "4096"], "gpus": 16}, "ZeRO stage 4 is none of"),
    (_settings(zero_optimization=3), {"add": ["--seq_length", "4096"], "gpus": 16}, "expected a JSON object"),
    (_settings(train_micro_batch_size_per_gpu="2"), {"add": ["--seq_length", "4096"], "gpus": 16}, "not a whole number"),
    (
        _settings(expert_parallel={"enabled": True, "autoep_size": 3}),
        {"add": ["--seq_length", "4096"], "gpus": 16},
        "autoep_size = 3 does not divide the 16 ranks",
    ),
    ('{"train_batch_size": 1,', {"add": ["--seq_length", "4096"]}, "is not JSON"),
]


@pytest.mark.parametrize(("settings", "options", "words"), FAULTS, ids=range(len(FAULTS)))
def test_configurations_that_cannot_be_read(tmp_path: Path, settings: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MoeplanError, match=words):
        read_file(_write(tmp_path, settings), **options)


def test_a_configuration_without_a_model(tmp_path: Path) -> None:
    path = _write(tmp_path, _settings())
    (tmp_path / "config.json").unlink()
    with pytest.raises(MoeplanError, match="says no model"):
        read_file(path, add=["--seq_length", "4096"], gpus=16)


def test_overrides_without_recipe_or_size(tmp_path: Path) -> None:
    path = tmp_path / "overrides.txt"
    path.write_text("# mine\nmodel.tensor_model_parallel_size=2\n")
    with pytest.raises(MoeplanError, match="does not say on how many GPUs"):
        read_file(path)
    with pytest.raises(MoeplanError, match="names no recipe"):
        read_file(path, gpus=8)


def test_overrides_with_an_open_quote(tmp_path: Path) -> None:
    path = tmp_path / "overrides.txt"
    path.write_text("model.tensor_model_parallel_size=2\nmodel.name='mine\n")
    with pytest.raises(MoeplanError, match=r"overrides\.txt', line 2: no closing quotation"):
        read_file(path, gpus=8)


@pytest.mark.parametrize(
    ("literal", "other", "words"),
    [
        (
            "tensor_parallel_degree=2",
            "tensor_parallel_degree=TP",
            "tensor_parallel_degree is 'TP', which only running it tells",
        ),
        ("tensor_parallel_degree=2", "tensor_parallel_degree=0", "tensor_parallel_degree is 0, at least 1 is needed"),
        ("seq_len=4096", "seq_len=int(os.environ['S'])", "training.seq_len is \"int(os.environ['S'])\", which only"),
        ("data_parallel_replicate_degree=1", "data_parallel_replicate_degree=-1", "replicate_degree is -1, at least 1"),
    ],
)
def test_a_recipe_that_cannot_be_read(literal: str, other: str, words: str, tmp_path: Path) -> None:
    export(plan_for("torchtitan"), tmp_path / "out", exporter=exporter("torchtitan"))
    text = (tmp_path / "out" / "moeplan_recipe.py").read_text()
    assert literal in text
    (tmp_path / "mine.py").write_text(text.replace(literal, other))
    with pytest.raises(MoeplanError) as caught:
        read_file(tmp_path / "mine.py", gpus=16)
    assert words in str(caught.value)
