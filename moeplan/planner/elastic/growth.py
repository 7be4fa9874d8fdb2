"""Whether to grow onto GPUs that are free for a while.

At rate r now and r' > r after, growing costs c_up and giving back c_dn seconds without progress. If the GPUs stay for T:
    gain(T) = r' max(0, T - c_up) - r (T + c_dn),   positive for T > T* = (r' c_up + r c_dn) / (r' - r)
Random T: grow where the mean gain is positive; exponential with mean u: r' u exp(-c_up / u) - r (u + c_dn). Recorded times
are averaged; after GPUs were idle for t only the rest of the longer ones counts. Exact for these costs. Units: seconds and
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Trace, stays_s
from moeplan.planner.elastic.elastic_plan import StepUp, Transition


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """A layout that runs, and a faster one on more GPUs."""

    rate: float
    """Samples per second now."""
    grown_rate: float
    """Samples per second on all GPUs."""
    grow_s: float
    """Seconds without progress to get there."""
    shrink_s: float
    """Seconds without progress to give the GPUs back."""

    def __post_init__(self) -> None:
        if not 0.0 < self.rate or not 0.0 < self.grown_rate:
            raise ProblemError(f"growing from {self.rate:g} to {self.grown_rate:g} samples/s", hint="give positive rates")
        if self.grow_s < 0.0 or self.shrink_s < 0.0:
            message = f"growing in {self.grow_s:g} s and shrinking in {self.shrink_s:g} s"
            raise ProblemError(message, hint="give 0 or more seconds")

    @property
    def least_s(self) -> float:
        """Seconds T* that the GPUs must stay for growing to pay; infinite where the other layout is no faster."""
        more = self.grown_rate - self.rate
        return (self.grown_rate * self.grow_s + self.rate * self.shrink_s) / more if more > 0.0 else float("inf")

    def gain(self, stay_s: Any) -> Any:
        """Samples won by growing onto GPUs that stay for `stay_s`."""
        return self.grown_rate * np.maximum(0.0, stay_s - self.grow_s) - self.rate * (stay_s + self.shrink_s)

    def mean_gain(self, mean_stay_s: Any) -> Any:
        """The same in the mean where the time is exponential, so that how long they were idle says nothing."""
        grown_s = mean_stay_s * np.exp(-self.grow_s / mean_stay_s)
        return self.grown_rate * grown_s - self.rate * (mean_stay_s + self.shrink_s)

    def recorded_gain(self, stays_s: Sequence[float], idle_s: float = 0.0) -> float:
        """The same over recorded times that GPUs were free, those longer than the `idle_s` for which they have been idle."""
        longer = np.array([stay_s - idle_s for stay_s in stays_s if stay_s > idle_s])
        if not len(longer):
            longest = max(stays_s, default=0.0)
            message = f"no recorded time is above {idle_s:g} s; the longest of {len(stays_s)} is {longest:g} s"
            raise ProblemError(message, hint="record longer, or give a mean time")
        return float(self.gain(longer).mean())


def steps_up(
    transitions: Sequence[Transition], rates: Mapping[int, float], stay_s: float = 0.0, trace: Trace | None = None
) -> Iterator[StepUp]:
    """Steps to more nodes that are faster there, and whether nodes stay long enough.

    `rates`: samples per second by nodes. `stay_s`: mean stay of the further nodes; 0: as in the trace, if there is one.
    """
    seconds = {(t.before, t.after): sum(t.seconds.values()) for t in transitions}
    for (before, after), grow_s in seconds.items():
        if after < before or rates[after] == rates[before]:
            continue
        growth = Growth(rate=rates[before], grown_rate=rates[after], grow_s=grow_s, shrink_s=seconds[after, before])
        recorded = [] if trace is None or stay_s else stays_s(trace, after)
        mean_s, gain = stay_s, 0.0
        if stay_s:
            gain = float(growth.mean_gain(stay_s))
        elif recorded:
            mean_s, gain = float(np.mean(recorded)), growth.recorded_gain(recorded)
        yield StepUp(before=before, after=after, least_s=growth.least_s, stay_s=mean_s, gain=gain)
