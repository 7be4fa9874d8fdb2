"""`moeplan import`: what it shows, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan
from tests.exporters.reading.judges import SAMPLES

MIXTRAL = SAMPLES / "mixtral_8x7b.sh"
DENSE = (
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
    "--micro-batch-size 1 --global-batch-size 64 --vocab-size 32000 --swiglu --disable-bias-linear --bf16"
)


def test_a_script_becomes_a_plan_that_can_be_priced_and_exported(moeplan: Moeplan, tmp_path: Path) -> None:
    plan = tmp_path / "imported.yaml"
    done = moeplan("import", MIXTRAL, "--cluster", "h100x64", "--set", "NNODES=8", "-o", plan)
    assert done.code == 0 and "mixtral-8x7b" in done.out and "tp 1  cp 1  pp 4" in done.out
    assert "--moe-router-score-function softmax" in done.out and "--data-path ${3}" in done.out
    assert "estimate" in done.err
    priced = moeplan("estimate", plan, "--json")
    assert priced.code == 0 and json.loads(priced.out)["predicted"]["step_s"] > 0
    assert moeplan("explain", plan).code == 0
    assert moeplan("export", plan, "-d", tmp_path / "launch").code == 0
    again = moeplan("import", tmp_path / "launch", "--cluster", "h100x64", "--json")
    assert again.code == 0
    first, second = load_plan(plan), json.loads(again.out)
    assert second["kind"] == "export" and second["gpus"] == first.layout.world and second["unknown"] == []
    expected = {"pp": 4, "dp": 16, "ep": 2, "dispatcher": "alltoall", "micro_batch": 1}
    assert {name: second["layout"][name] for name in expected} == expected


def test_the_plan_file_keeps_what_is_passed_through(moeplan: Moeplan, tmp_path: Path) -> None:
    plan = tmp_path / "imported.yaml"
    assert moeplan("import", MIXTRAL, "--device", "h100", "--add", "--my-own-flag 3", "-o", plan).code == 0
    kept = yaml.safe_load(plan.read_text())["provenance"]["imported"]
    assert kept["unknown"] == ["--my-own-flag 3"]
    assert "--lr 1e-4" in kept["passed_through"] and "--num-layers 32" not in kept["passed_through"]
    assert kept["environment"] == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_json(moeplan: Moeplan) -> None:
    done = moeplan("import", SAMPLES / "deepseek_v3.slurm", "--json")
    data = json.loads(done.out)
    assert (data["model"], data["gpus"], data["cluster"]) == ("deepseek-v3", 256, None)
    assert data["layout"]["stages"] == "Et*3|(tt|)*29m|L" and data["workload"]["precision"] == "fp8-blockwise"


def test_a_broken_rule_is_said_and_the_layout_read(moeplan: Moeplan, tmp_path: Path) -> None:
    (tmp_path / "run.args").write_text(f"{DENSE} --global-batch-size 60")
    plan = tmp_path / "imported.yaml"
    done = moeplan("import", tmp_path / "run.args", "--cluster", "h100x8", "-o", plan)
    assert done.code == 0 and "breaks rule global-batch: global batch 60 is not a multiple" in done.err
    priced = moeplan("estimate", plan)
    assert priced.code == 1 and "(rule global-batch)" in priced.err


def test_models_of_ones_own_fit_into_the_plan_file(moeplan: Moeplan, tmp_path: Path) -> None:
    (tmp_path / "ours.args").write_text(f"{DENSE} --num-experts 8 --moe-ffn-hidden-size 512 --expert-model-parallel-size 8")
    plan = tmp_path / "imported.yaml"
    assert moeplan("import", tmp_path / "ours.args", "--cluster", "h100x8", "-o", plan).code == 0
    model = load_plan(plan).problem.model
    assert (model.name, len(model.layers), model.moe.experts if model.moe else 0) == ("ours", 8, 8)


ARGUMENTS = "torchrun --nproc-per-node 8 --nnodes ${NNODES} pretrain_gpt.py " + DENSE
WRONG: list[tuple[str, str, list[str], str]] = [  # name, text, options, a part of the complaint
    ("run.sh", "", [], "is empty"),
    ("run.sh", "echo hello\n", [], "starts no training with Megatron's arguments"),
    ("run.sh", "python train.py --epochs 3\n", [], "started are train.py; flags like --num-layers"),
    ("run.sh", "python train.py model.tensor_model_parallel_size=8\n", [], "those of NeMo or Megatron-Bridge"),
    ("run.sh", ARGUMENTS, [], "NNODES (for the number of nodes)"),
    ("run.sh", ARGUMENTS + " --tensor-model-parallel-size $TP", ["--gpus", "8"], "TP (for --tensor-model-parallel-size in li"),
    ("run.sh", ARGUMENTS, ["--set", "NNODES"], "write it like --set NNODES=4"),
    ("run.sh", ARGUMENTS, ["--set", "NNODES=2", "--cluster", "h100x64"], "starts 16 processes, H100x64 has 64 GPUs"),
    ("run.sh", ARGUMENTS, ["--cluster", "h100x64", "--gpus", "8"], "--cluster says the devices and their number"),
    ("run.sh", ARGUMENTS, ["--set", "NNODES=2", "-o", "plan.yaml"], "a plan is for a cluster"),
    ("run.sh", ARGUMENTS, ["--gpus", "8", "--add", "--lr '1"], "no closing quotation"),
    ("run.sh", ARGUMENTS + " --tensor-model-parallel-size 3", ["--gpus", "8"], "does not divide the 8 GPUs"),
    ("run.sh", "if true; then\n" + ARGUMENTS, [], "line 1: 'fi' is missing"),
    ("run.args", DENSE, [], "does not say on how many GPUs it runs"),
    ("run.args", "--lr 'open", ["--gpus", "8"], "line 1: no closing quotation"),
    ("run.yaml", "a: 1\n", [], "has no mapping MODEL_ARGS"),
    ("config.json", "{}", [], "is JSON"),
    ("train.py", "import torch\n", [], "is Python, no launch script"),
    ("run.log", "------------------------ arguments ------------------------\n  lr .... 1\n", [], "does not end"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "options", "said"), WRONG)
def test_wrong_input(name: str, text: str, options: list[str], said: str, moeplan: Moeplan, tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    done = moeplan("import", name, *options)
    assert done.code in (1, 2) and said in done.err.replace("\n", " "), done.err
    assert "Traceback" not in done.err and not Path("plan.yaml").exists()


def test_binary_and_huge_files_are_refused(moeplan: Moeplan, tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_bytes(b"#!/bin/bash\n\0\1\2")
    (tmp_path / "b.sh").write_bytes(b"\xff\xfe\x00\x80" * 10)
    (tmp_path / "c.sh").write_text("# long\n" * 800_000)
    for name, said in (
        ("a.sh", "is binary"),
        ("b.sh", "not UTF-8"),
        ("c.sh", "more than the 5000000"),
        ("d.sh", "does not exist"),
    ):
        done = moeplan("import", tmp_path / name)
        assert done.code == 1 and said in done.err, done.err
    (tmp_path / "folder").mkdir()
    assert "holds no megatron.args" in moeplan("import", tmp_path / "folder").err


def test_the_last_of_contradictory_flags_counts(moeplan: Moeplan, tmp_path: Path) -> None:
    (tmp_path / "run.args").write_text(f"{DENSE}\n--tensor-model-parallel-size 2\n--tensor-model-parallel-size 4\n")
    done = moeplan("import", tmp_path / "run.args", "--gpus", "8")
    assert "tp 4" in done.out
    assert "--tensor-model-parallel-size 2 is overridden by --tensor-model-parallel-size 4 (line 2, then 3)" in done.err


def test_one_line_that_starts_several_runs(moeplan: Moeplan, tmp_path: Path) -> None:
    text = f"for TP in 1 2; do torchrun --nproc-per-node 8 pretrain_gpt.py {DENSE} --tensor-model-parallel-size $TP; done\n"
    (tmp_path / "run.sh").write_text(text)
    done = moeplan("import", tmp_path / "run.sh")
    assert "tp 2" in done.out and "line 1 starts 2 runs with other arguments each: the last one is read" in done.err


def test_every_file_of_an_export_stands_for_it(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    options = [word for name in ("slurm", "ray", "trainjob") for word in ("--launcher", name)]
    options += ["--set", "image=megatron:0.19", "--set", "MEGATRON_LM=/opt/megatron"]
    assert moeplan("export", plan_file, "-d", tmp_path / "launch", *options).code == 0
    world = load_plan(plan_file).layout.world
    for path in (tmp_path / "launch").iterdir():
        more = ["--gpus", world] if path.suffix == ".args" else []
        data = json.loads(moeplan("import", path, "--json", *more).out)
        assert data["gpus"] == world and data["unknown"] == [], path.name


def test_gpus_that_differ_from_the_script_are_said(moeplan: Moeplan) -> None:
    done = moeplan("import", MIXTRAL, "--gpus", "16")
    assert done.code == 0 and "the file starts 8 processes; --gpus 16 is taken" in done.err and "dp 4" in done.out


def test_slurm_requests_are_compared(moeplan: Moeplan, tmp_path: Path) -> None:
    text = (
        f"#SBATCH --nodes=4\n#SBATCH --gres=gpu:h100:8\nsrun torchrun --nnodes 2 --nproc-per-node gpu pretrain_gpt.py {DENSE}\n"
    )
    (tmp_path / "run.slurm").write_text(text)
    done = moeplan("import", tmp_path / "run.slurm")
    assert done.code == 0 and "#SBATCH lines ask for 32 GPUs, 16 processes are started" in done.err
