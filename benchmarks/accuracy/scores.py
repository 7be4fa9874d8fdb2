"""Figures that say how far predictions are off: errors, rank correlation, shares.

The error of a row is |predicted / measured - 1|, its bias predicted / measured - 1. Shares and errors are fractions here and
percent on the page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from benchmarks.accuracy.rows import Memory, Result, outcome, said_to_fit

LEAST_LAYOUTS = 4
"""Layouts of a group from which its order says something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Error of a set of rows."""

    rows: int
    median: float
    mean: float
    within: float
    """Share of rows within 10 %."""
    bias: float
    """Median of predicted / measured - 1: below zero predictions are too small."""


def error_figures(predicted_over_measured: Iterable[float]) -> Errors:
    """Figures of at least one row, each given as predicted / measured."""
    signed = np.fromiter(predicted_over_measured, np.float64) - 1.0
    off = np.abs(signed)
    return Errors(
        rows=len(off),
        median=float(np.median(off)),
        mean=float(off.mean()),
        within=float(np.mean(off <= 0.1)),
        bias=float(np.median(signed)),
    )


def step_errors(results: Iterable[Result]) -> Errors:
    """Error of the step time."""
    return error_figures(r.predicted_s / r.measured_s for r in results)


def memory_errors(peaks: Iterable[Memory]) -> Errors:
    """Error of the peak memory."""
    return error_figures(m.predicted_bytes / m.measured_bytes for m in peaks)


# -- order of layouts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Layouts of one question, in the order of their measured and of their predicted step times."""

    family: str
    question: str
    layouts: int
    tau: float
    """Kendall's tau-b: 1 the same order, 0 no relation, -1 reversed."""

    @property
    def pairs(self) -> int:
        """Pairs of layouts that can be ordered."""
        return self.layouts * (self.layouts - 1) // 2


def rankings(results: Iterable[Result], least: int = LEAST_LAYOUTS) -> list[Ranking]:
    """Groups with at least `least` layouts of the same model, devices, precision, sequence, batch and software release."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for r in results:
        run = r.run
        question = (run.model.name, f"{run.cluster.gpus} x {run.cluster.device.name}", run.workload.precision.name)
        sizes = (f"{run.workload.seq_len} tokens", f"batch {run.workload.global_batch}")
        groups[(r.family, r.row["source"], *question, *sizes)].append(r)
    out = []
    for (family, _, *asked), members in groups.items():
        layouts = len({r.run.layout for r in members})
        if layouts >= least:
            tau = rank_correlation([r.measured_s for r in members], [r.predicted_s for r in members])
            out.append(Ranking(family=family, question=", ".join(asked), layouts=layouts, tau=tau))
    return sorted(out, key=lambda g: (g.family, g.question))


def rank_correlation(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Kendall's tau-b; 0 where either side does not tell the layouts apart."""
    tau = float(kendalltau(measured, predicted).statistic)
    return 0.0 if np.isnan(tau) else tau


def pooled_tau(groups: Sequence[Ranking]) -> float:
    """Mean of the groups' tau, weighted by their pairs; 0 without groups."""
    pairs = sum(g.pairs for g in groups)
    return sum(g.tau * g.pairs for g in groups) / pairs if pairs else 0.0


# -- does it fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What the planner says of layouts whose fate is known."""

    ran: int
    ran_said_to_fit: int
    failed: int
    failed_said_not_to_fit: int
    wrong: tuple[Result, ...]
    """Rows with the wrong verdict."""

    @property
    def ran_share(self) -> float:
        """Share of rows that ran and are said to fit."""
        return self.ran_said_to_fit / self.ran if self.ran else 1.0

    @property
    def failed_share(self) -> float:
        """Share of rows that went out of memory and are said not to fit."""
        return self.failed_said_not_to_fit / self.failed if self.failed else 1.0


def verdicts(results: Iterable[Result]) -> Verdicts:
    """Verdicts on all rows that either ran or went out of memory."""
    known = [(r, outcome(r), said_to_fit(r)) for r in results if outcome(r)]
    ran = [fits for _, what, fits in known if what == "ran"]
    failed = [fits for _, what, fits in known if what == "out of memory"]
    return Verdicts(
        ran=len(ran),
        ran_said_to_fit=sum(ran),
        failed=len(failed),
        failed_said_not_to_fit=len(failed) - sum(failed),
        wrong=tuple(r for r, what, fits in known if fits != (what == "ran")),
    )
