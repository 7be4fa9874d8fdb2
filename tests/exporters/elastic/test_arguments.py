"""The argument files: Megatron's own parser takes them, they say what the plan does, and a class changes what it must."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from moeplan.exporters.base import read_arguments
from moeplan.exporters.elastic.arguments import DETERMINISTIC, FACTS, copies
from moeplan.exporters.megatron import arguments
from moeplan.exporters.megatron_layout import FACTS as MEGATRON
from moeplan.planner.elastic.elastic_plan import ElasticPlan
from tests import megatron
from tests.exporters.cases import capability, understood, words
from tests.exporters.elastic.plans import DP_ONLY, MIXED, PIPELINE, USES, elastic_of, texts_of, with_counts

LOCAL: dict[str, Any] = {"local_saves": True, "reshardable": False}
CASES: list[tuple[str, ElasticPlan]] = [
    ("dp only", elastic_of(DP_ONLY)),
    ("mixed", elastic_of(MIXED)),
    ("pipeline, bitwise", elastic_of(PIPELINE, consistency="bitwise")),
    ("blocking", elastic_of(MIXED, {"asynchronous": False}, consistency="batch")),
    ("local", elastic_of(DP_ONLY, {"local_interval_steps": 5}, **LOCAL)),
    ("replicas", with_counts(elastic_of({2: {"tp": 2, "ep": 4}, 4: {"tp": 2, "ep": 4}}, reshardable=False), instances=2)),
]


@pytest.fixture
def resiliency(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package that Megatron wants to see before it takes local checkpoints."""
    megatron.known_flags()  # Megatron itself is imported without it
    path = "nvidia_resiliency_ext"
    for part in ("", ".checkpointing", ".local", ".ckpt_managers", ".local_manager"):
        path += part
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    monkeypatch.setattr(sys.modules[path], "LocalCheckpointManager", object, raising=False)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic mode is a state of torch, which the next test must not find."""
    yield
    import torch

    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("resiliency", "deterministic")
@pytest.mark.parametrize(("name", "elastic"), CASES, ids=[name for name, _ in CASES])
def test_megatron_takes_them(name: str, elastic: ElasticPlan) -> None:
    texts = texts_of(elastic)
    for count in elastic.counts:
        environment, given = read_arguments(texts[f"nodes-{count.nodes}.args"])
        problem, layout = count.plan.problem, count.plan.layout
        added = [
            "--save",
            "/data",
            "--load",
            "/data",
            "--inprocess-restart",
            "--inprocess-active-world-size",
            str(layout.world),
        ]
        verdict = megatron.accept([*given, *added], world=layout.world, environment=environment, capability=capability(problem))
        assert verdict.accepted, f"{count.nodes} nodes: {verdict}"
        assert (verdict.microbatches, verdict.layers) == understood(problem, layout)
        assert verdict.microbatches * layout.dp * layout.micro_batch == 96


def test_megatron_knows_the_flags() -> None:
    parser = megatron.known_flags()
    for name, fact in FACTS.flags.items():
        action = parser[name]
        assert fact.takes == ("switch" if action.nargs == 0 else "value"), name
        choices = {str(choice) for choice in action.choices or fact.values}
        assert set(fact.values) <= choices, name


@pytest.mark.parametrize("version", MEGATRON.versions)
def test_versions_are_those_of_other_exports(version: str) -> None:
    assert (FACTS.versions, FACTS.written_for) == (MEGATRON.versions, MEGATRON.written_for)
    assert FACTS.knows("--inprocess-restart", version)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_refuses_what_is_left_out() -> None:
    """The judge above would not notice a mode that forbids nothing."""
    count = elastic_of(PIPELINE).counts[0]
    environment, given = read_arguments(texts_of(elastic_of(PIPELINE))["nodes-2.args"])
    verdict = megatron.accept([*given, "--deterministic-mode"], world=count.plan.layout.world, environment=environment)
    assert not verdict.accepted and "cross_entropy_loss_fusion" in verdict.message
    environment, given = read_arguments(texts_of(elastic_of(PIPELINE, consistency="bitwise"))["nodes-2.args"])
    verdict = megatron.accept(given, world=count.plan.layout.world, environment={**environment, "NCCL_ALGO": "Tree"})
    assert not verdict.accepted and "NCCL_ALGO" in verdict.message


def flags_of(text: str) -> dict[str, list[str]]:
    _, given = read_arguments(text)
    starts = [i for i, word in enumerate(given) if word.startswith("--")] + [len(given)]
    return {given[a]: given[a + 1 : b] for a, b in zip(starts, starts[1:], strict=False)}


def test_the_rest_is_the_export_of_the_plan() -> None:
    for _, elastic in CASES:
        texts = texts_of(elastic)
        for count in elastic.counts:
            environment, given = read_arguments(texts[f"nodes-{count.nodes}.args"])
            plain = words(arguments(count.plan))
            lost = set(plain) - set(given)
            fused = {"--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native"}
            unsaved = {"--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"}
            assert lost == (fused if elastic.consistency == "bitwise" else set()) | (
                set() if count.saving.asynchronous else unsaved
            )
            assert (DETERMINISTIC.items() <= environment.items()) == (elastic.consistency == "bitwise")
            names = [word for word in given if word.startswith("--")]
            assert len(names) == len(set(names))


def test_what_is_added() -> None:
    given = flags_of(texts_of(elastic_of(MIXED))["nodes-4.args"])
    assert given["--save-interval"] == ["40"] and given["--ckpt-format"] == ["torch_dist"]
    assert given["--dist-ckpt-optim-fully-reshardable"] == [] and given["--num-distributed-optimizer-instances"] == ["1"]
    assert given["--async-strategy"] == ["mcore"] and given["--global-batch-size"] == ["96"]
    assert not any("non-persistent" in name or "decrease" in name or "deterministic" in name for name in given)
    assert flags_of(texts_of(elastic_of(MIXED), async_strategy="nvrx")["nodes-4.args"])["--async-strategy"] == ["nvrx"]
    plain = flags_of(texts_of(elastic_of(DP_ONLY))["nodes-4.args"])
    assert "--dist-ckpt-optim-fully-reshardable" not in plain
    unsharded = {n: {**fields, "sharding": "ddp"} for n, fields in DP_ONLY.items()}
    assert "--num-distributed-optimizer-instances" not in flags_of(texts_of(elastic_of(unsharded))["nodes-4.args"])


def test_local_checkpoints_are_copied_to_other_nodes() -> None:
    texts = texts_of(CASES[4][1], local_directory="/ssd/ckpt")
    for nodes, held in ((2, "2"), (3, "3"), (4, "2")):
        given = flags_of(texts[f"nodes-{nodes}.args"])
        assert given["--non-persistent-save-interval"] == ["5"] and given["--non-persistent-ckpt-type"] == ["local"]
        assert given["--non-persistent-local-ckpt-dir"] == [f"/ssd/ckpt/nodes-{nodes}"]  # no count loads another's
        assert (given["--replication-jump"], given["--replication-factor"]) == (["8"], [held])
        assert nodes * 8 % (8 * int(held)) == 0  # groups of the copies fill the ranks
    assert [copies(nodes) for nodes in (1, 2, 3, 5, 6, 9, 25)] == [1, 2, 3, 1, 2, 3, 1]


def test_files_name_what_they_are_for() -> None:
    texts = texts_of(elastic_of(PIPELINE))
    assert texts["nodes-6.args"].startswith("# mixtral-8x7b-8l-proxy on 6 nodes of 8 H100, of which 2 spare: TP2 PP4 DP4 EP4\n")
    assert "; 32 ranks\n" in texts["nodes-6.args"] and "spare" not in texts["nodes-4.args"]
    assert USES == {6: 4}
    same = [line for line in texts["nodes-6.args"].splitlines() if not line.startswith("#")]
    assert same == [line for line in texts["nodes-4.args"].splitlines() if not line.startswith("#")]


def test_flags_of_the_script_give_way() -> None:
    imported = {
        "file": "run.sh", "framework": "Megatron-LM", "environment": {"NCCL_ALGO": "Tree"},
        "passed_through": ["--save /old", "--load /old", "--save-interval 7", "--lr 3e-4", "--inprocess-restart"],
    }  # fmt: skip
    elastic = elastic_of(PIPELINE, consistency="bitwise")
    counts = [dataclasses.replace(c, plan=dataclasses.replace(c.plan, imported=imported)) for c in elastic.counts]
    texts = texts_of(dataclasses.replace(elastic, counts=tuple(counts)))
    given = flags_of(texts["nodes-2.args"])
    assert given["--save-interval"] == ["40"] and given["--lr"] == ["3e-4"]
    assert not {"--save", "--load", "--inprocess-restart"} & set(given)
    assert read_arguments(texts["nodes-2.args"])[0]["NCCL_ALGO"] == "Ring"
