"""Alpha and beta of the operations of an MoE layer: as text, from a file, by name.

A constant is "ALPHA, BETA" with units, like "287 us, 1.72 GB/s" or "0.287 ms, 580 ps/B": the seconds of an empty operation, and
a rate or its inverse, over bytes of the whole buffer (`gemm`: over FLOP). A file (schema moeplan.constants/1) gives them by
name with their source; `catalog/constants/` holds those of published testbeds. Units inside: seconds, bytes, FLOP. A constant
holds for the groups that it was fitted on, and hardly for others: beta of an all-to-all grows with the nodes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeplan._version import VERSION
from moeplan.costmodels.moe.base import AlphaBeta, Lines, expert_line
from moeplan.errors import SchemaError, UnknownNameError, UsageError, nearest_hint
from moeplan.records import check_schema, from_mapping, load_yaml
from moeplan.units import US

SCHEMA = "moeplan.constants/1"
SHIPPED = Path(__file__).parents[1] / "catalog" / "constants"
OPERATIONS = {
    "a2a": "all-to-all among the ranks that share the experts (ep)",
    "fused-a2a": "all-to-all among all ranks, as S1 and S2 do it; default: that of a2a",
    "all-gather": "all-gather among the ranks of an expert (esp), over the gathered bytes",
    "reduce-scatter": "reduce-scatter among the ranks of an expert, over the bytes before it",
    "all-reduce": "all-reduce among the ranks of an expert; default: reduce-scatter and all-gather",
    "mp-all-gather": "all-gather among the tensor-parallel ranks; default: that of all-gather",
    "gemm": "one GEMM of an expert, over FLOP",
    "gradient-all-reduce": "all-reduce of gradients, only for a backward pass that carries some",
}
"""Constants by name, and what each stands for."""

_TIMES = {"ps": 1e-12, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "fs": 1e-15}
_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_BYTES |= {"Mbit": 1e6 / 8, "Gbit": 1e9 / 8, "Tbit": 1e12 / 8, "Mb": 1e6 / 8, "Gb": 1e9 / 8, "Tb": 1e12 / 8}
_FLOP = {"FLOP": 1.0, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15}
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Fitted constants of one machine."""

    name: str
    source: str
    """Publication, or what they were fitted to."""
    given: Mapping[str, AlphaBeta]
    """By name of the operation (`OPERATIONS`); defaults are not filled in."""
    element_bytes: int = 2
    """Bytes of an element in the runs that they were fitted to."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Group sizes `mp`, `esp` and `ep` that they hold for; empty: not stated."""

    def over(self, other: Mapping[str, AlphaBeta]) -> Constants:
        """These constants with those of `other` in place of, or beside, them."""
        return Constants(
            name=self.name,
            source=self.source,
            given={**self.given, **other},
            element_bytes=self.element_bytes,
            groups=self.groups,
        )

    def missing(self, *, mp: Any, esp: Any, ep: Any) -> list[str]:
        """Names of constants that these group sizes (numbers or arrays) need and that are neither given nor by default."""
        shared = np.any(np.asarray(esp) > 1)
        needed = {
            "a2a": np.any(np.asarray(ep) > 1) or (shared and "fused-a2a" not in self.given),
            "all-gather": shared or (np.any(np.asarray(mp) > 1) and "mp-all-gather" not in self.given),
            "reduce-scatter": shared,
            "gemm": True,
        }
        return [name for name, is_needed in needed.items() if is_needed and name not in self.given]

    def lines(self, *, gemms: Any, mp: Any, esp: Any, ep: Any) -> Lines:
        """What a layer of experts of `gemms` GEMMs takes; refuses missing constants by name."""
        missing = self.missing(mp=mp, esp=esp, ep=ep)
        if missing:
            raise UsageError(
                f"constants '{self.name}': missing {', '.join(missing)}", hint="give each as ALPHA,BETA, or name a machine"
            )
        free = AlphaBeta(startup_s=0.0, unit_s=0.0)
        exchange = self.given.get("a2a", free)
        gather, scatter = self.given.get("all-gather", free), self.given.get("reduce-scatter", free)
        both = AlphaBeta(startup_s=gather.startup_s + scatter.startup_s, unit_s=gather.unit_s + scatter.unit_s)
        return Lines(
            exchange=exchange,
            fused_exchange=self.given.get("fused-a2a", exchange),
            gather=gather,
            scatter=scatter,
            reduce=self.given.get("all-reduce", both),
            mp_gather=self.given.get("mp-all-gather", gather),
            experts=expert_line(self.given["gemm"], gemms),
        )


def parse_constant(text: str, name: str) -> AlphaBeta:
    """Alpha and beta of "287 us, 1.72 GB/s"; numbers without units are us and GB/s (`gemm`: TFLOP/s)."""
    example = "43us,45.7TFLOP/s" if name == "gemm" else "287us,1.72GB/s"
    alpha, comma, beta = text.partition(",")
    if not comma:
        raise UsageError(f"constant {name} '{text}': alpha and beta are needed", hint=f"write it like {example}")
    startup_s, unit_s = _alpha_s(alpha), _beta_s(beta, name)
    for what, part, seconds in (("alpha", alpha, startup_s), ("beta", beta, unit_s)):
        if seconds is None or not math.isfinite(seconds):
            raise UsageError(
                f"constant {name} '{text}': '{part.strip()}' is not {_MEANING[what]}", hint=f"write it like {example}"
            )
    assert startup_s is not None and unit_s is not None
    return AlphaBeta(startup_s=startup_s, unit_s=unit_s)


_MEANING = {"alpha": "a time of 0 or more", "beta": "a rate above 0 (or a time for each byte or FLOP)"}


def _alpha_s(text: str) -> float | None:
    match = re.fullmatch(_NUMBER + r"([a-z]*)\s*", text)
    if match is None or match[2] not in {"", *_TIMES}:
        return None
    return float(match[1]) * (_TIMES[match[2]] if match[2] else US)


def _beta_s(text: str, name: str) -> float | None:
    """Seconds for each byte or FLOP; None where the text is neither a rate nor a time for each."""
    amounts, plain = (_FLOP, "TFLOP") if name == "gemm" else (_BYTES, "GB")
    text = re.sub(r"FLOPS\b", "FLOP/s", text)
    match = re.fullmatch(_NUMBER + r"(?:([A-Za-z]+)\s*/\s*([A-Za-z]+)\s*)?", text)
    if match is None:
        return None
    value, above, below = float(match[1]), match[2] or plain, match[3] or "s"
    if below == "s" and above in amounts:
        return 1.0 / (value * amounts[above]) if value > 0 else None
    if above in _TIMES and below in amounts:
        return value * _TIMES[above] / amounts[below]
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A file of constants."""

    schema: str
    name: str
    constants: Mapping[str, str]
    source: str = ""
    element_bytes: int = 2
    mp: int | None = None
    esp: int | None = None
    ep: int | None = None


def constant_names() -> list[str]:
    """Names of the shipped constants."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_constants(ref: str) -> Constants:
    """The constants of a shipped name, or of a YAML file."""
    if ref in constant_names():
        return _read(SHIPPED / f"{ref}.yaml")
    if "/" in ref or "\\" in ref or ref.lower().endswith((".yaml", ".yml")):
        return _read(Path(ref))
    hint = nearest_hint(ref, constant_names())
    raise UnknownNameError("constants", ref, constant_names(), hint=f"{hint} (the name of a file ends in .yaml)")


def _read(path: Path) -> Constants:
    where = f"constants file '{path}'"
    data = check_schema(
        load_yaml(path, "constants file"), SCHEMA, where, "constants file", version=VERSION, remedy="write it anew"
    )
    file = from_mapping(_File, data, where)
    for name, size in (("element_bytes", file.element_bytes), ("mp", file.mp), ("esp", file.esp), ("ep", file.ep)):
        if size is not None and size < 1:
            raise SchemaError(f"{where}, key '{name}': {size} is not a whole number of at least 1")
    given = {}
    for name, text in file.constants.items():
        if name not in OPERATIONS:
            raise SchemaError(f"{where}: unknown constant '{name}'", hint=nearest_hint(name, OPERATIONS))
        try:
            given[name] = parse_constant(text, name)
        except UsageError as error:
            raise SchemaError(f"{where}: {error.message}", hint=error.hint) from None
    groups = {name: size for name, size in (("mp", file.mp), ("esp", file.esp), ("ep", file.ep)) if size is not None}
    return Constants(name=file.name, source=file.source.strip(), given=given, element_bytes=file.element_bytes, groups=groups)
