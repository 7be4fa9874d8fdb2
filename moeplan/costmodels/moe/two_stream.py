"""Two streams, all communication in one: PipeMoE, Tutel, and FSMoE's comparison points.

Of each of r chunks: there (D, G), experts (E), back (S, C). Streams are first in, first out: D1 G1 .. Dr Gr, S1 C1 .. Sr Cr,
and E1..Er. With d = D + G, q = S + C the exact makespan is max{d + E + q + (r - 1) max(d, E, q), r (d + q) + R} where the
gradient all-reduce R travels between. Sources: PipeMoE (INFOCOM 2023), which has no ESP (G = S = 0) and whose SLSQP solver
enumeration beats; Tutel (MLSys 2023); FSMoE (ASPLOS 2025), table 5. They differ in where R runs. Units: seconds; numbers or
arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, total
from moeplan.costmodels.moe.hierarchical import chunked_serial_s, split_amounts, split_times
from moeplan.costmodels.tasks import Graph, parse_graph

_AFTER = {"between": "", "after": "R1@inter<M1", "beside dense": "R1@inter<M1 N1@compute<M1"}


@final
@dataclass(frozen=True, kw_only=True)
class TwoStream(LayerSchedule):
    """Chunks on a stream for experts and one for communication."""

    name: str
    title: str
    source: str
    gradients: Literal["between", "after", "beside dense"]
    """Where R runs: between the last dispatch and the first combine; after the layer; or there, beside the dense part of the
    backward, kind N, which is 0 if not said and counts if said."""
    chunked = True

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """What FSMoE's layout moves; PipeMoE's own where esp_ranks = 1."""
        return split_amounts(size, direction)

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        return {**split_times(size, lines, degree, direction), "N": 0.0}

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Two streams, each in the order of the text."""
        between = "R1@inter+intra" if self.gradients == "between" else ""
        return parse_graph(f"{two_streams(degree, between)} {_AFTER[self.gradients]}")

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The makespan of the chunks, the gather of the tokens, what follows."""
        if self.gradients == "between":
            return two_stream_s(degree, parts) + total(parts, "M")
        after_s = total(parts, "R")
        if self.gradients == "beside dense":
            after_s = np.maximum(after_s, total(parts, "N"))
        return two_stream_s(degree, {**parts, "R": 0.0}) + total(parts, "M") + after_s

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The chunks one after the other."""
        return chunked_serial_s(degree, parts) + (total(parts, "N") if self.gradients == "beside dense" else 0.0)


TUTEL = TwoStream(
    name="tutel",
    title="r chunks on two streams, gradients exposed",
    source="Tutel (MLSys 2023) with PipeMoE's degree",
    gradients="after",
)
TUTEL_IMPROVED = TwoStream(
    name="tutel-improved",
    title="r chunks on two streams, gradients beside the dense part only",
    source="FSMoE (ASPLOS 2025), table 5",
    gradients="beside dense",
)
PIPEMOE = TwoStream(
    name="pipemoe",
    title="r chunks on two streams, gradients between dispatch and combine",
    source="PipeMoE (INFOCOM 2023)",
    gradients="between",
)
NO_IIO = TwoStream(
    name="fsmoe-no-iio",
    title="r chunks on two streams, gradients partitioned among layers as in FSMoE",
    source="FSMoE (ASPLOS 2025), table 5",
    gradients="between",
)


def two_streams(degree: int, between: str = "") -> str:
    """Tasks of `degree` chunks on two streams, as text; `between` the last dispatch and the first combine."""
    chunks = range(1, degree + 1)
    there = [f"D{i}@inter+intra G{i}@inter+intra<D{i}" for i in chunks]
    experts = [f"E{i}@compute<G{i}" for i in chunks]
    back = [f"S{i}@inter+intra<E{i} C{i}@inter+intra<S{i}" for i in chunks]
    return " ".join([*there, between, *experts, *back, f"M1@inter+intra<C{degree}"])


def two_stream_s(degree: Any, parts: Parts) -> Any:
    """Exact seconds of the chunks on two streams, with R between the last dispatch and the first combine."""
    there, back, e = total(parts, "DG"), total(parts, "SC"), parts["E"]
    path = there + e + back + (degree - 1) * np.maximum(np.maximum(there, back), e)
    return np.maximum(path, degree * (there + back) + total(parts, "R"))


def exposed_gradient_s(gradient_s: Any, dense_s: Any = 0.0) -> Any:
    """Seconds of a gradient all-reduce that `dense_s` of dense backward does not hide; Tutel hides nothing (0)."""
    return np.maximum(gradient_s - dense_s, 0.0)
