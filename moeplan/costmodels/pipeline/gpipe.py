"""GPipe: all forward passes, then all backward passes.

Bubble (p - 1)(F + B), activations of all micro-batches (arXiv:1811.06965, section 2.3). The base that others improve on.
Units: seconds.
"""

from __future__ import annotations

from typing import Any

from moeplan.costmodels.pipeline.action import Action, Orders, loop_route
from moeplan.costmodels.pipeline.base import PassSeconds, PipelineSchedule


class GPipe(PipelineSchedule):
    """All forward, then all backward."""

    name = "gpipe"
    title = "all forward passes, then all backward passes"
    source = "arXiv:1811.06965"

    def fault(self, stages: int, chunks: int, batches: int) -> str:
        """One chunk a rank."""
        return f"one chunk a rank is needed, not {chunks}" if chunks > 1 else ""

    def rows(self, stages: int, chunks: int, batches: int) -> Orders:
        """The same order on every rank; the last micro-batch turns back first."""
        forward = [Action("F", i) for i in range(batches)]
        backward = [Action("B", i) for i in reversed(range(batches))]
        return Orders((tuple(forward + backward),) * stages, (loop_route(stages, 1),), batches)

    def bubble_s(self, stages: Any, chunks: Any, seconds: PassSeconds) -> Any:
        """(p - 1)(F + B)."""
        return (stages - 1) * (seconds.forward + seconds.backward)

    def in_flight(self, stages: Any, chunks: Any, rank: Any, batches: Any) -> Any:
        """All."""
        return batches + 0 * rank
