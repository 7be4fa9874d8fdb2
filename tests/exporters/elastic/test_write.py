"""An export of an elastic plan is written whole or not at all, and its elastic.json says what the plan does."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError, FileError, SchemaError
from moeplan.exporters.base import read_arguments
from moeplan.exporters.elastic import write, write_elastic
from moeplan.exporters.elastic.data import SCHEMA, load_elastic
from moeplan.exporters.reading.imported import read_file
from moeplan.exporters.write import export
from moeplan.planner.plan_data import read_layout
from tests.exporters.elastic.plans import DP_ONLY, IMAGE, MIXED, PIPELINE, elastic_of, texts_of

FILES = {"elastic.json", "nodes-2.args", "nodes-3.args", "nodes-4.args", "elastic_entry.py", "preflight.py", "README.md",
         "run_torchrun.sh", "run_slurm.sbatch"}  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_writes_these_files(tmp_path: Path) -> None:
    paths = write_elastic(elastic_of(MIXED), tmp_path / "made" / "out")
    assert {path.name for path in paths} == FILES == set(contents(tmp_path / "made" / "out"))
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    for path in paths:
        assert os.access(path, os.X_OK) == path.name.endswith((".sh", ".sbatch", ".py"))
    more = write_elastic(elastic_of(DP_ONLY), tmp_path / "all", launchers=write.LAUNCHERS, settings=IMAGE)
    assert {path.name for path in more} == FILES | {"pytorchjob.yaml", "run_torchft.sh"}


def test_elastic_json(tmp_path: Path) -> None:
    elastic = elastic_of(PIPELINE, consistency="bitwise")
    write_elastic(elastic, tmp_path / "out")
    data = load_elastic(tmp_path / "out" / "elastic.json")
    assert (data["schema"], data["consistency"], data["hazards"], data["global_batch"]) == (SCHEMA, "bitwise", ["H5"], 96)
    assert sorted(data["files"]) == sorted(contents(tmp_path / "out"))
    for count, said in zip(elastic.counts, data["counts"], strict=True):
        x = count.plan.layout
        assert (said["nodes"], said["uses"], said["pi"]) == (count.nodes, count.uses, round(count.share, 6))
        for name in ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch"):
            assert said["layout"][name] == getattr(x, name)
        assert said["layout"]["opt_instances"] == 1 and sum(said["layout"]["stages"]) == 8
        assert read_layout(said["fields"], "elastic.json") == x
        assert said["uses"] * data["gpus_per_node"] == x.world
        path = tmp_path / "out" / said["arguments"]
        assert read_arguments(path.read_text()) == (said["environment"], said["args"])
        found = read_file(path, gpus=x.world)
        assert dataclasses.replace(found.layout, stages="") == dataclasses.replace(x, stages="")
        assert (said["step_s"], said["ckpt_interval_steps"]) == (round(count.plan.step_s, 5), 40)
    assert data["transitions"][0] == {
        "from": 2, "to": 4, "kind": "planned", "moved_bytes": 10**9, "lost_bytes": 0, "rollback": False,
        "seconds": {"group": 15.0},
    }  # fmt: skip
    assert [(move["from"], move["to"]) for move in data["transitions"]] == [(2, 4), (4, 2), (4, 6), (6, 4)]
    assert data["checkpoint"] == {"format": "torch_dist", "reshardable_optimizer": True, "async": True, "local": False}
    assert set(data["availability"]) >= {"node_mtbf_s", "repair_s", "job_rate", "notice_s"}
    assert data["expects"]["gpus_per_node"] == 8


def test_stages_are_layers_by_rank() -> None:
    elastic = elastic_of({2: {"pp": 2, "vpp": 2, "stages": "Et|tt|ttt|ttL"}})
    chunks = chunk_letters(elastic.counts[0].plan.problem.model, 2, 2, "Et|tt|ttt|ttL")
    assert [chunk.count("t") for chunk in chunks] == [1, 2, 3, 2]
    assert json.loads(texts_of(elastic)["elastic.json"])["counts"][0]["layout"]["stages"] == [4, 4]


NEEDS: list[tuple[dict[str, Any], dict[str, str], bool]] = [  # plan, settings, whether the resiliency package is needed
    ({}, {}, False),
    ({}, {"async_strategy": "nvrx"}, True),
    ({}, {"surplus": "reserve"}, True),
    ({"saving": {"local_interval_steps": 5}, "local_saves": True}, {}, True),
    ({"saving": {"asynchronous": False}}, {"async_strategy": "nvrx"}, False),
]


@pytest.mark.parametrize(("fields", "settings", "needed"), NEEDS)
def test_nodes_are_checked_for_the_resiliency_package(fields: dict[str, Any], settings: dict[str, str], needed: bool) -> None:
    data = json.loads(texts_of(elastic_of(DP_ONLY, **fields), **settings)["elastic.json"])
    assert ("nvidia-resiliency-ext" in data["expects"]["libraries"]) == needed


def test_readme_tells_what_runs() -> None:
    text = texts_of(elastic_of(PIPELINE, consistency="bitwise"))["README.md"]
    assert "| 6 | 4 | 16.67% | TP2 PP4 DP4 EP4 |" in text and "| 40 steps, asynchronous | `nodes-6.args` |" in text
    for words in ("On every loss go on", "H5: the ring order changes", "reshardable form", "wait in the entry script"):
        assert words in text
    assert "warm reserve" in texts_of(elastic_of(PIPELINE), surplus="reserve")["README.md"]
    assert "learning rate that follows it is yours" in texts_of(elastic_of(PIPELINE, consistency="none"))["README.md"]
    local = texts_of(elastic_of(DP_ONLY, {"local_interval_steps": 5}, local_saves=True))["README.md"]
    assert "40 steps, asynchronous, 5 locally" in local and "`/tmp/checkpoints`" in local


def test_replaces_whole_exports_of_its_kind_only(tmp_path: Path) -> None:
    place = tmp_path / "out"
    write_elastic(elastic_of(MIXED), place, launchers=["pytorchjob"], settings=IMAGE)
    before = contents(place)
    with pytest.raises(FileError, match="holds an older export"):
        write_elastic(elastic_of(DP_ONLY), place)
    assert contents(place) == before
    write_elastic(elastic_of(DP_ONLY), place, force=True)
    assert set(contents(place)) == FILES
    (place / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match="holds 'mine.txt', which no export wrote"):
        write_elastic(elastic_of(MIXED), place, force=True)
    plan = elastic_of(DP_ONLY).counts[0].plan
    export(plan, tmp_path / "one")
    with pytest.raises(FileError, match="exists and is not an empty directory"):
        write_elastic(elastic_of(MIXED), tmp_path / "one", force=True)
    (place / "mine.txt").unlink()
    with pytest.raises(FileError, match="exists and is not an empty directory"):
        export(plan, place, force=True)
    (place / "elastic.json").write_text("{")
    with pytest.raises(FileError, match="its elastic.json is no export's"):
        write_elastic(elastic_of(MIXED), place, force=True)
    with pytest.raises(SchemaError, match="not JSON"):
        load_elastic(place / "elastic.json")


def test_files_that_say_something_else_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write.arguments.text
    for old, new, message in (
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4", "say something else than the plan"),
        ("--save-interval 40", "--save-interval 41", "nodes-2.args does not say what the plan does"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(write.arguments, "text", lambda *given, a=old, b=new: other(*given).replace(a, b))
            with pytest.raises(ExportError, match=message):
                write_elastic(elastic_of(DP_ONLY), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["0.17.0", "0.18.0", "0.20.0"])
def test_other_versions(version: str, tmp_path: Path) -> None:
    write_elastic(elastic_of(MIXED), tmp_path / "out", version=version)
    data = load_elastic(tmp_path / "out" / "elastic.json")
    assert data["framework"] == f"Megatron-LM {version}"
    assert f"megatron-core=={version[:4]}.*" in data["expects"]["libraries"]
