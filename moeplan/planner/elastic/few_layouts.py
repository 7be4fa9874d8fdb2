"""Choices with few layouts: a good one, and bounds that leave the mixed-integer programme little to do.

Layouts are taken one by one and exchanged while that helps; a dynamic programme gives the best choice of each set. For bounds
the constraint that an option needs its layout, x_nl <= z_t, is priced by multipliers u >= 0. What is left falls apart:
    bound(u) = max over choices of [numerator - g denominator - sum of u]  +  sum of the Z largest s_t,   s_t = sum of u of t
It is at least the best with Z layouts for every u, also where an option is forced into both parts; steps along the subgradient
z - x lower it (Polyak's length). Links that skip counts cost only, so that bounds may leave them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.planner.elastic.choice import SAME, Terms, best_path, only, upper_bounds

TRIALS = 1500
"""Sets of layouts that are tried."""
PHASES, ROUNDS = 5, 150
"""Phases, after which options are left out, and steps of each."""
PATIENCE = 15
"""Steps without a lower bound after which they become half as long."""
LEAST_GAIN = 1e-3
"""Part by which a bound must fall to count as a lower one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded:
    """What multipliers say of choices with few layouts."""

    kept: list[Any]
    """Options of each count that a better choice may have."""
    upper: float
    """Goodput at most of any choice."""


class Sets:
    """The best choices of sets of layouts."""

    def __init__(self, terms: Terms, start: Sequence[int] | None) -> None:
        self.terms, self.trials = terms, 0
        self.places = None if start is None else list(start)
        self.goodput = 0.0 if start is None else terms.goodput(start)

    def worth(self, layouts: Collection[Hashable]) -> tuple[int, float]:
        """Counts for which a set has an option, and the goodput; the sum of its gains where some have none."""
        self.trials += 1
        there = [[p for p, key in enumerate(keys) if key is None or key in layouts] for keys in self.terms.keys]
        if not all(there):
            gains = [gain[places].max() for gain, places in zip(self.terms.gains, there, strict=True) if places]
            return len(gains), float(sum(gains))
        path, _ = best_path(only(self.terms, there), self.goodput)
        places = [found[p] for found, p in zip(there, path, strict=True)]
        goodput = self.terms.goodput(places)
        if goodput > self.goodput:
            self.places, self.goodput = places, goodput
        return len(there), goodput


def good_sets(terms: Terms, templates: int, start: Sequence[int] | None) -> Sets:
    """The best of sets that hardly any exchange of one layout betters; without places where none has one for every count."""
    sets = Sets(terms, start)
    layouts = layouts_of(terms)
    taken: set[Hashable] = set()
    while len(taken) < min(templates, len(layouts)):
        taken.add(max((key for key in layouts if key not in taken), key=lambda key: sets.worth({*taken, key})))
    best, better = sets.worth(taken), True
    while better and sets.trials < TRIALS:
        better = False
        for out in list(taken):
            others = [{*taken - {out}, key} for key in layouts if key not in taken][: TRIALS - sets.trials]
            tried = [(sets.worth(other), other) for other in others]
            worth, other = max(tried, key=lambda pair: pair[0], default=(best, taken))
            if worth > best:
                taken, best, better = other, worth, True
    return sets


def layouts_of(terms: Terms) -> list[Hashable]:
    """All layouts, once each."""
    return list(dict.fromkeys(key for keys in terms.keys for key in keys if key is not None))


class Prices:
    """Multipliers of a choice with few layouts."""

    def __init__(self, terms: Terms, templates: int, prices: Sequence[Any] | None = None) -> None:
        self.terms, self.templates = terms, templates
        self.layouts = layouts_of(terms)
        self.size, layouts = len(self.layouts), {key: i for i, key in enumerate(self.layouts)}
        # the layout of each option; to wait needs none
        self.owners = [np.array([layouts.get(key, self.size) for key in keys]) for keys in terms.keys]
        self.prices = [np.zeros(len(gain)) for gain in terms.gains] if prices is None else list(prices)

    def priced(self) -> Terms:
        """The sums with gains less prices."""
        gains = tuple(g - u for g, u in zip(self.terms.gains, self.prices, strict=True))
        return dataclasses.replace(self.terms, gains=gains)

    def sums(self) -> Any:
        """Prices of each layout together; [layouts]."""
        found = np.zeros(self.size + 1)
        for owners, prices in zip(self.owners, self.prices, strict=True):
            np.add.at(found, owners, prices)
        return found[:-1]

    def bounds(self, goodput: float) -> list[Any]:
        """Numerator - goodput x denominator at most of choices with an option; [options] of each count."""
        sums = self.sums()
        order = np.argsort(-sums)[: self.templates]
        best, last = sums[order].sum(), sums[order[-1]]
        # a layout that is not among the dearest takes the place of the last of these
        forced = np.append(np.where(np.isin(np.arange(self.size), order), best, best - last + sums), best)
        return [b + forced[o] for b, o in zip(upper_bounds(self.priced(), goodput), self.owners, strict=True)]

    def lower(self, sets: Sets) -> float:
        """Lower the bound by some steps and try the layouts that they prepare; the lowest bound, whose prices stay."""
        least, kept, length, waited = np.inf, self.prices, 1.0, 0
        tried: set[frozenset[Hashable]] = set()
        for _ in range(ROUNDS):
            goodput = sets.goodput
            sums = self.sums()
            prepared = np.argsort(-sums)[: self.templates]
            if (chosen := frozenset(self.layouts[i] for i in prepared)) not in tried:
                tried.add(chosen)
                sets.worth(chosen)
            used, most = best_path(self.priced(), goodput)
            upper = most + float(sums[prepared].sum())
            waited = 0 if upper < least * (1.0 - LEAST_GAIN) else waited + 1
            if upper < least:
                least, kept = upper, self.prices
            if least <= SAME * goodput:
                break
            if waited >= PATIENCE:
                length, waited, self.prices = length / 2.0, 0, kept
                continue
            self._step(prepared, used, length * upper)
        self.prices = kept
        return least

    def _step(self, prepared: Any, used: Sequence[int], length: float) -> None:
        """Raise prices of options whose layout is not prepared, lower those of layouts that are prepared in vain."""
        there = np.zeros(self.size + 1)
        there[prepared] = 1.0
        slopes = []
        for owners, prices, place in zip(self.owners, self.prices, used, strict=True):
            slope = -there[owners]
            slope[place] += owners[place] < self.size
            slopes.append(np.where((prices > 0.0) | (slope > 0.0), slope, 0.0))
        norm = sum(float(slope @ slope) for slope in slopes)
        if norm:
            self.prices = [np.maximum(0.0, u + length / norm * d) for u, d in zip(self.prices, slopes, strict=True)]


def bounded(terms: Terms, templates: int, sets: Sets) -> Bounded:
    """Bounds on choices with at most `templates` layouts that are better than the best of some sets, which may rise."""
    assert sets.places is not None, "bounds are beside a choice"
    kept = [np.arange(len(gain)) for gain in terms.gains]
    held, upper = Prices(terms, templates), np.inf
    for _ in range(PHASES):
        before = sets.goodput
        # a bound at a smaller goodput is one on the goodput too, as no denominator is below 1
        upper = min(upper, before + held.lower(sets))
        if upper <= sets.goodput * (1.0 + SAME):
            break
        # what is at hand stays, so that every count has an option
        bounds = held.bounds(sets.goodput)
        good = [(b >= 0.0) | (k == p) for b, k, p in zip(bounds, kept, sets.places, strict=True)]
        kept = [k[g] for k, g in zip(kept, good, strict=True)]
        there = [np.flatnonzero(g) for g in good]
        held = Prices(only(held.terms, there), templates, [u[g] for u, g in zip(held.prices, good, strict=True)])
    return Bounded(kept=kept, upper=max(float(upper), sets.goodput))
