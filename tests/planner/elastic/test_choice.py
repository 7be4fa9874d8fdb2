"""The choice over all counts equals trying all of them, obeys its laws, and agrees with a simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Availability, Occupancy, occupancy
from moeplan.planner.elastic.checkpoint import SaveCost, saving_at
from moeplan.planner.elastic.choice import Choices, Option, best_single, choose, fastest, seconds_of, terms_of, upper_bounds
from tests.planner.elastic.chances import brute, option, random_choices

DAY_S = 86400.0


def keeps_odd_nodes_idle(node_mtbf_s: float) -> Choices:
    """Pipelines of two nodes: an odd node more gives little, as stages become uneven, and the loss of a spare costs nothing."""
    counts = range(8, 17)
    places = occupancy(Availability(node_mtbf_s=node_mtbf_s, repair_s=1800.0), counts)
    sizes = {m: option(f"on {m}", 1.6 * (m - 0.7 * (m % 2)), m) for m in range(8, 17)}
    options = [[sizes[m] for m in range(8, n + 1)] for n in counts]

    return moving(places, options, 120.0)


def moving(places: Occupancy, options: Sequence[Sequence[Option]], each_s: float) -> Choices:
    """Choices where what moves or restarts takes `each_s` seconds, and the loss of a spare none."""

    def cost(nodes: int, before: Option, then: int, after: Option) -> float:
        if then > nodes and before is after:
            return 0.0
        spared = (nodes - before.uses) / nodes if then < nodes and before is after else 0.0
        return (1.0 - spared) * each_s

    return Choices(occupancy=places, options=tuple(map(tuple, options)), seconds=seconds_of(places, options, cost))


def test_one_count_by_hand() -> None:
    places = Occupancy(counts=(4,), shares=np.array([1.0]), rates=np.array([[1e-3]]))
    options = ((option("fast", 10.0), option("quick to restart", 9.0)),)
    found = choose(Choices(occupancy=places, options=options, seconds={(0, 0): np.array([500.0, 10.0])}))
    assert found.places == (1,) and found.goodput == found.best_single == pytest.approx(9.0 / 1.01)


def test_two_counts_by_hand() -> None:
    places = Occupancy(counts=(1, 2), shares=np.array([0.25, 0.75]), rates=np.array([[0.0, 3e-3], [1e-3, 0.0]]))
    options = ((option("a", 4.0),), (option("a", 6.0), option("b", 8.0)))
    seconds = {(0, 1): np.array([[0.0, 100.0]]), (1, 0): np.array([[20.0], [200.0]])}
    found = choose(Choices(occupancy=places, options=options, seconds=seconds))
    assert found.places == (0, 1) and found.goodput == pytest.approx(7.0 / (1.0 + 0.25 * 3e-3 * 100.0 + 0.75 * 1e-3 * 200.0))
    assert found.best_single == pytest.approx(5.5 / (1.0 + 0.75 * 1e-3 * 20.0))


def test_pace_of_saves_counts() -> None:
    saving = saving_at(SaveCost(step_s=10.0, stall_s=25.0), 1e6, 10)
    assert Option(key="a", throughput=8.0, uses=1, checkpoint=saving).rate == pytest.approx(8.0 / 1.25)


@pytest.mark.parametrize("seed", range(200))
def test_dynamic_programme_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, int(rng.integers(1, 6)), 4, often=10.0 ** rng.uniform(-4, -1))
    for waiting in (False, True):
        terms = terms_of(choices, waiting)
        found = choose(choices, waiting=waiting)
        assert found.goodput == pytest.approx(brute(terms), rel=1e-12)
        assert found.goodput >= max(found.best_single, terms.goodput(fastest(terms))) * (1.0 - 1e-12)
        assert (best_single(terms) is None) == (found.best_single == 0.0)
        waits = [place is None for place in found.places]
        assert waits == sorted(waits, reverse=True) and (waiting or not any(waits))


@pytest.mark.parametrize("seed", range(40))
def test_bounds_hold_and_are_reached(seed: int) -> None:
    choices = random_choices(np.random.default_rng(seed), 4, 3)
    terms = terms_of(choices)
    best = choose(choices)
    bounds = upper_bounds(terms, best.goodput)
    for bound, place in zip(bounds, best.places, strict=True):
        assert bound.max() == pytest.approx(0.0, abs=1e-9) and bound[place] == pytest.approx(0.0, abs=1e-9)


def test_a_job_waits_where_moves_cost_more_than_they_give() -> None:
    places = Occupancy(counts=(1, 2), shares=np.array([0.1, 0.9]), rates=np.array([[0.0, 9e-2], [1e-2, 0.0]]))
    options = ((option("small", 1.0),), (option("large", 10.0),))
    dear = {(0, 1): np.full((1, 1), 500.0), (1, 0): np.full((1, 1), 500.0), (1, 1): np.array([20.0]), (0, 0): np.array([20.0])}
    choices = Choices(occupancy=places, options=options, seconds=dear)
    patient = choose(choices, waiting=True)
    assert patient.places == (None, 0)
    assert patient.goodput == patient.best_single == pytest.approx(9.0 / (1.0 + 0.1 * 9e-2 * 20.0))
    assert choose(choices).goodput < patient.goodput and choose(choices).best_single == 0.0


def test_odd_nodes_stay_idle_where_counts_change_every_few_minutes() -> None:
    often, rarely = keeps_odd_nodes_idle(2 * 3600.0), keeps_odd_nodes_idle(20 * DAY_S)
    greedy = terms_of(often).goodput(fastest(terms_of(often)))
    found = choose(often)
    uses = [options[place].uses for options, place in zip(often.options, found.places, strict=True) if place is not None]
    assert found.goodput > 1.01 * greedy and found.goodput > found.best_single
    assert any(n > used for n, used in zip(often.occupancy.counts, uses, strict=True))
    # with rare failures the fastest layout of each count is best
    assert choose(rarely).places == tuple(fastest(terms_of(rarely)))


def test_sixteen_nodes_of_which_one_fails_every_thirty_hours() -> None:
    """The published 0.973 of full speed: a change of either kind costs 820 s with the work that it loses."""
    places = occupancy(Availability(node_mtbf_s=20 * DAY_S, repair_s=6 * 3600.0), range(8, 17))
    options = [[option(f"on {n}", n / 16.0, n)] for n in places.counts]
    choices = Choices(
        occupancy=places,
        options=tuple(map(tuple, options)),
        seconds=seconds_of(places, options, lambda *_: 820.0),
    )
    assert choose(choices).goodput == pytest.approx(0.973, abs=5e-4)


def _scaled(choices: Choices, *, rates: float = 1.0, seconds: float = 1.0) -> Choices:
    places = dataclasses.replace(choices.occupancy, rates=choices.occupancy.rates * rates)
    return dataclasses.replace(choices, occupancy=places, seconds={k: v * seconds for k, v in choices.seconds.items()})


@given(st.integers(0, 10_000), st.floats(1.0, 20.0))
def test_rarer_and_cheaper_changes_and_more_options_are_no_worse(seed: int, factor: float) -> None:
    choices = random_choices(np.random.default_rng(seed), 4, 4)
    goodput = choose(choices).goodput * (1.0 - 1e-12)
    assert choose(_scaled(choices, rates=1.0 / factor)).goodput >= goodput
    assert choose(_scaled(choices, seconds=1.0 / factor)).goodput >= goodput
    assert choose(choices, waiting=True).goodput >= goodput


@pytest.mark.parametrize("days", [0.05, 0.5, 20.0])
def test_nodes_that_fail_less_give_no_less(days: float) -> None:
    assert choose(keeps_odd_nodes_idle(2.0 * days * DAY_S)).goodput > choose(keeps_odd_nodes_idle(days * DAY_S)).goodput


def test_simulated_changes_give_the_goodput() -> None:
    choices = keeps_odd_nodes_idle(2 * 3600.0)
    found, places = choose(choices), choices.occupancy
    picks = [place for place in found.places if place is not None]
    leaves = places.rates.sum(axis=1)
    reached = np.cumsum(places.rates, axis=1) / leaves[:, None]
    rng, at, samples, clock_s = np.random.default_rng(7), 8, 0.0, 0.0
    for stay, draw in zip(rng.exponential(size=40_000), rng.random(40_000), strict=True):
        then = int(np.searchsorted(reached[at], draw))
        samples += choices.options[at][picks[at]].rate * stay / leaves[at]
        lost = choices.seconds[at, then][picks[at]]
        clock_s += stay / leaves[at] + float(lost if at == then else lost[picks[then]])
        at = then
    assert samples / clock_s == pytest.approx(found.goodput, rel=0.01)


def test_64_counts_of_50_options() -> None:
    rng = np.random.default_rng(0)
    counts = tuple(range(1, 65))
    places = occupancy(Availability(node_mtbf_s=DAY_S, repair_s=6 * 3600.0), counts)
    options = tuple(tuple(option(f"{n} {k}", n * rng.uniform(0.8, 1.0), n) for k in range(50)) for n in counts)
    links = [(int(i), int(j)) for i, j in zip(*np.nonzero(places.rates), strict=True) if i != j]
    seconds = {pair: rng.uniform(10.0, 200.0, (50, 50)) for pair in links}
    found = choose(Choices(occupancy=places, options=options, seconds=seconds))
    assert found.proven and found.goodput > 0.9 * float((places.shares * np.array(counts)).sum()) / 2.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": ((), ())}, "no option for 1 nodes"),
        ({"options": ((option("a", 1.0),),)}, "options of 1 node counts for 2"),
        ({"options": ((option("a", 0.0),), (option("a", 1.0),))}, "0 samples/s by a on 1 nodes"),
        ({"seconds": {}}, "nothing says how long it takes from 1 to 2 nodes"),
        ({"seconds": {(0, 1): np.zeros((2, 1)), (1, 0): np.zeros((1, 1))}}, r"from 1 to 2 nodes of shape \(2, 1\)"),
        ({"seconds": {(0, 1): -np.ones((1, 1)), (1, 0): np.zeros((1, 1))}}, "give 0 or more seconds"),
    ],
)
def test_choices_that_cannot_be(change: dict[str, object], words: str) -> None:
    places = Occupancy(counts=(1, 2), shares=np.array([0.5, 0.5]), rates=np.array([[0.0, 1.0], [1.0, 0.0]]))
    good = {(0, 1): np.zeros((1, 1)), (1, 0): np.zeros((1, 1))}
    choices = Choices(occupancy=places, options=((option("a", 1.0),), (option("a", 2.0),)), seconds=good)
    with pytest.raises(ProblemError, match=words):
        dataclasses.replace(choices, **change)  # type: ignore[arg-type]


def test_fewer_than_no_layouts() -> None:
    with pytest.raises(ProblemError, match="at most -1 layouts"):
        choose(keeps_odd_nodes_idle(DAY_S), templates=-1)
