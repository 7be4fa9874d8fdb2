"""Constants that no microbenchmark shows, each with its meaning and source.

All of them describe how much of a known time stays visible in a step, or what a framework does beside the counted work. They
come from controlled A/B pairs in published runs (the Megatron-Bridge ablations, the parallel-folding study, the 8 x B200
study) and are shares or small sums, never bandwidths: links and memory are pinned to microbenchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """What a training step makes of the rates that microbenchmarks show."""

    sustained: float = 0.82
    """Share of the measured GEMM and attention rates that a step sustains for minutes: power-limited clocks, cold caches, gaps
    between kernels. The one number fitted to published runs (benchmarks/fit_spread.py): it centres the errors of the dense
    runs, and leaving out any one source moves it by 0.03 at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Shares of communication that stay exposed."""

    tensor_exposed: float = 0.33
    """Tensor-parallel exchange pipelined with its GEMM (user-buffer overlap): the first and last chunk stay visible."""
    expert_exposed: float = 0.48
    """Expert all-to-all hidden behind another micro-batch (1F1B overlap): Megatron-Bridge A/B pairs hide 52 %."""
    data_hidden_compute: float = 0.4
    """Share of one micro-batch's backward (forward) behind which gradient reduction (parameter gather) hides."""
    data_exposed: float = 0.08
    """Gradient reduction and parameter gather that stay exposed even when hidden: first and last bucket."""
    fsdp_hidden_compute: float = 0.70
    """Share of a micro-batch's compute behind which sharded weights are gathered and gradients scattered."""
    send_exposed: float = 0.24
    """Pipeline sends that stay exposed in the steady state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Kernels that the host launches, counted in Megatron-Core with Transformer Engine traces."""

    attention: float = 11.0
    latent_attention: float = 17.0
    scan: float = 14.0
    """Mamba and linear-attention blocks."""
    mlp: float = 7.0
    moe: float = 45.0
    """MoE block with the all-to-all or all-gather dispatcher."""
    moe_fused: float = 28.0
    """MoE block with a fused dispatcher (DeepEP, HybridEP)."""
    per_expert: float = 2.4
    """Further kernels for every local expert: grouped GEMM without a single-kernel implementation."""
    quantized_expert_factor: float = 3.0
    """Factor on `per_expert` where each expert's inputs are quantised apart (per-tensor scaling)."""
    backward: float = 1.3
    """Launches of the backward pass over those of the forward."""
    graphed_attention: float = 0.1
    """Share of launches left when attention is in a CUDA graph."""
    graphed_router: float = 0.6
    """Share of the MoE block's launches left when router and preprocessing are in a CUDA graph."""
    sharpness: float = 3.0
    """Exponent that joins device and host time: launches run ahead unless the two are close."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Work of a step beside its layers."""

    optimizer_bytes: float = 34.0
    """Bytes per parameter of a shard: Adam reads and writes master and moments (24), reads gradients twice (8), writes bf16."""
    logit_bytes: float = 10.0
    """Bytes per logit of the fused cross entropy: read bf16, reduce, write the gradient in place, forward and backward."""
    overhead_s: float = 0.03
    """Data loading, logging and gradient norm that no overlap hides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Allocations beside weights and saved activations; bytes per element of what the name says."""

    logits: float = 3.3
    """Per logit at the last stage with fused cross entropy: bf16 logits, and their gradient for part of them at a time."""
    head_gradient: float = 2.4
    """Per element of the output head: its bf16 weight gradient before it is added to the main gradient."""
    head_input: float = 7.1
    """Per element of the head's gathered input: input, its gradient, and the gathered copy for the weight gradient."""
    dummy_gradient: float = 2.0
    """Per element of every distinct weight shape: the bf16 buffer that gradient-accumulation fusion keeps for each."""
    context_bytes: float = 1.1 * 2**30
    """CUDA context, kernels and driver reserve that the framework's allocator does not see."""
    communicator_bytes: float = 0.9 * 2**30
    """NCCL buffers of all communicators of a rank, also outside the allocator."""
    fragmentation: float = 0.04
    """Share of the allocator's peak lost between blocks (reserved over allocated, 8 x B200 study: 2 to 7 %)."""


COMPUTE, OVERLAP, HOST, STEP, MEMORY = Compute(), Overlap(), Host(), Step(), Memory()
"""The values in use."""
