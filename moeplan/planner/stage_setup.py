"""Stage problems of many layouts at once, from their prices: see `stage_problem.py`.

What does not move is measured on a reference split, of which the layers' share is taken off. A model with prediction layers has
two forms: these stand with the head, or the head has the last chunk for itself. Where gradients are bf16, what the optimizer
step holds is left out here; the price of a split has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.constants import STEP
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import least_most_parameters, micro_batches
from moeplan.costmodels.moments import compositions
from moeplan.costmodels.peak import head_bytes
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import chunk_units, format_split, split_letters
from moeplan.costmodels.step import send_times, sends_exposed_s
from moeplan.planner.bounds import with_once_s
from moeplan.planner.problem import Problem
from moeplan.planner.stage_problem import Moment, StageProblem, chunk_sizes

_MOVES = ("activations", "logits and loss", "working set", "optimizer step")
"""Parts of the peak that do not only depend on what parameters a rank holds."""


@dataclass(frozen=True, slots=True)
class Form:
    """A stage problem of one of many layouts."""

    row: int
    """Its place among them."""
    alone: bool
    """Whether the head has the last chunk for itself."""
    stages: StageProblem


def split_text(problem: Problem, sizes: Any, alone: bool) -> str:
    """The text of a split by the layers of each chunk."""
    return format_split(split_letters([int(size) for size in sizes], len(problem.model.mtp), head_alone=alone))


def least_rest_s(problem: Problem, rows: Layouts) -> Any:
    """Seconds of a step beside its passes that no split avoids, [n]."""
    profile, workload = problem.profile, problem.workload
    inside, across = send_times(problem.model, profile, workload, rows)
    one = np.where(rows.tp * rows.cp * rows.dp < profile.cluster.domain_gpus, inside, across)
    sends = sends_exposed_s(one, micro_batches(workload, rows), rows.pp, rows.vpp)
    return with_once_s(problem, rows, least_most_parameters(problem.model, rows), STEP.overhead_s + sends)


def forms(problem: Problem, rows: Layouts) -> Iterator[Form]:
    """The stage problems of layouts with pp > 1, those of each layout together."""
    ways = (False, True) if problem.model.mtp else (False,)
    made = [list(_forms(problem, rows, alone)) for alone in ways]
    for row in range(len(rows)):
        yield from (form for form in (some[row] for some in made) if form is not None)


def _forms(problem: Problem, rows: Layouts, alone: bool) -> Iterator[Form | None]:
    """The stage problem of each layout in one form; None where its chunks are too few for that."""
    chunks = rows.pp * rows.vpp
    layers = len(problem.model.layers)
    texts = {int(c): split_text(problem, _even(layers, int(c), alone), alone) for c in np.unique(chunks)}
    places = np.array([list(texts).index(int(c)) for c in chunks])
    table = _Table(problem, rows.with_columns(split=places, stages=tuple(texts.values())), alone)
    for i, count in enumerate(chunks.tolist()):
        yield Form(i, alone, table.stages(i)) if rows.pp[i] > 1 and count > 1 + alone else None


class _Table:
    """What the stage problems of layouts are made of, on a reference split of each."""

    def __init__(self, problem: Problem, rows: Layouts, alone: bool) -> None:
        self.problem, self.rows, self.alone = problem, rows, alone
        pricing = Pricing(problem.model, problem.profile, problem.workload, rows, every_rank=True)
        self.costs, layer = pricing.kind_costs(), pricing.layer_tables
        self.passes = [np.stack(way) for way in layer.pass_seconds(slice(None))]
        self.predicted = len(problem.model.mtp) * np.broadcast_to(layer.saved_bytes(slice(None))[-1], len(rows))
        parts = dict(pricing.peak_memory())
        self.still = sum(parts.values()) - sum(parts[name] for name in _MOVES if name in parts)
        self.working = parts["working set"][0]  # a rank without the head has all of it
        self.logits = head_bytes(problem.model, problem.workload, rows)
        self.batches = micro_batches(problem.workload, rows)

    def stages(self, i: int) -> StageProblem:
        """The stage problem of one layout."""
        model, costs = self.problem.model, self.costs
        pp, vpp = int(self.rows.pp[i]), int(self.rows.vpp[i])
        kinds, layers = len(model.kinds), len(model.layers)
        units = chunk_units(model, pp, vpp, self.rows.stages[int(self.rows.split[i])])
        fixed = [units[:, -1, kinds:] @ way[kinds:, i] for way in self.passes]
        low, high = chunk_sizes(layers, pp, vpp)
        fewest, most = np.full(pp * vpp, low), np.full(pp * vpp, high)
        fewest[[0, -1]] = 0
        if self.alone:
            fewest[-2], most[-1] = 0, 0
        return StageProblem(
            ranks=pp,
            chunks_per_rank=vpp,
            batches=float(self.batches[i]),
            kinds=model.kind_of_layer,
            forward_s=self.passes[0][:kinds, i].tolist(),
            backward_s=self.passes[1][:kinds, i].tolist(),
            state_bytes=costs.state_bytes[:, i].tolist(),
            saved_bytes=costs.saved_bytes[:, i].tolist(),
            fixed_forward_s=fixed[0].tolist(),
            fixed_backward_s=fixed[1].tolist(),
            moments=self._moments(i, pp, vpp, self.still[:pp, i] - units.sum(axis=1)[:, :kinds] @ costs.state_bytes[:, i]),
            limit_bytes=self.problem.peak_limit_bytes,
            fewest=fewest.tolist(),
            most=most.tolist(),
            level=vpp > 1,
        )

    def _moments(self, i: int, pp: int, vpp: int, base: Any) -> list[list[Moment]]:
        """When each rank can be fullest; `base`: what it holds beside layers and for a moment, [p]."""
        batches, working, logits = float(self.batches[i]), float(self.working[i]), float(self.logits[i])
        on_top = self.problem.workload.era.framework == "pytorch"  # see `peak.moment_parts`
        holder = pp - 2 if self.alone else pp - 1
        out = []
        for rank in range(pp):
            still, has_head = float(base[rank]), rank == pp - 1
            predicted = float(self.predicted[i]) * (rank == holder)
            if vpp == 1:
                peak = working if not has_head else working + logits if on_top else max(working, logits)
                held = min(batches, float(pp - rank))
                out.append([Moment(held=(held,), base_bytes=still + held * predicted + peak)])
                continue
            share = min(batches / pp, 1.0)
            in_flight = _in_flight(pp, vpp, rank, 2 if batches > pp else 1)
            out.append([_moment(held * share, still + working, predicted) for held in in_flight])
            if has_head:
                at_loss = share * np.array([pp] * (vpp - 1) + [1.0])
                out[-1].append(_moment(at_loss, still + logits + working * on_top, predicted))
        return out


def _even(layers: int, chunks: int, alone: bool) -> list[int]:
    """Layers of each chunk, nearly equally many."""
    holding = chunks - alone
    return [layers // holding + (c < layers % holding) for c in range(holding)] + [0] * alone


@functools.lru_cache(maxsize=65536)
def _in_flight(pp: int, vpp: int, rank: int, rounds: int) -> Any:
    """Micro-batches in flight in each chunk of a rank, [moments, v], without moments that another one covers."""
    held = np.unique(compositions(pp, vpp, (vpp + 1) * pp - 2 * rank - 1, rounds * pp), axis=0).astype(np.float64)
    covered: Any = (held[:, None] <= held[None]).all(axis=-1).sum(axis=1) > 1
    return held[~covered]


def _moment(held: Any, base: float, predicted: float) -> Moment:
    return Moment(held=tuple(held.tolist()), base_bytes=base + float(held[-1]) * predicted)
