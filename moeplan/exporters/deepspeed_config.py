"""What DeepSpeed is told of a plan: its JSON, with ZeRO, AutoTP, AutoEP and offload, and what it cannot run.

Written for deepspeed 0.19.8 on models of `transformers`; flags/deepspeed.yaml lists the keys by version.
World = autotp_size x dp, train_batch_size = micro-batch x accumulation steps x dp. "auto" is never written: only the Trainer
of `transformers` fills it in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.model import Model, Moe
from moeplan.errors import MoeplanError
from moeplan.exporters.base import Flag
from moeplan.exporters.demands import ALL_LAYERS, Demand, whole_layers, without_capacity, without_features
from moeplan.exporters.flag_facts import load_facts
from moeplan.exporters.megatron_deepspeed_facts import CONFIG as MEGATRON_CONFIG
from moeplan.exporters.megatron_deepspeed_facts import model_flags
from moeplan.planner.plan import Plan
from moeplan.records import load_yaml

FACTS = load_facts("deepspeed")
"""What is known of DeepSpeed's keys."""
STAGES = {"optimizer": 1, "fsdp": 3}
"""ZeRO stage of a sharding."""
BACKENDS = {"alltoall": "comm", "deepep": "deepep"}
"""AutoEP's name of a dispatcher."""
BUCKET = 500_000_000
"""Elements that are reduced or gathered at once, DeepSpeed's default."""
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")


@functools.cache
def model_facts() -> dict[str, Any]:
    """Contents of flags/deepspeed_models.yaml."""
    return dict(load_yaml(Path(__file__).parent / "flags" / "deepspeed_models.yaml", "flag file"))


def model_config(model: Model) -> dict[str, Any] | None:
    """The published configuration, brought to the layers that are trained; None if that does not give the model."""
    config = json.loads(json.dumps(dict(model.config), default=str))
    config |= {key: len(model.layers) for key in _LAYERS if key in config}
    config |= {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in config else {}
    try:
        found = read_config(config, name=model.name, source=model.source)
    except MoeplanError:
        return None
    return config if dataclasses.replace(found, remarks=model.remarks) == model else None


def known_class(model: Model) -> bool:
    """Whether transformers has a class of a model, and AutoEP a preset if it has experts."""
    facts = model_facts()
    return model.family in facts["classes"] and (model.moe is None or model.family in facts["presets"])


DEMANDS: tuple[Demand, ...] = (
    Demand(
        "model-class",
        "the model is one that transformers has a class of, and AutoEP a preset if it has experts",
        lambda plan: not known_class(plan.problem.model),
        lambda plan: f"{plan.problem.model.name} is '{plan.problem.model.family}', not one of {model_facts()['classes']}",
    ),
    Demand(
        "model-config",
        "the layers are those of the published configuration",
        lambda plan: not plan.problem.model.mtp and model_config(plan.problem.model) is None,
        lambda plan: f"no configuration gives {plan.problem.model.name} as it is planned",
    ),
    Demand(
        "prediction-layers",
        "no prediction (MTP) layers, which transformers does not train",
        lambda plan: bool(plan.problem.model.mtp),
        lambda plan: f"{plan.problem.model.name} has {len(plan.problem.model.mtp)}",
        "solve with --no-mtp",
    ),
    Demand(
        "pipeline",
        "pp = 1: a pipeline of DeepSpeed is code (PipelineModule), which no configuration makes of a model",
        lambda plan: plan.layout.pp > 1,
        lambda plan: f"pp={plan.layout.pp}, vpp={plan.layout.vpp}",
        "--pin pp=1",
    ),
    Demand(
        "context",
        "cp = 1: DeepSpeed cuts sequences by heads (Ulysses), with other costs than the planned ring",
        lambda plan: plan.layout.cp > 1,
        lambda plan: f"cp={plan.layout.cp}",
        "--pin cp=1",
    ),
    Demand(
        "expert-tensor",
        "etp = 1: AutoEP has no tensor parallelism inside experts",
        lambda plan: plan.layout.etp > 1,
        lambda plan: f"etp={plan.layout.etp}",
        "--pin etp=1",
    ),
    Demand(
        "sequence-parallel",
        "no sequence parallelism with tp > 1: AutoTP keeps norms and residuals whole on every rank",
        lambda plan: plan.layout.tp > 1 and plan.layout.sequence_parallel,
        lambda plan: f"tp={plan.layout.tp} with sequence_parallel",
        "--pin tp=1, or for a dense model --pin sequence_parallel=false",
    ),
    Demand(
        "sharding",
        "sharding optimizer or fsdp (ZeRO 1 or 3): without ZeRO a bf16 model keeps no fp32 weights",
        lambda plan: plan.layout.sharding not in STAGES,
        lambda plan: f"sharding={plan.layout.sharding}",
        "--pin sharding=optimizer",
    ),
    Demand(
        "zero-overlap",
        "dp_overlap with sharding fsdp only: ZeRO 1 reduces after the last backward pass and gathers after the step",
        lambda plan: plan.layout.sharding == "optimizer" and plan.layout.dp_overlap,
        lambda plan: "sharding=optimizer with dp_overlap",
        "--pin dp_overlap=false, or --pin sharding=fsdp",
    ),
    Demand(
        "dispatcher",
        "dispatcher alltoall or deepep",
        lambda plan: plan.layout.dispatcher not in ("none", *BACKENDS),
        lambda plan: f"dispatcher={plan.layout.dispatcher}",
        "--pin dispatcher=alltoall",
    ),
    without_features("ep_overlap", "shared_overlap", "tp_overlap"),
    Demand(
        "moe-schedule",
        "no schedule of MoE layers",
        lambda plan: bool(plan.layout.moe_schedule),
        lambda plan: f"moe_schedule '{plan.layout.moe_schedule}'",
        "solve with --target megatron",
    ),
    Demand(
        "cuda-graphs",
        "no CUDA graphs",
        lambda plan: bool(plan.layout.cuda_graphs),
        lambda plan: f"CUDA graphs over {'+'.join(plan.layout.cuda_graphs)}",
        "--pin cuda_graphs=none",
    ),
    whole_layers("recompute of whole layers or none"),
    ALL_LAYERS,
    Demand(
        "precision",
        "precision bf16 with moments in fp32",
        lambda plan: plan.problem.workload.precision.name != "bf16" or plan.problem.workload.moment_bytes != 4,
        lambda plan: f"{plan.problem.workload.precision.name}, moments of {plan.problem.workload.moment_bytes} bytes",
        "--precision bf16",
    ),
    without_capacity("no capacity factor: AutoEP drops no tokens"),
    Demand(
        "offload",
        "all optimizer states in host memory or none: ZeRO 1 takes no share",
        lambda plan: 0 < plan.layout.optimizer_offload < 1,
        lambda plan: f"optimizer_offload={plan.layout.optimizer_offload:g}",
        "--pin optimizer_offload=1, or --pin optimizer_offload=0",
    ),
)  # fmt: skip
"""What DeepSpeed with AutoEP demands of a plan."""


def config(plan: Plan, version: str) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    x, workload = plan.layout, plan.problem.workload
    dtype = "bf16" if workload.gradient_bytes == 2 else "fp32"
    out: dict[str, Any] = {
        "train_batch_size": workload.global_batch,
        "train_micro_batch_size_per_gpu": x.micro_batch,
        "gradient_accumulation_steps": workload.global_batch // (x.micro_batch * x.dp),
        "gradient_clipping": 1.0,
        "steps_per_print": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": dtype},
        "communication_data_type": dtype,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "zero_optimization": _zero(plan),
    }
    if x.tp > 1:
        out["tensor_parallel"] = {"autotp_size": x.tp}
    if plan.problem.model.moe is not None:
        out["expert_parallel"] = _experts(plan, version)
    if x.recompute:
        out["activation_checkpointing"] = dict.fromkeys(
            ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization"), False
        )
    return out


def _zero(plan: Plan) -> dict[str, Any]:
    x = plan.layout
    out: dict[str, Any] = {
        "stage": STAGES[x.sharding],
        "overlap_comm": x.dp_overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
    }
    out |= {"stage3_prefetch_bucket_size": BUCKET} if x.sharding == "fsdp" else {"allgather_bucket_size": BUCKET}
    if x.optimizer_offload:
        out["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return out


def _experts(plan: Plan, version: str) -> dict[str, Any]:
    """Every layer with experts is replaced, also where a rank holds all experts: the grouped GEMM is AutoEP's."""
    x = plan.layout
    out: dict[str, Any] = {
        "enabled": True,
        "autoep_size": x.ep,
        "expert_tensor_parallel_size": 1,
        "preset_model": model_facts()["presets"][plan.problem.model.family],
        "use_grouped_mm": True,
    }
    if x.dispatcher == "deepep" or FACTS.knows("expert_parallel.comm_backend", version):
        out["comm_backend"] = BACKENDS[x.dispatcher]
    if x.dispatcher == "deepep":
        out["comm_max_tokens_per_rank"] = x.micro_batch * plan.problem.workload.seq_len
    return out


def flat(data: Mapping[str, Any], before: str = "") -> Iterator[Flag]:
    """Keys of all levels joined by ".", each with its value as a word."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)


def native_layer(plan: Plan) -> dict[str, Any] | None:
    """Arguments of `deepspeed.moe.layer.MoE` that run the same plan in a model of one's own; None where they cannot."""
    model, x = plan.problem.model, plan.layout
    moes = [b for b in model.blocks if isinstance(b, Moe)]
    if not moes or x.sharding != "optimizer" or x.dispatcher != "alltoall":
        return None
    b = moes[0]
    if len(moes) > 1 or b.score != "softmax" or b.groups > 1 or b.expert_bias or b.zero_experts or b.latent:
        return None
    return {
        "hidden_size": model.hidden,
        "num_experts": b.experts,
        "ep_size": x.ep,
        "k": b.topk,
        "drop_tokens": False,
        "use_residual": False,
        "use_tutel": False,
        "enable_expert_tensor_parallelism": False,
        "top2_2nd_expert_sampling": False,
    }


def megatron_flags(plan: Plan) -> list[Flag] | None:
    """Flags of Megatron-DeepSpeed (July 2025) for the same plan with the older layer; None where they cannot say it.

    Every layer holds experts there. They start a run but for the data, which has no stand-in (`--data-path`).
    """
    native, x, workload = native_layer(plan), plan.layout, plan.problem.workload
    model = plan.problem.model
    if native is None or x.tp * x.pp * x.cp > 1 or not all(layer.is_moe for layer in model.layers):
        return None
    sizes = model_flags(model, workload.seq_len)
    if sizes is None:
        return None
    flags: list[Flag] = [
        ("--deepspeed",),
        ("--deepspeed_config", MEGATRON_CONFIG),
        ("--zero-stage", str(STAGES[x.sharding])),
        ("--tensor-model-parallel-size", "1"),
        ("--pipeline-model-parallel-size", "1"),
        ("--no-pipeline-parallel",),
        ("--micro-batch-size", str(x.micro_batch)),
        ("--global-batch-size", str(workload.global_batch)),
        ("--seq-length", str(workload.seq_len)),
        ("--bf16",),
        *sizes,
        ("--expert-interval", "1"),
        ("--mlp-type", "standard"),
        ("--moe-expert-parallel-size", str(x.ep)),
        ("--create-moe-param-group",),
        ("--disable-moe-token-dropping",),
        ("--tokenizer-type", "NullTokenizer"),
        ("--train-iters", "50"),
        ("--lr", "1e-4"),
        ("--lr-decay-style", "constant"),
        ("--log-interval", "1"),
        ("--eval-iters", "0"),
    ]
    flags += [("--cpu-optimizer",)] if x.optimizer_offload else []
    return [*flags, ("--checkpoint-activations",), ("--deepspeed-activation-checkpointing",)] if x.recompute else flags


def megatron_config(plan: Plan, version: str) -> dict[str, Any]:
    """DeepSpeed's configuration for Megatron-DeepSpeed, which brings its experts and its optimizer itself."""
    return {key: value for key, value in config(plan, version).items() if key not in ("expert_parallel", "optimizer")}
