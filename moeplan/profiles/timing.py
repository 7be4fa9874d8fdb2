"""Times of short operations, measured so that two runs agree.

Warm-up, then repeats until the 95 % confidence interval of their median is narrow enough or the budget ends. A run shorter than
the timer can tell is timed in batches, of which only the first run finds the caches cold. GPUs: a buffer larger than the caches
is zeroed before a batch, a pause on the device lets the host queue the batch behind it, and events on the device take the time,
so that the host's launches are not in it. CPUs: `perf_counter`. Statistics need numpy alone; `Clock` loads torch. Seconds.
"""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PRECISION = 0.03
"""Half-width of the confidence interval, over the median, at which repeats end."""
CONFIDENCE = 0.95
"""Chance that the interval holds the true median."""
OUTLIER_DEVIATIONS, OUTLIER_FLOOR, MOST_OUTLIERS = 5.0, 0.02, 0.2
"""A repeat is an outlier this many standard deviations (1.4826 x MAD) from the median, and by this share of it at least. More
than the last share of all repeats are no outliers but a second state of the machine, which belongs into the interval."""
LEAST_REPEATS, MOST_REPEATS = 7, 200
"""Repeats before the interval is believed, and repeats that a samples file has room for."""
EVENT_BATCH_S, HOST_BATCH_S = 20e-6, 100e-6
"""Least seconds between two readings of a timer: 40 ticks of a CUDA event, 1,000 of `perf_counter`."""
MOST_BATCH = 500
"""Runs of a batch; a GPU's queue holds about a thousand."""
WARM_UP_SHARE, LEAST_SHARE = 0.1, 0.35
"""Shares of the budget before the first repeat that counts, and before the last: what a device does in its first
milliseconds, before it is warm or throttles, is not what it sustains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What repeats of one operation say."""

    seconds: float
    """Median of the repeats that are no outliers."""
    spread: float
    """Half-width of the 95 % confidence interval of the median, over the median."""
    times_s: tuple[float, ...]
    """All repeats, in their order."""
    outliers: int
    """Repeats that were left out of the median."""


def summary(times_s: Sequence[float]) -> Timing:
    """Median, its confidence interval and outliers of repeats; the order of the repeats does not matter."""
    times = np.asarray(times_s, np.float64)
    away = np.abs(times - np.median(times))
    limit = max(OUTLIER_DEVIATIONS * 1.4826 * float(np.median(away)), OUTLIER_FLOOR * float(np.median(times)))
    near = away <= limit
    kept = np.sort(times[near] if np.mean(near) >= 1.0 - MOST_OUTLIERS else times)
    median = float(np.median(kept))
    return Timing(
        seconds=median,
        spread=_half_width(kept) / median if median > 0 else 0.0,
        times_s=tuple(times.tolist()),
        outliers=len(times) - len(kept),
    )


def merged(timings: Sequence[Timing]) -> Timing:
    """Several visits to one operation, some time apart, as one timing.

    What disturbs a machine for seconds is not in the interval of one visit: the spread is at least half of the range of the
    visits' medians, over the median of all repeats.
    """
    pooled = summary([t for timing in timings for t in timing.times_s])
    medians = [timing.seconds for timing in timings]
    apart = (max(medians) - min(medians)) / 2.0 / pooled.seconds if pooled.seconds > 0 else 0.0
    return replace(pooled, spread=max(pooled.spread, apart))


def _half_width(times: npt.NDArray[np.float64]) -> float:
    """Half of the interval between two of the sorted times that holds the true median, whatever their distribution.

    The j-th least and j-th greatest of n enclose it with chance 1 - 2 P(Binomial(n, 1/2) < j); j is the largest that is sure
    enough. Below 6 repeats no pair is: the whole range is widened by what it lacks; a single one tells nothing, which is 100 %.
    """
    n = len(times)
    if n == 1:
        return float(times[0])
    rank = _interval_rank(n)
    if rank == 0:
        return float(times[-1] - times[0]) / 2.0 * CONFIDENCE / (1.0 - 2.0 ** (1 - n))
    return float(times[n - rank] - times[rank - 1]) / 2.0


@functools.cache
def _interval_rank(n: int) -> int:
    """The largest j with 2 P(Binomial(n, 1/2) < j) <= 5 %, 0 if there is none."""
    rank, below = 0, 1
    while 2 * below <= (1.0 - CONFIDENCE) * 2**n:
        rank += 1
        below += math.comb(n, rank)
    return rank


def repeated(
    time_batch: Callable[[int], float],
    budget_s: float,
    precision: float = PRECISION,
    least_s: float = 0.0,
    now: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Repeat until the median is known to `precision` or `budget_s` has passed; a repeat is the mean of a batch.

    `time_batch(b)` runs the operation b times and returns the seconds of all; b is such that a batch takes `least_s`. The
    budget covers the warm-up; three repeats are made even if it does not suffice.
    """
    start = now()
    warm_until, least_until, end = (start + share * budget_s for share in (WARM_UP_SHARE, LEAST_SHARE, 1.0))
    once_s = min(time_batch(1), time_batch(1))
    while now() < warm_until:
        once_s = min(once_s, time_batch(1))
    batch = max(1, min(MOST_BATCH, math.ceil(least_s / max(once_s, 1e-9))))
    times: list[float] = []
    while len(times) < MOST_REPEATS:
        times.append(time_batch(batch) / batch)
        if len(times) >= 3 and now() >= end:
            break
        if len(times) >= LEAST_REPEATS and now() >= least_until and summary(times).spread < precision:
            break
    return summary(times)


class Clock:
    """Measures runs on one device."""

    def __init__(self, device: Any) -> None:
        """Prepare for `device`, a torch device or its name."""
        import torch

        self.device = torch.device(device)
        self._events = _EventTimer(torch, self.device) if self.device.type == "cuda" else None

    def measure(self, run: Callable[[], Any], budget_s: float, precision: float = PRECISION) -> Timing:
        """Seconds that the device takes for `run()`."""
        if self._events is None:
            return self.measure_host(run, budget_s, precision)
        return repeated(self._events.batches(run), budget_s, precision, EVENT_BATCH_S)

    def measure_host(self, run: Callable[[], Any], budget_s: float, precision: float = PRECISION) -> Timing:
        """Seconds that the host takes to call `run()`, which need not wait for the device."""

        def time_batch(batch: int) -> float:
            self.wait()
            return _host_s(run, batch)

        return repeated(time_batch, budget_s, precision, HOST_BATCH_S)

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self._events is not None:
            self._events.cuda.synchronize(self.device)


def _host_s(run: Callable[[], Any], batch: int) -> float:
    start = time.perf_counter()
    for _ in range(batch):
        run()
    return time.perf_counter() - start


class _EventTimer:
    """Seconds between two events on a GPU, with the caches flushed and the host ahead of the device."""

    FLUSH_BYTES = 2**28
    """Least size of the flushed buffer; above the last-level caches of today's devices."""
    CLOCK_KHZ = 2e6
    """Clock that the pause assumes where the driver names none; a pause too long does no harm."""
    MOST_PAUSE_S = 10e-3

    def __init__(self, torch: Any, device: Any) -> None:
        self.cuda = torch.cuda
        self._device = device
        facts = self.cuda.get_device_properties(device)
        size = max(self.FLUSH_BYTES, 2 * int(getattr(facts, "L2_cache_size", 0)))
        self._flushed = torch.empty(min(size, facts.total_memory // 64), dtype=torch.uint8, device=device)
        self._cycles_per_s = 1e3 * float(getattr(facts, "clock_rate", 0) or self.CLOCK_KHZ)

    def batches(self, run: Callable[[], Any]) -> Callable[[int], float]:
        """The function that runs a batch and gives its seconds; it learns how long the host takes to queue a run."""
        queue_s = math.inf

        def time_batch(batch: int) -> float:
            nonlocal queue_s
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            with self.cuda.device(self._device):
                self._flushed.zero_()
                if queue_s < math.inf:
                    self.cuda._sleep(int(min(1.5 * batch * queue_s, self.MOST_PAUSE_S) * self._cycles_per_s))
                start.record()
                queue_s = min(queue_s, _host_s(run, batch) / batch)
                end.record()
                end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3

        return time_batch


_READ_AGAIN_S = 2.0
_read: dict[str, tuple[float, tuple[float | None, float | None]]] = {}


def clocks(device: Any) -> tuple[float | None, float | None]:
    """Clock in MHz and temperature in degrees Celsius of a device, None where they cannot be read; read every 2 s at most."""
    name = str(device)
    if name not in _read or time.monotonic() - _read[name][0] > _READ_AGAIN_S:
        _read[name] = (time.monotonic(), _gpu_clocks(device) if name.startswith("cuda") else (_cpu_mhz(), None))
    return _read[name][1]


def _cpu_mhz(cpuinfo: Path = Path("/proc/cpuinfo")) -> float | None:
    """Mean clock of the processors that Linux shows."""
    with contextlib.suppress(OSError, ValueError):
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("cpu MHz")]
        if lines:
            return sum(float(line.partition(":")[2]) for line in lines) / len(lines)
    return None


def _gpu_clocks(device: Any) -> tuple[float | None, float | None]:
    import torch

    with contextlib.suppress(Exception):  # no library for the driver, or an error of that library: it is only a remark
        return float(torch.cuda.clock_rate(device)), float(torch.cuda.temperature(device))
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        text = subprocess.run(command, capture_output=True, text=True, timeout=5.0, check=True).stdout
        mhz, _, celsius = text.strip().partition(",")
        return float(mhz), float(celsius)
    return None, None
