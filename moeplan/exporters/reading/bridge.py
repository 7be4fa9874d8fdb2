"""Overrides of a Megatron-Bridge recipe read back: they are Megatron-LM's flags by other names, the model is the recipe's.

What is not overridden has the recipe's value, which nothing here knows: it is read as Megatron's default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.workload import Workload, load_precision
from moeplan.errors import FileError
from moeplan.exporters.base import Reading, read_arguments
from moeplan.exporters.megatron_bridge_facts import bridge_facts, flags_of
from moeplan.exporters.neutral import PLAN, read_plan
from moeplan.exporters.reading.flags import split_words
from moeplan.exporters.reading.megatron_layout import read_global_batch, read_layout, read_sequence, read_workload
from moeplan.records import read_text

ARGUMENTS = "megatron_bridge.args"
"""Name of the argument file in an export."""
SHORT = {
    "-tp": "model.tensor_model_parallel_size",
    "-pp": "model.pipeline_model_parallel_size",
    "-vp": "model.virtual_pipeline_model_parallel_size",
    "-cp": "model.context_parallel_size",
    "-ep": "model.expert_model_parallel_size",
    "-etp": "model.expert_tensor_parallel_size",
    "-mb": "train.micro_batch_size",
    "-gb": "train.global_batch_size",
    "-ms": "train.train_iters",
    "-sl": "dataset.seq_length",
}
"""Options of run_recipe.py that stand for overrides."""


def read_words(words: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Recipe and overrides of a command line; the last override of a key wins."""
    recipe, out, before = "", {}, ""
    for word in words:
        if before in SHORT:
            out[SHORT[before]] = word
        elif before == "--recipe":
            recipe = word
        elif not word.startswith("-") and not before.startswith("--") and "=" in word:
            key, _, value = word.partition("=")
            out[key.lstrip("+")] = value
        before = word if word.startswith("-") and "=" not in word else ""
    return recipe, out


def recipe_model(recipe: str) -> Model:
    """The model of a recipe."""
    for name, known in bridge_facts().recipes.items():
        if known == recipe:
            return load_model(name)
    raise FileError(
        f"recipe '{recipe}' of Megatron-Bridge is not one whose model is known",
        hint=f"known are {', '.join(bridge_facts().recipes.values())}",
    )


def read_overrides(
    recipe: str, overrides: Mapping[str, str], world: int, remarks: list[str], faults: list[str], era: str = "latest"
) -> tuple[Model, Workload, Layout]:
    """Model, workload and layout of a recipe with overrides on `world` GPUs."""
    name = overrides.get("mixed_precision", "bf16_mixed")
    precision = {theirs: ours for ours, theirs in bridge_facts().precisions.items()}.get(name.replace("-", "_"))
    if precision is None:
        remarks.append(f"mixed_precision={name} is priced as bf16")
    flags = split_words(
        [*load_precision(precision or "bf16").megatron, *(w for flag in flags_of(_plain(overrides)) for w in flag)]
    )
    model = recipe_model(recipe)
    if "model.mtp_num_layers" in overrides:
        model = dataclasses.replace(model, mtp=model.mtp[: flags.number("--mtp-num-layers") or 0])
    seq_len = read_sequence(flags)
    layout = read_layout(flags, model, world, remarks, faults)
    return model, read_workload(flags, seq_len, read_global_batch(flags, layout.dp, remarks), era, remarks), layout


def _plain(overrides: Mapping[str, str]) -> dict[str, str]:
    """The overrides of which a split that is written out says the virtual stages by itself."""
    written = overrides.get("model.pipeline_model_parallel_layout", "null") not in ("null", "None", "")
    dropped = "model.virtual_pipeline_model_parallel_size" if written else ""
    return {key: value for key, value in overrides.items() if key != dropped}


def read_export(directory: Path) -> Reading:
    """What the files of an export say; the number of GPUs and the software era are those of `plan.json`."""
    said = read_plan(directory / PLAN)
    _, words = read_arguments(read_text(directory / ARGUMENTS, "argument file"))
    recipe, found = read_words(words)
    model, workload, layout = read_overrides(recipe, found, said.world, [], [], said.workload.era.name)
    return Reading(model=model, workload=workload, layout=layout, world=layout.world)
