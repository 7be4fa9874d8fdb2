"""The whole of tuning for real: processes that train a tiny MoE over gloo, of whose layouts one runs out of memory, one hangs
and one crashes, and a tune that is killed on the way and goes on.

One tune serves all tests. Candidates are the plan and its runners-up; all are meant to be tried, so the threshold is 0.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.plan import Plan, RunnerUp, load_plan, price_plan
from moeplan.planner.solve import solve
from moeplan.runtime.journal import Journal
from moeplan.runtime.launch import marked
from tests.planner import tiny

SCRIPT = Path(__file__).parent / "train_tiny_moe.py"
CONFIG: Mapping[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LARGE, SMALL, SPLIT, TENSOR, SLOW, ALIKE = "dp2 ep2 m8", "dp2 ep2 m4", "dp2 etp2 m4", "tp2 ep2 m4", "dp2 ep2 m1", "dp2 etp2 m8"
"""The candidates in their order: more than the memory, the fastest, a crash, a hang, small pieces, and one that needs most."""


def named(layout: Any) -> str:
    degrees = {name: getattr(layout, name) for name in ("tp", "dp", "ep", "etp")}
    return " ".join(f"{name}{n}" for name, n in degrees.items() if n > 1) + f" m{layout.micro_batch}"


def given(tmp_path: Path) -> Plan:
    """A plan of two ranks with the candidates as its runners-up."""
    (tmp_path / "config.json").write_text(json.dumps(dict(CONFIG)))
    problem = tiny.problem(load_model(str(tmp_path / "config.json")), "h100x2", batch=16, seq=512, pins="pp=1 cp=1")
    found = {named(plan.layout): plan for plan in solve(problem, keep=24).plans}
    rest = [found[name] for name in (SMALL, SPLIT, TENSOR, SLOW, ALIKE)]
    runners = [RunnerUp(layout=p.layout, step_s=p.step_s, peak_bytes=p.peak_bytes) for p in rest]
    return price_plan(problem, found[LARGE].layout, runners_up=tuple(runners))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class Ran:
    """What the tune left behind."""

    place: Path
    plan: Plan
    out: str
    err: str
    orphans: int
    """Processes of the running trial that were left when the tune was killed."""

    @property
    def journal(self) -> Journal:
        return Journal(self.place / "trials" / "journal.sqlite")


def phases(journal: Path) -> list[tuple[int, str, str]]:
    """Trial, phase and mark of every candidate that was started, as another program reads them."""
    if not journal.exists():
        return []
    with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as base:
        try:
            rows = base.execute("SELECT trial, phase, mark FROM candidates WHERE trial > 0 ORDER BY trial").fetchall()
        except sqlite3.OperationalError:
            rows = []
    base.close()
    return rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    place = tmp_path_factory.mktemp("tune")
    plan = given(place)
    plan.save(place / "plan.yaml")
    launch = f"{sys.executable} {SCRIPT} {{plan}} --memory-mib 48 --hang-with tp=2"
    command = [
        sys.executable, "-m", "moeplan", "tune", str(place / "plan.yaml"), "--launch", launch, "--to", "none", "--top", "6",
        "--threshold", "0", "--steps", "3", "--warmup", "1", "--stall", "10s", "--timeout", "5m", "--poll", "0.1",
        "-d", str(place / "trials"), "-o", str(place / "winner.yaml"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"}
    # 1. a tune that is killed while its second trial runs
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mark = ""
    while not (mark and marked(mark)):
        assert first.poll() is None
        mark = next(
            (m for trial, phase, m in phases(place / "trials" / "journal.sqlite") if (trial, phase) == (2, "running")), ""
        )
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    orphans = len(marked(mark))
    # 2. the same command again
    end = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    assert not marked(mark)
    return Ran(place, plan, end.stdout, end.stderr, orphans)


def test_each_layout_ends_as_it_must(ran: Ran) -> None:
    ended = {named(e.layout): e.outcome for e in ran.journal.entries() if e.outcome is not None}
    kinds = {name: found.kind for name, found in ended.items()}
    assert kinds == {LARGE: "out_of_memory", SMALL: "done", SPLIT: "crash", TENSOR: "hang", SLOW: "done"}, ran.err
    assert ended[LARGE].message.startswith("MemoryError: holds ")
    assert ended[SPLIT].message.startswith("NotImplementedError: expert tensor parallelism (etp=2) on rank ")
    assert ended[TENSOR].message == "no new line in its log, 1 steps done"
    for name in (SMALL, SLOW):
        assert ended[name].step_s > 0 and ended[name].steps >= 3 and ended[name].peak_bytes > 2**25


def test_what_needs_more_memory_is_not_tried(ran: Ran) -> None:
    (skipped,) = (e for e in ran.journal.entries() if e.phase == "skipped")
    assert named(skipped.layout) == ALIKE and "ran out of memory" in skipped.why and skipped.trial == 0


def test_the_fastest_wins(ran: Ran) -> None:
    times = {named(e.layout): e.outcome.step_s for e in ran.journal.entries() if e.outcome is not None and e.outcome.step_s}
    winner = load_plan(ran.place / "winner.yaml")
    assert named(winner.layout) == min(times, key=lambda name: times[name]) and len(times) == 2
    told = yaml.safe_load((ran.place / "winner.yaml").read_text())["provenance"]["tune"]
    assert told["measured_step_s"] == pytest.approx(min(times.values()))
    assert [t["outcome"] for t in told["trials"]][0] == "out_of_memory" and len(told["trials"]) == 5


def test_a_killed_tune_goes_on_without_repeating(ran: Ran) -> None:
    entries = {e.trial: e for e in ran.journal.entries() if e.trial}
    assert ran.orphans > 0 and [entries[t].attempt for t in sorted(entries)] == [1, 2, 1, 1, 1]
    assert "going on with" in ran.err and "trial 2: " in ran.err and "trial 1: " not in ran.err
    assert (Path(entries[2].directory) / "log-1.txt").exists()
    said = [what for _, place, what in ran.journal.events() if place == entries[1].place]
    assert sum("attempt" in what for what in said) == 1


def test_predictions_that_are_far_off_do_not_end_it_early(ran: Ran) -> None:
    """The plan is priced on two H100 and runs on a CPU: ten times as slow, and not in the same order."""
    for entry in ran.journal.entries():
        if entry.outcome is not None and entry.outcome.step_s:
            assert entry.outcome.step_s > 2 * entry.predicted_s
    assert "every candidate was tried or ruled out" in ran.out
    assert "which no factor" in ran.out.replace("\n", " ")


def test_what_is_seen(ran: Ran) -> None:
    for words in ("out of memory: MemoryError", "hang: no new line", "crash: NotImplementedError", "best", "winner: DP2 EP2"):
        assert words in ran.out, ran.out
    assert all(len(line) <= 120 for line in ran.out.splitlines())


def test_the_exported_script_starts_it_too(ran: Ran, tmp_path: Path) -> None:
    """Through the launch files of the export, torchrun and all."""
    environment = {
        **os.environ, "MEGATRON_LM": str(tmp_path), "PRETRAIN_SCRIPT": str(SCRIPT), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2]),
        "MASTER_PORT": str(free_port()), "SKIP_PREFLIGHT": "1",
    }  # fmt: skip
    plan = price_plan(ran.plan.problem, next(r.layout for r in ran.plan.runners_up if named(r.layout) == SMALL))
    plan.save(tmp_path / "plan.yaml")
    command = [
        sys.executable, "-m", "moeplan", "tune", str(tmp_path / "plan.yaml"), "--trials", "1", "--steps", "2", "--warmup", "0",
        "--launch", "bash {dir}/run_torchrun.sh --plan-file {plan}", "--poll", "0.1", "--json",
    ]  # fmt: skip
    end = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    data = json.loads(end.stdout)
    assert data["best"] == 1 and data["candidates"][0]["measured_s"] > 0
    assert {p.name for p in (tmp_path / "plan.tune" / "trial-01").iterdir()} >= {"plan.yaml", "log.txt", "megatron.args"}
