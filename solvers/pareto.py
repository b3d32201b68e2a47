"""Staircases and Pareto sets of integer points: the only numerics the solvers share.

A staircase is a pair of int64 arrays `(need, time)`, `need` strictly increasing and `time` strictly
decreasing: the least time at each budget, infinite below `need[0]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.solvers.tuning import TUNING, Tuning

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
#: needs and times of the points of one staircase
Stairs = tuple[Ints, Ints]
INF = np.iinfo(np.int64).max // 2
#: of nothing that fits, and of nothing left to do
NO_STAIRS: Stairs = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
DONE: Stairs = (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


def staircase(need: Ints, time: Ints, tuning: Tuning = TUNING) -> Stairs:
    """The Pareto set of the points `(need, time)`, both minimised.

    **Cost:** linear for most of the points, which a grid of needs shows to be dominated; one sort of the
    rest.
    """
    if need.size <= 1:
        return need, time
    cells = tuning.staircase_cells
    if need.size > 4 * cells:
        low = int(need.min())
        shift = max(0, int(int(need.max()) - low).bit_length() - cells.bit_length() + 1)
        cell = (need - low) >> shift
        best = np.full(cells + 1, INF, dtype=np.int64)
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
    last = ends(need)
    return need[last], time[last]


def thinned(need: Ints, time: Ints, loss: float, *, optimistic: bool) -> Stairs:
    """The staircase with at most one step for each factor `1 + loss` of time.

    Steps within such a factor become one: at the least of their needs, with the largest of their times (a
    schedule that exists), or, if `optimistic`, with the least (a bound that none beats). Least need and least
    time stay exact. **Cost:** linear.
    """
    if need.size < 3 or time[-1] <= 0:
        return need, time
    group = np.floor(np.log(time / float(time[-1])) / np.log1p(loss))
    index = np.flatnonzero(begins(group))
    if optimistic:
        return need[index], time[np.append(index[1:], need.size) - 1]
    if index[-1] != need.size - 1:
        index = np.append(index, need.size - 1)
    return need[index], time[index]


def begins(*columns: NDArray[Any]) -> Bools:
    """For each row whether it differs from the one before; the first does."""
    new = np.ones(columns[0].size, dtype=np.bool_)
    np.not_equal(columns[0][1:], columns[0][:-1], out=new[1:])
    for column in columns[1:]:
        new[1:] |= column[1:] != column[:-1]
    return new


def ends(*columns: NDArray[Any]) -> Bools:
    """For each row whether it differs from the next; the last does."""
    last = np.ones(columns[0].size, dtype=np.bool_)
    last[:-1] = begins(*columns)[1:]
    return last


def value_at(need: Ints, time: Ints, budget: int) -> int:
    """The staircase's time at `budget`, `INF` where nothing fits."""
    k = int(np.searchsorted(need, budget, side="right")) - 1
    return int(time[k]) if k >= 0 else INF


def lexicographic(columns: Sequence[Ints]) -> NDArray[np.intp]:
    """Indices of rows in the order of their first column, of equal ones by the second, and so on; no number
    may be negative.

    **Cost:** one sort of as many columns as fit one integer, and one by the others of the rows that agree in
    those: several times less than `np.lexsort`.
    """
    key, bound, used = columns[0], int(columns[0].max(initial=0)) + 1, 1
    for column in columns[1:]:
        high = int(column.max(initial=0)) + 1
        if bound * high >= 2**62:
            break
        key, bound, used = key * high + column, bound * high, used + 1
    order = np.argsort(key, kind="stable")
    if used < len(columns):
        key = key[order]
        same = key[1:] == key[:-1]
        tied = np.flatnonzero(np.append(False, same) | np.append(same, False))
        some = order[tied]
        order[tied] = some[np.lexsort((*(x[some] for x in columns[: used - 1 : -1]), key[tied]))]
    return order


def _plainly_good(table: Ints, of: Ints, tuning: Tuning) -> NDArray[np.intp]:
    """Indices of the points, of two or three coordinates from 0, left when those with a better one of their
    group in an earlier cell are gone.

    Cells are stretches of the first coordinate and levels of the last of three; within a cell no points are
    compared.
    **Cost:** linear, but for one sort of the last coordinate.
    """
    first, second = table[0], table[1]
    groups = int(of[-1]) + 1
    cells = min(tuning.staircase_cells, 1 << (first.size // (8 * groups)).bit_length())
    width = cells + 1
    cell = first >> max(0, int(first.max()).bit_length() - cells.bit_length() + 1)
    level, levels, exact = np.zeros(1, dtype=np.intp), 1, True
    if len(table) == 3:
        values = np.unique(table[2])
        # Where several values share a level, only lower levels are sure to be better.
        exact = values.size <= tuning.table_levels
        values = values if exact else values[:: -(-values.size // tuning.table_levels)]
        level, levels = values.searchsorted(table[2], side="right") - exact, values.size + 1
    best = np.full((levels, groups, width), np.iinfo(np.int64).max)
    at = (level * groups + of) * width + cell
    np.minimum.at(best.ravel(), at + 1, second)
    best = np.minimum.accumulate(np.minimum.accumulate(best, axis=2), axis=0)
    return np.flatnonzero(second < best.ravel()[at if exact else at - groups * width])


def _sweep(second: Ints, third: Ints, block: int) -> NDArray[np.intp]:
    """Indices of points no earlier one is at most as large as in both coordinates.

    Within blocks all pairs are compared; then blocks twice as long, again and again: their second halves
    against the staircases of their first.
    **Cost:** O(n block + n log n).
    """
    count = -(-second.size // block)
    room = count * block - second.size
    b, c = (np.append(x, np.full(room, INF)).reshape(count, block) for x in (second, third))
    worse = (b[:, None, :] <= b[:, :, None]) & (c[:, None, :] <= c[:, :, None])
    worse &= np.tri(block, k=-1, dtype=np.bool_)
    kept = np.flatnonzero(~worse.any(axis=2).ravel()[: second.size])
    if count == 1:
        return kept
    high = int(third.max()) + 1
    if high * count >= INF:
        third = np.unique(third, return_inverse=True)[1]
        high = third.size
    kept = kept[np.argsort(second[kept], kind="stable")]
    width = block
    while width < second.size:
        half = kept // width
        pair, first = half >> 1, half & 1 == 0
        # Pair by pair of halves, and still in order of the second coordinate, of equal ones the earlier
        # first.
        order = np.argsort(pair.astype(np.uint16 if count < 2**16 else np.int64), kind="stable")
        # Those of later pairs lie below all earlier ones, so that the running minimum begins anew with each.
        low = (third[kept] - pair * high)[order]
        good = np.empty(kept.size, dtype=np.bool_)
        good[order] = low < np.minimum.accumulate(np.where(first[order], low, INF))
        kept = kept[good | first]
        width *= 2
    return np.sort(kept)


def nondominated(
    columns: Sequence[NDArray[Any]], of: Ints | None = None, tuning: Tuning = TUNING
) -> NDArray[np.intp]:
    """Indices of the points no other point of their group dominates, group by group; of equal points one is
    kept.

    **Arguments:** `columns`, one array for each coordinate, all minimised; floats must not be negative. `of`:
    the groups, in any order; None for one.
    **Cost:** near linear for up to three coordinates that differ within groups; for more O(n * kept *
    coordinates) for each group, in blocks of `Tuning.compare_block` points.
    """
    size = len(columns[0])
    if size <= 1:
        return np.arange(size)
    table = np.empty((len(columns), size), dtype=np.int64)
    for row, column in zip(table, columns):
        row[:] = _ordered(column) if column.dtype == np.float64 else column
    order: NDArray[np.intp] = np.arange(size)
    if of is None:
        of = np.zeros(size, dtype=np.int64)
    elif (of[1:] < of[:-1]).any():
        order = np.argsort(of, kind="stable")
        of, table = of[order], table[:, order]
    new = begins(of)
    first, of = np.flatnonzero(new), np.cumsum(new) - 1
    table -= np.minimum.reduceat(table, first, axis=1)[:, of]
    # A coordinate on which all of each group agree decides nothing.
    table = table[table.any(axis=1)]
    if not len(table):
        return order[first]
    if len(table) > 3:
        return order[_compared_all(table, first, tuning)]
    if size > tuning.table_points and len(table) > 1:
        left = _plainly_good(table, of, tuning)
        order, of, table = order[left], of[left], table[:, left]
    sort = lexicographic((of, *table))
    order, of, table = order[sort], of[sort], table[:, sort]
    if len(table) == 1:
        return order[begins(of)]
    # In lexicographic order a point is dominated only by earlier ones. Groups are told apart by their second
    # coordinate: that of later ones is less.
    second, groups = table[1], int(of[-1]) + 1
    if (int(second.max()) + 1) * groups >= INF:
        second = np.unique(second, return_inverse=True)[1]
    second = second - of * (int(second.max()) + 1)
    if len(table) == 2:
        left = np.flatnonzero(np.append(True, second[1:] < np.minimum.accumulate(second)[:-1]))
    else:
        left = _sweep(second, table[2], tuning.sweep_block)
    return order[left]


def _ordered(column: Floats) -> Ints:
    """Integers in the order of floats that are not negative, small where the floats are 0 or near each other:
    their bits are."""
    bits = column.view(np.int64)
    low = int(bits.min(initial=INF, where=bits > 0))
    ordered: Ints = np.where(bits > 0, bits - low + 1, 0)
    return ordered


def _compared_all(table: Ints, first: NDArray[np.intp], tuning: Tuning) -> NDArray[np.intp]:
    """Indices of the points that no other of their group dominates, group by group. Small groups of about
    equal size are compared together."""
    sizes = np.diff(first, append=table.shape[1])
    most, block = tuning.pairs_group, tuning.compare_block
    kept = [a + _compared(table[:, a : a + n], block) for a, n in zip(first, sizes) if n > most]
    width = 1
    while width <= most:
        some = np.flatnonzero((sizes <= width) & (sizes > width // 2))
        each = max(1, tuning.pairs_together // width**2)
        for low in range(0, some.size, each):
            group = some[low : low + each]
            at = first[group, None] + np.minimum(np.arange(width), sizes[group, None] - 1)
            there = np.arange(width) < sizes[group, None]
            worse, equal = (there[:, None, :] & there[:, :, None] for _ in range(2))
            for column in table:
                value = column[at]
                worse &= value[:, None, :] <= value[:, :, None]
                equal &= value[:, None, :] == value[:, :, None]
            # Of equal points the first stays.
            worse &= ~equal | np.tri(width, k=-1, dtype=np.bool_)
            kept.append(at[there & ~worse.any(axis=2)])
        width *= 2
    found = np.concatenate(kept)
    return found[np.argsort(np.searchsorted(first, found, side="right"), kind="stable")]


def _compared(table: Ints, block: int) -> NDArray[np.intp]:
    """Indices of the points of one group that no other dominates, in lexicographic order."""
    order = np.lexsort(table[::-1])
    table = table[:, order]
    kept = np.zeros(0, dtype=np.intp)
    for low in range(0, order.size, block):
        index = np.arange(low, min(low + block, order.size))
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
