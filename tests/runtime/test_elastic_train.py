"""An elastic run for real: four agents of torchrun, of which one is killed with its worker and comes back.

One run serves all tests. The killed node is that of rank 0, the hardest one: it serves the workers' store and writes the
journal. The store of the agents is the test's own, as a cluster has it on a node that is not lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeplan.runtime.elastic_data import sample_ids
from moeplan.runtime.elastic_record import Event, Saved, Started, Step, kept, read
from moeplan.runtime.elastic_state import checkpoints
from moeplan.runtime.elastic_table import load_table
from moeplan.runtime.elastic_train import SHARED_STORE, Job, main, train
from tests.runtime.elastic_job import LOSS, REGROWTH, STEPS

ROOT = Path(__file__).parents[2]
DEADLINE_S = 400.0
EVERY, GLOBAL_BATCH = 4, 12
TOLERANCE = 1e-4
LAYOUTS = {3: {"dp": 2, "ep": 2, "micro_batch": 3}, 4: {"dp": 4, "ep": 4, "micro_batch": 3}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", SHARED_STORE: "1", "PYTHONPATH": str(ROOT)}


def table(place: Path, layouts: dict[int, dict[str, int]] = LAYOUTS, batch: int = GLOBAL_BATCH) -> Path:
    counts = [{"nodes": n, "uses": n, "layout": layout, "ckpt_interval_steps": EVERY} for n, layout in layouts.items()]
    path = place / "elastic.json"
    path.write_text(json.dumps({"schema": "moeplan.elastic/1", "global_batch": batch, "counts": counts}))
    return path


class Cluster:
    """Agents, each in the place of a node, forked by one process (`elastic_agents`)."""

    def __init__(self, place: Path, port: int) -> None:
        self.place = place
        self.agents: list[int] = []
        command = [
            sys.executable, "-m", "tests.runtime.elastic_agents", str(port), str(place),
            str(place / "elastic.json"), "-d", str(place), "--steps", str(STEPS), "--timeout", "300",
        ]  # fmt: skip
        self.forker = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, word: str) -> str:
        assert self.forker.stdin is not None and self.forker.stdout is not None
        self.forker.stdin.write(f"{word}\n")
        return self.forker.stdout.readline()

    def ended(self) -> dict[int, int]:
        """Exit codes of agents by process."""
        return {int(pid): code for pid, code in json.loads(self.ask("ended")).items()}

    def start(self) -> None:
        """One more node."""
        self.agents.append(int(self.ask("start")))

    def kill(self, pid: int) -> None:
        """A node is gone: first its agent, which would start the worker again, then the worker."""
        workers = children(pid)
        os.kill(pid, signal.SIGKILL)
        while pid not in self.ended():
            time.sleep(0.02)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    def wait(self, path: Path) -> None:
        """Until a file is there."""
        end = time.monotonic() + DEADLINE_S
        while not path.exists():
            assert time.monotonic() < end and set(self.ended().values()) <= {-9}, self.logs()
            time.sleep(0.05)

    def finish(self) -> list[int]:
        """Exit codes of all agents."""
        end = time.monotonic() + DEADLINE_S
        while len(codes := self.ended()) < len(self.agents):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.05)
        return [codes[pid] for pid in self.agents]

    def stop(self) -> None:
        """Leave no process behind."""
        for pid in self.agents:
            if pid not in self.ended():
                self.kill(pid)
        self.forker.communicate()

    def logs(self) -> str:
        """What the agents and workers said."""
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(self.place.glob("agent-*.log")))


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@dataclass(frozen=True)
class Ran:
    """What the elastic run and an undisturbed one left behind."""

    events: list[Event]
    codes: list[int]
    said: str
    checkpoints: list[str]
    undisturbed: list[float]

    def worlds(self) -> list[Started]:
        """Where the number of workers changed, the last three times.

        A late agent may make torchrun form a world of three before one of four, or one of three twice.
        """
        starts = [event for event in self.events if isinstance(event, Started)]
        return [now for i, now in enumerate(starts) if i == 0 or now.workers != starts[i - 1].workers][-3:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    place = tmp_path_factory.mktemp("elastic")
    table(place)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cluster = Cluster(place, store.port)
    try:
        for _ in range(4):
            cluster.start()
        cluster.wait(place / f"waits-4-{LOSS}")
        cluster.kill(int((place / "agent-of-rank-0").read_text()))
        undisturbed = straight(place / "straight")
        cluster.wait(place / f"waits-3-{REGROWTH}")
        cluster.start()
        codes = cluster.finish()
    finally:
        cluster.stop()
    names = [path.name for path in checkpoints(place / "checkpoints")]
    return Ran(read(place / "journal.jsonl"), codes, cluster.logs(), names, undisturbed)


def straight(place: Path) -> list[float]:
    """Losses of one process that nothing disturbs, in the time in which the agents miss the lost one."""
    place.mkdir()
    job = Job(table=load_table(table(place, {1: {"micro_batch": 4}})), directory=place, steps=STEPS)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                patch.setenv(name, "1" if name.endswith("SIZE") else "0")
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", "1")
            assert train(job)
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.set_num_threads(threads)
    return [step.loss for step in kept(read(job.journal))]


def test_the_world_shrinks_and_regrows(ran: Ran) -> None:
    assert [(world.workers, world.active, world.layout) for world in ran.worlds()] == [
        (4, 4, "DP4 EP4"),
        (3, 2, "DP2 EP2"),
        (4, 4, "DP4 EP4"),
    ]
    assert sorted(ran.codes) == [-signal.SIGKILL, 0, 0, 0, 0], ran.said


def test_no_sample_is_lost_or_repeated(ran: Ran) -> None:
    history = kept(ran.events)
    assert [step.step for step in history] == list(range(1, STEPS + 1))
    for step in history:
        consumed = sample_ids((step.step - 1) * GLOBAL_BATCH, GLOBAL_BATCH, 4096, 1)
        assert sorted(step.samples) == sorted(consumed.tolist())
    assert set(Counter(sample for step in history for sample in step.samples).values()) == {1}
    assert sum(len(step.samples) for step in history) == STEPS * GLOBAL_BATCH


def test_the_loss_is_that_of_an_undisturbed_run(ran: Ran) -> None:
    losses = [step.loss for step in kept(ran.events)]
    assert losses == pytest.approx(ran.undisturbed, rel=TOLERANCE)
    steps = zip(losses[:-1], losses[1:], strict=True)
    assert losses[-1] < 0.9 * losses[0] and min(abs(a - b) / a for a, b in steps) > TOLERANCE


def test_a_loss_without_notice_costs_the_steps_since_the_checkpoint(ran: Ran) -> None:
    assert ran.worlds()[1].step == EVERY
    done = [event.step for event in ran.events if isinstance(event, Step)]
    again = {step: count for step, count in Counter(done).items() if count > 1}
    assert {EVERY + 1, LOSS} <= set(again)


def test_a_change_with_notice_costs_none(ran: Ran) -> None:
    regrown = ran.worlds()[2].step
    assert regrown >= REGROWTH and Saved(step=regrown, notice=True) in ran.events
    assert all(sum(isinstance(e, Step) and e.step == step for e in ran.events) == 1 for step in range(LOSS + 1, STEPS + 1))


def test_what_is_left_and_said_at_the_end(ran: Ran) -> None:
    assert len(ran.checkpoints) == 2 and ran.checkpoints[-1] == f"step-{STEPS:08d}"
    assert f"{STEPS} steps kept, " in ran.said and "3 (DP2 EP2, 2 active) -> 4 (DP4 EP4, 4 active)" in ran.said


# ---------------------------------------------------------------- what is refused


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, path: Path, nodes: int, **environment: str) -> str:
    world = {"RANK": "0", "WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**world, **environment}.items():
        monkeypatch.setenv(name, value)
    assert main([str(path), "-d", str(path.parent / "run")]) == 1
    return capsys.readouterr().err


def test_too_few_nodes_are_refused(monkeypatch, capsys, tmp_path):
    error = refused(monkeypatch, capsys, table(tmp_path), 2)
    assert error == "error: 2 nodes are not a planned count (planned are 3, 4)\n"


def test_a_layout_larger_than_the_nodes_is_refused(monkeypatch, capsys, tmp_path):
    path = table(tmp_path, {2: {"dp": 4, "ep": 4}})
    assert "the layout of 2 nodes has 4 ranks, but 3 run" in refused(monkeypatch, capsys, path, 3)


def test_the_shared_store_is_refused(monkeypatch, capsys, tmp_path):
    error = refused(monkeypatch, capsys, table(tmp_path), 4, TORCHELASTIC_USE_AGENT_STORE="True")
    assert "share the store of torchrun" in error and f"export {SHARED_STORE}=1" in error
