"""Staircases and Pareto sets of integer points: the only numerics the solvers share.

A staircase is a pair of int64 arrays `(need, time)`, `need` strictly increasing and `time` strictly decreasing: the
least time at each budget, infinite below `need[0]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
INF = np.iinfo(np.int64).max // 2
_CELLS = 512
#: from so many points on `nondominated` looks them up in a table first; how many values of the last coordinate that tells apart
_MANY, _LEVELS = 256, 64


def staircase(need: Ints, time: Ints) -> tuple[Ints, Ints]:
    """The Pareto set of the points `(need, time)`, both minimised.

    **Cost:** linear for most of the points, which a grid of needs shows to be dominated; one sort of the rest.
    """
    if need.size <= 1:
        return need, time
    if need.size > 4 * _CELLS:
        low = int(need.min())
        shift = max(0, int(int(need.max()) - low).bit_length() - _CELLS.bit_length() + 1)
        cell = (need - low) >> shift
        best = np.full(_CELLS + 1, INF, dtype=np.int64)
        np.minimum.at(best, cell + 1, time)
        # A point no faster than one in a lower cell, whose need is smaller, is dominated.
        keep = time < np.minimum.accumulate(best)[cell]
        need, time = need[keep], time[keep]
    order = np.argsort(need)
    need, time = need[order], time[order]
    best = np.minimum.accumulate(time)
    keep = np.empty(need.size, dtype=np.bool_)
    keep[0] = True
    np.less(time[1:], best[:-1], out=keep[1:])
    need, time = need[keep], time[keep]
    # Of equal needs the last kept is the fastest.
    last = np.empty(need.size, dtype=np.bool_)
    last[-1] = True
    np.not_equal(need[1:], need[:-1], out=last[:-1])
    return need[last], time[last]


def thinned(need: Ints, time: Ints, loss: float, *, optimistic: bool) -> tuple[Ints, Ints]:
    """The staircase with at most one step for each factor `1 + loss` of time.

    Steps within such a factor become one: at the least of their needs, with the largest of their times (a schedule that exists), or, if
    `optimistic`, with the least (a bound that none beats). Least need and least time stay exact. **Cost:** linear.
    """
    if need.size < 3 or time[-1] <= 0:
        return need, time
    group = np.floor(np.log(time / float(time[-1])) / np.log1p(loss))
    first = np.empty(need.size, dtype=np.bool_)
    first[0] = True
    np.not_equal(group[1:], group[:-1], out=first[1:])
    index = np.flatnonzero(first)
    if optimistic:
        return need[index], time[np.append(index[1:], need.size) - 1]
    if index[-1] != need.size - 1:
        index = np.append(index, need.size - 1)
    return need[index], time[index]


def value_at(need: Ints, time: Ints, budget: int) -> int:
    """The staircase's time at `budget`, `INF` where nothing fits."""
    k = int(np.searchsorted(need, budget, side="right")) - 1
    return int(time[k]) if k >= 0 else INF


def _plainly_good(table: Ints) -> NDArray[np.intp]:
    """Indices of the points, of two or three coordinates, left when those with a better one in an earlier cell are gone.

    Cells are stretches of the first coordinate and levels of the last of three; within a cell no points are compared.
    **Cost:** linear, but for one sort of the last coordinate.
    """
    first, second = table[0], table[1]
    cells = min(_CELLS, 1 << (first.size // 8).bit_length())
    low, width = int(first.min()), cells + 1
    cell = (first - low) >> max(0, (int(first.max()) - low).bit_length() - cells.bit_length() + 1)
    level, levels, exact = np.zeros(1, dtype=np.intp), 1, True
    if len(table) == 3:
        values = np.unique(table[2])
        # Where several values share a level, only lower levels are sure to be better.
        exact = values.size <= _LEVELS
        values = values if exact else values[:: -(-values.size // _LEVELS)]
        level, levels = values.searchsorted(table[2], side="right") - exact, values.size + 1
    best = np.full((levels, width), np.iinfo(np.int64).max)
    at = level * width + cell
    np.minimum.at(best.ravel(), at + 1, second)
    best = np.minimum.accumulate(np.minimum.accumulate(best, axis=1), axis=0)
    return np.flatnonzero(second < best.ravel()[at if exact else at - width])


def _sweep(second: Ints, third: Ints, block: int = 128) -> NDArray[np.intp]:
    """Indices of points no earlier one is at most as large as in both coordinates: blocks against the staircase of those before them."""
    low, high = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    kept = []
    for begin in range(0, second.size, block):
        b, c = second[begin : begin + block], third[begin : begin + block]
        index = np.arange(begin, begin + b.size)
        if low.size:
            at = low.searchsorted(b, side="right")
            new = np.flatnonzero(c < np.append(INF, high)[at])
            b, c, index = b[new], c[new], index[new]
        worse = np.tri(index.size, k=-1, dtype=np.bool_)
        worse &= (b[None, :] <= b[:, None]) & (c[None, :] <= c[:, None])
        new = np.flatnonzero(~worse.any(axis=1))
        kept.append(index[new])
        low, high = staircase(np.append(low, b[new]), np.append(high, c[new]))
    return np.concatenate(kept)


def nondominated(columns: Sequence[NDArray[Any]], block: int = 256) -> NDArray[np.intp]:
    """Indices of the points no other point dominates, in lexicographic order; of equal points one is kept.

    **Arguments:** `columns`, one array for each coordinate, all minimised; floats must not be negative.
    **Cost:** O(n * kept * coordinates), in blocks of `block` points.
    """
    size = len(columns[0])
    table = np.empty((len(columns), size), dtype=np.int64)
    for row, column in zip(table, columns):
        # Floats that are not negative are ordered as their bits are; halfway down they fit the integers below `INF`.
        row[:] = column.view(np.int64) - 2**62 if column.dtype == np.float64 else column
    if size <= 1:
        return np.arange(size)
    # A coordinate on which all agree decides nothing.
    table = table[table.min(axis=1) != table.max(axis=1)]
    if not len(table):
        return np.zeros(1, dtype=np.intp)
    order: NDArray[np.intp] = np.arange(size)
    if size > _MANY and len(table) in (2, 3):
        order = _plainly_good(table)
        table = table[:, order]
    sort = np.lexsort(table[::-1])
    order, table = order[sort], table[:, sort]
    # In lexicographic order a point is dominated only by earlier ones.
    if len(table) <= 2:
        last = table[-1]
        best = np.minimum.accumulate(last)
        keep = np.append(True, last[1:] < best[:-1])
        return order[keep] if len(table) == 2 else order[:1]
    if len(table) == 3:
        return order[_sweep(table[1], table[2])]
    kept = np.zeros(0, dtype=np.intp)
    for low in range(0, size, block):
        index = np.arange(low, min(low + block, size))
        if kept.size:
            worse = np.ones((index.size, kept.size), dtype=np.bool_)
            for c in table:
                worse &= c[kept][None, :] <= c[index][:, None]
            index = index[~worse.any(axis=1)]
        worse = np.tri(index.size, k=-1, dtype=np.bool_)
        for c in table[:, index]:
            worse &= c[None, :] <= c[:, None]
        kept = np.concatenate([kept, index[~worse.any(axis=1)]])
    return order[kept]
