"""One option for every node count, so that most is kept in the long run: exact dynamic programme over a chain of counts.

With pi the shares of running time, q the rates of changes between counts and C their seconds without progress:
    goodput = sum_n pi_n thr(l_n) pace(l_n) / (1 + sum_n pi_n sum_n' q(n,n') C(l_n -> l_n'))
(renewal and reward). Failures are charged once: in C, with the work that is lost, and not in the pace. The maximum of a ratio
is found by Dinkelbach's method: maximise numerator - g denominator with g the goodput of the maximiser before, until it stays.
    F_n(l) = own_n(l) + max over l' of [F_(n-1)(l') - g (pi_(n-1) q(n-1,n) C(l'->l) + pi_n q(n,n-1) C(l->l'))]
`choice_milp.py` does without the chain and limits the number of layouts. Units: seconds, samples per second.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import ProblemError
from moeplan.planner.elastic.availability import Occupancy
from moeplan.planner.elastic.checkpoint import Saving

SAME = 1e-12
"""Relative gain in goodput that is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What can run at a node count."""

    key: Hashable
    """The layout: options of several counts with the same key are one layout to prepare."""
    throughput: float
    """Samples per second while nothing fails and nothing is saved."""
    uses: int
    """Nodes that train; the others are spares."""
    checkpoint: Saving
    """How it saves."""

    @property
    def rate(self) -> float:
        """Samples per second with the stalls of saves."""
        return self.throughput * self.checkpoint.pace


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Choices:
    """Options of every planned count, and what changes between them cost."""

    occupancy: Occupancy
    """Counts, their shares and rates."""
    options: tuple[tuple[Option, ...], ...]
    """By place of the count."""
    seconds: Mapping[tuple[int, int], Any]
    """Seconds without progress by places of the counts before and after; [options before, options after]. (i, i) is the
    restart after a failure that leaves the count as it is, [options]."""

    def __post_init__(self) -> None:
        counts, rates = self.occupancy.counts, self.occupancy.rates
        if len(self.options) != len(counts):
            raise ProblemError(f"options of {len(self.options)} node counts for {len(counts)} planned ones")
        for n, options in zip(counts, self.options, strict=True):
            if not options:
                raise ProblemError(f"no option for {n} nodes", hint=f"leave out {n} nodes, or allow more layouts")
            for option in options:
                if not option.throughput > 0.0:
                    raise ProblemError(
                        f"{option.throughput:g} samples/s by {option.key} on {n} nodes", hint="give a positive rate"
                    )
        for (i, j), seconds in self.seconds.items():
            shape = (len(self.options[i]),) + ((len(self.options[j]),) if i != j else ())
            if np.shape(seconds) != shape or not np.all(np.asarray(seconds) >= 0.0):
                message = f"seconds from {counts[i]} to {counts[j]} nodes of shape {np.shape(seconds)} for {shape}"
                raise ProblemError(message, hint="give 0 or more seconds for each pair of options")
        for i, j in zip(*np.nonzero(rates), strict=True):
            if i != j and (i, j) not in self.seconds:
                raise ProblemError(f"nothing says how long it takes from {counts[i]} to {counts[j]} nodes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The best option of every count."""

    places: tuple[int | None, ...]
    """Place of the option of each count; None: the job waits, which only happens where it may."""
    goodput: float
    """Samples kept per second of running and changing."""
    best_single: float
    """The most that one layout gives, kept at all counts; 0 where none fits all, unless the job may wait."""
    at_most: float
    """No choice gives more; above `goodput` where time did not suffice to prove it the best."""
    remark: str = ""
    """Which solver was not there or failed, and what took its place; empty: the first did it, or none was needed."""

    @property
    def proven(self) -> bool:
        """Whether no other choice is better."""
        return self.at_most <= self.goodput * (1.0 + 1e-9)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Terms:
    """Numerator and denominator of the goodput as sums over counts and pairs of counts."""

    gains: tuple[Any, ...]
    """Samples kept per second of running time; [options] of each count."""
    own: tuple[Any, ...]
    """Seconds lost per second of running time by failures that leave the count as it is; [options] of each count."""
    links: Mapping[tuple[int, int], Any]
    """Seconds lost per second of running time by changes between counts i < j both ways; [options i, options j]."""
    keys: tuple[tuple[Hashable, ...], ...]
    """Layouts of the options; None: the job waits."""

    def goodput(self, places: Sequence[int]) -> float:
        """Samples per second of a choice."""
        lost = 1.0 + sum(own[p] for own, p in zip(self.own, places, strict=True))
        lost += sum(link[places[i], places[j]] for (i, j), link in self.links.items())
        return float(sum(gain[p] for gain, p in zip(self.gains, places, strict=True)) / lost)


def choose(choices: Choices, *, templates: int = 0, waiting: bool = False) -> Choice:
    """The best choice, with at most `templates` different layouts (0: any number); `waiting`: also to run nothing at first.

    A job that waits at a count waits at all smaller ones. It stops at no cost, and goes on with a restart of what it runs then.
    """
    if templates < 0:
        raise ProblemError(f"at most {templates} layouts", hint="give 1 or more, or 0 for any number")
    terms = terms_of(choices, waiting)
    single = best_single(terms)
    if templates or choices.occupancy.skips:
        from moeplan.planner.elastic.choice_milp import best_by_milp

        start = single if single is not None else None if templates else fastest(terms)
        found, upper, remark = best_by_milp(terms, templates, start)
    else:
        found, upper, remark = best_on_chain(terms, fastest(terms)), 0.0, ""
    found = _settled(choices, terms, found, templates)
    goodput = terms.goodput(found)
    return Choice(
        places=tuple(p if key is not None else None for p, key in _with_keys(terms, found)),
        goodput=goodput,
        best_single=0.0 if single is None else terms.goodput(single),
        at_most=max(goodput, upper),
        remark=remark,
    )


def _settled(choices: Choices, terms: Terms, found: Sequence[int], templates: int) -> list[int]:
    """The same with the fastest option at counts that never occur, of the layouts in use where their number is limited."""
    places = list(found)
    for n in reversed(range(len(places))):
        if choices.occupancy.shares[n]:
            continue
        used = {keys[p] for keys, p in zip(terms.keys, places, strict=True)}
        for _, place in sorted(((o.rate, p) for p, o in enumerate(choices.options[n])), reverse=True):
            other = [*places[:n], place, *places[n + 1 :]]
            if (not templates or terms.keys[n][place] in used) and terms.goodput(other) >= terms.goodput(places):
                places = other
                break
    return places


def seconds_of(
    occupancy: Occupancy,
    options: Sequence[Sequence[Option]],
    cost: Callable[[int, Option, int, Option], float],
) -> dict[tuple[int, int], Any]:
    """The arrays of `Choices.seconds` from a function of (nodes, option, nodes then, option then)."""
    found = {}
    for i, j in zip(*np.nonzero(occupancy.rates), strict=True):
        n, then = occupancy.counts[i], occupancy.counts[j]
        if i == j:
            found[int(i), int(i)] = np.array([cost(n, a, n, a) for a in options[i]])
        else:
            found[int(i), int(j)] = np.array([[cost(n, a, then, b) for b in options[j]] for a in options[i]])
    return found


def terms_of(choices: Choices, waiting: bool = False) -> Terms:
    """The sums of the goodput; with `waiting` a last option of each count that gives and costs nothing itself.

    Seconds without end bar it above a count that runs something.
    """
    shares, rates, extra = choices.occupancy.shares, choices.occupancy.rates, int(waiting)
    none = np.zeros(extra)
    gains = [
        np.concatenate([p * np.array([o.rate for o in found]), none]) for p, found in zip(shares, choices.options, strict=True)
    ]
    again = [np.concatenate([choices.seconds.get((i, i), np.zeros(len(o))), none]) for i, o in enumerate(choices.options)]
    links = {}
    for i in range(len(gains)):
        for j in range(i + 1, len(gains)):
            if rates[i, j] or rates[j, i] or (waiting and j == i + 1):
                up = shares[i] * rates[i, j] * _change_s(choices, i, j, again[j], extra)
                links[i, j] = up + shares[j] * rates[j, i] * _change_s(choices, j, i, again[i], extra).T
                if waiting:
                    links[i, j][:-1, -1] = np.inf
    return Terms(
        gains=tuple(gains),
        own=tuple(p * rates[i, i] * seconds for i, (p, seconds) in enumerate(zip(shares, again, strict=True))),
        links=links,
        keys=tuple(tuple(o.key for o in found) + (None,) * extra for found in choices.options),
    )


def fastest(terms: Terms) -> list[int]:
    """The fastest option of every count: the greedy choice."""
    return [int(np.argmax(gain)) for gain in terms.gains]


def best_single(terms: Terms) -> list[int] | None:
    """The best choice with one layout for all counts, which may wait below those that offer it; None if there is none."""
    everywhere = []
    for key in {key for keys in terms.keys for key in keys if key is not None}:
        if all(key in keys or None in keys for keys in terms.keys):
            everywhere.append([keys.index(key) if key in keys else keys.index(None) for keys in terms.keys])
    best = max(everywhere, key=terms.goodput, default=None)
    return best if best is not None and terms.goodput(best) > 0.0 else None


def best_on_chain(terms: Terms, start: Sequence[int]) -> list[int]:
    """The best choice where only neighbouring counts are linked."""
    found, goodput = list(start), terms.goodput(start)
    while True:
        places, _ = best_path(terms, goodput)
        better = terms.goodput(places)
        if better <= goodput * (1.0 + SAME):
            return found
        found, goodput = places, better


def best_path(terms: Terms, goodput: float) -> tuple[list[int], float]:
    """The choice with the most numerator - goodput x denominator, and that; of links only those between neighbouring counts."""
    values, before = _forward(terms, goodput)
    places = [int(np.argmax(values[-1]))]
    for back in reversed(before):
        places.append(int(back[places[-1]]))
    return places[::-1], float(values[-1].max()) - goodput


def only(terms: Terms, there: Sequence[Any]) -> Terms:
    """The sums of some options of each count, by their places."""
    return Terms(
        gains=tuple(gain[p] for gain, p in zip(terms.gains, there, strict=True)),
        own=tuple(own[p] for own, p in zip(terms.own, there, strict=True)),
        links={(i, j): link[np.ix_(there[i], there[j])] for (i, j), link in terms.links.items()},
        keys=tuple(tuple(keys[q] for q in p) for keys, p in zip(terms.keys, there, strict=True)),
    )


def upper_bounds(terms: Terms, goodput: float) -> list[Any]:
    """Numerator - goodput x denominator at most, of any choice with an option; [options] of each count.

    Where that is negative the option is in no choice of more than `goodput`. Links that skip counts are left out, which cost.
    """
    flipped = Terms(
        gains=terms.gains[::-1],
        own=terms.own[::-1],
        links={(len(terms.own) - 1 - j, len(terms.own) - 1 - i): link.T for (i, j), link in terms.links.items()},
        keys=terms.keys[::-1],
    )
    up, down = _forward(terms, goodput)[0], _forward(flipped, goodput)[0][::-1]
    return [f + b - (gain - goodput * own) - goodput for f, b, gain, own in zip(up, down, terms.gains, terms.own, strict=True)]


def _forward(terms: Terms, goodput: float) -> tuple[list[Any], list[Any]]:
    """Best values up to each count by its option, and the option of the count before that gives it."""
    values, before = [terms.gains[0] - goodput * terms.own[0]], []
    for i in range(1, len(terms.gains)):
        link = terms.links.get((i - 1, i), np.zeros((len(terms.gains[i - 1]), len(terms.gains[i]))))
        # [options before, options]
        through = values[-1][:, None] - (goodput * link if goodput else np.where(np.isinf(link), np.inf, 0.0))
        before.append(np.argmax(through, axis=0))
        values.append(terms.gains[i] - goodput * terms.own[i] + through.max(axis=0))
    return values, before


def _change_s(choices: Choices, i: int, j: int, restart_s: Any, extra: int) -> Any:
    """Seconds from count i to count j with what waiting adds: a row of restarts and a column of nothing."""
    seconds = np.asarray(choices.seconds.get((i, j), np.zeros((len(choices.options[i]), len(choices.options[j])))), float)
    if not extra:
        return seconds
    return np.vstack([np.pad(seconds, ((0, 0), (0, 1))), restart_s[None, :]])


def _with_keys(terms: Terms, places: Sequence[int]) -> list[tuple[int, Hashable]]:
    return [(p, keys[p]) for p, keys in zip(places, terms.keys, strict=True)]
