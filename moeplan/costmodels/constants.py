"""Constants that no microbenchmark shows, each with its meaning and source.

All of them describe how much of a known time stays visible in a step, or what a framework does beside the counted work. They
come from controlled A/B pairs in published runs (the Megatron-Bridge ablations, the parallel-folding study, the 8 x B200
study) and are shares or small sums, never bandwidths: links and memory are pinned to microbenchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    moe: float = 43.0
    """MoE block with the all-to-all or all-gather dispatcher."""
    moe_fused: float = 28.0
    """MoE block with a fused dispatcher (DeepEP, HybridEP)."""
    per_expert: float = 2.4
    """Further kernels for every local expert: grouped GEMM without a single-kernel implementation."""
    quantized_expert_factor: float = 3.25
    """Factor on `per_expert` where each expert's inputs are quantised apart: amax or scales, cast, transpose or swizzle."""
    per_expert_bias: float = 6.0
    """Further kernels for every local expert with biases: split, outer product, sum, concatenation."""
    overlapped: float = 1.57
    """Launches where two micro-batches interleave on two streams: events, waits, and autograd split into parts."""
    backward: float = 1.3
    """Launches of the backward pass over those of the forward."""
    graphed_attention: float = 0.1
    """Share of launches left when attention is in a CUDA graph."""
    graphed_router: float = 0.6
    """Share of the MoE block's launches left when router and preprocessing are in a CUDA graph."""
    sharpness: float = 1.42
    """Exponent that joins device and host time: 1 would be one after the other, infinity launches that always run ahead.
    Reading counts of tokens back and waiting for communication keep launches from running ahead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Work of a step beside its layers."""

    optimizer_bytes: float = 34.0
    """Bytes per parameter of a shard: Adam reads and writes master and moments (24), reads gradients twice (8), writes bf16."""
    host_update_s: float = 2.8e-9
    """Seconds in which a rank's share of its host updates a parameter (fused Adam of PyTorch in fp32), the link aside: two
    fine-tuning runs of ms-swift with all states on hosts of 80 GB A100-class devices (Qwen3-30B-A3B on 4, Qwen2.5-72B on 8)
    took 2.6 and 3.5 ns for each parameter of a rank more than their other parts. Hosts with faster
    memory take less."""
    logit_bytes: float = 10.0
    """Bytes per logit of the fused cross entropy: read bf16, reduce, write the gradient in place, forward and backward."""
    overhead_s: float = 0.03
    """Data loading, logging and gradient norm that no overlap hides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Allocations beside weights and saved activations; bytes per element of what the name says."""

    head_gradient: float = 2.0
    """Per element of the output head: the bf16 weight gradient that its backward returns beside the main gradient
    (Megatron-Core, tensor_parallel/layers.py)."""
    head_tokens: float = 6.0
    """Per element of the final norm's shard of tokens: its input, its output (the head's input) and that one's gradient."""
    head_gathered: float = 4.0
    """Per element of all tokens where the head gathers them (sequence parallelism): the gathered input, in a buffer that is
    never freed (Megatron-Core, `GlobalMemoryBuffer`), and its gradient before it is scattered."""
    dummy_gradient: float = 2.0
    """Per element of every distinct weight shape: the bf16 buffer that gradient-accumulation fusion keeps for each
    (Transformer Engine, module/base.py, `get_dummy_wgrad`)."""
    step_gradient: float = 4.0
    """Per optimizer shard element: the fp32 copy of bf16 gradients that the optimizer step makes of all parameters at once
    (Megatron-Core, optimizer/distrib_optimizer.py, `_copy_model_grads_to_main_grads`)."""
    workspace_bytes: float = 64.0 * 2**20
    """cuBLAS workspaces inside the allocator: 32 MiB of PyTorch and 32 MiB of Transformer Engine on compute capability 9.0 and
    later."""
    context_bytes: float = 1.1 * 2**30
    """CUDA context, kernels and driver reserve that the framework's allocator does not see."""
    communicator_bytes: float = 0.9 * 2**30
    """NCCL buffers of all communicators of a rank, also outside the allocator."""
    fragmentation: float = 0.09
    """Share of the allocator's peak lost between blocks: reserved over allocated was 1.03 to 1.09 in the 8 x B200 study, and
    the upper end counts, since a plan that runs out of memory is worth nothing."""


OVERLAP, HOST, STEP, MEMORY = Overlap(), Host(), Step(), Memory()
"""The values in use."""
