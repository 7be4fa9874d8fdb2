"""Interleaved 1F1B: every rank holds several chunks of the model, and micro-batches loop through the ranks.

Micro-batches go in groups (of p, unless a larger one is set): a group through one chunk, then through the next. Rank r of p
with v chunks runs 2 (p - 1 - r) + (v - 1) group passes ahead, then one forward and one backward in turn. Bubble
(p - 1)(F + B) / v (arXiv:2104.04473, section 2.2). Order and refusals are Megatron-Core's
(pipeline_parallel/schedules.py: `get_schedule_table`, `get_pp_rank_microbatches`). With its expert all-to-all overlap
(`ahead` = 1) every rank runs one further pass ahead. Units: seconds. The bubble holds where groups are full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.moments import Ints, compositions
from moeplan.costmodels.pipeline.action import Action, Orders, loop_route
from moeplan.costmodels.pipeline.base import PassSeconds, PipelineSchedule


@dataclass(frozen=True)
class Interleaved(PipelineSchedule):
    """Several chunks a rank, one forward and one backward in turn."""

    name = "interleaved"
    title = "1F1B over several chunks a rank"
    source = "arXiv:2104.04473"

    group: int = 0
    """Micro-batches that pass a chunk one after the other (Megatron's microbatch_group_size_per_vp_stage); 0: p of them."""
    ahead: int = 0
    """Passes that every rank runs ahead beyond those that the pipeline needs."""

    def fault(self, stages: int, chunks: int, batches: int) -> str:
        """Two ranks or more, and no group of fewer micro-batches than ranks."""
        group = self.group or stages
        if stages < 2 and chunks > 1:
            return f"{chunks} chunks on one rank; two ranks or more are needed"
        if group < stages:
            return f"groups of {group} micro-batches are smaller than the {stages} ranks"
        if chunks > 1 and group > batches:
            return f"{batches} micro-batches do not fill one group of {group}"
        left = batches % group
        if chunks > 1 and 0 < left < stages:
            return f"{batches} micro-batches leave {left} beside groups of {group}: 0, or at least {stages}, may be left"
        return ""

    def rows(self, stages: int, chunks: int, batches: int) -> Orders:
        """Forwards ahead, pairs, backwards left."""
        group = self.group or stages
        runs = [range(start, min(start + group, batches)) for start in range(0, batches, group)]
        there = [Action("F", i, c) for run in runs for c in range(chunks) for i in run]
        back = [Action("B", i, c) for run in runs for c in reversed(range(chunks)) for i in run]
        rows = []
        for rank in range(stages):
            ahead = min(self._ahead(stages, chunks, rank), len(there))
            row = there[:ahead]
            for forward, backward in zip(there[ahead:], back, strict=False):
                row += [forward, backward]
            rows.append((*row, *back[len(there) - ahead :]))
        return Orders(tuple(rows), (loop_route(stages, chunks),), batches)

    def bubble_s(self, stages: Any, chunks: Any, seconds: PassSeconds) -> Any:
        """(p - 1)(F + B) / v."""
        return (stages - 1) * (seconds.forward + seconds.backward) / chunks

    def in_flight(self, stages: Any, chunks: Any, rank: Any, batches: Any) -> Any:
        """Passes ahead and one more, over v."""
        return np.minimum(batches * chunks, self._ahead(stages, chunks, rank) + 1) / chunks

    def compositions(self, stages: int, chunks: int, rank: int, batches: int) -> Ints:
        """Micro-batches in flight in each chunk of a rank when it may be fullest, [moments, chunks]; groups are full."""
        passes = self._ahead(stages, chunks, rank) + 1
        held: Ints = np.unique(compositions(self.group or stages, chunks, passes, batches), axis=0)
        return held

    def _ahead(self, stages: Any, chunks: Any, rank: Any) -> Any:
        """Passes that a rank runs forward before the forward that its first backward follows."""
        return 2 * (stages - 1 - rank) + (chunks - 1) * (self.group or stages) + self.ahead
