"""What pipeline schedules share: the seconds of the passes, and what every schedule must say of itself.

Seconds are those of one micro-batch on one rank of equal ranks, all its chunks together. A step of m micro-batches takes
m (F + B) and the bubble, in which a rank has nothing to do while the others fill and drain. Units: seconds; numbers or arrays.
Closed forms hold for equal ranks and transfers that take no time; `run.py` runs the orders for all others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from moeplan.costmodels.pipeline.action import Orders
from moeplan.errors import ScheduleError


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSeconds:
    """Seconds of one micro-batch on one rank; numbers or arrays."""

    forward: Any
    """F."""
    backward: Any
    """B, all of it."""
    weight: Any = 0.0
    """W, the part of B that makes the gradients of the weights; nothing waits for it."""
    joined: Any = 0.0
    """F&B, a forward and a backward of two micro-batches run together."""


class PipelineSchedule(ABC):
    """An order of forward and backward passes on every pipeline rank."""

    name: ClassVar[str]
    """Word for options and files: "1f1b"."""
    title: ClassVar[str]
    """What it does, in a line."""
    source: ClassVar[str]
    """Paper or code."""
    copies: ClassVar[int] = 1
    """Times that the ranks hold the parameters."""

    @abstractmethod
    def fault(self, stages: int, chunks: int, batches: int) -> str:
        """What keeps the schedule from these numbers of ranks, chunks a rank and micro-batches; empty: nothing."""

    @abstractmethod
    def rows(self, stages: int, chunks: int, batches: int) -> Orders:
        """The orders, for numbers without fault."""

    @abstractmethod
    def bubble_s(self, stages: Any, chunks: Any, seconds: PassSeconds) -> Any:
        """Seconds of a step in which a rank waits, ranks being equal."""

    @abstractmethod
    def in_flight(self, stages: Any, chunks: Any, rank: Any, batches: Any) -> Any:
        """Micro-batches whose activations a rank holds at its peak, in units of all its chunks."""

    def orders(self, stages: int, chunks: int, batches: int) -> Orders:
        """What every rank does; refuses numbers that the schedule cannot run."""
        for name, value in (("ranks", stages), ("chunks", chunks), ("micro-batches", batches)):
            if value < 1:
                raise ScheduleError(f"a pipeline schedule of {value} {name}", hint="at least 1 is needed")
        if fault := self.fault(stages, chunks, batches):
            raise ScheduleError(f"{self.name}: {fault}")
        return self.rows(stages, chunks, batches)
