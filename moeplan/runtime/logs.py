"""Step times and peak memory from the log of a training run, while it is being written.

Built in: Megatron-LM (also as Megatron-DeepSpeed prints it) and DeepSpeed; others by regular expressions with the groups
`step_ms`, `step_s` and `memory_gib`. A framework may report one step in several ways; the first pattern of a form that matches
anything gives the times, so that no step counts twice. Units: seconds, bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplan.errors import UsageError
from moeplan.units import GIB, MIB, MS

_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)"
GROUPS = ("step_ms", "step_s", "memory_gib")
"""Named groups of a user's expression."""
KEPT = 400
"""Last lines of a log that are kept in memory."""
CHUNK = 1 << 22
"""Bytes of a log that are read at once."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A kind of line."""

    expression: re.Pattern[str]
    value: Callable[[re.Match[str], int], float]
    """Seconds of a step or bytes of a match, given the sequences of a step; what is not above 0 does not count."""
    example: str


@dataclass(frozen=True, slots=True)
class LogForm:
    """How a framework reports steps and memory."""

    name: str
    steps: tuple[Pattern, ...]
    """The first that matches anything in a log counts."""
    memory: tuple[Pattern, ...]
    """All count; the peak is the highest."""


def _of(expression: str, value: Callable[[re.Match[str], int], float], example: str) -> Pattern:
    return Pattern(re.compile(expression), value, example)


def _breakdown(match: re.Match[str], _: int) -> float:
    """Seconds of forward, backward and optimizer of one global step."""
    parts = dict(re.findall(rf"\| (fwd|bwd|step): {_NUMBER}", match[0]))
    return MS * sum(map(float, parts.values())) if len(parts) == 3 else 0.0


MEGATRON = LogForm(
    "megatron",
    steps=(
        _of(rf"elapsed time per iteration \((ms|s)\):\s*{_NUMBER}",
            lambda m, _: float(m[2]) * (MS if m[1] == "ms" else 1.0),
            "iteration 5/ 50 | ... | elapsed time per iteration (ms): 1234.5 |"),
    ),
    memory=(
        _of(rf"memory \(MB\).*\| max allocated:\s*{_NUMBER}", lambda m, _: float(m[1]) * MIB,
            "[Rank 0] (after 2 iterations) memory (MB) | allocated: 5.0 | max allocated: 9.5 | reserved: 10.0 | ..."),
    ),
)  # fmt: skip
DEEPSPEED = LogForm(
    "deepspeed",
    steps=(
        _of(rf"steps: \d+ .*iter time \(s\): {_NUMBER}", lambda m, _: float(m[1]),
            "steps: 10 loss: 2.5 iter time (s): 1.234 samples/sec: 51.9"),
        _of(rf"(?<![A-Za-z])(?:Curr)?SamplesPerSec={_NUMBER}", lambda m, batch: batch / float(m[1]) if float(m[1]) else 0.0,
            "epoch=0/micro_step=10/global_step=10, RunningAvgSamplesPerSec=51.8, CurrSamplesPerSec=51.9, ..."),
        _of(rf"time \(ms\)(?: \| \w+: {_NUMBER})+", _breakdown,
            "time (ms) | fwd: 300.0 | bwd: 700.0 | bwd_inner: 650.0 | bwd_allreduce: 50.0 | step: 200.0"),
    ),
    memory=(
        _of(rf"MaxMemAllocated={_NUMBER} ?GB", lambda m, _: float(m[1]) * GIB, "MemAllocated=4.0GB, MaxMemAllocated=9.5GB"),
        _of(rf"\bMax_MA {_NUMBER} GB", lambda m, _: float(m[1]) * GIB, "MA 4.0 GB  Max_MA 9.5 GB  CA 10.0 GB  Max_CA 11 GB"),
    ),
)  # fmt: skip
FORMS = {form.name: form for form in (MEGATRON, DEEPSPEED)}
"""Forms that are built in."""


def custom_form(expressions: Sequence[str]) -> LogForm:
    """The form of a user's regular expressions; refuses those that do not compile or have other groups."""
    steps: list[Pattern] = []
    memory: list[Pattern] = []
    for text in expressions:
        try:
            expression = re.compile(text)
        except re.error as error:
            raise UsageError(f"--regex '{text}' is no regular expression: {error}") from None
        unknown = [name for name in expression.groupindex if name not in GROUPS]
        if unknown or not expression.groupindex:
            problem = f"has a group '{unknown[0]}'" if unknown else "has no named group"
            raise UsageError(
                f"--regex '{text}' {problem}", hint=f"name one of {', '.join(GROUPS)}: 'took (?P<step_s>[0-9.]+) s'"
            )
        for name, unit, into in (("step_ms", MS, steps), ("step_s", 1.0, steps), ("memory_gib", GIB, memory)):
            if name in expression.groupindex:
                into.append(Pattern(expression, _group(name, unit), f"what matches {text}"))
    if not steps:
        raise UsageError(
            "no --regex has a group step_ms or step_s", hint="give one for the step time: 'took (?P<step_s>[0-9.]+) s'"
        )
    return LogForm("regex", tuple(steps), tuple(memory))


def _group(name: str, unit: float) -> Callable[[re.Match[str], int], float]:
    def value(match: re.Match[str], _: int) -> float:
        try:
            return float((match[name] or "").replace(",", "")) * unit
        except ValueError:
            return 0.0

    return value


class Log:
    """A log file that may still grow; it need not exist yet."""

    def __init__(self, path: Path, form: LogForm, global_batch: int) -> None:
        self.path, self.form, self.global_batch = path, form, global_batch
        self.peak_bytes = 0.0
        """Highest peak of any rank that reported; 0: none did."""
        self.lines: list[str] = []
        """The last lines."""
        self.errors: list[str] = []
        """Lines that look like an error, the first `KEPT`."""
        self._times: list[list[float]] = [[] for _ in form.steps]
        self._offset = 0
        self._rest = b""

    @property
    def step_s(self) -> list[float]:
        """Seconds of the steps so far."""
        return next((times for times in self._times if times), [])

    def read(self) -> bool:
        """Take in what was written since; whether there was anything."""
        grown = False
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                while chunk := stream.read(CHUNK):
                    self._offset += len(chunk)
                    grown = True
                    *whole, self._rest = re.split(rb"[\r\n]+", self._rest + chunk)
                    for line in whole:
                        self._take(line.decode("utf-8", "replace"))
        except OSError:  # not there yet, or a file system that is away for a moment
            return grown
        return grown

    def close(self) -> None:
        """Take in what is left, a last line without an end included."""
        self.read()
        rest, self._rest = self._rest, b""
        if rest:
            self._take(rest.decode("utf-8", "replace"))

    def _take(self, line: str) -> None:
        self.lines = [*self.lines[-KEPT + 1 :], line]
        if _ERROR.search(line) and len(self.errors) < KEPT:
            self.errors.append(line)
        for times, pattern in zip(self._times, self.form.steps, strict=True):
            for match in pattern.expression.finditer(line):
                seconds = pattern.value(match, self.global_batch)
                if 0.0 < seconds < float("inf"):
                    times.append(seconds)
        for pattern in self.form.memory:
            for match in pattern.expression.finditer(line):
                self.peak_bytes = max(self.peak_bytes, pattern.value(match, self.global_batch))

    def tail(self, count: int) -> list[str]:
        """The last lines that hold anything."""
        return [line.rstrip() for line in self.lines if line.strip()][-count:]


_ERROR = re.compile(
    r"\b\w*(Error|Exception|Interrupt)\b|\b(error|fatal|killed|abort(ed)?|out of memory|oom-?kill(er)?|segmentation fault"
    r"|sigkill|exitcode|allocate memory|bad_alloc)\b",
    re.IGNORECASE,
)


def recognised(form: LogForm) -> str:
    """What a step line looks like, for a complaint about a log that has none."""
    return "; or ".join(f"'{pattern.example}'" for pattern in form.steps)
