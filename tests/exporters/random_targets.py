"""Random plans over the whole catalog: the same set for every target, and for each of them more until it took enough.

One plan in two is plain (degrees and sharding only); the others use what Megatron has besides, of which most targets lack some.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model, model_names
from moeplan.costmodels.stages import balanced_split
from moeplan.errors import MoeplanError
from moeplan.exporters.base import Exporter
from moeplan.exporters.demands import Demand, broken_demands
from moeplan.exporters.neutral import PLAN, plan_data, plan_text
from moeplan.exporters.write import check_reading
from moeplan.planner.constraints import violations
from moeplan.planner.plan import Plan
from moeplan.planner.space import divisors
from tests.exporters.cases import layout_of, problem_of, unpriced

COUNT = 200
"""Plans of the set, and plans that every target is to take."""
RECOMPUTE = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe")
_model = functools.cache(load_model)


def random_plan(seed: int, names: Sequence[str]) -> Plan:
    """The plan of a seed, for one of the named models."""
    rng = random.Random(seed)
    model = _model(rng.choice(names))
    if model.mtp and rng.random() < 0.7:
        model = dataclasses.replace(model, mtp=())
    plain = rng.random() < 0.5
    world = rng.choice((8, 16, 32, 48, 64))
    pp = rng.choice([1, 1, 1, 1, 1, *(d for d in (2, 2, 4, 8) if world % d == 0)])
    stage = world // pp
    tp = rng.choice([1, 1, 1, *(d for d in (2, 4, 8) if stage % d == 0)])
    cp = rng.choice([1, 1, 1, 1, 1, *(d for d in (2,) if stage // tp % d == 0)])
    ep = etp = 1
    if model.moe is not None:
        etp = rng.choice([1, 1, 1, *(d for d in (2, 4) if stage % d == 0)]) if not plain else 1
        ep = rng.choice([d for d in divisors(stage // etp) if d <= 64 and model.moe.experts % d == 0])
    vpp = rng.choice((1, 1, 2, 3)) if 1 < pp <= len(model.layers) // 3 else 1
    micro, dp = rng.choice((1, 1, 2)), stage // tp // cp
    problem = problem_of(
        model,
        f"h100x{world}",
        micro * dp * pp * rng.choice((1, 2, 4)),
        rng.choice((1024, 2048, 4096, 4096, 8192, 32768)),
        "bf16" if plain else rng.choice(("bf16", "bf16", "bf16", "fp8-delayed", "fp8-cs", "fp8-blockwise")),
        gradient_bytes=4 if plain else rng.choice((4, 4, 2)),
        moment_bytes=4 if plain else rng.choice((4, 4, 4, 2)),
        capacity_factor=1.25 if model.moe and not plain and rng.random() < 0.1 else 0.0,
    )
    layout = layout_of(
        model,
        world,
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        micro_batch=micro,
        sequence_parallel=tp > 1 and (model.moe is not None or rng.random() < 0.5),
        stages=_stages(rng, problem.model, pp * vpp),
        **_sharding(rng),
        **({"recompute": rng.choice(((), ("full",)))} if plain else _features(rng, model, tp)),
    )
    return unpriced(problem, layout)


def _stages(rng: random.Random, model: Model, chunks: int) -> str:
    return balanced_split(model, 4096, chunks) if len(model.layers) % chunks or rng.random() < 0.3 else ""


def _sharding(rng: random.Random) -> dict[str, Any]:
    sharding = rng.choice(("optimizer", "optimizer", "fsdp", "fsdp", "fsdp", "ddp"))
    return {"sharding": sharding, "dp_overlap": rng.random() < (0.5 if sharding == "optimizer" else 0.9)}


def _features(rng: random.Random, model: Model, tp: int) -> dict[str, Any]:
    """What a plan uses besides degrees and sharding: of each some, seldom all."""

    def seldom(share: float = 0.15) -> bool:
        return rng.random() < share

    out: dict[str, Any] = {
        "tp_overlap": tp > 1 and seldom(),
        "recompute": rng.choice(((), ("full",), tuple(rng.sample(RECOMPUTE, rng.randint(1, 2))))),
        "cuda_graphs": rng.choice((("attn",), ("full_iteration",))) if seldom() else (),
        "optimizer_offload": rng.choice((0.5, 1.0)) if seldom(0.1) else 0.0,
    }
    if out["recompute"] and seldom():
        out["recompute_layers"] = "2"
    if model.moe is not None:
        out |= {
            "dispatcher": rng.choice(("alltoall", "alltoall", "deepep", "hybridep", "allgather")),
            "ep_overlap": seldom(),
            "shared_overlap": bool(model.moe.shared_width) and seldom(),
        }
    return out


@functools.cache
def random_plans() -> tuple[Plan, ...]:
    """The set: plans of the whole catalog, which every target is offered."""
    return tuple(random_plan(seed, model_names()) for seed in range(COUNT))


def is_taken(exporter: Exporter, plan: Plan) -> bool:
    """Whether an exporter does not refuse a plan."""
    try:
        exporter.check(plan, exporter.version)
    except MoeplanError:
        return False
    return True


def taken_plans(exporter: Exporter, names: Sequence[str], count: int = COUNT) -> list[Plan]:
    """The plans of the set that an exporter takes, then as many others of the models that it knows as `count` asks for."""
    out = [plan for plan in random_plans() if is_taken(exporter, plan)]
    seed = COUNT
    while len(out) < count:
        plan = random_plan(seed, names)
        out += [plan] if is_taken(exporter, plan) else []
        seed += 1
    return out


def refused_plans(demands: Sequence[Demand], *unwritable: str) -> list[Plan]:
    """The plans of the set that keep the planner's rules and break a target's demands, none of those that cannot be written."""
    out = []
    for plan in random_plans():
        broken = {demand.name for demand in broken_demands(demands, plan)}
        if broken and not broken & set(unwritable) and not violations(plan.problem, plan.layout):
            out.append(plan)
    return out


def write_files(exporter: Exporter, plan: Plan, directory: Path, version: str = "") -> Path:
    """The files of an export that the exporter reads back, without launchers."""
    directory.mkdir(parents=True)
    version = version or exporter.version
    data = plan_data(plan, exporter.name, version, exporter.job(plan, version), ())
    for name, text in {**exporter.files(plan, version), PLAN: plan_text(data)}.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def exported(kind: str, target: Exporter, plans: Mapping[str, Sequence[Plan]], work: Path) -> dict[str, list[dict[str, Any]]]:
    """Cases of a judge that reads the folder of an export, by the names of what the plans are about."""
    return {
        name: [
            {"kind": kind, "directory": str(write_files(target, plan, work / f"{name}{i}")), "world": plan.layout.world}
            for i, plan in enumerate(some)
        ]
        for name, some in plans.items()
    }


def changed(target: Exporter, plan: Plan, work: Path, file: str, edit: Callable[[str], str]) -> Path:
    """The folder of an export that says what its plan does, with one file of it edited."""
    directory = write_files(target, plan, work / "out")
    check_reading(plan, target.read(directory))
    before = (directory / file).read_text()
    after = edit(before)
    assert after != before
    (directory / file).write_text(after)
    return directory
