"""Calibration of kappa, the share of overlap that is lost, by measured runs of MoE layers.

A layer's own operations may be mispriced by a factor that all its schedules share, so only their ratios speak of overlap: with
T the makespan, S the serial time and b a factor of each layer and direction,

    log measured = b_layer + log(T + kappa (S - T)) + error,

b is the median of what is left, and kappa minimises the mean absolute error on a grid of hundredths. It counts only if rows
that the fit has not seen (each schedule left out in turn) are predicted better than with the kappa of the profile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import ProblemError
from moeplan.planner.layers.runs import LayerRun, predict
from moeplan.profiles.origin import CalibratedOn
from moeplan.profiles.profile import Profile

GRID = np.linspace(0.0, 1.0, 101)
"""Values of kappa that are tried."""
OVERLAPPING = 0.02
"""Share of the serial time that a schedule must be able to hide for its rows to say anything of kappa."""
MARGIN = 0.05
"""Share by which the error on what was left out must fall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFit:
    """One measured row beside its predictions."""

    run: LayerRun
    before_s: float
    after_s: float
    """With the kappa that fits best, whether or not it was accepted; without the factor of the layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapCalibration:
    """What the rows gave."""

    profile: Profile
    """With the new kappa, or the given one."""
    accepted: bool
    verdict: str
    before: float
    """Kappa of the profile."""
    after: float
    """Kappa that fits best."""
    error_before: float
    """Mean absolute log error of the ratios between schedules of a layer."""
    error_after: float
    """The same with each schedule left out of the fit that predicts it."""
    rows: tuple[LayerFit, ...]


def calibrate_overlap(profile: Profile, runs: Sequence[LayerRun], *, table_sha256: str = "") -> OverlapCalibration:
    """Kappa of `profile` by measured rows of MoE layers; refuses tables in which nothing overlaps."""
    said = [predict(run, profile) for run in runs]
    ideal, serial = (np.array([getattr(p, name) for p in said]) for name in ("makespan_s", "serial_s"))
    telling = serial - ideal > OVERLAPPING * serial
    if not telling.any():
        raise ProblemError(
            f"none of the {len(runs)} rows overlaps anything, so they say nothing of the overlap",
            hint="measure fsmoe in several chunks beside hierarchical: moeplan verify",
        )
    measured = np.log([run.measured_layer_s for run in runs])
    layers = np.unique([f"{run.layer} {run.direction}" for run in runs], return_inverse=True)[1]
    # [kappas, rows]
    logs = np.log(ideal + GRID[:, None] * (serial - ideal))
    names = np.array([f"{run.schedule} {run.degree}" for run in runs])
    every = np.ones(len(runs), bool)
    best = int(np.argmin(_errors(measured - logs, layers, every)))
    own = np.log(ideal + profile.overlap_loss * (serial - ideal))
    error_before = float(_errors((measured - own)[None], layers, telling)[0])
    error_after = _left_out(measured - logs, layers, names, telling)
    better = error_after < (1.0 - MARGIN) * error_before
    changed = abs(GRID[best] - profile.overlap_loss) >= 0.005
    accepted = bool(better and changed)
    verdict = _verdict(accepted, error_before, error_after)
    calibrated = dataclasses.replace(
        profile,
        name=profile.name if profile.calibrated_on else f"{profile.name}, calibrated",
        overlap_loss=float(GRID[best]),
        path="",
        sha256="",
        calibrated_on=(
            *profile.calibrated_on,
            CalibratedOn(
                rows=tuple(run.id for run in runs),
                table_sha256=table_sha256,
                error_before=round(error_before, 4),
                error_after=round(error_after, 4),
            ),
        ),
    )
    rows = (
        LayerFit(run=run, before_s=p.seconds(profile.overlap_loss), after_s=p.seconds(float(GRID[best])))
        for run, p in zip(runs, said, strict=True)
    )
    return OverlapCalibration(
        profile=calibrated if accepted else profile,
        accepted=accepted,
        verdict=verdict,
        before=profile.overlap_loss,
        after=float(GRID[best]),
        error_before=error_before,
        error_after=error_after,
        rows=tuple(rows),
    )


def _verdict(accepted: bool, before: float, after: float) -> str:
    seen = f"ratios of schedules are off by {before:.1%} before, by {after:.1%} where the fit has not seen them"
    return f"corrected: {seen}" if accepted else f"not corrected: {seen}"


def _centred(left: Any, layers: Any, known: Any) -> Any:
    """Errors less the median of the `known` rows of their layer; `left` is [kappas, rows]."""
    out = np.array(left, np.float64)
    for layer in np.unique(layers):
        mine = layers == layer
        seen = mine & known
        out[:, mine] -= np.median(left[:, seen if seen.any() else mine], axis=1, keepdims=True)
    return out


def _errors(left: Any, layers: Any, wanted: Any) -> Any:
    """Mean absolute error of the `wanted` rows, [kappas]."""
    return np.abs(_centred(left, layers, np.ones(left.shape[1], bool))[:, wanted]).mean(axis=1)


def _left_out(left: Any, layers: Any, names: Any, telling: Any) -> float:
    """Mean absolute error of the telling rows, each schedule by the kappa of the others."""
    off = []
    for name in np.unique(names[telling]):
        mine = names == name
        rest = ~mine
        if not (rest & telling).any():  # one overlapping schedule alone: by itself
            rest = np.ones(len(names), bool)
        centred = _centred(left, layers, rest)
        best = int(np.argmin(np.abs(centred[:, rest]).mean(axis=1)))
        off.append(np.abs(centred[best, mine & telling]))
    return float(np.concatenate(off).mean())
