"""Two partitions by mixed-integer programmes: layers to pipeline chunks, and gradients to windows of the backward pass.

Layers: the split whose slowest rank is fastest, within memory.
    minimise    T
    rank time   fixed_r + sum of seconds of the layers on rank r         <= T          for every rank r
    rank memory base_r + sum of (state + in-flight x saved) of them      <= limit      for every rank r
    order       a chunk has layers of a run of equal layers only if all runs before it end there at the latest
    filled      no chunk but the last is empty
Chunk c runs on rank c mod ranks, so with virtual stages a rank's sum runs over several chunks. The step time falls with T
alone, since m max(t) + (sum(t) - max(t)) / v has a fixed sum. `split_by_programme` is the exact dynamic programme for one
chunk a rank, which tests compare with.

Gradients: the bytes x and the chunkings z of the windows w that make the backward pass of FSMoE shortest (why it is enough to
choose among these, and what a choice c costs and holds, is in `costmodels/moe/gradients.py`, whose `partition` is the twin).
    minimise    sum of extra_wc z_wc - beta sum of x_w + alpha tail
    choice      sum of z_wc over c >= 1                                  <= 1          for every window w
    room        x_w                                                      <= room_w0 + sum of (room_wc - room_w0) z_wc
    pending     what had arrived - what has travelled                    >= 0          after every layer
    closing     tail + sum of z_wc after the last arrival                >= 1          unless a window there costs no start-up
Rooms are bounded by what can have arrived, so that nothing else plays the big M. Of equal layers in a row all but the first
are one group, with integers in place of binaries: with the larger pieces later no sum of pieces passes what has arrived
before it, if the last does not. For the same reason a later one of equal windows may always have the larger choice.

Solved with PuLP: HiGHS where it is installed, the CBC that PuLP brings otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pulp  # type: ignore[import-untyped]

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.gradients import BackwardLayer, Partition, Window, filled, windows
from moeplan.errors import ProblemError

GAIN = 1e4
"""What all gradients that can be hidden are worth in the objective: CBC takes steps of 1e-5 for none."""
GAP = 1e-9
"""Share of that by which a solution is called the best."""


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
    """Layers of each chunk, in order; None if no split fits or none was found in time."""
    runs, chunks = _runs(problem), problem.chunks
    # A mean rank takes 0.05 units, so that CBC, which takes no steps below 1e-5, leaves 2e-4 of it unproven (HiGHS: 1e-4).
    unit_s = 20.0 * (sum(problem.layer_s) + sum(problem.fixed_s)) / problem.ranks or 1.0
    model = pulp.LpProblem("stages", pulp.LpMinimize)
    slowest = model.add_variable("slowest", 0)
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
        seconds = pulp.lpSum(problem.layer_s[x] / unit_s * count for count, x in mine)
        model += seconds + problem.fixed_s[r] / unit_s <= slowest, f"time_{r}"
        share = pulp.lpSum(problem.need(x, r) / problem.limit_bytes * count for count, x in mine)
        model += share <= 1.0 - problem.base_bytes[r] / problem.limit_bytes, f"memory_{r}"
    model.solve(_solver(time_limit_s))
    if pulp.LpStatus[model.status] != "Optimal":
        return None
    return [round(sum(v.value() for v in row)) for row in held]


def _runs(problem: StageProblem) -> list[tuple[int, int]]:
    """Runs of equal layers: the first layer of each and how many there are."""
    costs = list(zip(problem.layer_s, problem.layer_state_bytes, problem.layer_saved_bytes, strict=True))
    return _equal_in_a_row(costs)


def _equal_in_a_row(items: Sequence[Any]) -> list[tuple[int, int]]:
    runs = [[i for i, _ in run] for _, run in groupby(enumerate(items), key=lambda pair: pair[1])]
    return [(run[0], len(run)) for run in runs]


def _solver(time_limit_s: float, **gaps: float) -> Any:
    if "HiGHS" in pulp.listSolvers(onlyAvailable=True):
        return pulp.HiGHS(msg=False, timeLimit=time_limit_s, **gaps)
    with warnings.catch_warnings():
        # PuLP 4 will take CBC from a package of its own; pyproject.toml stays below 4 until then
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, **gaps)


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


# ---------------------------------------------------------------- gradients to windows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Equal windows of equal layers: as many as `count`, every second one from `first` on."""

    first: int
    count: int
    window: Window
    chosen: tuple[Any, ...]
    """By choice from the second on: how many of them take it."""
    travels: Any
    """Bytes of all of them."""


def gradients_by_milp(layers: Sequence[BackwardLayer], line: AlphaBeta, *, time_limit_s: float = 10.0) -> Partition | None:
    """The quickest partition of the gradients; None if none was proven so in time."""
    all_windows = windows(layers, line)
    # Bytes in units of what can be hidden at most, seconds in units of what that is worth.
    all_bytes = sum(layer.gradient_bytes for layer in layers)
    unit_bytes = min(all_bytes, sum(window.room_bytes[-1] for window in all_windows)) or 1.0
    tail_s = float(line.startup_s) if any(w.closing for w in all_windows) else 0.0
    scale = GAIN / (float(line.unit_s) * unit_bytes + tail_s or 1.0)
    model = pulp.LpProblem("gradients", pulp.LpMinimize)
    pending: Any = 0.0
    groups: list[_Group] = []
    for first, count in _layer_groups(layers):
        arriving = min(1.0, layers[first].gradient_bytes / unit_bytes)
        here = [_group(model, all_windows, 2 * first + place, count, unit_bytes) for place in (0, 1)]
        groups += here
        # pending: no more travels than has arrived before the last layer of the group
        left = model.add_variable(f"pending_{first}", 0)
        travels = pulp.lpSum(group.travels for group in here)
        model += left == pending + (count - 1) * arriving - travels, f"pending_{first}_counts"
        pending = left + arriving
    _order(model, groups)
    cost = pulp.lpSum(e * scale * z for g in groups for e, z in zip(g.window.extra_s[1:], g.chosen, strict=True))
    hidden = float(line.unit_s) * unit_bytes * scale * pulp.lpSum(group.travels for group in groups)
    closing = [group for group in groups if group.window.closing]
    if closing and all(group.window.start_s > 0.0 for group in closing):
        # closing: what is left travels in a window that sends anyway, or in the tail
        tail = model.add_variable("tail", cat="Binary")
        model += tail + pulp.lpSum(z for group in closing for z in group.chosen) >= 1, "closing"
        cost += tail_s * scale * tail
    model += cost - hidden
    if any(group.chosen for group in groups):
        model.solve(_solver(time_limit_s, gapRel=0.0, gapAbs=GAP * GAIN))
        # a time limit reached with a solution at hand is "Optimal" to PuLP, but not in the status of the solution
        if model.sol_status != pulp.LpSolutionOptimal:
            return None
    return filled(_rooms(groups, len(all_windows)), layers, line)


def _layer_groups(layers: Sequence[BackwardLayer]) -> list[tuple[int, int]]:
    """The first layer and the number of each group: of equal ones in a row with gradients, the first stands alone."""
    out = []
    for first, count in _equal_in_a_row(layers):
        alone = count > 1 and layers[first].gradient_bytes > 0.0
        out += [(first, 1), (first + 1, count - 1)] if alone else [(first, count)]
    return out


def _group(model: Any, all_windows: Sequence[Window], first: int, count: int, unit_bytes: float) -> _Group:
    """Variables of `count` windows, and what travels in them; the last has the most choices."""
    window = all_windows[first + 2 * (count - 1)]
    room, *larger = [bytes_ / unit_bytes for bytes_ in window.room_bytes]
    travels = model.add_variable(f"travels_{first}", 0, count * window.room_bytes[-1] / unit_bytes)
    chosen = tuple(model.add_variable(f"chosen_{first}_{c + 1}", 0, count, "Integer") for c in range(len(larger)))
    if chosen:
        # choice: one a window, the first where no other is taken
        model += pulp.lpSum(chosen) <= count, f"choice_{first}"
        # room: what travels fits
        more = pulp.lpSum((r - room) * z for r, z in zip(larger, chosen, strict=True))
        model += travels <= count * room + more, f"room_{first}"
    return _Group(first=first, count=count, window=window, chosen=chosen, travels=travels)


def _order(model: Any, groups: Sequence[_Group]) -> None:
    """Of equal windows, a later one takes no smaller choice: implied, but it spares the solver their permutations."""
    before: dict[tuple[Any, ...], _Group] = {}
    for group in groups:
        alike = (group.window.extra_s, group.window.room_bytes, group.window.closing)
        if alike in before:
            for c in range(len(group.chosen)):
                # order: the share with a choice from c on does not fall
                earlier, later = pulp.lpSum(before[alike].chosen[c:]), pulp.lpSum(group.chosen[c:])
                name = f"order_{group.first}_{c + 1}"
                model += group.count * earlier <= before[alike].count * later, name
        before[alike] = group


def _rooms(groups: Sequence[_Group], count: int) -> list[float]:
    """Bytes that each window may take, smaller choices first; the last closing one that sends takes all that is left."""
    out = [0.0] * count
    closing = -1
    for group in groups:
        counts = [round(z.value()) for z in group.chosen]
        choices = [0] * (group.count - sum(counts)) + [c + 1 for c, n in enumerate(counts) for _ in range(n)]
        for place, choice in enumerate(choices):
            at = group.first + 2 * place
            out[at] = group.window.room_bytes[choice]
            if group.window.closing and (choice > 0 or group.window.start_s == 0.0):
                closing = max(closing, at)
    if closing >= 0:
        out[closing] = float("inf")
    return out
