"""A simulated step on a terminal: a row for each stage, a character for each stretch of time.

A character shows what its stage mostly does in that stretch; where forward and backward passes alternate too fast to be told
apart, it shows both. Colours on a terminal, letters elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from moeplan.cli.render import title
from moeplan.costmodels.constants import STEP
from moeplan.costmodels.timeline import BACKWARD, FORWARD, StepTimeline
from moeplan.planner.plan import Plan
from moeplan.units import GIB, format_bytes, format_seconds

MOST_ROWS = 32
"""Stages shown at most."""
_MARKS = {
    "forward": ("F", "█", "blue"),
    "backward": ("B", "█", "green"),
    "both in turn": ("=", "▀", "blue on green"),
    "exchange": ("x", "█", "yellow"),
    "optimizer": ("o", "█", "magenta"),
    "waiting": (".", "·", "dim"),
}
"""Letter, character and colour of each state."""
_TICK = 14
"""Characters from one time of the axis to the next, at least."""
_LEAST_OF_BOTH = 0.2
"""Share of a stretch that forward and backward must have each, for both to be shown."""


def gantt(plan: Plan, timeline: StepTimeline, width: int, *, colours: bool) -> Iterator[Text | Table]:
    """Title, chart, legend."""
    yield Text(title(plan), style="bold")
    yield Text(headline(plan, timeline))
    yield Text()
    columns = max(20, width - 37)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column(time_axis(timeline.step_s, columns), no_wrap=True, width=columns)
    for name in ("busy", "waits", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    ranks, peaks, seen = shown_ranks(timeline.ranks), timeline.peak_bytes, set[str]()
    for rank in ranks:
        states = stage_states(timeline, rank, columns)
        seen |= set(states)
        cells = [f"{share(s[rank] / timeline.step_s, 2):.0%}" for s in (timeline.busy_s, timeline.idle_s)]
        style = "bold" if rank == timeline.busiest else ""
        table.add_row(Text(str(rank), style=style), _row(states, colours), *cells, f"{peaks[rank] / GIB:.1f}")
    yield table
    legend = Text("      ")
    for name, (letter, block, style) in _MARKS.items():
        if name in seen:
            legend.append(*((block, style) if colours else (letter, None)))
            legend.append(f" {name}   ")
    legend.rstrip()
    yield legend
    if len(ranks) < timeline.ranks:
        yield Text(f"      {len(ranks)} of {timeline.ranks} stages are shown", style="dim")


def headline(plan: Plan, timeline: StepTimeline) -> str:
    """Degrees, pipeline schedule, micro-batches, seconds of a send."""
    piped = f"{timeline.schedule}, " if timeline.ranks > 1 else ""
    sends = f", sends {format_seconds(timeline.send_s)}" if timeline.send_s else ""
    return f"{plan.layout.degrees()}, {piped}{timeline.batches} micro-batches{sends}"


def time_axis(step_s: float, columns: int) -> str:
    """Round times, each ending with the "|" of the stretch in which it lies, as many as fit."""
    rough = step_s / max(3, columns // _TICK)
    power = 10.0 ** math.floor(math.log10(rough))
    tick = next(k * power for k in (1.0, 2.0, 5.0, 10.0) if k * power >= rough * (1.0 - 1e-9))
    out = "0"
    for i in range(1, int(step_s / tick) + 1):
        label = f"{format_seconds(i * tick)}|"
        begin = min(int(i * tick / step_s * columns), columns - 1) + 1 - len(label)
        if begin > len(out):
            out = f"{out:<{begin}}{label}"
    return out


def share(part: float, digits: int) -> float:
    """A share rounded to digits, without the sign of a negative zero."""
    return round(part, digits) + 0.0


def shown_ranks(count: int) -> list[int]:
    """Stages that are shown, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_ROWS)).tolist()})


def stage_states(timeline: StepTimeline, rank: int, columns: int) -> list[str]:
    """What a stage mostly does in each of `columns` equal stretches of the step."""
    edges = np.linspace(0.0, timeline.step_s, columns + 1)
    passes, here = timeline.passes, timeline.passes.of_rank(rank)
    kind, start, end = passes.kind[here], passes.start_s[here], passes.end_s[here]
    seconds = [_within(edges, start[kind == k], end[kind == k]) for k in (FORWARD, BACKWARD)]
    done, update = timeline.ends_s[rank], timeline.update_s
    frame = [(0.0, timeline.frame.gather_s[rank]), (done - timeline.frame.scatter_s[rank], done)]
    seconds.append(_within(edges, *np.array(frame).T))
    work = np.array([[update, update + timeline.frame.optimizer_s[rank]], [timeline.step_s - STEP.overhead_s, timeline.step_s]])
    seconds.append(_within(edges, *work.T))
    # shares of every stretch, [columns, 4]: forward, backward, exchange, optimizer and overhead
    shares = np.stack(seconds, axis=1) / (edges[1] - edges[0])
    return [_state(share) for share in shares.tolist()]


def _state(share: list[float]) -> str:
    forward, backward, exchange, optimizer = share
    if sum(share) < 0.5:
        return "waiting"
    if forward + backward >= exchange + optimizer:
        if min(forward, backward) >= _LEAST_OF_BOTH * (forward + backward):
            return "both in turn"
        return "forward" if forward > backward else "backward"
    return "exchange" if exchange > optimizer else "optimizer"


def _within(edges: Any, start: Any, end: Any) -> Any:
    """Seconds of intervals, one after the other, in each stretch between `edges`."""
    if not len(start):
        return np.zeros(len(edges) - 1)
    length = np.cumsum(end - start)
    times = np.stack([start, end], axis=1).reshape(-1)
    until = np.stack([np.concatenate([[0.0], length[:-1]]), length], axis=1).reshape(-1)
    return np.diff(np.interp(edges, times, until))


def _row(states: list[str], colours: bool) -> Text:
    """A row of the chart."""
    if not colours:
        return Text("".join(_MARKS[state][0] for state in states))
    out = Text()
    for state in states:
        _, block, style = _MARKS[state]
        out.append(block, style)
    return out


def summary_lines(plan: Plan, timeline: StepTimeline) -> Iterator[Text]:
    """The simulated step beside its price."""
    difference = timeline.step_s / timeline.priced_s - 1.0
    yield Text()
    yield Text(
        f"step {format_seconds(timeline.step_s)} simulated, {format_seconds(timeline.priced_s)} by its price: "
        f"{share(difference, 3):+.1%}",
        style="yellow" if abs(difference) >= 0.05 else "",
    )
    busiest = timeline.busiest
    waits = f"stages wait {share(timeline.bubble_share, 3):.1%} of their time; the busiest is stage {busiest} with "
    busy = format_seconds(float(timeline.busy_s[busiest]))
    yield Text(f"{waits}{busy} of passes" if timeline.ranks > 1 else f"passes take {busy}")
    fullest = int(np.argmax(timeline.peak_bytes))
    peak, problem = float(timeline.peak_bytes[fullest]), plan.problem
    more = f", {format_bytes(plan.peak_bytes)} in the plan" if abs(peak - plan.peak_bytes) > 1e-6 * peak else ", as in the plan"
    over = float(problem.excess_bytes(peak)) > 0
    yield Text(
        f"peak {format_bytes(peak)} allocated on stage {fullest}{more}; "
        f"{'DOES NOT FIT: ' if over else ''}up to {format_bytes(problem.peak_limit_bytes)} fit",
        style="red" if over else "",
    )
