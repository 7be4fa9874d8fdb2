"""Shares and rates of node counts, traces, and what of them is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.errors import FileError, ProblemError, SchemaError
from moeplan.planner.elastic.availability import Availability, Trace, fitted, load_trace, occupancy, trace_occupancy

DAY_S = 86400.0
SIXTEEN = Availability(node_mtbf_s=20 * DAY_S, repair_s=6 * 3600.0)


def simulated(availability: Availability, most: int, changes: int, seed: int) -> Trace:
    """A history of nodes that leave and come back one by one."""
    rng = np.random.default_rng(seed)
    times_s, nodes = [0.0], [most]
    for _ in range(changes):
        leave, come = nodes[-1] / availability.node_mtbf_s, (most - nodes[-1]) / availability.repair_s
        times_s.append(times_s[-1] + rng.exponential(1.0 / (leave + come)))
        nodes.append(nodes[-1] + (1 if rng.random() < come / (leave + come) else -1))
    return Trace(times_s=tuple(times_s), nodes=tuple(nodes))


def test_failures_of_nodes_and_of_the_job_add_up() -> None:
    job = Availability(node_mtbf_s=1000.0, job_rate=1e-4)
    assert job.failures_per_s(np.array([1, 10])) == pytest.approx([1.1e-3, 1.01e-2])
    assert job.mtbf_s(10) == pytest.approx(1.0 / 1.01e-2)


def test_meta_llama3_failure_times() -> None:
    """6.50 failures in 1000 node-days: 1.80 h on 16384 GPUs, 0.225 h on 131072, nodes of 8."""
    assert Availability().mtbf_s(2048) / 3600.0 == pytest.approx(1.80, abs=0.005)
    assert Availability().mtbf_s(16384) / 3600.0 == pytest.approx(0.225, abs=0.0005)


def test_shares_obey_birth_and_death() -> None:
    found = occupancy(SIXTEEN, range(10, 17))
    n = np.arange(11, 17)
    ratio = n / SIXTEEN.node_mtbf_s * SIXTEEN.repair_s / (16 - n + 1)
    assert found.shares[:-1] / found.shares[1:] == pytest.approx(ratio)
    assert found.shares.sum() == pytest.approx(1.0)
    assert np.diagonal(found.rates, -1) == pytest.approx(n / SIXTEEN.node_mtbf_s)
    assert np.diagonal(found.rates, 1) == pytest.approx((16 - n + 1) / SIXTEEN.repair_s)
    assert not found.skips


def test_losses_at_the_fewest_nodes_leave_the_count() -> None:
    found = occupancy(SIXTEEN, range(10, 17))
    assert np.diagonal(found.rates) == pytest.approx([10 / SIXTEEN.node_mtbf_s] + [0.0] * 6)


def test_counts_between_use_the_planned_one_below() -> None:
    every, some = occupancy(SIXTEEN, range(10, 17)), occupancy(SIXTEEN, [16, 10, 14])
    assert some.counts == (10, 14, 16)
    assert some.shares == pytest.approx([every.shares[:4].sum(), every.shares[4:6].sum(), every.shares[6]])
    # what flows across a border of counts flows both ways
    flows = some.shares[:, None] * some.rates
    assert flows[1, 0] == pytest.approx(every.shares[4] * every.rates[4, 3])
    assert flows[0, 1] == pytest.approx(flows[1, 0]) and flows[1, 2] == pytest.approx(flows[2, 1])
    # failures that a spare covers, and those of the last count
    assert flows[1, 1] == pytest.approx(every.shares[5] * every.rates[5, 4])
    assert occupancy(SIXTEEN, [10, 14], most=16).shares[1] == pytest.approx(every.shares[4:].sum())


def test_all_nodes_are_there_without_repair_time() -> None:
    found = occupancy(Availability(repair_s=0.0), [2, 3, 4])
    assert found.shares == pytest.approx([0.0, 0.0, 1.0])
    assert Availability(repair_s=0.0).running_share(4, 4) == 1.0


def test_running_share_of_independent_nodes() -> None:
    assert SIXTEEN.running_share(16, 16) == pytest.approx((1.0 / 1.0125) ** 16)
    assert SIXTEEN.running_share(0, 16) == pytest.approx(1.0)
    assert SIXTEEN.presence(5000).sum() == pytest.approx(1.0)


def test_trace_gives_back_the_rates_that_made_it() -> None:
    made = Availability(node_mtbf_s=5000.0, repair_s=700.0, notice_s=30.0)
    trace = simulated(made, 6, 40_000, 3)
    found = fitted(trace, notice_s=30.0)
    assert (found.node_mtbf_s, found.repair_s, found.notice_s) == pytest.approx((5000.0, 700.0, 30.0), rel=0.03)
    closed, recorded = occupancy(made, range(3, 7)), trace_occupancy(trace, range(3, 7))
    assert recorded.shares == pytest.approx(closed.shares, abs=0.01)
    assert recorded.rates[2:, 2:] == pytest.approx(closed.rates[2:, 2:], rel=0.05)


def test_traces_may_skip_counts() -> None:
    trace = Trace(times_s=(0.0, 100.0, 150.0, 200.0, 300.0, 400.0), nodes=(4, 1, 4, 3, 5, 4))
    found = trace_occupancy(trace, [2, 3, 4])
    # the wait for nodes from 100 s to 150 s counts for nothing, but as a restart of the layout before
    assert found.shares == pytest.approx([0.0, 100.0 / 350.0, 250.0 / 350.0])
    assert found.rates == pytest.approx(np.array([[0, 0, 0], [0, 0, 0.01], [0, 1 / 250.0, 2 / 250.0]]))
    assert not found.skips
    assert trace_occupancy(Trace(times_s=(0.0, 1.0, 2.0), nodes=(4, 2, 2)), [2, 3, 4]).skips


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"node_mtbf_s": -1.0}, "of a node of -1 s"),
        ({"node_mtbf_s": 0.0}, "of a node of 0 s"),
        ({"job_rate": -1e-6}, "-1e-06 failures of the job"),
        ({"repair_s": -2.0}, "-2 s of repair"),
        ({"notice_s": float("nan")}, "nan s of notice"),
    ],
)
def test_rates_that_cannot_be(change: dict[str, float], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        Availability(**change)


def test_counts_that_cannot_be() -> None:
    with pytest.raises(ProblemError, match="planned node counts"):
        occupancy(SIXTEEN, [])
    with pytest.raises(ProblemError, match="planned node counts"):
        occupancy(SIXTEEN, [0, 4])
    with pytest.raises(ProblemError, match="a plan for 8 nodes of a cluster of 6"):
        occupancy(SIXTEEN, [4, 8], most=6)
    with pytest.raises(ProblemError, match="never has the 8 nodes of the smallest planned count; it has 6"):
        trace_occupancy(Trace(times_s=(0.0, 1.0), nodes=(6, 6)), [8])
    with pytest.raises(ProblemError, match="no node leaves"):
        fitted(Trace(times_s=(0.0, 1.0), nodes=(6, 6)))


def test_trace_file(tmp_path: Path) -> None:
    path = tmp_path / "availability.csv"
    path.write_text("\ufefftime_s, nodes, note\n0, 16, start\n3600.5,15,\n\n7200,16,\n", encoding="utf-8")
    assert load_trace(path) == Trace(times_s=(0.0, 3600.5, 7200.0), nodes=(16, 15, 16))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: no column time_s and nodes; there is nothing"),
        ("time,nodes\n0,4\n", "line 1: no column time_s; there is time, nodes"),
        ("time_s,nodes\n0,4\n9,3\n5,4\n", "line 4: time 5 s is before 9 s"),
        ("time_s,nodes\n0,4\n9,3\n9,4\n", "line 4: time 9 s overlaps"),
        ("time_s,nodes\n-1,4\n9,3\n", "line 2: time_s is -1"),
        ("time_s,nodes\n0,4\n9,-3\n", "line 3: nodes is -3"),
        ("time_s,nodes\n0,4\n9,3.5\n", "line 3: 3.5 nodes"),
        ("time_s,nodes\n0,4\n9\n", "line 3: nodes is '', no number"),
        ("time_s,nodes\n0,4\n9,many\n", "line 3: nodes is 'many', no number"),
        ("time_s,nodes\n0,4\ninf,4\n", "line 3: time_s is inf"),
        ("time_s,nodes\n0,4\n", "fewer than two lines"),
    ],
)
def test_trace_files_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "availability.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SchemaError, match=words):
        load_trace(path)


def test_trace_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot read"):
        load_trace(tmp_path / "none.csv")
