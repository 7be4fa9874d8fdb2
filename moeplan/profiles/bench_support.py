"""What the kernel benches share: the kind of what they give, random tensors, and what counts as "this torch cannot"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Kernel: TypeAlias = tuple[Callable[[], Any], str]
"""A closure that runs a kernel once and gives its result, and the name of what it runs."""
LACKING = (NotImplementedError, RuntimeError, ValueError)
"""What torch raises where an operation, a type or a shape is not offered; `why` sorts out what must not pass as that."""


def why(error: Exception) -> str:
    """First line of an error that says what is lacking; raises it where the device itself failed, since nothing runs then."""
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        raise error
    return str(error).strip().partition("\n")[0] or type(error).__name__


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal random numbers: zeros would draw less power and clock higher."""
    return torch.randn(*shape, dtype=dtype, device=device)


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
