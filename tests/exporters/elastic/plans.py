"""What the tests of elastic exports share: elastic plans of a small model, and their files."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moeplan.exporters.elastic.write import compose
from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.consistency import Hazard
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan, Transition
from moeplan.planner.plan import Plan, price_plan
from tests.exporters.cases import layout_of, problem_of, small_models

DP_ONLY: dict[int, dict[str, Any]] = {nodes: {"tp": 2, "ep": 8} for nodes in (2, 3, 4)}
"""Layouts by nodes that differ in dp."""
MIXED: dict[int, dict[str, Any]] = {
    2: {"tp": 2, "ep": 8},
    3: {"tp": 2, "ep": 4},
    4: {"tp": 2, "pp": 2, "ep": 8, "stages": "Et*5|tttL"},
}
"""Layouts that differ in pp, ep and the split."""
PIPELINE: dict[int, dict[str, Any]] = {
    2: {"tp": 2, "pp": 2, "ep": 4, "dp": 4},
    4: {"tp": 2, "pp": 4, "ep": 4, "dp": 4},
    6: {"tp": 2, "pp": 4, "ep": 4, "dp": 4},
}
"""Layouts that differ in pp alone; 6 nodes use 4."""
USES = {6: 4}
IMAGE = {"image": "registry.example/megatron:0.19", "MEGATRON_LM": "/opt/megatron", "CHECKPOINTS": "/data/checkpoints"}


@functools.cache
def _priced(model: str, gpus: int, fields: tuple[tuple[str, Any], ...], batch: int) -> Plan:
    problem = problem_of(small_models()[model], f"h100x{gpus}", batch, 2048)
    return price_plan(problem, layout_of(problem.model, gpus, **dict(fields)))


def count_of(nodes: int, fields: dict[str, Any], *, model: str = "experts", batch: int = 96, **saving: Any) -> CountPlan:
    uses = USES.get(nodes, nodes)
    usual: dict[str, Any] = {
        "interval_steps": 40, "interval_s": 400.0, "stall_s": 2.0, "persist_s": 60.0, "asynchronous": True, "efficiency": 0.98,
    }  # fmt: skip
    return CountPlan(
        nodes=nodes,
        uses=uses,
        share=1 / nodes,
        plan=_priced(model, 8 * uses, tuple(fields.items()), batch),
        instances=1,
        saving=Saving(**{**usual, **saving}),
    )


def elastic_of(layouts: dict[int, dict[str, Any]], saving: dict[str, Any] | None = None, **fields: Any) -> ElasticPlan:
    """An elastic plan with these layouts by nodes."""
    counts = tuple(count_of(nodes, layout, **(saving or {})) for nodes, layout in layouts.items())
    moves = [(a.nodes, b.nodes) for a, b in zip(counts, counts[1:], strict=False)]
    usual: dict[str, Any] = {
        "consistency": "order",
        "hazards": (Hazard(name="H5", what="the ring order changes", fix="keep it"),),
        "counts": counts,
        "transitions": tuple(
            Transition(
                before=a, after=b, kind="planned", moved_bytes=1e9, lost_bytes=0.0, rollback=False, seconds={"group": 15.0}
            )
            for low, high in moves
            for a, b in ((low, high), (high, low))
        ),
        "availability": Availability(),
        "reshardable": layouts is not DP_ONLY,
        "local_saves": False,
        "goodput": 12.5,
        "best_single": 11.0,
        "policy": ("On every loss go on with the planned layout.",),
    }
    return ElasticPlan(**{**usual, **fields})


def with_counts(elastic: ElasticPlan, **fields: Any) -> ElasticPlan:
    """An elastic plan with fields of all its counts replaced."""
    return dataclasses.replace(elastic, counts=tuple(dataclasses.replace(count, **fields) for count in elastic.counts))


def two_small_nodes() -> ElasticPlan:
    """Two nodes of one GPU each, one of which trains."""
    elastic = elastic_of({2: {}}, reshardable=False)
    (count,) = elastic.counts
    plan = _priced("dense", 1, (), 96)
    return dataclasses.replace(elastic, counts=(dataclasses.replace(count, uses=1, plan=plan),))


def texts_of(elastic: ElasticPlan, *launchers: str, **settings: str) -> dict[str, str]:
    """The files of an elastic plan by name."""
    return compose(elastic, launchers or None, settings)
