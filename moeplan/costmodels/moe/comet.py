"""Comet: overlap at the granularity of tiles, an ideal for schedules in chunks.

Comet (MLSys 2025) decomposes the buffer between all-to-all and grouped GEMM into tiles inside one kernel. Here: FSMoE's three
streams with as many chunks as there are tiles and no start-ups. Without ESP the time is max(all-to-all, experts) and one tile
more. It falls as tiles get more, since each term is a mean of a sum (weight 1 / tiles) and of a smaller maximum; so at the same
number or more it is no longer than any schedule here that gathers the tokens (M) in one piece at the end. FlowMoE gathers a
micro-batch at a time, and may be shorter where tokens are gathered. Units: seconds; numbers or arrays. Nothing runs it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

from moeplan.costmodels.moe.base import Direction, LayerSchedule, Lines, MoeSize, Parts, total
from moeplan.costmodels.moe.fsmoe import three_stream_s, three_streams
from moeplan.costmodels.moe.hierarchical import chunked_serial_s, split_amounts, split_times
from moeplan.costmodels.tasks import Graph


@final
class Comet(LayerSchedule):
    """The degree is the number of tiles."""

    name = "comet"
    title = "tiles on three streams without start-ups: an ideal"
    source = "Comet (MLSys 2025)"
    chunked = True

    def amounts(self, size: MoeSize, direction: Direction) -> Parts:
        """What FSMoE's layout moves."""
        return split_amounts(size, direction)

    def parts(self, size: MoeSize, lines: Lines, degree: Any, direction: Direction) -> Parts:
        """Seconds by kind, without start-ups."""
        slopes = {
            field.name: dataclasses.replace(getattr(lines, field.name), startup_s=0.0) for field in dataclasses.fields(lines)
        }
        return split_times(size, Lines(**slopes), degree, direction)

    def graph(self, degree: int, size: MoeSize) -> Graph:
        """Three streams, each in the order of the text."""
        return three_streams(degree)

    def seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The makespan of the tiles, and the gather of the tokens."""
        return three_stream_s(degree, parts) + total(parts, "M")

    def serial_seconds(self, degree: Any, parts: Parts, size: MoeSize) -> Any:
        """The tiles one after the other."""
        return chunked_serial_s(degree, parts)
