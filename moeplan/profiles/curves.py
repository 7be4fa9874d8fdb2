"""Time of one operation as a fitted curve.

One frozen dataclass per form. `seconds` takes numbers or numpy arrays that broadcast and gives seconds. Parameters are
in seconds, bytes, FLOP and their rates; a rate is a constant of a fit, not what one call reaches, and outside `valid` a
curve extrapolates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import SchemaError, UnknownNameError

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
    residuals: tuple[float, ...] = ()
    """curve / measured - 1 of the rows that the fit saw, in their order; empty: not kept."""

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
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not (low <= value < math.inf):
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
class StreamCurve(Curve):
    """A pass over device memory: t = launch + B/BW, with the bytes that a fused kernel reads and writes."""

    launch_s: float
    """Fixed time of the operation, seconds."""
    bytes_per_s: float
    """BW: rate on these bytes; below that of a copy where the operation takes several passes."""
    fused: bool = False
    """Whether what was measured is one kernel, as in a training framework; only then it enters the price of a step."""

    def seconds(self, moved_bytes: Any) -> Any:
        """Seconds of one pass."""
        return self.launch_s + moved_bytes / self.bytes_per_s
