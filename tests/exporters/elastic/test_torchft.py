"""Launch file of torchft: which plans it takes, and what a node starts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from moeplan.errors import ExportError
from moeplan.exporters.elastic.torchft import Groups, TorchFt, groups_of
from moeplan.exporters.launchers.base import Size
from tests.exporters.elastic.plans import DP_ONLY, MIXED, PIPELINE, elastic_of, texts_of
from tests.exporters.launchers.rows import replaced
from tests.exporters.test_launch_scripts import run
from tests.exporters.test_launch_scripts import stubs as stubs

FILE = "run_torchft.sh"
SHOW = """#!/usr/bin/env bash
printf '%s\\0' "$@" "$REPLICA_GROUP_ID $NUM_REPLICA_GROUPS $MIN_REPLICA_SIZE $WORLD_SIZE_MODE ${CUDA_VISIBLE_DEVICES:-}" \\
  > "$RECORD.$REPLICA_GROUP_ID.${NODE_RANK:-}"
"""
HALVES = {nodes: {"tp": 2, "ep": 4} for nodes in (2, 3, 4)}
"""Replica groups of half a node."""
PAIRS = {nodes: {"tp": 2, "pp": 2, "ep": 8} for nodes in (2, 4)}
"""Replica groups of two nodes."""


def test_groups() -> None:
    assert groups_of(elastic_of(DP_ONLY)) == Groups(ranks=8, least=2, most=4, mode="FIXED_WITH_SPARES")
    assert groups_of(elastic_of(HALVES)) == Groups(ranks=4, least=4, most=8, mode="FIXED_WITH_SPARES")
    dense = {nodes: {"tp": 2} for nodes in (1, 2)}
    assert groups_of(elastic_of(dense, consistency="none")) == Groups(ranks=2, least=4, most=8, mode="DYNAMIC")
    spread = {nodes: {"tp": 2, "cp": 2, "ep": 4, "etp": 2} for nodes in (2, 4)}  # experts spread over two dense replicas
    assert groups_of(elastic_of(spread)).ranks == 8


REFUSED = [  # layouts, reason
    (MIXED, "adds and drops replicas of one layout, but layouts differ in pp 1/2, stages .*, ep 8/4"),
    ({2: {"tp": 2}, 4: {"tp": 2, "micro_batch": 2}}, "differ in micro_batch 1/2"),
    ({3: {"tp": 2, "pp": 6, "stages": "Et|t|t|t|tt|ttL"}}, "has 12 ranks, which neither fill nor divide nodes of 8"),
]


@pytest.mark.parametrize(("layouts", "reason"), REFUSED)
def test_refuses(layouts: dict[int, dict[str, Any]], reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        texts_of(elastic_of(layouts), "torchft")


@pytest.fixture
def given(tmp_path: Path, stubs: dict[str, str]) -> dict[str, str]:
    """Stand-ins that record, and what a node must be told."""
    for name in ("torchrun", "torchft_lighthouse"):
        (tmp_path / "bin" / name).write_text(SHOW)
        (tmp_path / "bin" / name).chmod(0o755)
    return {**stubs, "TORCHFT_LIGHTHOUSE": "http://first:29510", "TORCHFT_SCRIPT": "/my train.py"}


def script_of(layouts: dict[int, dict[str, Any]], directory: Path, **settings: str) -> Path:
    path = directory / FILE
    path.write_text(texts_of(elastic_of(layouts), "torchft", **settings)[FILE])
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    return path


def records(given: dict[str, str]) -> dict[str, list[str]]:
    """Words by group; the last are the variables."""
    folder = Path(given["RECORD"]).parent
    return {path.name.split(".")[1]: path.read_text().split("\0")[:-1] for path in sorted(folder.glob("record.*"))}


@pytest.mark.parametrize(("layouts", "slots", "each"), [(DP_ONLY, 1, 8), (HALVES, 2, 4)])
def test_groups_within_a_node(
    layouts: dict[int, dict[str, Any]], slots: int, each: int, tmp_path: Path, given: dict[str, str]
) -> None:
    from torch.distributed.run import get_args_parser

    script = script_of(layouts, tmp_path, group_restarts="3")
    assert "set NODE_RANK to" in run(script, given).stderr
    done = run(script, {**given, "NODE_RANK": "1"}, "--lr", "3e-4")
    assert (done.returncode, done.stderr) == (0, "")
    found = records(given)
    assert list(found) == [str(slots + slot) for slot in range(slots)]
    for slot, (name, words) in enumerate(found.items()):
        parsed = get_args_parser().parse_args(words[:-1])
        assert (int(parsed.nnodes), int(parsed.nproc_per_node), parsed.max_restarts) == (1, each, 3)
        assert (parsed.training_script, parsed.training_script_args) == ("/my train.py", ["--lr", "3e-4"])
        devices = ",".join(str(slot * each + i) for i in range(each))
        assert words[-1] == f"{name} {4 * slots} {2 * slots} FIXED_WITH_SPARES {devices}"


def test_groups_of_several_nodes(tmp_path: Path, given: dict[str, str]) -> None:
    from torch.distributed.run import get_args_parser

    script = script_of(PAIRS, tmp_path)
    assert "set GROUP_ADDR to the first of the 2 nodes" in run(script, {**given, "NODE_RANK": "3"}).stderr
    done = run(script, {**given, "NODE_RANK": "3", "GROUP_ADDR": "third"})
    assert (done.returncode, done.stderr) == (0, "")
    ((name, words),) = records(given).items()
    parsed = get_args_parser().parse_args(words[:-1])
    assert (name, words[-1]) == ("1", "1 2 1 FIXED_WITH_SPARES ")
    assert (int(parsed.nnodes), int(parsed.nproc_per_node), parsed.node_rank, parsed.master_addr) == (2, 8, 1, "third")


def test_the_lighthouse_waits_for_the_smallest_count(tmp_path: Path, given: dict[str, str]) -> None:
    done = run(script_of(PAIRS, tmp_path), {**given, "REPLICA_GROUP_ID": "l", "NUM_REPLICA_GROUPS": "", "MIN_REPLICA_SIZE": "",
                                            "WORLD_SIZE_MODE": ""}, "lighthouse")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert records(given)["l"][:-1] == [  # options of torchft_lighthouse 0.2.0
        "--min_replicas", "1", "--join_timeout_ms", "60000", "--quorum_tick_ms", "100", "--heartbeat_timeout_ms", "5000",
    ]  # fmt: skip


def test_its_size_is_read_back() -> None:
    for layouts, nodes in ((DP_ONLY, 4), (HALVES, 4), (PAIRS, 4)):
        elastic = elastic_of(layouts)
        text, known = texts_of(elastic, "torchft")[FILE], TorchFt(groups_of(elastic))
        assert known.size(text) == Size(nodes, 8)
        assert known.size(replaced(text, {"NUM_REPLICA_GROUPS=": "NUM_REPLICA_GROUPS=1"})) != Size(nodes, 8)


def test_spare_nodes_have_no_group() -> None:
    only = {nodes: PIPELINE[6] | {"pp": 1, "dp": 16} for nodes in (4, 6)}
    assert "NUM_REPLICA_GROUPS=8 " in texts_of(elastic_of(only, reshardable=False), "torchft")[FILE]
