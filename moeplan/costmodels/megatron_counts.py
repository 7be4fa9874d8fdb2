"""Parameters that one rank holds when Megatron-LM runs a model, exact to the last one (megatron-core 0.19.2).

A weight of a dense part is cut over `tp` ranks or replicated, a weight of routed experts is cut over `ep` x `etp`; `counts.py`
says which (`Shard`). What Megatron adds to the published weights: the vocabulary is padded to a multiple of
`VOCAB_MULTIPLE` x tp; a tied head is a second copy of the embedding on the last stage; prediction (MTP) layers bring a copy of
the embedding to their stage; latent attention without query compression has one more norm; selection biases are no parameters.
Degrees are numbers or integer arrays, results likewise. Fewer key/value heads than `tp` are cut all the same: the ranks
gather the projection's output. Not valid for degrees that do not divide the sizes, which Megatron refuses, and for models that
Megatron does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.counts import Shard, Weight, layer_weights, mtp_weights, norm_size
from moeplan.costmodels.model import LatentAttention, Layer, Model

VOCAB_MULTIPLE = 128
"""Megatron's default of `--make-vocab-size-divisible-by`."""

Number = TypeVar("Number", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters on one rank, numbers or arrays; data parallelism reduces the two parts over different groups."""

    dense: Any
    """Outside the routed experts; replicated or sharded over dp."""
    expert: Any
    """In the routed experts; replicated or sharded over edp."""

    def __add__(self, other: Held) -> Held:
        return Held(self.dense + other.dense, self.expert + other.expert)


def layer_held(layer: Layer, model: Model, tp: Number, ep: Number, etp: Number) -> Held:
    """What a rank holds of one decoder layer."""
    return _held(layer_weights_held(layer, model), tp, ep, etp)


def prediction_held(model: Model, tp: Number, ep: Number, etp: Number) -> Held:
    """What a rank holds of all prediction (MTP) layers, without the copy of the embedding that stands beside them."""
    return _held(prediction_weights_held(model), tp, ep, etp)


def padded_vocab(model: Model, tp: Number) -> Number:
    """Rows of the embedding after padding."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-model.vocab // multiple) * multiple


def embedding_held(model: Model, tp: Number) -> Held:
    """What a rank of the first stage, or of the stage with the prediction layers, holds of the embedding."""
    positions = model.max_positions * model.hidden if model.position == "learned" else 0
    return Held(padded_vocab(model, tp) // tp * model.hidden + positions, 0 * tp)


def head_held(model: Model, tp: Number, *, shares_embedding: bool = False) -> Held:
    """What a rank of the last stage holds of the output head; `shares_embedding`: its chunk holds the embedding too."""
    rows = 0 * tp if model.tied and shares_embedding else padded_vocab(model, tp) // tp
    return Held(rows * model.hidden, 0 * tp)


def final_norm_held(model: Model) -> Held:
    """The norm after the last decoder layer. It stands with the head, and beside that layer if there are prediction layers."""
    return Held(norm_size(model), 0)


def layer_weights_held(layer: Layer, model: Model) -> Iterable[Weight]:
    """The weights of one decoder layer as Megatron builds them, before they are cut."""
    for weight in layer_weights(layer, model):
        if weight.name != "expert_bias":
            yield weight
    for block in layer.blocks:
        if isinstance(block, LatentAttention) and not block.q_rank:
            # The norm that would follow the query compression is fused into the query projection all the same.
            yield Weight("query_norm", model.hidden, 1, Shard.REPLICATED, gemm=False)


def prediction_weights_held(model: Model) -> Iterable[Weight]:
    """The weights of all prediction (MTP) layers, before they are cut."""
    for layer in model.mtp[:1] if model.mtp_shared else model.mtp:
        yield from layer_weights_held(layer, model)
        yield from mtp_weights(model)


def _held(weights: Iterable[Weight], tp: Number, ep: Number, etp: Number) -> Held:
    dense, expert = 0 * tp, 0 * (ep * etp)
    for weight in weights:
        match weight.shard:
            case Shard.COLUMN | Shard.ROW:
                dense = dense + weight.size // tp
            case Shard.REPLICATED:
                dense = dense + weight.size
            case Shard.EXPERT_COLUMN | Shard.EXPERT_ROW:
                expert = expert + weight.size // (ep * etp)
    return Held(dense, expert)
