"""Calibration: what measured runs of a machine say about its profile.

Only what no microbenchmark shows is corrected, by at most five factors: what steps sustain of the GEMM rates (bf16, quantised)
and of the attention rate, the host's time to launch a kernel, and the communication that overlap leaves exposed. Rates of links
and memory, and all curves, stay as they are. With p the factors, p0 those of the profile and e the log of predicted over
measured time,

    minimise  sum_i w_i rho(e_i(p))  +  sum_j (log(p_j / p0_j) / spread_j)^2,    rho(e) = 2 (sqrt(1 + (e / s)^2) - 1)

by Gauss-Newton steps on iteratively reweighted least squares: every row is priced anew with each factor moved by 5 %. s is the
error of a right profile, beyond which rho grows linearly (a row far off is no reason to bend the rest), more for few layouts;
w_i = 1 / sqrt(rows that differ in GPUs or batch alone); a factor that no row is sensitive to stays. The correction counts only
if it predicts what it has not seen better than before (leave-one-group-out; a group is a model and its degrees). Why the
constants are what they are, benchmarks/calibration.py shows. Units: seconds; errors are logarithms.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import ProblemError
from moeplan.planner.estimate import PricedRun, price_runs, profile_for_runs
from moeplan.planner.robust import robust_change, shared_votes
from moeplan.profiles.origin import CalibratedOn
from moeplan.profiles.profile import SUSTAINED, Profile

MEASURED = "measured_step_s"
"""Column of the measured seconds of a step."""
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
FAR = 0.25
"""Log error after the fit from which a row is worth a remark."""


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
class RowFit:
    """One measured run."""

    id: str
    group: str
    """Model and degrees."""
    measured_s: float
    before_s: float
    """Predicted with the profile as given."""
    after_s: float
    """Predicted with the correction, whether or not it was accepted."""
    left_out_s: float | None
    """Predicted with the correction by the other groups alone; None where there are none."""
    remarks: str
    """Defaults that stand for blank cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What the runs gave."""

    profile: Profile
    """The corrected profile, or the given one where the correction was not accepted."""
    accepted: bool
    verdict: str
    """Why, in one sentence."""
    corrections: tuple[Correction, ...]
    rows: tuple[RowFit, ...]
    groups: int
    before: Errors
    after: Errors
    """With the correction, whether or not it was accepted."""
    left_out: Errors | None
    """Every group by the correction that the others give; None where there is one group alone."""
    remarks: tuple[str, ...]


def calibrate(
    profile: Profile,
    rows: Sequence[Mapping[str, str]],
    *,
    table_sha256: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Correct `profile` by the measured `rows` of a run table; those that cannot be used are named in the remarks."""
    table, remarks = _usable(profile, rows)
    if any(table_sha256 and table_sha256 == c.table_sha256 for c in profile.calibrated_on):
        remarks.append("these runs corrected the profile before; they count twice now")
    fit = _Fit(profile, table, progress)
    values, slopes = fit.solve()
    after = fit.predict(values)
    left_out = fit.left_out() if len(table.members) > 1 else None
    before, fitted = table.errors(fit.base, fit.base), table.errors(after, fit.base)
    held = table.errors(left_out, fit.base) if left_out is not None else None
    accepted, verdict = _judge(values, before, fitted, held, len(table.members))
    remarks += table.far(after)
    calibrated = dataclasses.replace(
        fit.profile_with(values),
        name=profile.name if profile.calibrated_on else f"{profile.name}, calibrated",
        path="",
        sha256="",
        calibrated_on=(
            *profile.calibrated_on,
            CalibratedOn(
                rows=tuple(run.id for run in table.runs),
                table_sha256=table_sha256,
                error_before=round(before.mean, 4),
                error_after=round(fitted.mean, 4),
            ),
        ),
    )
    return Calibration(
        profile=calibrated if accepted else profile,
        accepted=accepted,
        verdict=verdict,
        corrections=fit.corrections(values, slopes),
        rows=table.fits(fit.base, after, left_out),
        groups=len(table.members),
        before=before,
        after=fitted,
        left_out=held,
        remarks=tuple(remarks),
    )


def _judge(change: Any, before: Errors, after: Errors, held: Errors | None, groups: int) -> tuple[bool, str]:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """Rows that can be used."""

    rows: tuple[Mapping[str, str], ...]
    runs: tuple[PricedRun, ...]
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

    def far(self, seconds: Any) -> list[str]:
        """Remarks on rows that stay far off."""
        off = np.log(seconds / self.measured)
        return [
            f"row '{run.id}' stays off by {math.expm1(e):+.0%}: is it measured as its cells say?"
            for run, e in zip(self.runs, off, strict=True)
            if abs(e) > FAR
        ]

    def fits(self, before: Any, after: Any, left_out: Any | None) -> tuple[RowFit, ...]:
        """Every row with its predictions."""
        return tuple(
            RowFit(
                id=run.id,
                group=self.groups[i],
                measured_s=float(self.measured[i]),
                before_s=float(before[i]),
                after_s=float(after[i]),
                left_out_s=None if left_out is None else float(left_out[i]),
                remarks=run.reason,
            )
            for i, run in enumerate(self.runs)
        )


def _usable(profile: Profile, rows: Sequence[Mapping[str, str]]) -> tuple[_Table, list[str]]:
    """Rows with a measured time that the profile can price; the others become remarks."""
    if rows and not any(MEASURED in row for row in rows):
        raise ProblemError(f"the run table has no column {MEASURED}", hint="it holds the measured seconds of a step")
    measured = [_seconds(row) for row in rows]
    timed = [row for row, seconds in zip(rows, measured, strict=True) if seconds]
    priced = price_runs(timed, profile_for=profile_for_runs(profile))
    kept = [(row, run) for row, run in zip(timed, priced, strict=True) if run.cost is not None]
    refused = Counter(run.reason for run in priced if run.cost is None)
    if len(timed) < len(rows):
        refused[f"{MEASURED} is not a time above 0"] = len(rows) - len(timed)
    remarks = [f"{count} of {len(rows)} rows not used: {reason}" for reason, count in refused.most_common()]
    if not kept:
        reason = f"{remarks[0]}" if remarks else "it is empty"
        raise ProblemError(f"no row of the run table can be used to calibrate a profile of {profile.cluster.name}: {reason}")
    partial = sum(run.status == "partial" for _, run in kept)
    if partial:
        remarks.append(f"{partial} of {len(kept)} rows are priced with remarks, such as defaults for blank cells")
    return _Table(
        rows=tuple(row for row, _ in kept),
        runs=tuple(run for _, run in kept),
        measured=np.array([_seconds(row) for row, _ in kept]),
        weights=shared_votes([_near(run) for _, run in kept]),
        groups=tuple(_group(run) for _, run in kept),
    ), remarks


def _seconds(row: Mapping[str, str]) -> float:
    """The measured time of a row; 0 where it has none."""
    try:
        seconds = float(row.get(MEASURED) or 0.0)
    except ValueError:
        return 0.0
    return seconds if 0.0 < seconds < math.inf else 0.0


def _group(priced: PricedRun) -> str:
    """Model and degrees, but for data parallelism: what a fit must predict without having seen it."""
    assert priced.run is not None
    x = priced.run.layout
    return f"{priced.run.model.name} TP{x.tp} CP{x.cp} PP{x.pp} EP{x.ep} ETP{x.etp} {x.sharding}"


def _near(priced: PricedRun) -> tuple[Any, ...]:
    """What rows share that are one fact published several times over: all but GPUs, batch and software era."""
    assert priced.run is not None
    x, workload = priced.run.layout, priced.run.workload
    features = tuple(getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in ("dp", "edp"))
    return (_group(priced), workload.precision.name, workload.seq_len, features)


class _Fit:
    """Prices of a table under changed factors, and the change that fits it. Changes are logarithms, [factors]."""

    def __init__(self, profile: Profile, table: _Table, progress: Callable[[int, int], None] | None) -> None:
        self.profile, self.table, self.progress = profile, table, progress
        self.prior = np.array([self._value(name) for name in SPREADS])
        self.spread = np.array(list(SPREADS.values()))
        self.noise = NOISE * math.sqrt(1.0 + FEW / len(table.members))
        self.priced, self.to_price = 0, (ROUNDS * (len(SPREADS) + 1) + 2) * len(table.rows)
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
        rows = self.table.rows if places is None else [self.table.rows[i] for i in places]
        priced = price_runs(rows, profile_for=profile_for_runs(self.profile_with(change)))
        self.priced += len(rows)
        if self.progress is not None:
            self.progress(min(self.priced, self.to_price), self.to_price)
        return np.array([float(p.cost.total) if p.cost is not None else math.nan for p in priced])

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
        error, out = np.log(self.base / self.table.measured), np.empty(len(self.table.rows))
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
