"""What a script says beside the layout survives import, improvement and export."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from moeplan.exporters.megatron import ARGUMENTS, environment
from moeplan.exporters.megatron_layout import layout_sections, passed_flags
from moeplan.exporters.reading.imported import plan_text, read_file
from moeplan.exporters.write import export
from moeplan.planner.plan import load_plan
from moeplan.profiles.hardware import load_cluster

SAMPLES = Path(__file__).parent / "samples"


def imported(tmp_path: Path, name: str, cluster: str) -> Path:
    path = tmp_path / "imported.yaml"
    path.write_text(plan_text(read_file(SAMPLES / name), load_cluster(cluster)))
    return path


def test_flags_that_no_plan_decides_are_passed_on(tmp_path: Path) -> None:
    plan = load_plan(imported(tmp_path, "deepseek_v3.slurm", "h100x256"))
    export(plan, tmp_path / "launch")
    lines = (tmp_path / "launch" / ARGUMENTS).read_text().splitlines()
    assert {"--lr 3.9e-6", "--train-iters 1000", "--moe-router-bias-update-rate 1e-3"} <= set(lines)
    assert "--tokenizer-type NullTokenizer" not in lines, "stand-ins of a benchmark do not mix with a script of one's own"
    assert lines.count("--cross-entropy-loss-fusion") == 1, "what the plan decides is not passed a second time"
    assert environment(plan)["NVTE_NORM_FWD_USE_CUDNN"] == "1"


SCRIPT = (
    "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
    "--max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 64 --vocab-size 32000 --bf16 --eval-interval 5 "
)


def test_values_reach_the_export_as_they_are(tmp_path: Path) -> None:
    words = ["--save", "/my dir/it's", "--wandb-project", "", "--own", "a\\b", 'say "x"', "--data-path", "0.5", "/d 1"]
    (tmp_path / "run.sh").write_text(SCRIPT + shlex.join(words))
    (tmp_path / "plan.yaml").write_text(plan_text(read_file(tmp_path / "run.sh"), load_cluster("h100x8")))
    plan = load_plan(tmp_path / "plan.yaml")
    assert set(passed_flags(plan)[0]) == {tuple(words[:2]), tuple(words[2:4]), tuple(words[4:7]), tuple(words[7:]),
                                          ("--eval-interval", "5")}  # fmt: skip
    export(plan, tmp_path / "launch")


def test_fp16_does_not_reach_an_export_in_bf16(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(SCRIPT + "--fp16")
    assert "--fp16" not in [str(g) for g in read_file(tmp_path / "run.sh").passed]


def test_the_run_of_another_framework_gets_what_megatron_needs(tmp_path: Path) -> None:
    plan = load_plan(imported(tmp_path, "deepseek_v3.slurm", "h100x256"))
    other = {"framework": "DeepSpeed 0.19.8", "file": "ds.json", "passed_through": ["--lr 3e-4", "--data-path /d"]}
    flags = [f for fs in layout_sections(dataclasses.replace(plan, imported=other)).values() for f in fs]
    assert {("--lr", "3e-4"), ("--data-path", "/d"), ("--train-iters", "50"), ("--eval-interval", "1000")} <= set(flags)
    assert ("--mock-data",) not in flags and ("--lr", "1e-4") not in flags


def test_they_outlive_another_save(tmp_path: Path) -> None:
    plan = load_plan(imported(tmp_path, "deepseek_v3.slurm", "h100x256"))
    plan.save(tmp_path / "again.yaml")
    again = load_plan(tmp_path / "again.yaml")
    assert passed_flags(again) == passed_flags(plan) and passed_flags(plan)[0]


def test_what_a_variable_leaves_open_is_named_and_left_out(tmp_path: Path) -> None:
    plan = load_plan(imported(tmp_path, "mixtral_8x7b.sh", "h100x8"))
    flags, missing = passed_flags(plan)
    assert any("--data-path" in text for text in missing)
    assert not any("$" in word for flag in flags for word in flag)
