"""The list of schedules of one MoE layer: a new one is a file, a line here, and a row in its test."""

from __future__ import annotations

from moeplan.costmodels.moe.base import LayerSchedule
from moeplan.costmodels.moe.baseline import Baseline, DeepSpeed, ReplicatedBaseline
from moeplan.costmodels.moe.comet import Comet
from moeplan.costmodels.moe.flowmoe import FlowMoe
from moeplan.costmodels.moe.fsmoe import FsMoe
from moeplan.costmodels.moe.hierarchical import Hierarchical
from moeplan.costmodels.moe.lina import Lina
from moeplan.costmodels.moe.megatron_overlap import DELAYED_OVERLAP, OVERLAP, PairSchedule
from moeplan.costmodels.moe.s1 import S1
from moeplan.costmodels.moe.s2 import S2
from moeplan.costmodels.moe.shared_experts import SharedOverlap
from moeplan.costmodels.moe.two_stream import NO_IIO, PIPEMOE, TUTEL, TUTEL_IMPROVED
from moeplan.errors import UnknownNameError

SCHEDULES: tuple[LayerSchedule, ...] = (
    Baseline(), ReplicatedBaseline(), DeepSpeed(), S1(), S2(), Hierarchical(),
    TUTEL, TUTEL_IMPROVED, PIPEMOE, Lina(), NO_IIO, FsMoe(), FlowMoe(), SharedOverlap(), Comet(),
)  # fmt: skip
"""Schedules of one direction of a layer."""
PAIR_SCHEDULES: tuple[PairSchedule, ...] = (OVERLAP, DELAYED_OVERLAP)
"""Schedules of a forward and a backward together."""


def find_schedule(name: str) -> LayerSchedule:
    """The schedule of one direction with this name; refuses others with the nearest ones."""
    by_name = {schedule.name: schedule for schedule in SCHEDULES}
    if name not in by_name:
        raise UnknownNameError("MoE schedule", name, by_name)
    return by_name[name]
