"""The chapters of docs/accuracy.md, from a study."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.accuracy import fitting
from benchmarks.accuracy.report import Section, Table
from benchmarks.accuracy.rows import EXCLUSIONS, FAMILIES, NOT_PRICED, Memory, Result, outcome
from benchmarks.accuracy.scores import LEAST_LAYOUTS, Errors, memory_errors, pooled_tau, step_errors
from benchmarks.accuracy.study import GOAL_GROUPS, GROUP_NAMES, Study, fit_errors
from benchmarks.accuracy.suspicions import suspicions, worst
from benchmarks.accuracy.thresholds import Check

COLUMNS = ("rows", "median", "mean", "within 10 %", "bias")


def percent(value: float, sign: bool = False) -> str:
    """A fraction as percent."""
    return f"{100 * value:+.1f} %" if sign else f"{100 * value:.1f} %"


def error_cells(errors: Errors) -> tuple[str, ...]:
    """The columns of an error."""
    shares = (percent(errors.median), percent(errors.mean), percent(errors.within))
    return (str(errors.rows), *shares, percent(errors.bias, sign=True))


def goals(checks: Sequence[Check]) -> Section:
    """Thresholds with the figures of today, and the goals."""
    rows = tuple(
        (c.threshold.figure, f"{c.value:.2f}" if "tau" in c.threshold.figure else f"{c.value:.1f} %", c.threshold.demand,
         c.threshold.goal, "" if c.met else "MISSED")
        for c in checks
    )  # fmt: skip
    return Section(
        title="Figures, thresholds and goals",
        text=(
            "A figure outside its threshold fails the command. Thresholds are what is met today with a little slack, goals are "
            "what is aimed at; figures and bounds are percent, or Kendall's tau.",
        ),
        tables=(Table(columns=("figure", "today", "threshold", "goal", ""), rows=rows, wide=("threshold", "goal")),),
    )


def coverage_of_rows(study: Study) -> Section:
    """Which rows are compared, and why others are not."""
    reasons = Counter(r.excluded for r in study.results)
    table = Table(
        columns=("left out", "rows", "rule"),
        wide=("rule",),
        rows=(
            *((e.name, str(reasons[e.name]), e.demands) for e in EXCLUSIONS),
            (
                NOT_PRICED,
                str(reasons[NOT_PRICED]),
                "`moeplan estimate --runs` calls the row unsupported, for the reasons below",
            ),
        ),
    )
    unsupported = Counter(_general(r.priced.reason) for r in study.results if r.excluded == NOT_PRICED)
    why = Table(columns=("reason", "rows"), rows=tuple((k, str(n)) for k, n in unsupported.most_common()))
    parts = sum(r.priced.status == "partial" for r in study.compared)
    return Section(
        title="Rows",
        text=(
            f"Of {len(study.results)} published rows the step time of {len(study.compared)} is compared. In {parts} of them a "
            "cell is blank and a stated default stands for it ([columns of a run table](runs.md)). Rows are left out only by "
            "rules stated in advance, which look at what the source says and never at the error; a row counts under the first "
            "rule that applies.",
        ),
        tables=(table, *([why] if why.rows else [])),
    )


def _general(reason: str) -> str:
    return "adapter fine-tuning (LoRA)" if "LoRA" in reason else reason.split(" (did you")[0]


def step_time(study: Study) -> Section:
    """Errors of the step time, cut in several ways."""
    rows, fitted = study.compared, fitting.fitted_numbers()
    seen = {p.id: "seen" if yes else "unseen" for p, yes in zip(study.points, study.seen, strict=True)}
    cuts: list[tuple[str, Callable[[Result], str]]] = [
        ("source", lambda r: FAMILIES.get(r.family, r.family)),
        ("GPU", lambda r: r.run.cluster.device.name),
        ("model", lambda r: r.kind),
        ("precision", lambda r: r.run.workload.precision.name),
    ]
    if not all(study.seen):
        cuts.append(("whether the model was seen by the fit", lambda r: seen[r.priced.id]))
    places = {g: study.in_group(g) for g in GOAL_GROUPS}
    groups = tuple((GROUP_NAMES[g], *error_cells(step_errors(rows[i] for i in p))) for g, p in places.items() if p)
    return Section(
        title="Step time",
        text=(
            "The error of a row is |predicted / measured - 1|; bias is the median of predicted / measured - 1, below zero "
            "where predictions are too short.",
            f"{len(fitted)} numbers are fitted to the published runs (`benchmarks/fit.py`): {'; '.join(fitted)}. All other "
            "constants come from measurements of kernels and collectives, or from controlled pairs of runs.",
        ),
        tables=(
            Table(columns=("rows of", *COLUMNS), rows=groups),
            *(Table(columns=(f"by {name}", *COLUMNS), rows=_cut(rows, key, step_errors)) for name, key in cuts),
        ),
    )


def _cut(
    rows: Sequence[Result], key: Callable[[Result], str], figures: Callable[[Iterable[Result]], Errors]
) -> tuple[tuple[str, ...], ...]:
    """Lines of a table: the errors of the rows of each key, largest groups first."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for r in rows:
        groups[key(r)].append(r)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple((name, *error_cells(figures(members))) for name, members in ordered)


def left_out(study: Study) -> Section:
    """Grouped cross-validation."""
    lines = []
    for group in GOAL_GROUPS:
        if study.in_group(group):
            lines += [(GROUP_NAMES[group], name, *error_cells(e)) for name, e in fit_errors(study, group).items()]
    return Section(
        title="Without the row's model, without its source",
        text=(
            f"The {len(fitting.shares_in_use())} shares of kernel rates that steps sustain are fitted again without all runs "
            "of one architecture (any version, any number of layers), or of one source, and the runs left out are judged by "
            "that fit; what else is fitted keeps its value. A share that no other run shows falls back to its prior, "
            f"{fitting.PRIOR:g}. The second table shows how far the shares move.",
        ),
        tables=(
            Table(columns=("rows of", "fit", *COLUMNS), rows=tuple(lines), wide=("fit",)),
            _moved_parameters(study),
        ),
    )


def _moved_parameters(study: Study) -> Table:
    in_use, lines = fitting.errors(study.points, fitting.IN_USE), []
    for source, parameters in study.by_source.parameters.items():
        places = [i for i, p in enumerate(study.points) if p.source == source]
        names = sorted({*parameters, *study.fitted})
        changes = [parameters.get(n, 1.0) / study.fitted.get(n, 1.0) - 1.0 for n in names]
        largest = max(changes, key=abs, default=0.0)
        medians = [float(np.median(np.abs(np.expm1(-e[places])))) for e in (in_use, study.by_source.errors)]
        lines.append((FAMILIES.get(source, source), str(len(places)), percent(largest, sign=True), *map(percent, medians)))
    columns = ("source left out", "rows", "largest change of a share", "median error, in use", "median error, left out")
    return Table(columns=columns, rows=tuple(lines))


def memory(study: Study) -> Section:
    """Errors of peak memory."""
    by_family: dict[tuple[str, str], list[Memory]] = defaultdict(list)
    for m in study.memories:
        by_family[FAMILIES.get(m.result.family, m.result.family), m.kind].append(m)
    lines = [(name, kind, *error_cells(memory_errors(group))) for (name, kind), group in sorted(by_family.items())]
    if study.memories:
        once = [m for m in study.memories if not m.repeated]
        lines = [
            ("all", "", *error_cells(memory_errors(study.memories))),
            ("all, every measurement once", "", *error_cells(memory_errors(once))),
            *lines,
        ]
    return Section(
        title="Peak memory",
        text=(
            "Peaks are compared with the prediction of the same quantity:\n"
            "- allocated, fullest rank: the peak of the framework's allocator on the rank where it is largest (the usual "
            "case)\n"
            "- allocated, first stage: MLPerf logs and some ablations print the logging rank, which holds the first pipeline "
            "stage; the prediction is that of the first stage\n"
            "- reserved pool: ms-swift and torchtitan print what the allocator has reserved, ms-swift rounded to whole GiB; "
            "the prediction is the fullest rank's peak with the share that is lost between blocks",
            "Some rows share one measurement (the source measured memory once for several batch sizes); the second line "
            "counts each measurement once. Peaks of runs that later went out of memory count as well.",
        ),
        tables=(Table(columns=("source", "compared", *COLUMNS), rows=tuple(lines), wide=("compared",)),),
    )


def order(study: Study) -> Section:
    """Rank correlation."""
    lines = [(FAMILIES.get(g.family, g.family), g.question, str(g.layouts), f"{g.tau:.2f}") for g in study.rankings]
    pooled = []
    for name, groups in ((f"groups of {LEAST_LAYOUTS} or more", study.rankings), ("groups of 2 or more", study.small_rankings)):
        for family in ("", "folding"):
            members = [g for g in groups if not family or g.family == family]
            if members:
                where = f"{name}, {FAMILIES[family]}" if family else name
                worst_tau = min(g.tau for g in members)
                pairs = sum(g.pairs for g in members)
                pooled.append((where, str(len(members)), str(pairs), f"{pooled_tau(members):.2f}", f"{worst_tau:.2f}"))
    return Section(
        title="Order of layouts",
        text=(
            "Kendall's tau between predicted and measured step times of layouts of one model on the same devices, with the "
            "same precision, sequence length, batch and software release: 1 is the same order, 0 none. Pooled: the mean, "
            f"weighted by pairs of layouts. Groups of fewer than {LEAST_LAYOUTS} layouts say little alone and count only "
            "together.",
        ),
        tables=(
            Table(columns=("pooled", "groups", "pairs", "tau", "worst group"), rows=tuple(pooled)),
            Table(columns=("source", "question", "layouts", "tau"), rows=tuple(lines), wide=("question",)),
        ),
    )


def intervals(study: Study) -> Section:
    """Coverage of the prediction intervals."""
    lines = []
    for name in ("all", *sorted({p.regime for p in study.points})):
        places = [i for i, p in enumerate(study.points) if name in ("all", p.regime)]
        rows = [study.compared[i] for i in places]
        low, high = (float(np.median([getattr(r.priced, e) / r.predicted_s for r in rows])) for e in ("low_s", "high_s"))
        factors = "" if name == "all" else f"{low:.2f} to {high:.2f}"
        shares = (
            np.mean([r.covered for r in rows]),
            *(np.mean([inside[i] for i in places]) for inside in (study.inside_by_model, study.inside_by_source)),
        )
        lines.append((name, str(len(places)), factors, *(percent(float(s)) for s in shares)))
    columns = ("regime", "rows", "interval / prediction", "inside", "inside, model left out", "inside, source left out")
    return Section(
        title="Intervals",
        text=(
            "Every prediction carries an interval that is meant to hold the measured time in 80 % of cases; the median over "
            "the rows is shown. Left out: the sustained shares and all that the interval is made of come from the other runs "
            "(`benchmarks/fit_spread.py`).",
        ),
        tables=(Table(columns=columns, rows=tuple(lines)),),
    )


def fitting_in_memory(study: Study) -> Section:
    """Verdicts on rows that ran or went out of memory."""
    v = study.verdicts
    stated = [r for r in study.results if outcome(r) == "ran" and r.row.get("recompute")]
    right = len(stated) - len({r.priced.id for r in stated} & {r.priced.id for r in v.wrong})
    wrong: dict[str, list[str]] = defaultdict(list)
    for r in v.wrong:
        wrong[FAMILIES.get(r.family, r.family)].append(r.priced.id)
    return Section(
        title="Does it fit",
        text=(
            "A layout is said to fit where its peak and the reserve beside it stay within the device (the planner's own "
            "criterion, `Problem.excess_bytes`). A row ran if it has a step time, and failed if its source reports OOM and no "
            "throughput; rows with both count as neither. Where a source is silent on recompute none is assumed, which asks "
            "for too much memory if there was any. Where a source names another part than the usual one (A100 with 40 GB), "
            "that is the device.",
        ),
        tables=(
            Table(
                columns=("rows that", "rows", "right", "share"),
                rows=(
                    ("ran, said to fit", str(v.ran), str(v.ran_said_to_fit), percent(v.ran_share)),
                    (
                        "of these, recompute is known",
                        str(len(stated)),
                        str(right),
                        percent(right / len(stated) if stated else 1.0),
                    ),
                    (
                        "went out of memory, said not to fit",
                        str(v.failed),
                        str(v.failed_said_not_to_fit),
                        percent(v.failed_share),
                    ),
                ),
            ),
            Table(
                columns=("wrong verdicts", "count", "rows"),
                wide=("rows",),
                rows=tuple((name, str(len(ids)), ", ".join(ids)) for name, ids in sorted(wrong.items())),
            ),
        ),
    )


def worst_rows(study: Study) -> Section:
    """The largest errors with what is suspected."""
    lines = []
    for r in worst(study.compared):
        what = f"{r.run.model.name}, {r.run.cluster.gpus} x {r.run.cluster.device.name}, {r.run.workload.precision.name}"
        off = percent(r.predicted_s / r.measured_s - 1.0, sign=True)
        seconds = (f"{r.measured_s:.3g} s", f"{r.predicted_s:.3g} s")
        lines.append((r.priced.id, what, *seconds, off, "; ".join(suspicions(r, study.compared))))
    return Section(
        title="Worst rows",
        text=("What is suspected is found by rule, from the row and its prediction: a place to look at, not a diagnosis.",),
        tables=(
            Table(
                columns=("row", "run", "measured", "predicted", "error", "look at"), rows=tuple(lines), wide=("run", "look at")
            ),
        ),
    )


def ablations(study: Study) -> Section:
    """What each modelled effect is worth."""
    lines = tuple(
        (e.name, f"{e.overall:+.2f}", str(e.touched), f"{e.on_touched:+.2f}", f"{e.refitted:+.2f}")
        for e in sorted(study.effects, key=lambda e: -e.overall)
    )
    columns = ("without", "change, all rows", "rows touched", "change, rows touched", "change, all rows, fitted again")
    return Section(
        title="What each effect is worth",
        text=(
            "The runs are priced again with one effect removed. The change of the mean |log(measured / predicted)| is given in "
            "points (a hundredth): above zero the effect helps. In the last column the sustained shares are fitted again, with "
            "and without the effect, which takes away what an effect only does to the mean.",
        ),
        tables=(Table(columns=columns, rows=lines),),
    )
