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


def staircase(need: Ints, time: Ints) -> tuple[Ints, Ints]:
    """The Pareto set of the points `(need, time)`, both minimised. Cost: one sort."""
    if need.size <= 1:
        return need, time
    order = np.argsort(need, kind="stable")
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


def value_at(need: Ints, time: Ints, budget: int) -> int:
    """The staircase's time at `budget`, `INF` where nothing fits."""
    k = int(np.searchsorted(need, budget, side="right")) - 1
    return int(time[k]) if k >= 0 else INF


def nondominated(columns: Sequence[NDArray[Any]], block: int = 256) -> NDArray[np.intp]:
    """Indices of the points no other point dominates, in lexicographic order; of equal points one is kept.

    **Arguments:** `columns`, one array for each coordinate, all minimised.
    **Cost:** O(n * kept * coordinates), in blocks of `block` points.
    """
    size = len(columns[0])
    order = np.lexsort(tuple(reversed(columns)))
    if size <= 1:
        return order
    sorted_columns = [np.asarray(c)[order] for c in columns]
    # In lexicographic order a point is dominated only by earlier ones.
    kept = np.zeros(0, dtype=np.intp)
    for low in range(0, size, block):
        index = np.arange(low, min(low + block, size))
        if kept.size:
            worse = np.ones((index.size, kept.size), dtype=np.bool_)
            for c in sorted_columns:
                worse &= c[kept][None, :] <= c[index][:, None]
            index = index[~worse.any(axis=1)]
        worse = np.tri(index.size, k=-1, dtype=np.bool_)
        for c in sorted_columns:
            worse &= c[index][None, :] <= c[index][:, None]
        kept = np.concatenate([kept, index[~worse.any(axis=1)]])
    return order[kept]
