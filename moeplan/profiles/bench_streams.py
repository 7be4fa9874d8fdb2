"""Operations that move memory and hardly compute, copies between host and device, and the cost of a launch.

Each is what plain torch offers, named in `how`: norm with the residual add before it, SwiGLU, gather of rows by expert and
their weighted sum back, router (softmax, top-k, counts), cross entropy of fp32 logits (forward and backward), Adam's step with
the bfloat16 copy of the weights. Bytes of a case are those of the cost models (`cases.STREAM_BYTES`), not what the calls move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as functional

from moeplan.profiles.bench_support import LACKING, Kernel, normal
from moeplan.profiles.cases import TOPK, Case, UnsupportedCase

_Stream: TypeAlias = Callable[[int, int, torch.device], Kernel]


def stream(case: Case, device: torch.device) -> Kernel:
    """A pass over `rows` rows of `width` elements."""
    if case.key not in _STREAMS:
        raise UnsupportedCase(f"stream '{case.key}': no such pass here")
    return _STREAMS[case.key](int(case.sizes["rows"]), int(case.sizes["width"]), device)


def _copy(rows: int, width: int, device: torch.device) -> Kernel:
    source = normal(device, rows, width)
    return functools.partial(torch.empty_like(source).copy_, source), "copy_"


def _norm(rows: int, width: int, device: torch.device) -> Kernel:
    x, residual, weight = normal(device, rows, width), normal(device, rows, width), normal(device, width)
    total = torch.empty_like(x)

    def run() -> torch.Tensor:
        torch.add(x, residual, out=total)
        return functional.rms_norm(total, (width,), weight)

    return run, "add and rms_norm"


def _swiglu(rows: int, width: int, device: torch.device) -> Kernel:
    gate, up = normal(device, rows, 2 * width).chunk(2, dim=1)

    def run() -> torch.Tensor:
        return functional.silu(gate).mul_(up)

    return run, "silu and mul"


def _routing(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token of each dispatched row, sorted by expert as good as shuffled, and its probability."""
    order = torch.randperm(rows, device=device)
    return order // TOPK, torch.rand(rows, 1, dtype=torch.bfloat16, device=device)


def _permute(rows: int, width: int, device: torch.device) -> Kernel:
    tokens = normal(device, rows // TOPK, width)
    token_of_row, _ = _routing(rows, device)
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    return functools.partial(torch.index_select, tokens, 0, token_of_row, out=out), "index_select"


def _unpermute(rows: int, width: int, device: torch.device) -> Kernel:
    expert_out = normal(device, rows, width)
    token_of_row, probability = _routing(rows, device)
    out = torch.zeros(rows // TOPK, width, dtype=torch.bfloat16, device=device)

    def run() -> torch.Tensor:
        return out.zero_().index_add_(0, token_of_row, expert_out * probability)

    return run, "mul and index_add_"


def _router(rows: int, width: int, device: torch.device) -> Kernel:
    logits = normal(device, rows, width, dtype=torch.float32)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probability, expert = logits.softmax(dim=1).topk(TOPK, dim=1)
        counts = torch.zeros(width, dtype=torch.int64, device=device)
        counts.scatter_add_(0, expert.flatten(), torch.ones(rows * TOPK, dtype=torch.int64, device=device))
        return probability, expert, counts

    return run, "softmax, topk and scatter_add_"


def _cross_entropy(rows: int, width: int, device: torch.device) -> Kernel:
    logits = normal(device, rows, width).requires_grad_()
    targets = torch.randint(width, (rows,), device=device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = functional.cross_entropy(logits.float(), targets)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return run, "cross_entropy of float32 logits, forward and backward"


def _optimizer(rows: int, width: int, device: torch.device) -> Kernel:
    master = normal(device, rows * width, dtype=torch.float32).requires_grad_()
    master.grad = normal(device, rows * width, dtype=torch.float32)
    weights = torch.empty(rows * width, dtype=torch.bfloat16, device=device)
    try:
        step, how = torch.optim.AdamW([master], fused=True).step, "fused AdamW and copy_"
        step()
    except LACKING:
        step, how = torch.optim.AdamW([master], foreach=True).step, "foreach AdamW and copy_"

    def run() -> torch.Tensor:
        step()
        return weights.copy_(master.detach())

    return run, how


_STREAMS: Mapping[str, _Stream] = {
    "copy": _copy,
    "norm": _norm,
    "swiglu": _swiglu,
    "permute": _permute,
    "unpermute": _unpermute,
    "router": _router,
    "cross_entropy": _cross_entropy,
    "optimizer": _optimizer,
}


def host_copy(case: Case, device: torch.device) -> Kernel:
    """A copy between pinned host memory and the device."""
    if device.type != "cuda":
        raise UnsupportedCase("host_copy: the device is the host")
    size = int(case.sizes["bytes"])
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    target, source = (there, host) if case.key == "host_to_device" else (host, there)
    return functools.partial(target.copy_, source, non_blocking=True), "copy_, pinned"


def launch(case: Case, device: torch.device) -> Kernel:
    """One kernel on one element, whose time is the host's."""
    one = torch.ones(1, device=device)
    return functools.partial(one.add_, 0.0), "add_ of one element"
