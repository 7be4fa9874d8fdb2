"""What became of a trial, and what that says about the plans that were not tried.

Out of memory: no plan is tried that is predicted to need as much. A hang or a crash: features that the plan has, and no plan
that ran, are in doubt; plans with one of them come last, and are given up once two with that feature hung, or crashed with the
same message. What every candidate has tells none from the others and is never in doubt. A rule that a later trial disproves no
longer counts. Units: seconds, bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from moeplan.costmodels.layout import Layout
from moeplan.runtime.launch import Ended
from moeplan.runtime.logs import Log, recognised
from moeplan.runtime.slurm import LOST
from moeplan.units import format_bytes, format_seconds

Kind = Literal["done", "out_of_memory", "hang", "crash", "unreadable", "lost", "refused"]
WORDS = {
    "done": "done",
    "out_of_memory": "out of memory",
    "hang": "hang",
    "crash": "crash",
    "unreadable": "no step times in the log",
    "lost": "lost by the scheduler",
    "refused": "refused by the exporter",
}
"""Kinds of outcomes in words."""
SHOWN = 8
"""Last lines of a log that an outcome keeps."""
MOST = 300
"""Letters of a message that are kept."""
TWICE = 2
"""Plans with a feature in doubt that must fail alike before the feature is given up."""
KILLED = (-9, 137)
"""Exit codes of what was killed by force: by the kernel for want of memory, as nobody else did."""

_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|\bMemoryError\b|oom-?kill|can't allocate memory|cannot allocate memory|std::bad_alloc"
    r"|Signal 9 \(SIGKILL\)|exitcode\s*:\s*-9\b",
    re.IGNORECASE,
)
_RAISED = re.compile(r"(?:^|[\s\]:])((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception))\b(?::\s*(.*))?$")
_WRAPPERS = ("ChildFailedError", "CalledProcessError", "SignalException")
"""Errors of a launcher about its ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a trial."""

    kind: Kind
    step_s: float = 0.0
    """Median of the steps after the warm-up; 0 unless done."""
    peak_bytes: float = 0.0
    """Peak memory that the log reports; 0: it does not."""
    steps: int = 0
    """Steps behind the median."""
    exit_code: int | None = None
    message: str = ""
    """What went wrong, in a line."""
    tail: tuple[str, ...] = ()
    """Last lines of the log, unless done."""
    seconds: float = 0.0
    """Time that it ran."""

    @property
    def text(self) -> str:
        """All of it in a line."""
        if self.kind != "done":
            return f"{WORDS[self.kind]}: {self.message}"
        peak = f", peak {format_bytes(self.peak_bytes)}" if self.peak_bytes else ""
        more = f"; {self.message}" if self.message else ""
        return f"{format_seconds(self.step_s)} a step ({self.steps} step{'s' * (self.steps != 1)}{peak}){more}"


def outcome(ended: Ended, log: Log, warmup: int) -> Outcome:
    """The outcome of a trial that has ended."""
    steps = log.step_s[warmup:]
    tail = tuple(log.tail(SHOWN))

    def failed(kind: Kind, message: str) -> Outcome:
        return Outcome(
            kind=kind, peak_bytes=log.peak_bytes, exit_code=ended.exit_code, message=message, tail=tail, seconds=ended.seconds
        )

    def done(message: str = "") -> Outcome:
        return Outcome(
            kind="done", step_s=median(steps), peak_bytes=log.peak_bytes, steps=len(steps), exit_code=ended.exit_code,
            message=message, seconds=ended.seconds,
        )  # fmt: skip

    clean = ended.exit_code == 0 or (ended.exit_code is None and ended.word in ("", "COMPLETED"))
    if ended.why == "enough" or (ended.why == "exit" and clean and steps):
        return done()
    if short := [line for line in log.errors if _MEMORY.search(line)]:
        return failed("out_of_memory", _raised(short) or short[0].strip()[:MOST])
    if ended.exit_code in KILLED or ended.word == "OUT_OF_MEMORY":
        return failed("out_of_memory", ended.word or f"killed by force (exit code {ended.exit_code})")
    if ended.word in LOST:
        return failed("lost", f"Slurm says {ended.word}")
    if ended.why == "exit" and ended.word not in ("TIMEOUT", "DEADLINE"):
        if clean:
            said = f"{len(log.step_s)} step lines, of which {warmup} are warm-up" if log.step_s else "no step line"
            return failed("unreadable", f"{said}; a step line is {recognised(log.form)}")
        return failed("crash", _complaint(log, f"exit code {ended.exit_code}" if ended.exit_code is not None else ended.word))
    if any(_RAISED.search(line) for line in log.errors):
        return failed("crash", _complaint(log, "an error, then silence"))
    if ended.why != "stall" and steps:
        return done(f"stopped after {format_seconds(ended.seconds)}, before all steps were done")
    silent = "no new line in its log" if ended.why == "stall" else f"no end within {format_seconds(ended.seconds)}"
    return failed("hang", f"{silent}, {len(log.step_s)} steps done")


def _complaint(log: Log, otherwise: str) -> str:
    """The first error that a rank raised, else the last line of the log, else how it ended."""
    return _raised(log.errors) or (log.tail(1) or [otherwise])[0].strip()[:MOST]


def _raised(lines: Sequence[str]) -> str:
    """The first error that Python raised, that of a launcher about its ranks left out."""
    found = [m for line in lines if (m := _RAISED.search(line.rstrip())) and m[1].split(".")[-1] not in _WRAPPERS]
    return f"{found[0][1]}: {found[0][2] or ''}".rstrip(": ")[:MOST] if found else ""


def signature(message: str) -> str:
    """A message without what differs between two runs: numbers, addresses, paths."""
    return re.sub(r"0x[0-9a-fA-F]+|/[^\s'\":]+|\d+(\.\d+)?", "#", message)


def features(layout: Layout) -> frozenset[str]:
    """What a layout makes use of, in words."""
    x = layout
    degrees = {name.upper(): getattr(x, name) > 1 for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    switches = {
        "expert all-to-all overlap": x.ep_overlap,
        "shared-expert overlap": x.shared_overlap,
        "tensor-parallel overlap": x.tp_overlap,
        "data-parallel overlap": x.dp_overlap,
        "sequence parallelism": x.sequence_parallel,
        "optimizer offload": x.optimizer_offload > 0,
        "unequal stages": bool(x.stages),
        "recompute of some layers": bool(x.recompute_layers),
    }
    names = [name for name, used in {**degrees, **switches}.items() if used]
    names += [f"recompute {module}" for module in x.recompute] + [f"CUDA graph of {scope}" for scope in x.cuda_graphs]
    names += [f"dispatcher {x.dispatcher}"] * (x.dispatcher != "none") + [f"schedule {x.moe_schedule}"] * bool(x.moe_schedule)
    return frozenset([*names, f"sharding {x.sharding}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Caution:
    """What the outcomes say against trying a plan."""

    skip: str = ""
    """Why it is not tried; empty: it may be."""
    doubts: tuple[str, ...] = ()
    """Features of it that are in doubt, so that it comes last."""


def cautions(
    layouts: Sequence[Layout], predicted_bytes: Sequence[float], outcomes: Mapping[int, Outcome], device_bytes: float
) -> list[Caution]:
    """The caution of every layout, given the outcomes of some by place."""
    used = [features(x) for x in layouts]
    everywhere = frozenset.intersection(*used)
    ran = frozenset[str]().union(*(used[i] for i, o in outcomes.items() if o.kind == "done"))
    failures = {i: o for i, o in outcomes.items() if o.kind in ("hang", "crash")}
    doubtful = {i: used[i] - everywhere - ran for i in failures}
    given_up: dict[str, str] = {}
    for i, failure in failures.items():
        for feature in doubtful[i]:
            alike = [j for j, other in failures.items() if feature in doubtful[j] and _same(failure, other)]
            if len(alike) >= TWICE:
                how = "hung" if failure.kind == "hang" else f"crashed with '{failure.message[:80]}'"
                given_up[feature] = f"{len(alike)} plans with {feature} {how}, and none with it ran"
    in_doubt = frozenset[str]().union(*doubtful.values())
    limit = _memory_limit(predicted_bytes, outcomes, device_bytes)
    out = []
    for i, mine in enumerate(used):
        skip = limit[1] if predicted_bytes[i] >= limit[0] else ""
        skip = skip or next((given_up[feature] for feature in sorted(mine) if feature in given_up), "")
        skip = skip.replace("{}", format_bytes(predicted_bytes[i]))
        out.append(Caution(skip=skip, doubts=tuple(sorted(mine & in_doubt))))
    return out


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether two failures are of one kind; crashes must say the same."""
    return one.kind == other.kind and (one.kind == "hang" or signature(one.message) == signature(other.message))


def _memory_limit(predicted: Sequence[float], outcomes: Mapping[int, Outcome], device_bytes: float) -> tuple[float, str]:
    """The predicted peak from which plans are not tried, and why; a plan that ran with more disproves it."""
    fitted = max((predicted[i] for i, o in outcomes.items() if o.kind == "done"), default=0.0)
    limit, why = float("inf"), ""
    failed = [predicted[i] for i, o in outcomes.items() if o.kind == "out_of_memory" and predicted[i] > fitted]
    if failed:
        limit = min(failed)
        why = f"predicted to need {{}}, and a plan predicted to need {format_bytes(limit)} ran out of memory"
    ratios = [o.peak_bytes / predicted[i] for i, o in outcomes.items() if o.kind == "done" and o.peak_bytes]
    if ratios and device_bytes / min(ratios) < limit:
        limit = device_bytes / min(ratios)
        why = (
            f"predicted to need {{}}, and plans need {min(ratios):.2f} times what is predicted, "
            f"more than the {format_bytes(device_bytes)} of the device"
        )
    return limit, why
