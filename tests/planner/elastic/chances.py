"""Random choices that are small enough to try all of them."""

from __future__ import annotations

import itertools

import numpy as np

from moeplan.planner.elastic.availability import Occupancy
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.choice import Choices, Option, Terms

NEVER = Saving(interval_steps=1, interval_s=1e9, stall_s=0.0, persist_s=0.0, asynchronous=True, efficiency=1.0)
"""Saves that cost nothing."""


def option(key: str, throughput: float, uses: int = 1) -> Option:
    return Option(key=key, throughput=throughput, uses=uses, checkpoint=NEVER)


def random_choices(
    rng: np.random.Generator, counts: int, options: int, *, keys: int = 4, skip: bool = False, often: float = 1e-2
) -> Choices:
    """Counts with 1 to `options` options of some `keys` layouts, and moves that cost about as much as they are worth."""
    shares = rng.dirichlet(np.ones(counts))
    rates = rng.exponential(often, (counts, counts))
    apart = np.abs(np.subtract.outer(np.arange(counts), np.arange(counts)))
    rates[apart > (counts if skip else 1)] = 0.0
    found = []
    for n in range(counts):
        names = rng.permutation(keys)[: rng.integers(1, options + 1)]
        found.append(tuple(option(f"l{k}", float(rng.uniform(5.0, 10.0) + n), n + 1) for k in names))
    seconds = {}
    for i, j in itertools.product(range(counts), repeat=2):
        if i == j:
            seconds[i, i] = rng.exponential(30.0, len(found[i]))
        elif rates[i, j] > 0.0:
            same = np.array([[a.key == b.key for b in found[j]] for a in found[i]])
            seconds[i, j] = np.where(same, 0.1, 1.0) * rng.exponential(60.0, same.shape)
    places = Occupancy(counts=tuple(range(1, counts + 1)), shares=shares, rates=rates)
    return Choices(occupancy=places, options=tuple(found), seconds=seconds)


def brute(terms: Terms, templates: int = 0) -> float:
    """The best goodput of all choices with so many layouts; 0 where there is none."""
    best = 0.0
    for places in itertools.product(*(range(len(gain)) for gain in terms.gains)):
        used = {keys[p] for keys, p in zip(terms.keys, places, strict=True)} - {None}
        if not templates or len(used) <= templates:
            best = max(best, terms.goodput(places))
    return best
