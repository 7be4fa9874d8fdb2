"""Random problems with layouts, about half of which Megatron accepts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import balanced_split, format_split
from moeplan.planner.constraints import violations
from moeplan.planner.problem import Problem
from moeplan.planner.space import divisors
from tests.exporters.cases import problem_of, small_models

WORLDS = {"a100": (4, 6, 8, 16, 24, 48), "h100": (6, 8, 16, 24, 32, 64), "gb200": (4, 12, 16, 32, 36, 64)}
PRECISIONS = {
    "a100": ("bf16",),
    "h100": ("bf16", "fp8-cs", "fp8-delayed", "fp8-blockwise"),
    "gb200": ("bf16", "fp8-cs", "fp8-delayed", "fp8-mx", "nvfp4"),
}
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
SCOPES = ("attn", "mlp", "moe_router", "moe_preprocess", "mamba", "moe")


def random_case(seed: int) -> tuple[Problem, Layout]:
    """The problem and layout of a seed: of a few random ones that which breaks the fewest rules."""
    rng = random.Random(seed)
    cases = [_draw(rng) for _ in range(rng.choice((2, 4, 8)))]
    return min(cases, key=lambda case: len(violations(*case)))


def _draw(rng: random.Random) -> tuple[Problem, Layout]:
    model = rng.choice(list(small_models().values()))
    device = rng.choice(list(WORLDS))
    world = rng.choice(WORLDS[device])
    degrees = _degrees(rng, model, world)
    micro_batch = rng.choice((1, 1, 1, 2, 3))
    batches = degrees["pp"] * rng.randint(1, 4) if rng.random() < 0.7 else rng.randint(1, 17)
    problem = problem_of(
        model,
        f"{device}x{world}",
        batches * micro_batch * degrees["dp"] if rng.random() < 0.9 else rng.randint(1, 128),
        rng.choice((512, 1024, 2048, 2048, 1536, 1000, 90)),
        rng.choice(PRECISIONS[device]),
        capacity_factor=rng.choice((0.0, 0.0, 0.0, 1.25)) if model.moe else 0.0,
        gradient_bytes=rng.choice((4, 4, 2)),
        moment_bytes=rng.choice((4, 4, 2)),
    )
    stages = _stages(rng, problem, degrees["pp"], degrees["vpp"])
    return problem, Layout(**degrees, micro_batch=micro_batch, stages=stages, **_features(rng, model))


def _degrees(rng: random.Random, model: Model, world: int) -> dict[str, int]:
    def some(number: int, most: int = 64) -> int:
        return rng.choice([1, *(d for d in divisors(number) if d <= most)])

    pp = some(world, 12)
    tp = some(world // pp, 8)
    cp = some(world // pp // tp, 8)
    stage = world // pp
    etp = some(stage, 4) if model.moe and rng.random() < 0.3 else 1
    ep = some(stage // etp) if model.moe or rng.random() < 0.05 else 1
    vpp = rng.choice((1, 1, 2, 3, 4)) if pp > 1 else rng.choice((1, 1, 1, 1, 1, 1, 2))
    return {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "dp": stage // tp // cp, "ep": ep, "etp": etp, "edp": stage // etp // ep}


def _stages(rng: random.Random, problem: Problem, pp: int, vpp: int) -> str:
    model, chunks = problem.model, pp * vpp
    layers, mtp = len(model.layers), len(model.mtp)
    choice = rng.random()
    if choice < 0.4 and layers % chunks == 0 or choice < 0.05 and not model.is_hybrid:
        return ""
    if choice < 0.75 and chunks <= layers + 2:
        return balanced_split(model, problem.workload.seq_len, chunks)
    cuts = sorted(rng.randint(0, layers) for _ in range(chunks - 1))
    parts = ["t" * (b - a) for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
    parts[0] = "E" + parts[0]
    place = -2 if chunks > 1 and not model.is_hybrid and rng.random() < 0.4 else -1
    parts[place] += "m" * mtp
    parts[-1] += "L"
    text = format_split(parts)
    return text if model.is_hybrid or rng.random() < 0.8 else _spoiled(rng, text)


def _spoiled(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return rng.choice((text[:place] + text[place + 1 :], text[:place] + rng.choice("EtmL|*2") + text[place:], text[::-1]))


def _features(rng: random.Random, model: Model) -> dict[str, Any]:
    def some(names: Sequence[str], share: float) -> tuple[str, ...]:
        return tuple(rng.sample(names, rng.randint(1, 3))) if rng.random() < share else ()

    dispatcher = rng.choice(("alltoall", "alltoall", "allgather", "deepep", "hybridep")) if model.moe else "none"
    sharding = "fsdp" if rng.random() < 0.12 else rng.choice(("optimizer", "optimizer", "optimizer", "ddp"))
    return {
        "sequence_parallel": rng.random() < (0.9 if model.moe else 0.6),
        "sharding": sharding,
        "dispatcher": dispatcher,
        "ep_overlap": model.moe is not None and rng.random() < 0.4,
        "shared_overlap": model.moe is not None and rng.random() < 0.2,
        "tp_overlap": rng.random() < 0.1,
        "dp_overlap": rng.random() < 0.7,
        "recompute": ("full",) if rng.random() < 0.12 else some(MODULES, 0.4),
        "cuda_graphs": ("full_iteration",) if rng.random() < 0.05 else some(SCOPES, 0.35),
        "optimizer_offload": rng.choice((0.0, 0.0, 0.0, 0.0, 0.5)),
    }
