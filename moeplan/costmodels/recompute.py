"""How many layers of each pipeline chunk recompute, as text.

The empty text: all; "2": the first two of every chunk, all of a shorter one (Megatron's recompute method `block`);
"4*8|0*24": chunk by chunk, a count and how many chunks have it. Only decoder layers count. Where there is a text, prediction
layers never recompute, as in Megatron (transformer/multi_token_prediction.py: "Skipping recompute").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from moeplan.errors import LayoutError

MOST_CHUNKS = 100_000
"""More chunks than that are taken for a slip."""


def parse_counts(text: str) -> int | tuple[int, ...] | None:
    """None for all layers, one number for every chunk, or a number for each."""
    if not text:
        return None
    if re.fullmatch(r"[0-9]{1,6}", text):
        return int(text)
    if not re.fullmatch(r"[0-9]{1,6}(\*[0-9]{1,6})?(\|[0-9]{1,6}(\*[0-9]{1,6})?)*", text):
        raise LayoutError(
            f"'{text}' does not say how many layers of each chunk recompute",
            hint="write 2 for the first two of every chunk, or '4*8|0*24' for 8 chunks of four and 24 of none",
        )
    runs = [tuple(map(int, f"{run}*1".split("*")[:2])) for run in text.split("|")]
    if sum(repeat for _, repeat in runs) > MOST_CHUNKS:
        raise LayoutError(f"recompute_layers '{text}' is of more than {MOST_CHUNKS} chunks")
    return tuple(count for count, repeat in runs for _ in range(repeat))


def format_counts(counts: Sequence[int]) -> str:
    """Text of a number for each chunk, the inverse of `parse_counts`."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return "|".join(f"{count}*{repeat}" if repeat > 1 or len(runs) == 1 else f"{count}" for count, repeat in runs)


def recomputed_layers(text: str, layers: Sequence[int]) -> list[int]:
    """Layers of each chunk that recompute, where chunks hold `layers`; none above what a chunk holds."""
    said = parse_counts(text)
    if said is None:
        return list(layers)
    counts = [said] * len(layers) if isinstance(said, int) else said
    if len(counts) != len(layers):
        raise LayoutError(f"recompute_layers '{text}' is of {len(counts)} chunks, there are {len(layers)}")
    return [min(count, held) for count, held in zip(counts, layers, strict=True)]


def check_counts(text: str, layers: Sequence[int]) -> str | None:
    """What is wrong with a text where chunks hold `layers`; None if nothing."""
    said = parse_counts(text)
    if said is None or isinstance(said, int):
        return None
    if len(said) != len(layers):
        return f"it is of {len(said)} chunks, pp*vpp = {len(layers)} are needed"
    for chunk, (count, held) in enumerate(zip(said, layers, strict=True)):
        if count > held:
            return f"{count} layers of chunk {chunk} recompute, it has {held}"
    return None
