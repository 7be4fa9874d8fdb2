"""Stage problems of many layouts at once, from their prices: see `problem.py`.

What does not move is measured on a reference split, of which the layers' share is taken off. A model with prediction layers has
two forms: these stand with the head, or the head has the last chunk for itself. Layouts with the same pipeline and number of
micro-batches are one group, in arrays. Where gradients are bf16, what the optimizer step holds is left out here; the price of a
split has it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.constants import STEP
from moeplan.costmodels.layer_tables import LayerTables
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import StageParameters, least_most_parameters, micro_batches, unit_parameters
from moeplan.costmodels.moments import compositions
from moeplan.costmodels.peak import head_bytes
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.recompute import parse_counts
from moeplan.costmodels.stages import chunk_units, format_split, split_letters
from moeplan.costmodels.step import send_times, sends_exposed_s
from moeplan.errors import ProblemError
from moeplan.planner.bounds import LONG_S, ONCE_FIELDS, Once, once
from moeplan.planner.problem import Problem
from moeplan.planner.stages.problem import Moment, StageProblem, chunk_sizes

REST_FIELDS = (*ONCE_FIELDS, "vpp", "micro_batch", "sequence_parallel")
"""What a step takes beside its passes depends on."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Stage problems in one form of layouts with the same pipeline and number of micro-batches; arrays over them are [n]."""

    rows: Any
    """Their places among all layouts, [n]."""
    alone: bool
    """Whether the head has the last chunk for itself."""
    ranks: int
    chunks_per_rank: int
    batches: float
    """Micro-batches of a step."""
    kinds: Sequence[int]
    """Kind of each layer, [L]."""
    forward_s: Any
    """Seconds of one micro-batch in a layer of each kind, [K, n]."""
    backward_s: Any
    state_bytes: Any
    """Weights, gradients and optimizer states of a layer of each kind, [K, n]."""
    saved_bytes: Any
    """What a layer of each kind keeps for one micro-batch, [K, n]."""
    fixed_forward_s: Any
    """What cannot move on the last chunk of each rank, [R, n]."""
    fixed_backward_s: Any
    moments: Sequence[tuple[Any, Any]]
    """When each rank can be fullest: micro-batches in flight in its chunks, [M, v]; what it holds beside layers, [M, n]."""
    parameters: Sequence[tuple[Any, Any]]
    """Dense ones and those of experts: of a layer of each kind, [K, n], and of what stands at the ends, [R, n], at least."""
    limit_bytes: float
    fewest: tuple[int, ...]
    """Layers that each chunk must hold at least, [C]."""
    most: tuple[int, ...]
    again: int | None = None
    """Layers of each chunk that recompute, see `StageProblem`; None: all alike."""

    def take(self, keep: Any) -> Group:
        """Those of some layouts."""
        columns = (
            "forward_s", "backward_s", "state_bytes", "saved_bytes", "fixed_forward_s", "fixed_backward_s",
        )  # fmt: skip
        return dataclasses.replace(
            self,
            rows=self.rows[keep],
            moments=[(held, base[:, keep]) for held, base in self.moments],
            parameters=[(of_layer[:, keep], at_ends[:, keep]) for of_layer, at_ends in self.parameters],
            **{name: getattr(self, name)[:, keep] for name in columns},
        )

    def one(self, i: int) -> StageProblem:
        """The stage problem at one place of the arrays."""
        return StageProblem(
            ranks=self.ranks,
            chunks_per_rank=self.chunks_per_rank,
            batches=self.batches,
            kinds=self.kinds,
            forward_s=self.forward_s[:, i].tolist(),
            backward_s=self.backward_s[:, i].tolist(),
            state_bytes=self.state_bytes[:, i].tolist(),
            saved_bytes=self.saved_bytes[:, i].tolist(),
            fixed_forward_s=self.fixed_forward_s[:, i].tolist(),
            fixed_backward_s=self.fixed_backward_s[:, i].tolist(),
            moments=[
                [Moment(held=tuple(one), base_bytes=float(at)) for one, at in zip(held.tolist(), base[:, i], strict=True)]
                for held, base in self.moments
            ],
            limit_bytes=self.limit_bytes,
            fewest=self.fewest,
            most=self.most,
            again=self.again,
            level=self.chunks_per_rank > 1,
        )


def split_text(problem: Problem, sizes: Any, alone: bool) -> str:
    """The text of a split by the layers of each chunk."""
    return format_split(split_letters([int(size) for size in sizes], len(problem.model.mtp), head_alone=alone))


@dataclass(frozen=True, slots=True)
class Rest:
    """What a step of layouts takes beside its passes at least, under any split."""

    fixed_s: Any
    """Sends and overhead, [n]."""
    once: Once

    def seconds(self, layouts: Any, micro_batch_s: Any = LONG_S) -> Any:
        """Seconds at some layouts if the slowest rank takes so long for a micro-batch, in the shape of the two together."""
        return self.fixed_s[layouts] + self.once.seconds(layouts, micro_batch_s)


def least_rest(problem: Problem, rows: Layouts, held: StageParameters | None = None) -> Rest:
    """What a step takes beside its passes that no split avoids, or none whose fullest ranks hold these parameters, [n]."""
    profile, workload = problem.profile, problem.workload
    inside, across = send_times(problem.model, profile, workload, rows)
    one = np.where(rows.tp * rows.cp * rows.dp < profile.cluster.domain_gpus, inside, across)
    sends = sends_exposed_s(one, micro_batches(workload, rows), rows.pp, rows.vpp)
    return Rest(STEP.overhead_s + sends, once(problem, rows, held or least_most_parameters(problem.model, rows)))


def least_rest_s(problem: Problem, rows: Layouts) -> Any:
    """Seconds of a step beside its passes that no split avoids, [n]."""
    keys, of_row = rows.distinct(*REST_FIELDS)
    return least_rest(problem, keys).seconds(slice(None))[of_row]


def forms(problem: Problem, rows: Layouts) -> Iterator[Form]:
    """The stage problems of layouts with pp > 1, those of each layout together."""
    found = [(int(row), group.alone, group, i) for group in groups(problem, rows) for i, row in enumerate(group.rows)]
    for row, alone, group, i in sorted(found, key=lambda each: each[:2]):
        yield Form(row, alone, group.one(i))


def groups(problem: Problem, rows: Layouts) -> Iterator[Group]:
    """The stage problems of layouts with pp > 1, in groups."""
    for alone in (False, True) if problem.model.mtp else (False,):
        here = np.flatnonzero((rows.pp > 1) & (rows.pp * rows.vpp > 1 + alone))
        if not len(here):
            continue
        some = rows.take(here)
        layers, chunks = len(problem.model.layers), some.pp * some.vpp
        texts = {int(c): split_text(problem, _even(layers, int(c), alone), alone) for c in np.unique(chunks)}
        places = np.array([list(texts).index(int(c)) for c in chunks])
        table = _Table(problem, some.with_columns(split=places, stages=tuple(texts.values())), alone)
        alike = np.stack([some.pp, some.vpp, table.batches, some.recompute_count])
        keys, inverse = np.unique(alike, axis=1, return_inverse=True)
        for place in range(keys.shape[1]):
            inside = np.flatnonzero(inverse.ravel() == place)
            yield table.group(inside, here[inside])


class _Table:
    """What the stage problems of layouts are made of, on a reference split of each."""

    def __init__(self, problem: Problem, rows: Layouts, alone: bool) -> None:
        self.problem, self.rows, self.alone = problem, rows, alone
        model, profile, workload = problem.model, problem.profile, problem.workload
        pricing = Pricing(model, profile, workload, rows, every_rank=True)
        self.states, layer = pricing.kind_costs().state_bytes, pricing.layer_tables
        self.tables = [layer]
        if any(rows.recompute_counts):  # layers that recompute, and layers that do not
            self.tables = [LayerTables.without_recompute(model, profile, workload, rows, np.arange(len(rows))), layer]
        self.passes = [[np.stack(way) for way in table.pass_seconds(slice(None))] for table in self.tables]
        self.saved = [
            np.stack([np.broadcast_to(b, len(rows)) for b in table.saved_bytes(slice(None))]) for table in self.tables
        ]
        parts = dict(pricing.peak_memory())
        self.still = sum(parts.values()) - sum(parts[name] for name in _MOVES if name in parts)
        self.working = parts["working set"][0]  # a rank without the head has all of it
        self.logits = np.broadcast_to(head_bytes(model, workload, rows), len(rows))
        self.batches = micro_batches(workload, rows)
        keys, of_row = rows.distinct("tp", "ep", "etp")
        units = unit_parameters(model, keys)
        self.parameters = [held[:, of_row] for held in (units.dense, units.expert)]

    def group(self, inside: Any, rows: Any) -> Group:
        """The stage problems at some places, all of the same pipeline and number of micro-batches."""
        model, first = self.problem.model, int(inside[0])
        again = parse_counts(self.rows.recompute_counts[int(self.rows.recompute_count[first])])
        if isinstance(again, tuple):
            raise ProblemError("stage problems take one number of layers that recompute for all chunks")
        # of layers that do not recompute and of those that do, where there are both
        tables = [-1] if again is None else [0, -1]
        passes, saved = [self.passes[i] for i in tables], [self.saved[i] for i in tables]
        pp, vpp = int(self.rows.pp[first]), int(self.rows.vpp[first])
        kinds = len(model.kinds)
        units = chunk_units(model, pp, vpp, self.rows.stages[int(self.rows.split[first])])
        # prediction layers and the head: as layers that do not recompute, where there are such
        fixed = [units[:, -1, kinds:] @ way[kinds:, inside] for way in passes[0]]
        low, high = chunk_sizes(len(model.layers), pp, vpp)
        fewest, most = np.full(pp * vpp, low), np.full(pp * vpp, high)
        fewest[[0, -1]] = 0
        if self.alone:
            fewest[-2], most[-1] = 0, 0
        base = self.still[:pp, inside] - units.sum(axis=1)[:, :kinds] @ self.states[:, inside]
        forward, backward = (np.concatenate([way[i][:kinds, inside] for way in passes]) for i in (0, 1))
        return Group(
            rows=rows,
            alone=self.alone,
            ranks=pp,
            chunks_per_rank=vpp,
            batches=float(self.batches[first]),
            kinds=model.kind_of_layer,
            forward_s=forward,
            backward_s=backward,
            state_bytes=np.concatenate([self.states[:, inside] for _ in tables]),
            saved_bytes=np.concatenate([some[:kinds, inside] for some in saved]),
            fixed_forward_s=fixed[0],
            fixed_backward_s=fixed[1],
            moments=[self._moments(inside, rank, base[rank], len(model.mtp) * saved[0][-1, inside]) for rank in range(pp)],
            parameters=[self._parameters(held[:, inside], pp, len(tables)) for held in self.parameters],
            limit_bytes=self.problem.peak_limit_bytes,
            fewest=tuple(fewest.tolist()),
            most=tuple(most.tolist()),
            again=again,
        )

    def _parameters(self, held: Any, pp: int, copies: int) -> tuple[Any, Any]:
        """Parameters of a layer of each kind, and of what stands at the ends, of those of all units, [units, n].

        The final norm, which moves with the last layer, is left out.
        """
        kinds = len(self.problem.model.kinds)
        ends = np.zeros((pp, held.shape[1]))
        ends[0] += held[kinds]
        ends[-1] += held[kinds + 1]
        if self.problem.model.mtp:  # with a copy of the embedding
            ends[-2 if self.alone else -1] += held[-1] + held[kinds]
        return np.concatenate([held[:kinds]] * copies), ends

    def _moments(self, inside: Any, rank: int, base: Any, predicted: Any) -> tuple[Any, Any]:
        """When a rank can be fullest; `base`: what it holds beside layers and for a moment, [n].

        `predicted`: what prediction layers keep for a micro-batch, [n].
        """
        first = int(inside[0])
        pp, vpp, batches = int(self.rows.pp[first]), int(self.rows.vpp[first]), float(self.batches[first])
        working, logits = self.working[inside], self.logits[inside]
        on_top = self.problem.workload.era.framework == "pytorch"  # see `peak.moment_parts`
        predicted = predicted * (rank == (pp - 2 if self.alone else pp - 1))
        has_head = rank == pp - 1
        if vpp == 1:
            peak = working if not has_head else working + logits if on_top else np.maximum(working, logits)
            held, beside = np.array([[min(batches, float(pp - rank))]]), [base + peak]
        else:
            share = min(batches / pp, 1.0)
            held = _in_flight(pp, vpp, rank, 2 if batches > pp else 1) * share
            beside = [base + working] * len(held)
            if has_head:
                held = np.vstack([held, share * np.array([pp] * (vpp - 1) + [1.0])])
                beside.append(base + logits + working * on_top)
        return held, np.stack(beside) + held[:, -1:] * predicted


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
