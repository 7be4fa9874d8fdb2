"""Layers to pipeline chunks: the split whose slowest rank is fastest, within memory.

    minimise    T
    rank time   fixed_r + sum of seconds of the layers on rank r         <= T          for every rank r
    rank memory base_r + sum of (state + in-flight x saved) of them      <= limit      for every rank r
    order       a chunk has layers of a run of equal layers only if all runs before it end there at the latest
    filled      no chunk but the last is empty
Chunk c runs on rank c mod ranks, so with virtual stages a rank's sum runs over several chunks. The step time falls with T
alone, since m max(t) + (sum(t) - max(t)) / v has a fixed sum. Solved with PuLP: HiGHS where it is installed, the CBC that
PuLP brings otherwise. `split_by_programme` is the exact dynamic programme for one chunk a rank, which tests compare with.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulp  # type: ignore[import-untyped]

from moeplan.errors import ProblemError


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProblem:
    """What the split of layers depends on. Sequences over layers have L entries, over ranks R."""

    ranks: int
    chunks_per_rank: int
    layer_s: Sequence[float]
    """Seconds of one micro-batch in each layer, forward and backward."""
    layer_state_bytes: Sequence[float]
    """Bytes of weights, gradients and optimizer states of each layer on a rank."""
    layer_saved_bytes: Sequence[float]
    """Bytes that each layer keeps for one micro-batch."""
    fixed_s: Sequence[float]
    """Seconds of what cannot move: embedding, head, prediction layers."""
    base_bytes: Sequence[float]
    """Bytes of what cannot move, and of buffers."""
    in_flight: Sequence[float]
    """Micro-batches whose activations a rank holds."""
    limit_bytes: float
    """Peak allocation that a rank may reach."""

    def __post_init__(self) -> None:
        layers, chunks = len(self.layer_s), self.ranks * self.chunks_per_rank
        if chunks > layers + 1:
            raise ProblemError(f"{chunks} chunks need at least {chunks - 1} layers, there are {layers}")

    @property
    def chunks(self) -> int:
        """Chunks of the whole pipeline."""
        return self.ranks * self.chunks_per_rank

    def need(self, layer: int, rank: int) -> float:
        """Bytes that a layer costs on a rank."""
        return self.layer_state_bytes[layer] + self.in_flight[rank] * self.layer_saved_bytes[layer]


def split_by_milp(problem: StageProblem, *, time_limit_s: float = 10.0) -> list[int] | None:
    """Layers of each chunk, in order; None if no split fits or none was proven best in time."""
    runs, chunks = _runs(problem), problem.chunks
    model = pulp.LpProblem("stages", pulp.LpMinimize)
    slowest = model.add_variable("slowest_s", 0)
    # held[c][j]: layers of run j in chunk c, so that equal layers are one variable
    held = [[model.add_variable(f"held_{c}_{j}", 0, n, "Integer") for j, (_, n) in enumerate(runs)] for c in range(chunks)]
    model += slowest
    for j, (_, n) in enumerate(runs):
        # every layer stands somewhere
        model += pulp.lpSum(held[c][j] for c in range(chunks)) == n, f"all_{j}"
    for c in range(chunks):
        for j in range(len(runs) - 1):
            # order: a chunk has layers of run j + 1 only if run j ends with it at the latest
            done = model.add_variable(f"done_{c}_{j}", cat="Binary")
            model += pulp.lpSum(held[b][j] for b in range(c + 1)) >= runs[j][1] * done, f"done_{c}_{j}_counts"
            model += pulp.lpSum(held[b][j + 1] for b in range(c + 1)) <= runs[j + 1][1] * done, f"order_{c}_{j}"
        if c < chunks - 1:
            # every chunk but the last holds a layer
            model += pulp.lpSum(held[c]) >= 1, f"filled_{c}"
    for r in range(problem.ranks):
        mine = [(held[c][j], runs[j][0]) for c in range(r, chunks, problem.ranks) for j in range(len(runs))]
        # the slowest rank, and memory in units of the limit
        model += pulp.lpSum(problem.layer_s[x] * count for count, x in mine) + problem.fixed_s[r] <= slowest, f"time_{r}"
        share = pulp.lpSum(problem.need(x, r) / problem.limit_bytes * count for count, x in mine)
        model += share <= 1.0 - problem.base_bytes[r] / problem.limit_bytes, f"memory_{r}"
    model.solve(_solver(time_limit_s))
    if pulp.LpStatus[model.status] != "Optimal":
        return None
    return [round(sum(v.value() for v in row)) for row in held]


def _runs(problem: StageProblem) -> list[tuple[int, int]]:
    """Runs of equal layers: the first layer of each and how many there are."""
    costs = list(zip(problem.layer_s, problem.layer_state_bytes, problem.layer_saved_bytes, strict=True))
    out: list[tuple[int, int]] = []
    for x, cost in enumerate(costs):
        if out and costs[out[-1][0]] == cost:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((x, 1))
    return out


def _solver(time_limit_s: float) -> Any:
    if "HiGHS" in pulp.listSolvers(onlyAvailable=True):
        return pulp.HiGHS(msg=False, timeLimit=time_limit_s)
    with warnings.catch_warnings():
        # PuLP 4 will take CBC from a package of its own; pyproject.toml stays below 4 until then
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s)


def split_by_programme(problem: StageProblem) -> list[int] | None:
    """The same by dynamic programming over the end of each chunk; for one chunk a rank."""
    if problem.chunks_per_rank != 1:
        raise ProblemError(f"the dynamic programme takes one chunk a rank, not {problem.chunks_per_rank}")
    layers, ranks = len(problem.layer_s), problem.ranks
    infinite = float("inf")
    best = [[infinite] * (layers + 1) for _ in range(ranks + 1)]
    start_of = [[0] * (layers + 1) for _ in range(ranks + 1)]
    best[0][0] = 0.0
    for r in range(ranks):
        for end in range(layers + 1):
            seconds, needed = problem.fixed_s[r], problem.base_bytes[r]
            # layers start..end-1 on rank r; only the last rank may hold none
            for start in range(end, -1, -1):
                if start < end:
                    seconds += problem.layer_s[start]
                    needed += problem.need(start, r)
                if needed > problem.limit_bytes:
                    break
                if (start < end or r == ranks - 1) and max(best[r][start], seconds) < best[r + 1][end]:
                    best[r + 1][end], start_of[r + 1][end] = max(best[r][start], seconds), start
    if best[ranks][layers] == infinite:
        return None
    sizes, end = [], layers
    for r in range(ranks, 0, -1):
        sizes.append(end - start_of[r][end])
        end = start_of[r][end]
    return sizes[::-1]
