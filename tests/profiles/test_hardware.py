"""Hardware: every number has a source, units convert once, every way to name a cluster works, errors explain."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan import records
from moeplan.errors import ClusterError, FileError, MoeplanError, SchemaError, UnknownNameError
from moeplan.profiles import hardware
from moeplan.profiles.hardware import (
    Cluster,
    Device,
    Link,
    cluster_names,
    describe_cluster,
    describe_device,
    device_names,
    load_cluster,
    load_device,
)
from moeplan.units import GIB, MIB

CATALOG = Path(hardware.__file__).parent / "catalog"
KINDS = ("devices", "fabrics", "clusters")
UNSOURCED = {"aliases", "vendor", "host", "note"}
"""Keys of the catalog that hold names and remarks, not facts."""
PUBLISHED = (
    "H100 GB200 B200 A100 GB300 B300 A100-PCIe A800 H200 MI300X MI350X MI325X H20 H800".split()  # names in run tables
)
DRIVER_NAMES = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA A100 80GB PCIe": "A100-PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA L40S": "L40S",
    "AMD Instinct MI300X": "MI300X",
}
"""What torch.cuda.get_device_name prints, to names of the catalog."""


def catalog(kind: str) -> dict[str, Any]:
    """The catalog file as it is on disk."""
    data: dict[str, Any] = yaml.safe_load((CATALOG / f"{kind}.yaml").read_text(encoding="utf-8"))
    return data


def written(tmp_path: Path, **keys: Any) -> Path:
    """A cluster file with these keys."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_fact_has_a_source_and_every_source_a_fact(kind: str) -> None:
    data = catalog(kind)
    assert set(data) == {"sources", kind}
    used = set()
    for name, entry in data[kind].items():
        for key in set(entry) - UNSOURCED:
            fact = entry[key]
            assert isinstance(fact, list) and len(fact) == 2, f"{name}.{key}: {fact}"
            assert fact[1] in data["sources"], f"{name}.{key}: no source '{fact[1]}'"
            used.add(fact[1])
        for key in UNSOURCED & set(entry):
            assert not isinstance(entry[key], (int, float)), f"{name}.{key}: a number without a source"
    assert used == set(data["sources"])
    assert all(len(text) > 15 for text in data["sources"].values())


def test_names_and_aliases_are_lower_case_and_mean_one_device() -> None:
    seen: dict[str, str] = {}
    for name, entry in catalog("devices")["devices"].items():
        assert all(alias == alias.lower() for alias in entry["aliases"])
        for alias in {name.lower(), *entry["aliases"]}:
            assert seen.setdefault(alias, name) == name, f"{alias} means {seen[alias]} and {name}"


@pytest.mark.parametrize("name", device_names())
def test_every_device_loads_and_makes_a_node(name: str) -> None:
    device = load_device(name)
    assert device.name == name and device.peak_flop_per_s["bf16"] > 1e14
    assert 30 * GIB < device.memory_bytes < 300 * GIB and 0.5e12 < device.memory_bytes_per_s < 10e12
    assert list(device.peak_flop_per_s.values()) == sorted(device.peak_flop_per_s.values())
    usual = catalog("devices")["devices"][name]["gpus_per_node"][0]
    cluster = load_cluster(f"{name}x{2 * usual}")
    assert (cluster.name, cluster.nodes, cluster.device) == (f"{name}x{2 * usual}", 2, device)
    assert load_cluster(cluster.name) == cluster
    assert cluster.scale_out_bytes_per_s_per_gpu <= cluster.scale_up.bytes_per_s


@pytest.mark.parametrize("name", cluster_names())
def test_every_named_cluster_loads(name: str) -> None:
    cluster = load_cluster(name.upper())
    assert cluster.name == name and cluster.nodes * cluster.gpus_per_node == cluster.gpus
    assert cluster.gpus == describe_cluster(name)["gpus"]["value"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_devices_of_published_runs_are_known(name: str) -> None:
    assert load_device(name).name == name


@pytest.mark.parametrize(("driver_name", "name"), DRIVER_NAMES.items())
def test_names_that_drivers_print_are_known(driver_name: str, name: str) -> None:
    assert load_device(driver_name).name == name


def test_devices_stand_in_the_known_order() -> None:
    peak = {n: load_device(n).peak_flop_per_s for n in device_names()}
    for slow, fast in (("A100", "H100"), ("H20", "H100"), ("H100-PCIe", "H100"), ("H100", "B200"), ("B200", "GB200")):
        assert peak[slow]["bf16"] < peak[fast]["bf16"], f"{slow} < {fast}"
    assert peak["H100"] == peak["H200"] == peak["H800"] == peak["GH200"]
    assert peak["MI300X"] == peak["MI325X"] and peak["MI350X"]["fp8"] < peak["MI355X"]["fp8"]
    assert peak["B200"]["fp4"] < peak["B300"]["fp4"] and peak["GB200"]["fp4"] < peak["GB300"]["fp4"]
    assert {n for n in peak if "fp8" not in peak[n]} == {"A100", "A100-40GB", "A100-PCIe", "A800"}
    assert {n for n in peak if "fp4" in peak[n]} == {"B200", "B300", "GB200", "GB300", "MI350X", "MI355X"}
    memory = [load_device(n).memory_bytes for n in ("A100-40GB", "H100", "H20", "H200", "B200", "GB200", "B300", "GB300")]
    assert memory == sorted(memory)
    scale_up = [load_cluster(f"{n}x8").scale_up.bytes_per_s for n in ("a100-pcie", "a800", "a100", "h100", "b200")]
    assert scale_up == sorted(scale_up)
    assert load_cluster("h800x8").scale_up.bytes_per_s < load_cluster("h20x8").scale_up.bytes_per_s


def test_fp8_peak_is_about_twice_bf16() -> None:
    for name in device_names():
        peak = load_device(name).peak_flop_per_s
        if "fp8" in peak:
            assert peak["fp8"] / peak["bf16"] == pytest.approx(2, rel=0.02), name


def test_units_of_a_device_and_its_cluster() -> None:
    cluster = load_cluster("h100x256")
    assert cluster.device == Device(
        name="H100",
        vendor="nvidia",
        memory_bytes=81559.0 * 2**20,
        memory_bytes_per_s=3.35e12,
        peak_flop_per_s={"bf16": 989.4e12, "fp8": 1978.9e12},
        processors=132,
        capability="9.0",
        host="x86",
    )
    assert (cluster.gpus, cluster.nodes, cluster.gpus_per_node, cluster.domain_gpus) == (256, 32, 8, 8)
    assert cluster.scale_up.bytes_per_s == 450e9 and cluster.scale_up.latency_s == pytest.approx(3.33e-6)
    assert cluster.scale_out.bytes_per_s == cluster.scale_out_bytes_per_s_per_gpu == 50e9
    assert cluster.host_memory_bytes == 2 * 2**40 and cluster.pcie.bytes_per_s == 63e9
    assert cluster.price_per_gpu_hour == 0.0 and cluster.oversubscription == 1.0
    assert [load_device(n).capability_number for n in ("a100", "b300", "mi300x")] == [8.0, 10.3, 0.0]


def test_a_rack_is_a_domain_of_many_hosts() -> None:
    cluster = load_cluster("gb200x144")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.domain_gpus) == (36, 4, 72)
    assert cluster.device.host == "grace" and cluster.pcie.bytes_per_s > load_cluster("b200x8").pcie.bytes_per_s
    assert cluster.scale_out_bytes_per_s_per_gpu == 50e9


def test_nics_are_shared_and_oversubscribed() -> None:
    cluster = load_cluster("h100x16")
    assert dataclasses.replace(cluster, nics_per_node=4).scale_out_bytes_per_s_per_gpu == 25e9
    assert dataclasses.replace(cluster, oversubscription=2.0).scale_out_bytes_per_s_per_gpu == 25e9
    assert load_cluster("aws-p5").scale_out_bytes_per_s_per_gpu == 50e9  # 32 cards of 100 Gbit/s for 8 GPUs
    assert load_cluster("mosaicml-a100-roce").scale_out_bytes_per_s_per_gpu * 8 == 200e9  # 1,600 Gbit/s a node


@pytest.mark.parametrize(
    ("text", "name", "gpus"),
    [
        ("h100x256", "H100x256", 256),
        ("H100X256", "H100x256", 256),
        ("gb200x72", "GB200x72", 72),
        ("a100x8", "A100x8", 8),
        ("a100-pciex8", "A100-PCIex8", 8),
        ("A100_SXM_40GBx16", "A100-40GBx16", 16),
        ("mi300xx64", "MI300Xx64", 64),
        ("mi300x64", "MI300Xx64", 64),
        ("MI355Xx8", "MI355Xx8", 8),
        ("h100-sxmx8", "H100x8", 8),
        ("h200x4", "H200x4", 4),
        ("h100x1", "H100x1", 1),
        ("gh200x5", "GH200x5", 5),
        ("b200x100000", "B200x100000", 100_000),
    ],
)
def test_shorthand(text: str, name: str, gpus: int) -> None:
    cluster = load_cluster(text)
    assert (cluster.name, cluster.gpus) == (name, gpus)


@pytest.mark.parametrize("name", ["h100", "H100", "h100-sxm", "H100 SXM", "h100_80gb", " h100 "])
def test_aliases(name: str) -> None:
    assert load_device(name).name == "H100"


def test_part_of_a_node_keeps_the_node() -> None:
    cluster = load_cluster("h100x4")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.scale_out_bytes_per_s_per_gpu) == (1, 8, 50e9)


def test_resized() -> None:
    cluster = load_cluster("h100x256")
    assert cluster.resized(1024) == load_cluster("h100x1024")
    eos = load_cluster("eos")
    assert eos.resized(512) == dataclasses.replace(eos, gpus=512)
    with pytest.raises(ClusterError, match=r"H100x12.*12 GPUs.*nodes of 8.*8 or 16"):
        cluster.resized(12)


def test_a_file_says_everything(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        name="ours",
        device="h100-sxm",
        gpus=64,
        gpus_per_node=4,
        nvlink_domain=4,
        scale_up={"gb_per_s": 200},
        nic={"gbit_per_s": 200, "latency_us": 4},
        nics_per_node=2,
        oversubscription=2,
        host_memory_gib=512,
        pcie="pcie4",
        price_per_gpu_hour=2.5,
        note="on loan",
    )
    assert (
        load_cluster(path)
        == load_cluster(str(path))
        == Cluster(
            name="ours",
            device=load_device("H100"),
            gpus=64,
            gpus_per_node=4,
            domain_gpus=4,
            scale_up=Link(name="200 GB/s", bytes_per_s=200e9),
            scale_out=Link(name="200 Gbit/s", bytes_per_s=25e9, latency_s=4e-6),
            nics_per_node=2,
            oversubscription=2.0,
            host_memory_bytes=512.0 * GIB,
            pcie=Link(name="pcie4", bytes_per_s=31.5e9),
            price_per_gpu_hour=2.5,
        )
    )


def test_a_file_leaves_out_what_is_usual(tmp_path: Path) -> None:
    path = written(tmp_path, device="H200", gpus=32)
    assert load_cluster(path) == dataclasses.replace(load_cluster("h200x32"), name="mine")


def test_nics_memory_and_domain_follow_smaller_hosts(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, device="h100", gpus=4, gpus_per_node=4))
    assert (cluster.nics_per_node, cluster.domain_gpus, cluster.host_memory_bytes) == (4, 4, 2.0**40)
    cluster = load_cluster(written(tmp_path, device="gb200", gpus=144, gpus_per_node=72))
    assert (cluster.nodes, cluster.domain_gpus, cluster.scale_out_bytes_per_s_per_gpu) == (2, 72, 50e9)


@pytest.mark.parametrize("ref", ["h100x256", "gb200x72", "mi300xx64", "eos", "alps"])
def test_records_round_trip(ref: str, tmp_path: Path) -> None:
    cluster = load_cluster(ref)
    text = records.dump_yaml(records.to_mapping(cluster))
    assert records.from_mapping(Cluster, records.parse_yaml(text, "test"), "test") == cluster


def test_a_file_without_a_suffix_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, device="H100", gpus=8).rename(tmp_path / "ours")
    assert load_cluster("ours").name == "ours"


@pytest.mark.parametrize(
    ("ref", "error", "parts"),
    [
        ("h100x0", ClusterError, ["H100x0", "0", "at least 1"]),
        ("h100x-8", ClusterError, ["H100x-8", "-8", "at least 1"]),
        ("h100x2.5", ClusterError, ["h100x2.5", "2.5", "h100x64"]),
        ("h100x1e3", ClusterError, ["h100x1e3", "1e3", "count"]),
        ("h100xx8", ClusterError, ["h100xx8", "x8", "count"]),
        ("h100x", ClusterError, ["h100x", "no count"]),
        ("mi300xx", ClusterError, ["mi300xx", "no count", "mi300xx64"]),
        ("h100", ClusterError, ["h100", "without a count"]),
        ("h100x12", ClusterError, ["H100x12", "12", "8", "16"]),
        ("gb200x6", ClusterError, ["GB200x6", "6", "4"]),
        ("h100x99999999", ClusterError, ["99999999", "10000000"]),
        ("h100x" + "9" * 5000, ClusterError, ["not a count"]),
        ("h10x8", UnknownNameError, ["device 'h10'", "H100"]),
        ("b20x-8", UnknownNameError, ["device 'b20'", "B200"]),
        ("eoss", UnknownNameError, ["cluster 'eoss'", "'eos'", "h100x256"]),
        ("", UnknownNameError, ["cluster ''", "h100x256"]),
        ("h100\0x8", UnknownNameError, ["device", "H100"]),
        ("missing.yaml", FileError, ["missing.yaml", "does not exist"]),
        ("no/such/cluster", FileError, ["no/such/cluster", "does not exist"]),
        ("/", FileError, ["directory"]),
    ],
)
def test_bad_references(ref: str, error: type[MoeplanError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        load_cluster(ref)
    assert type(caught.value) is error
    assert [p for p in parts if p not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("keys", "error", "parts"),
    [
        ({"gpus": 0}, ClusterError, ["cluster 'mine'", "gpus", "0", "at least 1"]),
        ({"gpus": 12}, ClusterError, ["12 GPUs", "nodes of 8"]),
        ({"gpus": 8.5}, SchemaError, ["mine.yaml", "'gpus'", "8.5"]),
        ({"gpus": True}, SchemaError, ["'gpus'", "True"]),
        ({"gpus": None}, SchemaError, ["'gpus'", "nothing"]),
        ({"gpu_per_node": 8}, SchemaError, ["'gpu_per_node'", "'gpus_per_node'"]),
        ({"device": "h1000"}, SchemaError, ["'device'", "h1000", "H100"]),
        ({"device": 100}, SchemaError, ["'device'", "100"]),
        ({"gpus_per_node": 0}, ClusterError, ["gpus_per_node", "0"]),
        ({"gpus_per_node": -4}, ClusterError, ["gpus_per_node", "-4"]),
        ({"nvlink_domain": 3}, ClusterError, ["domain of 3", "nodes of 8"]),
        ({"nics_per_node": 0}, ClusterError, ["nics_per_node", "0"]),
        ({"nic": "ib-ndr401"}, SchemaError, ["'nic'", "ib-ndr401", "ib-ndr400"]),
        ({"nic": 400}, SchemaError, ["'nic'", "400", "gbit_per_s"]),
        ({"nic": {}}, ClusterError, ["'nic'", "above 0"]),
        ({"nic": {"gbit_per_s": -1}}, ClusterError, ["'nic'", "-1 Gbit/s", "above 0"]),
        ({"nic": {"gbit_per_s": 400, "gb_per_s": 50}}, SchemaError, ["'nic'", "400", "50"]),
        ({"nic": {"gbits": 400}}, SchemaError, ["'nic'", "'gbits'", "gbit_per_s"]),
        ({"nic": {"gbit_per_s": 400, "latency_us": -1}}, ClusterError, ["'nic'", "latency", "0 or more"]),
        ({"oversubscription": 0.5}, ClusterError, ["oversubscription", "0.5", "1.0"]),
        ({"oversubscription": float("nan")}, ClusterError, ["oversubscription", "nan"]),
        ({"host_memory_gib": -1}, ClusterError, ["host_memory_bytes", "0 or more"]),
        ({"price_per_gpu_hour": float("inf")}, ClusterError, ["price_per_gpu_hour", "inf"]),
        ({"price_per_gpu_hour": "cheap"}, SchemaError, ["'price_per_gpu_hour'", "cheap"]),
    ],
)
def test_bad_cluster_files(tmp_path: Path, keys: dict[str, Any], error: type[MoeplanError], parts: list[str]) -> None:
    path = written(tmp_path, **({"device": "h100", "gpus": 64} | keys))
    with pytest.raises(error) as caught:
        load_cluster(path)
    assert type(caught.value) is error
    assert [p for p in parts if p not in str(caught.value)] == []


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n", "device: [\n", "device: h100\n"])
def test_files_that_are_no_clusters(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SchemaError, match=r"mine\.yaml"):
        load_cluster(path)


def test_unknown_devices_offer_near_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown device 'mi300y'.*MI300X"):
        load_device("mi300y")
    with pytest.raises(UnknownNameError, match="unknown device 'tpu'"):
        describe_device("tpu")
    with pytest.raises(UnknownNameError, match="unknown cluster 'deepsek-h800'.*deepseek-h800"):
        describe_cluster("deepsek-h800")


def test_records_check_themselves() -> None:
    device = load_device("h100")
    with pytest.raises(ClusterError, match=r"device 'H100'.*memory_bytes is 0"):
        dataclasses.replace(device, memory_bytes=0.0)
    with pytest.raises(ClusterError, match=r"device 'H100'.*'fp6'"):
        dataclasses.replace(device, peak_flop_per_s={"bf16": 1e12, "fp6": 2e12})
    with pytest.raises(ClusterError, match=r"device 'H100'.*no bf16"):
        dataclasses.replace(device, peak_flop_per_s={})
    with pytest.raises(ClusterError, match=r"processors is 0"):
        dataclasses.replace(device, processors=0)
    with pytest.raises(ClusterError, match=r"gpus is 8\.0"):
        load_cluster("h100x8").resized(8.0)  # type: ignore[arg-type]
    assert {load_cluster("h100x8"), load_cluster("h100-sxmx8")} == {load_cluster("h100x8")}


def test_descriptions_are_plain_and_name_sources() -> None:
    h100 = describe_device("h100-sxm")
    assert h100["name"] == "H100" and h100["memory_mib"]["value"] * MIB == load_device("h100").memory_bytes
    assert "nvidia-smi" in h100["memory_mib"]["source"]
    assert h100["nic"]["fabric"]["gbit_per_s"]["value"] == 400 and h100["nic"]["fabric"]["gbit_per_s"]["source"]
    described = [describe_device(n) for n in device_names()] + [describe_cluster(n) for n in cluster_names()]
    assert json.loads(json.dumps(described)) == described
    for entry in described:
        for key in set(entry) - UNSOURCED - {"name"}:
            assert set(entry[key]) >= {"value", "source"}, f"{entry['name']}.{key}"
