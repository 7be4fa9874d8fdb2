"""Attention forward and backward in torch, by the fastest implementation that runs.

Causal, bfloat16, [batch, heads, sequence, head size], grouped queries by the implementation's own means where it has them.
Candidates are the backends of `scaled_dot_product_attention` and, if installed, flash-attn 2 and 3; the one whose forward and
backward together are fastest is taken for both, as a training run would have it. The plain backend, which writes all scores, is
taken only where no other runs.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from moeplan.profiles.bench_support import LACKING, Kernel, normal, wait, why
from moeplan.profiles.cases import Case, UnsupportedCase

_TRIALS = 2
"""Runs of a candidate after its first one."""


def attention(case: Case, device: torch.device) -> Kernel:
    """The forward alone."""
    q, k, v = _inputs(case, device)
    forward, how = _fastest(q, k, v)
    q, k, v = q.detach(), k.detach(), v.detach()
    return lambda: forward(q, k, v), how


def attention_backward(case: Case, device: torch.device) -> Kernel:
    """The backward alone, of a forward that was saved."""
    inputs = _inputs(case, device)
    forward, how = _fastest(*inputs)
    out = forward(*inputs)
    return _backward_of(out, inputs), how


def _backward_of(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    return functools.partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def _inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, seq, heads, kv_heads = (int(case.sizes[name]) for name in ("batch", "seq", "heads", "kv_heads"))
    qk_dim, _, v_dim = case.key.partition("/")

    def of_heads(count: int, width: str) -> torch.Tensor:
        return normal(device, batch, count, seq, int(width)).requires_grad_()

    return of_heads(heads, qk_dim), of_heads(kv_heads, qk_dim), of_heads(kv_heads, v_dim or qk_dim)


def _fastest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Callable[..., torch.Tensor], str]:
    """The implementation whose forward and backward take least time together."""
    found: list[tuple[float, str, Callable[..., torch.Tensor]]] = []
    reason = ""
    for name, forward in _candidates(q, k):
        if name.endswith("math") and found:
            continue
        try:
            found.append((_trial_s(forward, q, k, v), name, forward))
        except (*LACKING, TypeError, AssertionError) as error:
            reason = why(error)
    if not found:
        raise UnsupportedCase(f"attention of head sizes {q.shape[-1]}/{v.shape[-1]}: no implementation runs: {reason}")
    _, name, forward = min(found, key=lambda each: each[0])
    return forward, name


def _trial_s(forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> float:
    seconds = []
    for _ in range(1 + _TRIALS):
        wait(inputs[0].device)
        start = time.perf_counter()
        _backward_of(forward(*inputs), inputs)()
        wait(inputs[0].device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _candidates(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cuda":
        yield from _flash_attn()
    for backend in ("cudnn_attention", "flash_attention", "efficient_attention", "math"):
        member = getattr(SDPBackend, backend.upper(), None)
        if member is not None:
            yield f"scaled_dot_product_attention, {backend}", functools.partial(_sdpa, member, grouped)


def _sdpa(backend: Any, grouped: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options)


def _flash_attn() -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """Installed flash-attn packages; they want [batch, sequence, heads, head size]."""
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            package = importlib.import_module(module)
            call = package.flash_attn_func
        except (ImportError, AttributeError, OSError):
            continue
        yield f"{module} {getattr(package, '__version__', '')}".strip(), functools.partial(_flash, call)


def _flash(call: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor:
    out: Any = call(*(each.transpose(1, 2) for each in inputs), causal=True)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first.transpose(1, 2)
