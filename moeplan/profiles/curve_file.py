"""Files of measured curves, device by device: the shipped one, `catalog/curves.yaml`, from benchmarks/fit_curves.py.

Times in a file are in us, ns or ps and rates in TFLOP/s or GB/s, as the end of each key says; `load_curves` converts them,
once. An operation that nobody measured on a device is absent.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan.errors import SchemaError
from moeplan.profiles.curves import (
    AttentionCurve,
    CollectiveCurve,
    DispatchCurve,
    ExpertCurve,
    GemmCurve,
    GroupedGemmCurve,
    QuantizedGemmCurve,
)
from moeplan.records import from_mapping, load_yaml, parse_yaml, plain, read_text
from moeplan.units import GB, TERA, US

_SHIPPED = Path(__file__).parent / "catalog" / "curves.yaml"


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
