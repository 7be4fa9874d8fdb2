"""Run tables of a machine that is known: rows whose measured time is the price under a profile that was changed on purpose."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from moeplan.planner.calibration import MEASURED
from moeplan.planner.estimate import price_runs, profile_for_runs
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile

NOMINAL = nominal(load_cluster("h100x16"))


def row(name: str, model: str, gpus: int, seq: int, gbs: int, **cells: object) -> dict[str, str]:
    """A row without blanks that matter."""
    usual = {
        "id": name, "model": model, "gpu": "H100", "num_gpus": gpus, "gpus_per_node": 8, "precision": "bf16", "seq_len": seq,
        "gbs": gbs, "mbs": 1,
        "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "dp_type": "dist-opt", "sequence_parallel": "no",
        "recompute": "none", "cuda_graphs": "none", "dispatcher": "alltoall", "a2a_overlap": "no", "offload": "none",
        "era": "deepep-2025",
    }  # fmt: skip
    if "8b" in model and "x" not in model:
        usual["dispatcher"] = "none"
    return {key: str(value) for key, value in {**usual, **cells}.items()}


BUSY = [
    row("long", "llama3-8b", 8, 8192, 64, mbs=2),
    row("longer", "llama3-8b", 16, 16384, 32, cp=2),
    row("tensor", "llama3-8b", 8, 8192, 32, tp=2, sequence_parallel="yes"),
    row("piped", "llama3-8b", 16, 8192, 64, pp=2, vpp=2),
    row("experts", "mixtral-8x7b", 64, 4096, 256, ep=8, mbs=2),
]
"""Layouts that keep the GPUs busy."""
WAITING = [
    row("small", "qwen3-30b-a3b", 16, 1024, 64, ep=2),
    row("smaller", "qwen3-30b-a3b", 16, 512, 64, ep=4, mbs=2),
    row("split", "qwen3-30b-a3b", 16, 1024, 64, ep=4, pp=2, vpp=2),
    row("short", "olmoe-1b-7b", 8, 1024, 64, ep=2),
]
"""Layouts whose GPUs wait for the host to launch their many small kernels."""
TALKING = [
    row("wide", "qwen3-30b-a3b", 16, 4096, 64, ep=16),
    row("cut", "llama3-8b", 16, 4096, 64, tp=8, sequence_parallel="yes"),
    row("across", "mixtral-8x7b-4l-proxy", 16, 4096, 64, ep=16 // 2, etp=2),
]
"""Layouts that exchange much."""


def changed(profile: Profile, **factors: float) -> Profile:
    """The profile with factors multiplied: a kind of sustained share, host or exposed."""
    sustained = {kind: share * factors.get(kind, 1.0) for kind, share in profile.sustained.items()}
    host, exposed = profile.host * factors.get("host", 1.0), profile.exposed * factors.get("exposed", 1.0)
    return dataclasses.replace(profile, sustained=sustained, host=host, exposed=exposed)


def predicted(rows: Sequence[Mapping[str, str]], profile: Profile) -> list[float]:
    """Step seconds of rows."""
    out = []
    for priced in price_runs(rows, profile_for=profile_for_runs(profile)):
        assert priced.cost is not None, priced.reason
        out.append(float(priced.cost.total))
    return out


def measured(rows: Sequence[Mapping[str, str]], truth: Profile, noise: float = 0.0, seed: int = 1) -> list[dict[str, str]]:
    """Rows with the time that `truth` gives, times log-normal noise."""
    draw = random.Random(seed)
    times = predicted(rows, truth)
    return [{**r, MEASURED: f"{t * 2.718281828 ** draw.gauss(0.0, noise):.9g}"} for r, t in zip(rows, times, strict=True)]
