"""CUDA as Megatron asks for it, on a CPU: devices, streams and random states.

Entry points are redirected and tensors asked for on a GPU are made in host memory; what is computed, and what ranks send to
each other, is Megatron's. Two things are done in another way: the norm that Megatron has without GPU libraries refuses sequence
parallelism, torch's own stands in for it; and exchanges of unequal parts, which gloo lacks, are made of what it has.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests import megatron_stand_ins as stand_ins

CPU = torch.device("cpu")
_all_to_all = dist.all_to_all_single


class OnCpu(TorchFunctionMode):
    """Within: what is asked for on a GPU is in host memory, and names the type that it would have on a GPU."""

    def __torch_function__(
        self, function: Callable[..., Any], kinds: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(keywords or {})
        if function is torch.Tensor.cuda:
            return arguments[0]
        if keywords.get("device") is not None:
            keywords["device"] = CPU
        out = function(*arguments, **keywords)
        return out.replace("torch.", "torch.cuda.") if function is torch.Tensor.type and isinstance(out, str) else out


def _exchange(output: Any, given: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any) -> Any:
    sizes = [None if s is None else [int(i) for i in s] for s in (output_split_sizes, input_split_sizes)]
    return _all_to_all(output, given.contiguous(), *sizes, **rest)


def _gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
    lengths = [len(part) for part in parts]
    whole = torch.cat(parts)
    _all_to_all(whole, torch.cat([own] * len(parts)), lengths, [len(own)] * len(parts), group=group)
    for part, found in zip(parts, whole.split(lengths), strict=True):
        part.copy_(found)


def _scatter(output: torch.Tensor, parts: list[torch.Tensor], group: Any) -> None:
    whole = torch.cat(parts)
    dist.all_reduce(whole, group=group)
    output.copy_(whole.split([len(part) for part in parts])[group.rank()])


_EXCHANGES = {"all_to_all_single": _exchange, "all_gather": _gather, "reduce_scatter": _scatter}
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "set_device": lambda *_: None,
    "current_device": lambda: CPU,
    "get_device_properties": lambda *_: types.SimpleNamespace(major=9, minor=0),
    "Stream": stand_ins.Nil,
    "current_stream": stand_ins.Nil,
    "stream": lambda *_: contextlib.nullcontext(),
    "synchronize": lambda *_: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),
}


def _norm(_: Any, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
    module = torch.nn.RMSNorm(hidden_size, eps=eps)
    module.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


@contextlib.contextmanager
def megatron_on_cpu(folder: str) -> Iterator[None]:
    """Within: `megatron` is importable from a folder, and torch.cuda is the CPU. Triton alone is feigned, for imports."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, folder)
    with contextlib.ExitStack() as stack:
        if not hasattr(typing, "override"):  # Python 3.11
            stack.enter_context(mock.patch.object(typing, "override", lambda function: function, create=True))
        stack.enter_context(mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda given: given)))
        stack.enter_context(mock.patch.object(stand_ins, "PACKAGES", ("triton",)))
        with stand_ins.packages():
            importlib.import_module("megatron.training.training")
        importlib.import_module("torch._dynamo")  # which an optimizer would do
        random = importlib.import_module("megatron.core.tensor_parallel.random")
        norms = importlib.import_module("megatron.core.transformer.torch_norm")
        patches = [(torch.cuda, name, value) for name, value in _CUDA.items()]
        patches += [(dist, name, value) for name, value in _EXCHANGES.items()]
        patches += [
            (random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
            (random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
            (norms.WrappedTorchNorm, "__new__", staticmethod(_norm)),
        ]
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        with OnCpu():
            yield
