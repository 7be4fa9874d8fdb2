"""A plan of a tiny model on four nodes of eight GPUs, for elastic plans in a moment."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.planner.elastic.counts import SizedLayout
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.problem import Problem
from tests.conftest import TINY_MOE
from tests.planner import tiny

LAYOUT = Layout(dp=8, ep=8, edp=1, pp=4, dispatcher="alltoall")
"""Eight layers with eight experts on 32 GPUs."""


@functools.cache
def base() -> Plan:
    """The plan that others are derived from."""
    return price_plan(tiny.problem(TINY_MOE, "h100x32", batch=64), LAYOUT)


def layout_of(**changes: Any) -> Layout:
    """The layout of the plan with some fields changed."""
    return dataclasses.replace(LAYOUT, **changes)


def sized(nodes: int, problem: Problem | None = None, **changes: Any) -> SizedLayout:
    """A layout on a number of nodes."""
    problem = problem or base().problem
    problem = dataclasses.replace(problem, profile=problem.profile.resized(8 * nodes))
    plan = price_plan(problem, layout_of(**changes))
    return SizedLayout(nodes=nodes, problem=problem, layout=plan.layout, step_s=plan.step_s, peak_bytes=plan.peak_bytes)
