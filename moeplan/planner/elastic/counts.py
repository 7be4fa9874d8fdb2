"""Layouts for every node count: what a search finds on each number of nodes under the class of a plan.

A count of nodes may train on fewer nodes and keep the rest as spares, so that the layouts of a count are those of all sizes up
to it. A size is searched while no smaller one is known to be as fast; sizes below a count are tried while they could be, taking
that none does more per node than the best so far. Layers are split evenly or balanced (`stages.py`), so that stages may differ;
replicas are equal, as Megatron has them. The global batch is constant but for the class "none", where it follows the nodes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeplan.costmodels.layout import Layout
from moeplan.errors import ProblemError, UsageError
from moeplan.planner.elastic.consistency import Consistency, check_class, pins_of
from moeplan.planner.plan import Plan
from moeplan.planner.problem import Condition, Problem
from moeplan.planner.search import search
from moeplan.units import format_bytes

KEEP = 4
"""Layouts of a size that are kept: the fastest of as many different degrees."""
VARIANTS = 4
"""Layouts that are searched for each one that is kept: some differ in micro-batch or virtual stages only."""
MOST_NODES = 1_000_000
"""Larger counts are taken for slips."""
MOST_COUNTS = 512
"""Each count is searched, which takes a good quarter of a second."""

_ARCHITECTURE = ("layers", "mtp", "hidden", "vocab", "tied")
"""Fields by which two models are told apart."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SizedLayout:
    """A layout on a number of nodes."""

    nodes: int
    """Nodes that train."""
    problem: Problem
    """The question on these nodes."""
    layout: Layout
    step_s: float
    peak_bytes: float
    instances: int = 1
    """Replicas of the optimizer states."""

    @property
    def samples_per_s(self) -> float:
        """Samples per second while it runs."""
        return self.problem.workload.global_batch / self.step_s

    @property
    def degrees(self) -> tuple[int, ...]:
        """Layouts with the same degrees are variants of one layout."""
        x = self.layout
        return x.tp, x.cp, x.pp, x.dp, x.ep, x.etp


def parse_nodes(text: str) -> tuple[int, ...]:
    """Node counts of "12..16", "12..16:2" or "8,12,16", ascending."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9})(?::(\d{1,9}))?)?", part)
        if match is None:
            raise UsageError(f"'{text}' are not node counts", hint="write them like 12..16, 12..16:2 or 8,12,16")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if not 1 <= first <= last <= MOST_NODES or not step:
            raise UsageError(
                f"'{part}' are no node counts from low to high, 1 to {MOST_NODES}", hint="write them like 12..16, or 12..16:2"
            )
        found.update(range(first, min(last, first + MOST_COUNTS * step) + 1, step))
    if len(found) > MOST_COUNTS:
        hint = "leave some out, as in 64..1024:8; those between run the next lower one with spares"
        raise UsageError(f"'{text}' are more than {MOST_COUNTS} node counts", hint=hint)
    return tuple(sorted(found))


def node_gpus(problem: Problem) -> int:
    """GPUs of a node, of a cluster smaller than one all that it has."""
    cluster = problem.profile.cluster
    return min(cluster.gpus_per_node, cluster.gpus)


def layouts_by_size(
    plan: Plan,
    counts: Sequence[int],
    consistency: Consistency,
    *,
    also: Sequence[Plan] = (),
    pins: Sequence[Condition] = (),
    fits: Callable[[SizedLayout], Sequence[SizedLayout]] | None = None,
    progress: Progress | None = None,
) -> dict[int, tuple[SizedLayout, ...]]:
    """Layouts by the nodes that they use, fastest first, so that every count has one; sizes without one are left out.

    `also`: further plans to choose among; `pins`: what every layout must meet beside the class; `fits`: gives the forms of a
    layout that may be used, none where it is to be passed over.
    """
    cluster = plan.problem.profile.cluster
    if cluster.gpus < cluster.gpus_per_node and tuple(counts) != (1,):
        message = f"a plan for {cluster.gpus} of the {cluster.gpus_per_node} GPUs of a node"
        raise ProblemError(message, hint=f"solve it for whole nodes, as on {cluster.gpus_per_node} GPUs")
    state = _Sizes(plan, consistency, tuple(pins), fits or (lambda found: (found,)))
    for given in (plan, *also):
        state.add(given)
    for place, count in enumerate(counts):
        state.reach(count)
        if not state.rate_up_to(count):
            raise _too_few(state, count, plan)
        if progress is not None:
            progress(place + 1, len(counts))
    return {size: found for size, found in sorted(state.found.items()) if found and size <= counts[-1]}


def _too_few(state: _Sizes, count: int, plan: Plan) -> ProblemError:
    """That a count is below what fits, with the smallest count that is not."""
    own = math.ceil(plan.layout.world / state.node)
    smallest = next((size for size in range(count + 1, own + 1) if state.at(size)), None)
    device = format_bytes(plan.problem.device_bytes)
    what = f"{count} node{'s' * (count != 1)}: no layout of class '{state.consistency}' fits {plan.problem.model.name} into "
    hint = f"the smallest count that works is {smallest}" if smallest else "give more nodes, or a looser --consistency"
    return ProblemError(f"{what}{count * state.node} GPUs of {device}", hint=hint)


class _Sizes:
    """Layouts by size as they are found."""

    def __init__(
        self,
        plan: Plan,
        consistency: Consistency,
        pins: tuple[Condition, ...],
        fits: Callable[[SizedLayout], Sequence[SizedLayout]],
    ) -> None:
        self.base, self.consistency, self.fits = plan, consistency, fits
        self.pins = (*pins_of(consistency, plan.problem, plan.layout), *pins)
        self.node = node_gpus(plan.problem)
        self.found: dict[int, tuple[SizedLayout, ...]] = {}
        self.given: dict[int, list[SizedLayout]] = {}
        self.per_node = 0.0

    def add(self, plan: Plan) -> None:
        """Take a plan that the user gives; refused where it is of another class, model or machine."""
        gpus = plan.problem.profile.cluster.gpus
        if gpus % self.node:
            raise ProblemError(
                f"a plan for {gpus} GPU{'s' * (gpus != 1)} does not fill nodes of {self.node}", hint="solve it for whole nodes"
            )
        if any(getattr(plan.problem.model, n) != getattr(self.base.problem.model, n) for n in _ARCHITECTURE):
            raise ProblemError(
                f"a plan of {plan.problem.model.name} beside one of {self.base.problem.model.name}",
                hint="give plans of one model",
            )
        batch = plan.problem.workload.global_batch
        check_class(self.consistency, self.base.problem, self.base.layout, plan.layout, batch)
        size = gpus // self.node
        problem = dataclasses.replace(plan.problem, pins=self.base.problem.pins)
        one = SizedLayout(nodes=size, problem=problem, layout=plan.layout, step_s=plan.step_s, peak_bytes=plan.peak_bytes)
        self.given.setdefault(size, []).append(one)
        self.per_node = max(self.per_node, one.samples_per_s / size)

    def reach(self, count: int) -> None:
        """Search the sizes that can be best at a count."""
        for size in range(count, 0, -1):
            self.at(size, best=self.rate_up_to(count))
            if self.rate_up_to(count) >= self.per_node * (size - 1):
                return

    def rate_up_to(self, count: int) -> float:
        """Most samples per second of the sizes up to a count that were searched; 0: none has a layout."""
        return max((one.samples_per_s for size, found in self.found.items() if size <= count for one in found), default=0.0)

    def at(self, size: int, best: float = 0.0) -> tuple[SizedLayout, ...]:
        """The layouts of a size that give more than `best` samples per second."""
        if size not in self.found:
            self.found[size] = self._search(size, best)
            self.per_node = max([self.per_node, *(one.samples_per_s / size for one in self.found[size])])
        return self.found[size]

    def _search(self, size: int, best: float) -> tuple[SizedLayout, ...]:
        problem = self._problem(size)
        batch = problem.workload.global_batch
        given, limit_s = self.given.get(size, []), batch / best if best else math.inf
        found = [
            SizedLayout(nodes=size, problem=problem, layout=c.layout, step_s=c.step_s, peak_bytes=c.peak_bytes)
            for c in search(problem, KEEP * VARIANTS, limit_s=limit_s).best
        ]
        # degrees that the user gives stay, whatever is faster
        own = {one.degrees for one in given}
        chosen: dict[tuple[int, ...], Sequence[SizedLayout]] = {}
        for one in _fastest([*given, *found]):
            room = one.degrees in own or len(chosen.keys() - own) < KEEP
            if room and one.degrees not in chosen and (forms := self.fits(one)):
                chosen[one.degrees] = forms
        return tuple(_fastest([form for forms in chosen.values() for form in forms]))

    def _problem(self, size: int) -> Problem:
        """The question of the base plan on so many nodes, held to the class."""
        base = self.base.problem
        workload = base.workload
        if self.consistency == "none":
            own = base.profile.cluster.gpus / self.node
            workload = dataclasses.replace(workload, global_batch=size * max(1, round(workload.global_batch / own)))
        return dataclasses.replace(
            base,
            profile=base.profile.resized(size * self.node),
            workload=workload,
            pins=(*base.pins, *self.pins),
        )


def _fastest(layouts: Sequence[SizedLayout]) -> list[SizedLayout]:
    """By samples per second, most first."""
    return sorted(layouts, key=lambda one: -one.samples_per_s)
