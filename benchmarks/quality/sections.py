"""The chapters of docs/quality.md, from a study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.accuracy.report import Section, Table
from benchmarks.accuracy.rows import outcome
from benchmarks.quality.study import MUCH, SEARCHED, Comparison, Study, distinct, saved
from moeplan.costmodels.layout import Layout
from moeplan.units import GIB

BINS = (1.0, 1.005, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, float("inf"))
"""Edges of the histogram."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
PARTS = 4
"""Parts of a step that are shown."""
MARK = 2
"""Layouts that a mark of the histogram stands for."""


def layout_text(layout: Layout, pipeline: bool = False) -> str:
    """A layout in few words: degrees, micro-batch, dispatcher, overlap, recompute, and its split if asked for."""
    parts = [layout.degrees(), f"mb{layout.micro_batch}", layout.dispatcher, "overlap" * layout.ep_overlap]
    parts += [f"recompute {'+'.join(layout.recompute)}" * bool(layout.recompute), layout.stages * pipeline]
    return " ".join(p for p in parts if p)


def question_text(c: Comparison) -> str:
    """A question in few words."""
    run = c.result.run
    work = run.workload
    software = f"{work.precision.name}, {work.era.name}"
    asked = f"{run.model.name} on {run.cluster.name}, {work.global_batch} x {work.seq_len}, {software}"
    return "; ".join((asked, *c.question.pinned))


def ids(group: Sequence[Comparison]) -> str:
    """The rows of a group: the first, and how many more."""
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return c.result.priced.id + more if (c := group[0]) else ""


def summary(study: Study) -> Section:
    """What was asked, and the demands with what is met."""
    cases = study.comparisons
    worse, missed = sum(c.worse for c in cases), sum(c.missed for c in cases)
    ran = sum(outcome(c.result) == "ran" for c in cases)
    behind = sum(c.answer is not None and c.result.predicted_s < c.answer.first_s and c.fits for c in cases)
    demands = (
        ("the best plan is predicted slower than a published layout that the planner accepts", worse, len(cases)),
        ("a published layout that ran is said not to fit", missed, ran),
        ("of plans that tie, the one listed first is predicted slower than the published layout", behind, len(cases)),
        ("the published layout breaks a rule of today's Megatron", sum(bool(c.broken) for c in cases), len(cases)),
    )
    pinned = [name for name in dict.fromkeys(p.split("=")[0] for c in cases for p in c.question.pinned)]
    return Section(
        title="What is compared",
        text=(
            f"{len(cases)} published rows of models with experts name their GPUs and batch and can be priced; they ask "
            f"{study.questions} questions. `solve` gets the question of each: model, cluster, batch, sequence, precision, "
            "software era and routing as published. Fields that no search varies belong to the question and are pinned where "
            f"the run differs from what every search takes ({', '.join(f'`{name}`' for name in pinned)}). Both layouts are "
            "priced by the same model, so what follows says how good the search is and how much the published layouts leave, "
            "as far as the model is right ([accuracy](accuracy.md)); it is no measurement.",
        ),
        tables=(
            Table(columns=("demand that is missed", "rows", "of"), rows=tuple((t, str(n), str(m)) for t, n, m in demands)),
        ),
    )


def distribution(study: Study) -> Section:
    """Published over best predicted time: quantiles and a histogram."""
    groups = [g[0] for g in distinct(study.comparisons) if g[0].answer is not None]
    ratios = np.array([c.ratio for c in groups])
    alike = np.array([c.ratio_alike for c in groups if np.isfinite(c.ratio_alike)])
    rows = [
        ("layouts, free to change everything", ratios),
        ("with the published dispatcher and overlap", alike),
        ("all rows", np.array([c.ratio for c in study.comparisons if c.answer is not None])),
    ]
    table = Table(
        columns=("published / best predicted time", "number", "least", "10 %", "25 %", "median", "75 %", "90 %", "most"),
        rows=tuple((name, str(len(v)), *(f"{q:.3f}" for q in np.quantile(v, QUANTILES))) for name, v in rows),
    )
    free, bound = (np.histogram(np.maximum(v, 1.0), BINS)[0] for v in (ratios, alike))
    histogram = Table(
        columns=("published / best", "layouts", "free", "with the published dispatcher and overlap"),
        wide=("free", "with the published dispatcher and overlap"),
        rows=tuple(
            (_bin(low, high), str(a), _bar(a), _bar(b))
            for low, high, a, b in zip(BINS[:-1], BINS[1:], free, bound, strict=True)
        ),
    )
    return Section(
        title="Published over best predicted time",
        text=(
            "The same recipe stands in the table once for every release; each pair of question and layout counts once, but in "
            "the last line. The second line leaves `solve` the dispatcher and the overlap of expert communication of the "
            "published run, so that only degrees, micro-batch, stages and recompute differ.",
        ),
        tables=(table, histogram),
    )


def _bin(low: float, high: float) -> str:
    return f"{low:g} to {high:g}" if np.isfinite(high) else f"above {low:g}"


def _bar(count: int) -> str:
    return "#" * -(-int(count) // MARK)


def equals(study: Study) -> Section:
    """Rows whose published layout is the best."""
    groups = [g for g in distinct(study.comparisons) if g[0].same]
    near = sum(g[0].answer is not None and g[0].ratio < BINS[1] for g in distinct(study.comparisons))
    rows = tuple((ids(g), question_text(g[0]), layout_text(g[0].published)) for g in groups)
    table = Table(columns=("rows", "question", "layout"), rows=rows, wide=("question", "layout"))
    text = f"Distinct published layouts that are the best of their question: {len(groups)}; within 0.5 % of it: {near}."
    return Section(title="Published layouts that are the best", text=(text,), tables=(table,) if rows else ())


def not_feasible(study: Study) -> Section:
    """Layouts that ran and are said not to fit, then those that failed."""
    groups = [g for g in distinct(study.comparisons) if not g[0].fits]
    rows = tuple(
        (ids(g), question_text(c), layout_text(c.published), f"{c.excess_bytes / GIB:.1f}", outcome(c.result) or "not told",
         c.result.row.get("peak_mem_gib") or "-", f"{c.result.priced.peak_bytes / GIB:.1f}")
        for g in groups for c in g[:1]
    )  # fmt: skip
    columns = ("rows", "question", "layout", "exceeds by GiB", "source", "measured peak GiB", "predicted peak GiB")
    return Section(
        title="Published layouts that are said not to fit",
        text=("Peak and what must stay free beside it, over the memory of the device.",),
        tables=(Table(columns=columns, rows=rows, wide=("question", "layout", "source")),) if rows else (),
    )


def much_faster(study: Study) -> Section:
    """Layouts that the best beats by far, with the parts of the step that differ."""
    groups = [g for g in distinct(study.comparisons) if g[0].answer is not None and g[0].ratio > MUCH]
    groups.sort(key=lambda g: -g[0].ratio)
    rows = tuple(_much(g) for g in groups)
    columns = ("rows", "question", "published", "best", "published / best", "same software", "predicted / measured",
               "parts of the step")  # fmt: skip
    return Section(
        title=f"Where the best is predicted more than {MUCH:g} times as fast",
        text=(
            "*Same software* is the ratio with the published dispatcher and overlap. *Predicted / measured* is that of the "
            "published layout: where it is far above 1 the model is too slow for the published layout, and part of the ratio "
            "is that. *Parts of the step* are those by which the best differs most, in shares of the published step.",
        ),
        tables=(Table(columns=columns, rows=rows, wide=("question", "published", "best", "parts of the step")),)
        if rows
        else (),
    )


def _much(group: Sequence[Comparison]) -> tuple[str, ...]:
    c = group[0]
    assert c.answer is not None
    measured = [x.result.predicted_s / x.result.measured_s for x in group if x.result.row.get("measured_step_s")]
    agreed = f"{min(measured):.2f}" + (f" to {max(measured):.2f}" if max(measured) - min(measured) > 0.01 else "")
    return (
        ids(group), question_text(c), layout_text(c.published), layout_text(c.answer.best), f"{c.ratio:.2f}",
        f"{c.ratio_alike:.2f}" if np.isfinite(c.ratio_alike) else "none fits", agreed if measured else "-",
        ", ".join(f"{name.split('/')[-1]} {-share:+.0%}" for name, share in saved(c)[:PARTS]),
    )  # fmt: skip


def worse(study: Study) -> Section:
    """Published layouts that `solve` does not reach: what its space lacks."""
    groups = [g for g in distinct(study.comparisons) if g[0].worse]
    rows = tuple((ids(g), question_text(g[0]), *_lacks(g[0])) for g in groups)
    columns = ("rows", "question", "published / best", "published layout", "differs in")
    return Section(
        title="Published layouts that `solve` does not reach",
        text=("None." if not rows else "Each names a layout that the space lacks.",),
        tables=(Table(columns=columns, rows=rows, wide=columns[1:2] + columns[3:]),) if rows else (),
    )


def _lacks(c: Comparison) -> tuple[str, str, str]:
    shown = layout_text(c.published, pipeline=True)
    if c.answer is None:
        return "no plan", shown, "everything"
    best = c.answer.best
    differing = [n for n in SEARCHED if getattr(c.published, n) != getattr(best, n)]
    return f"{c.ratio:.5f}", shown, "; ".join(f"{n}: best {getattr(best, n) or 'default'}" for n in differing)


def left_out(study: Study) -> Section:
    """Rows with GPUs and batch that cannot be priced."""
    rows = tuple((r.row["id"], r.row["model"], r.priced.reason.split(" (did you")[0]) for r in study.left_out)
    table = Table(columns=("row", "model", "reason"), rows=rows, wide=("model", "reason"))
    return Section(title="Rows that are not compared", tables=(table,) if rows else (), text=() if rows else ("None.",))


def chapters(study: Study) -> list[Section]:
    """All chapters in the order of the page."""
    made = (summary, distribution, worse, not_feasible, equals, much_faster, left_out)
    return [section(study) for section in made]
