"""How far a predicted step time may be off, and how far the ratio of two of them.

A step is a sum of parts t = sum t_k, so an error x_k in all parts of kind k moves log t by share_k x_k. Parts of one kind are
priced by the same curves and constants and err together. The standard deviation sigma_k of x_k joins the error of those curves
on rows that they did not see, what scaling them from another device costs, and what kernels do in a step that they do not do
alone; what all parts share (releases of the software, clocks of a box) is one deviation more:

    var(log t)         = common^2 + sum_k (share_k sigma_k)^2
    var(log t - log u) = floor^2 + sum_k ((share_k - share'_k) sigma_k)^2      two layouts on the same machine

An interval stretches the first by what published runs of its regime show. Deviations are relative and stand in
`catalog/spread.yaml`, written by benchmarks/fit_spread.py; docs/uncertainty.md. Arrays are [kinds], or [kinds, n] for n steps.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.model import Model
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile
from moeplan.records import from_mapping, load_yaml

Z_80 = 1.2816
"""Standard deviations to either side within which a normal variable stays in 80 % of cases."""
MEDIAN_ERROR = 0.6745
"""Median absolute value of a normal variable over its standard deviation."""
SHAPES = 4.0
"""Operations of different shape that a kind of part consists of, at least. A curve misses each of them by an error of its own,
so that it misses their sum by less, by the root of their number."""

_RINGS = (
    "collectives/all_gather of ", "collectives/reduce_scatter of ", "multi_node/all_gather of ",
    "multi_node/reduce_scatter of ", "links/ring$",
)  # fmt: skip
KINDS: Mapping[str, tuple[str, ...]] = {
    "dense GEMM": ("gemm/{gemm}$",),
    "attention core": ("attention/",),
    "state scan": ("rates/memory",),
    "expert GEMM": ("grouped_gemm/{gemm}$", "grouped_gemm/{gemm}-dgrad", "grouped_gemm/{gemm}-wgrad"),
    "element-wise": ("rates/memory",),
    "permute": ("rates/memory",),
    "expert all-to-all": ("collectives/all_to_all of ", "dispatch/", "multi_node/all_to_all of ", "links/all_to_all$"),
    "tensor-parallel exchange": _RINGS,
    "context-parallel exchange": (),
    "host launches": (),
    "recompute": (),
    "pipeline bubble": (),
    "pipeline sends": (),
    "data-parallel exchange": _RINGS,
    "once a step": ("rates/memory",),
}
"""Kinds of parts that err together, and how the names of the curves behind them begin in `Profile.origins` ("$": end)."""
_KIND_OF = {
    "attention GEMM": "dense GEMM",
    "MLP GEMM": "dense GEMM",
    "output GEMM": "dense GEMM",
    "projection": "dense GEMM",
    "head": "dense GEMM",
    "norms and activations": "element-wise",
    "expert activation": "element-wise",
    "router": "element-wise",
    "loss": "element-wise",
    "optimizer": "once a step",
    "step overhead": "once a step",
}
"""Kind of the parts that are not called after it, by the last name of their path."""
_REPEATS = ("recompute", "pipeline bubble", "layer")
"""Parts that consist of others: they err as those do, besides an error of their own."""
_STAGE = ("layers/", "head/", "prediction/")
"""Parts that a pipeline stage repeats for every micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What published runs of one regime show."""

    bias: float
    """Log of measured over predicted time on which intervals are centred; 0 unless the runs show another."""
    scale: float
    """Factor on the deviation of a prediction with which the intervals hold 80 % of the runs."""
    runs: int
    """Published runs behind the two; 0: none, so that the widest of the others stands in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Factors on a predicted time."""

    low: Any
    high: Any
    runs: int
    """Published runs behind the two factors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviations:
    """Relative standard deviations."""

    common: float
    """Of a whole step: two releases of one software, clocks of a box."""
    scaled: float
    """Of a curve that was scaled from a relative, besides its own error."""
    floor: float
    """Of the ratio of two steps on the same machine, besides their parts: kernels of other shapes, repeats of one run."""
    memory: float
    """Of the peak allocated: scale of Student's law with 4 degrees of freedom."""
    kinds: Mapping[str, float]
    """By kind of part, besides the errors of its curves."""
    regimes: Mapping[str, Regime]


@functools.cache
def deviations() -> Deviations:
    """The deviations in use."""
    path = Path(__file__).parent / "catalog" / "spread.yaml"
    return from_mapping(Deviations, load_yaml(path, "catalog file"), path.name)


def regime(model: Model, profile: Profile, workload: Workload | None = None) -> str:
    """Which runs an interval is held to: dense or with experts, on a measured or a scaled device, by Megatron or another."""
    words = ["dense" if model.moe is None else "moe"]
    origin = profile.origins.get("gemm/bf16")
    if origin is not None and not origin.measured:
        words.append("scaled device")
    if workload is not None and workload.era.framework != "megatron":
        words.append("other framework")
    return ", ".join(words)


def shares(time: Breakdown) -> Any:
    """Share of the step by kind of part, [kinds, ...]; parts that consist of others also count as those, in proportion."""
    zero = 0.0 * time.total
    direct, stage, again = dict.fromkeys(KINDS, zero), dict.fromkeys(KINDS, zero), zero
    for part, seconds in time:
        name = part.rsplit("/", 1)[-1]
        kind = _KIND_OF.get(name, name)
        if name in _REPEATS:
            again = again + seconds
        elif part.startswith(_STAGE):
            stage[kind] = stage[kind] + seconds
        if kind in KINDS:
            direct[kind] = direct[kind] + seconds
    whole = sum(stage.values())
    ratio = again / np.where(whole > 0, whole, 1.0)
    return np.stack([np.asarray(direct[kind] + ratio * stage[kind]) / time.total for kind in KINDS])


def curve_errors(profile: Profile, workload: Workload, scaled: float) -> Any:
    """Standard deviation that the curves of a profile give each kind, [kinds]: root of the mean square of its curves.

    `scaled` is that of curves taken from another device, besides their own error.
    """
    out = []
    for prefixes in KINDS.values():
        wanted = [p.format(gemm=workload.precision.gemm) for p in prefixes]
        found = [o for n, o in profile.origins.items() if any(f"{n}$".startswith(p) for p in wanted)]
        squares = [(o.error / MEDIAN_ERROR) ** 2 / SHAPES + (0.0 if o.measured else scaled**2) for o in found]
        out.append(np.sqrt(np.mean(squares)) if squares else 0.0)
    return np.array(out)


def sigmas(profile: Profile, workload: Workload, beyond: Collection[str] = ()) -> Any:
    """Standard deviation of each kind, [kinds]; kinds in `beyond` are priced beyond what was measured and count as scaled."""
    added = np.array([np.hypot(deviations().kinds[kind], deviations().scaled * (kind in beyond)) for kind in KINDS])
    return np.hypot(curve_errors(profile, workload, deviations().scaled), added)


def step_sigma(share: Any, sigma: Any, common: Any) -> Any:
    """Standard deviation of the log of a step time, given its shares [kinds, ...] and the deviations of the kinds [kinds]."""
    return np.sqrt(common**2 + np.tensordot(sigma**2, share**2, axes=(0, 0)))


def student_tail(t: Any) -> Any:
    """Probability that a variable of Student's law with 4 degrees of freedom exceeds `t`."""
    u = t / np.sqrt(4.0 + np.square(t))
    return 0.5 - 0.75 * (u - u**3 / 3.0)


def difference_parts(first: Any, second: Any, sigma: Any) -> Any:
    """What each kind adds to the variance of the log of the ratio of two steps, [kinds, ...]; what they share cancels."""
    return ((first - second).T ** 2 * sigma**2).T


def difference_sigma(first: Any, second: Any, sigma: Any, floor: Any) -> Any:
    """Standard deviation of the log of the ratio of two steps on the same machine."""
    return np.sqrt(floor**2 + difference_parts(first, second, sigma).sum(axis=0))


def is_tie(log_ratio: Any, sigma: Any) -> Any:
    """Whether two steps lie closer than what is not known of their ratio."""
    return np.abs(log_ratio) < Z_80 * sigma


def spread(model: Model, profile: Profile, workload: Workload, time: Breakdown, beyond: Collection[str] = ()) -> Spread:
    """The factors on a step time between which 80 % of the measured ones are meant to lie, numbers or arrays."""
    known = deviations()
    held = known.regimes[regime(model, profile, workload)]
    reach = Z_80 * held.scale * step_sigma(shares(time), sigmas(profile, workload, beyond), known.common)
    return Spread(low=np.exp(held.bias - reach), high=np.exp(held.bias + reach), runs=held.runs)


def interval(
    model: Model, profile: Profile, workload: Workload, time: Breakdown, beyond: Collection[str] = ()
) -> tuple[Any, Any]:
    """Low and high end of a step time that are meant to hold the measured one in 80 % of cases, numbers or arrays."""
    factors = spread(model, profile, workload, time, beyond)
    return time.total * factors.low, time.total * factors.high
