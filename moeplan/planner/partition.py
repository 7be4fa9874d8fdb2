"""Two partitions by mixed-integer programmes: layers to pipeline chunks, and gradients to windows of the backward pass.

Layers: the split with the least closed form of a step's passes within memory (`stages/problem.py`, which has its dynamic
programme).
    minimise    Z
    rank time   m t_r + before_r [+ waits_r]                             <= Z          for every rank r
    rank memory base + sum of (state + in-flight x saved) of its layers  <= limit      for every rank and moment
    order       a chunk has layers of a run of equal layers only if all runs before it end there at the latest
    sizes       every chunk has as many layers as it must and may have
All of t_r, before_r and waits_r are linear in the layers of the chunks.

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

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pulp  # type: ignore[import-untyped]

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.gradients import BackwardLayer, Partition, Window, filled, windows
from moeplan.planner.stages.problem import StageProblem, waits

GAIN = 1e4
"""What all gradients that can be hidden are worth in the objective: CBC takes steps of 1e-5 for none."""
NODES = 500
"""Nodes of the search for a split after which it is given up: a count, so that the answer does not depend on the machine."""
SOLVERS = {"HiGHS": "HiGHS", "PULP_CBC_CMD": "CBC"}
"""What PuLP calls the solvers, in the order in which they are asked, and what everyone else does."""
GAP = 1e-9
"""Share of that by which a solution is called the best."""


@dataclass(frozen=True, slots=True)
class Split:
    """Answer of a mixed-integer programme on a stage problem."""

    sizes: list[int] | None
    """Layers of each chunk, in order; None where none was found."""
    proven: bool
    """Whether no other split is better, or there is none at all."""
    remark: str = ""
    """Which solver was not there or failed, and what took its place; empty: the first did it."""


def split_by_milp(problem: StageProblem, *, paths: Sequence[Any] = (), within_s: float = math.inf) -> Split:
    """The split with the least closed form, or longest of the given paths through its passes where that is more.

    `paths`: counts of forward and backward passes of each chunk, [2, p, v] each (`pipeline/critical.py`). `within_s`: only
    splits that are no slower are of interest.
    """
    runs, chunks, batches = _equal_in_a_row(problem.kinds), problem.chunks, problem.batches
    seconds = [problem.layer_s[problem.kinds[first]] for first, _ in runs]
    # A mean rank takes 0.05 units, so that CBC, which takes no steps below 1e-5, leaves 2e-4 of it unproven (HiGHS: 1e-4).
    unit_s = 20.0 * (sum(s * n for s, (_, n) in zip(seconds, runs, strict=True)) + sum(problem.fixed_s)) / problem.ranks or 1.0
    model = pulp.LpProblem("stages", pulp.LpMinimize)
    slowest = model.add_variable("slowest", 0, within_s / batches / unit_s if math.isfinite(within_s) else None)
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
        model += pulp.lpSum(held[c]) >= problem.fewest[c], f"fewest_{c}"
        model += pulp.lpSum(held[c]) <= problem.most[c], f"most_{c}"
    for stage in range(problem.chunks_per_rank if problem.level else 0):
        # level: chunks of a virtual stage differ by one layer at most, but for the first and the last chunk
        least = model.add_variable(f"least_{stage}", 0, max(problem.most), "Integer")
        for c in range(stage * problem.ranks, (stage + 1) * problem.ranks):
            model += pulp.lpSum(held[c]) <= least + 1, f"above_{c}"
            if problem.fewest[c]:
                model += pulp.lpSum(held[c]) >= least, f"level_{c}"
    of_chunk = [pulp.lpSum(s / unit_s * x for s, x in zip(seconds, row, strict=True)) for row in held]
    own = [pulp.lpSum(of_chunk[r :: problem.ranks]) + problem.fixed_s[r] / unit_s for r in range(problem.ranks)]
    for r in range(problem.ranks):
        # the closed form over m: what a rank does, waits for at its start and end, and beyond its passes ahead
        before = pulp.lpSum(own[:r] if problem.chunks_per_rank == 1 else of_chunk[:r])
        model += own[r] + (1.0 / batches) * before <= slowest, f"time_{r}"
        if problem.chunks_per_rank == 1:
            beyond = waits(problem, r, own[r], pulp.lpSum(own[r + 1 :]))
            model += own[r] + (1.0 / batches) * (before + beyond) <= slowest, f"waits_{r}"
    for place, path in enumerate(paths):
        # a path: passes that run one after the other whatever they take
        model += _along(problem, runs, held, path, unit_s * batches) <= slowest, f"path_{place}"
    for r in range(problem.ranks):
        for place, moment in enumerate(problem.moments[r]):
            share = pulp.lpSum(
                (problem.state_bytes[k] + in_flight * problem.saved_bytes[k]) / problem.limit_bytes * x
                for row, in_flight in zip(held[r :: problem.ranks], moment.held, strict=True)
                for x, k in zip(row, (problem.kinds[first] for first, _ in runs), strict=True)
            )
            model += share <= 1.0 - moment.base_bytes / problem.limit_bytes, f"memory_{r}_{place}"
    status, remark = solved(model, nodes=NODES)
    if status == pulp.LpSolutionOptimal:
        return Split([round(sum(v.value() for v in row)) for row in held], True, remark)
    return Split(None, status == pulp.LpSolutionInfeasible, remark)


def _along(problem: StageProblem, runs: Sequence[tuple[int, int]], held: Any, path: Any, unit_s: float) -> Any:
    """What the passes of a path take."""
    p, terms, fixed = problem.ranks, [], 0.0
    for c in range(problem.chunks):
        there, back = (float(n) for n in path[:, c % p, c // p])
        for (first, _), x in zip(runs, held[c], strict=True):
            k = problem.kinds[first]
            terms.append((there * problem.forward_s[k] + back * problem.backward_s[k]) / unit_s * x)
        if c >= problem.chunks - p:
            fixed += there * problem.fixed_forward_s[c % p] + back * problem.fixed_backward_s[c % p]
    return pulp.lpSum(terms) + fixed / unit_s


def solved(model: Any, *, time_limit_s: float = 60.0, nodes: int = 0, **gaps: float) -> tuple[int, str]:
    """PuLP's status of the solution that HiGHS finds if it is there and runs, CBC otherwise; a remark where HiGHS does not."""
    failed = ""
    for name, called in SOLVERS.items():
        if name not in pulp.listSolvers(onlyAvailable=True):
            failed += f"{called} is not installed, "
            continue
        remark = f"{failed}{called} solved the programmes" if failed else ""
        try:
            model.solve(_solver(name, time_limit_s, nodes, **gaps))
        except (pulp.PulpSolverError, OSError, RuntimeError) as error:  # one that crashes is as good as a missing one
            failed += f"{called} failed ({type(error).__name__}), "
            continue
        except KeyError:  # a limit of nodes, which PuLP has no word for
            return int(pulp.LpSolutionNoSolutionFound), remark
        # a time limit reached with a solution at hand is "Optimal" to PuLP, but not in the status of the solution
        return int(model.sol_status), remark
    return int(pulp.LpSolutionNoSolutionFound), f"{failed}no programme was solved: only dynamic programmes and bounds tell"


def _equal_in_a_row(items: Sequence[Any]) -> list[tuple[int, int]]:
    """Runs of equal items: the first of each and how many there are."""
    runs = [[i for i, _ in run] for _, run in groupby(enumerate(items), key=lambda pair: pair[1])]
    return [(run[0], len(run)) for run in runs]


def _solver(name: str, time_limit_s: float, nodes: int, **gaps: float) -> Any:
    if name == "HiGHS":
        most = {"mip_max_nodes": nodes} if nodes else {}
        return pulp.HiGHS(msg=False, timeLimit=time_limit_s, **gaps, **most)
    with warnings.catch_warnings():
        # PuLP 4 will take CBC from a package of its own; pyproject.toml stays below 4 until then
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, maxNodes=nodes or None, **gaps)


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
        status, _ = solved(model, time_limit_s=time_limit_s, gapRel=0.0, gapAbs=GAP * GAIN)
        if status != pulp.LpSolutionOptimal:
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
