"""What flags of a Megatron-LM launch script break, as rows.

The conditions are those of megatron-core 0.19.2 (argument checks and configuration classes) for flags that a layout does not
hold; rules of layouts stand in `planner/constraints.py`.
"""

from __future__ import annotations

from moeplan.exporters.lint_rules import Check, Run, says


def _needs_one(r: Run) -> bool:
    x = r.imported.layout
    return (x.tp > 1 or x.cp > 1) and r.capability < 10 and not r.fsdp and not x.ep_overlap


_UNEVEN = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
_ACCOUNT = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
_VIRTUAL = (
    "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-layout",
)  # fmt: skip
ERRORS: tuple[Check, ...] = (
    Check(
        "one-virtual-flag", "error", _VIRTUAL[0], lambda r: sum(r.has(f) for f in _VIRTUAL) > 1,
        lambda r: f"at most one of {', '.join(f for f in _VIRTUAL if r.has(f))} may be given", "keep one of them",
    ),
    Check(
        "virtual-uneven", "error", _VIRTUAL[0], lambda r: r.has(_VIRTUAL[0]) and r.has(*_UNEVEN),
        says("layers of a virtual stage with another number of layers on the first or last stage"),
        "give --num-virtual-stages-per-pipeline-rank instead",
    ),
    Check(
        "uneven-account", "error", _ACCOUNT[0], lambda r: r.has(*_ACCOUNT) and r.has(*_UNEVEN),
        says("embedding or loss counted as a layer with another number of layers on the first or last stage"),
        "keep one of the two",
    ),
    Check(
        "layout-alone", "error", _VIRTUAL[2], lambda r: r.has(_VIRTUAL[2]) and r.has(*_UNEVEN, *_ACCOUNT),
        says("a layout that is written out excludes other flags of the split"), "keep the layout",
    ),
    Check(
        "p2p-stages", "error", "--no-overlap-p2p-communication",
        lambda r: r.has("--no-overlap-p2p-communication") and r.imported.layout.vpp > 1 and r.imported.layout.pp == 2,
        says("virtual stages without overlap of their exchange need more than 2 stages"), "drop the flag",
    ),
    Check(
        "device-connections", "error", "", lambda r: r.connections not in (None, "1") and _needs_one(r),
        lambda r: "tensor or context parallelism before Blackwell needs CUDA_DEVICE_MAX_CONNECTIONS=1, "
        + (f"it is {r.connections}" if r.connections else "it is not set"),
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    Check(
        "fsdp-connections", "error", "--use-megatron-fsdp", lambda r: r.fsdp and r.connections == "1",
        says("FSDP refuses CUDA_DEVICE_MAX_CONNECTIONS=1"), "export CUDA_DEVICE_MAX_CONNECTIONS=8",
    ),
    Check(
        "fsdp-checkpoint", "error", "--use-megatron-fsdp",
        lambda r: r.has("--use-megatron-fsdp") != (r.value("--ckpt-format") == "fsdp_dtensor"),
        says("Megatron's FSDP and --ckpt-format fsdp_dtensor go together only"), "--ckpt-format fsdp_dtensor with FSDP alone",
    ),
    Check(
        "capacity-padding", "error", "--moe-pad-expert-input-to-capacity",
        lambda r: r.has("--moe-pad-expert-input-to-capacity") and not r.has("--moe-expert-capacity-factor"),
        says("padding to a capacity needs one"), "--moe-expert-capacity-factor 1.0",
    ),
    Check(
        "recompute-method", "error", "--recompute-granularity",
        lambda r: r.value("--recompute-granularity") == "full"
        and not (r.has("--recompute-method") and r.has("--recompute-num-layers")),
        says("full recompute needs a method and a number of layers"), "--recompute-method uniform --recompute-num-layers 1",
    ),
    Check(
        "recompute-method", "error", "--recompute-granularity",
        lambda r: r.value("--recompute-granularity") == "selective" and r.has("--recompute-method", "--recompute-num-layers"),
        says("selective recompute takes no method and no number of layers"),
        "drop --recompute-method and --recompute-num-layers",
    ),
    Check(
        "graph-nan", "error", "--cuda-graph-impl",
        lambda r: r.value("--cuda-graph-impl") == "full_iteration" and not r.has("--no-check-for-nan-in-loss-and-grad"),
        says("a CUDA graph of the whole iteration excludes the check for NaN"), "--no-check-for-nan-in-loss-and-grad",
    ),
    Check(
        "fp8-gather", "error", "--fp8-param-gather", lambda r: r.has("--fp8-param-gather") and not r.has("--fp8-format"),
        says("weights are gathered in FP8 without FP8"), "--fp8-format hybrid",
    ),
    Check(
        "one-quantization", "error", "--fp4-format", lambda r: r.has("--fp4-format") and r.has("--fp8-format"),
        says("FP4 and FP8 exclude each other"), "keep one of the two",
    ),
    Check(
        "one-precision", "error", "--fp16", lambda r: r.has("--fp16") and r.has("--bf16"),
        says("bf16 and fp16 exclude each other"), "keep one of the two",
    ),
    Check(
        "gather-overlap", "error", "--overlap-param-gather",
        lambda r: r.has("--overlap-param-gather") and not (r.has("--use-distributed-optimizer") or r.fsdp),
        says("overlap of the parameter gather needs the distributed optimizer or FSDP"), "--use-distributed-optimizer",
    ),
    Check(
        "gather-overlap", "error", "--overlap-param-gather",
        lambda r: r.has("--overlap-param-gather") and not r.has("--overlap-grad-reduce"),
        says("overlap of the parameter gather needs that of the gradients"), "--overlap-grad-reduce",
    ),
    Check(
        "offload-precision", "error", "--optimizer-cpu-offload",
        lambda r: r.has("--optimizer-cpu-offload") and not r.has("--use-precision-aware-optimizer"),
        says("an optimizer in host memory needs the precision-aware one"), "--use-precision-aware-optimizer",
    ),
    Check(
        "moment-types", "error", "--exp-avg-dtype",
        lambda r: bool({r.value("--exp-avg-dtype"), r.value("--exp-avg-sq-dtype")} - {"", "fp32"})
        and not r.has("--use-precision-aware-optimizer"),
        says("moments other than fp32 need the precision-aware optimizer"), "--use-precision-aware-optimizer",
    ),
    Check(
        "deepep-flex", "error", "--moe-enable-deepep",
        lambda r: r.moe and r.has("--moe-enable-deepep") and r.value("--moe-token-dispatcher-type") != "flex",
        says("DeepEP is a backend of the flex dispatcher"), "--moe-token-dispatcher-type flex",
    ),
    Check(
        "delay-wgrad", "error", "--delay-wgrad-compute",
        lambda r: r.has("--delay-wgrad-compute") and not r.has("--overlap-moe-expert-parallel-comm"),
        says("weight gradients are delayed for the overlap of experts, which is off"), "--overlap-moe-expert-parallel-comm",
    ),
    Check(
        "expert-bias-score", "error", "--moe-router-enable-expert-bias",
        lambda r: r.has("--moe-router-enable-expert-bias") and r.value("--moe-router-score-function") in ("", "softmax"),
        says("a selection bias needs scores that do not sum to one"), "--moe-router-score-function sigmoid",
    ),
    Check(
        "one-expert-softmax", "error", "--moe-router-topk",
        lambda r: r.moe and r.number("--moe-router-topk") == 1 and not r.has("--moe-router-pre-softmax")
        and r.value("--moe-router-score-function") in ("", "softmax"),
        says("a softmax over the one expert that was chosen is always 1"), "--moe-router-pre-softmax",
    ),
    Check(
        "latent-groups", "error", "--group-query-attention", lambda r: r.latent and r.has("--group-query-attention"),
        says("latent attention has no query groups"), "drop --group-query-attention",
    ),
    Check(
        "positions", "error", "--max-position-embeddings",
        lambda r: r.number("--max-position-embeddings") < r.imported.workload.seq_len,
        lambda r: f"--max-position-embeddings {r.value('--max-position-embeddings') or 'is missing'}: at least the "
        f"{r.imported.workload.seq_len} tokens of a sequence are needed",
        "--max-position-embeddings with the sequence length or more",
    ),
    Check(
        "batch-schedule", "error", "--step-batch-size-schedule",
        lambda r: r.has("--step-batch-size-schedule") and r.has("--global-batch-size"),
        says("a schedule of batch sizes excludes --global-batch-size"), "keep one of the two",
    ),
    Check(
        "cross-entropy", "error", "--cross-entropy-fusion-impl",
        lambda r: r.has("--cross-entropy-loss-fusion") and r.value("--cross-entropy-fusion-impl") == "te",
        says("Transformer Engine's fused cross entropy is refused"), "--cross-entropy-fusion-impl native",
    ),
    Check(
        "one-data-source", "error", "--mock-data", lambda r: r.has("--mock-data") and r.has("--data-path"),
        says("mock data and --data-path exclude each other"), "keep one of the two",
    ),
    Check(
        "biased-experts", "error", "--moe-grouped-gemm",
        lambda r: r.moe and not r.has("--disable-bias-linear", "--no-bias-dropout-fusion") and r.has("--moe-grouped-gemm"),
        says("grouped experts with biases exclude the fusion of bias and dropout"),
        "--disable-bias-linear, or --no-bias-dropout-fusion",
    ),
    Check(
        "biased-shared-experts", "error", "--moe-shared-expert-intermediate-size",
        lambda r: r.moe and r.number("--moe-shared-expert-intermediate-size") > 0 and not r.has("--disable-bias-linear"),
        says("shared experts have no biases"), "--disable-bias-linear",
    ),
    Check(
        "quantization-padding", "error", "--moe-router-padding-for-quantization",
        lambda r: r.has("--moe-router-padding-for-quantization") and not r.has("--fp8-format", "--fp4-format"),
        says("tokens are padded for a quantization that is off"), "drop the flag",
    ),
    Check(
        "distributed-activations", "error", "--distribute-saved-activations",
        lambda r: r.has("--distribute-saved-activations")
        and (r.imported.layout.tp == 1 or r.value("--recompute-granularity") != "full" or r.has("--sequence-parallel")),
        says("saved activations are distributed only with tp > 1, full recompute and no sequence parallelism"),
        "drop the flag",
    ),
    # What is met only when the run starts, after its model was built (megatron/training/training.py).
    Check(
        "eval-interval", "error", "--eval-interval",
        lambda r: not r.number("--eval-interval") and not r.has("--skip-train", "--full-validation"),
        lambda r: "the run stops after the model is built: it divides by --eval-interval, also where --eval-iters is 0, "
        f"and that is {r.value('--eval-interval') or 'not given and without a default since 0.17'}",
        "--eval-interval 1000",
    ),
    Check(
        "run-length", "error", "--train-iters", lambda r: not (r.number("--train-iters") or r.number("--train-samples")),
        says("the run stops after the model is built, as nothing says how long it is"), "--train-iters, or --train-samples",
    ),
    Check(
        "learning-rate", "error", "--lr", lambda r: not r.has("--lr", "--skip-train"),
        says("the run stops after the model is built, as the learning rate has no default"), "--lr",
    ),
)  # fmt: skip
