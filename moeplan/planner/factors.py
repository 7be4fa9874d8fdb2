"""The five factors that measured steps correct, and the change of them that fits: the arithmetic of `calibration.py`.

What is fitted, and the equation, stands there; here are the factors, the Gauss-Newton steps on times measured under any prices,
and when a correction counts. Errors and changes are logarithms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layout
from moeplan.planner.robust import robust_change
from moeplan.profiles.profile import SUSTAINED, Profile

SPREADS = {
    **{kind: 0.15 for kind in SUSTAINED},
    "host": 0.4,
    "exposed": 0.2,
}
"""Factors and how far each may be from the profile: standard deviation of its logarithm."""
STEP = 0.05
"""Change of a factor's logarithm that sensitivities are taken from."""
NOISE = 0.1
"""The log error that the right profile of a machine leaves on a layout; published runs leave 0.06 to 0.09 on average."""
FEW = 1.0
"""s^2 = NOISE^2 (1 + FEW / groups): the error of few layouts is as likely their own as the machine's."""
MARGIN, MARGIN_OF_FEW = 0.1, 0.2
"""MARGIN + MARGIN_OF_FEW / groups: share by which the error on what was left out must fall; less may as well be chance."""
ENOUGH = 0.25
"""Log error of a single layout from which it is corrected: what is less may well be the layout's own and not the machine's."""
OUTLIER = 3.0
"""Times the median error (or `NOISE`, if that is more) at which a row counts at most in a mean."""
MOST = 0.5
"""Change of a factor's logarithm that is never exceeded."""
ROUNDS = 2
"""Gauss-Newton steps; prices are nearly linear in the factors."""
STILL = 1e-4
"""Change of logarithms below which a step is the last, and nothing has moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One factor."""

    name: str
    """A kind of `SUSTAINED`, "host" or "exposed"."""
    before: float
    after: float
    evidence: float
    """How far the rows narrow it down: 1 - variance with them / variance of the prior; 0: no row speaks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Errors of predicted step times, as |log(predicted / measured)|: 0.1 is about 10 %."""

    median: float
    mean: float
    """Repeated runs count less, with the weights of the fit, and a row off by more than `OUTLIER` times the median as that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was measured."""

    measured: Any
    """Seconds, [n]."""
    weights: Any
    """[n]."""
    groups: tuple[str, ...]
    """Model and degrees of each row."""

    @property
    def members(self) -> dict[str, list[int]]:
        """Places of the rows of every group."""
        out: dict[str, list[int]] = {}
        for place, group in enumerate(self.groups):
            out.setdefault(group, []).append(place)
        return out

    def errors(self, seconds: Any, base: Any) -> Errors:
        """Errors of predictions for all rows; `base` are those of the profile as given."""
        off, was = (np.abs(np.log(s / self.measured)) for s in (seconds, base))
        most = OUTLIER * max(NOISE, float(np.median(was)))
        return Errors(median=float(np.median(off)), mean=float(np.average(np.minimum(off, most), weights=self.weights)))


def judge(change: Any, before: Errors, after: Errors, held: Errors | None, groups: int) -> tuple[bool, str]:
    """Whether a correction counts, and why."""
    was, fitted = f"{before.mean:.1%}", f"{after.mean:.1%}"
    if np.abs(change).max() < STILL:
        return False, "the runs are predicted as they were measured: nothing to correct"
    if after.mean >= before.mean:
        return False, f"not corrected: the runs themselves would be off by {fitted}, they are by {was}"
    if held is None and before.mean < ENOUGH:
        return False, f"not corrected: one layout alone, off by {was}; a layout alone is believed from {ENOUGH:.0%}"
    if held is None:
        return True, f"corrected by one layout alone: off by {was} before, by {fitted} after"
    seen = f"off by {was} before, by {held.mean:.1%} where the fit has not seen them"
    margin = MARGIN + MARGIN_OF_FEW / groups
    if held.mean > (1.0 - margin) * before.mean:
        return False, f"not corrected: layouts are {seen}, which is no gain of {margin:.0%}"
    return True, f"corrected: layouts are {seen}"


def degrees(x: Layout) -> str:
    """The degrees of a layout but for data parallelism: what a fit must predict without having seen it."""
    return f"TP{x.tp} CP{x.cp} PP{x.pp} EP{x.ep} ETP{x.etp} {x.sharding}"


class Fit:
    """Prices of what was measured under changed factors, and the change that fits it. Changes are logarithms, [factors].

    `price` gives the seconds of the rows at some places with a profile.
    """

    def __init__(
        self,
        profile: Profile,
        table: Seen,
        price: Callable[[Profile, Sequence[int]], Any],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.profile, self.table, self.price, self.progress = profile, table, price, progress
        self.prior = np.array([self._value(name) for name in SPREADS])
        self.spread = np.array(list(SPREADS.values()))
        self.noise = NOISE * math.sqrt(1.0 + FEW / len(table.members))
        self.priced, self.to_price = 0, (ROUNDS * (len(SPREADS) + 1) + 2) * len(table.measured)
        self.base = self.predict(np.zeros(len(SPREADS)))
        self.first_slopes = self.slopes(np.zeros(len(SPREADS)), self.base)

    def _value(self, name: str) -> float:
        if name in SUSTAINED:
            return self.profile.sustained.get(name, 1.0)
        return float(getattr(self.profile, name))

    def profile_with(self, change: Any) -> Profile:
        """The profile with factors changed."""
        values = dict(zip(SPREADS, (float(v) for v in self.prior * np.exp(change)), strict=True))
        sustained = {kind: values[kind] for kind in SUSTAINED}
        return dataclasses.replace(self.profile, sustained=sustained, host=values["host"], exposed=values["exposed"])

    def predict(self, change: Any, places: Sequence[int] | None = None) -> Any:
        """Step seconds of all rows, or of those at `places`, with factors changed."""
        rows = range(len(self.table.measured)) if places is None else places
        seconds = self.price(self.profile_with(change), rows)
        self.priced += len(rows)
        if self.progress is not None:
            self.progress(min(self.priced, self.to_price), self.to_price)
        return seconds

    def slopes(self, change: Any, seconds: Any) -> Any:
        """Change of log seconds for a change of each log factor, [rows, factors]."""
        moved = [self.predict(change + STEP * unit) for unit in np.eye(len(SPREADS))]
        return np.stack([np.log(s / seconds) / STEP for s in moved], axis=1)

    def solve(self) -> tuple[Any, Any]:
        """The change that fits all rows, and the sensitivities there."""
        change, slopes, seconds = np.zeros(len(SPREADS)), self.first_slopes, self.base
        for round_ in range(ROUNDS):
            new = self._step(change, slopes, np.log(seconds / self.table.measured), self.table.weights)
            moved = np.abs(new - change).max()
            change = new
            if moved < 10 * STILL or round_ == ROUNDS - 1:
                break
            seconds = self.predict(change)
            slopes = self.slopes(change, seconds)
        return change, slopes

    def left_out(self) -> Any:
        """Step seconds of every row by the change that fits the rows of other groups, [n]."""
        error, out = np.log(self.base / self.table.measured), np.empty(len(self.base))
        for places in self.table.members.values():
            rest = np.setdiff1d(np.arange(len(out)), places)
            change = self._step(np.zeros(len(SPREADS)), self.first_slopes[rest], error[rest], self.table.weights[rest])
            out[places] = self.predict(change, places)
        return out

    def _step(self, change: Any, slopes: Any, error: Any, weights: Any) -> Any:
        """The change that minimises the objective where errors are linear around `change`."""
        delta = robust_change(error, slopes, weights, scale=self.noise, spread=self.spread, pull=-change)
        return np.clip(change + delta, -MOST, MOST)

    def corrections(self, change: Any, slopes: Any) -> tuple[Correction, ...]:
        """Every factor before and after, and what the rows say about it."""
        precision = self.spread**-2.0
        seen = (slopes * (self.table.weights / self.noise**2)[:, None]).T @ slopes + np.diag(precision)
        evidence = 1.0 - np.diag(np.linalg.inv(seen)) * precision
        after = self.prior * np.exp(change)
        return tuple(
            Correction(name=name, before=float(b), after=float(a), evidence=float(np.clip(e, 0.0, 1.0)))
            for name, b, a, e in zip(SPREADS, self.prior, after, evidence, strict=True)
        )
