"""The pipeline schedules that exist, by name."""

from __future__ import annotations

from moeplan.costmodels.pipeline.base import PipelineSchedule
from moeplan.costmodels.pipeline.dualpipe import DualPipe
from moeplan.costmodels.pipeline.gpipe import GPipe
from moeplan.costmodels.pipeline.interleaved import Interleaved
from moeplan.costmodels.pipeline.one_f_one_b import OneForwardOneBackward
from moeplan.costmodels.pipeline.zero_bubble import ZeroBubble
from moeplan.errors import UnknownNameError

SCHEDULES: tuple[PipelineSchedule, ...] = (GPipe(), OneForwardOneBackward(), Interleaved(), ZeroBubble(), DualPipe())
"""All of them."""


def find_pipeline_schedule(name: str) -> PipelineSchedule:
    """The schedule of that name."""
    for schedule in SCHEDULES:
        if schedule.name == name:
            return schedule
    raise UnknownNameError("pipeline schedule", name, [s.name for s in SCHEDULES])
