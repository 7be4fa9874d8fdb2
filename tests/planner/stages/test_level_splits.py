"""Level splits hold every layer once, cost what stage problems say, and are seldom far from the best of all splits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moeplan.costmodels.memory import rank_parameters, unit_parameters
from moeplan.costmodels.stages import all_ranks
from moeplan.planner.stages.level_splits import LevelSplits, level_splits
from moeplan.planner.stages.problem import chunk_sizes
from moeplan.planner.stages.setup import Group, groups, split_text
from tests.planner.stages.test_refine import every_split
from tests.planner.stages.test_setup import CASES, case


def level(index: int) -> list[Group]:
    problem, rows, _ = case(index)
    return list(groups(problem, rows))


@pytest.mark.parametrize(("p", "v"), [(2, 2), (2, 19), (4, 5), (8, 4), (16, 3), (4, 1)])
@pytest.mark.parametrize("layers", [61, 94])
def test_level_splits_hold_every_layer_once(layers: int, p: int, v: int) -> None:
    low, high = chunk_sizes(layers, p, v)
    fewest, most = [low] * (p * v), [high] * (p * v)
    fewest[0] = fewest[-1] = 0
    splits = level_splits(p, v, layers, tuple(fewest), tuple(most))
    assert len(splits) and (splits.sum(axis=1) == layers).all() and len(np.unique(splits, axis=0)) == len(splits)
    assert (splits >= fewest).all() and (splits <= most).all()
    inner = splits[:, p:-p].reshape(len(splits), -1, p) if v > 2 else np.zeros((1, 1, 1))
    assert (np.ptp(inner, axis=2) <= 1).all()


@pytest.mark.parametrize("index", [i for i, (*_, fields) in enumerate(CASES) if fields.get("vpp", 1) > 1])
def test_they_cost_what_stage_problems_say(index: int) -> None:
    for group in level(index):
        splits, stages = LevelSplits(group), group.one(0)
        sizes, places = splits.splits, np.arange(len(splits.splits))
        spans, longest = splits.spans()
        assert spans[0] == pytest.approx(stages.spans(sizes), rel=1e-12)
        assert (longest[0] <= spans[0] / group.batches * (1 + 1e-9)).all()
        assert splits.exact_spans(0 * places, places) == pytest.approx(stages.exact_spans(sizes), rel=1e-12)
        assert (splits.fits(np.array([0]), places)[0] == (stages.excess_bytes(sizes) <= 0.0)).all()


@pytest.mark.parametrize("index", [i for i, (*_, fields) in enumerate(CASES) if fields.get("vpp", 1) > 1])
def test_the_fullest_rank_holds_what_prices_say_but_for_the_final_norm(index: int) -> None:
    problem, rows, _ = case(index)
    units = unit_parameters(problem.model, rows)
    for group in groups(problem, rows):
        splits = LevelSplits(group)
        some = np.arange(0, len(splits.splits), max(1, len(splits.splits) // 20))
        held = splits.most_parameters(0 * some, some)
        for place, sizes in enumerate(splits.splits[some]):
            ranks = all_ranks(problem.model, group.ranks, group.chunks_per_rank, split_text(problem, sizes, group.alone))
            actual = rank_parameters(problem.model, ranks, units)
            norm = problem.model.hidden
            assert actual.dense.max() - norm <= held.dense[place] <= actual.dense.max()
            assert held.expert[place] == pytest.approx(actual.expert.max(), rel=1e-12)


def test_few_splits_that_are_not_level_are_faster() -> None:
    rng, found, lost = random.Random(3), 0, []
    for index in (4, 7):
        for group in level(index):
            splits, stages = LevelSplits(group), group.one(0)
            every = np.array(list(every_split(stages))) if index == 7 else None
            if every is None or len(every) > 4000:
                every = np.array([random_level(rng, group) for _ in range(4000)])
            best = stages.exact_spans(splits.splits).min()
            lost.append(1.0 - stages.exact_spans(every).min() / best)
            found += 1
    assert found == 2 and max(lost) < 0.005


def random_level(rng: random.Random, group: Group) -> list[int]:
    """Layers of each chunk: as few as may be, then the others anywhere."""
    sizes = list(group.fewest)
    while sum(sizes) < len(group.kinds):
        chunk = rng.randrange(len(sizes))
        sizes[chunk] += sizes[chunk] < group.most[chunk]
    return sizes
