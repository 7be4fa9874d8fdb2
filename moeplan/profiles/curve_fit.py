"""One curve through samples: robust fit in log parameters, cross-validated.

Minimises log(curve / measured) with a robust loss and a weak pull of each log parameter to its start. The errors that the curve
carries are those of a cross-validation in `FOLDS` parts by shape, so repeats of a shape stay together. Samples whose repeats
spread widely count less; those far off their curve are named, not dropped: the loss keeps them from ruling.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from moeplan.profiles.curves import Curve, StreamCurve
from moeplan.profiles.least_squares import Array, minimize
from moeplan.profiles.samples import Sample

C = TypeVar("C", bound=Curve)
Evaluate: TypeAlias = Callable[[Any, Mapping[str, Array]], Any]
"""Seconds of a curve at the sizes of rows."""

FOLDS = 5
"""Parts of a cross-validation."""
PRIOR = 0.02
"""Pull of each log parameter to its start: nothing beside twenty samples, decisive where they leave it open."""
OUTLIER, OUTLIER_SPREADS = math.log(1.5), 5.0
"""A sample is an outlier that is off by more than this log and by more than so many spreads of the others."""
STEADY = 0.1
"""Spread up to which a sample counts in full; beyond it counts less, as the misfit of a form is of this size too."""
LOOSE = 30.0
"""Factor by which a parameter may leave its start."""
BLANK: Mapping[str, Any] = {"error": 0.0, "error_p90": 0.0, "samples": 0, "valid": {}, "source": ""}
"""What a curve carries before it is fitted."""
_BOUNDS = {"sharpness": (1.0, 8.0), "backward_ratio": (0.3, 20.0)}


def fit_curve(
    start: C,
    samples: Sequence[Sample],
    names: Sequence[str],
    most: Mapping[str, float],
    remarks: list[str],
    evaluate: Evaluate | None = None,
) -> C:
    """The curve of `start`'s form that fits samples best; its outliers go to `remarks`.

    `names` are the arguments of the form, `most` the parameters that are fitted and the factor by which they may exceed their
    start. `evaluate` says what a curve gives for sizes, where that is not `seconds(**sizes)`.
    """
    sizes = {name: np.array([s.sizes.get(name, 0.0) for s in samples]) for name in names}
    measured = seconds_of(samples)
    weight = 1.0 / np.hypot(1.0, np.minimum([s.spread for s in samples], 1.0) / STEADY)
    give = evaluate or (lambda curve, rows: curve.seconds(**rows))
    curve = _least(start, sizes, measured, weight, most, give)
    fold = folds([s.case[2:] for s in samples])
    unseen = []
    for part in np.unique(fold):
        out, seen = fold == part, fold != part
        other = _least(start, _take(sizes, seen), measured[seen], weight[seen], most, give) if seen.any() else curve
        unseen.append(np.abs(give(other, _take(sizes, out)) / measured[out] - 1.0))
    residuals = give(curve, sizes) / measured - 1.0
    odd = outliers(samples, residuals)
    remarks += [f"outlier: {text}" for text in odd]
    return dataclasses.replace(
        curve,
        **quality(np.concatenate(unseen)),
        samples=len(samples),
        valid=spans(samples, names),
        source=source_of(samples, len(odd)),
        residuals=rounded(residuals),
    )


def linear(samples: Sequence[Sample], size: str, remarks: list[str], *, fused: bool = False) -> StreamCurve:
    """t = launch + B/BW through samples; one size alone is all rate."""
    moved, seconds = column(samples, size), seconds_of(samples)
    start = StreamCurve(launch_s=0.2 * float(seconds.min()), bytes_per_s=float(np.max(moved / seconds)), fused=fused, **BLANK)
    free = {"launch_s": LOOSE, "bytes_per_s": 3.0}
    if len(set(moved.tolist())) == 1:
        start, free = dataclasses.replace(start, launch_s=0.0), {"bytes_per_s": 3.0}
    return fit_curve(start, samples, (size,), free, remarks, lambda curve, rows: curve.seconds(rows[size]))


def folds(shapes: Sequence[Any]) -> Array:
    """Part of the cross-validation of each row; equal shapes share one, neighbours of a grid do not."""
    known = sorted(set(shapes), key=repr)
    part = dict(zip(known, np.random.default_rng(0).permutation(len(known)) % FOLDS, strict=True))
    return np.array([part[shape] for shape in shapes])


def _take(sizes: Mapping[str, Array], mask: Array) -> dict[str, Array]:
    return {name: value[mask] for name, value in sizes.items()}


def _least(
    start: C, sizes: Mapping[str, Array], measured: Array, weight: Array, most: Mapping[str, float], give: Evaluate
) -> C:
    """The curve with its free parameters fitted."""
    free = list(most)
    origin = np.log([getattr(start, name) for name in free])
    spread = [(-math.log(LOOSE), math.log(most[name])) for name in free]
    low, high = (origin + np.array(side) for side in zip(*spread, strict=True))
    for i, name in enumerate(free):
        if name in _BOUNDS:
            low[i], high[i] = np.log(_BOUNDS[name])

    def with_parameters(x: Array) -> C:
        return dataclasses.replace(start, **dict(zip(free, np.exp(x).tolist(), strict=True)))

    def misses(x: Array) -> Array:
        return np.concatenate([weight * np.log(give(with_parameters(x), sizes) / measured), PRIOR * (x - origin)])

    return with_parameters(np.log([float(f"{v:.5g}") for v in np.exp(minimize(misses, origin, low, high))]))


def outliers(samples: Sequence[Sample], residuals: Array) -> list[str]:
    """Samples far off their curve, in words; `residuals` are curve over measured - 1."""
    logs = -np.log1p(residuals)
    limit = max(OUTLIER, OUTLIER_SPREADS * 1.4826 * float(np.median(np.abs(logs))))
    odd = np.flatnonzero(np.abs(logs) > limit).tolist()
    return [f"{named(samples[i])} took {math.exp(logs[i]):.2g} times what its curve says" for i in odd]


def named(sample: Sample) -> str:
    """A sample in words."""
    sizes = " ".join(f"{name}={value:g}" for name, value in sample.sizes.items())
    return " ".join(filter(None, (sample.op, sample.key, sizes, f"group {sample.group}" * bool(sample.group))))


def seconds_of(samples: Sequence[Sample]) -> Array:
    """Measured seconds, [rows]."""
    return np.array([s.seconds for s in samples])


def column(samples: Sequence[Sample], name: str) -> Array:
    """One size of all samples, [rows]."""
    return np.array([s.sizes[name] for s in samples])


def spans(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Least and greatest of every size that all samples have; those of `names` first."""
    known = [n for n in dict.fromkeys([*names, *samples[0].sizes]) if all(n in s.sizes for s in samples)]
    return {n: (min(s.sizes[n] for s in samples), max(s.sizes[n] for s in samples)) for n in known}


def quality(misses: Array) -> dict[str, float]:
    """The two errors that a curve carries."""
    return {"error": float(f"{np.median(misses):.3g}"), "error_p90": float(f"{np.quantile(misses, 0.9):.3g}")}


def rounded(residuals: Array) -> tuple[float, ...]:
    """Residuals as a curve keeps them."""
    return tuple(float(f"{r:.3g}") for r in residuals)


def source_of(samples: Sequence[Sample], odd: int = 0) -> str:
    """What ran, the most frequent first, and how many samples are outliers."""
    hows = [how for how, _ in Counter(s.how for s in samples if s.how).most_common()]
    told = "; ".join([*hows[:3], *(["others"] if len(hows) > 3 else [])]) or "measured"
    return f"{told}; {odd} of {len(samples)} samples {'is an outlier' if odd == 1 else 'are outliers'}" if odd else told
