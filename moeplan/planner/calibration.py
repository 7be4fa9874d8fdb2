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
from moeplan.planner.factors import SPREADS as SPREADS
from moeplan.planner.factors import Correction, Errors, Fit, Seen, degrees, judge
from moeplan.planner.robust import shared_votes
from moeplan.profiles.origin import CalibratedOn
from moeplan.profiles.profile import Profile

MEASURED = "measured_step_s"
"""Column of the measured seconds of a step."""
FAR = 0.25
"""Log error after the fit from which a row is worth a remark."""


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

    def price(changed: Profile, places: Sequence[int]) -> Any:
        priced = price_runs([table.rows[i] for i in places], profile_for=profile_for_runs(changed))
        return np.array([float(p.cost.total) if p.cost is not None else math.nan for p in priced])

    fit = Fit(profile, table, price, progress)
    values, slopes = fit.solve()
    after = fit.predict(values)
    left_out = fit.left_out() if len(table.members) > 1 else None
    before, fitted = table.errors(fit.base, fit.base), table.errors(after, fit.base)
    held = table.errors(left_out, fit.base) if left_out is not None else None
    accepted, verdict = judge(values, before, fitted, held, len(table.members))
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table(Seen):
    """Rows that can be used."""

    rows: tuple[Mapping[str, str], ...]
    runs: tuple[PricedRun, ...]

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
    return f"{priced.run.model.name} {degrees(priced.run.layout)}"


def _near(priced: PricedRun) -> tuple[Any, ...]:
    """What rows share that are one fact published several times over: all but GPUs, batch and software era."""
    assert priced.run is not None
    x, workload = priced.run.layout, priced.run.workload
    features = tuple(getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in ("dp", "edp"))
    return (_group(priced), workload.precision.name, workload.seq_len, features)
