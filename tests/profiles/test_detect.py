"""Environment to cluster: driver names, hosts of other sizes, what the user says against what is there, unknown devices."""

from __future__ import annotations

from typing import Any

import pytest

from moeplan.errors import ClusterError
from moeplan.profiles.detect import detected_cluster, in_catalog, with_measured_rates
from moeplan.profiles.fitting import fit
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.samples import Environment
from tests.profiles.synthetic import environment_of, samples_of

GIB = 2.0**30
SEEN_MEMORY = {
    # as torch.cuda.get_device_properties gives them
    "NVIDIA H100 80GB HBM3": ("H100", 79.1),
    "NVIDIA H100 PCIe": ("H100-PCIe", 79.1),
    "NVIDIA H200": ("H200", 139.8),
    "NVIDIA H20": ("H20", 95.1),
    "NVIDIA H800": ("H800", 79.1),
    "NVIDIA A100-SXM4-80GB": ("A100", 79.1),
    "NVIDIA A100 80GB PCIe": ("A100-PCIe", 79.1),
    "NVIDIA A100-SXM4-40GB": ("A100-40GB", 39.4),
    "NVIDIA GH200 480GB": ("GH200", 94.5),
    "NVIDIA B200": ("B200", 178.4),
    "NVIDIA GB200": ("GB200", 184.0),
    "NVIDIA L40S": ("L40S", 44.4),
    "AMD Instinct MI300X": ("MI300X", 191.7),
}


def environment(device: str, **changes: Any) -> Environment:
    values: dict[str, Any] = {
        "moeplan": "0", "torch": "2.13.0", "backend": "cuda", "communication": "nccl 2.29.2", "device": device,
        "memory_bytes": SEEN_MEMORY[device][1] * GIB if device in SEEN_MEMORY else 80e9, "processors": 132,
    }  # fmt: skip
    return Environment(**values | changes)


CPU: dict[str, Any] = {
    "device": "AMD EPYC 7B13",
    "backend": "cpu",
    "communication": "gloo",
    "memory_bytes": 8e9,
    "processors": 1,
}


@pytest.mark.parametrize("driver", SEEN_MEMORY)
def test_drivers_names_are_those_of_the_catalog(driver: str) -> None:
    found = detected_cluster(environment(driver))
    device = SEEN_MEMORY[driver][0]
    assert found == load_cluster(f"{device}x1") and in_catalog(found)


@pytest.mark.parametrize(
    ("driver", "ranks", "per_node", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 8, "H100x8"),
        ("NVIDIA H100 80GB HBM3", 4, 4, "H100x4"),  # part of a node
        ("NVIDIA H100 80GB HBM3", 32, 8, "H100x32"),
        ("NVIDIA GB200", 72, 4, "GB200x72"),
        ("NVIDIA GH200 480GB", 4, 1, "GH200x4"),
    ],
)
def test_usual_hosts_are_found_whole(driver: str, ranks: int, per_node: int, expected: str) -> None:
    assert detected_cluster(environment(driver, ranks=ranks, per_node=per_node)) == load_cluster(expected)


def test_hosts_of_another_size_keep_their_links() -> None:
    usual = load_cluster("H100x8")
    found = detected_cluster(environment("NVIDIA H100 80GB HBM3", ranks=8, per_node=4))
    assert (found.gpus, found.gpus_per_node, found.domain_gpus, found.nics_per_node, found.nodes) == (8, 4, 4, 4, 2)
    assert found.host_memory_bytes == usual.host_memory_bytes / 2
    assert found.scale_out_bytes_per_s_per_gpu == usual.scale_out_bytes_per_s_per_gpu
    assert (found.scale_up, found.scale_out) == (usual.scale_up, usual.scale_out)
    sixteen = detected_cluster(environment("NVIDIA H100 80GB HBM3", ranks=16, per_node=16))
    assert (sixteen.gpus_per_node, sixteen.domain_gpus, sixteen.nics_per_node, sixteen.nodes) == (16, 16, 16, 1)
    rack = detected_cluster(environment("NVIDIA GB200", ranks=8, per_node=2))
    assert (rack.gpus_per_node, rack.domain_gpus) == (2, 72)


def test_a_part_of_the_same_name_with_other_memory_keeps_what_it_has() -> None:
    found = detected_cluster(environment("NVIDIA H20", memory_bytes=139.8 * GIB))
    assert found.device.name == "H20" and found.device.memory_bytes == 139.8 * GIB
    assert in_catalog(found) and nominal(found).gemms


# ---------------------------------------------------------------- what the user says


def test_the_named_cluster_is_taken_if_it_agrees() -> None:
    whole = environment("NVIDIA H100 80GB HBM3", ranks=16, per_node=8, cluster="h100x256")
    assert detected_cluster(whole) == load_cluster("h100x256")  # a part of it was measured
    part = environment("NVIDIA H100 80GB HBM3", ranks=2, per_node=2, cluster="h100x8")
    assert detected_cluster(part) == load_cluster("h100x8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "h200x8"}, "cluster 'h200x8' has devices H200, this machine has H100"),
        ({"cluster": "h100x4", "ranks": 8, "per_node": 8}, "cluster 'h100x4' has 4 GPUs, here are 8 ranks"),
        ({"cluster": "h100x16", "ranks": 8, "per_node": 4}, "has 8 GPUs a node, here are 4 ranks a node"),
        ({"cluster": "gh200x8", **CPU}, "this machine has 'AMD EPYC 7B13', which the catalog lacks"),
    ],
)
def test_a_cluster_that_this_is_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        detected_cluster(environment("NVIDIA H100 80GB HBM3", **{k: v for k, v in changes.items() if k != "device"})
                         if "device" not in changes else Environment(moeplan="0", torch="2", **changes))  # fmt: skip
    assert caught.value.hint


# ---------------------------------------------------------------- devices that the catalog lacks


def test_an_unknown_device_has_the_rates_that_were_measured() -> None:
    truth = nominal(load_cluster("h100x16"))
    bare = detected_cluster(Environment(moeplan="0", torch="2", **CPU, ranks=16, per_node=8))
    assert not in_catalog(bare) and bare.device.vendor == "other"
    assert (bare.gpus, bare.gpus_per_node, bare.domain_gpus, bare.nodes) == (16, 8, 8, 2)
    found = with_measured_rates(bare, fit(samples_of(truth)))
    assert found.device.peak_flop_per_s["bf16"] == pytest.approx(truth.gemms["bf16"].flop_per_s, rel=0.02)
    assert found.device.peak_flop_per_s["fp8"] == pytest.approx(truth.gemms["fp8"].flop_per_s, rel=0.05)
    assert found.device.memory_bytes_per_s == pytest.approx(truth.stream_bytes_per_s, rel=0.01)
    assert found.scale_up.bytes_per_s == pytest.approx(truth.scale_up_bytes_per_s, rel=0.01)
    assert found.scale_out_bytes_per_s_per_gpu == pytest.approx(truth.scale_out_bytes_per_s, rel=0.02)
    assert found.scale_out.latency_s == pytest.approx(truth.scale_out_latency_s, rel=0.05)


def test_without_sends_a_link_is_as_fast_as_the_largest_gather() -> None:
    truth = nominal(load_cluster("h100x8"))
    bare = detected_cluster(Environment(moeplan="0", torch="2", **CPU, ranks=8, per_node=8))
    found = with_measured_rates(bare, fit([s for s in samples_of(truth) if s.op != "send"]))
    curve = truth.collectives["all_gather"][8]
    slope = (curve.sizes_bytes[-1] - curve.sizes_bytes[-2]) / (curve.times_s[-1] - curve.times_s[-2])
    assert found.scale_up.bytes_per_s == pytest.approx(slope * 7 / 8)
    assert found.scale_out.bytes_per_s == found.scale_up.bytes_per_s  # one domain: nothing tells of more


def test_a_single_process_copies() -> None:
    bare = detected_cluster(environment_of(nominal(load_cluster("h100x1")), **CPU))
    found = with_measured_rates(bare, fit([s for s in samples_of(nominal(load_cluster("h100x1"))) if not s.group]))
    assert found.scale_up.bytes_per_s == pytest.approx(found.device.memory_bytes_per_s / 2)
