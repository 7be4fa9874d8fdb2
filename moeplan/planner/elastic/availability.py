"""How many nodes are there: rates, shares of running time, and recorded histories.

Birth and death over the nodes present, up to `most`: n -> n-1 at n lam, n -> n+1 at (most - n) mu, so that in the long run
    pi(n-1) / pi(n) = n lam / ((most - n + 1) mu)
A job of n nodes fails at n lam + lam0: small jobs fail more often than their nodes alone explain. Below the fewest nodes it
waits, and shares are of the time it runs. Counts that are not planned for use the next planned one below, with spares.
Units: seconds, 1/s. Failures are independent and memoryless; not valid where a switch takes many nodes with it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import FileError, ProblemError, SchemaError

DAY_S = 86400.0
NODE_MTBF_S = 1000.0 / 6.5 * DAY_S
"""6.50 failures per 1000 node-days: Meta's RSC-1 (Kokolis et al. 2024)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """How often nodes leave and how long they stay away."""

    node_mtbf_s: float = NODE_MTBF_S
    """Mean seconds until a node leaves: it fails, or is taken for another job."""
    job_rate: float = 0.0
    """Failures per second of a job whatever its size, after which all its nodes are still there."""
    repair_s: float = 6 * 3600.0
    """Mean seconds until a node that left, or another in its place, is there."""
    notice_s: float = 0.0
    """Seconds of warning before a node leaves; 0: none."""

    def __post_init__(self) -> None:
        if not 0.0 < self.node_mtbf_s < math.inf:
            raise ProblemError(f"a mean time between failures of a node of {self.node_mtbf_s:g} s", hint="give a positive time")
        for name, word in (
            ("job_rate", "failures of the job per second"),
            ("repair_s", "s of repair"),
            ("notice_s", "s of notice"),
        ):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ProblemError(f"{getattr(self, name):g} {word}", hint="give 0 or more")

    def failures_per_s(self, nodes: Any) -> Any:
        """Failures per second of a job on `nodes` nodes."""
        return nodes / self.node_mtbf_s + self.job_rate

    def mtbf_s(self, nodes: Any) -> Any:
        """Mean seconds between failures of a job on `nodes` nodes."""
        return 1.0 / self.failures_per_s(nodes)

    def presence(self, most: int) -> Any:
        """Share of all time in which 0, 1, .. `most` of that many nodes are there; [most + 1]."""
        # away: missing nodes are independent, so that the ratios of birth and death make a binomial
        away = self.repair_s / (self.node_mtbf_s + self.repair_s)
        n = np.arange(most + 1)
        with np.errstate(divide="ignore", invalid="ignore"):  # nodes that are never away
            logs = _log_choose(most, n) + np.where(n < most, (most - n) * np.log(away), 0.0) + n * math.log1p(-away)
        return np.exp(logs)

    def running_share(self, fewest: int, most: int) -> float:
        """Share of all time in which at least `fewest` of `most` nodes are there."""
        return float(min(1.0, self.presence(most)[fewest:].sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """Node counts of a plan: the shares of running time at each, and how often one gives way to another."""

    counts: tuple[int, ...]
    """Planned node counts, rising."""
    shares: Any
    """Share of running time at each; [counts], sums to 1."""
    rates: Any
    """Changes per second of running time at count i to count j; [counts, counts]. On the diagonal: failures after which the job
    goes on at the same count, because only it failed, a spare takes over, or it waits for a node."""

    @property
    def skips(self) -> bool:
        """Whether counts that are no neighbours follow each other."""
        return bool(np.triu(self.rates, 2).any() or np.tril(self.rates, -2).any())


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A recorded history of the nodes that were there."""

    times_s: tuple[float, ...]
    """When the number changed, rising; the last ends the record."""
    nodes: tuple[int, ...]
    """Nodes from each time on; the last only says what followed."""

    @property
    def spans_s(self) -> Any:
        """Seconds at each number of nodes; [times - 1]."""
        return np.diff(self.times_s)


def occupancy(availability: Availability, counts: Sequence[int], most: int | None = None) -> Occupancy:
    """Shares and rates of planned counts, of `most` nodes (the largest count by default)."""
    planned = _planned(counts)
    most = planned[-1] if most is None else most
    if most < planned[-1]:
        raise ProblemError(f"a plan for {planned[-1]} nodes of a cluster of {most}", hint=f"plan for {most} nodes at most")
    n = np.arange(planned[0], most + 1)
    presence = availability.presence(most)[planned[0] :]
    present = presence / presence.sum()
    place = np.searchsorted(planned, n, side="right") - 1
    shares = np.bincount(place, present, len(planned))
    # flows per second of running time; those down and up across a border are equal, which spares a repair of 0 seconds
    down = present * n / availability.node_mtbf_s
    flow = np.zeros((len(planned), len(planned)))
    np.add.at(flow, (place, np.concatenate([[0], place[:-1]])), down)
    across = np.diagonal(flow, -1)
    flow[np.arange(len(planned) - 1), np.arange(1, len(planned))] = across
    rates = np.divide(flow, shares[:, None], out=np.zeros_like(flow), where=shares[:, None] > 0.0)
    rates[np.diag_indices(len(planned))] += availability.job_rate
    return Occupancy(counts=planned, shares=shares, rates=rates)


def trace_occupancy(trace: Trace, counts: Sequence[int], job_rate: float = 0.0) -> Occupancy:
    """Shares and rates of planned counts as they were recorded; changes may skip counts."""
    planned = _planned(counts)
    place = np.searchsorted(planned, trace.nodes, side="right") - 1
    runs = place[:-1] >= 0
    spent_s = np.bincount(place[:-1][runs], trace.spans_s[runs], len(planned))
    if spent_s.sum() <= 0.0:
        message = f"the trace never has the {planned[0]} nodes of the smallest planned count; it has {max(trace.nodes)} at most"
        raise ProblemError(message, hint=f"plan for {max(trace.nodes)} nodes or fewer")
    events = np.zeros((len(planned), len(planned)))
    for before, after, left, come in zip(place, place[1:], trace.nodes, trace.nodes[1:], strict=False):
        if before >= 0 and (after != before or come < left):
            # a job that has to wait goes on at the same count, as far as its layouts go
            events[before, after if after >= 0 else before] += 1.0
    rates = np.divide(events, spent_s[:, None], out=np.zeros_like(events), where=spent_s[:, None] > 0.0)
    rates[np.diag_indices(len(planned))] += job_rate
    return Occupancy(counts=planned, shares=spent_s / spent_s.sum(), rates=rates)


def fitted(trace: Trace, most: int | None = None, *, job_rate: float = 0.0, notice_s: float = 0.0) -> Availability:
    """The rates under which a trace is most likely: departures per node-second, arrivals per second that a node is missing."""
    most = max(trace.nodes) if most is None else most
    changes = np.diff(trace.nodes)
    departures, arrivals = -changes[changes < 0].sum(), changes[changes > 0].sum()
    there_s = float((trace.spans_s * np.array(trace.nodes[:-1])).sum())
    away_s = float((trace.spans_s * (most - np.array(trace.nodes[:-1]))).sum())
    if not departures or there_s <= 0.0:
        raise ProblemError("no node leaves in the trace", hint="give the mean time between failures of a node in its place")
    # nodes that never come back were away for all that was recorded
    repair_s = away_s / max(1, int(arrivals))
    return Availability(node_mtbf_s=there_s / float(departures), repair_s=repair_s, job_rate=job_rate, notice_s=notice_s)


def stays_s(trace: Trace, nodes: int) -> list[float]:
    """Seconds of each time in which so many nodes or more were there, the last one as far as it was recorded."""
    found: list[float] = []
    before = False
    for there, span_s in zip(trace.nodes, trace.spans_s, strict=False):
        if there >= nodes:
            found.append(float(span_s) + (found.pop() if before else 0.0))
        before = there >= nodes
    return found


def load_trace(path: str | Path) -> Trace:
    """The history in a CSV file with columns `time_s` and `nodes`; the last line ends it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}", hint="give a CSV file with the columns time_s,nodes") from None
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in ("time_s", "nodes") if name not in columns]
    if missing:
        message = f"{path}, line 1: no column {' and '.join(missing)}; there is {', '.join(columns) or 'nothing'}"
        raise SchemaError(message, hint="the first line is time_s,nodes")
    reader.fieldnames = columns
    times_s: list[float] = []
    nodes: list[int] = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        time_s, count = _number(row["time_s"], "time_s", where), _number(row["nodes"], "nodes", where)
        if count != int(count):
            raise SchemaError(f"{where}: {count:g} nodes", hint="give a whole number of nodes")
        if times_s and time_s == times_s[-1]:
            message = f"{where}: time {time_s:g} s overlaps the line before, which has the same time"
            raise SchemaError(message, hint="give one line for each time")
        if times_s and time_s < times_s[-1]:
            message = f"{where}: time {time_s:g} s is before {times_s[-1]:g} s of the line before"
            raise SchemaError(message, hint="sort the lines by time_s")
        times_s.append(time_s)
        nodes.append(int(count))
    if len(times_s) < 2:
        raise SchemaError(f"{path}: fewer than two lines below the first", hint="give two or more; the last ends the record")
    return Trace(times_s=tuple(times_s), nodes=tuple(nodes))


def _number(text: str | None, column: str, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise SchemaError(f"{where}: {column} is '{(text or '').strip()}', no number", hint="give 0 or more") from None
    if not 0.0 <= value < math.inf:
        raise SchemaError(f"{where}: {column} is {value:g}", hint="give 0 or more")
    return value


def _planned(counts: Sequence[int]) -> tuple[int, ...]:
    planned = tuple(sorted(set(counts)))
    if not planned or planned[0] < 1:
        raise ProblemError(f"planned node counts {list(counts)}", hint="give counts of 1 node or more")
    return planned


def _log_choose(n: int, k: Any) -> Any:
    """Logarithm of the binomial coefficients n over k."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, n + 1.0)))])
    return logs[n] - logs[k] - logs[n - k]
