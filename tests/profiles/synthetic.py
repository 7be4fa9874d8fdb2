"""Samples that a profile would have given, with noise if wanted: a machine whose true curves are known."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeplan.costmodels.collectives import Group, all_gather_s, all_reduce_s, all_to_all_s, reduce_scatter_s, send_s
from moeplan.profiles.cases import SCALES, Case, collective_cases, kernel_cases
from moeplan.profiles.profile import Profile
from moeplan.profiles.samples import Environment, Sample

HOW = {"copy": "copy_", "norm": "add and rms_norm", "optimizer": "fused AdamW and copy_"}


def sample(op: str, key: str, seconds: float, group: str = "", how: str = "", spread: float = 0.01, **sizes: float) -> Sample:
    """A sample in one line."""
    return Sample(op=op, key=key, sizes=sizes, group=group, seconds=seconds, spread=spread, how=how)


def cases_of(op: str, key: str) -> list[dict[str, float]]:
    """Sizes of the grid that `moeplan profile` measures."""
    return [dict(c.sizes) for c in kernel_cases([], "cuda", 80e9) if (c.op, c.key) == (op, key)]


def environment_of(profile: Profile, **changes: Any) -> Environment:
    """The environment in which all GPUs of a profile's cluster were measured."""
    cluster = profile.cluster
    values: dict[str, Any] = {
        "moeplan": "0", "torch": "2.13.0", "backend": "cuda", "communication": "nccl 2.29.2", "device": cluster.device.name,
        "memory_bytes": cluster.device.memory_bytes, "processors": cluster.device.processors, "ranks": cluster.gpus,
        "per_node": min(cluster.gpus, cluster.gpus_per_node), "when": "2026-11-22T16:00:00",
    }  # fmt: skip
    return Environment(**values | changes)


def samples_of(profile: Profile, *, scale: str = "cuda", noise: float = 0.0, seed: int = 0) -> list[Sample]:
    """A sample of every case that `moeplan profile` would measure."""
    cluster, random = profile.cluster, np.random.default_rng(seed)
    cases = [
        *kernel_cases([], scale, cluster.device.memory_bytes),
        *collective_cases(cluster.gpus, min(cluster.gpus, cluster.domain_gpus), scale),
    ]
    out = []
    for case in cases:
        for seconds, sizes in _times(profile, case, SCALES[scale].collective_bytes):
            seconds *= float(np.exp(noise * random.standard_normal()))
            how = HOW.get(case.key, "a call")
            out.append(Sample(op=case.op, key=case.key, sizes=sizes, group=case.group, seconds=seconds, spread=0.01, how=how))
    return out


def _times(profile: Profile, case: Case, largest: float) -> Iterator[tuple[float, dict[str, float]]]:
    """Seconds of a case on the machine of a profile, and the sizes of its sample; nothing where it has no such operation."""
    sizes = dict(case.sizes)
    match case.op:
        case "gemm":
            if case.key in profile.gemms:
                yield float(profile.gemms[case.key].seconds(**sizes)), sizes
        case "grouped_gemm":
            yield float(profile.grouped[case.key].seconds(**sizes)), sizes
        case "attention":
            yield float(_attention(profile, case.key).seconds(sizes["flop"], sizes["io_bytes"])), sizes
        case "attention-backward":
            yield float(_attention(profile, case.key).backward_seconds(sizes["flop"], sizes["io_bytes"])), sizes
        case "stream":
            yield 2e-6 + float(profile.stream_s(sizes["bytes"], case.key)), sizes
        case "host_copy":
            yield sizes["bytes"] / profile.cluster.pcie.bytes_per_s, sizes
        case "launch":
            yield 6e-6 * profile.host, sizes
        case "overlap":
            compute, moved = 1e-3, 0.8e-3
            together = max(compute, moved) + profile.overlap_loss * min(compute, moved)
            yield together, {"alone_compute_s": compute, "alone_comm_s": moved}
        case "deepep":
            pass
        case _:
            yield _collective(profile, case), sizes


def _attention(profile: Profile, key: str) -> Any:
    head, _, value = key.partition("/")
    return profile.attention(int(head), int(value or head))


def _collective(profile: Profile, case: Case) -> float:
    ranks, domains = map(int, case.group.split("/"))
    message, where = case.sizes["message_bytes"], Group(ranks=ranks, local=ranks // domains)
    rings = {"all_gather": all_gather_s, "reduce_scatter": reduce_scatter_s, "all_reduce": all_reduce_s}
    if case.op in rings:
        return float(rings[case.op](profile, message, where))
    if case.op == "send":
        return float(send_s(profile, message, inside=domains == 1))
    seconds = functools.partial(
        all_to_all_s, profile, message * (1.0 - where.local / ranks), message * (where.local - 1) / ranks
    )
    return float(seconds(where)) * (1.3 if case.op == "all_to_all_skewed" else 1.0)
