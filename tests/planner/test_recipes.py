"""Recipes: they are what their rows of published runs say, and the nearest is taken."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.layout import DISPATCHERS, Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import check_split
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner.estimate import read_table
from moeplan.planner.problem import Problem
from moeplan.planner.recipes import recipe_for, recipes
from moeplan.planner.runs import read_run
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal

ROWS = {r["id"]: r for r in read_table(Path(__file__).parents[2] / "benchmarks" / "accuracy" / "published_runs.csv")}


def asked(model: str, cluster: str, *, batch: int, seq: int = 4096, precision: str = "bf16", **more: Any) -> Problem:
    workload = Workload(seq_len=seq, global_batch=batch, precision=load_precision(precision), era=load_era("latest"))
    return Problem(model=load_model(model), profile=nominal(load_cluster(cluster)), workload=workload, **more)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.run)
def test_a_recipe_is_what_its_row_says(recipe: Any) -> None:
    run = read_run(ROWS[recipe.run])
    assert (recipe.model, recipe.device, recipe.gpus) == (run.model.name, run.cluster.device.name, run.cluster.gpus)
    assert (recipe.global_batch, recipe.seq_len) == (run.workload.global_batch, run.workload.seq_len)
    assert recipe.precision == run.workload.precision.name and recipe.source
    one = Layouts.of([run.layout])
    assert recipe.layout and all(c.holds(one)[0] for c in recipe.conditions())
    assert set(recipe.layout) <= {f.name for f in dataclasses.fields(run.layout)} - {"dp", "edp"}
    if recipe.split:
        degrees = run.layout.pp, run.layout.vpp
        assert check_split(recipe.split, len(run.model.layers), len(run.model.mtp), *degrees) is None


def test_what_a_source_leaves_out_is_left_open() -> None:
    for recipe in recipes():
        row = ROWS[recipe.run]
        for cell, name in (
            ("mbs", "micro_batch"),
            ("dispatcher", "dispatcher"),
            ("cuda_graphs", "cuda_graphs"),
            ("vpp", "vpp"),
        ):
            assert row[cell] or name not in recipe.layout


def test_conditions_spell_every_kind_of_value() -> None:
    wanted = next(r for r in recipes() if r.run == "mbridge-26.04.01-018")
    texts = {c.text for c in wanted.conditions()}
    assert {"tp=1", "ep=32", "recompute=mla_up_proj+mlp", "ep_overlap=true", "dispatcher=deepep"} <= texts
    assert {c.field: c.value for c in wanted.conditions()}["dispatcher"] == DISPATCHERS.index("deepep")


def test_the_nearest_recipe() -> None:
    exact = recipe_for(asked("qwen3-235b-a22b", "h100x256", batch=8192, precision="fp8-cs"))
    assert exact is not None and (exact.device, exact.gpus, exact.precision) == ("H100", 256, "fp8-cs")
    far = asked("qwen3-235b-a22b", "h100x512", batch=2048)
    assert recipe_for(far) == exact and exact.differs_from(far) == "256 GPUs, batch 8192, fp8-cs"
    few, many = (recipe_for(asked("mixtral-8x22b-g8t8", f"h100x{n}", batch=1024)) for n in (64, 1024))
    assert few is not None and many is not None and (few.gpus, few.global_batch, many.gpus) == (128, 1024, 512)
    assert recipe_for(asked("qwen3-235b-a22b", "h100x256", batch=8192, seq=8192)) is None
    assert recipe_for(asked("qwen3-235b-a22b", "a100x256", batch=8192)) is None
