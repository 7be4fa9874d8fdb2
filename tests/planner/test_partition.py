"""The split of layers over pipeline chunks: MILP, dynamic programme and brute force agree."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pulp
import pytest

from moeplan.errors import ProblemError
from moeplan.planner.partition import Split, split_by_milp
from moeplan.planner.stages.problem import Moment, StageProblem, split_by_programme


def random_problem(rng: random.Random, chunks_per_rank: int = 1, *, kinds: int = 3) -> StageProblem:
    ranks = rng.randint(1, 3)
    chunks = ranks * chunks_per_rank
    layers = rng.randint(max(1, chunks - 1), 7)
    costs = [(rng.randint(1, 9) / 4, rng.randint(1, 5), rng.randint(1, 4)) for _ in range(kinds)]
    fixed = [rng.randint(0, 8) / 4 for _ in range(ranks)]
    return StageProblem(
        ranks=ranks,
        chunks_per_rank=chunks_per_rank,
        batches=float(rng.randint(1, 9)),
        kinds=[rng.randrange(kinds) for _ in range(layers)],
        forward_s=[c[0] / 4 for c in costs],
        backward_s=[c[0] * 3 / 4 for c in costs],
        state_bytes=[float(c[1]) for c in costs],
        saved_bytes=[float(c[2]) for c in costs],
        fixed_forward_s=[f / 4 for f in fixed],
        fixed_backward_s=[f * 3 / 4 for f in fixed],
        moments=[
            [
                Moment(
                    held=tuple(float(rng.randint(1, ranks - r + 1)) for _ in range(chunks_per_rank)),
                    base_bytes=rng.randint(0, 6),
                )
                for _ in range(rng.randint(1, 2))
            ]
            for r in range(ranks)
        ],
        limit_bytes=float(rng.randint(8, 60)),
        fewest=[0, *([1] * (chunks - 2)), 0][:chunks],
        most=[layers] * chunks,
    )


def brute_force(problem: StageProblem) -> float | None:
    """The least closed form of all splits, in plain Python; None if none fits."""
    layers, chunks, p = len(problem.kinds), problem.chunks, problem.ranks
    found = []
    for ends in itertools.combinations_with_replacement(range(layers + 1), chunks - 1):
        sizes = [b - a for a, b in itertools.pairwise([0, *ends, layers])]
        if all(low <= size <= high for low, size, high in zip(problem.fewest, sizes, problem.most, strict=True)):
            of_chunk = list(itertools.starmap(lambda a, b: list(problem.kinds[a:b]), itertools.pairwise([0, *ends, layers])))
            if all(_needed(problem, of_chunk[r::p], r) <= problem.limit_bytes for r in range(p)):
                found.append(_closed_form(problem, of_chunk))
    return min(found, default=None)


def _needed(problem: StageProblem, mine: list[list[int]], rank: int) -> float:
    return max(
        moment.base_bytes
        + sum(
            problem.state_bytes[k] + h * problem.saved_bytes[k]
            for chunk, h in zip(mine, moment.held, strict=True)
            for k in chunk
        )
        for moment in problem.moments[rank]
    )


def _closed_form(problem: StageProblem, of_chunk: list[list[int]]) -> float:
    p, m = problem.ranks, problem.batches
    seconds = [sum(problem.layer_s[k] for k in chunk) for chunk in of_chunk]
    own = [sum(seconds[r::p]) + problem.fixed_s[r] for r in range(p)]
    terms = []
    for r in range(p):
        before, behind = sum(own[:r]), sum(own[r + 1 :])
        if problem.chunks_per_rank > 1:
            terms.append(m * own[r] + sum(seconds[:r]))
        elif m > p:
            terms.append(m * own[r] + before + max(0.0, 2 * behind - (p - 1 - r) * own[r]))
        else:
            terms.append(m * own[r] + before + max(0.0, behind - min(m - 1, p - 1 - r) * own[r]))
    return max(terms)


def worth(problem: StageProblem, sizes: list[int] | None) -> float | None:
    if sizes is None:
        return None
    assert sum(sizes) == len(problem.kinds)
    assert problem.excess_bytes(sizes)[0] <= 1e-9
    return float(problem.spans(sizes)[0])


def agrees(found: float | None, expected: float | None) -> bool:
    return found == expected if found is None or expected is None else found == pytest.approx(expected, rel=2e-4)


def test_dynamic_programme_equals_brute_force() -> None:
    rng = random.Random(1)
    feasible = 0
    for _ in range(300):
        problem = random_problem(rng)
        expected = brute_force(problem)
        feasible += expected is not None
        assert worth(problem, split_by_programme(problem)) == (None if expected is None else pytest.approx(expected))
    assert 50 < feasible < 290  # both outcomes are exercised


@pytest.mark.parametrize("chunks_per_rank", [1, 2])
def test_milp_equals_brute_force(chunks_per_rank: int) -> None:
    rng = random.Random(chunks_per_rank)
    outcomes = set()
    for _ in range(100):
        problem = random_problem(rng, chunks_per_rank)
        expected = brute_force(problem)
        outcomes.add(expected is None)
        found = split_by_milp(problem)
        assert found.proven and agrees(worth(problem, found.sizes), expected)
        if expected is not None:
            assert split_by_milp(problem, within_s=0.99 * expected) == Split(None, True)
            assert agrees(worth(problem, split_by_milp(problem, within_s=1.01 * expected).sizes), expected)
    assert outcomes == {True, False}


def test_twins_agree_on_larger_problems() -> None:
    rng = random.Random(7)
    for _ in range(40):
        ranks, layers = rng.randint(2, 6), rng.randint(12, 24)
        problem = dataclasses.replace(
            random_problem(rng),
            ranks=ranks, kinds=sorted(rng.randrange(3) for _ in range(layers)),
            fixed_forward_s=[0.0] * (ranks - 1) + [0.3], fixed_backward_s=[0.0] * (ranks - 1) + [0.7],
            moments=[[Moment(held=(float(ranks - r),), base_bytes=1.0)] for r in range(ranks)],
            limit_bytes=float(rng.randint(30, 120)),
            fewest=[1] * (ranks - 1) + [0], most=[layers] * ranks,
        )  # fmt: skip
        assert agrees(worth(problem, split_by_milp(problem).sizes), worth(problem, split_by_programme(problem)))


@pytest.mark.parametrize("solvers", [["PULP_CBC_CMD", "HiGHS"], ["PULP_CBC_CMD"]], ids=["usual", "cbc"])
def test_short_layers_are_told_apart(solvers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # microseconds a layer: less than what the solvers take for nothing if the objective is in seconds
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: solvers)
    rng = random.Random(1)
    for _ in range(30):
        problem = random_problem(rng, 2)
        names = ("forward_s", "backward_s", "fixed_forward_s", "fixed_backward_s")
        short: dict[str, Any] = {name: [t * 1e-6 for t in getattr(problem, name)] for name in names}
        problem = dataclasses.replace(problem, **short)
        assert agrees(worth(problem, split_by_milp(problem).sizes), brute_force(problem))


class Crashing:
    """A solver that dies, as HiGHS does where its library is broken."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def actualSolve(self, _: object) -> None:
        raise pulp.PulpSolverError("killed")


def test_a_solver_that_crashes_is_replaced_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(random.Random(2), 2)
    expected = worth(problem, split_by_milp(problem).sizes)
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: ["HiGHS", "PULP_CBC_CMD"])
    assert split_by_milp(problem).remark == ""
    monkeypatch.setattr(pulp, "HiGHS", Crashing)
    found = split_by_milp(problem)
    assert worth(problem, found.sizes) == pytest.approx(expected)
    assert found.remark == "HiGHS failed (PulpSolverError), CBC solved the programmes"
    monkeypatch.setattr(pulp, "PULP_CBC_CMD", Crashing)
    found = split_by_milp(problem)
    assert (found.sizes, found.proven) == (None, False)
    assert found.remark == (
        "HiGHS failed (PulpSolverError), CBC failed (PulpSolverError), no programme was solved: "
        "only dynamic programmes and bounds tell"
    )


def test_cbc_gives_the_same_where_highs_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    problems = [random_problem(rng, 2) for _ in range(5)]
    usual = [worth(p, split_by_milp(p).sizes) for p in problems]
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])
    monkeypatch.setattr(pulp, "HiGHS", Crashing)
    found = [split_by_milp(p) for p in problems]
    said = zip(problems, found, strict=True)
    assert [worth(p, f.sizes) for p, f in said] == [None if x is None else pytest.approx(x) for x in usual]
    assert {f.remark for f in found} == {"HiGHS is not installed, CBC solved the programmes"}


def simple(kinds: list[int], ranks: int, fixed: list[float], batches: float = 100.0, **changes: Any) -> StageProblem:
    """A plain pipeline of layers of 1 s, 2 s, ... by kind, 1 byte of state and 1 byte kept each."""
    most = max(kinds) + 1
    values: dict[str, Any] = {
        "ranks": ranks, "chunks_per_rank": 1, "batches": batches, "kinds": kinds,
        "forward_s": [0.25 * (k + 1) for k in range(most)],
        "backward_s": [0.75 * (k + 1) for k in range(most)], "state_bytes": [1.0] * most, "saved_bytes": [1.0] * most,
        "fixed_forward_s": [0.25 * f for f in fixed], "fixed_backward_s": [0.75 * f for f in fixed],
        "moments": [[Moment(held=(float(ranks - r),), base_bytes=0.0)] for r in range(ranks)], "limit_bytes": 100.0,
        "fewest": [0, *([1] * (ranks - 2)), 0], "most": [len(kinds)] * ranks,
    }  # fmt: skip
    return StageProblem(**{**values, **changes})


def test_by_hand() -> None:
    # three light and three heavy layers on two ranks; the second rank also has a head of 2 s
    problem = simple([0, 0, 0, 1, 1, 1], 2, [0.0, 2.0])
    # 1+1+1+2 = 5 against 2+2+2 = 6; one layer further 7 against 4, one layer less 3 against 8
    assert split_by_programme(problem) == split_by_milp(problem).sizes == [4, 2]


def test_memory_moves_layers_away_from_the_first_rank() -> None:
    none = {"state_bytes": [0.0]}
    assert split_by_programme(simple([0] * 4, 2, [0.0, 0.0], limit_bytes=4.0, **none)) == [2, 2]
    assert split_by_programme(simple([0] * 4, 2, [0.0, 0.0], limit_bytes=3.0, **none)) == [1, 3]
    assert split_by_programme(simple([0] * 4, 2, [0.0, 0.0], limit_bytes=0.5, **none)) is None


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ProblemError, match="3 chunks hold 6 to 30 layers, there are 5"):
        simple([0] * 5, 3, [0.0] * 3, fewest=[2, 2, 2], most=[10] * 3)


def test_dynamic_programme_refuses_virtual_stages() -> None:
    with pytest.raises(ProblemError, match="one chunk a rank, not 2"):
        split_by_programme(random_problem(random.Random(3), 2))
