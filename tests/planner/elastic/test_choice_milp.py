"""Mixed-integer programmes over counts equal their twin and trying all choices, also with skips and few layouts."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Availability, Occupancy, occupancy
from moeplan.planner.elastic.choice import Choices, choose, fastest, only, terms_of
from moeplan.planner.elastic.choice_milp import best_by_milp
from moeplan.planner.elastic.few_layouts import bounded, good_sets
from tests.planner.elastic.chances import brute, option, random_choices
from tests.planner.elastic.test_choice import keeps_odd_nodes_idle, moving


@pytest.mark.parametrize("seed", range(60))
def test_programme_is_its_twin_on_chains(seed: int) -> None:
    choices = random_choices(np.random.default_rng(seed), 4, 4, often=10.0 ** -(seed % 4 + 1))
    terms = terms_of(choices)
    places, upper, _ = best_by_milp(terms, 0, fastest(terms))
    assert terms.goodput(places) == pytest.approx(choose(choices).goodput, rel=1e-9) == upper
    again, *_ = best_by_milp(terms, 0, None)
    assert terms.goodput(again) == pytest.approx(choose(choices).goodput, rel=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_counts_that_skip(seed: int) -> None:
    choices = random_choices(np.random.default_rng(seed), 4, 3, skip=True, often=10.0 ** -(seed % 4 + 1))
    assert choices.occupancy.skips
    found = choose(choices)
    assert found.proven and found.goodput == pytest.approx(brute(terms_of(choices)), rel=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_few_layouts(seed: int) -> None:
    choices = random_choices(np.random.default_rng(seed), 4, 4, skip=bool(seed % 2))
    before = 0.0
    for templates in (1, 2, 3, 4):
        best = brute(terms_of(choices), templates)
        if not best:
            with pytest.raises(ProblemError, match=f"no {templates} layouts have one for every node count"):
                choose(choices, templates=templates)
            continue
        found = choose(choices, templates=templates)
        assert found.proven and found.goodput == pytest.approx(best, rel=1e-9)
        used = {choices.options[i][p].key for i, p in enumerate(found.places) if p is not None}
        assert len(used) <= templates
        # more layouts are no worse, and as many as help are all
        assert found.goodput >= before * (1.0 - 1e-12)
        before = found.goodput
        assert templates < 4 or before == pytest.approx(choose(choices).goodput, rel=1e-9)
        assert templates > 1 or found.goodput == pytest.approx(found.best_single)


@pytest.mark.parametrize("seed", range(10))
def test_few_layouts_of_a_job_that_may_wait(seed: int) -> None:
    choices = random_choices(np.random.default_rng(seed), 3, 3, often=0.1)
    found = choose(choices, templates=1, waiting=True)
    assert found.goodput == pytest.approx(brute(terms_of(choices, True), 1), rel=1e-9)
    # one layout may also wait where it would fit
    assert found.goodput >= found.best_single * (1.0 - 1e-12)


def test_each_layout_more_helps_a_cluster_of_pairs() -> None:
    choices = keeps_odd_nodes_idle(2 * 3600.0)
    goodputs = [choose(choices, templates=z).goodput for z in (1, 2, 3, 9, 0)]
    assert goodputs[0] == pytest.approx(choose(choices).best_single)
    assert goodputs[0] < goodputs[1] < goodputs[2] <= goodputs[3] == pytest.approx(goodputs[4])


def test_the_other_solver_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import pulp

    choices = random_choices(np.random.default_rng(11), 4, 4, skip=True)
    best = choose(choices, templates=2).goodput
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])
    assert choose(choices, templates=2).goodput == pytest.approx(best, rel=1e-9)


def test_a_trace_that_skips_every_count_between() -> None:
    places = Occupancy(
        counts=(1, 2, 3), shares=np.array([0.5, 0.0, 0.5]), rates=np.array([[0, 0, 1e-3], [0, 0, 0], [1e-3, 0, 0]])
    )
    options = (
        (option("a", 3.0), option("b", 2.5)),
        (option("a", 1.0),),
        (option("b", 6.0), option("c", 6.5)),
    )
    seconds = {(0, 2): np.array([[400.0, 400.0], [0.0, 400.0]]), (2, 0): np.array([[400.0, 0.0], [400.0, 400.0]])}
    found = choose(Choices(occupancy=places, options=options, seconds=seconds))
    assert found.places == (1, 0, 0) and found.goodput == pytest.approx(4.25)
    # a count that never occurs has a layout too, even if a job may wait
    assert choose(Choices(occupancy=places, options=options, seconds=seconds), waiting=True).places == (1, 0, 0)


def sized_choices(counts: range, seed: int) -> Choices:
    """Layouts of all sizes from some below the counts on, each of which all larger counts may run."""
    rng = np.random.default_rng(seed)
    places = occupancy(Availability(node_mtbf_s=86400.0, repair_s=6 * 3600.0), counts)
    sizes = {m: option(f"on {m}", m * rng.uniform(0.8, 1.0), m) for m in range(counts[0] - 5, counts[-1] + 1)}
    options = [[one for m, one in sizes.items() if n - 49 <= m <= n] for n in counts]

    return moving(places, options, 200.0)


def test_few_layouts_of_32_counts() -> None:
    templates = 5
    choices = sized_choices(range(65, 97), 0)
    found = choose(choices, templates=templates)
    assert choose(choices).goodput * (1.0 + 1e-9) >= found.at_most >= found.goodput > found.best_single
    assert found.at_most < 1.01 * found.goodput
    assert len({choices.options[i][p].key for i, p in enumerate(found.places) if p is not None}) <= templates


@pytest.mark.parametrize("seed", range(30))
def test_bounds_of_few_layouts_hold_and_are_kept_to(seed: int) -> None:
    terms = terms_of(random_choices(np.random.default_rng(seed), 4, 4), waiting=bool(seed % 2))
    for templates in (1, 2, 3):
        best = brute(terms, templates)
        sets = good_sets(terms, templates, None)
        if sets.places is None:
            continue
        limits = bounded(terms, templates, sets)
        assert sets.goodput <= best * (1.0 + 1e-9) and limits.upper >= best * (1.0 - 1e-9)
        among = brute(only(terms, limits.kept), templates)
        assert max(among, sets.goodput) == pytest.approx(best, rel=1e-9)


def test_what_time_does_not_suffice_for_is_said() -> None:
    choices = random_choices(np.random.default_rng(3), 12, 8, keys=12, often=0.1)
    terms = terms_of(choices)
    hurried, upper, _ = best_by_milp(terms, 4, None, time_limit_s=0.0)
    found = choose(choices, templates=4)
    assert terms.goodput(hurried) <= found.goodput * (1.0 + 1e-9) and upper >= found.goodput * (1.0 - 1e-9)
