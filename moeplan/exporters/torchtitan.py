"""Export of a plan to torchtitan: a recipe module, which `--module moeplan_recipe --config plan` picks.

The recipe is Python because torchtitan's command line is frozen. It is also what is started, so that it finds itself. What
torchtitan lacks is refused (`torchtitan_demands.DEMANDS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError
from moeplan.exporters.base import Exporter, Flag, Job, Reading, Variable, arguments_text, job_of
from moeplan.exporters.demands import check_demands
from moeplan.exporters.flag_facts import check_version, load_facts
from moeplan.exporters.reading.torchtitan import ARGUMENTS, FUNCTION, RECIPE, read_export
from moeplan.exporters.torchtitan_demands import BACKENDS, DEMANDS, TitanModel, titan_model
from moeplan.planner.plan import Plan

FACTS = load_facts("torchtitan")
"""What is known of torchtitan's fields."""


def sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """Fields of the configuration by section."""
    x, workload = plan.layout, plan.problem.workload
    steps = workload.global_batch // (x.micro_batch * x.dp)
    replicate, shard = (x.dp, 1) if x.sharding == "ddp" else (1, x.dp)
    return {
        "training": {
            "local_batch_size": x.micro_batch * (steps if x.pp > 1 else 1),
            "global_batch_size": workload.global_batch,
            "seq_len": workload.seq_len,
            "steps": 50,
            "dtype": "float32",
            "mixed_precision_param": "bfloat16",
            "mixed_precision_reduce": "float32",
            "enable_cpu_offload": False,
            "disable_cuda_graphs": not x.cuda_graphs,
        },
        "parallelism": {
            "data_parallel_replicate_degree": replicate,
            "data_parallel_shard_degree": shard,
            "fsdp_reshard_after_forward": "always",
            "tensor_parallel_degree": x.tp,
            "enable_sequence_parallel": x.sequence_parallel and x.tp > 1,
            "context_parallel_degree": x.cp,
            "pipeline_parallel_degree": x.pp,
            **(_pipeline(plan) if x.pp > 1 else {}),
            "expert_parallel_degree": x.ep,
        },
        "compile": {"enable": x.tp_overlap, "enable_async_tensor_parallel": x.tp_overlap},
    }


def _pipeline(plan: Plan) -> dict[str, Any]:
    x = plan.layout
    return {
        "pipeline_parallel_schedule": "Interleaved1F1B" if x.vpp > 1 else "1F1B",
        "pipeline_parallel_microbatch_size": x.micro_batch,
        "module_fqns_per_model_part": chunk_modules(plan),
    }


def chunk_modules(plan: Plan) -> list[list[str]]:
    """Modules of every chunk, in order; chunk c runs on pipeline rank c mod pp, as in the plan."""
    x = plan.layout
    out, layer = [], 0
    for letters in chunk_letters(plan.problem.model, x.pp, x.vpp, x.stages):
        names = ["tok_embeddings"] if "E" in letters else []
        count = letters.count("t")
        names += [f"layers.{i}" for i in range(layer, layer + count)]
        out.append(names + (["norm", "lm_head"] if "L" in letters else []))
        layer += count
    return out


def registry(plan: Plan) -> dict[str, Any]:
    """Arguments of torchtitan's `model_registry`."""
    model = plan.problem.model
    backend = BACKENDS[plan.layout.dispatcher]
    return {
        "flavor": _titan(plan).flavor,
        "attn_backend": "flex",
        **({"moe_comm_backend": backend} if backend else {}),
        **({"num_mtp_layers": len(model.mtp)} if model.mtp else {}),
    }


def _titan(plan: Plan) -> TitanModel:
    found = titan_model(plan.problem.model)
    if found is None:
        raise ExportError(f"torchtitan has no model '{plan.problem.model.name}'")
    return found


def recipe(plan: Plan, version: str) -> str:
    """Text of the recipe module."""
    found, full, mtp = _titan(plan), plan.layout.recompute == ("full",), bool(plan.problem.model.mtp)
    loss = "MTPLoss" if mtp else "CrossEntropyLoss"
    source = "torchtitan.models.deepseek_v3.mtp" if mtp else "torchtitan.components.loss"
    values = sections(plan)
    cluster = plan.problem.profile.cluster
    imports = [
        f"from {source} import {loss}",
        "from torchtitan.components.metrics import MetricsProcessor",
        "from torchtitan.components.optimizer import default_adamw",
        "from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig",
        *(["from torchtitan.distributed.activation_checkpoint import FullAC"] if full else []),
        "from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader",
        "from torchtitan.models.common.config_utils import decoder_vocab_size",
        f"from torchtitan.models.{found.module} import model_registry",
        "from torchtitan.trainer import Trainer",
    ]
    return f'''"""{plan.problem.model.name} on {cluster.name}: {plan.layout.degrees()}; {plan.layout.world} GPUs.

Written by moeplan {VERSION} for torchtitan {version}. Data, learning rate and steps are stand-ins for a benchmark run.
"""

import os

{_lines(imports)}


def {FUNCTION}() -> Trainer.Config:
    model_spec = model_registry({_arguments(registry(plan))})
    return Trainer.Config(
        model_spec=model_spec,
        hf_assets_path=os.environ.get("HF_ASSETS", "./tests/assets/tokenizer"),
        loss={loss}.Config(global_vocab_size=decoder_vocab_size(model_spec)),
        dataloader=HuggingFaceTextDataLoader.Config(dataset=os.environ.get("DATASET", "c4")),
        optimizer=default_adamw(lr=1e-4),
        metrics=MetricsProcessor.Config(log_freq=1),
        training=TrainingConfig({_block(values["training"])}),
        parallelism=ParallelismConfig({_block(values["parallelism"])}),
        activation_checkpoint={"FullAC.Config()" if full else "None"},
        compile=CompileConfig({_arguments(values["compile"])}),
    )


if __name__ == "__main__":
    from torchtitan.train import main

    main()
'''


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_literal(value)}" for name, value in values.items())


def _block(values: Mapping[str, Any]) -> str:
    return "".join(f"\n            {name}={_literal(value)}," for name, value in values.items()) + "\n        "


def _literal(value: Any) -> str:
    """A Python literal; lists of modules take a line each."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[" + "".join(f"\n                {one!r}," for one in value) + "\n            ]"
    return repr(value)


def fields(plan: Plan) -> list[Flag]:
    """All fields with their values as words, by the names of flags/torchtitan.yaml."""
    parts = {"model_registry": {k: v for k, v in registry(plan).items() if k != "attn_backend"}, **sections(plan)}
    out: list[Flag] = [(f"{part}.{name}", str(value)) for part, values in parts.items() for name, value in values.items()]
    return [*out, ("activation_checkpoint", "FullAC" if plan.layout.recompute else "None")]


class TorchTitan(Exporter):
    """torchtitan, started through a recipe of its own."""

    name = "torchtitan"
    title = "torchtitan"
    versions = FACTS.versions
    version = FACTS.written_for

    def check(self, plan: Plan, version: str) -> None:
        """Refuse what torchtitan cannot run, and fields that the version lacks."""
        check_version(self.title, version, self.versions)
        check_demands(f"{self.title} {version}", DEMANDS, plan)
        FACTS.check(fields(plan), version)

    def job(self, plan: Plan, version: str) -> Job:
        """The recipe on every GPU."""
        return job_of(
            plan,
            program=(f"$here/{RECIPE}",),
            arguments_file=ARGUMENTS,
            sections={"recipe": [("--module", RECIPE.removesuffix(".py")), ("--config", FUNCTION)]},
            environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            variables=(
                Variable(
                    name="HF_ASSETS", meaning="a folder with the tokenizer of the model", default="./tests/assets/tokenizer"
                ),
                Variable(name="DATASET", meaning="a dataset that torchtitan knows", default="c4"),
            ),
            requirements=("torch>=2.13", f"torchtitan=={version}", *_dispatcher(plan)),
        )

    def files(self, plan: Plan, version: str) -> dict[str, str]:
        """The recipe and its arguments."""
        heading = [f"written by moeplan {VERSION} for torchtitan {version}; {plan.layout.world} GPUs"]
        return {RECIPE: recipe(plan, version), ARGUMENTS: arguments_text(self.job(plan, version), heading)}

    def notes(self, plan: Plan, version: str) -> list[str]:
        """Stand-ins, and what torchtitan does otherwise."""
        return [
            f"Dataset, tokenizer, learning rate and steps are stand-ins for a benchmark run; change them in `{RECIPE}`.",
            "Steps were priced with Megatron's kernels and schedules, not measured with torchtitan. `compile` is "
            + ("on for the overlap of tensor parallelism." if plan.layout.tp_overlap else "off; switch it on in the recipe."),
            "Weights are kept in fp32, sharded, and gathered in bf16.",
        ]

    def read(self, directory: Path) -> Reading:
        """Model, layout and workload of the recipe."""
        return read_export(directory)


def _dispatcher(plan: Plan) -> tuple[str, ...]:
    return ("deep-ep",) if plan.layout.dispatcher in ("deepep", "hybridep") else ()
