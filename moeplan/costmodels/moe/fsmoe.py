"""FSMoE: one MoE layer in r chunks on three streams.

FSMoE (ASPLOS 2025, arXiv 2501.10714), section 4. Of each chunk: all-to-all (D), gather among ESP (G), experts (E),
reduce-scatter (S), all-to-all (C). Streams are first in, first out: inter-node D1..Dr, R, C1..Cr; intra-node G1..Gr, S1..Sr;
compute E1..Er, where R is a part of the gradient all-reduce (backward only). `three_stream_s` is the exact makespan. The four
cases of the paper (`paper_s`) assume G = S and are a lower bound elsewhere, so they serve for comparison only; its twelve
conditions say no more than a maximum. Backward, alpha and beta of the experts double, not also the FLOP (the paper's "twice"
for all three would quadruple). The paper solves for r with SLSQP and rounds; `choice.py` enumerates r. Units: seconds; numbers
or arrays.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, total
from moeplan.costmodels.moe.hierarchical import chunked_serial_s, split_amounts, split_times
from moeplan.costmodels.tasks import Graph, parse_graph

DEGREES = (1, 2, 4, 8)
"""Numbers of chunks that the published solver allows."""


@final
class FsMoe(LayerSchedule):
    """Experts, intra-node and inter-node communication overlap; gradients fill the inter-node stream."""

    name = "fsmoe"
    title = "r chunks on three streams: experts, inside a node, between nodes"
    source = "FSMoE (ASPLOS 2025), section 4"
    chunked = True

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """What FSMoE's layout moves."""
        return split_amounts(size, direction)

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        return split_times(size, lines, degree, direction)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Three streams, each in the order of the text."""
        return three_streams(degree)

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The makespan of the chunks, and the gather of the tokens."""
        return three_stream_s(degree, parts) + total(parts, "M")

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The chunks one after the other."""
        return chunked_serial_s(degree, parts)


def three_streams(degree: int) -> Graph:
    """Tasks of `degree` chunks on three streams."""
    chunks = range(1, degree + 1)
    there = [f"D{i}@inter G{i}@intra<D{i}" for i in chunks]
    experts = [f"E{i}@compute<G{i}" for i in chunks]
    back = [f"S{i}@intra<E{i} C{i}@inter<S{i}" for i in chunks]
    return parse_graph(" ".join([*there, "R1@inter", *experts, *back, f"M1@intra<C{degree}"]))


def three_stream_s(degree: Any, parts: Parts) -> Any:
    """Exact seconds of the chunks on three streams, with R between the last dispatch and the first combine.

    The longest of: one chunk and the slowest part of the others; the intra-node stream; the inter-node stream.
    """
    d, g, e, s, c = (parts.get(kind, 0.0) for kind in "DGESC")
    there, back, more = np.maximum(d, g), np.maximum(s, c), degree - 1
    path = (d + g) + e + (s + c) + more * np.maximum(np.maximum(there, back), e)
    intra = (d + g) + (s + c) + more * (there + back)
    return np.maximum(np.maximum(path, intra), inter_node_s(degree, parts) + total(parts, "R"))


def inter_node_s(degree: Any, parts: Parts) -> Any:
    """Seconds that the all-to-alls of all chunks keep the inter-node stream busy."""
    return degree * (parts["D"] + parts["C"])


def window_s(degree: Any, parts: Parts) -> Any:
    """Seconds of gradient all-reduce that fit in the three-stream schedule without lengthening it."""
    return three_stream_s(degree, {**parts, "R": 0.0}) - inter_node_s(degree, parts)


def _paper_cases_s(degree: Any, parts: Parts) -> tuple[Any, Any, Any]:
    """Bounds of the paper: inter-node (1), experts (2), and all-to-all (3) or intra-node (4) as a > g or not."""
    twice, both = parts["D"] + parts["C"], total(parts, "GS")
    third = np.where(np.asarray(parts["D"]) > parts.get("G", 0.0), degree * twice + both, twice + degree * both)
    return degree * twice + total(parts, "R"), twice + both + degree * parts["E"], third


def paper_s(degree: Any, parts: Parts) -> Any:
    """Seconds by the paper's four cases (section 4.2); exact where G = S, never above the makespan."""
    first, second, third = _paper_cases_s(degree, parts)
    return np.maximum(np.maximum(first, second), third)


def paper_case(degree: Any, parts: Parts) -> Any:
    """Which of the paper's cases holds: 1 inter-node, 2 experts, 3 all-to-all, 4 intra-node bound."""
    first, second, third = _paper_cases_s(degree, parts)
    rest = np.where(second > third, 2, np.where(np.asarray(parts["D"]) > parts.get("G", 0.0), 3, 4))
    return np.where(first > np.maximum(second, third), 1, rest)
