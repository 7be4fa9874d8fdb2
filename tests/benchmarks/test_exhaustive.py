"""The certified search beside an exhaustive one: two problems searched for real, what is enumerated, a whole page."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.exhaustive import __main__ as command
from benchmarks.exhaustive import sections, study
from benchmarks.exhaustive.everything import every_split, layouts, number_of_splits, recompute_sets, searched_splits
from benchmarks.exhaustive.questions import QUESTIONS, Question
from benchmarks.exhaustive.study import Comparison
from moeplan.costmodels.stages import check_split, format_split, parse_split
from moeplan.planner import space
from moeplan.planner.constraints import violations
from moeplan.planner.plan import price_plan

BY_MODEL = {q.model: q for q in QUESTIONS}
TWO = (
    BY_MODEL["gpt-3-175b"],
    replace(BY_MODEL["mixtral-8x22b"], layers=6, pins="cp=1 tp<=4 etp=1 micro_batch<=2 vpp<=3 pp>1"),
)
"""A dense model as it is on the page, and a smaller problem whose best plan is a pipeline."""


@functools.cache
def two() -> tuple[Comparison, ...]:
    return tuple(map(study.compare, TWO))


@pytest.mark.parametrize("place", range(len(TWO)))
def test_both_searches_find_the_same_optimum(place: int) -> None:
    c = two()[place]
    assert c.same and c.gap == 0.0 and c.everything.best is not None and c.found is not None
    assert 0 < c.opened < c.everything.stage_problems / 10
    assert c.everything.best_of_all_s <= c.everything.best_s and min(c.everything.losses) >= 0.0
    plan = price_plan(TWO[place].problem(), c.everything.best)
    assert plan.step_s == pytest.approx(c.everything.best_s, rel=1e-12) and plan.excess_bytes <= 0.0
    assert violations(TWO[place].problem(), c.everything.best) == []


@pytest.mark.parametrize(("name", "pp", "vpp"), [("deepseek-v3", 4, 1), ("deepseek-v3", 2, 2), ("llama3-70b", 4, 2)])
def test_every_split_is_enumerated_once_and_holds_those_of_the_search(name: str, pp: int, vpp: int) -> None:
    problem = BY_MODEL[name].problem()
    model = problem.model
    splits = every_split(model, pp * vpp)
    assert len(splits) >= number_of_splits(model, pp * vpp) and (model.mtp or len(splits) == number_of_splits(model, pp * vpp))
    for text in splits:
        assert check_split(text, len(model.layers), len(model.mtp), pp, vpp) is None
        assert format_split(parse_split(text)) == text
    for again in (False, True):
        assert set(searched_splits(problem, pp, vpp, again)) <= set(splits)


@pytest.mark.parametrize("question", QUESTIONS, ids=Question.name)
def test_what_recomputes_is_what_the_search_knows(question: Question) -> None:
    problem = question.problem()
    assert {again.mask for again in recompute_sets(problem.model)} >= set(space.recompute_sets(problem))
    first = next(layouts(problem))
    assert first.world == problem.profile.cluster.gpus and not first.recompute and not first.stages


def changed(factor: float) -> Comparison:
    """A comparison whose certified search is `factor` times as slow as the optimum."""
    c = two()[0]
    return replace(c, found_s=c.everything.best_s * factor)


def test_a_missed_optimum_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert changed(1 + 1e-13).same and not changed(1 + 1e-9).same and not changed(1 - 1e-9).same
    nothing = replace(two()[0], found=None, found_s=np.inf)
    assert not nothing.same
    monkeypatch.setattr(command, "study", lambda questions, jobs: [changed(1.01), two()[1]])
    target = tmp_path / "page.md"
    assert command.main(["--page", str(target)]) == 1
    assert f"missed: the optimum of {TWO[0].name()}" in capsys.readouterr().err
    text = target.read_text(encoding="utf-8")
    assert "Same optimum in 1 of 2 problems" in text and "| no: " in text


def test_losses_by_hand() -> None:
    known = replace(two()[0], everything=replace(two()[0].everything, losses=[0.0, 0.0, 0.02, 0.1]))
    row = sections.losses([known]).tables[0].rows[0]
    assert row[1:5] == ("4", "50%", "50%", "25%") and row[5] == "1.00%" and row[8] == "10.00%"


def test_the_page_is_generated_and_whole() -> None:
    text = command.PAGE.read_text(encoding="utf-8")
    assert text.startswith("# Exhaustive search\n\nWritten by `python -m benchmarks.exhaustive`")
    for section in sections.chapters(two()):
        assert f"\n## {section.title}\n" in text
    assert all(f"\n| {q.name()}" in text for q in QUESTIONS), "docs/exhaustive.md is stale: run `make exhaustive`"
    assert f"Same optimum in {len(QUESTIONS)} of {len(QUESTIONS)} problems" in text
