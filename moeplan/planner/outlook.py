"""What measured layouts of a problem say about those that were not measured yet.

With y the log of measured over predicted time and s the shares of a step by kind of part, the model of `uncertainty.py` is

    y_i = offset + sum_k s_ik x_k + e_i,   x_k ~ N(0, sigma_k^2),   e_i ~ N(0, floor^2 / 2)

The offset is common to all layouts on the machine and free: given one measured layout, another is as far off from it as
`difference_sigma` says. Conditioning on what was measured (best linear unbiased prediction) gives the log of every time a mean
and a deviation. What is expected to be gained on the best time b is E[max(1 - t / b, 0)] for a log-normal t (expected
improvement; Jones, Schonlau and Welch 1998). Predictions that are worse than their deviations say, together or against each
other, widen all of these. Valid on one machine with one software. Units: seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import deviations, shares, sigmas
from moeplan.planner.factors import MOST, Fit, Seen, degrees, judge
from moeplan.planner.problem import Problem
from moeplan.profiles.profile import Profile

BELIEF = 2.0
"""Measured layouts that the stated deviations are worth: the more differ by other amounts, the less these count."""
WIDEST = 10.0
"""Times that deviations are widened at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What is expected of every layout; arrays are [layouts]."""

    verdict: str
    """Whether the measured layouts correct the profile."""
    corrected: bool
    widened: float
    """Factor on the deviations, 1 or more: how much worse than stated the predictions are."""
    step_s: Any
    """Median of the time expected on this machine."""
    sigma: Any
    """Deviation of its logarithm."""
    gain: Any
    """Share of the best measured time that is expected to be gained; nothing by a layout that was measured."""
    chance: Any
    """Probability of being faster than the best measured time."""


def outlook(problem: Problem, layouts: Sequence[Layout], measured_s: Mapping[int, float]) -> Outlook:
    """What is expected of `layouts`, given the measured seconds of some, at least one, by place."""
    tried = sorted(measured_s)
    measured = np.array([measured_s[i] for i in tried])
    # 1. prices, with what calibration makes of the measured layouts
    profile, verdict = corrected_profile(problem, [layouts[i] for i in tried], measured)
    pricing = Pricing(problem.model, profile, problem.workload, Layouts.of(layouts), exact=True)
    time = pricing.step_cost().time
    # 2. the others given the measured ones
    mean, sigma, widened = conditioned(
        np.log(time.total), shares(time), sigmas(profile, problem.workload), np.array(tried), np.log(measured)
    )
    # 3. against the best of them
    gain, chance = improvement(mean - math.log(measured.min()), sigma)
    gain[tried] = chance[tried] = 0.0
    return Outlook(
        verdict=verdict,
        corrected=profile is not problem.profile,
        widened=widened,
        step_s=np.exp(mean),
        sigma=sigma,
        gain=gain,
        chance=chance,
    )


def corrected_profile(problem: Problem, layouts: Sequence[Layout], measured_s: Any) -> tuple[Profile, str]:
    """The profile of a problem, corrected by its measured layouts as calibration would, and the verdict.

    Where all of them together are off by more than a factor is ever changed, what they share is something else: they then
    count relative to their mean error.
    """

    def price(changed: Profile, places: Sequence[int]) -> Any:
        chosen = Layouts.of([layouts[i] for i in places])
        return Pricing(problem.model, changed, problem.workload, chosen, exact=True).step_cost().time.total

    error = np.log(measured_s / price(problem.profile, range(len(layouts))))
    shared = np.mean(error) if abs(np.mean(error)) > MOST else 0.0
    seen = Seen(measured=measured_s * np.exp(-shared), weights=np.ones(len(error)), groups=tuple(map(degrees, layouts)))
    fit = Fit(problem.profile, seen, price, None)
    change, _ = fit.solve()
    before, after = seen.errors(fit.base, fit.base), seen.errors(fit.predict(change), fit.base)
    held = seen.errors(fit.left_out(), fit.base) if len(seen.members) > 1 else None
    accepted, verdict = judge(change, before, after, held, len(seen.members))
    apart = f" (all take {np.exp(shared):.3g} times as long as predicted, which no factor explains)" if shared else ""
    return (fit.profile_with(change) if accepted else problem.profile), verdict + apart


def conditioned(log_predicted: Any, share: Any, sigma: Any, tried: Any, log_measured: Any) -> tuple[Any, Any, float]:
    """Mean and deviation of the log of every time, [n] each, and by how much deviations were widened.

    `share` [kinds, n], `sigma` [kinds], `tried` places of the measured layouts and `log_measured` the log of their times, [m].
    """
    known = deviations()
    # 1. covariance of all errors with each other but for the offset, [n, n]
    scaled = share * sigma[:, None]
    cov = scaled.T @ scaled + np.eye(share.shape[1]) * known.floor**2 / 2
    inverse = np.linalg.inv(cov[np.ix_(tried, tried)])
    # 2. the offset, and what is left of the measured errors, [m]
    error = log_measured - log_predicted[tried]
    weight = float(inverse.sum())
    offset = float((inverse @ error).sum()) / weight
    left = error - offset
    # 3. mean and variance of all, [n]
    gains = cov[:, tried] @ inverse
    mean = log_predicted + offset + gains @ left
    unseen = 1.0 - gains.sum(axis=1)
    variance = np.diag(cov) - (gains * cov[:, tried]).sum(axis=1) + unseen**2 / weight
    # 4. an offset or differences beyond what is stated widen all
    far = offset**2 / (known.common**2 + 1.0 / weight)
    start = min(max(1.0, (BELIEF + far) / (BELIEF + 1.0)), WIDEST**2)
    misfit = (BELIEF * start + float(left @ inverse @ left)) / (BELIEF + len(left) - 1.0)
    widened = math.sqrt(min(max(1.0, misfit), WIDEST**2))
    return mean, widened * np.sqrt(np.maximum(variance, 0.0)), widened


def improvement(log_ratio: Any, sigma: Any) -> tuple[Any, Any]:
    """Expected share gained by log-normal times on a known one, and the probability of any gain; log of their ratio."""
    spread = np.maximum(sigma, 1e-12)
    z = -log_ratio / spread
    chance = _normal(z)
    return np.maximum(chance - np.exp(log_ratio + spread**2 / 2) * _normal(z - spread), 0.0), chance


def _normal(z: Any) -> Any:
    """Cumulative distribution of the normal law."""
    return np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in np.atleast_1d(z)])


def predictions(problem: Problem, layouts: Sequence[Layout]) -> tuple[Any, Any]:
    """Predicted seconds of a step and peak bytes of every layout, [n] each."""
    pricing = Pricing(problem.model, problem.profile, problem.workload, Layouts.of(layouts), exact=True)
    return pricing.step_cost().time.total, pricing.peak_bytes()
