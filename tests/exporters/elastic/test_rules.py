"""What is refused: rules of Megatron's checkpoints, promises of a class, and plans that contradict themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moeplan.errors import ExportError, UnknownNameError, UsageError
from moeplan.exporters.elastic import write_elastic
from moeplan.exporters.elastic.rules import RULES
from moeplan.planner.elastic.elastic_plan import ElasticPlan
from tests.exporters.elastic.plans import DP_ONLY, MIXED, PIPELINE, count_of, elastic_of, texts_of, with_counts


def passing(flags: list[str], **fields: Any) -> ElasticPlan:
    """A plan whose script passes flags on."""
    elastic = elastic_of(PIPELINE, **fields)
    imported = {"file": "run.sh", "framework": "Megatron-LM", "passed_through": flags}
    plan = dataclasses.replace(elastic.counts[0].plan, imported=imported)
    return dataclasses.replace(elastic, counts=(dataclasses.replace(elastic.counts[0], plan=plan), *elastic.counts[1:]))


def twice(**changes: Any) -> ElasticPlan:
    """A plan with the layout of 2 nodes on two counts, fields of the second count changed."""
    first, second = count_of(2, {"tp": 2, "ep": 8}), count_of(3, {"tp": 2, "ep": 8})
    return elastic_of(DP_ONLY, counts=(first, dataclasses.replace(second, **changes)), transitions=())


LOCAL = {"local_interval_steps": 5}
FSDP = {2: {"ep": 8, "sharding": "fsdp"}, 3: {"ep": 8}}
BROKEN: list[tuple[str, ElasticPlan, dict[str, str], str]] = [  # rule, plan, settings, message
    ("counts", elastic_of({4: DP_ONLY[4], 2: DP_ONLY[2]}, reshardable=False), {}, r"node counts \[4, 2\] do not ascend"),
    ("counts", twice(uses=4, nodes=4), {}, "4 nodes: 4 that train are 32 ranks, the layout has 24"),
    ("counts", twice(plan=count_of(3, {}, model="dense").plan), {}, "different models: llama3-8b.*, mixtral"),
    ("batch", twice(plan=count_of(3, {"tp": 2, "ep": 8}, batch=48).plan), {}, "which is 96 on 2 nodes, 48 on 3 nodes"),
    ("batch", passing(["--decrease-batch-size-if-needed"]), {}, "--decrease-batch-size-if-needed of the imported script"),
    ("batch", passing(["--rampup-batch-size 32 32 100"], consistency="batch"), {}, "--rampup-batch-size of the imported"),
    ("state", passing(["--finetune"], consistency="none"), {}, "--finetune of the imported script loses state"),
    ("sharding", elastic_of(FSDP), {}, "sharding fsdp on 2 nodes writes fsdp_dtensor checkpoints"),
    ("sharding", elastic_of(FSDP), {}, "kept in different forms: sharding fsdp/optimizer"),
    ("reshardable", elastic_of(MIXED, reshardable=False), {}, "layouts differ in pp 1/2, stages .*, ep 8/4, but"),
    ("reshardable", elastic_of(DP_ONLY, LOCAL, local_saves=True, reshardable=True), {}, "exclude the reshardable format"),
    ("reshardable", elastic_of(MIXED, LOCAL, local_saves=True, reshardable=False), {}, "exclude layouts that differ in pp"),
    ("local", elastic_of(DP_ONLY, local_saves=True), {}, "local checkpoints are used, but 2 nodes save one every 0 steps"),
    ("local", elastic_of(DP_ONLY, LOCAL), {}, "are not used, but 2 nodes save one every 5 steps"),
    ("instances", with_counts(elastic_of(DP_ONLY), instances=2), {}, "do not divide dp.cp = 12 and edp = 3"),
    ("instances", with_counts(elastic_of({2: {"sharding": "ddp"}}), instances=2), {}, "need a sharded optimizer, not 'ddp'"),
    ("bitwise", elastic_of({2: {"tp": 2, "ep": 8, "tp_overlap": True}}, consistency="bitwise"), {}, "tp_overlap on 2 nodes"),
    ("bitwise", passing(["--moe-input-jitter-eps 0.01"], consistency="bitwise"), {}, "not loaded where pp 2/4 differ"),
    ("spares", elastic_of(PIPELINE), {"surplus": "exit"}, "6 nodes leave some idle, which surplus=exit forbids"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "elastic", "settings", "message"), BROKEN)
def test_broken(rule: str, elastic: ElasticPlan, settings: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"no files can be written of this elastic plan: .*{message}.*\(rule {rule}\)"):
        write_elastic(elastic, tmp_path / "out", settings=settings)
    assert not list(tmp_path.iterdir())


def test_every_rule_has_a_row() -> None:
    assert {row[0] for row in BROKEN} == {rule.name for rule in RULES}


def test_all_broken_rules_are_named() -> None:
    with pytest.raises(ExportError) as caught:
        texts_of(elastic_of(MIXED, LOCAL, reshardable=False), surplus="idle")
    assert "(rule reshardable)" in str(caught.value) and "(rule local)" in str(caught.value)
    assert "only dp may change" in (caught.value.hint or "")


KEPT: list[tuple[str, ElasticPlan, dict[str, str]]] = [
    ("another batch in the class none", twice(plan=count_of(3, {"tp": 2, "ep": 8}, batch=48).plan), {}),
    ("a ramp in the class none", passing(["--rampup-batch-size 32 32 100"]), {}),
    ("no spares with exit", elastic_of(DP_ONLY), {"surplus": "exit"}),
    ("jitter where nothing is promised", passing(["--moe-input-jitter-eps 0.01"]), {}),
    ("the same split in two forms", elastic_of({2: {"pp": 2}, 4: {"pp": 2, "stages": "Et*4|t*4L"}}, reshardable=False), {}),
]


@pytest.mark.parametrize(("name", "elastic", "settings"), KEPT, ids=[row[0] for row in KEPT])
def test_kept(name: str, elastic: ElasticPlan, settings: dict[str, str]) -> None:
    consistency = "none" if "class none" in name else elastic.consistency
    texts = texts_of(dataclasses.replace(elastic, consistency=consistency), **settings)
    assert "elastic.json" in texts


SETTINGS = [  # settings, message
    ({"surplus": "sleep"}, "surplus='sleep' is not one of idle, reserve, exit"),
    ({"async_strategy": "fast"}, "async_strategy='fast' is not mcore or nvrx"),
    ({"local_directory": "here"}, "local_directory='here' is not an absolute path"),
    ({"CHECKPOINTS": "/a b"}, "CHECKPOINTS='/a b' is not a plain path"),
    ({"restarts": "many"}, "restarts='many' of launcher 'torchrun' is not a number"),
    ({"restart": "5"}, "no launcher of this export takes 'restart' .did you mean 'restarts'"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        texts_of(elastic_of(DP_ONLY), **settings)


def test_launchers_of_one_plan_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown launcher of elastic plans 'trainjob'"):
        texts_of(elastic_of(DP_ONLY), "trainjob")


def test_a_plan_that_megatron_cannot_run_is_refused() -> None:
    with pytest.raises(ExportError, match="Megatron-LM 0.19.2 refuses this plan: moe-sequence-parallel"):
        texts_of(elastic_of({2: {"tp": 2, "ep": 8, "sequence_parallel": False}}))
