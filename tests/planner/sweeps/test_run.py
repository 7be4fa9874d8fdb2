"""A sweep runs to its end, whatever engines and points do, and every point is answered once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from moeplan.errors import DeviceError
from moeplan.planner.problem import Problem
from moeplan.planner.sweeps.answer import Answer, answer
from moeplan.planner.sweeps.run import Stand, best_of, run
from moeplan.planner.sweeps.store import Counts, Row, Store
from moeplan.planner.sweeps.sweep import Sweep
from tests.planner.sweeps.cases import Echo, small


def begun(directory: Path, sweep: Sweep) -> Store:
    store = Store(directory / "s.sqlite")
    store.begin(sweep)
    return store


def silent(stand: Stand) -> None:
    pass


def test_every_point_is_solved_once_and_in_its_place(tmp_path: Path) -> None:
    sweep, engine = small(tmp_path), Echo(room=5)
    store = begun(tmp_path, sweep)
    run(sweep, store, engine, silent, print)
    assert store.counts() == Counts(done=12) and len(engine.given) == len(set(engine.given)) == 8
    for row in store.rows():
        assert row.answer is not None and row.tries == 1
        if row.point["device"] == "a100" and row.point["precision"] == "fp8-cs":
            assert row.answer.status == "refused" and "A100 has 8.0" in row.answer.reason
        else:
            assert row.answer.reason == f"{row.point['device'].upper()} {row.point['gpus']} {row.point['global_batch']}"
    again = Echo()
    run(sweep, store, again, silent, print)
    assert again.given == []


def test_a_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    sweep, engine = small(tmp_path), Echo(room=3, deaths=(0, 2, 2))
    store = begun(tmp_path, sweep)
    run(sweep, store, engine, silent, print)
    assert Counter(engine.given) == {place: 1 + (0, 2, 2).count(place) for place in set(engine.given)}
    assert all(row.answer is not None and row.answer.status != "failed" for row in store.rows())


def test_a_point_that_kills_workers_does_not_hold_up_the_others(tmp_path: Path) -> None:
    sweep, engine = small(tmp_path), Echo(room=1, deaths=(1,) * 9)
    store = begun(tmp_path, sweep)
    run(sweep, store, engine, silent, print)
    ends = [row.answer.status for row in store.rows() if row.answer is not None]
    assert len(ends) == 12 and ends[1] == "failed" and ends.count("failed") == 1


def test_an_interrupted_run_gives_back_what_it_held(tmp_path: Path) -> None:
    class Interrupted(Echo):
        def completed(self, timeout_s: float) -> list[tuple[int, Answer | str]]:
            if len(self.given) > 4:
                raise KeyboardInterrupt
            return super().completed(timeout_s)

    sweep = small(tmp_path)
    store = begun(tmp_path, sweep)
    with pytest.raises(KeyboardInterrupt):
        run(sweep, store, Interrupted(), silent, print)
    counts = store.counts()
    assert counts.claimed == 0 and counts.done > 0 and counts.open > 0
    engine = Echo()
    run(sweep, store, engine, silent, print)
    assert len(engine.given) <= counts.open and store.counts().done == 12


def test_answers_of_another_version_are_refused(tmp_path: Path) -> None:
    class Old(Echo):
        def outcome(self, place: int, problem: Problem) -> Answer | str:
            found = super().outcome(place, problem)
            assert isinstance(found, Answer)
            return dataclasses.replace(found, moeplan="0.0.1")

    sweep = small(tmp_path)
    store = begun(tmp_path, sweep)
    with pytest.raises(DeviceError, match="a worker runs moeplan 0.0.1"):
        run(sweep, store, Old(), silent, print)
    assert store.counts() == Counts(open=12)


def test_the_best_has_most_tokens_per_gpu() -> None:
    def row(place: int, rate: float) -> Row:
        found = Answer(status="solved", layout={"tp": 1}, tokens_per_s_per_gpu=rate)
        return Row(place=place, point={}, answer=found)

    nothing = [Row(place=0, point={}, answer=None), Row(place=1, point={}, answer=Answer(status="refused"))]
    assert best_of(nothing) is None
    best = best_of([*nothing, row(2, 5.0), row(3, 9.0), row(4, 9.0)])
    assert best is not None and best.place == 3


def test_an_answer_is_what_solve_finds(tmp_path: Path) -> None:
    from moeplan.planner.plan_data import read_layout
    from moeplan.planner.solve import solve

    sweep = small(tmp_path)
    problem = sweep.problem_of(next(sweep.points()), print)
    found, plan = answer(problem), solve(problem).plans[0]
    assert found.status == "solved" and read_layout(found.layout, "test") == plan.layout and found.step_s == plan.step_s
    assert (found.low_s, found.high_s, found.peak_bytes) == (plan.low_s, plan.high_s, plan.peak_bytes)
    assert found.cost == pytest.approx(8 * 2.5 / 3600 * plan.step_s * 1e12 / (16 * 4096))


def test_a_model_that_is_too_large_says_by_how_much(tmp_path: Path) -> None:
    sweep = small(tmp_path)
    problem = dataclasses.replace(sweep.problem_of(next(sweep.points()), print), memory_limit_bytes=4e9)
    found = answer(problem)
    assert found.status == "infeasible" and "GiB too large" in found.reason and not found.layout


def test_a_fault_of_ours_is_the_answer_to_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeplan.planner.sweeps import answer as sweep_answer

    def broken(problem: Problem) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(sweep_answer, "solve", broken)
    sweep = small(tmp_path)
    found = answer(sweep.problem_of(next(sweep.points()), print))
    assert (found.status, found.reason) == ("failed", "ZeroDivisionError: division by zero")
