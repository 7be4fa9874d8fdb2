"""A simulated step in Chrome's trace format, which Perfetto and chrome://tracing open.

One process a pipeline stage, one thread a stream: compute, the links, the host, sends, data parallelism. Passes are complete
events ("X"); layers and their parts stand inside them, what waits for a link or the host on the thread of that one. Sends are
joined to the pass that waits for them by arrows ("s", "f"); memory is a counter ("C"). Times are whole nanoseconds, written in
microseconds, memory in GiB, as the format's viewers show them. Of events that begin together the outer stands first. Layers are
left out where they would exceed `MOST_EVENTS`. Events are made as they are written: a million take three seconds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.costmodels.collectives import group
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.pipeline.action import KINDS
from moeplan.costmodels.pipeline.run import Passes
from moeplan.costmodels.timeline import BACKWARD, StepTimeline
from moeplan.profiles.profile import Profile
from moeplan.records import save_text
from moeplan.units import GIB

STREAMS = ("compute", "intra-node link", "NIC", "host", "sends", "data parallel")
"""Threads of a stage; the thread id is the place here."""
COMPUTE, INTRA, NIC, HOST, SENDS, DATA = range(len(STREAMS))
MOST_EVENTS = 200_000
"""Events with the layers of passes; the passes themselves, sends and memory are always written."""
BLOCK = 10_000
"""Events that are written at once."""
_CATEGORIES = {COMPUTE: "layer", INTRA: "exchange", NIC: "exchange", HOST: "host"}


@dataclass(frozen=True, slots=True)
class Trace:
    """Events of a step."""

    timeline: StepTimeline
    detail: _Detail
    shown: list[int]
    """Passes with their layers."""

    @property
    def remark(self) -> str:
        """What was left out; empty: nothing."""
        shown, whole = len(self.shown), len(self.timeline.passes.rank)
        if shown == whole:
            return ""
        return f"layers are shown inside {shown:,} of {whole:,} passes, those of the first micro-batches: all would be too many"

    def events(self) -> Iterator[str]:
        """JSON text of each event."""
        for events in (_names, _passes, _sends, _frame, _counters):
            yield from events(self.timeline)
        for i in self.shown:
            yield from self.detail.inside(i)

    def pieces(self, report: Callable[[int, int], None] | None = None) -> Iterator[str]:
        """The file in pieces; `report` gets the events so far, and about how many there are."""
        passes = self.timeline.passes
        most = 3 * len(passes.rank) + 3 * int((passes.source >= 0).sum()) + int(self.detail.counts[self.shown].sum())
        events, done, comma = self.events(), 0, ""
        yield '{"displayTimeUnit":"ms","traceEvents":[\n'
        while block := list(itertools.islice(events, BLOCK)):
            yield comma + ",\n".join(block)
            comma, done = ",\n", done + len(block)
            if report is not None:
                report(done, max(done, most))
        yield "\n]}\n"

    def save(self, path: Path, report: Callable[[int, int], None] | None = None) -> None:
        """Write the trace file, whole or not at all."""
        save_text(path, self.pieces(report), "trace")


def step_trace(timeline: StepTimeline, profile: Profile, layout: Layout, most_events: int = MOST_EVENTS) -> Trace:
    """The trace of a step; layers inside passes as long as there are not more than `most_events` of them."""
    detail = _Detail(timeline, profile, layout)
    order = np.lexsort((timeline.passes.start_s, timeline.passes.batch))
    fitting = int(np.searchsorted(np.cumsum(detail.counts[order]), most_events, side="right"))
    return Trace(timeline, detail, order[:fitting].tolist())


def _head(name: str, category: str, rank: int, stream: int, **args: Any) -> str:
    """The part of a complete event before its times."""
    more = f'"args":{json.dumps(args, separators=(",", ":"))},' if args else ""
    return f'{{"name":{json.dumps(name)},"cat":"{category}","ph":"X","pid":{rank},"tid":{stream},{more}"ts":'


def _slice(head: str, start_s: float, end_s: float) -> str:
    start = round(start_s * 1e9)
    return f'{head}{start / 1e3},"dur":{(round(end_s * 1e9) - start) / 1e3}}}'


def _us(seconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(seconds * 1e9) / 1e3


def _names(timeline: StepTimeline) -> Iterator[str]:
    for rank in range(timeline.ranks):
        chunks = timeline.contents.pieces[rank]
        held = " | ".join(f"{c[0].name} to {c[-1].name}" if c else "nothing" for c in chunks)
        if len(chunks) > 4:
            held = f"{len(chunks)} chunks"
        named: list[tuple[str, int, dict[str, Any]]] = [
            ("process_name", 0, {"name": f"stage {rank}: {held}"}),
            ("process_sort_index", 0, {"sort_index": rank}),
        ]
        for stream, title in enumerate(STREAMS):
            named += [("thread_name", stream, {"name": title}), ("thread_sort_index", stream, {"sort_index": stream})]
        for name, stream, args in named:
            yield json.dumps({"name": name, "ph": "M", "pid": rank, "tid": stream, "args": args}, separators=(",", ":"))


def _passes(timeline: StepTimeline) -> Iterator[str]:
    passes = timeline.passes
    columns = (passes.rank.tolist(), passes.batch.tolist(), passes.chunk.tolist(), _names_of(passes), passes.kind.tolist())
    times = passes.start_s.tolist(), passes.end_s.tolist()
    for rank, batch, chunk, name, kind, start_s, end_s in zip(*columns, *times, strict=True):
        category = "backward" if kind == BACKWARD else "forward"
        args = f'"args":{{"micro_batch":{batch},"chunk":{chunk}}}'
        head = f'{{"name":"{name}","cat":"{category}","ph":"X","pid":{rank},"tid":{COMPUTE},{args},"ts":'
        yield _slice(head, start_s, end_s)


def _names_of(passes: Passes) -> list[str]:
    """Names of all passes: F3.1 is the forward of micro-batch 3 through chunk 1."""
    columns = (passes.kind.tolist(), passes.batch.tolist(), passes.chunk.tolist())
    return [f"{KINDS[kind]}{batch}.{chunk}" for kind, batch, chunk in zip(*columns, strict=True)]


def _sends(timeline: StepTimeline) -> Iterator[str]:
    """Sends on their own stream, and an arrow from each to the pass that waits for it."""
    passes, names = timeline.passes, _names_of(timeline.passes)
    where = "within the domain" if timeline.send_inside else "across nodes"
    here = np.flatnonzero(passes.source >= 0)
    source = passes.source[here]
    columns = (here, source, passes.rank[here], passes.rank[source], passes.sent_s[here], passes.arrived_s[here])
    for i, j, rank, sender, sent_s, arrived_s in zip(*(c.tolist() for c in columns), strict=True):
        place = f'"pid":{sender},"tid":{SENDS}'
        head = f'{{"name":"send {names[j]} to stage {rank}","cat":"send","ph":"X",{place},"args":{{"link":"{where}"}},"ts":'
        yield _slice(head, sent_s, arrived_s)
        arrow = f'{{"name":"send","cat":"send","id":{i}'
        yield f'{arrow},"ph":"s",{place},"ts":{_us(sent_s)}}}'
        yield f'{arrow},"ph":"f","bp":"e","pid":{rank},"tid":{COMPUTE},"ts":{_us(float(passes.start_s[i]))}}}'


def _frame(timeline: StepTimeline) -> Iterator[str]:
    """Parameter gather, gradient reduction and update of every stage; what overlaps with passes is drawn beside them."""
    frame, update_s = timeline.frame, timeline.update_s
    for rank in range(timeline.ranks):
        gathered = max(float(frame.gather_s[rank]), float(frame.gather_busy_s[rank]))
        end = float(timeline.ends_s[rank])
        begin = max(gathered, end - max(float(frame.scatter_s[rank]), float(frame.scatter_busy_s[rank])))
        if gathered > 0.0:
            exposed = round(float(frame.gather_s[rank]) * 1e3, 6)
            yield _slice(_head("parameter gather", "exchange", rank, DATA, exposed_ms=exposed), 0.0, gathered)
        if frame.scatter_s[rank] > 0.0 and begin < end:
            exposed = round(float(frame.scatter_s[rank]) * 1e3, 6)
            yield _slice(_head("gradient reduction", "exchange", rank, DATA, exposed_ms=exposed), begin, end)
        done = update_s + float(frame.optimizer_s[rank])
        yield _slice(_head("optimizer", "optimizer", rank, COMPUTE), update_s, done)
        last = update_s + float(frame.optimizer_s.max())
        yield _slice(_head("step overhead", "host", rank, HOST), last, timeline.step_s)


def _counters(timeline: StepTimeline) -> Iterator[str]:
    for rank in range(timeline.ranks):
        times, held = timeline.memory(rank)
        # of changes at one time the last counts, and only where it changes something
        last = np.append(np.diff(times) > 0.0, True)
        times, held = times[last], held[last] / GIB
        changed = np.append(True, np.diff(held) != 0.0)
        for time_s, gib in zip(times[changed].tolist(), held[changed].tolist(), strict=True):
            yield f'{{"name":"memory","ph":"C","pid":{rank},"ts":{_us(time_s)},"args":{{"GiB":{gib:.6f}}}}}'


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
        self.drawn: dict[tuple[int, int, int], Drawn] = {}
        # events inside a pass at most, [units, 2], [ranks, chunks, 2], [passes]
        units = np.array([[1 + len(parts) for parts in ways] for ways in self.parts])
        chunks = np.array([[1 + units[[p.unit for p in c]].sum(axis=0) for c in row] for row in timeline.contents.pieces])
        passes = timeline.passes
        self.counts = chunks[passes.rank, passes.chunk, passes.kind]
        """Events inside each pass at most, [passes]."""

    def _parts(self, unit: Any, way: str) -> list[tuple[str, float, float]]:
        """Name, dense and routed seconds of each part of a unit in one direction."""
        dense, routed = (_numbers(getattr(part, way)) for part in (unit.dense, unit.routed))
        every = [(name, dense.get(name, 0.0), routed.get(name, 0.0)) for name in {**dense, **routed}]
        return [part for part in every if part[1] + part[2] > 0.0]

    def _draw(self, rank: int, chunk: int, kind: int) -> Drawn:
        """Layers of a pass in the order in which it passes them: what is the same in every micro-batch."""
        factor, pieces = float(self.timeline.factors[rank]), self.timeline.contents.pieces[rank][chunk]
        out = []
        for piece in reversed(pieces) if kind == BACKWARD else pieces:
            parts = []
            for name, dense_s, routed_s in self.parts[piece.unit][kind]:
                stream = self.streams.get(name, COMPUTE)
                parts.append((_head(name, _CATEGORIES[stream], rank, stream), factor * dense_s, factor * routed_s))
            out.append((_head(piece.name, "layer", rank, COMPUTE), parts))
        return out

    def inside(self, i: int) -> list[str]:
        """Events inside pass i, its layers and their parts one after the other."""
        passes = self.timeline.passes
        place = int(passes.rank[i]), int(passes.chunk[i]), int(passes.kind[i])
        if place not in self.drawn:
            self.drawn[place] = self._draw(*place)
        now, end = float(passes.start_s[i]), float(passes.end_s[i])
        load = float(self.timeline.loads[place[0], place[1], passes.batch[i]])
        out: list[str] = []
        begun = round(now * 1e9)
        for layer, parts in self.drawn[place]:
            out.append("")
            first, at = begun, len(out)
            for head, dense_s, routed_s in parts:
                now = min(now + dense_s + load * routed_s, end)
                done = round(now * 1e9)
                out.append(f'{head}{begun / 1e3},"dur":{(done - begun) / 1e3}}}')
                begun = done
            out[at - 1] = f'{layer}{first / 1e3},"dur":{(begun - first) / 1e3}}}'
        if end - now > 1e-9:
            out.append(_slice(_head("exposed exchange", "exchange", place[0], COMPUTE), now, end))
        return out


Drawn = list[tuple[str, list[tuple[str, float, float]]]]
"""Of each layer: how its event begins, and for each of its parts how that begins, its dense and its routed seconds."""


def _numbers(parts: dict[str, Any]) -> dict[str, float]:
    """Parts of one layout as plain numbers."""
    return {name: float(np.ravel(value)[0]) for name, value in parts.items()}
