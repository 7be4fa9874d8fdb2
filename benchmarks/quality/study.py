"""Published layouts beside the best plans of their questions, priced by the same model.

Questions are solved by several processes, each question once. Times in seconds, memory in bytes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.accuracy.rows import Result, device_bytes, outcome
from benchmarks.quality.questions import Question, priced, question, with_features
from moeplan.costmodels.layout import Layout
from moeplan.planner.constraints import violations
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem
from moeplan.planner.solve import solve

A = TypeVar("A")
B = TypeVar("B")

MUCH = 1.3
"""Published time over the best from which a row is looked at for itself."""
ROUNDING = 1e-9
"""Share by which two ways to add up one price may differ."""
SEARCHED = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "micro_batch", "recompute", "dispatcher", "ep_overlap", "stages")
"""Fields by which a plan is the published layout or another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What `solve` found."""

    best: Layout
    """The fastest plan."""
    best_s: float
    first_s: float
    """Step time of the plan that comes first: of those that tie with the fastest the most robust."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A published layout beside the best plan of its question."""

    result: Result
    question: Question
    answer: Answer | None
    """None: no plan fits."""
    alike: Answer | None
    """The best with the published dispatcher and overlap; None: no such plan fits."""
    excess_bytes: float
    """By how much the published layout exceeds the device; at most 0: it fits."""
    broken: tuple[str, ...]
    """Rules that the published layout breaks."""

    @property
    def published(self) -> Layout:
        """The published layout."""
        return self.result.run.layout

    @property
    def ratio(self) -> float:
        """Predicted time of the published layout over that of the best; only where there is a best."""
        assert self.answer is not None
        return self.result.predicted_s / self.answer.best_s

    @property
    def ratio_alike(self) -> float:
        """The same with the published dispatcher and overlap; infinite where no such plan fits."""
        return self.result.predicted_s / self.alike.best_s if self.alike is not None else float("inf")

    @property
    def fits(self) -> bool:
        """Whether the published layout is said to fit."""
        return self.excess_bytes <= 0

    @property
    def worse(self) -> bool:
        """Whether a published layout that the planner accepts is faster than what it finds."""
        accepted = self.fits and not self.broken
        return accepted and (self.answer is None or self.ratio < 1.0 - ROUNDING)

    @property
    def missed(self) -> bool:
        """Whether a published layout that ran is said not to fit."""
        return not self.fits and outcome(self.result) == "ran"

    @property
    def same(self) -> bool:
        """Whether the best plan is the published layout."""
        best = self.answer.best if self.answer is not None else None
        return best is not None and all(getattr(self.published, name) == getattr(best, name) for name in SEARCHED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that the page is made of."""

    comparisons: tuple[Comparison, ...]
    left_out: tuple[Result, ...]
    """Rows of models with experts, GPUs and batch known, that cannot be priced."""
    questions: int
    """Distinct questions."""


def study(rows: Sequence[Mapping[str, str]], jobs: int = 1, solver: Callable[[Problem], Answer | None] | None = None) -> Study:
    """Solve the questions of all rows and compare; `solver` stands in for `solve`."""
    known, left_out = priced(rows)
    asked = [question(r) for r in known]
    alike = [with_features(q, r.run.layout) for q, r in zip(asked, known, strict=True)]
    distinct = {q.key: q for q in (*asked, *alike)}
    found = dict(zip(distinct, _mapped(solver or answer, [q.problem for q in distinct.values()], jobs), strict=True))
    compared = [_comparison(r, q, found[q.key], found[a.key]) for r, q, a in zip(known, asked, alike, strict=True)]
    return Study(comparisons=tuple(compared), left_out=tuple(left_out), questions=len({q.key for q in asked}))


def answer(problem: Problem) -> Answer | None:
    """What `solve` says; None: nothing fits."""
    plans = solve(problem).plans
    if not plans:
        return None
    best = min(plans, key=lambda plan: plan.step_s)
    return Answer(best=best.layout, best_s=best.step_s, first_s=plans[0].step_s)


def distinct(comparisons: Iterable[Comparison]) -> list[list[Comparison]]:
    """Comparisons by question and published layout; runs of one recipe repeat from release to release."""
    groups: dict[Any, list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault(_identity(c), []).append(c)
    return list(groups.values())


def _identity(c: Comparison) -> tuple[Any, ...]:
    return (*c.question.key, c.published)


def _comparison(result: Result, asked: Question, found: Answer | None, alike: Answer | None) -> Comparison:
    problem = asked.problem
    surplus = device_bytes(result, problem.device_bytes) - problem.device_bytes
    return Comparison(
        result=result,
        question=asked,
        answer=found,
        alike=alike,
        excess_bytes=float(problem.excess_bytes(result.priced.peak_bytes)) - max(0.0, surplus),
        broken=tuple(v.rule for v in violations(problem, result.run.layout)),
    )


def saved(c: Comparison) -> list[tuple[str, float]]:
    """Parts by which the step times differ, in shares of the published one, the largest first; above 0: the best saves it."""
    assert c.answer is not None and c.result.priced.cost is not None
    before = c.result.priced.cost.parts
    after = price_plan(c.question.problem, c.answer.best).time.parts
    names = dict.fromkeys((*before, *after))
    parts = [(n, (float(before.get(n, 0.0)) - float(after.get(n, 0.0))) / c.result.predicted_s) for n in names]
    return sorted(parts, key=lambda part: -abs(part[1]))


def _mapped(work: Callable[[A], B], items: Sequence[A], jobs: int) -> list[B]:
    """`work` on every item, by several processes if there is enough of it."""
    if jobs < 2 or len(items) < 2:
        return [work(item) for item in items]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, items))
