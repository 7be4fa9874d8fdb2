"""One run of `moeplan profile`: which case is next, on which ranks, until when.

Cases run in the order of their tiers. A case may take its even share of the budget; what it does not need goes to the others,
and what is left in the end into second visits, those of cases that are not known well first. Kernels run on rank 0, several in
one step, while the other ranks wait without spinning, or on CPUs, which share their memory, do the same; collectives on all
ranks. Every sample is on disk before the next case begins, so that Ctrl-C, a dead rank or the end of the budget leave what
there is. Units: seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from moeplan.errors import FileError, MoeplanError
from moeplan.profiles.bench_collectives import COLLECTIVE_OPS, CollectiveHook, GroupBench, Measured
from moeplan.profiles.bench_deepep import deepep
from moeplan.profiles.bench_kernels import KERNEL_OPS, measured
from moeplan.profiles.bench_overlap import overlap
from moeplan.profiles.cases import Case, UnsupportedCase
from moeplan.profiles.samples import Environment, Sample, SampleLog
from moeplan.profiles.timing import PRECISION, Clock, Timing, clocks, merged
from moeplan.profiles.world import World

SLICE_S = 1.0
"""Kernels of about this long form one step."""
LEAST_CASE_S = 0.02
"""Budget of a case that comes when little is left."""
AGAIN = 0.3
"""Share of the budget that first visits leave to second ones: a minute later a machine may say something else."""
SLOW_RANK = 1.1
"""A rank is called slow from this multiple of the ranks' median time."""
_STRAGGLER_S = 1.0
_STRAGGLER = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the product that is compared between ranks."""
_SAME = ("device", "backend", "ranks", "per_node", "torch", "communication", "processors", "cluster")

Ending = Literal["complete", "budget", "interrupted", "failed"]
Progress = Callable[[int, int, float], None]
"""Takes the cases done, all cases, and the seconds that are left at the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a session measured; complete on rank 0 alone."""

    samples: tuple[Sample, ...]
    skipped: tuple[tuple[Case, str], ...] = ()
    """Cases that cannot run here, with the reason."""
    left: int = 0
    """Cases that were not reached."""
    ended: Ending
    failure: MoeplanError | None = None
    """Why it failed."""
    remarks: tuple[str, ...] = ()
    seconds: float = 0.0


def identity(case: Case | Sample) -> tuple[Any, ...]:
    """What is measured, without the sizes that only the measurement tells."""
    told = {"overlap": ("alone_compute_s", "alone_comm_s"), "deepep": ("message_bytes",)}.get(case.op, ())
    return (case.op, case.key, tuple(sorted((k, v) for k, v in case.sizes.items() if k not in told)), case.group)


def check_same(old: Environment, new: Environment, where: str) -> None:
    """Refuse to go on with samples of another machine."""
    for name in _SAME:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise FileError(
                f"{where} were measured with {name.replace('_', ' ')} '{before}', here it is '{now}'",
                hint="measure anew without --resume, or into another file",
            )


def measure(
    world: World,
    cases: Sequence[Case],
    log: SampleLog | None,
    *,
    budget_s: float,
    per_domain: int,
    progress: Progress | None = None,
    done: Container[tuple[Any, ...]] = frozenset(),
    precision: float = PRECISION,
    hook: CollectiveHook | None = None,
) -> Outcome:
    """Measure cases; every rank calls it with the same ones, rank 0 with the log and the progress.

    `done` holds the identities of cases that need not be measured; `hook` is called inside every collective that is timed.
    """
    todo = sorted((c for c in cases if identity(c) not in done), key=lambda c: c.tier)
    return _Session(world, todo, log, per_domain, budget_s, precision, progress, hook).run()


class _Session:
    """State of a run; what differs between ranks is only what rank 0 keeps."""

    def __init__(
        self,
        world: World,
        todo: list[Case],
        log: SampleLog | None,
        per_domain: int,
        budget_s: float,
        precision: float,
        progress: Progress | None,
        hook: CollectiveHook | None,
    ) -> None:
        self.world, self.todo, self.log = world, todo, log
        self.budget_s, self.precision, self.progress = budget_s, precision, progress
        self.bench = GroupBench(world, per_domain, hook) if world.ranks > 1 else None
        self.clock = Clock(world.device)
        self.samples: list[Sample] = []
        self.skipped: list[tuple[Case, str]] = []
        self.remarks: list[str] = []
        self.visits: dict[tuple[Any, ...], list[Timing]] = {}
        self.cases, self.at, self.began_s = len(todo), 0, 0.0

    def run(self) -> Outcome:
        failure = None
        try:
            self.world.agree(None)
            self.began_s = self.world.now_s
            if self.bench is not None:
                self._find_stragglers()
            ended = self._work_off()
            if ended == "complete":
                self.todo += [self.todo[i] for i in self.world.first("order of second visits", self._again)]
                ended = "interrupted" if self._work_off() == "interrupted" else "complete"
        except MoeplanError as error:
            ended, failure = "failed", error
        return Outcome(
            samples=tuple(self.samples),
            skipped=tuple(self.skipped),
            left=max(0, self.cases - self.at),
            ended=ended,
            failure=failure,
            remarks=tuple(self.remarks),
            seconds=self.world.now_s - self.began_s,
        )

    def _work_off(self) -> Ending:
        """Measure what is on the list, until it, the budget, or the user's patience ends."""
        while self.at < len(self.todo):
            if self.world.stopped or self._left_s() <= 0:
                return "interrupted" if self.world.stopped else "budget"
            self.at += self._next(self.at)
            if self.progress is not None:
                self.progress(self.at, len(self.todo), self._expected_s(self.at))
        return "complete"

    def _again(self) -> list[int]:
        """Places of the cases for a second visit: what is not known to the precision asked for, the worst first, then the rest.

        One visit tells how a machine repeats itself within a second; that it is the same a minute later, only a second one.
        """
        found = {case: max(t.spread for t in timings) for (case, _), timings in self.visits.items()}
        spreads = [found.get(identity(case), -1.0) for case in self.todo]
        unsure = sorted((i for i, spread in enumerate(spreads) if spread > self.precision), key=lambda i: -spreads[i])
        return unsure + [i for i, spread in enumerate(spreads) if 0.0 <= spread <= self.precision]

    def _left_s(self) -> float:
        return self.budget_s - (self.world.now_s - self.began_s)

    def _expected_s(self, at: int) -> float:
        spent = self.world.now_s - self.began_s
        return max(0.0, min(self.budget_s - spent, spent / at * (len(self.todo) - at)))

    def _share_s(self, left_s: float, at: int) -> float:
        if at < self.cases:
            return max(LEAST_CASE_S, (left_s - AGAIN * self.budget_s) / (self.cases - at))
        return max(LEAST_CASE_S, left_s / (len(self.todo) - at))

    def _next(self, at: int) -> int:
        """Measure what stands at a place of the list; how many cases that were."""
        case = self.todo[at]
        if case.op in KERNEL_OPS:
            left_s = self._left_s()
            everywhere = self.world.device.type == "cpu"
            work = (lambda: self._kernels(at, left_s)) if everywhere or self.world.rank == 0 else (lambda: 0)
            count = self.world.collect(f"kernels from {case.op} {case.key}", work, lambda counts: counts[0])
            assert isinstance(count, int)
            return count
        try:
            found = self._group_case(case, self._share_s(self._left_s(), at))
        except UnsupportedCase as error:
            self.skipped.append((case, error.message))
            return 1

        def write() -> None:
            for each in found:
                self._keep(case, each)

        self.world.first("writing samples", write)
        return 1

    def _group_case(self, case: Case, share_s: float) -> list[Measured]:
        if self.bench is None:
            raise UnsupportedCase(f"{case.op}: needs several ranks")
        if case.op == "overlap":
            return overlap(self.bench, case, share_s, self.precision)
        if case.op == "deepep":
            return [deepep(self.bench, case, share_s, self.precision)]
        if case.op not in COLLECTIVE_OPS:
            raise UnsupportedCase(f"{case.op}: nobody knows how to measure it")
        return [self.bench.collective(case, share_s, self.precision)]

    def _kernels(self, at: int, left_s: float) -> int:
        """Kernels one after the other on this rank, for a slice of time; only rank 0 keeps what they took."""
        began_s, first = time.monotonic(), at
        while at < len(self.todo) and self.todo[at].op in KERNEL_OPS:
            case, spent_s = self.todo[at], time.monotonic() - began_s
            if at > first and (spent_s > min(SLICE_S, left_s) or self.world.asked):
                break
            try:
                timing, how = measured(case, self.clock, self._share_s(left_s - spent_s, at), self.precision)
            except UnsupportedCase as error:
                if self.world.rank == 0:
                    self.skipped.append((case, error.message))
            else:
                if self.world.rank == 0:
                    self._keep(case, Measured(timing=timing, how=how))
            at += 1
        return at - first

    def _keep(self, case: Case, found: Measured) -> None:
        mhz, celsius = clocks(self.world.device)
        visits = self.visits.setdefault((identity(case), found.how), [])
        visits.append(found.timing)
        sample = Sample(
            op=case.op,
            key=case.key,
            sizes={**case.sizes, **found.sizes},
            group=case.group,
            seconds=found.timing.seconds,
            spread=max(found.timing.spread, merged(visits).spread if len(visits) > 1 else 0.0),
            times_s=found.timing.times_s,
            outliers=found.timing.outliers,
            how=found.how,
            clock_mhz=mhz,
            temperature_c=celsius,
        )
        if self.log is not None:
            self.log.add(sample)
        self.samples.append(sample)

    def _find_stragglers(self) -> None:
        """One product on every rank at the same time; slow ranks end up in a remark."""
        side = _STRAGGLER[self.world.device.type]
        case = Case(op="gemm", key="bf16", sizes={"m": side, "n": side, "k": side})
        share_s = min(_STRAGGLER_S, 0.05 * self.budget_s)

        def work() -> float:
            return measured(case, self.clock, share_s, self.precision)[0].seconds

        def slow(times_s: Sequence[float]) -> list[str]:
            median = float(np.median(times_s))
            return [
                f"rank {rank} ({self.world.hosts[rank]}) takes {time_s / median:.2f} x the median rank's time for a bf16 GEMM"
                for rank, time_s in enumerate(times_s)
                if time_s > SLOW_RANK * median
            ]

        try:
            self.remarks += self.world.collect("comparison of ranks", work, slow)
        except UnsupportedCase as error:
            self.remarks.append(f"ranks were not compared: {error.message}")


def done_cases(samples: Sequence[Sample]) -> frozenset[tuple[Any, ...]]:
    """Identities of what samples have measured."""
    return frozenset(identity(sample) for sample in samples)


def case_of(data: Mapping[str, Any]) -> Case:
    """A case from what `plain_case` made of it."""
    return Case(**data)


def plain_case(case: Case) -> dict[str, Any]:
    """A case as plain data, for the way to other ranks."""
    return {each.name: getattr(case, each.name) for each in fields(case)} | {"sizes": dict(case.sizes)}
