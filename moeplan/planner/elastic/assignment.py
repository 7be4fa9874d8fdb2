"""Best one-to-one assignments, exact: many small ones at once, and a large one whose gains have many ties.

Both are the method of shortest augmenting paths with prices of rows and columns (Jonker and Volgenant, Computing 38, 1987). The
small ones go in step, a row of all matrices at a time. The large one starts from what is cheapest for each row and settles all
columns at one distance together: where thousands of nodes differ in a few ways only, a path has few steps. Gains are numbers of
one unit; those of the large one are rounded to 2^-40 of the largest. Not made for large matrices without ties: n rows may take
n^2 steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def best_inside(gains: Any) -> Any:
    """The column of every row in a best assignment of each square matrix, [n, k, k] -> [n, k]."""
    size = gains.shape[1]
    places = np.broadcast_to(np.arange(size), gains.shape[:2]).copy()
    # Where every row's best lies in its own column nothing is to be done.
    hard = (np.diagonal(gains, axis1=1, axis2=2) < gains.max(axis=2, initial=0.0)).any(axis=1)
    places[hard] = _in_step(-gains[hard])
    return places


def _in_step(cost: Any) -> Any:
    """The column of every row in a cheapest assignment of each square matrix, [n, k, k] -> [n, k]."""
    n, size, _ = cost.shape
    rows, columns = np.zeros((n, size)), np.zeros((n, size + 1))
    owner = np.full((n, size + 1), -1)
    every = np.arange(n)
    for row in range(size):
        owner[:, size] = row
        at = np.full(n, size)
        least = np.full((n, size), np.inf)
        before = np.full((n, size), size)
        seen = np.zeros((n, size + 1), np.bool_)
        open_ = every
        while len(open_):
            here = at[open_]
            seen[open_, here] = True
            r = owner[open_, here]
            step = cost[open_, r] - rows[open_, r][:, None] - columns[open_, :size]
            free = ~seen[open_, :size]
            better = free & (step < least[open_])
            least[open_] = np.where(better, step, least[open_])
            before[open_] = np.where(better, here[:, None], before[open_])
            reach = np.where(free, least[open_], np.inf)
            to = reach.argmin(axis=1)
            by = reach[np.arange(len(open_)), to]
            done = seen[open_]
            columns[open_] -= np.where(done, by[:, None], 0.0)
            which, column = np.nonzero(done)
            rows[open_[which], owner[open_[which], column]] += by[which]
            least[open_] -= np.where(free, by[:, None], 0.0)
            at[open_] = to
            open_ = open_[owner[open_, to] >= 0]
        open_ = every
        while len(open_):
            here = at[open_]
            back = before[open_, here]
            owner[open_, here] = owner[open_, back]
            at[open_] = back
            open_ = open_[back != size]
    return np.argsort(owner[:, :size], axis=1)


def best_outside(gains: Any) -> Any:
    """The column of every row in a best assignment of as many rows as there are columns, or fewer; -1: none."""
    if gains.shape[0] > gains.shape[1]:
        chosen = best_outside(np.ascontiguousarray(gains.T))
        out = np.full(gains.shape[0], -1)
        out[chosen] = np.arange(gains.shape[1])
        return out
    most = gains.max(initial=0.0)
    # Whole numbers, so that ties are seen.
    cost = np.rint((most - gains) * (2.0**40 / (most or 1.0))).astype(np.int64)
    n, m = cost.shape
    rows, columns = cost.min(axis=1), np.zeros(m, np.int64)
    column_of, row_of = np.full(n, -1), np.full(m, -1)
    for i in range(n):
        tight = np.flatnonzero((cost[i] == rows[i]) & (row_of < 0))
        if len(tight):
            column_of[i], row_of[tight[0]] = tight[0], i
    for left in np.flatnonzero(column_of < 0):
        _augment(cost, rows, columns, column_of, row_of, left)
    return column_of


def _augment(cost: Any, rows: Any, columns: Any, column_of: Any, row_of: Any, start: Any) -> None:
    """Match row `start` along a shortest path; columns at the same distance are settled together."""
    reach = cost[start] - rows[start] - columns
    before = np.full(len(columns), start)
    left = np.ones(len(columns), np.bool_)
    far = np.iinfo(np.int64).max
    settled = []
    while True:
        open_ = np.where(left, reach, far)
        at = open_.min()
        near = np.flatnonzero(open_ == at)
        unmatched = near[row_of[near] < 0]
        if len(unmatched):
            break
        left[near] = False
        settled.append(near)
        owners = row_of[near]
        onward = cost[owners] - (rows[owners] - at)[:, None]
        by = onward.argmin(axis=0)
        found = onward[by, np.arange(len(columns))] - columns
        better = left & (found < reach)
        reach[better], before[better] = found[better], owners[by[better]]
    if settled:
        done = np.concatenate(settled)
        rows[row_of[done]] += at - reach[done]
        columns[done] -= at - reach[done]
    rows[start] += at
    end = unmatched[0]
    while True:
        row = before[end]
        row_of[end] = row
        end, column_of[row] = column_of[row], end
        if row == start:
            return
