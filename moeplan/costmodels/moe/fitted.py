"""Alpha and beta of an MoE layer from the curves of a profile: over a range of sizes, or at the sizes of one schedule.

The curves bend (protocols of a collective, a GEMM that fills the device), a line does not: each is fitted by least squares of
the relative error, alpha and beta 0 or more, over the sizes that one layer needs, chunks included, and the error that remains
is told. Tensor-parallel and expert-sharding groups are consecutive ranks, expert-parallel ones stand `esp` apart. Units:
seconds, bytes, FLOP. Not valid for other sizes or groups than those asked for; host launches are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplan.costmodels.collectives import Group, all_gather_s, all_reduce_s, all_to_all_s, group, reduce_scatter_s
from moeplan.costmodels.kernels import ACTIVATION_BYTES
from moeplan.costmodels.moe.base import AlphaBeta, Direction, LayerSchedule, Lines, MoeSize
from moeplan.costmodels.moe.constants import Constants
from moeplan.errors import ProblemError
from moeplan.profiles.profile import Profile

PRODUCTS: Mapping[Direction, tuple[Literal["forward", "dgrad", "wgrad"], ...]] = {
    "forward": ("forward",),
    "backward": ("dgrad", "wgrad"),
}
"""Products of the experts in each direction."""
POINTS = 13
"""Sizes at which a curve is read."""
LEAST_SPAN = 4.0
"""Greatest over least size of a fit, at least: one size alone gives no slope."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants and what they miss."""

    constants: Constants
    errors: Mapping[str, float]
    """Greatest |line / curve - 1| by name of the operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """What the GEMMs of the experts depend on beside FLOP."""

    hidden: int
    width: int
    """Width of a whole expert."""
    count: int
    """Experts of the layer."""
    gemms: int
    precision: str = "bf16"


def fit_constants(profile: Profile, size: MoeSize, experts: Experts, *, most_chunks: int, gradient_bytes: float = 0.0) -> Fit:
    """Constants of the layer `size` on the machine of `profile`, chunks up to `most_chunks`."""
    mp, esp, ep = int(size.mp_ranks), int(size.esp_ranks), int(size.ep_ranks)
    ranks, gpus = esp * ep, profile.cluster.gpus
    if max(ranks, mp) > gpus:
        raise ProblemError(
            f"{max(ranks, mp)} ranks are more than the {gpus} GPUs of {profile.cluster.name}",
            hint="lower --ep, --esp or --mp, or name a larger cluster",
        )
    slots, spread = float(size.slot_bytes), size.slot_bytes * esp / mp
    among, beside = group(profile, ep, esp), group(profile, esp, 1)
    wanted: dict[str, tuple[Callable[[Any], Any], float, float, bool]] = {
        "a2a": (lambda n: _exchange_s(profile, n, among), slots / mp / most_chunks, max(slots / mp, spread), ep > 1),
        "fused-a2a": (lambda n: _exchange_s(profile, n, group(profile, ranks, 1)), spread / most_chunks, spread, ranks > 1),
        "all-gather": (lambda n: all_gather_s(profile, n, beside), spread / most_chunks, spread, esp > 1),
        "reduce-scatter": (lambda n: reduce_scatter_s(profile, n, beside), spread / most_chunks, spread, esp > 1),
        "all-reduce": (lambda n: all_reduce_s(profile, n, beside), slots, slots * esp, esp > 1),
        "mp-all-gather": (
            lambda n: all_gather_s(profile, n, group(profile, mp, 1)), float(min(size.token_bytes, slots)),
            float(max(size.token_bytes, slots)), mp > 1,
        ),
        "gemm": (
            lambda n: _experts_s(profile, n, experts, size), float(size.expert_flop / mp / most_chunks),
            float(size.expert_flop / mp), True,
        ),
        "gradient-all-reduce": (
            lambda n: all_reduce_s(profile, n, group(profile, ranks // mp, mp)), gradient_bytes / most_chunks,
            gradient_bytes, gradient_bytes > 0.0 and ranks > mp,
        ),
    }  # fmt: skip
    given, errors = {}, {}
    for name, (seconds, least, most, needed) in wanted.items():
        if needed:
            given[name], errors[name] = _fit(seconds, least, most)
    # The fit is of all GEMMs, each of which has its share of the start-up.
    given["gemm"] = AlphaBeta(startup_s=given["gemm"].startup_s / experts.gemms, unit_s=given["gemm"].unit_s)
    name = profile.cluster.name if profile.name == "nominal" else profile.name
    source = "fitted to the curves of the profile"
    groups = {"mp": mp, "esp": esp, "ep": ep}
    return Fit(constants=Constants(name=name, source=source, given=given, groups=groups), errors=errors)


def lines_at(
    profile: Profile, size: MoeSize, experts: Experts, schedule: LayerSchedule, degree: int, direction: Direction
) -> Lines:
    """What the curves say of just the amounts of one schedule in `degree` chunks, as lines without slope.

    The experts' gradients have curves of their own here, and the pass of their activation counts where it was measured.
    """
    esp, ep = int(size.esp_ranks), int(size.ep_ranks)
    amounts, beside = schedule.amounts(size, direction), group(profile, esp, 1)

    def flat(kind: str, seconds: Callable[[Any], Any], chunks: int = degree) -> AlphaBeta:
        return AlphaBeta(startup_s=float(seconds(amounts[kind] / chunks)) if kind in amounts else 0.0, unit_s=0.0)

    passes = 2.0 if direction == "backward" else 1.0  # `times` pays the start-up of each gradient
    gemm_s = _experts_s(profile, amounts["E"] / passes / degree, experts, size, direction)
    activation = profile.streams.get("swiglu")
    if activation is not None:
        width = experts.width / esp
        rows = amounts["E"] / passes / degree / (2.0 * experts.gemms * experts.hidden * width)
        gemm_s = gemm_s + activation.seconds((ACTIVATION_BYTES if experts.gemms == 3 else 4.0) * rows * width)
    return Lines(
        exchange=flat("D", lambda n: _exchange_s(profile, n, group(profile, ep, esp))),
        fused_exchange=flat("D", lambda n: _exchange_s(profile, n, group(profile, esp * ep, 1))),
        gather=flat("G", lambda n: all_gather_s(profile, n, beside)),
        scatter=flat("S", lambda n: reduce_scatter_s(profile, n, beside)),
        reduce=flat("A", lambda n: all_reduce_s(profile, n, beside)),
        mp_gather=flat("M", lambda n: all_gather_s(profile, n, group(profile, int(size.mp_ranks), 1)), 1),
        experts=AlphaBeta(startup_s=float(gemm_s) / passes, unit_s=0.0),
    )


def _exchange_s(profile: Profile, buffer_bytes: Any, where: Group) -> Any:
    """Seconds of an all-to-all of `buffer_bytes` a rank, an equal part for each."""
    out = buffer_bytes * (where.ranks - where.local) / where.ranks
    up = buffer_bytes * (where.local - 1) / where.ranks
    return all_to_all_s(profile, out, up, where)


def _experts_s(profile: Profile, flop: Any, experts: Experts, size: MoeSize, direction: Direction = "forward") -> Any:
    """Seconds of the GEMMs of a rank's experts in one direction, `flop` of all of them together in the forward."""
    width, local = experts.width / size.esp_ranks, experts.count / size.ep_ranks
    rows = flop / (2.0 * experts.gemms * experts.hidden * width * local)
    inward = (experts.gemms - 1) * width  # gate and up projection are one product
    both: Any = 0.0
    for way in PRODUCTS[direction]:
        curve = profile.grouped_gemm(experts.precision, way)
        both = both + curve.seconds(local, rows, inward, experts.hidden) + curve.seconds(local, rows, experts.hidden, width)
    return both / profile.sustained_gemm(experts.precision)


def _fit(seconds: Callable[[Any], Any], least: float, most: float) -> tuple[AlphaBeta, float]:
    """The line with the least squares of relative errors between two sizes, and its greatest relative error."""
    sizes = np.geomspace(min(least, most / LEAST_SPAN), most, POINTS)
    times = np.asarray(seconds(sizes), np.float64)
    # min |a / t + b n / t - 1|^2: [points, 2] columns 1 / t and n / t.
    columns = np.stack([1.0 / times, sizes / times], axis=1)
    alpha, beta = np.linalg.lstsq(columns, np.ones(POINTS), rcond=None)[0]
    if alpha < 0.0:
        alpha, beta = 0.0, _single(columns[:, 1])
    elif beta < 0.0:
        alpha, beta = _single(columns[:, 0]), 0.0
    line = AlphaBeta(startup_s=float(alpha), unit_s=float(beta))
    return line, float(np.max(np.abs(line.time_s(sizes) / times - 1.0)))


def _single(column: Any) -> float:
    """The factor of one column that comes closest to ones."""
    return float(column.sum() / (column @ column))
