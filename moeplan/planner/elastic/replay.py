"""Goodput of a job over a recorded history of nodes.

A policy has options by the nodes that they need; with n nodes there the one for the largest such number runs, and below all of
them the job waits. Every change of n is charged with the seconds of the cost model, during which nothing is kept, and so is the
restart after a wait. A rigid job is a policy of one option, one with k spares uses k nodes fewer than there are at most:
    goodput = sum over spans of rate(n) (span - seconds of changes) / (1 + job_rate restart) / length of the record
Seconds that outlast a span run on into the next. Units: seconds, samples per second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Trace
from moeplan.planner.elastic.choice import Option

Cost = Callable[[int, Option, int, Option], float]
"""Seconds without progress from (nodes, option) to (nodes, option); equal nodes: a failure of the job alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a policy makes of a recorded history."""

    name: str
    """The policy in words."""
    goodput: float
    """Samples kept per second of the record."""
    waiting_share: float
    """Share of the record without nodes enough."""
    changing_share: float
    """Share of the record in changes and restarts."""
    changes: int
    """Changes and restarts that cost time."""


def replay(trace: Trace, name: str, policy: Mapping[int, Option], cost: Cost, job_rate: float = 0.0) -> Replayed:
    """The goodput of a policy: options by the nodes from which on they run."""
    if not policy:
        raise ProblemError(f"no option for {name}", hint="plan for fewer nodes")
    needs = sorted(policy)
    samples = waiting_s = changing_s = owed_s = 0.0
    changes = 0
    before: tuple[int, Option] | None = None
    for index, (nodes, span_s) in enumerate(zip(trace.nodes, map(float, trace.spans_s), strict=False)):
        fitting = [n for n in needs if n <= nodes]
        if not fitting:
            waiting_s += span_s
            before, owed_s = None, 0.0
            continue
        option = policy[fitting[-1]]
        if before is not None:
            # what is not over yet is done again for the new number of nodes, if that costs anything
            price_s = cost(*before, nodes, option) if nodes != before[0] else 0.0
            owed_s = max(owed_s, price_s)
        else:
            price_s = owed_s = cost(nodes, option, nodes, option) if index else 0.0
        changes += price_s > 0.0
        spent_s = min(owed_s, span_s)
        again_s = job_rate * cost(nodes, option, nodes, option) if job_rate else 0.0
        kept_s = (span_s - spent_s) / (1.0 + again_s)
        samples += option.rate * kept_s
        changing_s += span_s - kept_s
        owed_s -= spent_s
        before = nodes, option
    length_s = float(trace.spans_s.sum())
    return Replayed(
        name=name,
        goodput=samples / length_s,
        waiting_share=waiting_s / length_s,
        changing_share=changing_s / length_s,
        changes=changes,
    )
