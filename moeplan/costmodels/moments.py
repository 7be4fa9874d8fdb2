"""Micro-batches in flight in each chunk of a rank of interleaved 1F1B, at the moments when the rank can be fullest.

Micro-batches pass chunk after chunk in groups (order of Megatron-Core, pipeline_parallel/schedules.py). From the first backward
to the last forward the sum over the chunks stays the same, but forwards fill the first chunks while backwards empty the last,
so that a rank whose first chunk keeps most is fullest later. Counts rise or fall evenly between the moments when either passes
on to another chunk, and repeat themselves after one group in all chunks. Units: micro-batches. Valid where groups are full.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def compositions(group: int, chunks: int, passes: Any, batches: Any) -> Ints:
    """Micro-batches in flight in each chunk, [..., 2 chunks + 2, chunks]; the first moment is the first backward.

    `passes`: forwards that a rank has begun at its first backward, [...]; moments that a short step has not repeat its last.
    """
    every = np.asarray(batches * chunks)[..., None]
    ahead = np.minimum(np.asarray(passes)[..., None], every)
    starts = group * np.arange(chunks + 1)
    # backwards that have ended: where they pass on to a chunk, or forwards do, [..., moments]
    done = np.concatenate(np.broadcast_arrays(starts, starts + -ahead % group), axis=-1)
    done = np.minimum(done, every - ahead)
    held: Ints = entered(group, chunks, ahead + done) - entered(group, chunks, done)[..., ::-1]
    return held


def entered(group: int, chunks: int, passes: Ints) -> Ints:
    """Micro-batches among a rank's first passes that entered each chunk, [..., chunks]."""
    rounds, rest = np.divmod(np.asarray(passes)[..., None], group * chunks)
    out: Ints = rounds * group + np.clip(rest - group * np.arange(chunks), 0, group)
    return out
