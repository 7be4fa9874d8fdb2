"""Lina: two streams, and gradients in chunks that yield to all-to-alls.

Lina (ATC 2023); FSMoE (ASPLOS 2025) pairs it with PipeMoE's degree and gives 30 MB a chunk. The communication stream works by
priority without interrupting: an all-to-all waits for at most one chunk of gradients, alpha + beta x chunk, and chunks fill
the gaps. The makespan has no closed form: `seconds` runs the event loop once an element, slow on large arrays. Units: bytes,
seconds. Not valid where gradients arrive later than the layer begins.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta, Direction, LayerSchedule, Lines, MoeSize, Parts
from moeplan.costmodels.moe.hierarchical import chunked_serial_s, split_amounts, split_times
from moeplan.costmodels.moe.two_stream import two_streams
from moeplan.costmodels.simulate import simulate
from moeplan.costmodels.tasks import Graph, parse_graph

CHUNK_BYTES = 30e6
"""Bytes of a chunk of gradients, as FSMoE cites them."""


@final
@dataclass(frozen=True, kw_only=True)
class Lina(LayerSchedule):
    """Gradients in pieces of lower priority; R is one piece."""

    name = "lina"
    title = "r chunks on two streams, gradients in pieces that yield to all-to-alls"
    source = "Lina (ATC 2023) with PipeMoE's degree"
    chunked = True

    pieces: int = 1
    """Pieces of gradients that are pending, see `pieces_of`."""

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """What FSMoE's layout moves."""
        return split_amounts(size, direction)

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind."""
        return split_times(size, lines, degree, direction)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Two streams; on communication the first that is ready, pieces of gradients last."""
        return _graph(degree, self.pieces)

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """Simulated, an element at a time."""
        given = {**dict.fromkeys("DGESCMR", 0.0), **parts}
        columns = np.broadcast_arrays(degree, *given.values())
        rows = zip(*(column.ravel().tolist() for column in columns), strict=True)
        took = [simulate(_graph(int(r), self.pieces), dict(zip(given, row, strict=True))).makespan_s for r, *row in rows]
        return np.reshape(took, columns[0].shape)[()]

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """Chunks and pieces one after the other."""
        return chunked_serial_s(degree, parts) + (self.pieces - 1) * parts.get("R", 0.0)


@functools.lru_cache(maxsize=64)
def _graph(degree: int, pieces: int) -> Graph:
    gradients = " ".join(f"R{i}@inter+intra!-1" for i in range(1, pieces + 1))
    return parse_graph(f"{two_streams(degree)} {gradients}")


def pieces_of(gradient_bytes: Any, chunk_bytes: Any = CHUNK_BYTES) -> Any:
    """Pieces into which gradients are cut, all of one size, none larger than a chunk; numbers or arrays."""
    return np.ceil(gradient_bytes / np.asarray(chunk_bytes)).astype(int)


def delay_s(line: AlphaBeta, chunk_bytes: Any = CHUNK_BYTES) -> Any:
    """Seconds for which an all-to-all waits for gradients at most."""
    return line.time_s(chunk_bytes)
