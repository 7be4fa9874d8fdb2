"""What is wrong with flags of a Megatron-LM launch script, as rows: what changes without a word, what is slow.

The conditions are those of megatron-core 0.19.2 (argument checks and configuration classes) for flags that a layout does not
hold; rules of layouts stand in `planner/constraints.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moeplan.costmodels.model import LatentAttention
from moeplan.exporters.reading.flags import Flags
from moeplan.exporters.reading.imported import Imported

Severity = Literal["error", "change", "slow"]


@dataclass(frozen=True, slots=True)
class Run:
    """What the rows look at."""

    imported: Imported
    capability: float
    """Compute capability of the devices."""

    @property
    def flags(self) -> Flags:
        """The flags as they were given."""
        return self.imported.flags

    def has(self, *flags: str) -> bool:
        """Whether one of `flags` was given."""
        return any(f in self.flags.last for f in flags)

    def value(self, flag: str) -> str:
        """The value of a flag, empty where it has none."""
        found = self.flags.last.get(flag)
        return found.values[0] if found is not None and found.values else ""

    def number(self, flag: str) -> int:
        """The value of a flag, 0 where it is no number."""
        text = self.value(flag)
        return int(text) if text.isdigit() else 0

    @property
    def moe(self) -> bool:
        """Whether the model has experts."""
        return self.imported.model.moe is not None

    @property
    def latent(self) -> bool:
        """Whether its attention is latent."""
        return any(isinstance(b, LatentAttention) for b in self.imported.model.blocks)

    @property
    def fsdp(self) -> bool:
        """Whether weights are sharded."""
        return self.has("--use-megatron-fsdp", "--use-torch-fsdp2")

    @property
    def connections(self) -> str | None:
        """CUDA_DEVICE_MAX_CONNECTIONS; empty if not set, None where the file does not say the environment."""
        environment = self.imported.environment
        if not environment and self.imported.kind in ("log", "argument file"):
            return None
        return environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that may be wrong."""

    rule: str
    severity: Severity
    flag: str
    """The flag that it is about, whose line is shown."""
    applies: Callable[[Run], bool]
    message: Callable[[Run], str]
    fix: str = ""


def says(text: str) -> Callable[[Run], str]:
    """A message without numbers."""
    return lambda r: text


_FP8_ONLY = ("--fp8-recipe", "--fp8-amax-history-len", "--fp8-amax-compute-algo")
_LATENT_ONLY = ("--q-lora-rank", "--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim", "--v-head-dim")

CHANGES: tuple[Check, ...] = (
    Check(
        "sequence-parallel-off", "change", "--sequence-parallel",
        lambda r: r.has("--sequence-parallel") and r.imported.layout.tp == 1,
        says("sequence parallelism is turned off, as tp is 1"), "drop --sequence-parallel",
    ),
    Check(
        "async-save-off", "change", "--async-save",
        lambda r: r.has("--async-save") and not r.has("--use-persistent-ckpt-worker"),
        says("asynchronous saving is turned off"), "--use-persistent-ckpt-worker",
    ),
    Check(
        "fp32-gradients", "change", "--bf16",
        lambda r: r.has("--bf16") and r.imported.workload.gradient_bytes == 4
        and not r.has("--accumulate-allreduce-grads-in-fp32"),
        says("gradients are accumulated and reduced in fp32"),
        "--accumulate-allreduce-grads-in-fp32 to say so, --grad-reduce-in-bf16 for half the traffic",
    ),
    Check(
        "feed-forward-default", "change", "--ffn-hidden-size", lambda r: not r.has("--ffn-hidden-size"),
        lambda r: f"the feed-forward width is set to {r.flags.defaults.get('--ffn-hidden-size', 'its default')}",
        "--ffn-hidden-size with the width that is meant",
    ),
    Check(
        "expert-width-default", "change", "--moe-ffn-hidden-size", lambda r: r.moe and not r.has("--moe-ffn-hidden-size"),
        lambda r: f"experts are as wide as dense layers: {r.flags.defaults.get('--moe-ffn-hidden-size', 'the same')}",
        "--moe-ffn-hidden-size with the width that is meant",
    ),
    Check(
        "p2p-overlap-off", "change", "--pipeline-model-parallel-size",
        lambda r: r.imported.layout.pp > 1 and r.imported.layout.vpp == 1 and not r.has("--no-overlap-p2p-communication"),
        says("the exchange between stages is not overlapped, as there are no virtual stages"),
        "--num-virtual-stages-per-pipeline-rank 2, if it divides the layers",
    ),
    Check(
        "fsdp-optimizer", "change", "--use-megatron-fsdp",
        lambda r: r.has("--use-megatron-fsdp") and not r.has("--use-distributed-optimizer"),
        says("the distributed optimizer is turned on by FSDP"), "--use-distributed-optimizer",
    ),
    Check(
        "global-batch-default", "change", "--global-batch-size",
        lambda r: not r.has("--global-batch-size", "--step-batch-size-schedule"),
        lambda r: f"the global batch is set to {r.imported.workload.global_batch}, one micro-batch a rank",
        "--global-batch-size with the batch that is meant",
    ),
    Check(
        "ramp-up-ignored", "change", "--rampup-batch-size", lambda r: r.has("--rampup-batch-size"),
        says("the ramp-up of the batch is ignored"), "--step-batch-size-schedule",
    ),
    Check(
        "query-groups-ignored", "change", "--num-query-groups",
        lambda r: r.has("--num-query-groups") and not r.has("--group-query-attention") and not r.latent,
        lambda r: f"--num-query-groups {r.value('--num-query-groups')} is ignored: every head has keys of its own",
        "--group-query-attention",
    ),
    Check(
        "experts-ignored", "change", "--moe-router-topk",
        lambda r: not r.moe and r.has("--moe-router-topk", "--moe-ffn-hidden-size", "--moe-token-dispatcher-type"),
        says("the model has no experts, so flags of experts are ignored"), "--num-experts, or drop them",
    ),
    Check(
        "latent-ignored", "change", "--kv-lora-rank", lambda r: not r.latent and r.has(*_LATENT_ONLY),
        says("attention is not latent, so its ranks and sizes are ignored"), "--multi-latent-attention",
    ),
    Check(
        "fp8-ignored", "change", "--fp8-recipe", lambda r: r.has(*_FP8_ONLY) and not r.has("--fp8-format"),
        says("without a format FP8 is off and its recipe is ignored"), "--fp8-format hybrid",
    ),
    Check(
        "backend-ignored", "change", "--moe-flex-dispatcher-backend",
        lambda r: r.has("--moe-flex-dispatcher-backend") and r.value("--moe-token-dispatcher-type") != "flex",
        says("the backend is ignored by a dispatcher other than flex"), "--moe-token-dispatcher-type flex",
    ),
    Check(
        "offload-ignored", "change", "--optimizer-offload-fraction",
        lambda r: r.has("--optimizer-offload-fraction") and not r.has("--optimizer-cpu-offload"),
        says("the fraction is ignored: the optimizer stays on the device"), "--optimizer-cpu-offload",
    ),
    Check(
        "dropout-on", "change", "--hidden-dropout",
        lambda r: r.imported.kind != "log" and not (r.has("--hidden-dropout") and r.has("--attention-dropout")),
        lambda r: "dropout of 0.1 is on in "
        + " and ".join(n for n in ("hidden", "attention") if not r.has(f"--{n}-dropout")) + " layers",
        "--hidden-dropout 0.0 --attention-dropout 0.0",
    ),
    Check(
        "learned-positions", "change", "--position-embedding-type",
        lambda r: not r.has("--position-embedding-type", "--use-rotary-position-embeddings"),
        says("positions are learned, not rotary"), "--position-embedding-type rope",
    ),
    Check(
        "pattern-layers", "change", "--num-layers",
        lambda r: r.has("--hybrid-layer-pattern") and r.number("--num-layers") not in (0, len(r.imported.model.layers)),
        lambda r: f"--num-layers {r.value('--num-layers')} is ignored, the pattern has {len(r.imported.model.layers)}",
        "drop --num-layers",
    ),
)  # fmt: skip

_FUSIONS = (
    "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm", "--no-rope-fusion",
)  # fmt: skip


def _unfused(r: Run) -> list[str]:
    needed = {"--no-rope-fusion"} if r.has("--experimental-attention-variant") else set()
    return [f for f in _FUSIONS if r.has(f) and f not in needed]


SLOW: tuple[Check, ...] = (
    Check(
        "grouped-gemm", "slow", "--moe-grouped-gemm", lambda r: r.moe and not r.has("--moe-grouped-gemm"),
        says("the experts of a rank run one after the other"), "--moe-grouped-gemm",
    ),
    Check(
        "permute-fusion", "slow", "--moe-permute-fusion",
        lambda r: r.moe and not r.has("--moe-permute-fusion") and r.imported.layout.dispatcher != "allgather",
        says("tokens are permuted by separate kernels"), "--moe-permute-fusion",
    ),
    Check(
        "cross-entropy-fusion", "slow", "--cross-entropy-loss-fusion", lambda r: not r.has("--cross-entropy-loss-fusion"),
        says("the loss runs as separate kernels, which also keep the logits in fp32"),
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native",
    ),
    Check(
        "full-precision", "slow", "--bf16", lambda r: not r.has("--bf16", "--fp16"),
        says("the run is in fp32, without tensor cores for half precision"), "--bf16",
    ),
    Check(
        "local-layers", "slow", "--transformer-impl", lambda r: r.value("--transformer-impl") == "local",
        says("layers are those without Transformer Engine"), "--transformer-impl transformer_engine",
    ),
    Check(
        "unfused-attention", "slow", "--attention-backend", lambda r: r.value("--attention-backend") in ("unfused", "local"),
        says("attention runs as separate kernels that keep its scores in memory"), "--attention-backend auto",
    ),
    Check(
        "overlap-connections", "slow", "--overlap-moe-expert-parallel-comm",
        lambda r: r.imported.layout.ep_overlap and r.connections == "1",
        says("CUDA_DEVICE_MAX_CONNECTIONS=1 keeps the exchange of experts from overlapping"),
        "export CUDA_DEVICE_MAX_CONNECTIONS=32",
    ),
    Check(
        "fusion-off", "slow", "", lambda r: bool(_unfused(r)),
        lambda r: f"fused kernels are turned off by {', '.join(_unfused(r))}", "drop what is not needed",
    ),
)  # fmt: skip
