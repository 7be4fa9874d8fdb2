"""Zero bubble, ZB-H1 (ZB1P): the backward in two halves, and weight gradients where a rank would wait.

Only the gradient of the input (I) is passed on; those of the weights (W) can come later. Rank r of p delays its W by r
micro-batches, so that its neighbours get theirs sooner, and fills its waits at the end with what was delayed. Bubble
(p - 1)(F + B - 2 W) with B = I + W (arXiv:2401.10241, section 2: (p - 1)(F + I - W)); p micro-batches in flight on every rank,
the same peak as 1F1B. Exact where W is no longer than F nor than I, with p micro-batches or more; elsewhere a lower bound.
Units: seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.pipeline.action import Action, Orders, loop_route
from moeplan.costmodels.pipeline.base import PassSeconds, PipelineSchedule


class ZeroBubble(PipelineSchedule):
    """Split backward passes, weight gradients late."""

    name = "zero-bubble"
    title = "1F1B whose weight gradients fill the waits (ZB-H1)"
    source = "arXiv:2401.10241"

    def fault(self, stages: int, chunks: int, batches: int) -> str:
        """One chunk a rank."""
        return f"one chunk a rank is needed, not {chunks}" if chunks > 1 else ""

    def rows(self, stages: int, chunks: int, batches: int) -> Orders:
        """Forwards ahead; forward, I and the W of r micro-batches before in turn; I and W in turn; W."""
        rows = []
        for rank in range(stages):
            ahead = min(stages - 1 - rank, batches)
            row = [Action("F", i) for i in range(ahead)]
            for i in range(batches):
                if i + ahead < batches:
                    row.append(Action("F", i + ahead))
                row.append(Action("I", i))
                if i >= rank:
                    row.append(Action("W", i - rank))
            rows.append((*row, *(Action("W", i) for i in range(max(0, batches - rank), batches))))
        return Orders(tuple(rows), (loop_route(stages, 1),), batches)

    def bubble_s(self, stages: Any, chunks: Any, seconds: PassSeconds) -> Any:
        """(p - 1)(F + B - 2 W)."""
        return (stages - 1) * (seconds.forward + seconds.backward - 2 * seconds.weight)

    def in_flight(self, stages: Any, chunks: Any, rank: Any, batches: Any) -> Any:
        """p: those in flight and those whose W is still to come."""
        return np.minimum(batches, stages + 0 * rank)
