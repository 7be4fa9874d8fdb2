"""Time of one operation as a fitted curve.

One frozen dataclass per form. `seconds` takes numbers or numpy arrays that broadcast and gives seconds. Parameters are
in seconds, bytes, FLOP and their rates; a rate is a constant of a fit, not what one call reaches, and outside `valid` a
curve extrapolates. In `catalog/curves.yaml` (from benchmarks/fit_curves.py) times are in us, ns or ps and rates in
TFLOP/s or GB/s, as the end of each key says; `load_curves` converts them, once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import SchemaError, UnknownNameError
from moeplan.records import from_mapping, load_yaml, parse_yaml, plain, read_text
from moeplan.units import GB, TERA, US

_SHIPPED = Path(__file__).parent / "catalog" / "curves.yaml"

KNOT_BYTES = tuple(float(2**p) for p in (16, 18, 20, 22, 24, 26, 29))
"""The message sizes of a collective curve: 64 KiB to 64 MiB in steps of 4, and 512 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What every curve carries: how well it fits, and where."""

    error: float
    """Median of |curve / measured - 1| over rows that the fit did not see."""
    error_p90: float
    """90th percentile of the same."""
    samples: int
    """Rows that the fit saw."""
    valid: Mapping[str, tuple[float, ...]]
    """Least and greatest measured value of each size."""
    source: str
    """Table, software and selection of the rows."""

    def __post_init__(self) -> None:
        _check(self)

    def covers(self, **sizes: Any) -> Any:
        """Whether the named sizes lie within the measured range, element by element."""
        inside: Any = True
        for name, value in sizes.items():
            if name not in self.valid:
                raise UnknownNameError("size", name, self.valid)
            low, high = self.valid[name]
            inside = inside & (value >= low) & (value <= high)
        return inside


def _check(curve: Curve) -> None:
    what = type(curve).__name__
    for spec in dataclasses.fields(curve):
        value = getattr(curve, spec.name)
        low = 0.0 if spec.name in _MAY_BE_ZERO else math.ulp(0.0)
        if isinstance(value, (int, float)) and not (low <= value < math.inf):
            raise SchemaError(f"{what}: {spec.name}={value} is not a {'finite' if low == 0 else 'positive'} number")
    for name, span in curve.valid.items():
        if len(span) != 2 or not span[0] <= span[1]:
            raise SchemaError(f"{what}: valid range of '{name}' is {list(span)}", hint="give least and greatest value")


_MAY_BE_ZERO = frozenset(
    ("error", "error_p90", "samples", "launch_s", "group_s", "token_s", "latency_s", "quantize_s", "result_s")
)


def _roofline(compute_s: Any, memory_s: Any, sharpness: float) -> Any:
    return (compute_s**sharpness + memory_s**sharpness) ** (1.0 / sharpness)


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmCurve(Curve):
    """y[m, n] = x[m, k] w[k, n]: t = launch + ((F/P)^q + (B/BW)^q)^(1/q), F = 2mnk, B = bytes of x, w and y.

    A smooth roofline: compute-bound and memory-bound ends joined by the exponent q. Fitted to cuBLAS calls (bf16) or to
    DeepGEMM calls without quantisation (fp8-blockwise). For a weight gradient m, n are the sides of the weight.
    """

    launch_s: float
    """Fixed time of a call, seconds."""
    flop_per_s: float
    """P: rate of a large, compute-bound product."""
    bytes_per_s: float
    """BW: rate of a memory-bound product."""
    sharpness: float
    """q: 1 adds the two times, infinity takes the longer one."""
    input_bytes: float = 2.0
    """Bytes per element of x."""
    weight_bytes: float = 2.0
    """Bytes per element of w."""
    output_bytes: float = 2.0
    """Bytes per element of y (8 where a float32 gradient is read and written)."""

    def seconds(self, m: Any, n: Any, k: Any) -> Any:
        """Seconds of one product."""
        flop = 2.0 * m * n * k
        moved = self.input_bytes * m * k + self.weight_bytes * n * k + self.output_bytes * m * n
        return self.launch_s + _roofline(flop / self.flop_per_s, moved / self.bytes_per_s, self.sharpness)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedGemmCurve(GemmCurve):
    """A GEMM in FP8 with x quantised from bfloat16 on the way: t = that of `GemmCurve` + a mk + b mn.

    a mk is the pass over x that finds scales and casts; it does not shrink with n. b mn is further work on the result.
    The smooth roofline in place of a plain F/P matters below m = 512 and halves the mean error.
    """

    quantize_s: float
    """a: seconds per element of x."""
    result_s: float
    """b: seconds per element of y."""
    input_bytes: float = 1.0
    """Bytes per element of x, quantised."""
    weight_bytes: float = 1.0
    """Bytes per element of w."""

    def seconds(self, m: Any, n: Any, k: Any) -> Any:
        """Seconds of one product with the quantisation of its input."""
        return GemmCurve.seconds(self, m, n, k) + self.quantize_s * m * k + self.result_s * m * n


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedGemmCurve(Curve):
    """Products of m rows each, with a weight [k, n] each: t = launch + groups c + ((F/P)^q + (B/BW)^q)^(1/q).

    F and B are sums over the groups; c is the launch of a group where the library makes a call per group (Transformer
    Engine in bf16), near 0 where one kernel does all (DeepGEMM). m, n, k are those of the forward product also for the
    gradients, which have curves of their own. No quantisation, permutation or activation inside.
    """

    launch_s: float
    """Fixed time of the operation, seconds."""
    group_s: float
    """c: further seconds for each group."""
    flop_per_s: float
    """P: rate of a large, compute-bound group."""
    bytes_per_s: float
    """BW: rate of a memory-bound group."""
    sharpness: float
    """q of the smooth roofline."""
    input_bytes: float = 2.0
    """Bytes per element of the [m, k] side."""
    weight_bytes: float = 2.0
    """Bytes per element of the [k, n] side (8 where a float32 gradient is read and written, 4 for a bfloat16 one)."""
    output_bytes: float = 2.0
    """Bytes per element of the [m, n] side."""

    def seconds(self, groups: Any, m: Any, n: Any, k: Any) -> Any:
        """Seconds of `groups` products of m rows (m may be the mean: F and B are linear in it)."""
        flop = 2.0 * groups * m * n * k
        moved = groups * (self.input_bytes * m * k + self.weight_bytes * n * k + self.output_bytes * m * n)
        product_s = _roofline(flop / self.flop_per_s, moved / self.bytes_per_s, self.sharpness)
        return self.launch_s + groups * self.group_s + product_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCurve(Curve):
    """One rank's whole MoE operation, unfused (routing, permute, grouped GEMMs, activation, un-permute), forward only.

    t = launch + max(F/P, W/BW) + (A + I)/BWa + R/BWt: F FLOP of the experts, W weight bytes of the experts that have
    rows, A and I bytes of the rows at hidden and expert width, R bytes of all tokens whose routing the rank reads. BWa
    is 4-25 % of memory bandwidth: several passes hide in it. Imbalance belongs into `rows`; W does not grow with it.
    Fitted to serving kernels (TensorRT-LLM); a training step fuses otherwise, see `GroupedGemmCurve`.
    """

    launch_s: float
    """Fixed time of the operation, seconds."""
    flop_per_s: float
    """P: rate of the grouped products."""
    weight_bytes_per_s: float
    """BW: rate at which expert weights are read."""
    activation_bytes_per_s: float
    """BWa: rate of the passes over permuted rows, counted once."""
    token_bytes_per_s: float
    """BWt: rate of the passes over all tokens."""
    weight_bytes: float = 2.0
    """Bytes per element of the expert weights; activations are counted with 2."""

    def seconds(self, rows: Any, tokens: Any, experts: Any, hidden: Any, width: Any, projections: Any = 3) -> Any:
        """Seconds for `rows` token-expert pairs on `experts` local experts, of `tokens` that the rank sees.

        `projections` is 3 for gated experts and 2 for others.
        """
        weights = 1.0 * projections * hidden * width
        product_s = 2.0 * rows * weights / self.flop_per_s
        weight_s = np.minimum(experts, rows) * weights * self.weight_bytes / self.weight_bytes_per_s
        passes_s = 2.0 * rows * (hidden + width) / self.activation_bytes_per_s
        tokens_s = 2.0 * tokens * hidden / self.token_bytes_per_s
        return self.launch_s + np.maximum(product_s, weight_s) + passes_s + tokens_s


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCurve(Curve):
    """Flash attention: forward t = launch + F/P + B/BW, backward t = launch + r (F/P + B/BW).

    F is the FLOP of the forward that a causal mask leaves, B the bytes of q, k, v and the output; r compares with the
    forward time and includes the recomputation inside the kernel (2.5 would be equal efficiency).
    """

    launch_s: float
    """Fixed time of a call, seconds."""
    flop_per_s: float
    """P: rate on the FLOP that the mask leaves."""
    bytes_per_s: float
    """BW: rate on q, k, v and the output."""
    backward_ratio: float
    """r: backward over forward time of long sequences."""

    def seconds(self, flop: Any, io_bytes: Any) -> Any:
        """Seconds of the forward; `causal_flop` and `attention_bytes` count the arguments."""
        return self.launch_s + flop / self.flop_per_s + io_bytes / self.bytes_per_s

    def backward_seconds(self, flop: Any, io_bytes: Any) -> Any:
        """Seconds of the backward of a forward with `flop` and `io_bytes`."""
        return self.launch_s + self.backward_ratio * (flop / self.flop_per_s + io_bytes / self.bytes_per_s)


def causal_flop(batch: Any, seq: Any, heads: Any, qk_dim: Any, v_dim: Any) -> Any:
    """FLOP of a causal attention forward: two products of 2 FLOP, half of the seq^2 pairs."""
    return 1.0 * batch * heads * seq * seq * (qk_dim + v_dim)


def attention_bytes(batch: Any, seq: Any, heads: Any, kv_heads: Any, qk_dim: Any, v_dim: Any) -> Any:
    """Bytes of q, k, v and the output in a 2-byte type."""
    return 2.0 * batch * seq * (heads + kv_heads) * (qk_dim + v_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCurve(Curve):
    """One collective on one group: log-log interpolation through measured times; flat below, linear above.

    Bytes are those of nccl-tests, the larger buffer of a rank (all-gather: output, reduce-scatter: input, all-to-all:
    whole buffer, all-reduce: tensor). Above the last knot the slope of the last piece goes on. Knots see the protocol
    switch near 2-8 MB that a latency-bandwidth law misses by up to half; they do not carry over to other group sizes.
    """

    times_s: tuple[float, ...]
    """Seconds at each knot, not falling."""
    sizes_bytes: tuple[float, ...] = KNOT_BYTES
    """Bytes at each knot, rising."""

    def __post_init__(self) -> None:
        _check(self)
        times, sizes = list(self.times_s), list(self.sizes_bytes)
        if len(times) != len(sizes) or len(times) < 2:
            raise SchemaError(f"CollectiveCurve: {len(times)} times for {len(sizes)} sizes", hint="give one per size")
        if not times[0] > 0 or times != sorted(times) or sizes != sorted(set(sizes)):
            raise SchemaError(f"CollectiveCurve: times {times} fall or are not positive, or sizes {sizes} do not rise")

    def seconds(self, message_bytes: Any) -> Any:
        """Seconds of one collective of `message_bytes`."""
        known = np.interp(np.log(np.maximum(message_bytes, 1.0)), np.log(self.sizes_bytes), np.log(self.times_s))
        slope = (self.times_s[-1] - self.times_s[-2]) / (self.sizes_bytes[-1] - self.sizes_bytes[-2])
        return np.exp(known) + slope * np.maximum(message_bytes - self.sizes_bytes[-1], 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchCurve(Curve):
    """MoE dispatch or combine with de-duplicated copies: t = latency + tokens c + B/BW.

    B is what leaves a rank: within an NVLink domain one copy to each other rank that holds a chosen expert of the
    token, between nodes one copy to each other node that does (forwarding over NVLink hides behind it). c is the work
    per token whatever its size; it is 0 where the tables hold one hidden size only.
    """

    latency_s: float
    """Fixed time of the operation, seconds."""
    bytes_per_s: float
    """BW: rate on the bytes that leave a rank."""
    token_s: float = 0.0
    """c: seconds per token of a rank, before dispatch."""

    def seconds(self, link_bytes: Any, tokens: Any = 0.0) -> Any:
        """Seconds to move `link_bytes` that `tokens` tokens of each rank cause."""
        return self.latency_s + tokens * self.token_s + link_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A measured copy or streaming rate."""

    bytes_per_s: float
    """Bytes read and written per second."""
    source: str
    """Where it was measured."""
    inferred: bool = False
    """True where it was not measured as such but read off another operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BusRate:
    """A single measured point of a collective, for groups without a curve."""

    op: str
    """all_reduce, all_gather, reduce_scatter or all_to_all."""
    ranks: int
    """GPUs in the group."""
    domains: int
    """NVLink domains (nodes, racks) that they span."""
    message_bytes: float
    """Bytes as nccl-tests counts them."""
    bus_bytes_per_s: float
    """bytes / time x (n - 1)/n, for all-reduce twice that."""
    scale_out_efficiency: float | None = None
    """Share of the network interfaces' rate, where they are the bottleneck."""
    source: str
    """Where it was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCurves:
    """What is known about one device; an operation that nobody measured on it is absent."""

    gemm: Mapping[str, GemmCurve] = field(default_factory=dict)
    """By precision; `-dgrad`, `-wgrad` where a source measured the gradients apart."""
    quantized_gemm: Mapping[str, QuantizedGemmCurve] = field(default_factory=dict)
    """By precision."""
    grouped_gemm: Mapping[str, GroupedGemmCurve] = field(default_factory=dict)
    """By precision; `-dgrad`, `-wgrad` for the gradients."""
    experts: Mapping[str, ExpertCurve] = field(default_factory=dict)
    """By precision."""
    attention: Mapping[str, AttentionCurve] = field(default_factory=dict)
    """By head size; "192/128" is latent attention with a value size of 128."""
    collectives: Mapping[str, Mapping[str, CollectiveCurve]] = field(default_factory=dict)
    """By operation and number of ranks, in one NVLink (or PCIe) domain."""
    multi_node: Mapping[str, Mapping[str, CollectiveCurve]] = field(default_factory=dict)
    """By operation and "ranks/nodes"."""
    dispatch: Mapping[str, DispatchCurve] = field(default_factory=dict)
    """By library and phase; `-scale-out` where nodes are crossed."""
    rates: Mapping[str, Rate] = field(default_factory=dict)
    """memory, host_to_device, device_to_host."""
    gemm_peak_flop_per_s: Mapping[str, float] = field(default_factory=dict)
    """Best rate over all shapes that one source tried, by precision: a ceiling, 0-14 % above `flop_per_s` of a fit."""
    bus: tuple[BusRate, ...] = ()
    """Single points of collectives without a curve."""


_HUMAN = (
    ("flop_per_s", "tflop_per_s", TERA), ("bytes_per_s", "gb_per_s", GB), ("group_s", "group_ns", 1e-9),
    ("token_s", "token_ns", 1e-9), ("quantize_s", "quantize_ps", 1e-12), ("result_s", "result_ps", 1e-12),
    ("_s", "_us", US),
)  # fmt: skip
"""End of a field's name, end of the key in a file, and what 1 in the file is in base units; the first match counts."""


def from_human(data: Any, scale: float = 1.0) -> Any:
    """Plain data with keys and numbers in base units: `launch_us: 3` becomes `launch_s: 3e-6`."""
    if isinstance(data, Mapping):
        units = {key: next((u for u in _HUMAN if str(key).endswith(u[1])), ("", "", scale)) for key in data}
        return {str(k)[: len(str(k)) - len(u[1])] + u[0]: from_human(data[k], u[2]) for k, u in units.items()}
    if isinstance(data, list):
        return [from_human(value, scale) for value in data]
    return data * scale if scale != 1.0 and isinstance(data, (int, float)) else data


def to_human(data: Any, scale: float = 1.0) -> Any:
    """The inverse of `from_human`, also for a curve; what is converted keeps 12 digits."""
    data = plain(data)
    if isinstance(data, Mapping):
        units = {key: next((u for u in _HUMAN if key.endswith(u[0])), ("", "", scale)) for key in data}
        return {k[: len(k) - len(u[0])] + u[1]: to_human(data[k], u[2]) for k, u in units.items()}
    if isinstance(data, list):
        return [to_human(value, scale) for value in data]
    if isinstance(data, bool) or not isinstance(data, (int, float)):
        return data
    value = float(data) if scale == 1.0 else float(f"{data / scale:.12g}")
    return int(value) if value.is_integer() else value


def load_curves(path: Path = _SHIPPED) -> dict[str, DeviceCurves]:
    """The curves of every device in a file, by default the shipped one."""
    where = f"curves '{path}'"
    data = load_yaml(path, "curves")
    devices = data.get("devices") if isinstance(data, Mapping) else None
    if not isinstance(devices, Mapping):
        raise SchemaError(f"{where}: no mapping of 'devices'")
    return {name: from_mapping(DeviceCurves, from_human(d), f"{where}, device '{name}'") for name, d in devices.items()}


@functools.cache
def device_curves(name: str) -> DeviceCurves | None:
    """The shipped curves of one device, None if nothing was measured on it; only its part of the file is parsed."""
    text = _device_texts().get(name)
    if text is None:
        return None
    return from_mapping(DeviceCurves, from_human(parse_yaml(text, f"curves of {name}")), f"curves of {name}")


@functools.cache
def _device_texts() -> dict[str, str]:
    """Text of every device in the shipped file, whose writer indents device names by two blanks."""
    devices = read_text(_SHIPPED, "curves").partition("\ndevices:\n")[2]
    words = re.split(r"^  (\S+):\n", devices, flags=re.MULTILINE)
    return dict(zip(words[1::2], words[2::2], strict=True))
