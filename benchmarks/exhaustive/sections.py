"""The chapters of docs/exhaustive.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.accuracy.report import Section, Table
from benchmarks.exhaustive.questions import PIPELINED
from benchmarks.exhaustive.study import Comparison
from moeplan.costmodels.layout import Layout

DEMAND = 50.0
"""Times fewer stage problems that the certified search is to open."""
QUANTILES = (0.5, 0.9, 0.99, 1.0)
LOST = (1e-9, 0.01, 0.05)
"""Losses, shares of a step, above which layouts are counted."""


def question_text(c: Comparison) -> str:
    """A problem in few words."""
    q = c.question
    parts = [q.name(), f"on {q.cluster}, {q.batch} x {q.seq_len}", f"{q.memory_gib:g} GiB" * bool(q.memory_gib), q.pins]
    return "; ".join(p for p in (" ".join(parts[:2]), *parts[2:]) if p)


def layout_text(layout: Layout | None) -> str:
    """A layout in few words."""
    if layout is None:
        return "nothing fits"
    again = f"recompute {layout.recompute_text()}" * bool(layout.recompute)
    stages = layout.stages if layout.pp > 1 else ""
    parts = (layout.degrees(), f"mb{layout.micro_batch}", layout.dispatcher, "overlap" * layout.ep_overlap, again, stages)
    return " ".join(p for p in parts if p and p != "none")


def optimum(known: Sequence[Comparison], title: str) -> Section:
    """Whether both searches agree, and how much each opens."""
    rows = tuple(
        (question_text(c), layout_text(c.everything.best), f"{c.everything.best_s * 1e3:.2f}",
         "yes" if c.same else f"no: {c.found_s * 1e3:.2f}", f"{c.everything.stage_problems}", f"{c.opened}",
         f"{c.fewer:.0f}" if c.opened else "none opened", f"{c.everything.looked_at}", f"{c.everything.seconds:.0f}",
         f"{c.seconds:.1f}")
        for c in known
    )  # fmt: skip
    columns = ("problem", "optimum", "step ms", "found by solve", "stage problems", "opened by solve", "times fewer",
               "priced", "s", "s of solve")  # fmt: skip
    every, opened = (sum(values) for values in ([c.everything.stage_problems for c in known], [c.opened for c in known]))
    reached = sum(c.fewer >= DEMAND for c in known)
    return Section(
        title=title,
        text=(
            f"Same optimum in {sum(c.same for c in known)} of {len(known)} problems. Of {every} stage problems together "
            f"`solve` opens {opened}, {every / max(opened, 1):.0f} times fewer; at least {DEMAND:g} times fewer in {reached} "
            "of the problems.",
            "*Opened*: of the level splits of a stage problem some could be faster by their closed form, so that passes were "
            "run, or a dynamic programme was solved. *Priced*: layouts with a split that the framework accepts, whose memory "
            "was looked at and, where they fit, whose passes were run one by one. Processor time in seconds.",
        ),
        tables=(Table(columns=columns, rows=rows, wide=("optimum", "found by solve")),),
    )


def losses(known: Sequence[Comparison]) -> Section:
    """What level splits lose against all splits."""
    rows = tuple(
        (c.question.name(), str(len(values)), *(f"{(values > least).mean():.0%}" for least in LOST),
         *(f"{q:.2%}" for q in np.quantile(values, QUANTILES)), str(c.everything.only_uneven), str(c.everything.unseen),
         f"{max(0.0, 1.0 - c.everything.best_of_all_s / c.everything.best_s):.2%}" if c.everything.best is not None else "-")
        for c in known if len(values := np.array(c.everything.losses))
    )  # fmt: skip
    columns = (
        "model", "layouts", "any loss", *(f"above {least:.0%}" for least in LOST[1:]),
        *(f"{q:.0%} quantile" if q < 1 else "most" for q in QUANTILES),
        "fit uneven only", "not looked at", "optimum loses",
    )  # fmt: skip
    return Section(
        title="What level splits lose",
        text=(
            "With several chunks a rank, or where only some layers of a chunk recompute, `solve` looks at level splits. Here "
            "each such layout has its best level split beside the best of all ways to place the layers (any number in any "
            "chunk, none in the first and the last). Losses are shares of the step. *Fit uneven only*: layouts that no level "
            "split makes fit and another does. *Not looked at*: layouts with too many splits. *Optimum loses*: how much "
            "faster the best layout of all would be under any split.",
        ),
        tables=(Table(columns=columns, rows=rows),),
    )


def chapters(known: Sequence[Comparison]) -> list[Section]:
    """All chapters, in their order."""
    pipelined = [c for c in known if c.question in PIPELINED]
    free = [c for c in known if c not in pipelined]
    return [optimum(free, "The same optimum"), optimum(pipelined, "Where a pipeline must be"), losses(free)]
