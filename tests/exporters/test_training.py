"""Exported plans train: the exported script starts Megatron's own training on CPUs, and every layout gives the same losses."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Attention, Layer, Mlp, Model, Moe
from moeplan.exporters.launchers.base import RUN_NODE
from moeplan.exporters.reading.imported import read_file
from moeplan.exporters.write import export
from moeplan.planner.plan import price_plan
from tests.exporters.cases import layout_of, problem_of
from tests.megatron_session import VERSION, Unavailable, folder

TRAINING = Path(__file__).resolve().parent / "training"
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=16, v_head_dim=16)
DENSE, SPARSE = (
    Layer(blocks=(ATTENTION, Mlp(width=128))),
    Layer(blocks=(ATTENTION, Moe(experts=8, topk=2, width=32, shared_width=32))),
)
MODEL = Model(name="tiny", hidden=64, vocab=512, layers=(DENSE, SPARSE, SPARSE, SPARSE))
STEPS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (4, {"sharding": "ddp"}),
    "tensors and experts": (4, {"tp": 2, "ep": 4}),
    "pipeline of two chunks": (4, {"pp": 2, "vpp": 2, "ep": 2, "dispatcher": "allgather"}),
    "everything": (8, {"tp": 2, "pp": 2, "ep": 2, "etp": 2, "stages": "Et|tttL"}),
}
FOR_CPUS = (
    "--distributed-backend", "gloo", "--transformer-impl", "local", "--use-cpu-initialization", "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion", "--no-rope-fusion", "--no-masked-softmax-fusion", "--no-bias-dropout-fusion",
    "--no-bias-swiglu-fusion",
)  # fmt: skip
"""Megatron without GPU libraries; the last occurrence of a flag wins."""
SCHEDULE = ("--train-iters", str(STEPS), "--lr", "1e-2", "--dataloader-type", "external")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training run: what was planned, and what Megatron printed."""

    layout: Layout
    log: Path

    def column(self, name: str) -> list[float]:
        """One figure of every step."""
        return [float(value) for value in re.findall(rf"\| {name}: (\S+) \|", self.log.read_text())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Run]]:
    """Trains a layout by its name, once."""
    try:
        megatron = folder()
    except Unavailable as error:
        pytest.skip(f"Megatron {VERSION} is not available: {error}")
    place = tmp_path_factory.mktemp("ranks")
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MEGATRON_LM": str(megatron),
        "OMP_NUM_THREADS": "1",
        "PRETRAIN_SCRIPT": str(TRAINING / "rank.py"),
        "PYTHONPATH": str(TRAINING.parents[2]),
        "RANK_SERVER": str(place / "server"),
        "SKIP_PREFLIGHT": "1",
    }
    command = [sys.executable, "-m", "tests.exporters.training.rank_server", str(megatron), variables["RANK_SERVER"]]
    with (
        (place / "errors").open("w") as errors,
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=errors, start_new_session=True) as server,
    ):
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n", (place / "errors").read_text()
            yield functools.cache(lambda name: _train(name, tmp_path_factory.mktemp("run"), variables))
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # with ranks that hang


def _train(name: str, place: Path, variables: Mapping[str, str]) -> Run:
    """Export a layout and start its script."""
    world, fields = LAYOUTS[name]
    problem = problem_of(MODEL, f"h100x{world}", 8, 32)
    layout = layout_of(MODEL, world, **fields)
    export(price_plan(problem, layout), place / "launch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["bash", str(place / "launch" / RUN_NODE), *FOR_CPUS, *SCHEDULE]
    given = {**variables, "MASTER_PORT": str(port)}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    (place / "run.log").write_text(done.stdout)
    return Run(layout=layout, log=place / "run.log")


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_exported_plan_learns(name: str, trained: Callable[[str], Run]) -> None:
    losses = trained(name).column("lm loss")
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(MODEL.vocab), abs=0.3)  # knows nothing yet
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_every_layout_trains_the_same_model(name: str, trained: Callable[[str], Run]) -> None:
    one, other = trained(name), trained("data")
    for column, tolerance in (("lm loss", 1e-4), ("load_balancing_loss", 1e-4), ("grad norm", 2e-3)):
        assert len(one.column(column)) == STEPS
        assert one.column(column) == pytest.approx(other.column(column), abs=tolerance), column


@pytest.mark.parametrize("name", LAYOUTS)
def test_megatron_ran_the_planned_layout(name: str, trained: Callable[[str], Run]) -> None:
    run = trained(name)
    assert read_file(run.log).layout == run.layout
