"""What people see of an improvement: edits with the flags that make them, and what each brings."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.render import console
from moeplan.errors import ExportError
from moeplan.exporters.megatron_layout import layout_sections
from moeplan.planner.improve import Edit, Improvement
from moeplan.planner.plan import Plan
from moeplan.units import format_bytes, format_seconds

MOST_SINGLES = 10
"""Single edits that are shown."""


def flag_edits(before: Plan, after: Plan) -> list[str]:
    """Flags of Megatron to set, and to leave out ("drop --x"), on the way from one plan to another."""
    try:
        old, new = (_flags(plan) for plan in (before, after))
    except ExportError:
        return []
    changed = [" ".join((name, *values)) for name, values in new.items() if old.get(name) != values]
    return changed + [f"drop {name}" for name in old if name not in new]


def _flags(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {flag[0]: flag[1:] for flags in layout_sections(plan).values() for flag in flags}


def in_words(edit: Edit) -> str:
    """The fields that change: "PP 16 -> 8, dispatcher alltoall -> deepep"."""
    parts = []
    for name in edit.fields:
        old, new = (_shown(getattr(plan.layout, name)) for plan in (edit.before, edit.after))
        label = name.upper() if len(name) <= 3 else name.replace("_", " ")
        parts.append(f"{label} {old} -> {new}")
    return ", ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return str(value) if value != "" else "even"


def data(found: Improvement) -> dict[str, Any]:
    """The same for machines."""
    return {
        "step_s": found.plan.step_s,
        "best_step_s": found.best.step_s,
        "gain": found.gain,
        "single": [_edit_data(edit) for edit in found.singles],
        "path": [_edit_data(edit) for edit in found.path],
        "best": found.best.to_data(),
    }


def _edit_data(edit: Edit) -> dict[str, Any]:
    layouts = edit.before.layout, edit.after.layout
    return {
        "fields": {name: [getattr(x, name) for x in layouts] for name in edit.fields},
        "flags": flag_edits(edit.before, edit.after),
        "gain": edit.gain,
        "step_s": edit.after.step_s,
        "peak_bytes": edit.after.peak_bytes,
    }


def show(found: Improvement) -> None:
    """Print single edits, the path, and the sum."""
    out, plan = console(), found.plan
    now = f"{format_seconds(plan.step_s)} a step, {format_bytes(plan.peak_bytes)}"
    out.print(Text(f"as it is: {plan.layout.degrees()}, micro-batch {plan.layout.micro_batch}: {now}", style="bold"))
    if plan.excess_bytes > 0:
        out.print(Text(f"it misses the device by {format_bytes(plan.excess_bytes)}", style="bold red"))
    if not found.path:
        out.print("no edit makes it faster: it is the best that the search knows")
        return
    out.print()
    if found.singles:
        out.print(_table("one edit alone", list(found.singles[:MOST_SINGLES])))
        out.print()
    out.print(_table("one after the other, the smallest edits first", list(found.path)))
    out.print()
    after = found.path[-1].after
    total = f"{format_seconds(after.step_s)} a step, {format_bytes(after.peak_bytes)}"
    out.print(Text(f"together {-found.gain:+.1%}: {after.layout.degrees()}, {total}", style="bold green"))


def _table(title: str, edits: list[Edit]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("change", overflow="fold")
    for name in ("step time", "step", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("flags", overflow="fold", style="dim")
    for edit in edits:
        step, memory = format_seconds(edit.after.step_s), format_bytes(edit.after.peak_bytes)
        flags = "\n".join(flag_edits(edit.before, edit.after))
        table.add_row(in_words(edit), f"{-edit.gain:+.1%}", step, memory, flags)
    return table
