"""Export of a plan to Megatron-LM: arguments, environment, and the command of one process.

A plan that breaks a rule of Megatron is refused with the rule, and so is one that needs a flag that the version lacks. What a
plan does not know (data, tokenizer, learning rate, checkpoints) is filled with what a benchmark run needs; the scripts pass
further arguments on, and the last occurrence of a flag wins.
"""

from __future__ import annotations

import re
from pathlib import Path

from moeplan._version import VERSION
from moeplan.errors import ExportError
from moeplan.exporters.base import Exporter, Flag, Job, Reading, Variable, arguments_text, job_of, plain_name
from moeplan.exporters.flag_facts import check_version
from moeplan.exporters.megatron_layout import FACTS, is_megatron_script, layout_sections, passed_flags
from moeplan.exporters.neutral import PLAN, load_export
from moeplan.exporters.reading.imported import read_file
from moeplan.planner.constraints import violations
from moeplan.planner.plan import Plan

MEGATRON_CORE = FACTS.written_for
ARGUMENTS = "megatron.args"
"""Name of the argument file."""
_HYBRID_SCRIPTS = {"0.17.0": "pretrain_mamba.py"}
"""Script of Mamba hybrids in versions before the models were renamed."""


def arguments(plan: Plan, version: str = MEGATRON_CORE) -> dict[str, list[Flag]]:
    """The flags of a plan by section; `ExportError` where Megatron cannot run it."""
    broken = violations(plan.problem, plan.layout)
    if broken:
        rules = "; ".join(f"{v.rule}: {v}" for v in broken)
        raise ExportError(f"Megatron-LM {version} refuses this plan: {rules}")
    sections = layout_sections(plan, version)
    passed = {flag[0] for flag in passed_flags(plan)[0]}  # what the user's own version takes is not ours to judge
    FACTS.check([flag for flags in sections.values() for flag in flags if flag[0] not in passed], version)
    return sections


def environment(plan: Plan) -> dict[str, str]:
    """Environment variables that the arguments require."""
    layout, capability = plan.layout, plan.problem.profile.cluster.device.capability_number
    out = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if layout.sharding == "fsdp":
        out["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    elif layout.ep_overlap:
        out["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    elif (layout.tp > 1 or layout.cp > 1) and capability < 10:
        out["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if layout.cuda_graphs:
        out["NCCL_GRAPH_REGISTER"] = "0"
    if layout.optimizer_offload:
        out["OMP_NUM_THREADS"] = "8"  # the host updates parameters; torchrun leaves a process one thread
    said = {str(name): str(value) for name, value in plan.imported.get("environment", {}).items()}
    return {**{name: value for name, value in said.items() if re.fullmatch(r"[A-Za-z_]\w*", name)}, **out}


def transformer_engine(plan: Plan) -> str:
    """Least version of Transformer Engine that Megatron takes the arguments with."""
    if plan.layout.ep_overlap and plan.layout.cuda_graphs:
        return "2.12"
    return "2.10" if plan.layout.sharding == "fsdp" else "2.8"


class Megatron(Exporter):
    """Megatron-LM, which runs `pretrain_gpt.py` or `pretrain_hybrid.py` of a checkout."""

    name = "megatron"
    title = "Megatron-LM"
    versions = FACTS.versions
    version = FACTS.written_for

    def check(self, plan: Plan, version: str) -> None:
        """Refuse a broken rule, a model that Megatron lacks, and a flag that the version lacks."""
        check_version(self.title, version, self.versions)
        arguments(plan, version)

    def job(self, plan: Plan, version: str) -> Job:
        """The pretraining script with the plan's arguments."""
        script = _HYBRID_SCRIPTS.get(version, "pretrain_hybrid.py") if plan.problem.model.is_hybrid else "pretrain_gpt.py"
        return job_of(
            plan,
            program=("$PRETRAIN_SCRIPT",),
            arguments_file=ARGUMENTS,
            sections=arguments(plan, version),
            environment=environment(plan),
            variables=(
                Variable(
                    name="MEGATRON_LM", meaning=f"a Megatron-LM checkout (megatron-core {version}) that every node can read"
                ),
                Variable(name="PRETRAIN_SCRIPT", meaning="the script to start", default=f"$MEGATRON_LM/{script}"),
            ),
            requirements=_requirements(plan, version),
        )

    def files(self, plan: Plan, version: str) -> dict[str, str]:
        """The argument file."""
        job = self.job(plan, version)
        device = plain_name(plan.problem.profile.cluster.name)
        heading = [
            f"{job.name} on {device}: {plan.layout.degrees()}",
            f"written by moeplan {VERSION} for Megatron-LM with megatron-core {version}; {job.world} GPUs",
        ]
        return {ARGUMENTS: arguments_text(job, heading)}

    def notes(self, plan: Plan, version: str) -> list[str]:
        """Stand-ins and libraries."""
        x = plan.layout
        library = f", the library of the dispatcher `{x.dispatcher}`" if x.dispatcher in ("deepep", "hybridep") else ""
        rest = "are stand-ins for a benchmark run"
        if is_megatron_script(plan):
            left = passed_flags(plan)[1]
            rest = f"are those of `{plan.imported.get('file', '')}`" + (f", but for {', '.join(left)}" if left else "")
        notes = [
            f"Data, tokenizer, learning rate and iterations {rest} (last section of `{ARGUMENTS}`).",
            f"Transformer Engine {transformer_engine(plan)} or later, NCCL{library}.",
            "Checkpoints are distributed ones; add `--dist-ckpt-optim-fully-reshardable` to go on with another layout.",
        ]
        if version != MEGATRON_CORE:
            notes.append(f"The rules were checked for megatron-core {MEGATRON_CORE}, the names of the flags for {version}.")
        return notes

    def read(self, directory: Path) -> Reading:
        """Model, workload and layout of the argument file."""
        found = read_file(directory / ARGUMENTS, gpus=load_export(directory / PLAN)["gpus"])
        return Reading(model=found.model, workload=found.workload, layout=found.layout, world=found.world)


def _requirements(plan: Plan, version: str) -> tuple[str, ...]:
    minor = version.rsplit(".", 1)[0]
    out = ["torch>=2.4", f"megatron-core=={minor}.*"]
    if plan.problem.profile.cluster.device.vendor == "nvidia":
        out.append(f"transformer-engine>={transformer_engine(plan)}")
    if plan.layout.dispatcher in ("deepep", "hybridep"):
        out.append("deep-ep")
    return tuple(out)
