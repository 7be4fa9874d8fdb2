"""DualPipe: micro-batches from both ends of the pipeline, forward and backward passes of two of them run together.

Rank r of p holds stage r (chunk 0, for micro-batches that enter at rank 0) and stage p - 1 - r (chunk 1, for those that enter
at the last rank): parameters twice. In the middle of the step a forward of one way and a backward of the other run as one,
F&B, in which the exchange of either hides behind the compute of the other. Bubble (p/2 - 1)(F&B + B - 3 W), p + 1 micro-batches
in flight (arXiv:2412.19437, section 3.2.1, table 2; the order is that of deepseek-ai/DualPipe, dualpipe.py). Needs an even
number of ranks and of micro-batches, 2 p of them or more. Units: seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.pipeline.action import Action, Order, Orders
from moeplan.costmodels.pipeline.base import PassSeconds, PipelineSchedule


class DualPipe(PipelineSchedule):
    """Both ways at once."""

    name = "dualpipe"
    title = "micro-batches from both ends, forward and backward together"
    source = "arXiv:2412.19437"
    copies = 2

    def fault(self, stages: int, chunks: int, batches: int) -> str:
        """Two chunks a rank, even numbers, 2 p micro-batches."""
        if chunks != 2:
            return f"two chunks a rank are needed, one for each way, not {chunks}"
        if stages % 2 or batches % 2:
            return f"{stages} ranks and {batches} micro-batches: both must be even"
        return f"{batches} micro-batches are fewer than twice the {stages} ranks" if batches < 2 * stages else ""

    def rows(self, stages: int, chunks: int, batches: int) -> Orders:
        """The orders of both halves of the ranks, which mirror each other."""
        down = tuple((rank, 0) for rank in range(stages))
        up = tuple((rank, 1) for rank in reversed(range(stages)))
        return Orders(tuple(_Rank(rank, stages, batches).order() for rank in range(stages)), (down, up), batches)

    def bubble_s(self, stages: Any, chunks: Any, seconds: PassSeconds) -> Any:
        """(p/2 - 1)(F&B + B - 3 W)."""
        return (stages / 2 - 1) * (seconds.joined + seconds.backward - 3 * seconds.weight)

    def in_flight(self, stages: Any, chunks: Any, rank: Any, batches: Any) -> Any:
        """p + 1, each through one of the two chunks."""
        return np.minimum(batches, stages + 1) + 0 * rank


class _Rank:
    """The order of one rank; way 0 is the one whose start is nearer, way 1 the other."""

    def __init__(self, rank: int, stages: int, batches: int) -> None:
        self.near, self.half, self.each = min(rank, stages - 1 - rank), stages // 2, batches // 2
        self.first = int(rank >= self.half)
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.late: list[Action] = []
        self.out: list[Action] = []

    def order(self) -> Order:
        """The eight parts of a step."""
        near, rest = self.near, self.half - self.near - 1
        # 1. forwards of the near way, until the other's arrive
        for _ in range(2 * rest):
            self._forward(0)
        # 2. forwards of both ways
        for _ in range(near + 1):
            self._forward(0)
            self._forward(1)
        # 3. backwards of the other way, their weight gradients apart
        for _ in range(rest):
            self._backward(1, split=True)
            self._weight()
            self._forward(1)
        # 4. forwards and backwards together, ways in turn; the middle ranks begin with a pair that nothing would hide
        for i in range(self.each - 2 * self.half + near + 1):
            if i == 0 and rest == 0:
                self._forward(0)
                self._backward(1)
            else:
                self._both(0, 1)
            self._both(1, 0)
        # 5. the last forwards
        for _ in range(rest):
            self._backward(1)
            self._both(1, 0)
        # 6. backwards of both ways, weight gradients of the second half left for later
        split = False
        for i in range(near + 1):
            split = split or (i == (near + 1) // 2 and near % 2 == 1)
            self._backward(1, split=split)
            split = split or (i == (near + 1) // 2 and near % 2 == 0)
            self._backward(0, split=split)
        # 7. backwards of the near way between what was left
        for _ in range(rest):
            self._weight()
            self._backward(0, split=True)
        # 8. what is still left
        while self.late:
            self._weight()
        return tuple(self.out)

    def _next(self, counts: list[int], way: int) -> tuple[int, int]:
        """The next micro-batch of a way, and the chunk that it passes."""
        chunk = way ^ self.first
        counts[way] += 1
        return chunk * self.each + counts[way] - 1, chunk

    def _forward(self, way: int, joined: bool = False) -> None:
        self.out.append(Action("F", *self._next(self.forwards, way), joined))

    def _backward(self, way: int, split: bool = False) -> None:
        batch, chunk = self._next(self.backwards, way)
        self.out.append(Action("I" if split else "B", batch, chunk))
        if split:
            self.late.append(Action("W", batch, chunk))

    def _both(self, forward: int, backward: int) -> None:
        self._forward(forward, joined=True)
        self._backward(backward)

    def _weight(self) -> None:
        self.out.append(self.late.pop(0))
