"""A sweep on a real Dask cluster of several processes, one of which is killed on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeplan.errors import DeviceError
from moeplan.planner.sweeps.answer import answer
from moeplan.planner.sweeps.dask_engine import DaskEngine
from moeplan.planner.sweeps.run import Stand, run
from moeplan.planner.sweeps.store import Store
from tests.planner.sweeps.cases import small

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # those of Dask


@pytest.fixture
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as found:
        yield found


def test_a_worker_that_is_killed_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    sweep = small(tmp_path)
    store = Store(tmp_path / "s.sqlite")
    store.begin(sweep)
    engine = DaskEngine(cluster.scheduler_address)
    killed: list[int] = []
    settle = engine.completed

    def completed(timeout_s: float) -> Any:
        found = settle(timeout_s)
        if found and not killed:
            killed.append(next(iter(cluster.workers.values())).process.pid)
            os.kill(killed[0], signal.SIGKILL)
        return found

    engine.completed = completed  # type: ignore[method-assign]
    stands: list[Stand] = []
    try:
        run(sweep, store, engine, stands.append, print)
    finally:
        engine.close()
    assert killed and store.counts().done == 12
    for row in store.rows():
        assert row.answer is not None and row.tries == 1
        if row.answer.status == "solved":
            here = answer(sweep.problem_of(row.point, print))
            assert (row.answer.layout, row.answer.step_s) == (here.layout, here.step_s)
        else:
            assert row.answer.status == "refused"


def test_no_scheduler_and_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.planner.sweeps.dask_engine.START_S", 1.0)
    with pytest.raises(DeviceError, match="no Dask scheduler at 'tcp://127.0.0.1:1'"):
        DaskEngine("tcp://127.0.0.1:1")
    with pytest.raises(DeviceError, match="no Dask scheduler at 'here'"):
        DaskEngine("here")
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as empty:
        with pytest.raises(DeviceError, match="has no worker"):
            DaskEngine(empty.scheduler_address)


def test_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.planner.sweeps.dask_engine.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs Dask, which is not installed"):
        DaskEngine("tcp://127.0.0.1:1")
