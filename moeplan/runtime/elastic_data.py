"""Which samples a step consumes, and synthetic ones to train on.

The order of samples is a function of seed, epoch and index alone. A step takes [c, c + G) of it, c samples having been
consumed; replica r of dp takes [c + j b dp + r b, + b) as its micro-batch j of b samples, which is Megatron's map. So the
samples of a step are the same under every layout, and who computes which of them depends on dp and b only.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]

_STRIDES = (1, 2, 3, 5)


def sample_ids(consumed: int, count: int, samples: int, seed: int) -> Ints:
    """The `count` samples of a data set of `samples` that come after the first `consumed`."""
    at = np.arange(consumed, consumed + count, dtype=np.int64)
    ids = np.empty_like(at)
    for epoch in np.unique(at // samples):
        here = at // samples == epoch
        ids[here] = np.random.default_rng([seed, int(epoch)]).permutation(samples)[at[here] % samples]
    return ids


def micro_batches(ids: Ints, dp: int, replica: int, micro_batch: int) -> Ints:
    """[micro-batches, micro_batch]: what a replica takes of the samples of a step."""
    return ids.reshape(-1, dp, micro_batch)[:, replica]


def sequences(ids: Ints, length: int, vocabulary: int, seed: int) -> Ints:
    """[samples, length]: each counts upwards modulo the vocabulary, from a start and by a stride of its own."""
    drawn = [np.random.default_rng([seed, int(sample)]).integers(0, (vocabulary, len(_STRIDES))) for sample in ids]
    starts, kinds = np.array(drawn, np.int64).reshape(-1, 2).T
    strides = np.array(_STRIDES, np.int64)[kinds]
    return (starts[:, None] + strides[:, None] * np.arange(length)) % vocabulary
