"""Stand-ins for the GPU packages that Megatron imports, so that its own code runs on a CPU.

None of them checks anything. Kernels are absent: every name of `transformer_engine`, `triton`, `deep_ep`, ... exists and does
nothing. Only the leaf modules of Transformer Engine that own parameters are written out; they hold parameters of the shape
that Transformer Engine gives them (a column-parallel linear layer keeps out / tp rows, a row-parallel one in / tp columns, a
grouped one as many matrices as there are local experts), on whatever device is current. Which shards, which groups and which
layers there are is decided by Megatron.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PACKAGES = (
    "transformer_engine", "transformer_engine_torch", "triton", "deep_ep", "mamba_ssm", "causal_conv1d", "fla", "einops",
    "fused_weight_gradient_mlp_cuda", "fast_hadamard_transform",
)  # fmt: skip


def _parameter(module: torch.nn.Module, name: str, *shape: int) -> None:
    module.register_parameter(name, torch.nn.Parameter(torch.empty(*shape)))


def _share(features: int, ranks: int) -> int:
    assert features % ranks == 0, f"{features} is not divisible by {ranks}"
    return features // ranks


def _norm_parameters(module: torch.nn.Module, prefix: str, width: int, normalization: str) -> None:
    _parameter(module, prefix + "weight", width)
    if normalization == "LayerNorm":
        _parameter(module, prefix + "bias", width)


class _Norm(torch.nn.Module):
    normalization = "RMSNorm"

    def __init__(self, normalized_shape: int | Sequence[int] | None = None, *, hidden_size: int | None = None, **_: Any):
        super().__init__()
        shape = normalized_shape if normalized_shape is not None else hidden_size
        width = shape if isinstance(shape, int) else int(shape[0])  # type: ignore[index]
        _norm_parameters(self, "", width, self.normalization)


class RMSNorm(_Norm):
    """One weight per feature."""


class LayerNorm(_Norm):
    """One weight and one bias per feature."""

    normalization = "LayerNorm"


class Linear(torch.nn.Module):
    """A linear layer, its weight cut by `parallel_mode` over `tp_size` ranks."""

    save_original_input = False

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, parallel_mode: str | None = None,
        tp_size: int = 1, tp_group: Any = None, **_: Any,
    ):  # fmt: skip
        super().__init__()
        ranks = tp_size if tp_group is None else tp_group.size()
        self.in_features = _share(in_features, ranks) if parallel_mode == "row" else in_features
        self.out_features = _share(out_features, ranks) if parallel_mode == "column" else out_features
        _parameter(self, "weight", self.out_features, self.in_features)
        if bias:
            _parameter(self, "bias", self.out_features)
        else:
            self.bias = None


class LayerNormLinear(Linear):
    """A norm over the input features, then a linear layer."""

    def __init__(self, in_features: int, out_features: int, *, normalization: str = "LayerNorm", **rest: Any):
        super().__init__(in_features, out_features, **rest)
        _norm_parameters(self, "layer_norm_", in_features, normalization)


class GroupedLinear(torch.nn.Module):
    """`num_gemms` linear layers of one shape."""

    save_original_input = False

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, bias: bool = True, parallel_mode: str | None = None,
        tp_size: int = 1, **_: Any,
    ):  # fmt: skip
        super().__init__()
        self.num_gemms = num_gemms
        rows = _share(out_features, tp_size) if parallel_mode == "column" else out_features
        columns = _share(in_features, tp_size) if parallel_mode == "row" else in_features
        for i in range(num_gemms):
            _parameter(self, f"weight{i}", rows, columns)
            if bias:
                _parameter(self, f"bias{i}", rows)


class DotProductAttention(torch.nn.Module):
    """Attention; owns one offset per local head where the softmax has a learnable sink."""

    def __init__(
        self, num_attention_heads: int, kv_channels: Any, *, softmax_type: str = "vanilla", tp_size: int = 1, **_: Any
    ):
        super().__init__()
        if softmax_type == "learnable":
            _parameter(self, "softmax_offset", _share(num_attention_heads, tp_size))


class RMSNormGated(torch.nn.Module):
    """The gated norm of Mamba-2."""

    def __init__(self, hidden_size: int, **_: Any):
        super().__init__()
        _parameter(self, "weight", hidden_size)


def rearrange(ranks: Any, recipe: str, **sizes: int) -> Any:
    """`einops.rearrange` for the one recipe that process groups are made with."""
    assert recipe == "(l s u) -> (l u) s"
    return ranks.reshape(sizes["l"], sizes["s"], sizes["u"]).transpose(0, 2, 1).reshape(-1, sizes["s"])


class FusedAdam:
    """Only its signature is read: it says which optimizer options are available."""

    def __init__(
        self, params: Any = (), master_weight_dtype: Any = None, exp_avg_dtype: Any = None, exp_avg_sq_dtype: Any = None,
        use_decoupled_grad: bool = False, store_param_remainders: bool = False, **_: Any,
    ):  # fmt: skip
        pass


_REAL: dict[str, Any] = {
    "transformer_engine.pytorch.Linear": Linear,
    "transformer_engine.pytorch.LayerNormLinear": LayerNormLinear,
    "transformer_engine.pytorch.GroupedLinear": GroupedLinear,
    "transformer_engine.pytorch.DotProductAttention": DotProductAttention,
    "transformer_engine.pytorch.RMSNorm": RMSNorm,
    "transformer_engine.pytorch.LayerNorm": LayerNorm,
    "transformer_engine.pytorch.optimizers.FusedAdam": FusedAdam,
    "transformer_engine.pytorch.cpu_offload.get_cpu_offload_context": lambda *_, **__: (contextlib.nullcontext(), None),
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm": RMSNormGated,
    "einops.rearrange": rearrange,
}


class _Result(contextlib.nullcontext[None]):
    """What a call gives back: a decorator that changes nothing, or a context that does nothing."""

    def __call__(self, function: Any) -> Any:
        return function


class _Open(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{cls.__name__}.{name}")


class _Nothing(ModuleType):
    """A module whose every name exists: capitals are empty classes, all else callables that give back what they decorate."""

    __path__: MutableSequence[str] = []
    __version__ = "2.14.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        value: Any = _REAL.get(full)
        if value is None:
            is_class = name.lstrip("_")[:1].isupper()
            value = _Open(name, (), {"__init__": lambda self, *_, **__: None}) if is_class else _Nothing(full)
        setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if len(arguments) == 1 and not keywords and callable(arguments[0]):
            return arguments[0]
        return _Result()


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_modules: dict[str, ModuleType] = {}


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """Within: every import of one of `PACKAGES` finds a stand-in. Outside they are as absent as before."""
    finder = _Finder()
    hidden = {n: m for n, m in sys.modules.items() if n.split(".")[0] in PACKAGES}
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(_modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] in PACKAGES]:
            _modules[name] = sys.modules.pop(name)
        sys.modules.update(hidden)


class Meta(TorchFunctionMode):
    """Within: tensors asked for on a GPU are made on the meta device, which has shapes and no memory."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(keywords or {})
        if function is torch.Tensor.cuda:
            return arguments[0].to("meta")
        if keywords.get("device") is not None:
            keywords["device"] = "meta"
            keywords.pop("pin_memory", None)
        return function(*arguments, **keywords)


class Nil:
    """Takes any argument, has any method, is its own result: a CUDA stream, event or device handle."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Nil:
        return self
