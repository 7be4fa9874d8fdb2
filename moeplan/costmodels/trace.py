"""A simulated step in Chrome's trace format, which Perfetto and chrome://tracing open.

One process a pipeline stage, one thread a stream: compute, the links, the host, sends, data parallelism. Passes are complete
events ("X"); layers and their parts stand inside them, what waits for a link or the host on the thread of that one. Sends are
joined to the pass that waits for them by arrows ("s", "f"); memory is a counter ("C"). Times are whole nanoseconds, written in
microseconds, memory in GiB, as the format's viewers show them. Layers are left out where they would exceed `MOST_EVENTS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.costmodels.collectives import group
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.pipeline.action import KINDS
from moeplan.costmodels.timeline import BACKWARD, StepTimeline
from moeplan.profiles.profile import Profile
from moeplan.records import save_text
from moeplan.units import GIB

STREAMS = ("compute", "intra-node link", "NIC", "host", "sends", "data parallel")
"""Threads of a stage; the thread id is the place here."""
COMPUTE, INTRA, NIC, HOST, SENDS, DATA = range(len(STREAMS))
MOST_EVENTS = 200_000
"""Events with the layers of passes; the passes themselves, sends and memory are always written."""
_CATEGORIES = {COMPUTE: "layer", INTRA: "exchange", NIC: "exchange", HOST: "host"}


@dataclass(frozen=True, slots=True)
class Trace:
    """Events of a step."""

    events: list[dict[str, Any]]
    remark: str
    """What was left out; empty: nothing."""

    def text(self) -> str:
        """JSON text of the file."""
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": self.events}, separators=(",", ":"))

    def save(self, path: Path) -> None:
        """Write the trace file, whole or not at all."""
        save_text(path, self.text(), "trace")


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a layer in one direction."""

    name: str
    stream: int
    dense_s: float
    routed_s: float


def step_trace(timeline: StepTimeline, profile: Profile, layout: Layout, most_events: int = MOST_EVENTS) -> Trace:
    """The trace of a step; layers inside passes as long as there are not more than `most_events` of them."""
    events = [*_names(timeline), *_passes(timeline), *_sends(timeline), *_frame(timeline), *_counters(timeline)]
    detail, shown = _Detail(timeline, profile, layout).events(most_events)
    whole = len(timeline.passes.rank)
    left = (
        f"layers are shown inside {shown:,} of {whole:,} passes, those of the first micro-batches: all would be too many events"
    )
    return Trace([*events, *detail], left if shown < whole else "")


def _slice(name: str, category: str, rank: int, stream: int, start_s: float, end_s: float, **args: Any) -> dict[str, Any]:
    start, end = _us(start_s), _us(end_s)
    event = {"name": name, "cat": category, "ph": "X", "ts": start, "dur": round(end - start, 3), "pid": rank, "tid": stream}
    return {**event, "args": args} if args else event


def _us(seconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(seconds * 1e9) / 1e3


def _names(timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    for rank in range(timeline.ranks):
        chunks = timeline.contents.pieces[rank]
        held = " | ".join(f"{c[0].name} to {c[-1].name}" if c else "nothing" for c in chunks)
        if len(chunks) > 4:
            held = f"{len(chunks)} chunks"
        for name, args in (("process_name", {"name": f"stage {rank}: {held}"}), ("process_sort_index", {"sort_index": rank})):
            yield {"name": name, "ph": "M", "pid": rank, "tid": 0, "args": args}
        for stream, title in enumerate(STREAMS):
            for name, args in (("thread_name", {"name": title}), ("thread_sort_index", {"sort_index": stream})):
                yield {"name": name, "ph": "M", "pid": rank, "tid": stream, "args": args}


def _passes(timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    passes = timeline.passes
    columns = (passes.rank, passes.kind, passes.batch, passes.chunk, passes.start_s, passes.end_s)
    for rank, kind, batch, chunk, start_s, end_s in zip(*(c.tolist() for c in columns), strict=True):
        category = "backward" if kind == BACKWARD else "forward"
        name = f"{KINDS[kind]}{batch}.{chunk}"
        yield _slice(name, category, rank, COMPUTE, start_s, end_s, micro_batch=batch, chunk=chunk)


def _sends(timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    """Sends on their own stream, and an arrow from each to the pass that waits for it."""
    passes = timeline.passes
    where = "within the domain" if timeline.send_inside else "across nodes"
    for i in np.flatnonzero(passes.source >= 0).tolist():
        source, rank = int(passes.source[i]), int(passes.rank[i])
        sender, start_s = int(passes.rank[source]), float(passes.sent_s[i])
        what = f"send {KINDS[passes.kind[source]]}{passes.batch[source]}.{passes.chunk[source]} to stage {rank}"
        yield _slice(what, "send", sender, SENDS, start_s, float(passes.arrived_s[i]), link=where)
        arrow = {"name": "send", "cat": "send", "id": i}
        yield {**arrow, "ph": "s", "ts": _us(start_s), "pid": sender, "tid": SENDS}
        yield {**arrow, "ph": "f", "bp": "e", "ts": _us(float(passes.start_s[i])), "pid": rank, "tid": COMPUTE}


def _frame(timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    """Parameter gather, gradient reduction and update of every stage; what overlaps with passes is drawn beside them."""
    frame, update_s = timeline.frame, timeline.update_s
    for rank in range(timeline.ranks):
        gathered = max(float(frame.gather_s[rank]), float(frame.gather_busy_s[rank]))
        end = float(timeline.ends_s[rank])
        begin = max(gathered, end - max(float(frame.scatter_s[rank]), float(frame.scatter_busy_s[rank])))
        if gathered > 0.0:
            exposed = round(float(frame.gather_s[rank]) * 1e3, 6)
            yield _slice("parameter gather", "exchange", rank, DATA, 0.0, gathered, exposed_ms=exposed)
        if frame.scatter_s[rank] > 0.0 and begin < end:
            exposed = round(float(frame.scatter_s[rank]) * 1e3, 6)
            yield _slice("gradient reduction", "exchange", rank, DATA, begin, end, exposed_ms=exposed)
        done = update_s + float(frame.optimizer_s[rank])
        yield _slice("optimizer", "optimizer", rank, COMPUTE, update_s, done)
        yield _slice("step overhead", "host", rank, HOST, update_s + float(frame.optimizer_s.max()), timeline.step_s)


def _counters(timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    for rank in range(timeline.ranks):
        times, held = timeline.memory(rank)
        before = None
        for i in range(len(times)):
            if held[i] != before and (i + 1 == len(times) or times[i + 1] > times[i]):
                before = held[i]
                yield {"name": "memory", "ph": "C", "ts": _us(times[i]), "pid": rank, "args": {"GiB": float(held[i]) / GIB}}


class _Detail:
    """Layers and their parts inside passes."""

    def __init__(self, timeline: StepTimeline, profile: Profile, layout: Layout) -> None:
        self.timeline = timeline
        groups = {
            "tensor-parallel exchange": group(profile, layout.tp, 1),
            "context-parallel exchange": group(profile, layout.cp, layout.tp),
            "expert all-to-all": group(profile, layout.ep, layout.etp),
        }
        self.streams = {name: NIC if where.domains > 1 else INTRA for name, where in groups.items()} | {"host launches": HOST}
        self.parts = [[self._parts(unit, way) for way in ("forward", "backward")] for unit in timeline.contents.units]

    def events(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """Events inside passes, those of the first micro-batches first, and the number of passes that they are from."""
        passes, shown = self.timeline.passes, 0
        out: list[dict[str, Any]] = []
        for i in np.lexsort((passes.start_s, passes.batch)).tolist():
            inside = self._inside(i)
            if len(out) + len(inside) > most:
                break
            out += inside
            shown += 1
        return out, shown

    def _parts(self, unit: Any, way: str) -> list[_Part]:
        dense, routed = (getattr(part, way) for part in (unit.dense, unit.routed))
        first, last = _numbers(dense), _numbers(routed)
        every = [_Part(n, self.streams.get(n, COMPUTE), first.get(n, 0.0), last.get(n, 0.0)) for n in {**first, **last}]
        return [part for part in every if part.dense_s + part.routed_s > 0.0]

    def _inside(self, i: int) -> list[dict[str, Any]]:
        """Layers of pass i in the order in which it passes them, with their parts one after the other."""
        timeline, passes = self.timeline, self.timeline.passes
        rank, chunk, kind = int(passes.rank[i]), int(passes.chunk[i]), int(passes.kind[i])
        now, end = float(passes.start_s[i]), float(passes.end_s[i])
        factor, load = float(timeline.factors[rank]), float(timeline.loads[rank, chunk, passes.batch[i]])
        pieces = timeline.contents.pieces[rank][chunk]
        out: list[dict[str, Any]] = []
        for piece in reversed(pieces) if kind == BACKWARD else pieces:
            begin, place = now, len(out)
            for part in self.parts[piece.unit][kind]:
                after = min(now + factor * (part.dense_s + load * part.routed_s), end)
                out.append(_slice(part.name, _CATEGORIES[part.stream], rank, part.stream, now, after))
                now = after
            out.insert(place, _slice(piece.name, "layer", rank, COMPUTE, begin, now))
        if end - now > 1e-9:
            out.append(_slice("exposed exchange", "exchange", rank, COMPUTE, now, end))
        return out


def _numbers(parts: dict[str, Any]) -> dict[str, float]:
    """Parts of one layout as plain numbers."""
    return {name: float(np.ravel(value)[0]) for name, value in parts.items()}
