"""The split of layers over pipeline chunks: MILP, dynamic programme and brute force agree."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pulp
import pytest

from moeplan.errors import ProblemError
from moeplan.planner import partition
from moeplan.planner.partition import StageProblem, split_by_milp, split_by_programme


def random_problem(rng: random.Random, chunks_per_rank: int = 1, *, kinds: int = 3) -> StageProblem:
    ranks = rng.randint(1, 3)
    layers = rng.randint(max(1, ranks * chunks_per_rank - 1), 7)
    kind = [rng.randrange(kinds) for _ in range(layers)]
    costs = [(rng.randint(1, 9) / 4, rng.randint(1, 5), rng.randint(1, 4)) for _ in range(kinds)]
    return StageProblem(
        ranks=ranks,
        chunks_per_rank=chunks_per_rank,
        layer_s=[costs[k][0] for k in kind],
        layer_state_bytes=[costs[k][1] for k in kind],
        layer_saved_bytes=[costs[k][2] for k in kind],
        fixed_s=[rng.randint(0, 8) / 4 for _ in range(ranks)],
        base_bytes=[rng.randint(0, 6) for _ in range(ranks)],
        in_flight=[float(ranks - r) for r in range(ranks)],
        limit_bytes=float(rng.randint(8, 60)),
    )


def slowest(problem: StageProblem, sizes: list[int]) -> float | None:
    """Seconds of the slowest rank under a split; None if a rank exceeds the limit."""
    times, needed = list(problem.fixed_s), list(problem.base_bytes)
    layer = 0
    for chunk, size in enumerate(sizes):
        for _ in range(size):
            rank = chunk % problem.ranks
            times[rank] += problem.layer_s[layer]
            needed[rank] += problem.need(layer, rank)
            layer += 1
    return None if max(needed) > problem.limit_bytes else max(times)


def brute_force(problem: StageProblem) -> float | None:
    layers, chunks = len(problem.layer_s), problem.chunks
    best: float | None = None
    for ends in itertools.combinations_with_replacement(range(layers + 1), chunks - 1):
        cuts = [0, *ends, layers]
        sizes = [b - a for a, b in itertools.pairwise(cuts)]
        if min(sizes[:-1], default=1) < 1:
            continue
        seconds = slowest(problem, sizes)
        if seconds is not None and (best is None or seconds < best):
            best = seconds
    return best


def worth(problem: StageProblem, sizes: list[int] | None) -> float | None:
    if sizes is None:
        return None
    assert sum(sizes) == len(problem.layer_s)
    assert all(size >= 1 for size in sizes[:-1])
    seconds = slowest(problem, sizes)
    assert seconds is not None
    return seconds


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
    for _ in range(40):
        problem = random_problem(rng, chunks_per_rank)
        expected = brute_force(problem)
        assert worth(problem, split_by_milp(problem)) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("solvers", [["PULP_CBC_CMD", "HiGHS"], ["PULP_CBC_CMD"]], ids=["usual", "cbc"])
def test_short_layers_are_told_apart(solvers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # microseconds a layer: less than what the solvers take for nothing if the objective is in seconds
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: solvers)
    rng = random.Random(1)
    for _ in range(30):
        problem = random_problem(rng, 2)
        seconds = {name: [t * 1e-6 for t in getattr(problem, name)] for name in ("layer_s", "fixed_s")}
        problem = dataclasses.replace(problem, **seconds)  # type: ignore[arg-type]
        expected = brute_force(problem)
        assert worth(problem, split_by_milp(problem)) == (None if expected is None else pytest.approx(expected))


def test_cbc_gives_the_same_where_highs_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    problems = [random_problem(rng, 2) for _ in range(5)]
    usual = [worth(p, split_by_milp(p)) for p in problems]
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])
    assert isinstance(partition._solver(1.0), pulp.PULP_CBC_CMD)
    assert [worth(p, split_by_milp(p)) for p in problems] == pytest.approx(usual)


def test_by_hand() -> None:
    # three light and three heavy layers on two ranks; the second rank also has a head of 2 s
    problem = StageProblem(
        ranks=2, chunks_per_rank=1, layer_s=[1, 1, 1, 2, 2, 2], layer_state_bytes=[1] * 6, layer_saved_bytes=[1] * 6,
        fixed_s=[0, 2], base_bytes=[0, 0], in_flight=[2, 1], limit_bytes=100,
    )  # fmt: skip
    # 1+1+1+2 = 5 against 2+2+2 = 6; one layer further 7 against 4, one layer less 3 against 8
    assert split_by_programme(problem) == split_by_milp(problem) == [4, 2]


def test_memory_moves_layers_away_from_the_first_rank() -> None:
    common = {
        "ranks": 2, "chunks_per_rank": 1, "layer_s": [1.0] * 4, "layer_state_bytes": [0.0] * 4, "layer_saved_bytes": [1.0] * 4,
        "fixed_s": [0.0, 0.0], "base_bytes": [0.0, 0.0], "in_flight": [2.0, 1.0],
    }  # fmt: skip
    assert split_by_programme(StageProblem(**common, limit_bytes=4.0)) == [2, 2]  # type: ignore[arg-type]
    assert split_by_programme(StageProblem(**common, limit_bytes=3.0)) == [1, 3]  # type: ignore[arg-type]
    assert split_by_programme(StageProblem(**common, limit_bytes=1.5)) is None  # type: ignore[arg-type]


def test_more_chunks_than_layers_are_refused() -> None:
    with pytest.raises(ProblemError, match="6 chunks need at least 5 layers, there are 3"):
        StageProblem(
            ranks=3, chunks_per_rank=2, layer_s=[1] * 3, layer_state_bytes=[1] * 3, layer_saved_bytes=[1] * 3,
            fixed_s=[0] * 3, base_bytes=[0] * 3, in_flight=[1] * 3, limit_bytes=9,
        )  # fmt: skip


def test_dynamic_programme_refuses_virtual_stages() -> None:
    with pytest.raises(ProblemError, match="one chunk a rank, not 2"):
        split_by_programme(random_problem(random.Random(3), 2))
