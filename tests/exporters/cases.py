"""What the tests of the exporter share: problems by name, small models, short layouts, and Megatron's verdict on them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Layer, Mlp, Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import chunk_letters
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.exporters.megatron import environment, transformer_engine
from moeplan.exporters.megatron_layout import layout_sections
from moeplan.planner.plan import Plan
from moeplan.planner.problem import Problem
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from tests import megatron


@functools.cache
def _profile(cluster: str) -> Profile:
    return nominal(load_cluster(cluster))


def problem_of(
    model: str | Model, cluster: str, batch: int, seq_len: int, precision: str = "bf16", era: str = "latest", **workload: Any
) -> Problem:
    """A problem by the names of what it is about."""
    return Problem(
        model=load_model(model) if isinstance(model, str) else model,
        profile=_profile(cluster),
        workload=Workload(
            seq_len=seq_len, global_batch=batch, precision=load_precision(precision), era=load_era(era), **workload
        ),
        extend_positions=True,
    )  # fmt: skip


def layout_of(model: Model, world: int, **fields: Any) -> Layout:
    """A layout on `world` ranks whose data-parallel sizes and dispatcher follow from the rest."""
    tp, cp, pp, ep, etp = (fields.get(name, 1) for name in ("tp", "cp", "pp", "ep", "etp"))
    stage = world // pp
    usual = {
        "dp": stage // (tp * cp), "edp": stage // (etp * ep), "sequence_parallel": tp > 1,
        "dispatcher": "none" if model.moe is None else "alltoall",
    }  # fmt: skip
    return Layout(**{**usual, **fields})


def unpriced(problem: Problem, layout: Layout) -> Plan:
    """A plan as the exporter needs it, its price left out."""
    time = Breakdown(unit="seconds", parts={"layers": 1.0})
    return Plan(problem=problem, layout=layout, time=time, stages=(), stage_s=(), low_s=1.0, high_s=1.0)


def words(sections: dict[str, list[tuple[str, ...]]]) -> list[str]:
    """The command line of an export's sections."""
    return [word for flags in sections.values() for flag in flags for word in flag]


def capability(problem: Problem) -> tuple[int, int]:
    """Compute capability of the problem's device, as its driver reports it ("gfx942" is 9.4)."""
    text = problem.profile.cluster.device.capability
    if text.startswith("gfx"):
        return int(text[3]), int(text[4])
    major, minor = text.split(".")
    return int(major), int(minor)


def judged(problem: Problem, layout: Layout, *, build: bool = False) -> megatron.Verdict:
    """What Megatron says to what the exporter would write for a layout, whether or not our rules accept it."""
    plan = unpriced(problem, layout)
    return megatron.accept(
        words(layout_sections(plan)),
        world=problem.profile.cluster.gpus,
        environment=environment(plan),
        capability=capability(problem),
        te_version=transformer_engine(plan),
        build=build,
    )


def understood(problem: Problem, layout: Layout) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Micro-batches of a step, and decoder layers of every pipeline rank and chunk, as the layout means them."""
    chunks = chunk_letters(problem.model, layout.pp, layout.vpp, layout.stages)
    layers = tuple(tuple(chunk.count("t") for chunk in chunks[rank :: layout.pp]) for rank in range(layout.pp))
    return problem.workload.global_batch // (layout.micro_batch * layout.dp), layers


def small(name: str, layers: int, experts: int = 0, **change: Any) -> Model:
    """A published model cut to its first layers and experts, so that Megatron builds it in a moment."""
    model = load_model(name).cut(layers)

    def cut(layer: Layer) -> Layer:
        blocks = [dataclasses.replace(b, experts=experts) if experts and hasattr(b, "experts") else b for b in layer.blocks]
        return dataclasses.replace(layer, blocks=tuple(blocks))

    return dataclasses.replace(model, layers=tuple(map(cut, model.layers)), mtp=tuple(map(cut, model.mtp)), **change)


def _few_groups() -> Model:
    model = small("qwen2.5-1.5b", 6)
    attention, _ = model.layers[0].blocks
    return dataclasses.replace(model, layers=(Layer(blocks=(attention, Mlp(width=9216))),) * 6)


def _hybrid_with_mlp() -> Model:
    model = small("nemotron-3-nano-30b-a3b", 12, 16)
    dense = Layer(blocks=(Mlp(width=3712, gated=False),))
    return dataclasses.replace(model, layers=(*model.layers[:3], dense, *model.layers[3:11]))


@functools.cache
def small_models() -> dict[str, Model]:
    """One model of every kind that the rules tell apart."""
    deepseek = small("deepseek-v3", 6, 16)
    return {
        "latent": small("deepseek-v2-lite", 6, 8),
        "prediction": deepseek,
        "two predictions": dataclasses.replace(deepseek, mtp=deepseek.mtp * 2),
        "experts": small("mixtral-8x7b", 8),
        "many experts": small("qwen3-30b-a3b", 12, 16),
        "biased experts": small("gpt-oss-20b", 6, 16),
        "shared experts": small("qwen2-57b-a14b", 12, 16),
        "dense": small("llama3-8b", 12),
        "few groups": _few_groups(),
        "learned positions": small("gpt-3-20b", 8),
        "linear attention": small("qwen3-next-80b-a3b", 8, 16),
        "sparse attention": small("deepseek-v3.2", 4, 8),
        "hybrid": small("nemotron-3-nano-30b-a3b", 12, 16),
        "hybrid with dense": _hybrid_with_mlp(),
        "hybrid with prediction": small("nemotron-3-super-120b-a12b", 12, 32),
    }
