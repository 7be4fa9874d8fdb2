"""Export of a plan to DeepSpeed: its JSON, the model's configuration, and a script that trains the one as the other says.

Experts are placed by AutoEP, which replaces the layers of a model of `transformers`; where the plan also fits DeepSpeed's older
MoE layer, its constructor arguments are written beside. What DeepSpeed lacks is refused (`deepspeed_config.DEMANDS`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.exporters.base import Exporter, Job, Reading, Variable, arguments_text, job_of
from moeplan.exporters.deepspeed_config import (
    DEMANDS,
    FACTS,
    config,
    flat,
    megatron_config,
    megatron_flags,
    model_config,
    model_facts,
    native_layer,
)
from moeplan.exporters.deepspeed_script import SCRIPT
from moeplan.exporters.demands import check_demands
from moeplan.exporters.flag_facts import check_version
from moeplan.exporters.megatron_deepspeed_facts import CONFIG as MEGATRON_CONFIG
from moeplan.exporters.reading.deepspeed import ARGUMENTS, CONFIG, MODEL, read_export
from moeplan.planner.plan import Plan

NATIVE = "native_moe.json"
"""Name of the file with arguments of the older MoE layer."""
MEGATRON = "megatron_deepspeed.args"
"""Name of the file with flags of Megatron-DeepSpeed."""


class DeepSpeed(Exporter):
    """DeepSpeed with AutoEP, on a model of `transformers`."""

    name = "deepspeed"
    title = "DeepSpeed"
    versions = FACTS.versions
    version = FACTS.written_for

    def check(self, plan: Plan, version: str) -> None:
        """Refuse what DeepSpeed cannot run, and keys that the version lacks."""
        check_version(self.title, version, self.versions)
        check_demands(f"{self.title} {version}", DEMANDS, plan)
        FACTS.check(flat(config(plan, version)), version)

    def job(self, plan: Plan, version: str) -> Job:
        """The training script on every GPU."""
        return job_of(
            plan,
            program=(
                "$TRAIN_SCRIPT",
                "--deepspeed",
                "--deepspeed_config",
                f"$here/{CONFIG}",
                "--model_config",
                f"$here/{MODEL}",
            ),
            arguments_file=ARGUMENTS,
            sections={
                "workload": [("--seq_length", str(plan.problem.workload.seq_len))],
                "benchmark stand-in: replace with your schedule": [("--train_iters", "50")],
            },
            environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            variables=(Variable(name="TRAIN_SCRIPT", meaning="the script to start", default="$here/train.py"),),
            requirements=_requirements(plan, version),
        )

    def files(self, plan: Plan, version: str) -> dict[str, str]:
        """The JSON, the model's configuration, the script, the arguments, and the older layer's where it runs the plan."""
        heading = [
            f"{plan.problem.model.name} on {plan.problem.profile.cluster.name}: {plan.layout.degrees()}",
            f"written by moeplan {VERSION} for DeepSpeed {version}; {plan.layout.world} GPUs",
        ]
        out = {
            CONFIG: _json(config(plan, version)),
            MODEL: _json(model_config(plan.problem.model)),
            "train.py": SCRIPT,
            ARGUMENTS: arguments_text(self.job(plan, version), heading),
        }
        if (native := native_layer(plan)) is not None:
            out[NATIVE] = _json(native)
        if (flags := megatron_flags(plan)) is not None:
            out[MEGATRON] = "".join(" ".join(flag) + "\n" for flag in flags)
            out[MEGATRON_CONFIG] = _json(megatron_config(plan, version))
        return out

    def notes(self, plan: Plan, version: str) -> list[str]:
        """Stand-ins, libraries, and what DeepSpeed does otherwise."""
        notes = [
            "`train.py` trains on random tokens; every rank builds the whole model in host memory before DeepSpeed cuts it.",
            "Steps were priced with Megatron's kernels and schedule, not measured with DeepSpeed.",
            f"Presets of AutoEP break with other versions of the library: `{model_facts()['transformers']}`.",
        ]
        if plan.problem.model.moe is not None:
            notes.append("Experts are placed by AutoEP (`expert_parallel`), which drops no tokens and has no balancing loss.")
            notes.append(
                f"`{NATIVE}` has the arguments of `deepspeed.moe.layer.MoE` for a model of your own that runs the same plan: "
                "take `expert_parallel` out of the JSON, and give the optimizer "
                "`split_params_into_different_moe_groups_for_optimizer(...)`."
                + (
                    f" `{MEGATRON}` has Megatron-DeepSpeed's flags for it, `{MEGATRON_CONFIG}` the JSON that they name; add "
                    "`--data-path`."
                    if megatron_flags(plan)
                    else ""
                )
                if native_layer(plan) is not None
                else "DeepSpeed's older layer (`deepspeed.moe.layer.MoE`) does not run this plan: it takes ZeRO 1 and 2, "
                "all-to-all and a softmax router only."
            )
        return notes

    def read(self, directory: Path) -> Reading:
        """Layout and workload of the JSON, the model of its configuration."""
        return read_export(directory)


def _requirements(plan: Plan, version: str) -> tuple[str, ...]:
    deep = ("deep-ep",) if plan.layout.dispatcher == "deepep" else ()
    return ("torch>=2.4", f"deepspeed=={version}", *deep, str(model_facts()["transformers"]))


def _json(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"
