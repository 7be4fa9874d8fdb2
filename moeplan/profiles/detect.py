"""Which cluster an environment is: a device of the catalog by the name its driver gives, else one that only measurements know.

The catalog holds driver names as aliases of its devices; the cluster then is the usual host of the device with as many GPUs as
ranks. What the user says it is must agree. A device that the catalog lacks (a CPU, a GPU that nobody entered) becomes a
cluster of that name whose peaks and links are the best rates measured, so that plans for it can be priced.
"""

from __future__ import annotations

from dataclasses import replace

from moeplan.errors import ClusterError, UnknownNameError
from moeplan.profiles.fitting import Fitted
from moeplan.profiles.hardware import Cluster, Device, Link, load_cluster, load_device
from moeplan.profiles.samples import Environment
from moeplan.profiles.scaling import PEAKS

OTHER_MEMORY = 0.1
"""Share by which the memory of a device may differ from the catalog's; beyond that the one found counts."""
UNMEASURED = Link(name="not measured", bytes_per_s=1.0)
_VENDORS = {"cuda": "nvidia", "rocm": "amd"}


def detected_cluster(environment: Environment) -> Cluster:
    """The cluster that was found, or the one that the user named if it agrees with what was found.

    Of a device that the catalog lacks the rates are not known yet: `with_measured_rates` fills them in.
    """
    device = known_device(environment)
    if environment.cluster:
        return _agreed(load_cluster(environment.cluster), device, environment)
    if device is None:
        return _unknown(environment)
    usual = load_cluster(f"{device.name}x1")
    node, per_node = usual.gpus_per_node, environment.per_node
    if per_node > node or per_node < min(environment.ranks, node):
        # other hosts than usual: NICs and host memory in proportion, and a domain of one host stays one
        usual = replace(
            usual,
            gpus_per_node=per_node,
            domain_gpus=per_node if usual.domain_gpus == node else usual.domain_gpus,
            nics_per_node=max(1, usual.nics_per_node * per_node // node),
            host_memory_bytes=usual.host_memory_bytes * per_node / node,
        )
    if usual.domain_gpus % usual.gpus_per_node and usual.gpus_per_node % usual.domain_gpus:
        usual = replace(usual, domain_gpus=usual.gpus_per_node)
    return replace(usual, name=f"{device.name}x{environment.ranks}", gpus=environment.ranks, device=device)


def known_device(environment: Environment) -> Device | None:
    """The device of the catalog with the name that the driver gives; None if there is none."""
    try:
        device = load_device(environment.device)
    except UnknownNameError:
        return None
    if abs(environment.memory_bytes / device.memory_bytes - 1.0) > OTHER_MEMORY:
        return replace(device, memory_bytes=environment.memory_bytes)
    return device


def in_catalog(cluster: Cluster) -> bool:
    """Whether the device of a cluster is one of the catalog."""
    try:
        return load_device(cluster.device.name).name == cluster.device.name
    except UnknownNameError:
        return False


def with_measured_rates(cluster: Cluster, fitted: Fitted) -> Cluster:
    """The cluster of a device that the catalog lacks with the rates that were measured on it."""
    gemm, law = fitted.gemms["bf16"], fitted.law
    peaks = {peak: fitted.gemms[p].flop_per_s for p, (peak, _) in reversed(PEAKS.items()) if p in fitted.gemms}
    memory = fitted.streams["copy"].bytes_per_s if "copy" in fitted.streams else gemm.bytes_per_s
    up = law.send_bytes_per_s or next((r for r in _slopes(fitted)), memory / 2.0)
    out = law.ring_bytes_per_s or law.all_to_all_bytes_per_s or up
    copies = fitted.host_copies.get("host_to_device", memory / 2.0)
    return replace(
        cluster,
        device=replace(cluster.device, memory_bytes_per_s=memory, peak_flop_per_s=peaks),
        scale_up=Link(name="as measured", bytes_per_s=up),
        scale_out=Link(name="as measured", bytes_per_s=out, latency_s=law.hop_s or 0.0),
        pcie=Link(name="as measured", bytes_per_s=copies),
    )


def _slopes(fitted: Fitted) -> list[float]:
    """Rates of the largest messages of all-gathers inside a domain, those of the largest group first."""
    curves = fitted.collectives.get("all_gather", {})
    steps = [(n, c.sizes_bytes[-1] - c.sizes_bytes[-2], c.times_s[-1] - c.times_s[-2]) for n, c in sorted(curves.items())]
    return [size * (n - 1) / n / seconds for n, size, seconds in reversed(steps) if seconds > 0]


def _unknown(environment: Environment) -> Cluster:
    device = Device(
        name=environment.device,
        vendor=_VENDORS.get(environment.backend, "other"),
        memory_bytes=environment.memory_bytes,
        memory_bytes_per_s=UNMEASURED.bytes_per_s,
        peak_flop_per_s={"bf16": 1.0},
        processors=environment.processors,
        capability=environment.capability,
        host="grace" if environment.host == "grace" else "x86",
    )
    return Cluster(
        name=f"{environment.device} x{environment.ranks}",
        device=device,
        gpus=environment.ranks,
        gpus_per_node=environment.per_node,
        domain_gpus=environment.per_node,
        scale_up=UNMEASURED,
        scale_out=UNMEASURED,
        nics_per_node=environment.per_node,
        host_memory_bytes=environment.host_memory_bytes,
        pcie=UNMEASURED,
    )


def _agreed(cluster: Cluster, device: Device | None, environment: Environment) -> Cluster:
    """The cluster that the user named; `ClusterError` where it cannot be the one that was found."""
    found = device.name if device is not None else f"'{environment.device}', which the catalog lacks"
    where = f"cluster '{environment.cluster}'"
    if device is None or device.name != cluster.device.name:
        raise ClusterError(
            f"{where} has devices {cluster.device.name}, this machine has {found}",
            hint="leave --cluster out to take what is found",
        )
    ranks, per_node = environment.ranks, environment.per_node
    nodes = -(-ranks // per_node)
    if ranks > cluster.gpus:
        raise ClusterError(f"{where} has {cluster.gpus} GPUs, here are {ranks} ranks", hint="name the whole cluster")
    if per_node > cluster.gpus_per_node or (nodes > 1 and per_node != cluster.gpus_per_node):
        raise ClusterError(
            f"{where} has {cluster.gpus_per_node} GPUs a node, here are {per_node} ranks a node",
            hint="start one rank for each GPU, or say gpus_per_node in a cluster file",
        )
    return cluster
