"""The flags that tell Megatron-LM a layout and a workload, written for megatron-core 0.19.2 and its neighbours.

Every degree and feature is written out, also where it equals Megatron's default, because defaults differ between versions
(dispatcher allgather, expert tensor size = tensor size), and because what is left out Megatron may change without a word
(overlap of transfers without virtual stages, gradients in fp32). The last occurrence of a flag wins.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from moeplan.costmodels.exchange import exchanges_heads
from moeplan.costmodels.model import Attention, LatentAttention, Model
from moeplan.costmodels.stages import check_split, chunk_letters
from moeplan.errors import ExportError
from moeplan.exporters.base import Flag
from moeplan.exporters.flag_facts import load_facts
from moeplan.exporters.megatron_model import hybrid_pattern, model_arguments
from moeplan.exporters.reading.flags import Flags
from moeplan.planner.plan import Plan

FACTS = load_facts("megatron")
"""What is known of Megatron's flags."""


def layout_sections(plan: Plan, version: str = FACTS.written_for) -> dict[str, list[Flag]]:
    """All flags of a plan by section, of one that breaks rules too; `ExportError` for a model that Megatron lacks."""
    return {**_decided(plan, version), **_further_sections(plan)}


def _decided(plan: Plan, version: str = FACTS.written_for) -> dict[str, list[Flag]]:
    """The flags that a plan decides."""
    return {
        "parallel layout": _layout_flags(plan),
        "pipeline split": _split_flags(plan),
        "batch": _batch_flags(plan),
        "mixture of experts": _expert_flags(plan),
        "recompute and CUDA graphs": _recompute_flags(plan) + _graph_flags(plan, version),
        "precision and optimizer": _precision_flags(plan),
        "model": [f for f in model_arguments(plan.problem.model, plan.problem.workload.seq_len) if not _is_pattern(plan, f)],
        "checkpoints: written where you add --save DIR --save-interval N": _checkpoint_flags(plan),
    }


STAND_INS: tuple[Flag, ...] = (
    ("--mock-data",),
    ("--tokenizer-type", "NullTokenizer"),
    ("--train-iters", "50"),
    ("--lr", "1e-4"),
    ("--log-interval", "1"),
    ("--log-throughput",),
    ("--eval-iters", "0"),
    ("--eval-interval", "1000"),
)
"""What a benchmark needs beside a plan."""


def passed_flags(plan: Plan) -> tuple[list[Flag], list[str]]:
    """Flags of the imported script that no plan decides, and those that a variable of the script leaves open.

    Of the script of another framework only what Megatron-LM's parser knows is taken.
    """
    texts = [*plan.imported.get("passed_through", ()), *plan.imported.get("unknown", ())]
    if not is_megatron_script(plan):
        texts = [text for text in texts if Flags(()).knows(text.split(" ")[0])]
    own = {flag[0] for flags in _decided(plan).values() for flag in flags}
    flags = [tuple(shlex.split(text)) for text in texts if "$" not in text]
    return [flag for flag in flags if flag and flag[0] not in own], [text for text in texts if "$" in text]


def _further_sections(plan: Plan) -> dict[str, list[Flag]]:
    """What the imported script says beside the plan, or stand-ins for a benchmark."""
    if not plan.imported:
        return {"benchmark stand-ins: replace with your data and schedule": list(STAND_INS)}
    flags, missing = passed_flags(plan)
    if not is_megatron_script(plan):
        return {f"of {_file_name(plan)}, and stand-ins: replace with your data and schedule": [*flags, *_stand_ins(flags)]}
    if not {flag[0] for flag in flags} & {"--eval-interval", "--full-validation", "--skip-train"}:
        flags.append(("--eval-interval", "1000"))  # 0.19.2 divides by it, and has no default
    left = f"; left out, as a variable of the script gives them: {', '.join(missing)}" if missing else ""
    return {f"from {_file_name(plan)}, passed through{left}": flags}


def is_megatron_script(plan: Plan) -> bool:
    """Whether the plan was read from a script of Megatron-LM."""
    return bool(plan.imported) and str(plan.imported.get("framework", "Megatron-LM")).startswith("Megatron-LM")


def _file_name(plan: Plan) -> str:
    return " ".join(Path(plan.imported.get("file", "")).name.split())


def _stand_ins(given: Sequence[Flag]) -> list[Flag]:
    """Stand-ins for what the script of another framework does not say in Megatron's words."""
    names = {flag[0] for flag in given}
    own_data = {"--mock-data", "--tokenizer-type"} if any("data-path" in name for name in names) else set()
    own_length = {"--train-iters"} if "--train-samples" in names else set()
    return [flag for flag in STAND_INS if flag[0] not in names | own_data | own_length]


def _layout_flags(plan: Plan) -> list[Flag]:
    x = plan.layout
    flags: list[Flag] = [
        ("--tensor-model-parallel-size", str(x.tp)),
        ("--context-parallel-size", str(x.cp)),
        ("--pipeline-model-parallel-size", str(x.pp)),
        ("--expert-model-parallel-size", str(x.ep)),
        ("--expert-tensor-parallel-size", str(x.etp)),
    ]
    if x.sequence_parallel and x.tp > 1:
        flags.append(("--sequence-parallel",))
    if x.cp > 1:
        flags.append(("--cp-comm-type", _context_exchange(plan.problem.model, plan.problem.workload.seq_len)))
    if x.tp_overlap:
        flags.append(("--tp-comm-overlap",))
    if x.sharding != "ddp":
        flags.append(("--use-distributed-optimizer",))
    if x.sharding == "fsdp":
        flags += [
            ("--use-megatron-fsdp",),
            ("--data-parallel-sharding-strategy", "optim_grads_params"),
        ]
    if x.dp_overlap:
        flags.append(("--overlap-grad-reduce",))
        if x.sharding != "ddp":
            flags.append(("--overlap-param-gather",))
    return flags


def _context_exchange(model: Model, seq_len: int) -> str:
    """How context parallelism exchanges keys and values: around a ring where it can."""
    if any(isinstance(b, LatentAttention) and b.index_heads for b in model.blocks):
        return "allgather"
    by_heads = any(isinstance(b, Attention) and exchanges_heads(b, seq_len) for b in model.blocks)
    return "a2a" if by_heads else "p2p"


def _split_flags(plan: Plan) -> list[Flag]:
    x, model = plan.layout, plan.problem.model
    order: list[Flag] = []
    if x.vpp > 1:
        order = [("--microbatch-group-size-per-virtual-pipeline-stage", str(x.pp))]
    elif x.pp > 1 and (not x.stages or check_split(x.stages, len(model.layers), len(model.mtp), x.pp, 1) is None):
        order = [("--no-overlap-p2p-communication",)]  # Megatron switches it off by itself
    if model.is_hybrid:
        chunks = chunk_letters(model, x.pp, x.vpp, x.stages)
        return [*order, ("--hybrid-layer-pattern", hybrid_pattern(model, [c.count("t") for c in chunks]))]
    if x.stages:
        return [*order, ("--pipeline-model-parallel-layout", x.stages)]
    return [*order, ("--num-virtual-stages-per-pipeline-rank", str(x.vpp))] if x.vpp > 1 else order


def _is_pattern(plan: Plan, flag: Flag) -> bool:
    """Whether the split already says what a model flag says."""
    return plan.problem.model.is_hybrid and flag[0] == "--hybrid-layer-pattern"


def _batch_flags(plan: Plan) -> list[Flag]:
    workload = plan.problem.workload
    return [
        ("--seq-length", str(workload.seq_len)),
        ("--micro-batch-size", str(plan.layout.micro_batch)),
        ("--global-batch-size", str(workload.global_batch)),
    ]


def _expert_flags(plan: Plan) -> list[Flag]:
    x, workload = plan.layout, plan.problem.workload
    if plan.problem.model.moe is None:
        return []
    if x.moe_schedule:
        raise ExportError(
            f"moe_schedule '{x.moe_schedule}' is nothing that Megatron runs",
            hint="solve with --target megatron for a plan that it does",
        )
    flags: list[Flag] = [("--moe-grouped-gemm",), ("--moe-permute-fusion",)]
    if x.dispatcher in ("deepep", "hybridep"):
        flags += [("--moe-token-dispatcher-type", "flex"), ("--moe-flex-dispatcher-backend", x.dispatcher)]
    else:
        flags.append(("--moe-token-dispatcher-type", x.dispatcher))
    if x.ep_overlap:
        flags += [("--overlap-moe-expert-parallel-comm",), ("--delay-wgrad-compute",)]
    if x.shared_overlap:
        flags.append(("--moe-shared-expert-overlap",))
    if workload.capacity_factor:
        flags.append(("--moe-expert-capacity-factor", f"{workload.capacity_factor:.12g}"))
    if workload.precision.gemm != "bf16" and x.dispatcher != "allgather":
        flags.append(("--moe-router-padding-for-quantization",))
    return flags


def _recompute_flags(plan: Plan) -> list[Flag]:
    modules, layers = plan.layout.recompute, plan.layout.recompute_layers
    if not modules:
        return []
    if modules == ("full",):
        method = ("block", layers) if layers else ("uniform", "1")
        return [("--recompute-granularity", "full"), ("--recompute-method", method[0]), ("--recompute-num-layers", method[1])]
    return [("--recompute-granularity", "selective"), ("--recompute-modules", *modules)]


def _graph_flags(plan: Plan, version: str) -> list[Flag]:
    scopes = plan.layout.cuda_graphs
    if not scopes:
        return [("--cuda-graph-impl", "none")]
    if scopes == ("full_iteration",):
        return [("--cuda-graph-impl", "full_iteration"), ("--no-check-for-nan-in-loss-and-grad",)]
    name = "--cuda-graph-modules" if FACTS.knows("--cuda-graph-modules", version) else "--cuda-graph-scope"
    return [("--cuda-graph-impl", "transformer_engine"), (name, *scopes)]


def _precision_flags(plan: Plan) -> list[Flag]:
    workload, x = plan.problem.workload, plan.layout
    words = list(workload.precision.megatron)
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    flags: list[Flag] = [tuple(words[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    flags += [("--cross-entropy-loss-fusion",), ("--cross-entropy-fusion-impl", "native")]
    flags.append(("--grad-reduce-in-bf16",) if workload.gradient_bytes == 2 else ("--accumulate-allreduce-grads-in-fp32",))
    if workload.moment_bytes == 2 or x.optimizer_offload:
        moments = "bf16" if workload.moment_bytes == 2 else "fp32"
        flags += [("--use-precision-aware-optimizer",), ("--main-grads-dtype", "fp32"), ("--main-params-dtype", "fp32")]
        flags += [("--exp-avg-dtype", moments), ("--exp-avg-sq-dtype", moments)]
    if x.optimizer_offload:
        flags += [("--optimizer-cpu-offload",), ("--optimizer-offload-fraction", f"{x.optimizer_offload:.12g}")]
        flags.append(("--overlap-cpu-optimizer-d2h-h2d",))
    return flags


def _checkpoint_flags(plan: Plan) -> list[Flag]:
    """Without the persistent worker Megatron drops asynchronous saving; the strategy "mcore" needs no further package."""
    if plan.layout.sharding == "fsdp":
        return [("--ckpt-format", "fsdp_dtensor")]
    return [
        ("--ckpt-format", "torch_dist"),
        ("--ckpt-fully-parallel-load",),
        ("--async-save",),
        ("--use-persistent-ckpt-worker",),
        ("--async-strategy", "mcore"),
    ]
