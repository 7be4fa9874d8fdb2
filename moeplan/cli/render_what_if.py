"""What people see of a plan's sensitivity: what each change of the question would bring, the largest first."""

from __future__ import annotations

import os
from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.options import print_json, progress_bar
from moeplan.cli.render import console, title
from moeplan.planner.best_plans import SAME
from moeplan.planner.plan import Plan
from moeplan.planner.plan_data import layout_data
from moeplan.planner.what_if import Answer, WhatIf, what_if
from moeplan.units import format_bytes, format_seconds


def report(plan: Plan, as_json: bool) -> None:
    """Ask and print."""
    with progress_bar("solving changed questions") as progress:
        found = what_if(plan, jobs=os.cpu_count() or 1, progress=progress)
    if as_json:
        print_json(data(found))
    else:
        show(found)


def data(found: WhatIf) -> dict[str, Any]:
    """The same for machines."""
    best = found.best
    return {
        "step_s": found.plan.step_s,
        "best": None if best is None else {"step_s": best.step_s, "layout": layout_data(best.layout)},
        "binds": [a.constraint for a in found.binding],
        "changes": [_answer_data(a) for a in found.answers],
    }


def _answer_data(answer: Answer) -> dict[str, Any]:
    out: dict[str, Any] = {"constraint": answer.constraint, "change": answer.said, "words": answer.words}
    if answer.plan is None:
        excess = answer.excess_bytes if answer.excess_bytes < float("inf") else None
        return {**out, "fits": False, "excess_bytes": excess}
    return {
        **out,
        "fits": True,
        "gpu_time_per_token": answer.ratio - 1.0,
        "sigma": answer.sigma,
        "noise": answer.noise,
        "step_s": answer.plan.step_s,
        "part": answer.part,
        "part_shares": list(answer.part_shares),
        "layout": layout_data(answer.plan.layout),
    }


def show(found: WhatIf) -> None:
    """Print what binds, and every answer."""
    out, best = console(), found.best
    out.print(Text(title(found.plan), style="bold"))
    if best is None:
        out.print(Text("no plan of this question fits; changes are compared with this one", style="red"))
    elif best.step_s < found.plan.step_s * (1.0 - SAME):
        slower = found.plan.step_s / best.step_s - 1.0
        out.print(f"this plan takes {slower:.1%} longer than the best of its question, which changes are compared with:")
    now = best or found.plan
    out.print(f"{now.layout.degrees()}, micro-batch {now.layout.micro_batch}: {format_seconds(now.step_s)} a step")
    names = ", ".join(a.constraint for a in found.binding)
    out.print(f"binds: {names}" if names else "nothing binds by more than the noise")
    out.print()
    out.print(_table(found))
    out.print(Text("time: GPU time per token of the best plan of each changed question; ~: within the noise", style="dim"))


def _table(found: WhatIf) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("what if", overflow="fold", max_width=34)
    for name in ("time", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("then the layout has", overflow="fold", ratio=3)
    table.add_column("most of it", overflow="fold", ratio=2)
    for answer in found.answers:
        if answer.plan is None:
            missing = format_bytes(answer.excess_bytes) if answer.excess_bytes < float("inf") else ""
            reason = f"no plan fits{f', {missing} are missing' if missing else ''}"
            table.add_row(answer.said, "-", "-", Text(reason, style="red"), "")
            continue
        gain = "same" if answer.same else f"{'~' if answer.noise else ''}{answer.ratio - 1.0:+.1%}"
        before, after = answer.part_shares
        style = "dim" if answer.noise or answer.same else "green" if answer.ratio < 1.0 else "yellow"
        table.add_row(
            answer.said,
            Text(gain, style=style),
            format_seconds(answer.plan.step_s),
            ", ".join(d.now for d in answer.layout) or "-",
            "" if answer.same else f"{answer.part} {before:.1%} -> {after:.1%}",
        )
    return table
