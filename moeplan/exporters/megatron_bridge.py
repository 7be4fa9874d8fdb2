"""Export of a plan to Megatron-Bridge: a recipe and the overrides that make it the plan.

The overrides are Megatron-LM's flags by other names (`megatron_bridge_facts.py`), so that Megatron's rules hold; Bridge itself
checks neither expert groups nor the layers of virtual stages. The model is the recipe's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moeplan._version import VERSION
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import named_model
from moeplan.errors import ExportError, MoeplanError
from moeplan.exporters.base import Exporter, Flag, Job, Reading, Variable, arguments_text, job_of
from moeplan.exporters.demands import Demand, check_demands
from moeplan.exporters.flag_facts import check_version
from moeplan.exporters.megatron import arguments, environment, transformer_engine
from moeplan.exporters.megatron_bridge_facts import bridge_facts, overrides_of
from moeplan.exporters.reading.bridge import ARGUMENTS, read_export
from moeplan.planner.plan import Plan


def recipe_of(model: Model) -> str:
    """The recipe whose model is the same, prediction layers aside; empty if none is known."""
    try:
        published = named_model(model.name)
    except MoeplanError:
        return ""
    same = published is not None and dataclasses.replace(published, mtp=model.mtp) == model
    return bridge_facts().recipes.get(model.name, "") if same else ""


DEMANDS: tuple[Demand, ...] = (
    Demand(
        "recipe",
        "the model is one that a recipe is known for",
        lambda plan: not recipe_of(plan.problem.model),
        lambda plan: f"{plan.problem.model.name} is not one of {', '.join(bridge_facts().recipes)}, as published",
        "--to megatron takes more models",
    ),
    Demand(
        "precision",
        "precision bf16, fp8-delayed or fp8-mx: other recipes keep some layers in bf16 or weights in another format",
        lambda plan: plan.problem.workload.precision.name not in bridge_facts().precisions,
        lambda plan: plan.problem.workload.precision.name,
        "--precision bf16",
    ),
    Demand(
        "gradients",
        "gradients in fp32, which every precision recipe sets",
        lambda plan: plan.problem.workload.gradient_bytes != 4,
        lambda plan: f"gradients of {plan.problem.workload.gradient_bytes} bytes",
    ),
)  # fmt: skip
"""What Megatron-Bridge demands of a plan beside Megatron's rules."""


def overrides(plan: Plan) -> dict[str, str]:
    """The overrides of a plan by key; communication overlap is set on the model, not by a `comm_overlap` of the recipe."""
    sections = arguments(plan)
    flags: list[Flag] = [f for name, part in sections.items() for f in part if name != "model" or f[0] == "--mtp-num-layers"]
    known = {fact.flag for fact in bridge_facts().keys.values()} | set(bridge_facts().covered)
    if lost := [flag[0] for flag in flags if flag[0] not in known]:
        raise ExportError(f"Megatron-Bridge has no override for {', '.join(lost)}, which this plan needs")
    x = plan.layout
    out = {
        "mixed_precision": bridge_facts().precisions[plan.problem.workload.precision.name],
        "comm_overlap": "null",
        "model.cuda_graph_scope": "null",  # an older name of cuda_graph_modules, which recipes set
        **overrides_of(flags),
        "model.overlap_p2p_comm": str(x.vpp > 1).lower(),
        "model.batch_p2p_comm": str(x.vpp == 1).lower(),
    }
    return {**out, "model.virtual_pipeline_model_parallel_size": str(x.vpp) if x.vpp > 1 else "null"}


class MegatronBridge(Exporter):
    """Megatron-Bridge, which runs `run_recipe.py` of a checkout."""

    name = "megatron-bridge"
    title = "Megatron-Bridge"
    versions = bridge_facts().versions
    version = bridge_facts().written_for

    def check(self, plan: Plan, version: str) -> None:
        """Refuse a broken rule of Megatron, and a model without a recipe."""
        check_version(self.title, version, self.versions)
        check_demands(f"{self.title} {version}", DEMANDS, plan)
        overrides(plan)

    def job(self, plan: Plan, version: str) -> Job:
        """The recipe script with the overrides."""
        return job_of(
            plan,
            program=("$RUN_RECIPE",),
            arguments_file=ARGUMENTS,
            sections={
                "recipe": [("--recipe", recipe_of(plan.problem.model)), ("--mode", "pretrain"), ("--dataset", "mock")],
                "overrides": [(f"{key}={value}",) for key, value in overrides(plan).items()],
            },
            environment=environment(plan),
            variables=(
                Variable(name="MEGATRON_BRIDGE", meaning=f"a Megatron-Bridge checkout ({version}) that every node can read"),
                Variable(
                    name="RUN_RECIPE", meaning="the script to start", default="$MEGATRON_BRIDGE/scripts/training/run_recipe.py"
                ),
            ),
            requirements=_requirements(plan, version),
        )

    def files(self, plan: Plan, version: str) -> dict[str, str]:
        """The argument file, one override a line."""
        job = self.job(plan, version)
        heading = [
            f"{plan.problem.model.name} on {plan.problem.profile.cluster.name}: {plan.layout.degrees()}",
            f"written by moeplan {VERSION} for Megatron-Bridge {version}; {job.world} GPUs",
        ]
        return {ARGUMENTS: arguments_text(job, heading)}

    def notes(self, plan: Plan, version: str) -> list[str]:
        """Stand-ins and libraries."""
        return [
            f"The model is that of the recipe `{recipe_of(plan.problem.model)}`, which asks a model hub for its configuration.",
            "Data are the recipe's mock data; learning rate and schedule are the recipe's.",
            f"Transformer Engine {transformer_engine(plan)} or later. Checkpoints are distributed ones.",
        ]

    def read(self, directory: Path) -> Reading:
        """Model, workload and layout of the overrides."""
        return read_export(directory)


def _requirements(plan: Plan, version: str) -> tuple[str, ...]:
    out = ["torch>=2.6", f"megatron-bridge=={version}"]
    if plan.problem.profile.cluster.device.vendor == "nvidia":
        out.append(f"transformer-engine>={transformer_engine(plan)}")
    return (*out, "deep-ep") if plan.layout.dispatcher in ("deepep", "hybridep") else tuple(out)
