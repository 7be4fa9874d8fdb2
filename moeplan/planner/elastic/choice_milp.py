"""One option for every node count by mixed-integer programming: counts may skip, and the number of layouts may be limited.

    maximise   sum of (gain_nl - g own_nl) x_nl - g sum of link_nl,n'l' y_nl,n'l'
    one        sum over l of x_nl                        == 1         for every count n
    before     sum over l' of y_nl,n'l'                  == x_nl      for every linked pair n, n' and option l of n
    after      sum over l of y_nl,n'l'                   == x_n'l'    for every linked pair n, n' and option l' of n'
    prepared   x_nl                                      <= z_t       for the layout t of every option
    templates  sum of z_t                                <= Z
With binary x the y are forced to the product and need not be binary. Dinkelbach's method raises g as in `choice.py`, whose
dynamic programme is the twin and leaves out beforehand what cannot beat the best choice at hand. Solved with PuLP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pulp  # type: ignore[import-untyped]

from moeplan.errors import ProblemError
from moeplan.planner.elastic.choice import SAME, Terms, upper_bounds
from moeplan.planner.elastic.few_layouts import bounded, good_sets
from moeplan.planner.partition import solved

UNIT = 1e4
"""What the goodput at hand is worth in the objective: solvers take steps of 1e-5 to 1e-6 for none."""
GAP = 1e-5
"""Part of such a unit by which a choice is called the best."""
TIME_LIMIT_S = 20.0
"""Seconds for all programmes of a choice; what is then at hand stays, with a bound on what is better."""
MOST_PAIRS = 60_000
"""Variables for pairs of options above which a programme is not begun: no solver ends in time."""


def best_by_milp(
    terms: Terms, templates: int, start: Sequence[int] | None, *, time_limit_s: float = TIME_LIMIT_S
) -> tuple[list[int], float, str]:
    """The best choice with at most `templates` layouts (0: any number) found in time, what any gives at most, and a remark."""
    found: list[int] | None = None if start is None else list(start)
    upper = np.inf
    kept = [np.arange(len(gain)) for gain in terms.gains]
    if templates:
        sets = good_sets(terms, templates, start)
        found = sets.places
        if found is not None:
            limits = bounded(terms, templates, sets)
            found, kept, upper = sets.places, limits.kept, limits.upper
    ends = time.monotonic() + time_limit_s
    remark = ""
    while found is None or upper > terms.goodput(found) * (1.0 + SAME):
        goodput = 0.0 if found is None else terms.goodput(found)
        if found is not None:
            bounds = upper_bounds(terms, goodput)
            upper = min(upper, goodput + max(0.0, float(bounds[0].max())))
            good = [np.intersect1d(k, np.flatnonzero(b >= -SAME * goodput)) for k, b in zip(kept, bounds, strict=True)]
            kept = [np.union1d(k, [p]) for k, p in zip(good, found, strict=True)]
        left_s = ends - time.monotonic()
        if found is not None and (left_s <= 0.0 or _pairs(terms, kept) > MOST_PAIRS):
            break
        places, proven, remark = _round(terms, kept, goodput, templates, max(1.0, left_s))
        better = 0.0 if places is None else terms.goodput(places)
        if places is None and found is None:
            missing = f"no {templates} layouts have one for every node count"
            message = missing if proven else f"{missing} as far as was seen in {time_limit_s:g} s"
            raise ProblemError(message, hint="allow more layouts, or leave out small counts")
        if places is None or (found is not None and better <= goodput * (1.0 + SAME)):
            upper = goodput if proven else upper
            break
        found = places
    assert found is not None, "without a choice a programme gives one or ends in an error"
    return found, upper, remark


def _pairs(terms: Terms, kept: Sequence[Any]) -> int:
    """Variables for pairs of options."""
    return sum(len(kept[i]) * len(kept[j]) for i, j in terms.links)


def _round(
    terms: Terms, kept: Sequence[Any], goodput: float, templates: int, time_limit_s: float
) -> tuple[list[int] | None, bool, str]:
    """The maximiser of numerator - goodput x denominator among `kept` options, whether that is proven, and a remark."""
    model = pulp.LpProblem("choice", pulp.LpMaximize)
    scale = UNIT / (goodput or sum(float(gain.max()) for gain in terms.gains))
    chosen = [[model.add_variable(f"chosen_{n}_{place}", cat="Binary") for place in kept[n]] for n in range(len(kept))]
    parts = []
    for n, places in enumerate(kept):
        # one: every count has an option
        model += pulp.lpSum(chosen[n]) == 1, f"one_{n}"
        parts += [w * x for w, x in zip((terms.gains[n] - goodput * terms.own[n])[places] * scale, chosen[n], strict=True)]
    for (i, j), link in terms.links.items():
        seconds = link[np.ix_(kept[i], kept[j])]
        barred = np.isinf(seconds)
        cost = goodput * scale * np.where(barred, 0.0, seconds)
        if not (cost.any() or barred.any()):
            continue
        both = [
            [model.add_variable(f"both_{i}_{a}_{j}_{b}", 0, 0 if no else None) for b, no in zip(kept[j], row, strict=True)]
            for a, row in zip(kept[i], barred, strict=True)
        ]
        for a, row in enumerate(both):
            # before: what an option goes over to is as much as it is chosen
            model += pulp.lpSum(row) == chosen[i][a], f"before_{i}_{j}_{a}"
        for b, column in enumerate(zip(*both, strict=True)):
            # after: the same for what comes before an option
            model += pulp.lpSum(column) == chosen[j][b], f"after_{i}_{j}_{b}"
        parts += [-c * y for costs, row in zip(cost, both, strict=True) for c, y in zip(costs, row, strict=True) if c]
    if templates:
        _limit(model, terms, kept, chosen, templates)
    model += pulp.lpSum(parts)
    status, remark = solved(model, time_limit_s=time_limit_s, gapRel=0.0, gapAbs=GAP)
    if status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, status == pulp.LpSolutionInfeasible, remark
    found = [int(places[int(np.argmax([x.value() for x in row]))]) for places, row in zip(kept, chosen, strict=True)]
    return found, status == pulp.LpSolutionOptimal, remark


def _limit(model: Any, terms: Terms, kept: Sequence[Any], chosen: Sequence[Sequence[Any]], templates: int) -> None:
    """At most so many layouts; to wait takes none."""
    prepared: dict[Any, Any] = {}
    for n, places in enumerate(kept):
        for x, place in zip(chosen[n], places, strict=True):
            key = terms.keys[n][place]
            if key is not None:
                if key not in prepared:
                    prepared[key] = model.add_variable(f"prepared_{len(prepared)}", cat="Binary")
                # prepared: an option needs its layout
                model += x <= prepared[key], f"prepared_{n}_{place}"
    # templates: so many are prepared at most
    model += pulp.lpSum(prepared.values()) <= templates, "templates"
