"""Hardware: devices, links and clusters, from the catalog, from shorthand or from a cluster file.

The catalog is YAML in which every number carries its source. A cluster is the usual host of its device with what the
cluster file or shorthand says instead; files speak human units (GiB, Gbit/s, TFLOP/s), which become bytes, seconds and
FLOP here. Rates are raw rates of one direction, peaks are dense: what an operation attains of them a profile says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from moeplan.errors import ClusterError, SchemaError, UnknownNameError, nearest, nearest_hint
from moeplan.records import from_mapping, load_yaml
from moeplan.units import GB, GIB, MIB, TERA, US

PRECISIONS = ("bf16", "fp8", "fp4")
"""Precisions of matrix units that the catalog knows, widest first."""
MAX_GPUS = 10_000_000
"""Larger counts are taken for slips; products of counts and sizes stay within 64-bit integers."""

_CATALOG = Path(__file__).parent / "catalog"
_LINK_KEYS = ("scale_up", "nic", "pcie")


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One link class: what a GPU or a NIC can send over it."""

    name: str
    """Fabric of the catalog, or the rate of a cluster file."""
    bytes_per_s: float
    """Raw rate of one direction, of one GPU (scale-up, PCIe) or of one NIC (scale-out), in bytes/s."""
    latency_s: float = 0.0
    """One small message end to end, in seconds; 0: not given."""

    def __post_init__(self) -> None:
        _above_zero(f"link '{self.name}'", "bytes_per_s", self.bytes_per_s)
        _not_negative(f"link '{self.name}'", "latency_s", self.latency_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU as its vendor specifies it."""

    name: str
    """Name in the catalog."""
    vendor: str
    """Who makes it: "nvidia" or "amd"."""
    memory_bytes: float
    """All device memory that the driver's tool reports; the driver keeps some hundred MiB of it for itself."""
    memory_bytes_per_s: float
    """Peak rate of the device memory, in bytes/s."""
    peak_flop_per_s: Mapping[str, float] = field(hash=False)
    """Dense peak of the matrix units in FLOP/s by precision ("bf16", "fp8", "fp4"); what the device lacks is absent."""
    processors: int
    """Streaming multiprocessors (NVIDIA) or compute units (AMD) that are enabled."""
    capability: str
    """Compute capability ("9.0") or, for AMD, the architecture ("gfx942")."""
    host: Literal["x86", "grace"]
    """Kind of the host's processor; "grace" reaches device memory over NVLink-C2C."""

    def __post_init__(self) -> None:
        where = f"device '{self.name}'"
        for name in ("memory_bytes", "memory_bytes_per_s"):
            _above_zero(where, name, getattr(self, name))
        _count(where, "processors", self.processors)
        for precision, peak in self.peak_flop_per_s.items():
            if precision not in PRECISIONS:
                raise ClusterError(f"{where}: unknown precision '{precision}'", hint=f"known: {', '.join(PRECISIONS)}")
            _above_zero(where, f"{precision} peak", peak)
        if PRECISIONS[0] not in self.peak_flop_per_s:
            raise ClusterError(f"{where}: no {PRECISIONS[0]} peak", hint="every other precision is optional")

    @property
    def capability_number(self) -> float:
        """Compute capability as a number (9.0), 0.0 where the architecture has a name instead (AMD)."""
        return float(self.capability) if self.capability.replace(".", "").isdecimal() else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal hosts of one device, joined by two levels of links."""

    name: str
    """Name in the catalog, shorthand, or the name or file name of a cluster file."""
    device: Device
    """What every GPU of the cluster is."""
    gpus: int
    """GPUs in all: whole nodes, or fewer than one node."""
    gpus_per_node: int
    """GPUs that share a host (an operating system, host memory, NICs)."""
    domain_gpus: int
    """GPUs that reach each other over `scale_up`: a multiple (a rack of trays) or a divisor of `gpus_per_node`."""
    scale_up: Link
    """Link within a domain, rate of one GPU: NVLink, Infinity Fabric, or PCIe where there is nothing faster."""
    scale_out: Link
    """Link between domains, rate of one NIC."""
    nics_per_node: int
    """NICs of a host for traffic between GPUs; its GPUs share them evenly."""
    oversubscription: float = 1.0
    """Factor by which the fabric above the leaf switches is slower than the NICs; 1.0: full bisection."""
    host_memory_bytes: float = 0.0
    """Memory of one host for processors; 0: not given."""
    pcie: Link
    """Link from a GPU to the memory of its host, rate of one GPU: PCIe, or NVLink-C2C where the host is a Grace."""
    price_per_gpu_hour: float = 0.0
    """Price of one GPU for an hour, in any one currency; 0: not given."""
    machine: str = ""
    """A measured machine of the catalog of curves whose own measurements count; empty: those of the device."""

    def __post_init__(self) -> None:
        where = f"cluster '{self.name}'"
        for name in ("gpus", "gpus_per_node", "domain_gpus", "nics_per_node"):
            _count(where, name, value := getattr(self, name))
            if value > MAX_GPUS:
                what = f"{value} GPUs" if name == "gpus" else f"{name} is {value}"
                raise ClusterError(f"{where}: {what}, at most {MAX_GPUS} are handled")
        node, domain = self.gpus_per_node, self.domain_gpus
        if self.gpus > node and self.gpus % node:
            full = self.gpus - self.gpus % node
            raise ClusterError(
                f"{where}: {self.gpus} GPUs do not fill nodes of {node}, {self.gpus % node} are left over",
                hint=f"use {full} or {full + node} GPUs, or set gpus_per_node in a cluster file",
            )
        if max(domain, node) % min(domain, node):
            raise ClusterError(
                f"{where}: a domain of {domain} GPUs and nodes of {node} GPUs do not divide each other",
                hint="nvlink_domain is a multiple or a divisor of gpus_per_node",
            )
        if not 1.0 <= self.oversubscription < math.inf:
            raise ClusterError(
                f"{where}: oversubscription is {self.oversubscription}, at least 1.0 is needed",
                hint="4.0 means a quarter of the NICs' rate above the leaf switches",
            )
        for name in ("host_memory_bytes", "price_per_gpu_hour"):
            _not_negative(where, name, getattr(self, name))

    @property
    def nodes(self) -> int:
        """Hosts, of which a cluster smaller than one node fills one in part."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def scale_out_bytes_per_s_per_gpu(self) -> float:
        """Rate of one GPU between nodes, when all GPUs of its node send, above the leaf switches."""
        return self.scale_out.bytes_per_s * self.nics_per_node / self.gpus_per_node / self.oversubscription

    def resized(self, gpus: int) -> Cluster:
        """The same cluster with another count of GPUs; a name that ends in the count follows it."""
        stem = self.name.removesuffix(f"x{self.gpus}")
        return dataclasses.replace(self, gpus=gpus, name=self.name if stem == self.name else f"{stem}x{gpus}")


def load_device(name: str) -> Device:
    """The device of the catalog with this name or alias; letter case, spaces and underscores do not matter."""
    key, facts = _device_entry(name)
    values = _values(facts)
    return Device(
        name=key,
        vendor=values["vendor"],
        memory_bytes=float(values["memory_mib"] * MIB),
        memory_bytes_per_s=values["memory_gb_per_s"] * float(GB),
        peak_flop_per_s={p: values[f"{p}_tflops"] * TERA for p in PRECISIONS if f"{p}_tflops" in values},
        processors=values["processors"],
        capability=values["capability"],
        host=values["host"],
    )


def load_cluster(ref: str | Path) -> Cluster:
    """The cluster of a shorthand ("h100x256", "mi300xx64"), of the catalog ("eos") or of a YAML file (a path)."""
    text = str(ref)
    if isinstance(ref, Path) or os.sep in text or text.endswith((".yaml", ".yml")):
        return _load_file(Path(ref))
    known = named_cluster(text)
    if known is not None:
        return known
    if os.path.isfile(text):
        return _load_file(Path(text))
    raise _unknown_cluster(text)


def named_cluster(text: str) -> Cluster | None:
    """The cluster of a shorthand or of the catalog; None if it is neither, files are not looked at."""
    shorthand = _shorthand(text)
    if shorthand is not None:
        device, gpus = shorthand
        return _assemble(_ClusterFile(device=device, gpus=gpus), f"{device}x{gpus}", f"cluster '{text}'")
    name = _canonical(text)
    facts = _catalog("clusters")["clusters"].get(name)
    if facts is None:
        return None
    where = f"cluster '{name}' of the catalog"
    return _assemble(from_mapping(_ClusterFile, _values(facts), where), name, where)


def device_names() -> tuple[str, ...]:
    """Names of the devices in the catalog, in its order."""
    return tuple(_catalog("devices")["devices"])


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters in the catalog, in its order."""
    return tuple(_catalog("clusters")["clusters"])


def describe_device(name: str) -> dict[str, Any]:
    """A device of the catalog as plain data in the units of its keys; every number with its source, links resolved."""
    key, facts = _device_entry(name)
    return {"name": key, **_described("devices", facts)}


def describe_cluster(name: str) -> dict[str, Any]:
    """A cluster of the catalog as plain data in the units of its keys; every number with its source, links resolved."""
    facts = _catalog("clusters")["clusters"].get(_canonical(name))
    if facts is None:
        raise UnknownNameError("cluster", name, cluster_names())
    return {"name": _canonical(name), **_described("clusters", facts)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rate:
    """A link in a file: one of the two rates."""

    gb_per_s: float = 0.0
    gbit_per_s: float = 0.0
    latency_us: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClusterFile:
    """The keys of a cluster file. What is left out is as in the usual host of the device."""

    device: str
    """Name or alias of a device in the catalog."""
    gpus: int
    """GPUs in all."""
    name: str = ""
    """Name of the cluster; empty: that of the file."""
    gpus_per_node: int | None = None
    """GPUs of a host. NICs and host memory follow it in proportion, and so does a domain of one host."""
    nvlink_domain: int | None = None
    """GPUs that reach each other over `scale_up`."""
    scale_up: Any = None
    """A fabric of the catalog or a rate ({gb_per_s: 450}) of one GPU, one direction; likewise `nic` and `pcie`."""
    nic: Any = None
    """A fabric or a rate ({gbit_per_s: 400, latency_us: 4}) of one NIC."""
    nics_per_node: int | None = None
    """NICs of a host."""
    oversubscription: float = 1.0
    """See `Cluster.oversubscription`."""
    host_memory_gib: float | None = None
    """Memory of a host, in GiB."""
    pcie: Any = None
    """A fabric or a rate of one GPU to its host's memory."""
    price_per_gpu_hour: float = 0.0
    """See `Cluster.price_per_gpu_hour`."""
    note: str = ""
    """For readers; nothing is computed from it."""


def _load_file(path: Path) -> Cluster:
    where = f"cluster file '{path}'"
    return _assemble(from_mapping(_ClusterFile, load_yaml(path, "cluster file"), where), path.stem, where)


def _assemble(spec: _ClusterFile, name: str, where: str) -> Cluster:
    """The cluster of a file: its own keys over those of the device's usual host."""
    if _canonical(spec.device) not in _device_aliases():
        hint = nearest_hint(spec.device, device_names())
        raise SchemaError(f"{where}, key 'device': unknown device '{spec.device}'", hint=hint)
    device = load_device(spec.device)
    usual = _values(_device_entry(device.name)[1])
    usual_node: int = usual["gpus_per_node"]
    node = usual_node if spec.gpus_per_node is None else spec.gpus_per_node
    domain: int = node if usual["nvlink_domain"] == usual_node else usual["nvlink_domain"]
    nics = max(1, usual["nics_per_node"] * node // usual_node)
    memory_gib = usual.get("host_memory_gib", 0.0) * node / usual_node
    links = {
        key: _link(usual[key] if given is None else given, f"{where}, key '{key}'")
        for key in _LINK_KEYS
        for given in [getattr(spec, key)]
    }
    return Cluster(
        name=spec.name or name,
        device=device,
        gpus=spec.gpus,
        gpus_per_node=node,
        domain_gpus=domain if spec.nvlink_domain is None else spec.nvlink_domain,
        scale_up=links["scale_up"],
        scale_out=links["nic"],
        nics_per_node=nics if spec.nics_per_node is None else spec.nics_per_node,
        oversubscription=spec.oversubscription,
        host_memory_bytes=(memory_gib if spec.host_memory_gib is None else spec.host_memory_gib) * float(GIB),
        pcie=links["pcie"],
        price_per_gpu_hour=spec.price_per_gpu_hour,
    )


def _link(spec: Any, where: str) -> Link:
    fabrics = _catalog("fabrics")["fabrics"]
    if isinstance(spec, str):
        name = _canonical(spec)
        if name not in fabrics:
            raise SchemaError(f"{where}: unknown fabric '{spec}'", hint=nearest_hint(spec, fabrics))
        rate = from_mapping(_Rate, _values(fabrics[name]), f"fabric '{name}' of the catalog")
    elif isinstance(spec, Mapping):
        rate = from_mapping(_Rate, spec, where)
        name = f"{rate.gbit_per_s:g} Gbit/s" if rate.gbit_per_s else f"{rate.gb_per_s:g} GB/s"
    else:
        raise SchemaError(f"{where}: {spec!r} has no unit", hint="name a fabric, or write {gbit_per_s: 400}")
    if rate.gb_per_s and rate.gbit_per_s:
        raise SchemaError(f"{where}: both {rate.gb_per_s:g} GB/s and {rate.gbit_per_s:g} Gbit/s", hint="give one")
    try:
        return Link(name=name, bytes_per_s=(rate.gb_per_s + rate.gbit_per_s / 8) * GB, latency_s=rate.latency_us * US)
    except ClusterError as error:
        raise ClusterError(f"{where}: {error.message}", hint="write {gbit_per_s: 400} or {gb_per_s: 50}") from None


def _shorthand(text: str) -> tuple[str, int] | None:
    """Device and count of `<device>x<count>`; None where no known device is followed by an "x"."""
    compact = _canonical(text)
    known = _device_aliases()
    if compact in known:
        raise ClusterError(f"cluster '{text}': a device without a count of GPUs", hint=f"write it like {text}x64")
    alias = max((a for a in known if compact.startswith(a + "x")), key=len, default=None)
    if alias is None:
        return None
    count = compact[len(alias) + 1 :]
    if not count:
        raise ClusterError(f"cluster '{text}': no count of GPUs after the x", hint=f"write it like {alias}x64")
    if re.fullmatch(r"[+-]?[0-9]{1,18}", count) is None:
        raise ClusterError(f"cluster '{text}': '{count}' is not a count of GPUs", hint=f"write it like {alias}x64")
    return known[alias], int(count)


def _unknown_cluster(text: str) -> UnknownNameError:
    match = re.fullmatch(r"(.+)x[+-]?[0-9.]+", text.strip(), flags=re.IGNORECASE)
    if match is not None:
        return UnknownNameError("device", match[1], device_names())
    names = " or ".join(f"'{n}'" for n in nearest(text, cluster_names())) or "one of `moeplan catalog clusters`"
    ways = "<device>x<count> like h100x256, or the path of a YAML file"
    return UnknownNameError("cluster", text, (), hint=f"name {names}, write {ways}")


@functools.cache
def _catalog(kind: str) -> dict[str, Any]:
    data: dict[str, Any] = load_yaml(_CATALOG / f"{kind}.yaml", "catalog file")
    return data


@functools.cache
def _device_aliases() -> dict[str, str]:
    """Every lower-case name and alias to the name of its device."""
    devices = _catalog("devices")["devices"]
    return {_canonical(a): name for name, facts in devices.items() for a in (name, *facts["aliases"])}


def _device_entry(name: str) -> tuple[str, dict[str, Any]]:
    key = _device_aliases().get(_canonical(name))
    if key is None:
        raise UnknownNameError("device", name, device_names())
    return key, _catalog("devices")["devices"][key]


def _canonical(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _sourced(key: str, fact: Any) -> bool:
    """Whether a fact is [value, source]; names and notes stand alone."""
    return isinstance(fact, list) and key != "aliases"


def _values(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fact[0] if _sourced(key, fact) else fact for key, fact in entry.items()}


def _described(kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    sources = _catalog(kind)["sources"]
    out: dict[str, Any] = {}
    for key, fact in entry.items():
        out[key] = {"value": fact[0], "source": sources[fact[1]]} if _sourced(key, fact) else fact
        if key in _LINK_KEYS:
            out[key]["fabric"] = _described("fabrics", _catalog("fabrics")["fabrics"][fact[0]])
    return out


def _above_zero(where: str, what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ClusterError(f"{where}: {what} is {value:g}, a number above 0 is needed")


def _not_negative(where: str, what: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ClusterError(f"{where}: {what} is {value:g}, 0 or more is needed")


def _count(where: str, what: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ClusterError(f"{where}: {what} is {value}, a whole number of at least 1 is needed")
