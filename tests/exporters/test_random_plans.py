"""One set of random plans over the whole catalog, offered to every target: refusals name their rules, Megatron takes the rest.

What other frameworks say to the plans that they take is in their own tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moeplan.costmodels.model_catalog import model_names
from moeplan.errors import MoeplanError
from moeplan.exporters import deepspeed_config, megatron_bridge, torchtitan_demands
from moeplan.exporters.base import Exporter
from moeplan.exporters.demands import Demand, broken_demands
from moeplan.exporters.megatron import Megatron
from moeplan.exporters.targets import EXPORTERS
from moeplan.planner.constraints import violations
from tests.exporters.cases import judged, understood
from tests.exporters.random_targets import COUNT, random_plans, taken_plans

DEMANDS: dict[str, Sequence[Demand]] = {
    "deepspeed": deepspeed_config.DEMANDS,
    "megatron-bridge": megatron_bridge.DEMANDS,
    "torchtitan": torchtitan_demands.DEMANDS,
}


def test_the_set_is_of_the_whole_catalog() -> None:
    models = {plan.problem.model.name for plan in random_plans()}
    assert len(random_plans()) == COUNT and len(models) > 0.8 * len(model_names())
    assert {plan.problem.model.moe is None for plan in random_plans()} == {True, False}


@pytest.mark.parametrize("exporter", EXPORTERS, ids=[known.name for known in EXPORTERS])
def test_refusals_name_every_broken_rule(exporter: Exporter) -> None:
    taken = 0
    for plan in random_plans():
        broken = {v.rule for v in violations(plan.problem, plan.layout)}
        broken = broken or {demand.name for demand in broken_demands(DEMANDS.get(exporter.name, ()), plan)}
        try:
            exporter.check(plan, exporter.version)
        except MoeplanError as error:
            said = str(error)
            assert all(f"rule {name}" in said or f"{name}: " in said for name in broken), said
            assert broken or exporter.name == "megatron" and "Megatron-LM 0.19.2 has no " in said
        else:
            assert not broken, f"{plan.problem.model.name} {plan.layout.degrees()}: {broken}"
            taken += 1
    assert 0 < taken < COUNT


def test_megatron_accepts_what_is_not_refused() -> None:
    for plan in taken_plans(Megatron(), model_names()):
        verdict = judged(plan.problem, plan.layout)
        assert verdict.accepted, f"{plan.problem.model.name} {plan.layout}: {verdict}"
        assert (verdict.microbatches, verdict.layers) == understood(plan.problem, plan.layout)
