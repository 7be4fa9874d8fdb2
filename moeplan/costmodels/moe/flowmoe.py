"""FlowMoE: micro-batches through attention, dispatch, experts and combine in one pipeline.

FlowMoE (NeurIPS 2025). Each of m micro-batches runs t (AT: attention and gate), d (D, G), e (E), c (S, C, M); compute works on
AT1..ATm, E1..Em, communication on d1..dm, c1..cm, in this order. One block takes exactly max{t + d + e + c + (m-1) max(t, d,
e, c), m t + e + c + (m-1) max(e, c), t + d + (m-1) max(t, d) + m c}; backward is the mirror image, its kinds named forward.
Across blocks AT of the next waits for c of its micro-batch, and gradients of a block travel in pieces that yield to
all-to-alls: see `blocks`. Units: seconds; numbers or arrays. Not valid where a micro-batch cannot be cut.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, total
from moeplan.costmodels.moe.hierarchical import split_amounts, split_times
from moeplan.costmodels.tasks import Graph, parse_graph

LINKS = "inter+intra"


@final
class FlowMoe(LayerSchedule):
    """One block; AT is the attention and gate of one micro-batch, 0 if not said; R follows, exposed."""

    name = "flowmoe"
    title = "m micro-batches pipelined through attention, dispatch, experts, combine"
    source = "FlowMoE (NeurIPS 2025)"
    chunked = True

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """What FSMoE's layout moves; FlowMoE's own where esp_ranks = 1."""
        return split_amounts(size, direction)

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind; a micro-batch gathers its own tokens.

        Backward, kinds keep the names of what they mirror: S gathers, G scatters and then gathers the tokens.
        """
        gather_s = lines.mp_gather.among_s(size.token_bytes / degree, size.closing_ranks)
        whole = {**split_times(size, lines, degree, direction), "M": gather_s, "AT": 0.0}
        if direction == "forward":
            return whole
        return {**whole, "S": whole["G"], "G": whole["S"] + gather_s, "M": 0.0}

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """The forward block, whose mirror image the backward is, then R."""
        return parse_graph(f"{_forward(0, degree)} R1@inter<M{degree}")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The makespan of the block, and R."""
        t, d, e, c = parts.get("AT", 0.0), total(parts, "DG"), parts["E"], total(parts, "SCM")
        more = degree - 1
        path = t + d + e + c + more * np.maximum(np.maximum(t, d), np.maximum(e, c))
        compute = degree * t + e + c + more * np.maximum(e, c)
        links = t + d + more * np.maximum(t, d) + degree * c
        return np.maximum(np.maximum(path, compute), links) + total(parts, "R")

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The micro-batches one after the other."""
        return degree * (total(parts, "DGESCM") + parts.get("AT", 0.0)) + total(parts, "R")


def blocks(count: int, degree: int, direction: Direction, pieces: int = 0) -> Graph:
    """`count` blocks of `degree` micro-batches; backward, the gradients of each follow in `pieces`, R a piece."""
    make = _backward if direction == "backward" else _forward
    texts = []
    for block in range(count):
        texts.append(make(block, degree))
        last = (block + 1) * degree
        texts += [f"R{block * pieces + i}@{LINKS}<AT{last}!-1" for i in range(1, pieces + 1)]
    return parse_graph(" ".join(texts))


def _numbers(block: int, degree: int) -> tuple[range, int]:
    """Numbers of a block's tasks, and how far those of the block before are behind; no block stands before the first."""
    return range(block * degree + 1, (block + 1) * degree + 1), degree if block else 0


def _forward(block: int, degree: int) -> str:
    numbers, shift = _numbers(block, degree)
    attention = [f"AT{i}@compute<M{i - shift}" if shift else f"AT{i}@compute" for i in numbers]
    there = [f"D{i}@{LINKS}<AT{i} G{i}@{LINKS}<D{i}" for i in numbers]
    back = [f"S{i}@{LINKS}<E{i} C{i}@{LINKS}<S{i} M{i}@{LINKS}<C{i}" for i in numbers]
    return " ".join([*attention, *there, *(f"E{i}@compute<G{i}" for i in numbers), *back])


def _backward(block: int, degree: int) -> str:
    numbers, shift = _numbers(block, degree)
    waits = [f"<AT{i - shift}" if shift else "" for i in numbers]
    there = [f"C{i}@{LINKS}{wait} S{i}@{LINKS}<C{i}" for i, wait in zip(numbers, waits, strict=True)]
    back = [f"G{i}@{LINKS}<E{i} D{i}@{LINKS}<G{i}" for i in numbers]
    attention = [f"AT{i}@compute<D{i}" for i in numbers]
    return " ".join([*there, *(f"E{i}@compute<S{i}" for i in numbers), *back, *attention])
