"""What every rank of a layout holds of the training state, exactly: weights and optimizer states, dense and expert.

A holding is (slots) x (share of the experts) x (share of the elements) of a family of tensors in a state class. A slot is a
layer, the embedding, the head, the final norm or the prediction layers; a tensor that is cut over `parts` ranks lies there in
equal shares, in order, and the sharded optimizer has the i-th of dp*cp/R shares of what its rank computes with (edp/R for
experts), for R replicas. Elements that lie on a border count by the part of them. Units: bytes. Padding of the vocabulary is
nobody's state, and a second copy of a matrix on the same rank is none either. Not valid for optimizers that shard one buffer
of all tensors in another order: their bytes are the same, the borders are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.counts import Shard, Weight, norm_size
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.megatron_counts import layer_weights_held, padded_vocab, prediction_weights_held
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import all_ranks, chunk_letters
from moeplan.costmodels.workload import Workload
from moeplan.errors import LayoutError

FAMILIES = ("cut", "replicated", "vocabulary", "expert")
"""Tensors that are spread alike: over tp, not at all, over tp after padding, over ep and etp."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How one family of tensors lies on the ranks of a stage, in one state class."""

    bytes_each: float
    """Bytes of an element in this class; 0: the class is not kept."""
    sizes: Floats
    """Elements of each slot, [slots]."""
    expert: Ints
    """Which of `experts` equal sets of experts a rank has, [q]; 0 outside experts."""
    experts: int
    part: Ints
    """Which of `parts` equal shares of the elements a rank has, [q]."""
    parts: int
    sharded: bool
    """Whether data parallelism cuts it as well."""
    padded: int = 1
    """Length that is cut into the parts, of which the first `real` is state: rows of the vocabulary; else 1 of 1."""
    real: int = 1

    @property
    def cell(self) -> Ints:
        """Which of the distinct shares of a slot a rank of a stage holds, [q]."""
        return self.expert * self.parts + self.part

    def cell_shares(self) -> Floats:
        """What each distinct share is of a slot, [experts * parts]."""
        start, length = np.arange(self.parts) * self.padded, self.real * self.parts
        held = np.clip(length - start, 0, self.padded)
        return np.tile(held / (length * self.experts), self.experts)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Holdings:
    """The state of a job on its ranks: rank r is position r mod q of stage r div q, node r div `node_gpus` is its host."""

    model: str
    """Name of the model, for messages."""
    stages: int
    positions: int
    """Ranks of a stage, q."""
    node_gpus: int
    """GPUs of a node."""
    present: Bools
    """Whether a stage holds a slot, [stages, slots]."""
    spreads: tuple[Spread, ...]
    """Weights of each of `FAMILIES`, then optimizer states of each."""

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.stages * self.positions

    @property
    def nodes(self) -> int:
        """Nodes that the ranks fill, the last one perhaps in part."""
        return -(-self.world // self.node_gpus)

    def rank_bytes(self) -> Floats:
        """Bytes that each rank holds, [world]."""
        total = np.zeros((self.stages, self.positions))
        for s in self.spreads:
            total += np.outer(s.bytes_each * (self.present @ s.sizes), s.cell_shares()[s.cell])
        return total.reshape(-1)


def holdings(model: Model, workload: Workload, layout: Layout, *, instances: int = 1, node_gpus: int = 8) -> Holdings:
    """What every rank holds under `layout` with `instances` replicas of the sharded optimizer on nodes of `node_gpus` GPUs."""
    _check_instances(model, layout, instances)
    weights, states = _state_bytes(workload, layout)
    sizes, present = _slots(model, layout)
    quantized = workload.precision.quantized_bytes if workload.precision.primary_quantized else 2.0
    # Embedding and head are never quantised.
    each = {family: weights and (2.0 if family == "vocabulary" else quantized) for family in FAMILIES}
    sharded = {"weights": layout.sharding == "fsdp", "states": layout.sharding != "ddp"}
    spreads = [_spread(model, layout, instances, f, each[f], sizes[f], sharded["weights"]) for f in FAMILIES]
    spreads += [_spread(model, layout, instances, f, states, sizes[f], sharded["states"]) for f in FAMILIES]
    return Holdings(
        model=model.name,
        stages=layout.pp,
        positions=layout.tp * layout.cp * layout.dp,
        node_gpus=node_gpus,
        present=present,
        spreads=tuple(spreads),
    )


def _check_instances(model: Model, layout: Layout, instances: int) -> None:
    if instances < 1 or (layout.dp * layout.cp) % instances:
        raise LayoutError(
            f"{instances} optimizer replicas do not divide the dp*cp = {layout.dp * layout.cp} ranks with the same weights",
            hint="use a divisor",
        )
    if model.moe and layout.edp % instances:
        raise LayoutError(
            f"{instances} optimizer replicas do not divide the edp = {layout.edp} ranks with the same experts",
            hint=f"use a divisor of {math.gcd(layout.edp, layout.dp * layout.cp)}",
        )


def _state_bytes(workload: Workload, layout: Layout) -> tuple[float, float]:
    """Bytes of a weight (1: kept in the recipe's precision, 0: not apart) and of the optimizer states of a parameter."""
    # PyTorch's FSDP shards fp32 weights that are the optimizer's own.
    masters = layout.sharding == "fsdp" and workload.era.framework == "pytorch"
    return 0.0 if masters else 1.0, 4.0 + 2.0 * workload.moment_bytes


def _spread(model: Model, layout: Layout, instances: int, family: str, each: float, sizes: Floats, sharded: bool) -> Spread:
    """One family in one class; `sharded`: cut over data parallelism too."""
    rank = np.arange(layout.tp * layout.cp * layout.dp)
    if family == "expert":
        cut, replica, replicas = layout.etp, rank // (layout.etp * layout.ep), layout.edp
        expert, experts = rank // layout.etp % layout.ep, layout.ep
    else:
        cut, replica, replicas = 1 if family == "replicated" else layout.tp, rank // layout.tp, layout.dp * layout.cp
        expert, experts = 0 * rank, 1
    # Ranks of dense models have no experts, and then no replicas of them that the instances must divide.
    shards = max(replicas // instances, 1) if sharded else 1
    rows = (padded_vocab(model, layout.tp), model.vocab) if family == "vocabulary" else (1, 1)
    return Spread(
        bytes_each=each,
        sizes=sizes,
        expert=expert,
        experts=experts,
        part=rank % cut * shards + replica % shards,
        parts=cut * shards,
        sharded=shards > 1,
        padded=rows[0],
        real=rows[1],
    )


def _slots(model: Model, layout: Layout) -> tuple[dict[str, Floats], Bools]:
    """Elements of every slot by family, and the stages that hold it: layers, embedding, positions, head, norm, prediction."""
    ranks = all_ranks(model, layout.pp, layout.vpp, layout.stages)
    kinds = [_elements(layer_weights_held(kind, model)) for kind in model.kinds]
    vocabulary = model.vocab * model.hidden
    positions = model.max_positions * model.hidden if model.position == "learned" else 0
    ends = [
        (0, 0, vocabulary, 0),
        (0, positions, 0, 0),
        (0, 0, 0 if model.tied else vocabulary, 0),
        (0, norm_size(model), 0, 0),
    ]
    table = np.array([*(kinds[k] for k in model.kind_of_layer), *ends, _elements(prediction_weights_held(model))], np.float64)
    present = np.zeros((layout.pp, len(table)), np.bool_)
    layer = 0
    for c, chunk in enumerate(chunk_letters(model, layout.pp, layout.vpp, layout.stages)):
        count = chunk.count("t")
        present[c % layout.pp, layer : layer + count] = True
        layer += count
    copies, head = ranks.copies > 0, ranks.head > 0
    # A tied head is a copy of the embedding.
    present[:, layer:] = np.column_stack([copies | (head & model.tied), copies, head, ranks.norms > 0, ranks.mtp > 0])
    return dict(zip(FAMILIES, table.T, strict=True)), present


def _elements(weights: Iterable[Weight]) -> tuple[int, int, int, int]:
    """Elements by family."""
    found = dict.fromkeys(FAMILIES, 0)
    for weight in weights:
        family = "expert" if weight.shard.is_expert else "cut" if weight.shard is not Shard.REPLICATED else "replicated"
        found[family] += weight.size
    return found["cut"], found["replicated"], found["vocabulary"], found["expert"]
