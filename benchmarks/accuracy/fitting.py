"""What is fitted to published runs, behind a small interface, so that a figure can also be given for a fit without some runs.

- `slopes(results)`: how the log of each step's seconds changes with the log of each parameter
- `fit(points)` finds parameters, `errors(points, parameters)` gives log(measured / predicted) under them
- `unfitted()` prices at the rates of short benchmarks

Parameters are factors on what is in use; one that is not named is 1. With slopes a run that was priced once need not be priced
again: log(predicted) changes by slope x log(factor). Fitted again here: the shares of kernel rates that steps sustain
(`moeplan/profiles/catalog/sustained.yaml`), by minimising

    sum_i w_i rho(log(predicted_i / measured_i)) + sum_p ((log p - log prior) / spread)^2

with rho linear beyond `ROBUST` (a row far off is no reason to bend the rest), w_i = 1 / sqrt(rows of the same source, model,
device and precision: a run published by nine releases is not nine facts) and one prior for all shares. A share that no other
run shows falls back to the prior.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

import moeplan.profiles
from benchmarks.accuracy.patching import replaced
from benchmarks.accuracy.rows import Result
from moeplan.costmodels.model import Model
from moeplan.planner.estimate import price_runs, profile_of
from moeplan.planner.robust import robust_change, shared_votes
from moeplan.profiles.hardware import Cluster
from moeplan.profiles.profile import Profile
from moeplan.records import load_yaml

Floats: TypeAlias = npt.NDArray[np.float64]
Parameters: TypeAlias = Mapping[str, float]

SUSTAINED = Path(moeplan.profiles.__file__).parent / "catalog" / "sustained.yaml"
PRIOR, SPREAD = 0.85, 0.15
"""What a step sustains of a kernel's rate where nothing is known, and how far the log of a share may lie from it."""
ROBUST = 0.06
"""Log error beyond which a row pulls no harder."""
STEP = 0.05
"""Change of a parameter's logarithm from which slopes are taken."""
IN_USE: Parameters = {}
"""The constants as they stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measured run with its prediction by part, and the keys by which a fit or a cross-validation may group."""

    id: str
    source: str
    """First part of its id: who measured."""
    model: str
    """A name of its architecture; versions and layer-truncated runs of the same layers share it."""
    device: str
    """The device, or the measured machine whose own curves priced it."""
    precision: str
    era: str
    kind: str
    """"dense" or "MoE"."""
    regime: str
    """Which prediction interval applies."""
    measured_s: float
    parts: Mapping[str, float]
    """Seconds of a step by part, with the constants in use."""
    slopes: Mapping[str, float]
    """Change of log(predicted) with the log of each parameter."""

    @property
    def predicted_s(self) -> float:
        """Seconds of a step with the constants in use."""
        return sum(self.parts.values())


def points(results: Sequence[Result], known: Sequence[Mapping[str, float]] = ()) -> list[Point]:
    """Points of results that are compared, in their order, with their slopes if they are `known`."""
    names = architecture_names([r.run.model for r in results])
    costs = [{} if r.priced.cost is None else {n: float(v) for n, v in r.priced.cost} for r in results]
    return [
        Point(
            id=r.priced.id,
            source=r.family,
            model=names[architecture(r.run.model)],
            device=r.device,
            precision=r.run.workload.precision.name,
            era=r.run.workload.era.name,
            kind=r.kind,
            regime=r.regime,
            measured_s=r.measured_s,
            parts=parts,
            slopes=slope,
        )
        for r, parts, slope in zip(results, costs, known or [{}] * len(costs), strict=True)
    ]


def architecture_names(models: Sequence[Model]) -> dict[tuple[object, ...], str]:
    """The shortest name met of each architecture."""
    names: dict[tuple[object, ...], str] = {}
    for model in models:
        key = architecture(model)
        names[key] = min(names.get(key, model.name), model.name, key=lambda n: (len(n), n))
    return names


def architecture(model: Model) -> tuple[object, ...]:
    """Hidden size and kinds of layers: Llama 3 and 3.1 are one, and so is a run with fewer of the same layers."""
    return (model.hidden, *model.kinds)


# -- the fit -------------------------------------------------------------------------------------------------------------


@functools.cache
def shares_in_use() -> dict[str, float]:
    """Sustained shares by name; entries of one kind of kernel that share a value are one parameter."""
    entries: dict[tuple[str, float], list[str]] = defaultdict(list)
    for device, shares in load_yaml(SUSTAINED, "catalog file").items():
        for kind, share in shares.items():
            entries[kind, share].append(device)
    return {f"{kind}, {', '.join(devices)}": share for (kind, share), devices in entries.items()}


def parameter_name(kind: str, share: float) -> str:
    """The parameter of a kind of kernel with the share that a profile uses."""
    return next(name for name, value in shares_in_use().items() if name.split(",")[0] == kind and value == share)


def slopes(results: Sequence[Result]) -> list[dict[str, float]]:
    """Change of log(predicted) with the log of each share, by pricing again with the shares of one kind of kernel moved."""
    out: list[dict[str, float]] = [{} for _ in results]
    for kind in dict.fromkeys(name.split(",")[0] for name in shares_in_use()):
        with shares_changed(functools.partial(_larger, kind)):
            moved = price_runs([r.row for r in results])
        for place, (r, priced) in enumerate(zip(results, moved, strict=True)):
            share = profile_of(r.run.cluster).sustained.get(kind)
            if share is not None and priced.cost is not None:
                change = float(np.log(float(priced.cost.total) / r.predicted_s)) / STEP
                out[place][parameter_name(kind, share)] = change
    return out


def _larger(kind: str, shares: Mapping[str, float]) -> dict[str, float]:
    return {k: v * float(np.exp(STEP)) if k == kind else v for k, v in shares.items()}


def fit(some: Sequence[Point], in_use: Mapping[str, float] | None = None) -> Parameters:
    """Factors on the shares `in_use` that minimise the objective over `some` points."""
    shares = shares_in_use() if in_use is None else in_use
    names = list(shares)
    # [n], [n, parameters], [n]
    off = errors(some, IN_USE)
    slope = np.array([[p.slopes.get(name, 0.0) for name in names] for p in some]).reshape(len(some), len(names))
    weights = shared_votes([(p.source, p.model, p.device, p.precision) for p in some])
    prior = np.log([PRIOR / shares[name] for name in names])
    change = robust_change(-off, slope, weights, scale=ROBUST, spread=np.full(len(names), SPREAD), pull=prior)
    return dict(zip(names, np.exp(change).tolist(), strict=True))


def errors(some: Sequence[Point], parameters: Parameters) -> Floats:
    """log(measured / predicted) of every point under `parameters`, [n]."""
    logs = {name: np.log(value) for name, value in parameters.items()}
    moved = [sum(p.slopes.get(name, 0.0) * log for name, log in logs.items()) for p in some]
    return np.array([np.log(p.measured_s / p.predicted_s) for p in some], np.float64) - np.array(moved, np.float64)


def fitted_numbers() -> list[str]:
    """Names of all numbers of moeplan that were fitted to runs, those that `fit` leaves alone included."""
    from benchmarks.fit import PARAMETERS

    return [parameter.name for parameter in PARAMETERS]


@contextlib.contextmanager
def shares_changed(change: Callable[[Mapping[str, float]], Mapping[str, float]]) -> Iterator[None]:
    """Price with other sustained shares, those in use by kind of kernel changed by `change`."""

    def other(cluster: Cluster) -> Profile:
        profile = profile_of(cluster)
        return dataclasses.replace(profile, sustained=change(profile.sustained))

    with replaced("profile_of", profile_of, other):
        yield


def unfitted() -> AbstractContextManager[None]:
    """Price at the rates of short benchmarks."""
    return shares_changed(lambda shares: {})
