"""An export is written whole or not at all, replaces whole older exports only, and says what the plan says."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeplan.errors import ExportError, FileError, UnknownNameError, UsageError
from moeplan.exporters.base import Exporter, Reading, node_size, read_arguments
from moeplan.exporters.megatron import ARGUMENTS, Megatron
from moeplan.exporters.neutral import PLAN, load_export
from moeplan.exporters.readme import README
from moeplan.exporters.targets import EXPORTERS, exporter
from moeplan.exporters.write import check_reading, export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters.cases import layout_of, problem_of

USUAL = [ARGUMENTS, "run_torchrun.sh", "run_slurm.sbatch", "preflight.py", PLAN, README]


def plan_of(cluster: str = "h100x8", **fields: Any) -> Plan:
    problem = problem_of("mixtral-8x7b-4l-proxy", cluster, 64, 2048)
    return price_plan(problem, layout_of(problem.model, problem.profile.cluster.gpus, **fields))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_writes_these_files(tmp_path: Path) -> None:
    paths = export(plan_of(), tmp_path / "made" / "launch")
    assert [p.name for p in paths] == USUAL
    assert sorted(p.name for p in (tmp_path / "made" / "launch").iterdir()) == sorted(USUAL)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["launch"]
    assert (tmp_path / "made" / "launch").stat().st_mode & 0o777 == 0o755
    for path in paths:
        assert os.access(path, os.X_OK) == path.name.endswith((".sh", ".sbatch", ".py"))
    assert load_export(tmp_path / "made" / "launch" / PLAN)["files"] == sorted(USUAL)


CUT = {"tp": 2, "ep": 4, "etp": 2, "pp": 2, "micro_batch": 2}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # a model and a layout that a target runs
    "megatron": ("mixtral-8x7b-4l-proxy", CUT),
    "megatron-bridge": ("qwen3-30b-a3b", CUT),
    "deepspeed": ("mixtral-8x7b", {"ep": 4, "dp_overlap": False, "recompute": ("full",)}),
    "torchtitan": ("qwen3-30b-a3b", {"tp": 2, "ep": 4, "pp": 2, "vpp": 2, "sharding": "fsdp"}),
    "plan-json": ("mixtral-8x7b-4l-proxy", CUT),
}


@pytest.mark.parametrize("known", EXPORTERS, ids=lambda known: known.name)
def test_every_target_reads_what_it_wrote(known: Exporter, tmp_path: Path) -> None:
    model, layout = ROWS[known.name]
    problem = problem_of(model, "h100x16", 64, 2048)
    plan = price_plan(problem, layout_of(problem.model, 16, **layout))
    export(plan, tmp_path / "launch", exporter=known)
    found = known.read(tmp_path / "launch")
    assert (found.layout, found.world, found.workload) == (plan.layout, 16, plan.problem.workload)
    assert exporter(known.name) is known
    assert known.version in (*known.versions, "")


def test_unknown_target() -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'megatorn'.*megatron"):
        exporter("megatorn")


def test_writes_into_an_empty_directory_only(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(export(plan_of(), tmp_path / "empty")) == 6
    before = contents(tmp_path)
    with pytest.raises(FileError, match="holds an older export .choose another directory, or replace it with --force"):
        export(plan_of(tp=2), tmp_path / "empty")
    (tmp_path / "file").write_text("kept")
    for taken in ("file", "file/launch"):
        for force in (False, True):
            with pytest.raises(FileError):
                export(plan_of(), tmp_path / taken, force=force)
    assert contents(tmp_path) == {**before, "file": b"kept"}


def test_force_replaces_an_export_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "launch"
    export(plan_of(), place, launchers=["rendezvous", "ray"], settings={"MEGATRON_LM": "/m"})
    assert "run_ray.py" in contents(place)
    export(plan_of(tp=2), place, force=True)
    fresh = tmp_path / "fresh"
    export(plan_of(tp=2), fresh)
    assert contents(place) == contents(fresh) and sorted(contents(place)) == sorted(USUAL)
    export(plan_of(), tmp_path / "new", force=True)  # nothing to replace is no fault
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "launch", "new"]


FOREIGN: list[tuple[str, Callable[[Path], object], str]] = [
    ("a file of the user", lambda d: (d / "mine.txt").write_text("mine"), "holds 'mine.txt', which no export wrote"),
    ("a checkpoint", lambda d: (d / "checkpoints").mkdir(), "holds 'checkpoints', which no export wrote"),
    ("no plan.json", lambda d: (d / PLAN).unlink(), "is not an empty directory"),
    ("another plan.json", lambda d: (d / PLAN).write_text('{"schema": "other/1"}'), "its plan.json is no export's"),
    ("a broken plan.json", lambda d: (d / PLAN).write_text("{"), "its plan.json is no export's"),
]


@pytest.mark.parametrize(("what", "spoil", "message"), FOREIGN, ids=[row[0] for row in FOREIGN])
def test_force_replaces_nothing_else(what: str, spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    export(plan_of(), tmp_path / "launch")
    spoil(tmp_path / "launch")
    before = contents(tmp_path)
    with pytest.raises(FileError, match=message):
        export(plan_of(tp=2), tmp_path / "launch", force=True)
    assert contents(tmp_path) == before


def test_links_are_not_followed(tmp_path: Path) -> None:
    export(plan_of(), tmp_path / "launch")
    (tmp_path / "empty").mkdir()
    for name in ("launch", "empty", "nowhere"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        with pytest.raises(FileError, match=f"to-{name}' is a link, not a directory"):
            export(plan_of(tp=2), tmp_path / f"to-{name}", force=True)
    assert list((tmp_path / "empty").iterdir()) == []


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("failing", ["write_text", "chmod", "replace"])
def test_writes_all_or_nothing(failing: str, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if older:
        export(plan_of(), tmp_path / "launch")
    before = contents(tmp_path)

    def fail_late(path: Any, *rest: Any, **more: Any) -> Any:
        late = Path(path).name == README if failing != "replace" else Path(rest[0]).name == "launch" and not moved
        if failing == "replace" and late:
            moved.append(path)
        return fail() if late else kept(path, *rest, **more)

    moved: list[object] = []
    kept: Any = getattr(os, failing) if failing == "replace" else getattr(Path, failing)
    monkeypatch.setattr(os if failing == "replace" else Path, failing, fail_late)
    with pytest.raises(FileError, match="cannot write to .*No space left on device"):
        export(plan_of(tp=2), tmp_path / "launch", force=True)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["launch"] if older else [])


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Megatron, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(plan_of(), tmp_path / "launch")
    assert not list(tmp_path.iterdir())


def reading(plan: Plan, **layout: Any) -> Reading:
    problem = plan.problem
    return Reading(
        model=problem.model,
        workload=problem.workload,
        layout=dataclasses.replace(plan.layout, **layout),
        world=plan.layout.world,
    )


def test_another_reading_is_refused() -> None:
    plan = plan_of("h100x16", tp=2)
    check_reading(plan, reading(plan))
    same = reading(plan)
    model, workload = plan.problem.model, plan.problem.workload
    others: list[tuple[Reading, str]] = [
        (reading(plan, tp=4, dp=4), "tp 4 for 2, dp 4 for 8"),
        (reading(plan, recompute=("moe_act",)), r"recompute \('moe_act',\) for \(\)"),
        (dataclasses.replace(same, workload=dataclasses.replace(workload, seq_len=4096)), "seq_len 4096 for 2048"),
        (dataclasses.replace(same, workload=dataclasses.replace(workload, global_batch=1)), "global_batch 1 for 64"),
        (dataclasses.replace(same, world=128), "128 GPUs for 16"),
        (
            dataclasses.replace(same, model=model.cut(2)),
            "2 layers, 0 prediction layers and [0-9]+ parameters for 4, 0 and [0-9]+",
        ),
    ]
    for other, message in others:
        with pytest.raises(ExportError, match=f"the files say something else than the plan: .*{message}"):
            check_reading(plan, other)


def test_what_a_shell_reads_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Megatron.files
    monkeypatch.setattr(Megatron, "files", lambda *a: {n: t.replace("'", "") + "--lr 1\n" for n, t in files(*a).items()})
    with pytest.raises(ExportError, match=r"megatron.args does not say what the plan does once a shell has read it"):
        export(plan_of(), tmp_path / "launch")
    assert not list(tmp_path.iterdir())


def test_argument_files_are_read_as_a_shell_does() -> None:
    text = "# a\nexport A='x y'\nexport B=1\n\n--list 1 2 # three\n--layout 'Et*3|tL'\n"
    assert read_arguments(text) == ({"A": "x y", "B": "1"}, ["--list", "1", "2", "--layout", "Et*3|tL"])


def test_no_launcher_for_what_runs_nothing(tmp_path: Path) -> None:
    paths = export(plan_of(), tmp_path / "launch", exporter=exporter("plan-json"))
    assert [p.name for p in paths] == ["preflight.py", PLAN, README]
    with pytest.raises(UsageError, match="plan.json runs nothing, so that there is nothing to launch"):
        export(plan_of(), tmp_path / "other", exporter=exporter("plan-json"), launchers=["slurm"])
    with pytest.raises(UsageError, match=r"plan.json 1.0 is not a version"):
        export(plan_of(), tmp_path / "other", exporter=exporter("plan-json"), version="1.0")


def test_a_job_of_another_size_is_refused() -> None:
    plan = plan_of("h100x16")
    halved = dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, dp=8, edp=8))
    assert node_size(plan) == (2, 8)
    with pytest.raises(ExportError, match="2 nodes of 8 processes are not the 8 ranks of the plan"):
        node_size(halved)


def test_the_same_plan_gives_the_same_files(tmp_path: Path) -> None:
    one, two = (contents(export(plan_of(), tmp_path / name)[0].parent) for name in ("one", "two"))
    assert one == two
    assert json.loads(one[PLAN])["gpus"] == 8
