"""An elastic plan in words: what runs on which nodes, what happens when their number changes, what was left out and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moeplan.planner.elastic.consistency import Consistency
from moeplan.planner.elastic.counts import SizedLayout
from moeplan.planner.elastic.elastic_plan import CountPlan, StepUp, Transition
from moeplan.planner.elastic.saves import Overheads
from moeplan.planner.elastic.unequal import unequal_replicas
from moeplan.units import format_duration

WORTH = 0.01
"""Share of a step that unequal replicas must save to be spoken of."""


def policy(
    asked: Sequence[int],
    counts: Sequence[CountPlan],
    transitions: Sequence[Transition],
    consistency: Consistency,
    overheads: Overheads,
    chosen: Sequence[SizedLayout],
    growths: Sequence[StepUp],
) -> tuple[str, ...]:
    """Sentences, in the order in which they matter; `asked`: the node counts of the question."""
    least = counts[0].nodes
    few = f"{asked[0]} to {least - 1}" if asked[0] < least - 1 else f"{asked[0]}"
    waits = f": on {few} it would spend more on changes than it gets done" if asked[0] < least else ""
    return (
        *_runs(counts),
        *_changes(counts, transitions, overheads),
        f"below {least} nodes the job waits{waits}",
        *_grows(growths),
        *_left_out(counts, consistency, chosen),
    )


def _runs(counts: Sequence[CountPlan]) -> Iterator[str]:
    """What runs at each run of counts with the same layout."""
    start = 0
    for i, count in enumerate(counts):
        if i + 1 < len(counts) and counts[i + 1].plan.layout == count.plan.layout and counts[i + 1].uses == count.uses:
            continue
        first = counts[start].nodes
        nodes = f"{first}" if first == count.nodes else f"{first} to {count.nodes}"
        spares = f" on {count.uses} of them, the rest are spares" if count.nodes > count.uses else ""
        replicas = f", {count.instances} replicas of the optimizer states" if count.instances > 1 else ""
        yield f"{nodes} node{'s' * (nodes != '1')}: {count.plan.layout.degrees()}{spares}{replicas}"
        start = i + 1


def _changes(counts: Sequence[CountPlan], transitions: Sequence[Transition], overheads: Overheads) -> Iterator[str]:
    """What happens when nodes leave and come."""
    down = [t for t in transitions if t.after < t.before]
    if not down:
        return
    if all(t.kind == "planned" for t in down):
        yield "when a node is about to leave: end the step, " + ("move" if overheads.live else "save and restart")
    elif any(t.rollback for t in down):
        yield "when a node in use fails: go back to the last checkpoint in the layout of the nodes that are left"
    else:
        yield "when a node in use fails: go on from the replicas that are left, in the layout of the nodes that are left"
    if any(count.uses < count.nodes for count in counts):
        yield "when a spare fails: go on"
    yield "when a node comes: " + ("move state to the new layout" if overheads.live else "save, and restart in the new layout")


def _grows(growths: Sequence[StepUp]) -> Iterator[str]:
    """When to take nodes that are free for a while."""
    for one in growths:
        step = f"from {one.before} to {one.after} nodes"
        if math.isinf(one.least_s):
            yield f"{step}: never for a while, it is no faster"
            continue
        said = ""
        if one.stay_s:
            grows = (
                f"grow, it wins {one.gain:.3g} samples" if one.gain > 0.0 else f"do not grow, it loses {-one.gain:.3g} samples"
            )
            said = f"; they stay {format_duration(one.stay_s)} in the mean: {grows}"
        yield f"{step}: pays where they stay {format_duration(one.least_s)} or longer{said}"


def _left_out(counts: Sequence[CountPlan], consistency: Consistency, chosen: Sequence[SizedLayout]) -> Iterator[str]:
    """Unequal replicas where they would be faster."""
    for count, one in zip(counts, chosen, strict=True):
        if count.nodes == count.uses or consistency == "bitwise":
            continue
        found = unequal_replicas(one, count.nodes)
        if found is not None and found.step_s < (1.0 - WORTH) * one.step_s:
            shallow, deep = min(found.depths), max(found.depths)
            yield (
                f"on {count.nodes} nodes pipelines of {shallow} and {deep} stages with {min(found.micro_batches)} to "
                f"{max(found.micro_batches)} micro-batches would take {found.step_s / one.step_s - 1:+.1%} time a step; "
                "Megatron builds equal replicas only"
            )
