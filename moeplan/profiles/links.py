"""Samples of messages between ranks to curves and to the law of links that nobody measured.

A group "16/2" is 16 ranks in 2 scale-up domains. What was measured becomes a curve through the medians. For other groups across
domains two rates and a latency follow the law of costmodels/collectives.py, which the curves inside a domain complete:

    ring        max(inside of the local ranks, B (1 - 1/domains) / local / rate + hop (domains - 1)); all-reduce: there and back
    all-to-all  max(inside of the local ranks, B (1 - local/ranks) / rate + hop (domains - 1))
    send        B / rate + hop

Errors of the law are those on groups that it did not see. Bytes B are those of nccl-tests. Units: bytes, seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from moeplan.errors import SchemaError
from moeplan.profiles.curve_fit import BLANK, LOOSE, PRIOR, fit_curve, linear, named, quality, rounded, source_of
from moeplan.profiles.curves import CollectiveCurve, DispatchCurve
from moeplan.profiles.least_squares import Array, minimize
from moeplan.profiles.samples import Sample

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
"""Operations with a curve through their medians."""
BETWEEN = {"error": 0.27, "error_p90": 0.40}
"""Errors between the knots over those at a knot that is left out, which doubles their distance: medians over 68 tables of NCCL
within a node (aiconfigurator-core 0.12.0)."""
RING, ALL_TO_ALL, HOP = 0, 1, 2
"""Places of the parameters of the law."""
_RING_STEPS = {"all_gather": ("all_gather",), "reduce_scatter": ("reduce_scatter",),
               "all_reduce": ("reduce_scatter", "all_gather"), "all_to_all": ("all_to_all",), "send": ("send",)}  # fmt: skip
"""Which collectives of the local ranks an operation across domains runs beside its traffic, one after the other."""

Curves: TypeAlias = Mapping[str, Mapping[int, CollectiveCurve]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkLaw:
    """Rates and latency of links; None: not measured."""

    ring_bytes_per_s: float | None = None
    """One GPU between domains, in rings and sends."""
    all_to_all_bytes_per_s: float | None = None
    """One GPU between domains, in all-to-alls."""
    hop_s: float | None = None
    """One hop between domains."""
    send_bytes_per_s: float | None = None
    """One GPU to one peer of its domain."""
    error: float = 0.0
    """Median of |law / measured - 1| on groups that the law did not see."""
    error_p90: float = 0.0
    samples: int = 0
    residuals: tuple[float, ...] = ()
    """law / measured - 1 of the samples across domains, in their order."""
    source: str = ""
    """What ran across domains."""
    send_error: float = 0.0
    """Median error of the rate of a send inside a domain."""
    send_source: str = ""
    """What ran inside a domain."""


def placement(sample: Sample) -> tuple[int, int]:
    """Ranks and domains of a sample's group."""
    ranks, _, domains = sample.group.partition("/")
    if not (ranks.isdecimal() and domains.isdecimal() and int(ranks) >= 2 and 1 <= int(domains) <= int(ranks)):
        raise SchemaError(f"sample '{named(sample)}': '{sample.group}' is no group", hint="write ranks/domains, like 16/2")
    return int(ranks), int(domains)


def collective_curves(
    samples: Sequence[Sample], remarks: list[str]
) -> tuple[dict[str, dict[int, CollectiveCurve]], dict[str, dict[str, CollectiveCurve]]]:
    """Curves inside a domain by operation and ranks, and across domains by operation and group."""
    inside: dict[str, dict[int, CollectiveCurve]] = defaultdict(dict)
    across: dict[str, dict[str, CollectiveCurve]] = defaultdict(dict)
    by_group: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.op in COLLECTIVES:
            by_group[sample.op, sample.group].append(sample)
    for (op, group), some in sorted(by_group.items(), key=lambda item: (item[0][0], placement(item[1][0]))):
        if len({s.sizes["message_bytes"] for s in some}) < 2:
            remarks.append(f"{op} of group {group}: measured at one size, a curve needs 2")
            continue
        ranks, domains = placement(some[0])
        if domains == 1:
            inside[op][ranks] = _through(some)
        else:
            across[op][group] = _through(some)
    return dict(inside), dict(across)


def _through(samples: Sequence[Sample]) -> CollectiveCurve:
    """The curve through the median of every size; where a larger message was faster, the smaller one takes its time."""
    by_size: dict[float, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_size[sample.sizes["message_bytes"]].append(sample)
    sizes = np.array(sorted(by_size))
    measured = np.array([np.median([s.seconds for s in by_size[size]]) for size in sizes])
    times = np.minimum.accumulate(measured[::-1])[::-1]  # noise only ever adds
    spread = np.array([max(s.spread for s in by_size[size]) for size in sizes])
    known = {"error": float(f"{np.median(spread):.3g}"), "error_p90": float(f"{np.quantile(spread, 0.9):.3g}")}
    if len(sizes) > 2:  # each size from its neighbours
        x, y = np.log(sizes), np.log(times)
        guess = y[:-2] + (y[2:] - y[:-2]) * (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
        missed = quality(np.abs(np.exp(guess) / measured[1:-1] - 1.0))
        known = {name: max(known[name], float(f"{BETWEEN[name] * missed[name]:.3g}")) for name in known}
    return CollectiveCurve(
        times_s=tuple(times.tolist()),
        sizes_bytes=tuple(sizes.tolist()),
        samples=len(samples),
        valid={"message_bytes": (float(sizes[0]), float(sizes[-1]))},
        source=source_of(samples),
        residuals=rounded(
            np.array([times[np.searchsorted(sizes, s.sizes["message_bytes"])] / s.seconds - 1.0 for s in samples])
        ),
        **known,
    )


def skewed_ratio(samples: Sequence[Sample]) -> float | None:
    """How much longer a skewed all-to-all takes than an even one of the same group and size; None: not measured."""
    even = {(s.group, s.sizes["message_bytes"]): s.seconds for s in samples if s.op == "all_to_all"}
    both = [
        s.seconds / even[at]
        for s in samples
        if s.op == "all_to_all_skewed" and (at := (s.group, s.sizes["message_bytes"])) in even
    ]
    return float(np.median(both)) if both else None


def dispatch_curves(samples: Sequence[Sample], remarks: list[str]) -> dict[str, DispatchCurve]:
    """DeepEP by phase, inside a domain and across."""
    parts: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.op == "deepep":
            parts[f"deepep-{sample.key}" + "-scale-out" * (placement(sample)[1] > 1)].append(_leaving(sample))
    return {key: _dispatch(some, remarks) for key, some in sorted(parts.items())}


def _leaving(sample: Sample) -> Sample:
    """The sample with `link_bytes` that leave a rank: a copy of each token to every other holder of one of its experts.

    A holder is a domain where domains are crossed (forwarding inside hides behind that), else a rank; routing is free.
    """
    ranks, domains = placement(sample)
    places = domains if domains > 1 else ranks
    copies = (places - 1.0) * (1.0 - (1.0 - 1.0 / places) ** sample.sizes["topk"])
    return replace(sample, sizes={"link_bytes": copies * sample.sizes["message_bytes"], **sample.sizes})


def _dispatch(samples: Sequence[Sample], remarks: list[str]) -> DispatchCurve:
    best = max(s.sizes["link_bytes"] / s.seconds for s in samples)
    start = DispatchCurve(latency_s=0.5 * min(s.seconds for s in samples), bytes_per_s=best, **BLANK)
    return fit_curve(start, samples, ("link_bytes",), {"latency_s": 3.0, "bytes_per_s": 3.0}, remarks)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Samples across domains as arrays: [rows], `inside` [steps, rows]."""

    groups: Array
    rate: Array
    """Place of the rate that a sample tells of."""
    crossing: Array
    hops: Array
    inside: Array
    """Seconds of the local ranks' collectives, not-a-number where an operation has fewer steps."""
    measured: Array

    def take(self, mask: Array) -> _Rows:
        return _Rows(
            self.groups[mask], self.rate[mask], self.crossing[mask], self.hops[mask], self.inside[:, mask], self.measured[mask]
        )


def link_law(samples: Sequence[Sample], inside: Curves, remarks: list[str]) -> LinkLaw:
    """Rates and latency that explain all samples across domains, and the rate of a send inside one."""
    law = _across([s for s in samples if s.op in _RING_STEPS and placement(s)[1] > 1 and _explained(s, inside)], inside)
    sends = [s for s in samples if s.op == "send" and placement(s)[1] == 1]
    if not sends:
        return law
    send = linear(sends, "message_bytes", remarks)
    return replace(law, send_bytes_per_s=send.bytes_per_s, send_error=send.error, send_source=send.source)


def _across(samples: Sequence[Sample], inside: Curves) -> LinkLaw:
    if not samples:
        return LinkLaw()
    rows = _rows(samples, inside)
    found, apart, kinds = _fit(rows), np.unique(rows.groups), set(rows.rate.tolist())
    unseen = []
    for group in apart if len(apart) > 1 else ():
        seen = rows.groups != group
        if set(rows.rate[seen].tolist()) == kinds:  # else nothing tells of one of the rates
            unseen.append(_residuals(_fit(rows.take(seen)), rows.take(~seen)))
    residuals, rates = _residuals(found, rows), np.exp(found)
    judged = quality(np.abs(np.concatenate(unseen) if unseen else residuals))
    return LinkLaw(
        ring_bytes_per_s=float(rates[RING]) if RING in kinds else None,
        all_to_all_bytes_per_s=float(rates[ALL_TO_ALL]) if ALL_TO_ALL in kinds else None,
        hop_s=float(rates[HOP]),
        samples=len(samples),
        residuals=rounded(residuals),
        source=source_of(samples),
        error=judged["error"],
        error_p90=judged["error_p90"],
    )


def _explained(sample: Sample, inside: Curves) -> bool:
    """Whether the law can be compared with a sample: its local ranks were measured, if there are several in a domain."""
    ranks, domains = placement(sample)
    local = ranks // domains
    return ranks % domains == 0 and (local == 1 or all(local in inside.get(op, {}) for op in _RING_STEPS[sample.op]))


def _rows(samples: Sequence[Sample], inside: Curves) -> _Rows:
    ranks, domains = np.array([placement(s) for s in samples]).T
    local, message = ranks // domains, np.array([s.sizes["message_bytes"] for s in samples])
    even = np.array([s.op == "all_to_all" for s in samples])
    sent = np.array([s.op == "send" for s in samples])
    ring = message * (1.0 - 1.0 / domains) / local
    beside = np.full((2, len(samples)), np.nan)
    for i, s in enumerate(samples):
        for step, op in enumerate(_RING_STEPS[s.op]):
            # an all-to-all keeps the share of the local ranks inside the domain
            kept = message[i] * local[i] / ranks[i] if s.op == "all_to_all" else message[i]
            beside[step, i] = inside[op][int(local[i])].seconds(kept) if local[i] > 1 else 0.0
    return _Rows(
        groups=np.array([s.group for s in samples]),
        rate=np.where(even, ALL_TO_ALL, RING),
        crossing=np.where(even, message * (1.0 - local / ranks), np.where(sent, message, ring)),
        hops=np.where(sent, 1, domains - 1),
        inside=beside,
        measured=np.array([s.seconds for s in samples]),
    )


def _law_s(logs: Array, rows: _Rows) -> Any:
    outside = rows.crossing / np.exp(logs[rows.rate]) + np.exp(logs[HOP]) * rows.hops
    return np.nansum(np.maximum(rows.inside, outside), axis=0)


def _residuals(logs: Array, rows: _Rows) -> Array:
    return np.asarray(_law_s(logs, rows) / rows.measured - 1.0)


def _fit(rows: _Rows) -> Array:
    """Logs of the two rates and of the latency; a rate that no sample tells of stays where it starts."""
    best = [
        float(np.max(np.where(rows.rate == kind, rows.crossing / rows.measured, 0.0))) or 1.0 for kind in (RING, ALL_TO_ALL)
    ]
    start = np.log([*best, 0.5 * float(np.min(rows.measured / rows.hops))])
    reach = np.log([LOOSE, LOOSE, LOOSE])

    def misses(logs: Array) -> Array:
        return np.concatenate([np.log(_law_s(logs, rows) / rows.measured), PRIOR * (logs - start)])

    return minimize(misses, start, start - reach, start + reach)
