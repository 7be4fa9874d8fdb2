"""Answers that are kept are those that were computed, whatever happens to the files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moeplan.planner import best_plans as module
from moeplan.planner.best_plans import Best, best_plans, cache_directory, key_of
from moeplan.planner.problem import Problem
from moeplan.planner.solve import solve
from tests.planner import tiny

PROBLEM = tiny.problem(tiny.MIXED, "h100x4", era="te-2024")
NOTHING_FITS = dataclasses.replace(PROBLEM, memory_limit_bytes=3e9, pins=tiny._conditions("tp=1 pp=1 cp=1 ep=1"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache directory of its own for every test, and nothing in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_MEMORY", {})
    return tmp_path / "moeplan"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Problems that were solved."""
    seen: list[Problem] = []

    def counted(problem: Problem, **more: Any) -> Any:
        seen.append(problem)
        return solve(problem, **more)

    monkeypatch.setattr(module, "solve", counted)
    return seen


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would begin."""
    monkeypatch.setattr(module, "_MEMORY", {})


def one(problem: Problem = PROBLEM) -> Best:
    return best_plans([problem])[0]


def same(first: Best, second: Best) -> bool:
    pairs = [(a.plan and a.plan.to_data(), a.excess_bytes, a.seconds) for a in (first, second)]
    return pairs[0] == pairs[1]


@pytest.mark.parametrize("problem", [PROBLEM, NOTHING_FITS], ids=["fits", "nothing fits"])
def test_what_is_kept_is_what_was_computed(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, searches: list[Problem], cache: Path
) -> None:
    first, second = one(problem), one(problem)
    forget(monkeypatch)
    third = one(problem)
    assert len(searches) == 1 and len(list(cache.iterdir())) == 1
    assert (first.kept, second.kept, third.kept) == (False, True, True)
    assert same(first, second) and same(first, third)
    solution = solve(problem, keep=1)
    assert first.excess_bytes == solution.nearest_excess_bytes
    assert [first.plan.layout if first.plan else None] == ([p.layout for p in solution.plans] or [None])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "7",
        lambda text: text.replace('"tp": ', '"tp": 3'),
        lambda text: text.replace('"tp"', '"pt"'),
        lambda text: text.replace('"step_s": ', '"step_s": 1'),
        lambda text: text.replace('"dispatcher": "', '"dispatcher": "x'),
        lambda text: text.replace("moeplan.best/1", "moeplan.best/0"),
        lambda text: json.dumps(json.loads(text) | {"layout": {"dp": 8, "edp": 8}}),
        lambda text: json.dumps(json.loads(text) | {"key": "0"}),
    ],
)
def test_a_damaged_entry_is_solved_again(
    damage: Any, monkeypatch: pytest.MonkeyPatch, searches: list[Problem], cache: Path
) -> None:
    first = one()
    (path,) = cache.iterdir()
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    forget(monkeypatch)
    again = one()
    assert not again.kept and len(searches) == 2
    assert again.plan is not None and first.plan is not None and again.plan.layout == first.plan.layout
    assert json.loads(path.read_text())["layout"] == json.loads(whole)["layout"]


def test_an_entry_that_is_no_text(monkeypatch: pytest.MonkeyPatch, searches: list[Problem], cache: Path) -> None:
    one()
    (path,) = cache.iterdir()
    path.write_bytes(b"\xff\xfe\x00")
    forget(monkeypatch)
    assert not one().kept and len(searches) == 2


@pytest.mark.parametrize("where", ["file", "below a file", "no home"])
def test_without_a_place_to_write_memory_serves(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, searches: list[Problem]
) -> None:
    # A file where the directory should be stops everyone, also who may write everywhere.
    if where == "no home":
        monkeypatch.setattr(module, "cache_directory", lambda: None)
    else:
        base = tmp_path / "base"
        base.mkdir() if where == "file" else base.write_text("")
        (base / "moeplan").write_text("") if where == "file" else None
        monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    first, second = one(), one()
    assert same(first, second) and second.kept and len(searches) == 1
    forget(monkeypatch)
    assert not one().kept and len(searches) == 2


def test_where_answers_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "moeplan"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_directory() == tmp_path / "home" / ".cache" / "moeplan"


def test_nothing_is_written_before_something_is_found(cache: Path) -> None:
    key_of(PROBLEM)
    assert best_plans([]) == [] and not cache.exists()


CHANGES: dict[str, Any] = {
    "model": dataclasses.replace(tiny.MIXED, vocab=32001),
    "profile": dataclasses.replace(PROBLEM.profile, ring_share=0.88),
    "workload": dataclasses.replace(PROBLEM.workload, imbalance=1.01),
    "pins": tiny._conditions("tp=1"),
    "forbidden": tiny._conditions("tp=1"),
    "memory_limit_bytes": 7e10,
    "target": "research",
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_question_has_another_key(field: str) -> None:
    assert key_of(dataclasses.replace(PROBLEM, **{field: CHANGES[field]})) != key_of(PROBLEM)
    assert key_of(dataclasses.replace(PROBLEM)) == key_of(PROBLEM)


@pytest.mark.parametrize("name", ["VERSION", "OVERLAP", "_program"])
def test_another_model_of_costs_has_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(PROBLEM)
    changed = {
        "VERSION": "0",
        "OVERLAP": dataclasses.replace(module.OVERLAP, send_exposed=0.25),
        "_program": lambda: "other files",
    }
    monkeypatch.setattr(module, name, changed[name])
    assert key_of(PROBLEM) != before


def test_equal_questions_are_solved_once_and_progress_grows(searches: list[Problem]) -> None:
    other, steps = dataclasses.replace(PROBLEM, memory_limit_bytes=7e10), []
    found = best_plans([PROBLEM, other, PROBLEM], progress=lambda done, total: steps.append((done, total)))
    assert len(searches) == 2 and same(found[0], found[2]) and steps == [(1, 2), (2, 2)]


def test_processes_find_the_same(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    problems = [PROBLEM, NOTHING_FITS, dataclasses.replace(PROBLEM, target="research")]
    alone = best_plans(problems)
    for path in cache.iterdir():
        path.unlink()
    forget(monkeypatch)
    shared = best_plans(problems, jobs=2)
    assert not any(b.kept for b in shared)
    for one, two in zip(alone, shared, strict=True):
        assert one.excess_bytes == two.excess_bytes
        assert (one.plan and one.plan.layout) == (two.plan and two.plan.layout)


def test_a_process_that_dies_stops_nothing(monkeypatch: pytest.MonkeyPatch, searches: list[Problem]) -> None:
    class Broken:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, *_: Any) -> Any:
            raise module.BrokenProcessPool("killed")

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr(module, "ProcessPoolExecutor", Broken)
    found = best_plans([PROBLEM, NOTHING_FITS], jobs=2)
    assert found[0].plan is not None and found[1].plan is None and len(searches) == 2
