"""Exported plans run through Megatron's own code: it accepts them, understands what was planned, holds what was predicted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from moeplan.exporters.base import read_arguments
from moeplan.exporters.megatron import ARGUMENTS, arguments, environment, transformer_engine
from moeplan.exporters.write import export
from moeplan.planner.plan import Plan, price_plan
from moeplan.planner.solve import solve
from moeplan.runtime.groups import rank_groups
from tests import megatron
from tests.exporters.cases import capability, layout_of, problem_of, small_models, understood, words

PAIRS = [  # model, cluster, global batch, tokens of a sequence, precision
    ("deepseek-v3", "h100x256", 2048, 4096, "fp8-cs"),
    ("deepseek-v3", "gb200x256", 2048, 4096, "fp8-mx"),
    ("deepseek-v3.2", "gb200x256", 1024, 4096, "fp8-mx"),
    ("kimi-k2", "h200x512", 2048, 4096, "fp8-blockwise"),
    ("glm-4.5", "h200x256", 1024, 4096, "bf16"),
    ("glm-4.5-air", "h100x128", 1024, 4096, "bf16"),
    ("qwen3-235b-a22b", "h100x256", 1024, 4096, "bf16"),
    ("qwen3-235b-a22b", "gb300x64", 1024, 4096, "nvfp4"),
    ("qwen3-30b-a3b", "h100x16", 512, 4096, "bf16"),
    ("qwen2-57b-a14b", "h800x64", 256, 4096, "fp8-delayed"),
    ("mixtral-8x7b", "a100x64", 256, 4096, "bf16"),
    ("mixtral-8x22b", "h100x128", 256, 4096, "bf16"),
    ("mixtral-8x22b-g8t8", "h100x128", 256, 4096, "bf16"),
    ("gpt-oss-20b", "b200x8", 128, 4096, "bf16"),
    ("gpt-oss-120b", "b300x16", 128, 8192, "fp8-mx"),
    ("moonlight-16b-a3b", "a100x32", 256, 4096, "bf16"),
    ("deepseek-v2-lite", "l40sx64", 256, 2048, "bf16"),
    ("hunyuan-a13b", "gh200x64", 256, 4096, "bf16"),
    ("llama3.1-405b", "gb200x256", 256, 8192, "fp8-cs"),
    ("llama3-70b", "a100x64", 128, 8192, "bf16"),
    ("nemotron-4-340b", "h100x256", 256, 4096, "bf16"),
    ("gpt-3-175b", "a100x512", 1536, 2048, "bf16"),
    ("nemotron-3-nano-30b-a3b", "h100x32", 256, 4096, "bf16"),
    ("nemotron-3-super-120b-a12b", "h100x64", 256, 4096, "bf16"),
    ("qwen3-next-80b-a3b", "h200x64", 256, 4096, "bf16"),
    ("qwen2.5-7b", "gb200x4", 128, 4096, "nvfp4"),
]


@functools.cache
def known_flags() -> frozenset[str]:
    return frozenset(megatron.known_flags())


def assert_holds_what_megatron_builds(plan: Plan) -> None:
    """Gradients of 4 bytes and states of 12 bytes a parameter, sharded over dp x cp and edp, on every pipeline rank."""
    x, device = plan.layout, capability(plan.problem)
    built = megatron.build_counts(words(arguments(plan)), x.world, environment=environment(plan), capability=device)
    assert len(built) == len(plan.stages)
    for stage, (dense, expert) in zip(plan.stages, built, strict=True):
        assert stage.parts["gradients"] == pytest.approx(4 * (dense + expert), rel=1e-12), stage.rank
        states = 12 * (dense / (x.dp * x.cp) + expert / x.edp)
        assert stage.parts["optimizer states"] == pytest.approx(states, rel=1e-12), stage.rank


@pytest.mark.parametrize(("model", "cluster", "batch", "seq_len", "precision"), PAIRS)
def test_solved_plan(model: str, cluster: str, batch: int, seq_len: int, precision: str, tmp_path: Path) -> None:
    problem = problem_of(model, cluster, batch, seq_len, precision)
    plan = solve(problem, keep=1).plans[0]
    assert plan.excess_bytes <= 0
    export(plan, tmp_path / "launch")
    exported, given = read_arguments((tmp_path / "launch" / ARGUMENTS).read_text())
    assert (exported, given) == (environment(plan), words(arguments(plan)))
    assert {word for word in given if word.startswith("--")} <= known_flags()
    verdict = megatron.accept(
        given,
        world=plan.layout.world,
        environment=exported,
        capability=capability(problem),
        te_version=transformer_engine(plan),
    )
    assert verdict.accepted, verdict
    assert (verdict.microbatches, verdict.layers) == understood(problem, plan.layout)
    assert megatron.rank_groups(given, plan.layout.world) == rank_groups(plan.layout)
    if plan.layout.world <= 128:  # building takes time
        assert_holds_what_megatron_builds(plan)


STAGES: list[tuple[str, str, dict[str, Any]]] = [  # model, cluster, layout
    ("prediction", "h100x16", {"pp": 2, "ep": 8, "stages": "Et*3|t*3mL"}),
    ("prediction", "h100x16", {"pp": 4, "ep": 4, "stages": "Et|t*5|m|L"}),
    ("prediction", "h100x16", {"pp": 2, "vpp": 2, "ep": 2, "etp": 4, "stages": "Et|tt|t*3|mL"}),
    ("prediction", "h100x16", {"pp": 2, "vpp": 2, "tp": 4, "ep": 2, "stages": "Ett|tt|ttm|L"}),
    ("two predictions", "h100x16", {"pp": 2, "tp": 2, "ep": 4, "etp": 2, "stages": "Et*6|mmL"}),
    ("latent", "h100x16", {"pp": 2, "vpp": 3, "ep": 8}),
    ("few groups", "h100x16", {"tp": 4}),  # tied, and fewer key heads than ranks
    ("few groups", "h100x16", {"tp": 2, "pp": 2, "stages": "Et*4|ttL"}),
    ("learned positions", "h100x16", {"tp": 2, "pp": 4, "vpp": 2}),
    ("experts", "h100x16", {"tp": 2, "pp": 2, "ep": 2, "etp": 4, "vpp": 2}),
    ("biased experts", "h100x16", {"tp": 4, "pp": 2, "ep": 8}),
    ("shared experts", "h100x16", {"tp": 4, "pp": 2, "vpp": 2, "ep": 4, "stages": "Ett|(t*5|)*2L"}),
    ("linear attention", "h100x16", {"tp": 2, "cp": 2, "pp": 2, "ep": 4, "stages": "Ettt|t*5L"}),
    ("sparse attention", "h100x16", {"cp": 2, "pp": 2, "ep": 4}),
    ("hybrid", "h100x16", {"tp": 2, "pp": 2, "vpp": 2, "ep": 4, "stages": "Ett|t*4|t*5|tL"}),
    ("hybrid with prediction", "h100x16", {"tp": 2, "pp": 4, "ep": 2, "stages": "Et*5|t*5|tt|mL"}),
]


@pytest.mark.parametrize(("model", "cluster", "fields"), STAGES)
def test_parameters_of_every_stage(model: str, cluster: str, fields: dict[str, Any]) -> None:
    problem = problem_of(small_models()[model], cluster, 64, 2048)
    layout = layout_of(problem.model, problem.profile.cluster.gpus, **fields)
    plan = price_plan(problem, layout)
    assert_holds_what_megatron_builds(plan)
    assert megatron.rank_groups(words(arguments(plan)), layout.world) == rank_groups(layout)
