"""What a script says beside the layout survives import, improvement and export."""

from __future__ import annotations

from pathlib import Path

from moeplan.exporters.megatron import ARGUMENTS, environment
from moeplan.exporters.megatron_layout import passed_flags
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
