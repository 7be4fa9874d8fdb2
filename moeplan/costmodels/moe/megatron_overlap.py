"""Megatron-Core's 1F1B overlap: the forward of one micro-batch merged with the backward of another, layer by layer.

One pair of layers is a schedule of both directions at once, so it is a `PairSchedule` and no `LayerSchedule`. Communication
runs CB (combine, backward), DF (dispatch, forward), DB, CF; compute runs AF (attention, forward), ED (experts, input
gradients), EW (weight gradients), EF, AB. ED waits for CB, DF for AF, DB for ED, EF for DF, CF for EF, AB for DB; unless
weight gradients are delayed DB waits for EW too. The recurrence of that order is exact. One more micro-batch of activations is
kept. Units: seconds; numbers or arrays. Not valid with full recomputation or shared-expert overlap, which Megatron refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import Lines, MoeSize, Parts, total
from moeplan.costmodels.moe.hierarchical import split_times
from moeplan.costmodels.tasks import Graph, parse_graph

LINKS = "inter+intra"
KINDS = ("CB", "DF", "DB", "CF", "AF", "ED", "EW", "EF", "AB")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSchedule:
    """A way to run the forward of one MoE layer and the backward of another together; fields as in `LayerSchedule`."""

    name: str
    title: str
    source: str
    runs_on: tuple[str, ...]
    delayed: bool
    """Whether the weight gradients of the experts run beside the backward dispatch, not before it."""

    def parts(self, size: MoeSize, lines: Lines) -> Parts:
        """Seconds by kind in FSMoE's layout; AF and AB, which the size does not tell, are 0: replace them.

        A dispatch backward is a reduce-scatter and an all-to-all, as a combine forward is; and the other way round.
        """
        one = split_times(size, lines, 1, "forward")
        there, back = total(one, "DG"), total(one, "SC")
        experts = dict.fromkeys(("ED", "EW", "EF"), one["E"])
        return {"CB": there, "DF": there, "DB": back, "CF": back, **experts, "AF": 0.0, "AB": 0.0}

    def graph(self) -> Graph:
        """Two streams, each in the order of the text."""
        begin = f"CB@{LINKS} AF@compute DF@{LINKS}<AF ED@compute<CB EW@compute<ED"
        before = "ED" if self.delayed else "EW"
        return parse_graph(f"{begin} DB@{LINKS}<{before} EF@compute<DF CF@{LINKS}<EF AB@compute<DB")

    def seconds(self, parts: Parts) -> Any:
        """Closed form: the makespan of the graph; a kind that `parts` lacks takes 0."""
        cb, df, db, cf, af, ed, ew, ef, ab = (parts.get(kind, 0.0) for kind in KINDS)
        # Ends of dispatch (DF), input and weight gradients (ED, EW), backward dispatch (DB), experts (EF).
        begin = np.maximum(af, cb)
        dispatched, inputs = begin + df, begin + ed
        weights = inputs + ew
        sent_back = np.maximum(dispatched, inputs if self.delayed else weights) + db
        computed = np.maximum(weights, dispatched) + ef
        return np.maximum(computed, sent_back) + np.maximum(cf, ab)

    def serial_seconds(self, parts: Parts) -> Any:
        """Seconds of all tasks one after the other."""
        return sum((parts.get(kind, 0.0) for kind in KINDS), 0.0)


OVERLAP = PairSchedule(
    name="1f1b-overlap",
    title="forward of one micro-batch beside the backward of another",
    source="Megatron-Core, --overlap-moe-expert-parallel-comm",
    runs_on=("megatron",),
    delayed=False,
)
DELAYED_OVERLAP = PairSchedule(
    name="1f1b-overlap-delayed",
    title="forward of one micro-batch beside the backward of another, weight gradients delayed",
    source="Megatron-Core, --overlap-moe-expert-parallel-comm --delay-wgrad-compute",
    runs_on=("megatron",),
    delayed=True,
)
