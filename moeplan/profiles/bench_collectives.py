"""Times of collectives on groups of ranks, as a layout would run them: all groups of a placement at the same time.

A repeat is what the slowest rank of all groups took. Ranks begin it together (a tiny all-reduce of all ranks before it is not
timed); short operations are timed in batches behind a pause that lets the host queue them. Message bytes are those of
nccl-tests: all-gather: output, reduce-scatter: input, all-to-all: whole buffer, all-reduce: tensor, send: one message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from moeplan.profiles.cases import Case, UnsupportedCase
from moeplan.profiles.ranks import placement
from moeplan.profiles.timing import PRECISION, Timing, repeated
from moeplan.profiles.world import World

_cuda: Any = torch.cuda

Start: TypeAlias = Callable[[], Sequence[Any]]
"""Starts an operation and gives what to wait for."""
CollectiveHook: TypeAlias = Callable[[str, int], None]
"""Called with operation and message bytes inside what is timed: lets a test slow one collective down."""

COLLECTIVE_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_skewed", "send")
"""Operations that torch.distributed runs."""
FULLEST = 1.5
"""What the fullest rank of a skewed all-to-all receives over the mean; the others follow in even steps down to the emptiest."""
_BATCH_S = {"cuda": 200e-6, "cpu": 1e-3}
"""Least seconds of a batch, long against the unrest after the common start."""
_ROUND_S, _MOST_IN_ROUND = 0.25, 8
"""Repeats are made in rounds about this long, since ranks exchange their times after each."""
_MOST_IN_BATCH = 256
"""A device's queue holds about a thousand launches."""
_PAUSE_CYCLES_PER_S, _MOST_PAUSE_S = 2e9, 20e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one case gave."""

    timing: Timing
    how: str
    """Implementation that ran."""
    sizes: dict[str, float] = field(default_factory=dict)
    """Sizes that only the measurement told."""


class GroupBench:
    """Measures operations of all ranks of a world; every rank calls the same methods in the same order."""

    def __init__(self, world: World, per_domain: int, hook: CollectiveHook | None = None) -> None:
        """`per_domain` ranks share a scale-up domain."""
        self.world, self.per_domain = world, per_domain
        self._hook = hook
        self._signal = torch.zeros(1, device=world.device)

    def collective(self, case: Case, budget_s: float, precision: float = PRECISION) -> Measured:
        """Time of one collective case."""
        timing = self.timed(named(case), self.starter(case), budget_s, precision)
        return Measured(timing=timing, how=self.how(case))

    def how(self, case: Case) -> str:
        """What runs a collective."""
        groups = len(placement(self.world.ranks, self.per_domain, case.group))
        beside = f", {groups} groups at once" if groups > 1 else ""
        skew = f", the fullest rank receives {FULLEST:g} x the mean" if case.op == "all_to_all_skewed" else ""
        return f"{self.world.library}{beside}{skew}"

    def starter(self, case: Case) -> Start:
        """What starts the collective of a case on this rank, which ran once; a rank in no group starts nothing."""
        mine = self.members(case.group)
        plain: list[Callable[[Any], Sequence[Any]]] = []
        message_bytes = int(case.sizes["message_bytes"])

        def allocate() -> None:
            if mine:
                try:
                    plain.append(_starter(case.op, message_bytes, mine, self.world))
                except torch.cuda.OutOfMemoryError:
                    raise UnsupportedCase(f"{named(case)} does not fit into memory") from None

        def start() -> Sequence[Any]:
            if not mine:
                return ()
            if self._hook is not None:
                self._hook(case.op, message_bytes)
            return plain[0](self.world.group(case.group, self.per_domain))

        def run_once() -> None:
            _offered(named(case), lambda: _run(start))
            _drain(self.world.device)

        self.world.collect(f"tensors of {named(case)}", allocate, _nothing)
        self.world.collect(f"the first {named(case)}", run_once, _nothing)
        return start

    def members(self, group: str) -> tuple[int, ...]:
        """Ranks of the group of this rank, empty if it is in none."""
        groups = placement(self.world.ranks, self.per_domain, group)
        return next((g for g in groups if self.world.rank in g), ())

    def timed(self, step: str, start: Start, budget_s: float, precision: float = PRECISION) -> Timing:
        """Time of an operation that all ranks run at once: of each repeat the slowest rank counts."""
        rounds = _Rounds(self.world, step, lambda batch: self._batch_s(start, batch))
        self.world.agree(None)  # so that all clocks stand alike
        least_s = _BATCH_S[self.world.device.type]
        return repeated(rounds.next_s, budget_s, precision, least_s, lambda: self.world.now_s)

    def _batch_s(self, start: Start, batch: int) -> float:
        """Seconds of a batch on this rank, begun together with the others."""
        if self.world.device.type == "cpu":
            dist.all_reduce(self._signal)
            began = time.perf_counter()
            for _ in range(batch):
                _run(start)
            return time.perf_counter() - began
        first, last = (_cuda.Event(enable_timing=True) for _ in range(2))
        # While the device pauses, the host queues what follows.
        pause_s = min(60e-6 * (batch + 2), _MOST_PAUSE_S)
        _cuda._sleep(int(pause_s * _PAUSE_CYCLES_PER_S))
        dist.all_reduce(self._signal)
        first.record()
        for _ in range(min(batch, _MOST_IN_BATCH)):
            _run(start)
        last.record()
        while not last.query():  # the main thread watches the time limit
            time.sleep(20e-6)
        return float(first.elapsed_time(last)) * 1e-3 * batch / min(batch, _MOST_IN_BATCH)


class _Rounds:
    """Seconds of batches, the slowest rank's of each, measured some at a time."""

    def __init__(self, world: World, step: str, batch_s: Callable[[int], float]) -> None:
        self._world, self._step, self._batch_s = world, step, batch_s
        self._ready: list[float] = []
        self._batch, self._last_s = 0, _ROUND_S

    def next_s(self, batch: int) -> float:
        if batch != self._batch or not self._ready:
            count = max(1, min(_MOST_IN_ROUND, int(_ROUND_S / max(self._last_s, 1e-9)))) if batch == self._batch else 1
            self._ready = self._world.collect(self._step, lambda: [self._batch_s(batch) for _ in range(count)], _slowest)
            self._batch = batch
        self._last_s = self._ready.pop(0)
        return self._last_s


def _slowest(times: list[list[float]]) -> list[float]:
    return [max(each) for each in zip(*times, strict=True)]


def _nothing(_: object) -> None:
    return None


def named(case: Case) -> str:
    """A collective case for people."""
    size = f" of {case.sizes['message_bytes']:,.0f} bytes" if "message_bytes" in case.sizes else ""
    return f"{case.op} {case.key}{size} in groups {case.group}"


def _run(start: Start) -> None:
    for work in start():
        if work is not None:
            work.wait()


def _drain(device: torch.device) -> None:
    """Wait for the device; the main thread watches the time limit."""
    if device.type == "cuda":
        done = _cuda.Event()
        done.record()
        while not done.query():
            time.sleep(20e-6)


_NOT_OFFERED = ("not support", "unsupported", "not implemented", "invalid scalar type")


def _offered(what: str, run: Callable[[], None]) -> None:
    """Run, and say so where the library does not offer it."""
    try:
        run()
    except (NotImplementedError, RuntimeError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, NotImplementedError) or any(word in text.lower() for word in _NOT_OFFERED):
            raise UnsupportedCase(f"{what}: {text}") from None
        raise


# Newer versions of torch have them under the names that come first, and warn of the others.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _starter(op: str, message_bytes: int, members: Sequence[int], world: World) -> Callable[[Any], Sequence[Any]]:
    """The collective on new tensors; it takes its process group."""
    n, place = len(members), members.index(world.rank)
    share = max(1, message_bytes // (2 * n))  # elements of bfloat16

    def tensor(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.bfloat16, device=world.device)

    if op == "all_reduce":
        whole = tensor(n * share)
        return lambda group: (dist.all_reduce(whole, group=group, async_op=True),)
    if op in ("all_gather", "reduce_scatter"):
        whole, part = tensor(n * share), tensor(share)
        if op == "all_gather":
            return lambda group: (_all_gather(whole, part, group=group, async_op=True),)
        return lambda group: (_reduce_scatter(part, whole, group=group, async_op=True),)
    if op in ("all_to_all", "all_to_all_skewed"):
        counts = skewed(share, n) if op == "all_to_all_skewed" else [share] * n
        sent, received = tensor(sum(counts)), tensor(n * counts[place])
        gets = [counts[place]] * n
        return lambda group: (dist.all_to_all_single(received, sent, gets, counts, group=group, async_op=True),)
    if op == "send":
        sent, received = tensor(n * share), tensor(n * share)
        to, source = members[(place + 1) % n], members[place - 1]
        return lambda group: dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, to, group), dist.P2POp(dist.irecv, received, source, group)]
        )
    raise UnsupportedCase(f"collective '{op}': not known here")


def skewed(share: int, ranks: int) -> list[int]:
    """Elements that a rank sends to each: `share` on average, even steps from little to `FULLEST` times as much."""
    spread = FULLEST - 1.0
    return [max(1, round(share * (1.0 - spread + 2.0 * spread * i / (ranks - 1)))) for i in range(ranks)]
