"""The entry script, run for real beside a training script that records what it became."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeplan.exporters.base import read_arguments
from moeplan.exporters.elastic import entry_script, write_elastic
from moeplan.exporters.elastic.launch import ENTRY
from moeplan.planner.elastic.elastic_plan import ElasticPlan
from tests.exporters.elastic.plans import DP_ONLY, PIPELINE, elastic_of, two_small_nodes

TRAIN = """import json, os, sys, time
place = os.environ["RECORD"] + os.environ["RANK"]
with open(place + "~", "w") as file:
    json.dump({"words": sys.argv[1:], "variables": {**os.environ, "PID": str(os.getpid())}}, file)
os.rename(place + "~", place)
time.sleep(float(os.environ.get("SLEEP", "0")))
sys.exit(int(os.environ.get("CODE", "0")))
"""


class Job:
    """An export, and ranks of it that are started."""

    def __init__(self, place: Path, elastic: ElasticPlan, surplus: str) -> None:
        place.mkdir()
        self.directory, self.record = place / "launch", place / "record."
        write_elastic(elastic, self.directory, settings={"surplus": surplus})
        (place / "train.py").write_text(TRAIN)
        self.given = {
            "PATH": os.environ["PATH"],
            "PRETRAIN_SCRIPT": str(place / "train.py"),
            "CHECKPOINTS": str(place / "my checkpoints"),
            "RECORD": str(self.record),
            "NCCL_ALGO": "Tree",
        }

    def variables(self, world: int, rank: int, **more: str) -> dict[str, str]:
        said = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_WORLD_SIZE": 8, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        return {**self.given, **{name: str(value) for name, value in said.items()}, **more}

    def run(self, given: dict[str, str], *further: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.directory / ENTRY), *further]
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60, check=False)

    def recorded(self, rank: int) -> tuple[list[str], dict[str, str]]:
        found = json.loads(Path(f"{self.record}{rank}").read_text())
        return found["words"], found["variables"]

    def arguments(self, nodes: int) -> tuple[dict[str, str], list[str]]:
        return read_arguments((self.directory / f"nodes-{nodes}.args").read_text())


@pytest.fixture(params=["idle", "reserve"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    """2, 4 and 6 nodes, of which 4 train."""
    return Job(tmp_path / "a job", elastic_of(PIPELINE, consistency="bitwise"), request.param)


SIZES = [(2, 2, 16), (3, 2, 16), (4, 4, 32), (5, 4, 32), (6, 6, 32), (9, 6, 32)]
"""Nodes that are there, planned count, ranks that train."""


@pytest.mark.parametrize(("nodes", "planned", "active"), SIZES)
def test_becomes_the_training_script(nodes: int, planned: int, active: int, job: Job) -> None:
    world = nodes * 8
    done = job.run(job.variables(world, 0), "--lr", "3e-4", "--data-path", "my data*")
    assert (done.returncode, done.stderr) == (0, f"elastic: {active} of {world} ranks train, nodes-{planned}.args\n")
    words, variables = job.recorded(0)
    environment, given = job.arguments(planned)
    reserve = json.loads((job.directory / "elastic.json").read_text())["surplus"] == "reserve"
    held = ["--inprocess-restart", "--inprocess-active-world-size", str(active)] if reserve and active < world else []
    place = job.given["CHECKPOINTS"]
    assert words == [*given, "--save", place, "--load", place, *held, "--lr", "3e-4", "--data-path", "my data*"]
    assert environment.items() <= variables.items() and variables["NCCL_ALGO"] == "Ring"
    # with a reserve Megatron itself tells its ranks how many train
    assert variables["WORLD_SIZE"] == str(world if reserve else active)
    assert ("TORCH_CPP_LOG_LEVEL" in variables) == bool(held)


def test_only_the_first_rank_speaks(job: Job) -> None:
    assert job.run(job.variables(32, 31)).stderr == ""
    assert job.recorded(31)[1]["RANK"] == "31"


UNPLANNED = "ranks are not a planned count; planned: 16 (2 nodes), 24 (3 nodes), 32 (4 nodes)\n"
REFUSED: list[tuple[dict[str, str], str]] = [  # variables, reason
    ({"WORLD_SIZE": "8"}, f"elastic: 8 {UNPLANNED}"),
    ({"WORLD_SIZE": "40"}, f"elastic: 40 {UNPLANNED}"),
    ({"LOCAL_WORLD_SIZE": "4"}, "elastic: 4 ranks on this node, planned are 8\n"),
    ({"RANK": ""}, "elastic: RANK is not set: start this script with torchrun\n"),
    ({"CHECKPOINTS": ""}, "elastic: PRETRAIN_SCRIPT and CHECKPOINTS must be set"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_refuses(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "a job", elastic_of(DP_ONLY), "exit")
    done = job.run({**job.variables(16, 0), **changes})
    assert done.returncode == 1 and done.stderr.startswith(reason)
    assert not list((tmp_path / "a job").glob("record*"))
    assert job.run(job.variables(24, 0)).returncode == 0


def test_fewer_than_planned_never_start(job: Job) -> None:
    done = job.run(job.variables(8, 0))
    assert done.returncode == 1 and "8 ranks are not a planned count; planned: 16 (2 nodes), 32 (4 nodes)" in done.stderr


def quick(job: Job) -> Path:
    """The entry script, looking often."""
    script = job.directory / ENTRY
    script.write_text(script.read_text().replace(f"POLL_S = {entry_script.POLL_S}", "POLL_S = 0.2"))
    return script


def test_surplus_ranks_wait_for_the_end(tmp_path: Path) -> None:
    job = Job(tmp_path / "a job", elastic_of(PIPELINE), "idle")
    given = job.variables(48, 32, TORCHELASTIC_RUN_ID="a/b")
    waiting = subprocess.Popen([sys.executable, str(quick(job))], env=given)
    ended = Path(job.given["CHECKPOINTS"]) / ".ended-a-b"
    time.sleep(1)
    assert waiting.poll() is None and not ended.exists()
    assert job.run({**given, "RANK": "1"}).returncode == 0 and not ended.exists()  # the first rank tells
    assert job.run({**given, "RANK": "0", "CODE": "3"}).returncode == 3 and not ended.exists()
    assert waiting.poll() is None
    assert job.run({**given, "RANK": "0"}).returncode == 0 and ended.exists()
    assert waiting.wait(timeout=30) == 0 and not Path(f"{job.record}32").exists()
    assert job.run({**given, "RANK": "0", "CODE": "3"}).returncode == 3 and not ended.exists()  # an older mark is removed


@pytest.mark.parametrize("rank", [0, 40])
def test_stops_when_torchrun_says_so(rank: int, tmp_path: Path) -> None:
    job = Job(tmp_path / "a job", elastic_of(PIPELINE), "idle")
    given = job.variables(48, rank, SLEEP="60")
    process = subprocess.Popen([sys.executable, str(job.directory / ENTRY)], env=given)
    while rank == 0 and not Path(f"{job.record}0").exists():
        time.sleep(0.1)
    child = job.recorded(0)[1]["PID"] if rank == 0 else ""
    process.terminate()
    assert process.wait(timeout=30) != 0
    assert not child or not Path(f"/proc/{child}").exists()


def test_two_nodes_under_torchrun(tmp_path: Path) -> None:
    """Two agents of torchrun on this machine, each a node of one GPU: one rank trains, the other waits, both end well."""
    job = Job(tmp_path / "a job", two_small_nodes(), "idle")
    quick(job)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    address = f"127.0.0.1:{20000 + os.getpid() % 10000}"  # below the ports that the system gives to others
    given = {**job.given, "PATH": path, "OMP_NUM_THREADS": "1", "MEGATRON_LM": "/m", "SKIP_PREFLIGHT": "1"}
    given["RDZV_ENDPOINT"] = address
    command = ["bash", str(job.directory / "run_torchrun.sh"), "--lr", "3e-4"]
    agents = [subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    assert "elastic: 1 of 2 ranks train, nodes-2.args\n" in "".join(told)
    words, variables = job.recorded(0)
    assert words[:-6] == job.arguments(2)[1] and words[-2:] == ["--lr", "3e-4"]
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == ("0", "1", "1")
    assert not Path(f"{job.record}1").exists()
