"""The kernels of a training step in plain torch, prepared so that a call runs one once.

`kernel(case, device)` makes the tensors of a case and gives a closure with the name of what it runs. Products are written as
training has them in bfloat16: a weight [n, k] of a linear layer, y = x w^T; data gradient dx = dy w; weight gradient
dw = dy^T x, not added to an earlier one. FP8 products quantise x in every run. Where this torch or device lacks an operation,
`UnsupportedCase` says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeplan.profiles.bench_attention import attention, attention_backward
from moeplan.profiles.bench_streams import host_copy, launch, stream
from moeplan.profiles.bench_support import LACKING, Kernel, normal, wait, why
from moeplan.profiles.cases import Case, UnsupportedCase
from moeplan.profiles.timing import PRECISION, Clock, Timing


def measured(case: Case, clock: Clock, budget_s: float, precision: float = PRECISION) -> tuple[Timing, str]:
    """Time one kernel case on the device of `clock`; the cost of a launch is the host's time, all others the device's."""
    run, how = kernel(case, clock.device)
    measure = clock.measure_host if case.op == "launch" else clock.measure
    return measure(run, budget_s, precision), how


def kernel(case: Case, device: Any) -> Kernel:
    """The kernel of a case, run once already; raises `UnsupportedCase` where that fails."""
    device = torch.device(device)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of operations that it may change and of attention backends that it skips
        try:
            run, how = _KERNELS[case.op](case, device)
            run()
            wait(device)
        except torch.cuda.OutOfMemoryError:
            raise UnsupportedCase(f"{case.op} '{case.key}' {dict(case.sizes)} does not fit into memory") from None
        except LACKING as error:
            raise UnsupportedCase(f"{case.op} '{case.key}' cannot run: {why(error)}") from None
    return run, f"{how}, torch {torch.__version__}"


def _sizes(case: Case, *names: str) -> tuple[int, ...]:
    return tuple(int(case.sizes[name]) for name in names)


def _gemm(case: Case, device: torch.device) -> Kernel:
    m, n, k = _sizes(case, "m", "n", "k")
    x, weight = normal(device, m, k), normal(device, n, k)
    if case.key == "fp8":
        return _scaled_gemm(x, weight)
    if case.key != "bf16":
        raise UnsupportedCase(f"gemm '{case.key}': no such precision here")
    y = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    return functools.partial(torch.mm, x, weight.t(), out=y), "torch.mm"


def _scaled_gemm(x: torch.Tensor, weight: torch.Tensor) -> Kernel:
    """One scale a tensor; x is quantised in every run, the weight once, as it is once a step."""
    scaled_mm = getattr(torch, "_scaled_mm", None)
    if scaled_mm is None:
        raise UnsupportedCase("gemm 'fp8': this torch has no _scaled_mm")
    if x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise UnsupportedCase("gemm 'fp8': needs compute capability 8.9 or more")
    reasons = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):  # the second one on AMD's CDNA 3
        run = functools.partial(_scaled_product, scaled_mm, x, _quantized(weight, dtype))
        try:
            run()
        except LACKING as error:
            reasons.append(why(error))
            continue
        return run, f"torch._scaled_mm, {str(dtype).removeprefix('torch.')} with a scale a tensor, x quantised by eager torch"
    raise UnsupportedCase(f"gemm 'fp8': {reasons[0]}")


def _scaled_product(scaled_mm: Callable[..., Any], x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> Any:
    quantized, scale = _quantized(x, weight[0].dtype)
    return scaled_mm(quantized, weight[0].t(), scale_a=scale, scale_b=weight[1], out_dtype=torch.bfloat16)


def _quantized(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor in FP8, its greatest magnitude at the end of the range, and what to multiply by to have it back."""
    low, high = torch.aminmax(x)
    scale = torch.maximum(-low, high).float() / torch.finfo(dtype).max
    return (x / scale).to(dtype), scale


def _grouped_gemm(case: Case, device: torch.device) -> Kernel:
    groups, m, n, k = _sizes(case, "groups", "m", "n", "k")
    direction = case.key.removeprefix("bf16")
    if direction not in ("", "-dgrad", "-wgrad"):
        raise UnsupportedCase(f"grouped_gemm '{case.key}': no such precision or direction here")
    x, w, dy = normal(device, groups * m, k), normal(device, groups, n, k), normal(device, groups * m, n)
    ends = torch.arange(m, groups * m + 1, m, dtype=torch.int32, device=device)
    left, right = {"": (x, w.transpose(1, 2)), "-dgrad": (dy, w), "-wgrad": (dy.t(), x)}[direction]
    for name, product in _grouped_products():
        run = functools.partial(product, left, right, offs=ends)
        try:
            run()
        except LACKING as error:
            why(error)
            continue
        return run, name
    return functools.partial(_grouped_loop, left, right, groups), "loop of torch.mm"


def _grouped_products() -> list[tuple[str, Callable[..., Any]]]:
    """Torch's own grouped products by name, the public one first."""
    found = {
        "torch.nn.functional.grouped_mm": getattr(torch.nn.functional, "grouped_mm", None),
        "torch._grouped_mm": getattr(torch, "_grouped_mm", None),
    }
    return [(name, product) for name, product in found.items() if product is not None]


def _grouped_loop(left: torch.Tensor, right: torch.Tensor, groups: int) -> torch.Tensor:
    """The same products one by one: rows of `left` with a matrix each, or (weight gradients) columns with rows of `right`."""
    if right.dim() == 3:
        y = left.new_empty(left.shape[0], right.shape[2])
        for rows, weight, out in zip(left.chunk(groups), right, y.chunk(groups), strict=True):
            torch.mm(rows, weight, out=out)
        return y
    gradient = left.new_empty(groups, left.shape[0], right.shape[1])
    for columns, rows, out in zip(left.chunk(groups, dim=1), right.chunk(groups), gradient, strict=True):
        torch.mm(columns, rows, out=out)
    return gradient


_KERNELS: Mapping[str, Callable[[Case, torch.device], Kernel]] = {
    "gemm": _gemm,
    "grouped_gemm": _grouped_gemm,
    "attention": attention,
    "attention-backward": attention_backward,
    "stream": stream,
    "host_copy": host_copy,
    "launch": launch,
}
KERNEL_OPS = frozenset(_KERNELS)
"""Operations that one device runs by itself."""
