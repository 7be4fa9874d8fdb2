"""A torchtitan recipe read back: model, layout and workload, without running it.

Read are functions that return a `Trainer.Config`: what they give to model_registry, TrainingConfig, ParallelismConfig and
CompileConfig as literals, and later assignments to fields of these (`config.parallelism.tensor_parallel_degree = 8`).
Fields that are absent have the defaults of torchtitan 0.3.0. World = replicas x shards x cp x tp x pp.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import chunk_letters, format_split
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.errors import FileError, LayoutError, SchemaError
from moeplan.exporters.base import Reading
from moeplan.exporters.neutral import PLAN, read_plan
from moeplan.exporters.torchtitan_demands import BACKENDS, replicas, titan_models
from moeplan.records import read_text

RECIPE = "moeplan_recipe.py"
"""Name of the recipe module in an export."""
FUNCTION = "plan"
"""Name of its function."""
ARGUMENTS = "torchtitan.args"
"""Name of the argument file."""
_SECTIONS = {"TrainingConfig": "training", "ParallelismConfig": "parallelism", "CompileConfig": "compile"}
_DEFAULTS: Mapping[str, Any] = {
    "training.local_batch_size": 8,
    "training.global_batch_size": -1,
    "training.seq_len": 2048,
    "training.disable_cuda_graphs": False,
    "training.enable_cpu_offload": False,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": -1,
    "parallelism.tensor_parallel_degree": 1,
    "parallelism.enable_sequence_parallel": True,
    "parallelism.context_parallel_degree": 1,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.pipeline_parallel_schedule": "1F1B",
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "parallelism.module_fqns_per_model_part": None,
    "parallelism.expert_parallel_degree": 1,
    "compile.enable_async_tensor_parallel": False,
    "model_registry.moe_comm_backend": "standard",
    "model_registry.num_mtp_layers": 0,
}
_DEGREES = tuple(f"parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline", "expert"))
_COUNTS = tuple(name for name, value in _DEFAULTS.items() if isinstance(value, int) and not isinstance(value, bool))
"""Fields that are whole numbers."""


class _Unknown(str):
    """An expression, whose value only the recipe itself knows."""


def read_recipe(text: str, where: str, function: str = "") -> dict[str, Any]:
    """Fields of a recipe's configuration by "section.field", those that are literals; defaults are not filled in."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SchemaError(f"{where} is no Python module: {error}") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and _names_trainer(node)}
    if function and function not in functions:
        raise FileError(f"{where} has no recipe '{function}'", hint=f"it has {', '.join(functions) or 'none'}")
    if len(functions) != 1 and not function:
        raise FileError(f"{where} has {len(functions)} functions that return a Trainer.Config", hint="one recipe is read")
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "model_registry" for alias in node.names):
            found["model_registry.module"] = (node.module or "").rsplit(".", 1)[-1]
    chosen = functions[function] if function else next(iter(functions.values()))
    for node in ast.walk(chosen):
        if isinstance(node, ast.Call):
            _read_call(node, found)
    for node in ast.walk(chosen):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            _read_assignment(node.targets[0], node.value, found)
    return found


def _names_trainer(node: ast.FunctionDef) -> bool:
    return any(
        isinstance(n, ast.Attribute) and n.attr == "Config" and ast.unparse(n).endswith("Trainer.Config")
        for n in ast.walk(node)
    )


def _read_call(node: ast.Call, found: dict[str, Any]) -> None:
    name = ast.unparse(node.func).rsplit(".", 1)[-1]
    if name == "model_registry":
        if node.args:
            _put(found, "model_registry.flavor", node.args[0])
        for keyword in node.keywords:
            _put(found, f"model_registry.{keyword.arg}", keyword.value)
    elif name in _SECTIONS:
        for keyword in node.keywords:
            _put(found, f"{_SECTIONS[name]}.{keyword.arg}", keyword.value)
    for keyword in node.keywords:
        if keyword.arg == "activation_checkpoint":
            found["activation_checkpoint"] = _policy(keyword.value)


def _read_assignment(target: ast.expr, value: ast.expr, found: dict[str, Any]) -> None:
    words = ast.unparse(target).split(".")
    if len(words) == 3 and words[1] in _SECTIONS.values():
        _put(found, f"{words[1]}.{words[2]}", value)
    elif len(words) == 2 and words[1] == "activation_checkpoint":
        found["activation_checkpoint"] = _policy(value)


def _policy(node: ast.expr) -> str:
    """Name of a recompute policy: "FullAC", "SelectiveAC" or "None"."""
    return ast.unparse(node).split("(")[0].removesuffix(".Config").rsplit(".", 1)[-1]


def _put(found: dict[str, Any], name: str, node: ast.expr) -> None:
    try:
        found[name] = ast.literal_eval(node)
    except ValueError:
        if name in (*_DEFAULTS, "model_registry.flavor"):
            found[name] = _Unknown(ast.unparse(node))


def read_fields(
    found: Mapping[str, Any], world: int | None, remarks: list[str], *, where: str, era: str = "latest"
) -> tuple[Model, Workload, Layout]:
    """Model, workload and layout of a recipe's fields; `world` is needed where the shards are "the rest" (-1)."""
    for name, given in found.items():
        if isinstance(given, _Unknown):
            raise SchemaError(f"{where}: {name} is {given!r}, which only running it tells", hint="write the value itself")
        if name in (*_DEGREES, "parallelism.data_parallel_replicate_degree") and isinstance(given, int) and given < 1:
            raise SchemaError(f"{where}: {name} is {given}, at least 1 is needed")
    for name in _COUNTS:
        if name in found and (not isinstance(found[name], int) or isinstance(found[name], bool)):
            raise SchemaError(f"{where}: {name} is {found[name]!r}, not a whole number")
    value = {**_DEFAULTS, **found}
    model = _model(value, where)
    p = {name.removeprefix("parallelism."): v for name, v in value.items() if name.startswith("parallelism.")}
    tp, cp, pp, ep = (p[f"{axis}_parallel_degree"] for axis in ("tensor", "context", "pipeline", "expert"))
    replicate, shard = p["data_parallel_replicate_degree"], p["data_parallel_shard_degree"]
    if shard < 0:
        if world is None:
            raise FileError(f"{where}: data_parallel_shard_degree is -1, the rest of the GPUs", hint="say it with --gpus N")
        shard = world // (replicate * cp * tp * pp)
    dp = replicate * shard
    if world is not None and dp * cp * tp * pp != world:
        raise LayoutError(f"{where}: dp*cp*tp*pp = {dp}*{cp}*{tp}*{pp} is not the {world} GPUs")
    if replicate > 1 and shard * cp > 1:
        remarks.append(f"shards of {shard} ranks, {replicate} times, are priced as shards of all {dp}")
    micro, batch = _batches(value, dp, pp)
    stages, vpp = _stages(model, p, pp)
    policy = found.get("activation_checkpoint", "SelectiveAC")
    if policy not in ("None", "FullAC"):
        remarks.append(f"{policy} is priced without recompute")
    layout = Layout(
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        ep=ep,
        edp=_share(dp * cp * tp, ep, where),
        micro_batch=micro,
        sequence_parallel=bool(p["enable_sequence_parallel"]) and tp > 1,
        sharding="ddp" if replicate > 1 and shard * cp == 1 else "fsdp",
        recompute=("full",) if policy == "FullAC" else (),
        dispatcher=_dispatcher(model, value),  # type: ignore[arg-type]
        tp_overlap=bool(value["compile.enable_async_tensor_parallel"]),
        cuda_graphs=() if value["training.disable_cuda_graphs"] else ("full_iteration",),
        stages=stages,
    )
    if value["training.enable_cpu_offload"]:
        remarks.append("enable_cpu_offload: weights, gradients and states are priced on the device")
    workload = Workload(
        seq_len=value["training.seq_len"], global_batch=batch, precision=load_precision("bf16"), era=load_era(era)
    )
    return model, workload, layout


def _model(value: Mapping[str, Any], where: str) -> Model:
    module, flavor = value.get("model_registry.module"), value.get("model_registry.flavor")
    for name, known in titan_models().items():
        if (known.module, known.flavor) == (module, flavor):
            model = load_model(name)
            return dataclasses.replace(model, mtp=model.mtp[: value["model_registry.num_mtp_layers"]])
    raise FileError(f"{where}: model '{flavor}' of torchtitan.models.{module} is not known", hint="see docs/export-targets.md")


def _dispatcher(model: Model, value: Mapping[str, Any]) -> str:
    if model.moe is None:
        return "none"
    backend = value["model_registry.moe_comm_backend"]
    return {theirs: ours for ours, theirs in BACKENDS.items()}.get(backend, str(backend))


def _share(ranks: int, ep: int, where: str) -> int:
    if ranks % ep:
        raise LayoutError(f"{where}: expert_parallel_degree {ep} does not divide dp_shard*cp*tp = {ranks}")
    return ranks // ep


def _batches(value: Mapping[str, Any], dp: int, pp: int) -> tuple[int, int]:
    """Sequences of a micro-batch and of a step."""
    local, whole = value["training.local_batch_size"], value["training.global_batch_size"]
    micro = value["parallelism.pipeline_parallel_microbatch_size"] if pp > 1 else local
    return micro, local * dp if whole < 0 else whole


def _stages(model: Model, p: Mapping[str, Any], pp: int) -> tuple[str, int]:
    """The split and the chunks of a rank; the empty split is the even one."""
    parts = p["module_fqns_per_model_part"]
    if pp == 1 or not parts:
        return "", 1 if pp == 1 or p["pipeline_parallel_schedule"] == "1F1B" else 2
    letters = tuple(
        "".join({"tok_embeddings": "E", "lm_head": "L"}.get(n, "t" if n.startswith("layers.") else "") for n in part)
        for part in parts
    )
    vpp = max(len(parts) // pp, 1)
    even = len(model.layers) % len(parts) == 0 and letters == chunk_letters(model, pp, vpp, "")
    return "" if even else format_split(letters), vpp


def read_export(directory: Path) -> Reading:
    """What the files of an export say; the software era, and the text of a split that agrees, are those of `plan.json`."""
    said = read_plan(directory / PLAN)
    where = f"recipe '{directory / RECIPE}'"
    found = read_recipe(read_text(directory / RECIPE, "recipe"), where, FUNCTION)
    model, workload, layout = read_fields(found, None, [], where=where, era=said.workload.era.name)
    theirs, ours = (chunk_letters(model, layout.pp, layout.vpp, stages) for stages in (layout.stages, said.layout.stages))
    if layout.pp == 1 or theirs == ours:
        layout = dataclasses.replace(layout, stages=said.layout.stages)
    if replicas(layout) == 1:  # nothing to shard or to reduce
        layout = dataclasses.replace(layout, sharding=said.layout.sharding, dp_overlap=said.layout.dp_overlap)
    return Reading(model=model, workload=workload, layout=layout, world=layout.world)
