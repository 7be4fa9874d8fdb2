"""What people see of a tune: its trials, what is expected of the plans that were not tried, and why it ended."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from moeplan.planner.measurement import called
from moeplan.runtime.journal import Entry
from moeplan.runtime.outcomes import WORDS
from moeplan.runtime.tune import Tuned
from moeplan.units import GIB, format_seconds

COLOURS = {"done": "", "out_of_memory": "yellow", "hang": "red", "crash": "red", "unreadable": "red"}
"""Styles of outcomes."""


def trials_table(tuned: Tuned) -> Table:
    """All candidates: those that ran by their time, those that failed, then the others by what is expected of them."""
    problem = tuned.plan.problem
    title = f"{problem.model.name} on {problem.profile.cluster.name}: {tuned.trials} trials of {len(tuned.entries)} candidates"
    table = Table(title=title, title_style="bold", title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("trial", justify="right")
    table.add_column("plan")
    for name in ("predicted", "expected", "measured", "of best", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    best = tuned.best
    for entry in sorted(tuned.entries, key=lambda e: _order(tuned, e)):
        found = entry.outcome
        expected_s, measured, share, peak = entry.expected_s, "", "", ""
        if found is None and tuned.expected is not None:
            expected_s = float(tuned.expected.step_s[entry.place])
        if found is not None and found.step_s and best is not None and best.outcome is not None:
            measured = format_seconds(found.step_s)
            share = f"{found.step_s / best.outcome.step_s - 1:+.1%}" if entry is not best else "best"
        if found is not None and found.peak_bytes:
            peak = f"{found.peak_bytes / GIB:.1f}"
        table.add_row(
            str(entry.trial or ""),
            called(entry.layout),
            format_seconds(entry.predicted_s),
            format_seconds(expected_s) if expected_s else "-",
            measured or "-",
            share,
            peak or "-",
            _said(tuned, entry),
            style="bold green" if entry is best else None if found is not None else "dim",
        )
    return table


def _order(tuned: Tuned, entry: Entry) -> tuple[int, float]:
    found = entry.outcome
    if found is None:
        expected = float(tuned.expected.step_s[entry.place]) if tuned.expected is not None else entry.predicted_s
        return (3 if entry.phase == "skipped" else 2), expected
    return (0, found.step_s) if found.kind == "done" else (1, entry.trial)


def _said(tuned: Tuned, entry: Entry) -> Text:
    """What became of a candidate, or why nothing did."""
    found = entry.outcome
    if found is not None:
        if found.kind == "done":
            return Text(found.message or f"{found.steps} steps")
        return Text(f"{WORDS[found.kind]}: {found.message}"[:200], style=COLOURS.get(found.kind, "red"))
    if entry.phase == "skipped":
        return Text(f"skipped: {entry.why}")
    if tuned.expected is None:
        return Text("not tried")
    chance, gain = float(tuned.expected.chance[entry.place]), float(tuned.expected.gain[entry.place])
    doubts = tuned.cautions[entry.place].doubts
    return Text(
        f"not tried: {chance:.0%} likely to win, {gain:.1%} to gain" + (f"; in doubt: {', '.join(doubts)}" if doubts else "")
    )


def verdict_lines(tuned: Tuned) -> Iterable[Text]:
    """Why it ended, what the trials said about the model, and what was won."""
    yield Text(f"ended: {tuned.verdict}")
    if tuned.expected is not None:
        widened = tuned.expected.widened
        wide = f"; deviations widened {widened:.1f} times, as the trials differ by more than stated" if widened > 1.05 else ""
        yield Text(f"model: {tuned.expected.verdict}{wide}", style="dim")
    best = tuned.best
    if best is None or best.outcome is None:
        return
    given = next((e for e in tuned.entries if e.place == 0), None)
    against = ""
    if given is best:
        against = ", the plan that was given"
    elif given is not None and given.outcome is not None:
        took = given.outcome.step_s
        against = (
            f", {took / best.outcome.step_s - 1:.1%} faster than the given plan"
            if took
            else f"; the given plan: {WORDS[given.outcome.kind]}"
        )
    yield Text(f"winner: {called(best.layout)} with {format_seconds(best.outcome.step_s)} a step{against}", style="bold green")
