"""`moeplan export`: all files or none."""

import os
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Moeplan, question

FILES = ["README.md", "megatron.args", "plan.json", "preflight.py", "run_slurm.sbatch", "run_torchrun.sh"]


def test_a_new_directory(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    end = moeplan("export", plan_file, "--to", "megatron", "-d", tmp_path / "deep" / "launch")
    made = tmp_path / "deep" / "launch"
    assert end.code == 0 and sorted(p.name for p in made.iterdir()) == FILES
    assert sorted(end.out.splitlines()) == sorted(str(made / name) for name in FILES)
    assert os.access(made / "run_torchrun.sh", os.X_OK) and (made / "megatron.args").read_text()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["launch"]


def test_an_empty_directory(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    assert moeplan("export", plan_file, "-d", tmp_path / "launch").code == 0
    assert sorted(p.name for p in (tmp_path / "launch").iterdir()) == FILES


@pytest.mark.parametrize("name", ("full", "file", "dangling", "file/below", "x" * 300))
def test_nothing_is_overwritten_or_left_half_done(moeplan: Moeplan, plan_file: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    end = moeplan("export", plan_file, "-d", tmp_path / name)
    assert end.code == 1 and end.out == "" and end.complaint.startswith("error: ")
    assert name[:50] in end.complaint and "hint: choose a" in end.complaint
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_force_replaces_an_older_export_alone(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    made = tmp_path / "launch"
    settings = ["--set", "image=megatron:0.19", "--set", "MEGATRON_LM=/opt/megatron"]
    assert moeplan("export", plan_file, "-d", made, "--launcher", "job", "--launcher", "slurm", *settings).code == 0
    assert (made / "job.yaml").exists()
    end = moeplan("export", plan_file, "-d", made)
    assert end.code == 1 and "holds an older export" in end.complaint and "--force" in end.complaint
    assert moeplan("export", plan_file, "-d", made, "--force").code == 0
    assert sorted(p.name for p in made.iterdir()) == FILES
    (made / "checkpoint").mkdir()
    end = moeplan("export", plan_file, "-d", made, "--force")
    assert end.code == 1 and "holds 'checkpoint', which no export wrote" in end.complaint


def test_plan_json_alone(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    assert moeplan("export", plan_file, "--to", "plan-json", "-d", tmp_path / "launch").code == 0
    assert sorted(p.name for p in (tmp_path / "launch").iterdir()) == ["README.md", "plan.json", "preflight.py"]


EDITS: list[tuple[dict[str, object], str]] = [  # a layout edited by hand, the identity that broke
    ({"world": 16}, "world is 16, but tp*cp*dp*pp = "),
    ({"dp": 16}, "dense and expert grids differ: tp*cp*dp = "),
    (
        {"dp": 16, "edp": 16, "ep": 1, "etp": 1, "tp": 1, "cp": 1, "pp": 1, "world": 16},
        "= 16 is not the 8 GPUs (rule world-size)",
    ),
    ({"tpp": 2}, "unknown key 'tpp'"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_a_plan_that_contradicts_itself_is_refused(
    edit: dict[str, object], message: str, moeplan: Moeplan, plan_file: Path, tmp_path: Path
) -> None:
    data = yaml.safe_load(plan_file.read_text())
    data["layout"] |= edit
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    end = moeplan("export", tmp_path / "plan.yaml", "-d", tmp_path / "launch")
    assert end.code == 1 and message in end.complaint
    assert not (tmp_path / "launch").exists()


@pytest.mark.parametrize(
    ("imported", "message"),
    [
        (
            "run.sh",
            "expected a mapping with the keys file, framework, environment, unknown, passed_through, found str 'run.sh'",
        ),
        ({"passed_through": ["--lr '1"]}, "key 'imported': \"--lr '1\": no closing quotation"),
        ({"unknown": [3]}, "key 'unknown'[0]: expected str, found int 3"),
        ({"flags": []}, "unknown key 'flags'"),
    ],
)
def test_what_was_imported_edited_by_hand(
    imported: object, message: str, moeplan: Moeplan, plan_file: Path, tmp_path: Path
) -> None:
    data = yaml.safe_load(plan_file.read_text())
    data["provenance"]["imported"] = imported
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    end = moeplan("export", tmp_path / "plan.yaml", "-d", tmp_path / "launch")
    assert end.code == 1 and "key 'provenance', key 'imported'" in end.complaint and message in end.complaint
    assert not (tmp_path / "launch").exists()


def test_a_plan_that_breaks_a_rule_is_refused(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(plan_file.read_text())
    data["layout"] |= {"vpp": 3}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    end = moeplan("export", tmp_path / "plan.yaml", "-d", tmp_path / "launch")
    assert end.code == 1 and "vpp=3" in end.complaint and "(rule virtual-stages)" in end.complaint
    assert not (tmp_path / "launch").exists()


def test_a_plan_that_does_not_fit_comes_with_a_note(moeplan: Moeplan, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    assert moeplan("estimate", *question(model="mixtral-8x7b"), "--ep", "8", "-o", plan).code == 0
    end = moeplan("export", plan, "-d", tmp_path / "launch")
    assert end.code == 0 and "note: the plan is predicted to exceed the device by" in end.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["PLAN"], 2, "Missing option '-d'"),
        (["PLAN", "-d", "x", "--to", "deepspede"], 2, "'deepspede' is not one of 'megatron', 'megatron-bridge', 'deepspeed'"),
        (["PLAN", "-d", "x", "--framework-version", "0.16.1"], 2, "known: 0.17.0, 0.18.0, 0.19.2, 0.20.0"),
        (["PLAN", "-d", "x", "--launcher", "slrum"], 2, "'slrum' is not one of"),
        (["PLAN", "-d", "x", "--launcher", "job"], 2, "hint: give --set MEGATRON_LM=... --set image=..."),
        (
            ["PLAN", "-d", "x", "--launcher", "job", "--set", "MEGATRON_LM=/m"],
            2,
            "launcher 'job' needs image: a container image",
        ),
        (["PLAN", "-d", "x", "--set", "time"], 2, "--set 'time' is not NAME=VALUE"),
        (["PLAN", "-d", "x", "--set", "time=1:00:00", "--set", "time=2:00:00"], 2, "--set time stands twice"),
        (
            ["PLAN", "-d", "x", "--set", "tiem=1:00:00"],
            2,
            "no launcher of this export takes 'tiem'\nhint: did you mean 'time'?",
        ),
        (["PLAN", "-d", "x", "--set", "queue=high"], 2, "no launcher of this export takes 'queue'\nhint: known: MEGATRON_LM,"),
        (
            ["PLAN", "-d", "x", "--set", "image=megatron"],
            2,
            "hint: --launcher trainjob or pytorchjob or job or skypilot takes it",
        ),
        (["PLAN", "-d", "x", "--to", "plan-json", "--set", "time=1:00:00"], 2, "takes 'time'\nhint: leave --set out"),
        (["PLAN", "-d", "x", "--to", "plan-json", "--launcher", "slurm"], 2, "plan.json runs nothing"),
        (["none.yaml", "-d", "x"], 1, "plan file 'none.yaml' does not exist"),
    ],
)
def test_wrong_use(moeplan: Moeplan, plan_file: Path, arguments: list[str], code: int, message: str) -> None:
    end = moeplan("export", *[plan_file if a == "PLAN" else a for a in arguments])
    assert end.code == code and message in end.complaint and end.out == ""
