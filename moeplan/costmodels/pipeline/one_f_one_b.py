"""1F1B: each rank runs forward until its first micro-batch returns, then one forward and one backward in turn.

Rank r of p runs p - 1 - r micro-batches ahead. Bubble (p - 1)(F + B), at most p - r micro-batches in flight (PipeDream-flush,
arXiv:2006.09503, section 2.2; Megatron-Core, pipeline_parallel/schedules.py). Units: seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.pipeline.action import Action, Orders, loop_route
from moeplan.costmodels.pipeline.base import PassSeconds, PipelineSchedule


class OneForwardOneBackward(PipelineSchedule):
    """One forward, one backward."""

    name = "1f1b"
    title = "one forward and one backward in turn"
    source = "arXiv:2006.09503"

    def fault(self, stages: int, chunks: int, batches: int) -> str:
        """One chunk a rank."""
        return f"one chunk a rank is needed, not {chunks}; 'interleaved' runs several" if chunks > 1 else ""

    def rows(self, stages: int, chunks: int, batches: int) -> Orders:
        """Forwards ahead, pairs, backwards left."""
        rows = []
        for rank in range(stages):
            ahead = min(stages - 1 - rank, batches)
            row = [Action("F", i) for i in range(ahead)]
            for i in range(ahead, batches):
                row += [Action("F", i), Action("B", i - ahead)]
            rows.append((*row, *(Action("B", i) for i in range(batches - ahead, batches))))
        return Orders(tuple(rows), (loop_route(stages, 1),), batches)

    def bubble_s(self, stages: Any, chunks: Any, seconds: PassSeconds) -> Any:
        """(p - 1)(F + B)."""
        return (stages - 1) * (seconds.forward + seconds.backward)

    def in_flight(self, stages: Any, chunks: Any, rank: Any, batches: Any) -> Any:
        """p - r."""
        return np.minimum(batches, stages - rank)
