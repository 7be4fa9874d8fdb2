#!/usr/bin/env python3
"""Check that this node is what the plan assumed: `python3 preflight.py [--json] [--skip CHECK]... [--plan plan.json]`.

Compares GPUs (count, type, memory, memory in use), network adapters and libraries with `expects` of the `plan.json` beside
this file. Needs nothing but Python 3.9 and nvidia-smi (or rocm-smi). Exits with 1 if anything is not as planned.
PREFLIGHT_SKIP=nics,libraries leaves checks out as --skip does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

MEMORY_SHARE = 0.97
"""Least memory of a GPU over what was planned; drivers differ in what they keep for themselves."""
RATE_SHARE = 0.95
"""Least rate of all network adapters together over what was planned."""
USED_BYTES = 2 << 30
"""More memory in use than this before the job starts is taken for another job."""
MIB = 1 << 20

Finding = dict[str, Any]
"""One comparison: check, ok, found, planned."""
Expected = dict[str, Any]


def finding(check: str, ok: bool, found: str, planned: str) -> Finding:
    """One line of the result."""
    return {"check": check, "ok": ok, "found": found, "planned": planned}


# GPUs.


def run(*command: str) -> str:
    """Output of a command; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def nvidia_gpus() -> list[tuple[str, int, int]]:
    """Name, bytes of memory and bytes in use of every GPU, as nvidia-smi says."""
    out = []
    for line in run("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits").splitlines():
        name, *sizes = [part.strip() for part in line.split(",")]
        total, used = [int(size) * MIB if size.isdigit() else 0 for size in (*sizes, "", "")][:2]
        out.append((name, total, used))
    return out


def amd_gpus() -> list[tuple[str, int, int]]:
    """The same, as rocm-smi says."""
    try:
        cards = json.loads(run("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json") or "{}")
    except ValueError:
        return []
    out = []
    for card in cards.values():
        facts = {str(key).lower(): str(value) for key, value in card.items()}
        name = " ".join(facts.get(key, "") for key in ("card series", "card model", "device name")).strip()
        total, used = (int(facts.get(f"vram total {kind}memory (b)", "0")) for kind in ("", "used "))
        out.append((name, total, used))
    return out


def check_gpus(expected: Expected) -> list[Finding]:
    """Count, type, memory, and whether somebody else uses them."""
    wanted, kind = int(expected["gpus_per_node"]), str(expected["gpu"])
    tool = "nvidia-smi" if expected["vendor"] == "nvidia" else "rocm-smi"
    gpus = nvidia_gpus() if expected["vendor"] == "nvidia" else amd_gpus()
    if not gpus:
        return [finding("gpus", False, f"no GPU ({tool} finds none, or is missing)", f"{wanted} x {kind}")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    count = len(gpus) if visible is None else min(len(gpus), len([part for part in visible.split(",") if part.strip()]))
    names = sorted({name for name, _, _ in gpus})
    smallest, most = min(total for _, total, _ in gpus), max(used for _, _, used in gpus)
    need = int(expected["memory_bytes"])
    alike = all(re.search(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9])", name) for name in names)
    hidden = "" if count == len(gpus) else f" ({len(gpus)} are there, but CUDA_VISIBLE_DEVICES={visible})"
    gib = float(1 << 30)
    return [
        finding("gpus", count == wanted, f"{count}{hidden}", str(wanted)),
        finding("gpu type", alike, ", ".join(names), kind),
        finding("gpu memory", smallest >= MEMORY_SHARE * need, f"{smallest / gib:.1f} GiB", f"{need / gib:.1f} GiB"),
        finding("gpu memory in use", most <= USED_BYTES, f"{most / gib:.1f} GiB", f"at most {USED_BYTES / gib:.0f} GiB"),
    ]


# Network adapters.


def adapters(root: Path) -> dict[str, float]:
    """Gbit/s of every adapter with an active port, by name."""
    found: dict[str, float] = {}
    for port in sorted(root.glob("*/ports/*")):
        try:
            state, rate = ((port / name).read_text() for name in ("state", "rate"))
        except OSError:
            continue
        speed = re.match(r"\s*([0-9.]+)\s*Gb/sec", rate)
        if "ACTIVE" in state and speed:
            name = port.parent.parent.name
            found[name] = found.get(name, 0.0) + float(speed[1])
    return found


def check_nics(expected: Expected) -> list[Finding]:
    """The rate of all adapters together (clouds cut it into more of them), and the names that NCCL was told."""
    wanted, each = int(expected["nics_per_node"]), float(expected["nic_gbit_per_s"])
    if not wanted:
        return []
    found = adapters(Path(os.environ.get("PREFLIGHT_SYSFS", "/sys")) / "class" / "infiniband")
    total = sum(found.values())
    listed = ", ".join(f"{name} {rate:g}" for name, rate in found.items()) or "no active port under /sys/class/infiniband"
    planned = f"{wanted} x {each:g} = {wanted * each:g} Gbit/s"
    out = [finding("nics", total >= RATE_SHARE * wanted * each, f"{total:g} Gbit/s ({listed})", planned)]
    told = os.environ.get("NCCL_IB_HCA", "")
    if told and not told.startswith("^"):
        names = [part.split(":")[0] for part in told.lstrip("=").split(",") if part]
        lost = [n for n in names if not (n in found if told.startswith("=") else any(f.startswith(n) for f in found))]
        unknown = f", where {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} not" if lost else ""
        out.append(finding("nccl adapters", not lost, f"NCCL_IB_HCA={told}{unknown}", "adapters of this node"))
    return out


# Libraries.


def numbers(version: str) -> list[int]:
    """Leading numbers of a version: [2, 14, 0] of "2.14.0+cu13"."""
    found = re.match(r"\d+(?:\.\d+)*", version.strip())
    return [int(part) for part in found[0].split(".")] if found else []


def installed(name: str) -> str:
    """Version of a library, empty if it is missing; the checkout that MEGATRON_LM names goes before what is installed."""
    info = Path(os.environ.get("MEGATRON_LM", "")) / "megatron" / "core" / "package_info.py"
    if name == "megatron-core" and info.is_file():
        parts = [re.search(rf"^{part}\s*=\s*(\d+)", info.read_text(), re.M) for part in ("MAJOR", "MINOR", "PATCH")]
        return ".".join(found[1] for found in parts if found)
    for spelling in (name, name.replace("-", "_")):
        try:
            return metadata.version(spelling)
        except metadata.PackageNotFoundError:
            continue
    return ""


def satisfies(version: str, condition: str) -> bool:
    """Whether a version meets ">=2.8", "==0.19.*", "==0.19.2" or nothing at all."""
    have = numbers(version)
    if condition.startswith(">="):
        return have >= numbers(condition[2:])
    if condition.startswith("=="):
        want = numbers(condition[2:])
        return have[: len(want)] == want
    return not condition


def check_libraries(expected: Expected) -> list[Finding]:
    """The versions that the arguments need."""
    out = []
    for requirement in expected["libraries"]:
        name, condition = re.match(r"([A-Za-z0-9_.-]+?)((?:[><=!~].*)?)$", requirement).groups()  # type: ignore[union-attr]
        version = installed(name)
        ok = bool(version) and satisfies(version, condition)
        out.append(finding(name, ok, version or "missing", condition or "any version"))
    return out


CHECKS: dict[str, Callable[[Expected], list[Finding]]] = {
    "gpus": check_gpus,
    "nics": check_nics,
    "libraries": check_libraries,
}


def main() -> int:
    """Run the checks and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path(__file__).resolve().parent / "plan.json", help="plan.json")
    parser.add_argument("--skip", action="append", default=[], choices=list(CHECKS), help="leave a check out")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    given = parser.parse_args()
    try:
        expected = json.loads(given.plan.read_text(encoding="utf-8"))["expects"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"cannot read {given.plan}: {error}")
    skipped = {*given.skip, *os.environ.get("PREFLIGHT_SKIP", "").replace(" ", "").split(",")}
    findings = [found for name, check in CHECKS.items() if name not in skipped for found in check(expected)]
    failed = [found for found in findings if not found["ok"]]
    if given.json:
        print(json.dumps({"host": os.uname().nodename, "ok": not failed, "findings": findings}, indent=1))
        return 1 if failed else 0
    for found in findings:
        mark = "ok  " if found["ok"] else "FAIL"
        print(f"{mark} {found['check']}: {found['found']}; planned: {found['planned']}", file=sys.stderr)
    if failed:
        left = f"{len(failed)} of {len(findings)} checks failed on {os.uname().nodename}"
        print(f"preflight: {left}; PREFLIGHT_SKIP={','.join(CHECKS)} leaves checks out", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
