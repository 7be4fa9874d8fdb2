"""The check of the nodes, run as its users run it, against made-up answers of nvidia-smi, rocm-smi and the kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeplan.exporters import preflight_script
from moeplan.exporters.preflight import expectations, preflight_text
from moeplan.profiles.hardware import device_names
from tests.exporters.launchers.rows import SIZES, plan_on

LIBRARIES = ("torch>=2.4", "megatron-core==0.19.*", "transformer-engine>=2.8")
SMI_NAMES = {  # what nvidia-smi calls a device of the catalog
    "A100": "NVIDIA A100-SXM4-80GB", "A100-40GB": "NVIDIA A100-SXM4-40GB", "A100-PCIe": "NVIDIA A100 80GB PCIe",
    "A800": "NVIDIA A800-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3", "H100-96GB": "NVIDIA H100",
   
    "H100-PCIe": "NVIDIA H100 PCIe", "H800": "NVIDIA H800",
    "H200": "NVIDIA H200", "H20": "NVIDIA H20", "GH200": "NVIDIA GH200 480GB", "B200": "NVIDIA B200",
    "B300": "NVIDIA B300 SXM6 AC", "GB200": "NVIDIA GB200", "GB300": "NVIDIA GB300", "L40S": "NVIDIA L40S",
    "MI300X": "AMD Instinct MI300X", "MI325X": "AMD Instinct MI325X", "MI350X": "AMD Instinct MI350X",
    "MI355X": "AMD Instinct MI355X",
}  # fmt: skip


class Node:
    """A made-up node: its tools, its adapters, its libraries, and the script that looks at them."""

    def __init__(self, folder: Path, cluster: str = "h100x32") -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "launch").mkdir()
        (folder / "launch" / "preflight.py").write_text(preflight_text())
        self.expect(expectations(plan_on(cluster), LIBRARIES))
        self.variables = {
            "PATH": f"{folder / 'bin'}",
            "PREFLIGHT_SYSFS": str(folder / "sys"),
            "PYTHONPATH": str(folder / "lib"),
        }
        for name, version in (("torch", "2.9.0+cu130"), ("megatron_core", "0.19.2"), ("transformer_engine", "2.14.0")):
            self.install(name, version)
        self.gpus(["NVIDIA H100 80GB HBM3, 81559, 4"] * 8)
        for i in range(8):
            self.adapter(f"mlx5_{i}")

    def expect(self, expected: dict[str, Any]) -> None:
        (self.folder / "launch" / "plan.json").write_text(json.dumps({"expects": expected}))

    def tool(self, name: str, output: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n/bin/cat <<'E'\n{output}\nE\n")
        (self.folder / "bin" / name).chmod(0o755)

    def gpus(self, rows: list[str]) -> None:
        self.tool("nvidia-smi", "\n".join(rows))

    def adapter(self, name: str, rate: str = "400 Gb/sec (4X NDR)", state: str = "4: ACTIVE") -> None:
        port = self.folder / "sys" / "class" / "infiniband" / name / "ports" / "1"
        port.mkdir(parents=True, exist_ok=True)
        (port / "rate").write_text(f"{rate}\n")
        (port / "state").write_text(f"{state}\n")

    def install(self, name: str, version: str) -> None:
        info = self.folder / "lib" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def check(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """Exit code, and the checks that failed."""
        script = self.folder / "launch" / "preflight.py"
        command = [sys.executable, "-S", str(script), "--json", *arguments]
        done = subprocess.run(command, env=self.variables | variables, capture_output=True, text=True, check=False)
        assert done.stderr == "", done.stderr
        found = json.loads(done.stdout)
        assert found["ok"] == (done.returncode == 0)
        return done.returncode, [f"{f['check']}: {f['found']}" for f in found["findings"] if not f["ok"]]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_node_as_planned(node: Node) -> None:
    assert node.check() == (0, [])
    assert node.check(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7", NCCL_IB_HCA="mlx5") == (0, [])
    assert node.check(NCCL_IB_HCA="=mlx5_0:1,mlx5_1:1") == (0, [])
    assert node.check(NCCL_IB_HCA="^mlx5_9") == (0, [])


def test_a_machine_without_gpus_fails_with_a_list(node: Node) -> None:
    (node.folder / "bin" / "nvidia-smi").unlink()
    (node.folder / "sys" / "class" / "infiniband").rename(node.folder / "sys" / "elsewhere")
    script = node.folder / "launch" / "preflight.py"
    given = node.variables | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-S", str(script)], env=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[:5] == [
        "FAIL gpus: no GPU (nvidia-smi finds none, or is missing); planned: 8 x H100",
        "FAIL nics: 0 Gbit/s (no active port under /sys/class/infiniband); planned: 8 x 400 = 3200 Gbit/s",
        "FAIL torch: missing; planned: >=2.4",
        "FAIL megatron-core: missing; planned: ==0.19.*",
        "FAIL transformer-engine: missing; planned: >=2.8",
    ]
    assert "preflight: 5 of 5 checks failed on " in done.stderr and "PREFLIGHT_SKIP=gpus,nics,libraries" in done.stderr


GPUS: list[tuple[str, list[str], dict[str, str], list[str]]] = [
    ("too few", ["NVIDIA H100 80GB HBM3, 81559, 4"] * 7, {}, ["gpus: 7"]),
    ("hidden", ["NVIDIA H100 80GB HBM3, 81559, 4"] * 8, {"CUDA_VISIBLE_DEVICES": "0,1"},
     ["gpus: 2 (8 are there, but CUDA_VISIBLE_DEVICES=0,1)"]),
    ("another type", ["NVIDIA H200, 143771, 4"] * 8, {}, ["gpu type: NVIDIA H200"]),
    ("a mixture", ["NVIDIA H100 80GB HBM3, 81559, 4"] * 7 + ["NVIDIA A100-SXM4-80GB, 81920, 4"], {},
     ["gpu type: NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3"]),
    ("less memory", ["NVIDIA H100 NVL, 65536, 4"] * 8, {}, ["gpu memory: 64.0 GiB"]),
    ("in use", ["NVIDIA H100 80GB HBM3, 81559, 4"] * 7 + ["NVIDIA H100 80GB HBM3, 81559, 40960"], {},
     ["gpu memory in use: 40.0 GiB"]),
    ("no sizes", ["NVIDIA H100 80GB HBM3, [N/A], [N/A]"] * 8, {}, ["gpu memory: 0.0 GiB"]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "rows", "variables", "failed"), GPUS, ids=[row[0] for row in GPUS])
def test_gpus_not_as_planned(what: str, rows: list[str], variables: dict[str, str], failed: list[str], node: Node) -> None:
    node.gpus(rows)
    assert node.check(**variables) == (1, failed)
    assert node.check("--skip", "gpus", **variables) == (0, [])
    assert node.check(PREFLIGHT_SKIP="nics, gpus", **variables) == (0, [])


def test_adapters_not_as_planned(node: Node) -> None:
    node.adapter("mlx5_7", state="1: DOWN")
    listed = ", ".join(f"mlx5_{i} 400" for i in range(7))
    assert node.check() == (1, [f"nics: 2800 Gbit/s ({listed})"])
    node.adapter("mlx5_7", rate="200 Gb/sec (4X HDR)")
    assert node.check() == (1, [f"nics: 3000 Gbit/s ({listed}, mlx5_7 200)"])
    node.adapter("mlx5_7")
    assert node.check(NCCL_IB_HCA="=mlx5_1,mlx5_70") == (
        1,
        ["nccl adapters: NCCL_IB_HCA==mlx5_1,mlx5_70, where mlx5_70 is not"],
    )
    assert node.check(NCCL_IB_HCA="ibp") == (1, ["nccl adapters: NCCL_IB_HCA=ibp, where ibp is not"])


def test_clouds_cut_the_rate_into_more_adapters(node: Node) -> None:
    for i in range(8):
        node.adapter(f"mlx5_{i}", state="1: DOWN")
    for i in range(32):
        node.adapter(f"rdmap{i}s0", rate="100 Gb/sec (4X EDR)")
    assert node.check() == (0, [])


def test_one_node_needs_no_adapters(tmp_path: Path) -> None:
    node = Node(tmp_path, "h100x8")
    (node.folder / "sys" / "class" / "infiniband").rename(node.folder / "sys" / "elsewhere")
    assert node.check() == (0, [])


def test_libraries_not_as_planned(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.expect(
        expectations(plan_on("h100x32"), ("torch>=2.10", "megatron-core==0.18.*", "transformer-engine>=2.14", "deep-ep"))
    )
    assert node.check() == (1, ["torch: 2.9.0+cu130", "megatron-core: 0.19.2", "deep-ep: missing"])
    node.install("deep_ep", "1.2.1+abc")
    checkout = tmp_path / "megatron lm" / "megatron" / "core"
    checkout.mkdir(parents=True)
    (checkout / "package_info.py").write_text("MAJOR = 0\nMINOR = 18\nPATCH = 0\nPRE_RELEASE = ''\n")
    assert node.check(MEGATRON_LM=str(tmp_path / "megatron lm")) == (1, ["torch: 2.9.0+cu130"])


def test_amd_nodes(tmp_path: Path) -> None:
    node = Node(tmp_path, "mi300xx16")
    card = {"Card Series": "AMD Instinct MI300X", "VRAM Total Memory (B)": "206141652992", "VRAM Total Used Memory (B)": "297"}
    node.tool("rocm-smi", json.dumps({f"card{i}": card for i in range(8)}))
    assert node.check() == (0, [])
    node.tool("rocm-smi", "not JSON")
    assert node.check() == (1, ["gpus: no GPU (rocm-smi finds none, or is missing)"])


@pytest.mark.parametrize("name", device_names())
def test_names_of_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = name.split("-")[0]
    expected = {"gpus_per_node": 1, "gpu": kind, "vendor": "nvidia", "memory_bytes": 1}
    assert set(SMI_NAMES) == set(device_names())
    for other, smi in SMI_NAMES.items():
        monkeypatch.setattr(preflight_script, "nvidia_gpus", lambda smi=smi: [(smi, 1 << 40, 0)])
        found = {f["check"]: f["ok"] for f in preflight_script.check_gpus(expected)}
        assert found["gpu type"] == (other.split("-")[0] == kind), smi


VERSIONS = [
    ("2.14.0", ">=2.8", True), ("2.8", ">=2.8", True), ("2.7.9", ">=2.8", False), ("2.8.0+cu13", ">=2.8", True),
    ("0.19.2", "==0.19.*", True), ("0.190.0", "==0.19.*", False), ("0.20.0", "==0.19.*", False), ("1.0", "", True),
    ("unknown", ">=2.8", False),
]  # fmt: skip


@pytest.mark.parametrize(("version", "condition", "met"), VERSIONS)
def test_versions(version: str, condition: str, met: bool) -> None:
    assert preflight_script.satisfies(version, condition) == met


def test_expectations() -> None:
    found = expectations(plan_on("h100x32"), LIBRARIES)
    assert found == {
        "gpus_per_node": 8, "gpu": "H100", "vendor": "nvidia", "memory_bytes": 81559 << 20, "nics_per_node": 8,
        "nic_gbit_per_s": 400.0, "libraries": list(LIBRARIES),
    }  # fmt: skip
    for cluster, (nodes, each) in SIZES.items():
        assert expectations(plan_on(cluster), ())["gpus_per_node"] == each
        assert (expectations(plan_on(cluster), ())["nics_per_node"] > 0) == (nodes > 1)


def test_a_missing_plan_is_a_wrong_use(node: Node) -> None:
    (node.folder / "launch" / "plan.json").write_text("{}")
    script = str(node.folder / "launch" / "preflight.py")
    done = subprocess.run([sys.executable, script], env=node.variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot read" in done.stderr and "Traceback" not in done.stderr
