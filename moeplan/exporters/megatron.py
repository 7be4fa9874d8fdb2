"""Export of a plan to Megatron-LM: arguments, environment and launch scripts, written for megatron-core 0.19.2.

Every degree and feature is written out, also where it equals Megatron's default, because defaults differ between versions
(dispatcher allgather, expert tensor size = tensor size). A plan that breaks a rule of Megatron is refused with the rule. What a
plan does not know (data, tokenizer, learning rate, checkpoints) is filled with what a benchmark run needs; the scripts pass
further arguments on, and the last occurrence of a flag wins.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from moeplan._version import VERSION
from moeplan.costmodels.exchange import exchanges_heads
from moeplan.costmodels.model import Attention, LatentAttention, Model
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError, FileError
from moeplan.exporters.megatron_model import Flag, hybrid_pattern, model_arguments
from moeplan.planner.constraints import violations
from moeplan.planner.plan import Plan
from moeplan.units import format_bytes, format_seconds

MEGATRON_CORE = "0.19.2"
ARGUMENTS, TORCHRUN, SLURM, README = "megatron.args", "run_torchrun.sh", "run_slurm.sbatch", "README.md"
"""Names of the files of an export."""


def arguments(plan: Plan) -> dict[str, list[Flag]]:
    """The flags of a plan by section; `ExportError` where Megatron cannot run it."""
    broken = violations(plan.problem, plan.layout)
    if broken:
        rules = "; ".join(f"{v.rule}: {v}" for v in broken)
        raise ExportError(f"Megatron-LM {MEGATRON_CORE} refuses this plan: {rules}")
    return write_arguments(plan)


def write_arguments(plan: Plan) -> dict[str, list[Flag]]:
    """The flags of a plan by section, of one that breaks rules too; `ExportError` for a model that Megatron lacks."""
    return {
        "parallel layout": _layout_flags(plan),
        "pipeline split": _split_flags(plan),
        "batch": _batch_flags(plan),
        "mixture of experts": _expert_flags(plan),
        "recompute and CUDA graphs": _recompute_flags(plan) + _graph_flags(plan),
        "precision and optimizer": _precision_flags(plan),
        "model": [f for f in model_arguments(plan.problem.model, plan.problem.workload.seq_len) if not _is_pattern(plan, f)],
        "benchmark stand-ins: replace with your data, schedule and checkpoints": [
            ("--mock-data",),
            ("--tokenizer-type", "NullTokenizer"),
            ("--train-iters", "50"),
            ("--lr", "1e-4"),
            ("--log-interval", "1"),
            ("--log-throughput",),
            ("--eval-iters", "0"),
        ],
    }


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
    return out


def transformer_engine(plan: Plan) -> str:
    """Least version of Transformer Engine that Megatron takes the arguments with."""
    if plan.layout.ep_overlap and plan.layout.cuda_graphs:
        return "2.12"
    return "2.10" if plan.layout.sharding == "fsdp" else "2.8"


def export(plan: Plan, directory: Path) -> list[Path]:
    """Write the files of a plan into a new directory, all or none; returns their paths."""
    texts = {
        ARGUMENTS: _arguments_text(plan),
        TORCHRUN: _torchrun_text(plan),
        SLURM: _slurm_text(plan),
        README: _readme_text(plan),
    }
    if os.path.lexists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise FileError(f"'{directory}' exists and is not an empty directory", hint="choose another directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise FileError(f"cannot write to '{directory}': {error.strerror}", hint="choose a writable directory") from None
    try:
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
            (staging / name).chmod(0o755 if name.endswith((".sh", ".sbatch")) else 0o644)
        staging.chmod(0o755)
        os.replace(staging, directory)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise FileError(f"cannot write to '{directory}': {error.strerror}", hint="choose a writable directory") from None
    return [directory / name for name in texts]


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
            ("--ckpt-format", "fsdp_dtensor"),
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
    if model.is_hybrid:
        chunks = chunk_letters(model, x.pp, x.vpp, x.stages)
        return [("--hybrid-layer-pattern", hybrid_pattern(model, [c.count("t") for c in chunks]))]
    if x.stages:
        return [("--pipeline-model-parallel-layout", x.stages)]
    return [("--num-virtual-stages-per-pipeline-rank", str(x.vpp))] if x.vpp > 1 else []


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
        flags.append(("--moe-expert-capacity-factor", f"{workload.capacity_factor:g}"))
    if workload.precision.gemm != "bf16" and x.dispatcher != "allgather":
        flags.append(("--moe-router-padding-for-quantization",))
    return flags


def _recompute_flags(plan: Plan) -> list[Flag]:
    modules = plan.layout.recompute
    if not modules:
        return []
    if modules == ("full",):
        return [("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1")]
    return [("--recompute-granularity", "selective"), ("--recompute-modules", *modules)]


def _graph_flags(plan: Plan) -> list[Flag]:
    scopes = plan.layout.cuda_graphs
    if not scopes:
        return [("--cuda-graph-impl", "none")]
    if scopes == ("full_iteration",):
        return [("--cuda-graph-impl", "full_iteration"), ("--no-check-for-nan-in-loss-and-grad",)]
    return [("--cuda-graph-impl", "transformer_engine"), ("--cuda-graph-modules", *scopes)]


def _precision_flags(plan: Plan) -> list[Flag]:
    workload, x = plan.problem.workload, plan.layout
    words = list(workload.precision.megatron)
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    flags: list[Flag] = [tuple(words[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    flags += [("--cross-entropy-loss-fusion",), ("--cross-entropy-fusion-impl", "native")]
    if workload.gradient_bytes == 2:
        flags.append(("--grad-reduce-in-bf16",))
    if workload.moment_bytes == 2 or x.optimizer_offload:
        flags.append(("--use-precision-aware-optimizer",))
    if workload.moment_bytes == 2:
        flags += [("--exp-avg-dtype", "bf16"), ("--exp-avg-sq-dtype", "bf16")]
    if x.optimizer_offload:
        flags += [("--optimizer-cpu-offload",), ("--optimizer-offload-fraction", f"{x.optimizer_offload:g}")]
        flags.append(("--overlap-cpu-optimizer-d2h-h2d",))
    return flags


def _arguments_text(plan: Plan) -> str:
    lines = [
        f"# {_plain(plan.problem.model.name)} on {_plain(plan.problem.profile.cluster.name)}: {plan.layout.degrees()}",
        f"# written by moeplan {VERSION} for Megatron-LM with megatron-core {MEGATRON_CORE}; {plan.layout.world} GPUs",
        "",
        "# environment",
        *(f"export {name}={value}" for name, value in environment(plan).items()),
    ]
    for section, flags in arguments(plan).items():
        if flags:
            lines += ["", f"# {section}", *(" ".join(map(shlex.quote, flag)) for flag in flags)]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """A name with nothing in it that a shell or Slurm could misread."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def _launch_size(plan: Plan) -> tuple[int, int]:
    """Nodes and processes of a node."""
    cluster = plan.problem.profile.cluster
    nodes, each = cluster.nodes, min(cluster.gpus_per_node, cluster.gpus)
    if nodes * each != plan.layout.world:
        raise ExportError(f"{nodes} nodes of {each} processes are not the {plan.layout.world} ranks of the plan")
    return nodes, each


def _load_lines() -> str:
    return f"""here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
: "${{MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout (megatron-core {MEGATRON_CORE})}}"
# environment variables and arguments both stand in {ARGUMENTS}
source <(grep '^export ' "$here/{ARGUMENTS}")
eval "arguments=($(grep -v -e '^export ' -e '^#' "$here/{ARGUMENTS}" | tr '\\n' ' '))"
"""


def _script(plan: Plan) -> str:
    name = "pretrain_hybrid.py" if plan.problem.model.is_hybrid else "pretrain_gpt.py"
    return f'"${{PRETRAIN_SCRIPT:-$MEGATRON_LM/{name}}}"'


def _torchrun_text(plan: Plan) -> str:
    nodes, each = _launch_size(plan)
    own = 'MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" NODE_RANK="${NODE_RANK:-0}"'
    shared = f': "${{MASTER_ADDR:?set MASTER_ADDR to the first node}}" "${{NODE_RANK:?set NODE_RANK to 0..{nodes - 1}}}"'
    return f"""#!/usr/bin/env bash
# Start one node of {nodes}: NODE_RANK=0..{nodes - 1} MASTER_ADDR=<first node> bash {TORCHRUN} [further Megatron arguments]
set -euo pipefail
{_load_lines()}{own if nodes == 1 else shared}
exec torchrun \\
  --nnodes {nodes} --nproc-per-node {each} --node-rank "$NODE_RANK" \\
  --master-addr "$MASTER_ADDR" --master-port "${{MASTER_PORT:-29500}}" \\
  {_script(plan)} "${{arguments[@]}}" "$@"
"""


def _slurm_text(plan: Plan) -> str:
    nodes, each = _launch_size(plan)
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={_plain(plan.problem.model.name)}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={each}
#SBATCH --exclusive
#SBATCH --time=01:00:00
# Submit from this directory: sbatch {SLURM} [further Megatron arguments]
set -euo pipefail
: "${{MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout that every node can read}}"
# sed reads all lines: a reader that leaves after the first would break the pipe, and with it the job
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export MEGATRON_LM MASTER_ADDR
# Slurm runs a copy of this file, so the launch script is looked for where the job was submitted.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$SLURM_SUBMIT_DIR/{TORCHRUN}" "$@"' launch "$@"
"""


def _readme_text(plan: Plan) -> str:
    problem, x = plan.problem, plan.layout
    cluster, workload = problem.profile.cluster, problem.workload
    scaled = [name for name, origin in problem.profile.origins.items() if not origin.measured]
    variables = "\n".join(f"- `{name}={value}`" for name, value in environment(plan).items())
    remarks = "\n".join(f"- {r}" for r in plan.remarks) or "- none"
    library = f", the library of the dispatcher `{x.dispatcher}`" if x.dispatcher in ("deepep", "hybridep") else ""
    last = cluster.nodes - 1
    several = (
        f"; on every node start `{TORCHRUN}` with `MASTER_ADDR=<first node>` and its `NODE_RANK` of 0..{last}" if last else ""
    )
    return f"""# {problem.model.name} on {cluster.name}

Written by moeplan {VERSION} for Megatron-LM with megatron-core {MEGATRON_CORE}.

- Layout: {x.degrees()}, micro-batch {x.micro_batch}, recompute {"+".join(x.recompute) or "none"}, dispatcher {x.dispatcher}
- Ranks: {x.world} on {cluster.nodes} node(s)
- Workload: {workload.global_batch} sequences of {workload.seq_len} tokens, {workload.precision.name}, era {workload.era.name}
- Predicted step: {format_seconds(plan.step_s)} (80 % of runs: {format_seconds(plan.low_s)} to {format_seconds(plan.high_s)})
- Predicted peak memory: {format_bytes(plan.peak_bytes)} on stage {plan.fullest.rank}, of {format_bytes(problem.device_bytes)}

## Files

- `{ARGUMENTS}`: environment variables (`export` lines) and arguments
- `{TORCHRUN}`: starts one node; `{SLURM}`: starts all nodes under Slurm

Set `MEGATRON_LM` to a Megatron-LM checkout{several}. Arguments that you add on the command line override those of the file.

## Required environment

{variables}

## Assumed

- Data, tokenizer, learning rate and iterations are stand-ins for a benchmark run (last section of `{ARGUMENTS}`).
- Transformer Engine {transformer_engine(plan)} or later, NCCL{library}.
- Routing imbalance {workload.imbalance:g} (1 is balanced), capacity factor {workload.capacity_factor:g} (0 drops no token).
- {len(scaled)} of {len(problem.profile.origins)} performance curves were not measured on {cluster.device.name} but scaled.
- Host memory, file systems and network health are not checked.

## Remarks

{remarks}
"""
