"""A study of one MoE layer as numbers by name, as options and sweeps give them, and the question that they make.

Numbers may be arrays. Tokens are given as such or as batch x seq-len; ranks and esp give ep (ep x esp = ranks). Constants are
swept as NAME-us (alpha) and NAME-gb-per-s or gemm-tflop-per-s (1 / beta). Units here: those of the names, else counts and
bytes; inside the question seconds, bytes, FLOP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta, LayerSchedule
from moeplan.costmodels.moe.constants import OPERATIONS, Constants
from moeplan.costmodels.moe.lina import Lina, pieces_of
from moeplan.costmodels.moe.megatron_overlap import PairSchedule
from moeplan.errors import LayoutError, UsageError
from moeplan.planner.layers.study import DEGREES, Layer, Question
from moeplan.units import GB, TERA, US, format_bytes

NUMBERS = (
    "tokens", "batch", "seq-len", "hidden", "expert-hidden", "experts", "top-k", "capacity-factor", "gemms", "mp", "ep", "esp",
    "ranks", "element-bytes", "shared-hidden", "kappa", "gradient-bytes",
)  # fmt: skip
DEFAULTS = {
    "experts": 0, "capacity-factor": 1.0, "gemms": 3, "mp": 1, "esp": 1, "element-bytes": 2, "shared-hidden": 0, "kappa": 0.0,
    "gradient-bytes": 0.0,
}  # fmt: skip
MOST_GRADIENT_BYTES = 2.0**38
"""Larger gradients of a rank are taken for slips: Lina sends a piece for each 30 MB."""
_RATES = {name: ("gemm-tflop-per-s", TERA) if name == "gemm" else (f"{name}-gb-per-s", GB) for name in OPERATIONS}
SWEPT = (*NUMBERS, *(f"{name}-us" for name in OPERATIONS), *(name for name, _ in _RATES.values()))
"""Names of what a sweep can change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Everything that a study fixes; a sweep changes numbers."""

    numbers: Mapping[str, Any]
    """By name (`NUMBERS`)."""
    schedules: tuple[LayerSchedule, ...]
    pairs: tuple[PairSchedule, ...] = ()
    degrees: tuple[int, ...] = DEGREES
    sequence_parallel: bool = False

    def layer(self, at: Mapping[str, Any] | None = None) -> Layer:
        """The layer, with the numbers of `at` in place of its own; every missing one is named."""
        n = {**DEFAULTS, **self.numbers, **(at or {})}
        if "tokens" not in n and "batch" in n and "seq-len" in n:
            n["tokens"] = n["batch"] * n["seq-len"]
        elif "tokens" in n and ("batch" in n or "seq-len" in n):
            raise UsageError("tokens and batch x seq-len say the same", hint="give --tokens, or --batch and --seq-len")
        if "ranks" in n:
            n["ep"] = _expert_ranks(n)
        missing = [name for name in ("tokens", "hidden", "expert-hidden", "top-k", "ep") if name not in n]
        if missing:
            raise UsageError(
                f"missing {', '.join('--' + name for name in missing)}",
                hint="`moeplan schedule --help` shows an example; --model gives the widths, the experts and the top-k",
            )
        return Layer(
            tokens=n["tokens"], hidden=n["hidden"], expert_hidden=n["expert-hidden"], topk=n["top-k"], gemms=n["gemms"],
            capacity_factor=n["capacity-factor"], experts=n["experts"], mp=n["mp"], esp=n["esp"], ep=n["ep"],
            element_bytes=n["element-bytes"], shared_hidden=n["shared-hidden"], sequence_parallel=self.sequence_parallel,
        )  # fmt: skip

    def question(self, constants: Constants, at: Mapping[str, Any] | None = None) -> Question:
        """The question with these constants, and the numbers of `at` in place of the own ones."""
        at = at or {}
        layer, constants = self.layer(at), _swept(constants, at)
        n = {**DEFAULTS, **self.numbers, **at}
        carried, gradient = n["gradient-bytes"], constants.given.get("gradient-all-reduce")
        if not np.all((np.asarray(carried) >= 0.0) & np.isfinite(carried)):
            raise UsageError("gradient-bytes: a size of 0 or more is needed")
        if np.max(carried) > MOST_GRADIENT_BYTES:
            most = format_bytes(MOST_GRADIENT_BYTES)
            raise UsageError(f"gradient-bytes is {format_bytes(float(np.max(carried)))}, at most {most} of a rank are handled")
        if gradient is None and np.any(np.asarray(carried) > 0.0):
            raise UsageError(
                f"--gradient-bytes needs the constant gradient-all-reduce, which '{constants.name}' lacks",
                hint="give it as --gradient-all-reduce ALPHA,BETA",
            )
        return Question(
            layer=layer,
            lines=constants.lines(gemms=layer.gemms, mp=layer.mp, esp=layer.esp, ep=layer.ep),
            schedules=tuple(_with_pieces(schedule, carried) for schedule in self.schedules),
            pairs=self.pairs,
            degrees=self.degrees,
            kappa=n["kappa"],
            gradient_bytes=carried,
            gradient=gradient or AlphaBeta(startup_s=0.0, unit_s=0.0),
        )


def _with_pieces(schedule: LayerSchedule, gradient_bytes: Any) -> LayerSchedule:
    """Lina with as many pieces as the gradients give; one where they are swept."""
    if isinstance(schedule, Lina) and np.ndim(gradient_bytes) == 0:
        return replace(schedule, pieces=max(1, int(pieces_of(gradient_bytes))))
    return schedule


def _expert_ranks(n: Mapping[str, Any]) -> Any:
    """ep of ranks and esp; refuses an ep that says something else."""
    ranks, esp = np.asarray(n["ranks"], np.float64), np.asarray(n["esp"], np.float64)
    ep = np.asarray(n.get("ep", ranks // np.maximum(esp, 1.0)), np.float64)
    ranks, esp, ep = np.broadcast_arrays(ranks, esp, ep)
    wrong = (ep * esp != ranks).ravel()
    if wrong.any():
        r, s, p = (int(x.ravel()[int(np.argmax(wrong))]) for x in (ranks, esp, ep))
        if "ep" not in n:
            raise LayoutError(f"esp = {s} does not divide the {r} ranks", hint="esp x ep must be the ranks")
        hint = f"with esp {s}, ep must be {r // s}" if s and r % s == 0 else f"esp must divide {r}"
        raise LayoutError(f"ep x esp = {p} x {s} = {p * s} is not the {r} ranks", hint=hint)
    return ep[()]


def _swept(constants: Constants, at: Mapping[str, Any]) -> Constants:
    """Constants with the alphas and betas of a sweep."""
    changed = {}
    for name in OPERATIONS:
        rate, unit = _RATES[name]
        alpha, beta = at.get(f"{name}-us"), at.get(rate)
        if alpha is None and beta is None:
            continue
        old = constants.given.get(name)
        if old is None and (alpha is None or beta is None):
            lacking = f"{name}-us" if alpha is None else rate
            raise UsageError(f"the sweep gives '{name}' no {lacking}", hint=f"give --{name} ALPHA,BETA or sweep both")
        if beta is not None and not np.all(np.asarray(beta) > 0.0):
            raise UsageError(f"sweep of {rate}: rates above 0 are needed")
        startup_s = old.startup_s if alpha is None and old is not None else np.asarray(alpha) * US
        unit_s = old.unit_s if beta is None and old is not None else 1.0 / (np.asarray(beta) * unit)
        changed[name] = AlphaBeta(startup_s=startup_s, unit_s=unit_s)
    return constants.over(changed)
