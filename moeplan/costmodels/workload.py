"""Workload: what a step has to do, in which number formats, and which software runs it.

A precision recipe and an era are facts in YAML files beside this module. An era is a named, dated set of software features:
the same DeepSeek-V3 on the same 256 GB200 went from 494 to 1292 TFLOP/s by software alone, so a price without an era has
no meaning.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from moeplan.errors import ProblemError, UnknownNameError
from moeplan.profiles.hardware import Device
from moeplan.records import from_mapping, load_yaml

MOST_TOKENS, MOST_SEQUENCES = 100_000_000, 10_000_000
"""Longer sequences and larger batches are taken for slips."""

KEPT = "-bf16-weights"
"""Ends the name of an FP8 recipe whose weights are in bf16 and quantised anew every step, Megatron's default."""
_CATALOG = Path(__file__).parent / "catalog"


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """A training precision recipe."""

    name: str
    gemm: Literal["bf16", "fp8", "fp8-blockwise", "fp8-mx", "nvfp4"]
    """Which GEMM curve of the profile applies to linear layers; attention runs in bf16."""
    peak: Literal["bf16", "fp8", "fp4"]
    """Which peak rate of the device bounds it."""
    min_capability: float
    """Least compute capability with hardware support."""
    quantized_bytes: float
    """Bytes of one quantised element with its share of the scales; 2.0 for bf16."""
    primary_quantized: bool
    """Weights are kept quantised only (no bf16 copy besides the fp32 master)."""
    both_orientations: bool
    """Quantised weights are kept row-wise and column-wise on every device (block scales do not transpose)."""
    megatron: tuple[str, ...]
    """Megatron's arguments for it."""
    aliases: tuple[str, ...] = ()
    """Other names met in published runs."""
    remark: str = ""

    def weight_bytes(self, device: Device) -> float:
        """Bytes of one weight element that stay on the device through a step, without master copies.

        Tensor cores before compute capability 10 multiply FP8 operands in one orientation only, so a transposed copy is
        kept as well.
        """
        if self.gemm == "bf16":
            return 2.0
        copies = 2 if self.both_orientations or device.capability_number < 10 else 1
        return self.quantized_bytes * copies + (0.0 if self.primary_quantized else 2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Era:
    """A named, dated set of software features."""

    name: str
    since: str
    """First month it describes, "2025-09"."""
    dispatchers: tuple[str, ...]
    """MoE dispatchers that exist."""
    ep_overlap: bool
    """Whether expert all-to-all can be hidden behind another micro-batch."""
    graph_scopes: tuple[str, ...]
    """What CUDA graphs can cover."""
    shared_overlap: bool = False
    """Whether shared experts can run on a stream of their own beside dispatch and combine."""
    host_s_per_kernel: Mapping[str, float] = field(hash=False)
    """Host time to launch one kernel, by host kind (x86, grace), seconds."""
    megatron_core: str = ""
    """First version of Megatron-Core it describes; empty: none."""
    framework: Literal["megatron", "pytorch", "xla"] = "megatron"
    """Whose software; `solve` and `export` know Megatron's."""
    attention: Literal["native", "fa2", "unfused"] = "native"
    """Attention kernel: the device's best (cuDNN, FlashAttention-3), FlashAttention-2 on every device, or two GEMMs around a
    softmax that keep the scores in memory."""
    overlaps: bool = True
    """Whether tensor-parallel exchange and gradient reduction can overlap compute."""
    fsdp_hidden_compute: float = 0.0
    """Share of a micro-batch's compute behind which FSDP gathers weights and scatters gradients."""
    traffic: float = 1.0
    """Element-wise memory traffic over that of fused kernels."""
    logit_bytes: float = 2.0
    """Device bytes per logit that the loss takes: 2 where the gradient overwrites the bf16 logits (Transformer Engine's fused
    cross entropy)."""
    source: str
    remark: str = ""


@functools.cache
def _precisions() -> dict[str, Precision]:
    data = load_yaml(_CATALOG / "precisions.yaml", "catalog")
    recipes = {n: from_mapping(Precision, {"name": n, **v}, f"precisions.yaml, {n}") for n, v in data.items()}
    return recipes | {n + KEPT: _kept(p) for n, p in recipes.items() if p.primary_quantized}


def _kept(recipe: Precision) -> Precision:
    """A recipe without quantised primary weights: these are kept in bf16 too, and gathered so."""
    words = tuple(word for word in recipe.megatron if word not in ("--fp8-param-gather", "--reuse-grad-buf-for-mxfp8-param-ag"))
    return replace(recipe, name=recipe.name + KEPT, primary_quantized=False, aliases=(), megatron=words)


@functools.cache
def _eras() -> dict[str, Era]:
    data = load_yaml(_CATALOG / "eras.yaml", "catalog")
    eras = {}
    for name, values in data.items():
        host = {k: v * 1e-6 for k, v in values.pop("host_us_per_kernel").items()}
        eras[name] = from_mapping(Era, {"name": name, "host_s_per_kernel": host, **values}, f"eras.yaml, {name}")
    return eras


def precision_names() -> list[str]:
    """Names of all precision recipes."""
    return list(_precisions())


def load_precision(name: str) -> Precision:
    """The precision recipe of that name or alias; letter case makes no difference, nor "_" for "-"."""
    folded = name.strip().lower().replace("_", "-")
    for precision in _precisions().values():
        if folded in (precision.name, *precision.aliases):
            return precision
    raise UnknownNameError("precision", name, _precisions())


def era_names() -> list[str]:
    """Names of all eras, oldest first."""
    return list(_eras())


def load_era(name: str) -> Era:
    """The era of that name or of a version of Megatron-Core ("0.14"); "latest" is Megatron's newest."""
    if name == "latest":
        return _megatron_eras()[-1]
    if version := re.fullmatch(r"(?:megatron-?)?(?:core[-_ ]?)?v?(\d+)\.(\d+)(?:\.\d+)?", name.strip().lower()):
        wanted = int(version[1]), int(version[2])
        dated = [e for e in _megatron_eras() if e.megatron_core and _version(e) <= wanted]
        if not dated:
            raise UnknownNameError("era", name, _eras(), hint="versions of Megatron-Core from 0.6 on are known")
        return dated[-1]
    if name not in _eras():
        raise UnknownNameError("era", name, _eras())
    return _eras()[name]


def _version(era: Era) -> tuple[int, int]:
    major, minor = era.megatron_core.split(".")
    return int(major), int(minor)


def _megatron_eras() -> list[Era]:
    return [era for era in _eras().values() if era.framework == "megatron"]


def era_at(month: str) -> Era:
    """The era that was current in a month ("2025-04"); the first one for earlier months."""
    eras = _megatron_eras()
    return next((e for e in reversed(eras) if e.since <= month), eras[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One training step: how much data, in which formats, with which software."""

    seq_len: int
    """Tokens of a sequence."""
    global_batch: int
    """Sequences of a step."""
    precision: Precision
    era: Era
    gradient_bytes: int = 4
    """Bytes of a gradient element: fp32 is Megatron's default with bf16 weights, 2 for bf16 reduction."""
    moment_bytes: int = 4
    """Bytes of each Adam moment (two of them); the fp32 master weight comes on top."""
    imbalance: float = 1.0
    """Tokens of the most loaded expert-parallel rank over the mean; 1.0 is forced balance."""
    capacity_factor: float = 0.0
    """Expert capacity over the mean load, tokens above it are dropped; 0: no token is dropped."""
    document_len: int = 0
    """Tokens of the documents that are packed into a sequence and attend to themselves alone; 0: a sequence is one document."""

    def __post_init__(self) -> None:
        for name, most in (("seq_len", MOST_TOKENS), ("global_batch", MOST_SEQUENCES)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ProblemError(f"{name}={value!r} must be a whole number of at least 1")
            if value > most:
                raise ProblemError(f"{name}={value} is more than the {most} that are handled")
        for name in ("gradient_bytes", "moment_bytes"):
            if getattr(self, name) not in (2, 4):
                raise ProblemError(f"{name}={getattr(self, name)} must be 2 (bf16) or 4 (fp32)")
        if not 1.0 <= self.imbalance < math.inf:
            raise ProblemError(f"imbalance={self.imbalance} must be at least 1.0 (the most loaded rank over the mean)")
        if not 0.0 <= self.capacity_factor < math.inf:
            raise ProblemError(f"capacity_factor={self.capacity_factor} must be 0 (no token is dropped) or above")

    @property
    def attended_len(self) -> int:
        """Tokens of what attends to itself: a document, or the whole sequence."""
        return min(self.document_len, self.seq_len) if self.document_len else self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.global_batch
