"""The run loop on one process: order, budget, second visits, stops, and what is on disk after each."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeplan.errors import FileError
from moeplan.profiles import samples as samples_file
from moeplan.profiles.cases import Case
from moeplan.profiles.samples import Sample, SampleLog, load_samples
from moeplan.profiles.session import Outcome, case_of, check_same, done_cases, identity, measure, plain_case
from moeplan.profiles.world import World, environment_of, join


def gemm(m: int, tier: int = 0) -> Case:
    return Case(op="gemm", key="bf16", sizes={"m": m, "n": 32, "k": 32}, tier=tier)


CASES = [gemm(64, 2), gemm(16), gemm(32, 1)]


@pytest.fixture
def world() -> Iterator[World]:
    made = join("cpu", environment={})
    yield made
    made.leave()


@pytest.fixture
def log(world: World, tmp_path: Path) -> SampleLog:
    return SampleLog(tmp_path / "p.samples.jsonl", environment_of(world))


def run(world: World, log: SampleLog | None, cases: list[Case] = CASES, **how: Any) -> Outcome:
    return measure(world, cases, log, **{"budget_s": 0.3, "per_domain": 1, "precision": 100.0, **how})


def rows(outcome: Outcome) -> list[float]:
    """Rows of the products, in the order of the visits."""
    return [s.sizes["m"] for s in outcome.samples]


def first_rows(outcome: Outcome) -> list[float]:
    """The same without second visits."""
    return list(dict.fromkeys(rows(outcome)))


def test_lower_tiers_come_first(world: World, log: SampleLog) -> None:
    seen: list[tuple[int, int]] = []
    outcome = run(world, log, progress=lambda done, total, left_s: seen.append((done, total)))
    assert outcome.ended == "complete" and outcome.left == 0 and outcome.failure is None
    assert rows(outcome)[:3] == [16, 32, 64] == first_rows(outcome)
    assert (3, 3) in seen and seen == sorted(seen)
    environment, written = load_samples(log.path)
    assert written == list(outcome.samples) and replace(environment, when="") == replace(environment_of(world), when="")
    for sample in written:
        assert sample.how.startswith("torch.mm, torch ") and sample.seconds > 0 and len(sample.times_s) >= 3


def test_cases_that_are_known_are_not_measured_again(world: World, log: SampleLog) -> None:
    first = run(world, log, CASES[:1])
    second = run(world, log, done=done_cases(first.samples))
    assert first_rows(first) == [64] and first_rows(second) == [16, 32]
    assert done_cases(load_samples(log.path)[1]) == {identity(c) for c in CASES}


def test_what_a_measurement_tells_is_no_part_of_its_identity() -> None:
    case = Case(op="overlap", key="all_to_all+gemm", group="8/1")
    sample = Sample(
        op=case.op, key=case.key, group="8/1", sizes={"alone_compute_s": 1.0, "alone_comm_s": 1.0}, seconds=1.0, spread=0.0
    )
    assert identity(case) == identity(sample) != identity(replace(case, group="4/1"))
    dispatch = Case(op="deepep", key="dispatch", sizes={"tokens": 8, "message_bytes": 1.0})
    assert identity(dispatch) == identity(replace(dispatch, sizes={"tokens": 8, "message_bytes": 2.0}))
    assert identity(dispatch) != identity(replace(dispatch, sizes={"tokens": 4, "message_bytes": 1.0}))


def test_the_budget_ends_a_run_between_two_cases(world: World, log: SampleLog) -> None:
    outcome = run(world, log, budget_s=1e-9)
    assert (outcome.ended, outcome.left, rows(outcome)) == ("budget", 2, [16])
    assert load_samples(log.path)[1] == list(outcome.samples)


def test_what_is_not_known_well_is_visited_again(world: World, log: SampleLog) -> None:
    """No spread is below 0: all are visited twice, while the budget lasts."""
    outcome = run(world, log, budget_s=0.6, precision=-1.0)
    assert outcome.ended == "complete" and outcome.left == 0
    assert rows(outcome)[:3] == [16, 32, 64] and set(rows(outcome)[3:]) <= {16, 32, 64} and len(rows(outcome)) > 3
    again = outcome.samples[3]
    first = next(s for s in outcome.samples if s.case == again.case)
    apart = abs(first.seconds - again.seconds) / 2 / max(first.seconds, again.seconds)
    assert again.spread >= 0.9 * apart, "the spread holds what lies between the visits"
    assert len(load_samples(log.path)[1]) == len(outcome.samples)


def test_ctrl_c_stops_before_the_next_case(world: World, log: SampleLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeplan.profiles import session

    real = session.measured

    def pressed(case: Case, *rest: Any) -> Any:
        found = real(case, *rest)
        if case.sizes["m"] == 32:
            os.kill(os.getpid(), signal.SIGINT)
            while not world.asked:  # the main thread hears it
                pass
        return found

    monkeypatch.setattr(session, "measured", pressed)
    outcome = run(world, log)
    assert (outcome.ended, outcome.left, rows(outcome)) == ("interrupted", 1, [16, 32])
    assert len(load_samples(log.path)[1]) == 2


def test_what_cannot_run_is_skipped(world: World, log: SampleLog) -> None:
    odd = [replace(gemm(8), key="int3"), Case(op="all_reduce", key="bf16", sizes={"message_bytes": 64.0}, group="2/1")]
    outcome = run(world, log, [*odd, gemm(16)])
    assert outcome.ended == "complete" and first_rows(outcome) == [16]
    assert [case.op for case, _ in outcome.skipped] == ["gemm", "all_reduce"]
    assert "int3" in outcome.skipped[0][1] and "needs several ranks" in outcome.skipped[1][1]


def test_a_full_disk_ends_the_run(world: World, log: SampleLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(samples_file.os, "fsync", full)
    outcome = run(world, log)
    assert outcome.ended == "failed" and isinstance(outcome.failure, FileError)
    assert "No space left on device" in outcome.failure.message


def test_samples_of_another_machine_are_refused(world: World) -> None:
    here = environment_of(world)
    check_same(replace(here, when="yesterday", moeplan="0"), here, "samples 'x'")
    for change in (
        {"device": "H100"},
        {"ranks": 8},
        {"per_node": 4},
        {"torch": "2.4"},
        {"backend": "cuda"},
        {"processors": 99},
    ):
        other = replace(here, **change)
        with pytest.raises(FileError) as error:
            check_same(other, here, "samples 'x'")
        (name,) = change
        assert f"'{getattr(other, name)}'" in error.value.message and f"'{getattr(here, name)}'" in error.value.message


def test_cases_travel_as_plain_data() -> None:
    for case in (*CASES, Case(op="send", key="bf16", sizes={"message_bytes": 64.0}, group="2/2", tier=1)):
        assert case_of(plain_case(case)) == case
