"""Random plans of catalog models for targets other than Megatron, of which a good share can be run there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import balanced_split
from moeplan.errors import MoeplanError
from moeplan.exporters.base import Exporter
from moeplan.exporters.neutral import PLAN, plan_data, plan_text
from moeplan.planner.plan import Plan
from moeplan.planner.space import divisors
from tests.exporters.cases import layout_of, problem_of, unpriced


def random_plan(seed: int, names: Sequence[str]) -> Plan:
    """The plan of a seed, for one of the named models."""
    rng = random.Random(seed)
    model = load_model(rng.choice(list(names)))
    world = rng.choice((8, 16, 32, 48, 64))
    pp = rng.choice((1, 1, 1, 2, 4))
    tp = rng.choice((1, 1, 1, 2, 4, 8))
    cp = rng.choice((1, 1, 1, 1, 2))
    stage = world // pp
    if world % (pp * tp * cp):
        return random_plan(seed + 7919, names)
    dp = stage // tp // cp
    ep = rng.choice([d for d in divisors(stage) if d <= 64]) if model.moe else 1
    vpp = rng.choice((1, 1, 2, 3)) if pp > 1 else 1
    micro = rng.choice((1, 1, 2))
    problem = problem_of(
        model,
        f"h100x{world}",
        micro * dp * pp * rng.choice((1, 2, 4)),
        rng.choice((1024, 2048, 4096, 32768)),
        rng.choice(("bf16",) * 6 + ("fp8-delayed",)),
        gradient_bytes=rng.choice((4, 4, 4, 2)),
    )
    layout = layout_of(
        model,
        world,
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        micro_batch=micro,
        sequence_parallel=tp > 1 and (model.moe is not None or rng.random() < 0.6),
        sharding=rng.choice(("optimizer", "fsdp", "fsdp", "ddp")),
        dp_overlap=rng.random() < 0.6,
        dispatcher=rng.choice(("alltoall", "alltoall", "deepep", "hybridep", "allgather")) if model.moe else "none",
        recompute=rng.choice(((), (), ("full",), ("core_attn",))),
        tp_overlap=tp > 1 and rng.random() < 0.1,
        ep_overlap=model.moe is not None and rng.random() < 0.05,
        stages=_stages(rng, model, pp * vpp),
    )
    return unpriced(problem, layout)


def _stages(rng: random.Random, model: Model, chunks: int) -> str:
    return balanced_split(model, 4096, chunks) if len(model.layers) % chunks or rng.random() < 0.3 else ""


def is_taken(exporter: Exporter, plan: Plan) -> bool:
    """Whether an exporter does not refuse a plan."""
    try:
        exporter.check(plan, exporter.version)
    except MoeplanError:
        return False
    return True


def taken_plans(exporter: Exporter, names: Sequence[str], count: int) -> list[Plan]:
    """The first `count` random plans that an exporter takes."""
    out: list[Plan] = []
    seed = 0
    while len(out) < count:
        plan = random_plan(seed, names)
        out += [plan] if is_taken(exporter, plan) else []
        seed += 1
    return out


def write_files(exporter: Exporter, plan: Plan, directory: Path, version: str = "") -> Path:
    """The files of an export that the exporter reads back, without launchers."""
    directory.mkdir(parents=True)
    version = version or exporter.version
    data = plan_data(plan, exporter.name, version, exporter.job(plan, version), ())
    for name, text in {**exporter.files(plan, version), PLAN: plan_text(data)}.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory
