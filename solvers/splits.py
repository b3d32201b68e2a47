r"""All ways to begin a stretch with a RECOMPUTE run, at once: the inner loop of the frontier.

For one node `(s, e)` of a stretch that ends at `r`, every `j` gives a step function of the budget `b`,

    f_j(b) = fwd(s, j) + T[s, j, e](b) + T[j, r, 0](b - A[s])       for b >= P_j + K,  infinite below,

whose steps are at the needs of `T[s, j, e]` and at `A[s]` plus those of `T[j, r, 0]`. The lower envelope over `j` is wanted. A fixed grid of budgets
cuts them into cells; with each staircase sampled at the grid once, `f_j` is bounded from below in a cell by its value at the cell's end
and the envelope from above by its value at the cell's beginning, so that most pairs (j, cell) are seen to be useless by looking
up numbers, and only the steps of the rest are evaluated, exactly. Times stay below 2^60, `BIG` stands for none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mwplan.solvers.pareto import Bools, Ints

Stairs = tuple[Ints, Ints]
BIG = 2**61


def grid(low: int, high: int, cells: int) -> Ints:
    """About `cells` budgets from `low` to `high`, evenly spaced by ratio."""
    return np.unique(np.geomspace(max(1, low), max(2, low, high), cells).astype(np.int64))


class Buffer:
    """Staircases of many groups (the `j` of a split), one after another, each element keyed by `offset + need`; and their samples.

    `cell[i]`: the grid cell of element `i`'s need; cell `q` is `(grid[q-1], grid[q]]`, the first one without beginning, the last without
    end. `samples[j, q]`: the time of group `j` at the end of cell `q`.
    """

    __slots__ = ("cell", "grid", "group", "key", "samples", "size", "time")

    def __init__(self, budgets: Ints, groups: int) -> None:
        self.size = 0
        self.grid = budgets
        self.key = np.empty(64, dtype=np.int64)
        self.time = np.empty(64, dtype=np.int64)
        self.group = np.empty(64, dtype=np.int64)
        self.cell = np.empty(64, dtype=np.int64)
        self.samples = np.full((groups, budgets.size + 1), BIG)

    def append(self, group: int, offset: int, stairs: Stairs) -> None:
        """Adds the staircase of `group`; keys must come in order."""
        need, time = stairs
        if not need.size:
            return
        end = self.size + need.size
        if end > self.key.size:
            for name in ("key", "time", "group", "cell"):
                old = getattr(self, name)
                new = np.empty(max(end, 2 * old.size), dtype=np.int64)
                new[: self.size] = old[: self.size]
                setattr(self, name, new)
        self.key[self.size : end] = need + offset
        self.time[self.size : end] = time
        self.group[self.size : end] = group
        self.cell[self.size : end] = np.searchsorted(self.grid, need, side="left")
        at = np.searchsorted(need, self.grid, side="right") - 1
        self.samples[group, :-1] = np.where(at >= 0, time[at], BIG)
        self.samples[group, -1] = time[-1]
        self.size = end


def _useful(
    left: Buffer, right: Buffer, groups: slice, own: int, peaks: Ints, forward: Ints, known: Stairs
) -> tuple[Bools, NDArray[np.intp], NDArray[np.intp]]:
    """Which (group, cell) pairs may hold a point of the envelope, one row a group; and the cells that each cell, moved by `own`, spans."""
    budgets = left.grid
    n = budgets.size
    ahead = np.append(np.searchsorted(budgets, budgets - own, side="left"), n)
    behind = np.searchsorted(budgets, budgets - own, side="right") - 1
    lefts, rights = left.samples[groups], right.samples[groups]
    lower = lefts + np.minimum(rights[:, ahead], BIG)
    lower += forward[:, None]
    upper = lefts[:, :-1] + np.where(behind >= 0, rights[:, behind], BIG) + forward[:, None]
    # Below its forward peak a run has no points; they move up to it.
    first = np.searchsorted(budgets, peaks, side="left")
    upper[peaks[:, None] > budgets[None, :]] = BIG
    envelope = np.minimum(upper.min(axis=0), BIG)
    if known[0].size:
        at = np.searchsorted(known[0], budgets, side="right") - 1
        envelope = np.minimum(envelope, np.where(at >= 0, known[1][at], BIG))
    # The envelope at a cell's beginning; the first cell has none.
    limit = np.append([BIG], np.minimum.accumulate(envelope))
    useful = lower < limit[None, :]
    cells = np.arange(n + 1)
    at_peak = useful[np.arange(len(first)), first]
    useful = np.where(cells[None, :] < first[:, None], at_peak[:, None], useful)
    low = np.append(0, np.searchsorted(budgets, budgets + own, side="right"))
    high = np.append(np.searchsorted(budgets, budgets + own, side="left"), n)
    return useful, low, high


def split_points(
    left: Buffer,
    right: Buffer,
    start: int,
    limit: int,
    size: int,
    span: int,
    own: int,
    peaks: Ints,
    forward: Ints,
    known: Stairs,
) -> tuple[list[Ints], list[Ints]]:
    """Needs and times of all steps of `f_j`, `start < j <= limit`, that may lie on the envelope and below the staircase `known`.

    **Arguments:** `left`, the `T[s, j, e]`, keyed by `j * span + need`; `right`, the `T[j, r, 0]`, keyed by `(size - j) * span + need`; `own`, `A[s]`
    unless `e`; `peaks[i]` and `forward[i]`, `P_j + K` and `fwd(s, j)` of `j = start + 1 + i`.
    """
    n_left = int(np.searchsorted(left.key[: left.size], (limit + 1) * span))
    low = int(np.searchsorted(right.key[: right.size], (size - limit) * span))
    if not n_left or low == right.size:
        return [], []
    peaks, forward = peaks[: limit - start], forward[: limit - start]
    useful, first, last = _useful(left, right, slice(start + 1, limit + 1), own, peaks, forward, known)
    lk, lt, lg = left.key[:n_left], left.time[:n_left], left.group[:n_left]
    rk, rt, rg = right.key[low : right.size], right.time[low : right.size], right.group[low : right.size]
    needs, times = [], []

    pick = np.flatnonzero(useful[lg - start - 1, left.cell[:n_left]])
    g = lg[pick]
    need = lk[pick] - g * span
    at = np.searchsorted(rk, need - own + (size - g) * span, side="right") - 1
    ok = (at >= 0) & (rg[at] == g)
    g = g[ok] - start - 1
    needs.append(np.maximum(need[ok], peaks[g]))
    times.append(lt[pick[ok]] + rt[at[ok]] + forward[g])

    # A right part's need plus A[s] lies in one of the cells first..last.
    count = np.zeros((useful.shape[0], useful.shape[1] + 1), dtype=np.int64)
    np.cumsum(useful, axis=1, out=count[:, 1:])
    reached = count[:, last + 1] > count[:, first]
    pick = np.flatnonzero(reached[rg - start - 1, right.cell[low : right.size]])
    g = rg[pick]
    need = rk[pick] - (size - g) * span + own
    at = np.searchsorted(lk, need + g * span, side="right") - 1
    ok = (at >= 0) & (lg[at] == g)
    g = g[ok] - start - 1
    needs.append(np.maximum(need[ok], peaks[g]))
    times.append(rt[pick[ok]] + lt[at[ok]] + forward[g])
    return needs, times
