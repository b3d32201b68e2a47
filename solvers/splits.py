r"""All ways to begin a stretch, at once: the inner loop of the frontier.

The runs from one node `(s, e)` come in groups: the same end `j` and `e'`, the same forward peak `F` and held bytes `H`. RECOMPUTE runs to `j` are
one group (`H = A[s]`), whose staircase is that of the inner schedules and the forward; of MOONWALK runs, which differ in backward peak and
time, a group has a staircase too. For a stretch that ends at `r` a group is a step function of the budget `b`,

    f_g(b) = left_g(b) + T[j, r, e'](b - H)       for b >= F + K,  infinite below,

whose steps are at those of `left_g`, at `H` plus those of the suffix, and at `F + K`. The lower envelope over all groups is wanted. A fixed grid of
budgets cuts them into cells `(b_{q-1}, b_q]`. With each staircase sampled at the grid once, `f_g` is bounded from below in a cell (left part and
suffix at the cell's end) and from above at its beginning, all groups and cells in three NumPy calls. Only where a group's lower bound is less than
`1 / (1 + slack)` of what the envelope is known to be at the cell's beginning are its steps in the cell evaluated, exactly; elsewhere the known
schedule at the cell's beginning stands for all of the cell, so that the merge loses at most that factor of time, and nothing if `slack` is 0.

Samples are float32: they only decide what is left out, with a margin above their rounding (`_MARGIN`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mwplan.errors import ArgumentError
from mwplan.solvers.pareto import INF, Floats, Ints, staircase

Stairs = tuple[Ints, Ints]
Samples = NDArray[np.float32]
Index = NDArray[np.intp]
_Array = TypeVar("_Array", bound=NDArray[Any])
_MARGIN = 2e-6
_INF = np.float32(np.inf)


def grid(low: int, least: int, high: int, cells: int) -> Ints:
    """About `cells` budgets from `low` to `high`, most of them a little above `least`, where frontiers are steep."""
    low, least, high = max(1, low), max(2, least), max(3, high)
    below = np.geomspace(low, max(low, least), cells // 12)
    above = least * (1 + np.linspace(0, 0.05, cells // 12))
    far = least * (1 + np.geomspace(0.05, max(0.1, high / least - 1), cells - 2 * (cells // 12)))
    return np.unique(np.concatenate([below, above, far]).astype(np.int64))


def _longer(old: _Array, rows: int) -> _Array:
    new = np.empty((rows, *old.shape[1:]), dtype=old.dtype)
    new[: len(old)] = old
    return cast(_Array, new)


class Buffer:
    """Staircases of many rows, one after another, each element keyed by `base[row] + need`; and their samples.

    Cell `q` is `(grid[q-1], grid[q]]`, the first one without beginning, the last, `n`, without end. `pointer[row, q]`: the first element of the row
    beyond cell `q - 1`. `samples[row]`: the times at the ends of the `n + 1` cells, then infinity, if not `sided`; else those, infinite below
    `floor`, then the times at the `n` budgets, infinite below `floor + waiting`, the largest `K`.
    """

    __slots__ = ("base", "grid", "key", "pointer", "samples", "sided", "size", "span", "time", "waiting")

    def __init__(self, budgets: Ints, span: int, rows: int, *, sided: bool = False, waiting: int = 0) -> None:
        n = budgets.size
        self.size, self.grid, self.span, self.sided, self.waiting = 0, budgets, span, sided, waiting
        self.key = np.empty(64, dtype=np.int64)
        self.time = np.empty(64, dtype=np.int64)
        self.base = np.zeros(rows, dtype=np.int64)
        self.pointer = np.zeros((rows, n + 2), dtype=np.int32)
        self.samples: Samples = np.full((rows, 2 * n + 1 if sided else n + 2), _INF, dtype=np.float32)

    def append(self, row: int, rank: int, stairs: Stairs, floor: int = 0) -> None:
        """Adds the staircase of `row`; ranks must come in order, and are the multiples of `span` that keys begin with."""
        need, time = stairs
        n, size = self.grid.size, self.size
        if row >= self.base.size:
            for name in ("base", "pointer", "samples"):
                setattr(self, name, _longer(getattr(self, name), 2 * row + 4))
        self.base[row] = rank * self.span
        end = size + need.size
        if end > self.key.size:
            for name in ("key", "time"):
                setattr(self, name, _longer(getattr(self, name), max(end, 2 * self.key.size)))
        self.key[size:end] = need + rank * self.span
        self.time[size:end] = time
        at = need.searchsorted(self.grid, side="right")
        pointer, samples = self.pointer[row], self.samples[row]
        pointer[0], pointer[1:-1], pointer[-1] = size, at + size, end
        samples[:] = _INF
        if need.size:
            first = int(at.searchsorted(1))
            values = time.astype(np.float32)
            reached = values[at[first:] - 1]
            if self.sided:
                low = int(self.grid.searchsorted(floor))
                samples[max(low, first) : n] = reached[max(low - first, 0) :]
                samples[n] = values[-1]
                low = int(self.grid.searchsorted(floor + self.waiting))
                samples[n + 1 + max(low, first) :] = reached[max(low - first, 0) :]
            else:
                samples[first:n] = reached
                samples[n] = values[-1]
        self.size = end


class Side:
    """The groups of runs from one node: `left_g` in a buffer, and each group's `F`, `H` and row of the suffixes' buffer.

    **Arguments:** `held`, the `H` of all groups where they share it, None where not; if they do, their suffixes' rows are
    `first_child, first_child + 2, ...`; if `first_child` is -1, groups are asked for by index, and `children` says their rows anew at each merge.
    """

    __slots__ = ("_moved", "_ready", "children", "count", "first_child", "floor", "held", "left", "shared")

    def __init__(
        self,
        budgets: Ints,
        span: int,
        waiting: int,
        held: int | None = None,
        first_child: int = 0,
        rows: int = 4,
    ) -> None:
        self.left = Buffer(budgets, span, rows, sided=True, waiting=waiting)
        self.count, self.shared, self.first_child = 0, held is not None, first_child
        self.children = np.zeros(4, dtype=np.int64)
        self.floor = np.zeros(4, dtype=np.int64)
        self.held = np.zeros(4, dtype=np.int64)
        self._moved: Index = np.zeros((0, 2 * budgets.size + 1), dtype=np.intp)
        self._ready = 0
        if held is not None:
            self._moved = self._move(budgets, held)

    @staticmethod
    def _move(budgets: Ints, held: int | Ints) -> Index:
        """Columns of a suffix's samples that bound it in each cell, and then at each budget, `held` bytes less being left for it."""
        n = budgets.size
        less = budgets - held
        ahead = budgets.searchsorted(less, side="left")
        behind = budgets.searchsorted(less, side="right") - 1
        end = np.full((*less.shape[:-1], 1), n)
        # The last column of samples is infinite: no budget of the grid is that small.
        return np.concatenate([ahead, end, np.where(behind < 0, n + 1, behind)], axis=-1)

    def append(self, child: int, floor: int, held: int, stairs: Stairs) -> None:
        """One more group."""
        g = self.count
        if (g + 2) * self.left.span >= 2**63:
            raise ArgumentError(
                f"`profile`: {g + 1} groups of runs leave one position, too many for its byte counts: state bytes in a larger unit"
            )
        if g == self.children.size:
            for name in ("children", "floor", "held"):
                setattr(self, name, _longer(getattr(self, name), 2 * g))
        self.children[g], self.floor[g], self.held[g] = child, floor, held
        self.left.append(g, g, stairs, floor)
        self.count = g + 1

    def bounds(self, right: Buffer, groups: int | Ints) -> Samples:
        """Row g: lower bounds of `f_g` in the `n + 1` cells, then upper bounds at the `n` budgets."""
        if self.shared:
            assert isinstance(groups, int)
            rows = slice(self.first_child, self.first_child + 2 * groups, 2)
            out: Samples = right.samples[rows].take(self._moved, axis=1)
            out += self.left.samples[:groups]
            return out
        if self._ready < self.count:
            if len(self._moved) < self.count:
                self._moved = _longer(self._moved, 2 * self.count)
            new = slice(self._ready, self.count)
            self._moved[new] = self._move(right.grid, self.held[new, None])
            if self.first_child >= 0:
                self._moved[new] += self.children[new, None] * right.samples.shape[1]
            self._ready = self.count
        if isinstance(groups, int):
            out = right.samples.ravel().take(self._moved[:groups])
            out += self.left.samples[:groups]
        else:
            out = right.samples.ravel().take(
                self._moved[groups] + self.children[groups, None] * right.samples.shape[1]
            )
            out += self.left.samples[groups]
        return out

    def at(self, right: Buffer, k: int, group: Ints, budget: Ints) -> Stairs:
        """The points that `f_g` has at or below each of the budgets, for pairs `(group, budget)`; those without any are left out."""
        need, time = self.values(right, k, group, budget)
        ok = time < INF
        return need[ok], time[ok]

    def values(self, right: Buffer, k: int, group: Ints, budget: Ints) -> Stairs:
        """Need and time of the points that `f_g` has at or below each of the budgets, for pairs `(group, budget)`; `INF` where it has none."""
        left, child = self.left, self.children[group]
        own = left.key[: left.size].searchsorted(left.base[group] + budget, side="right") - 1
        rest = budget - self.held[group]
        other = right.key[: right.size].searchsorted(right.base[child] + rest, side="right") - 1
        ok = (own >= left.pointer[group, 0]) & (other >= right.pointer[child, 0])
        ok &= (rest >= 0) & (budget >= self.floor[group] + k)
        need = np.maximum(left.key[own] - left.base[group], self.floor[group] + k)
        np.maximum(need, right.key[other] - right.base[child] + self.held[group], out=need)
        return np.where(ok, need, INF), np.where(ok, left.time[own] + right.time[other], INF)

    def points(self, right: Buffer, k: int, group: int) -> Stairs:
        """All points of all runs of one group."""
        left, child = self.left, self.children[group]
        own = slice(left.pointer[group, 0], left.pointer[group, -1])
        other = slice(right.pointer[child, 0], right.pointer[child, -1])
        peak = np.maximum(left.key[own] - left.base[group], self.floor[group] + k)
        rest = right.key[other] + (self.held[group] - right.base[child])
        need = np.maximum(peak[:, None], rest[None, :])
        return need.ravel(), (left.time[own][:, None] + right.time[other][None, :]).ravel()

    def steps(self, right: Buffer, k: int, group: Ints, cell: Ints) -> list[Stairs]:
        """All steps of `f_g` in the given cells, for pairs `(group, cell)`."""
        left, budgets = self.left, right.grid
        out = []
        floor = self.floor[group] + k
        held, child = self.held[group], self.children[group]
        none, most = np.int64(-1), np.int64(2**62)
        low = np.where(cell > 0, budgets[np.maximum(cell, 1) - 1], none)
        high = np.where(cell < budgets.size, budgets[np.minimum(cell, budgets.size - 1)], most)

        index, pair = _spread(left.pointer[group, cell], left.pointer[group, cell + 1])
        need = left.key[index] - left.base[group[pair]]
        rest = need - held[pair]
        to = child[pair]
        other = right.key[: right.size].searchsorted(right.base[to] + rest, side="right") - 1
        ok = (other >= right.pointer[to, 0]) & (rest >= 0) & (need >= floor[pair])
        out.append((need[ok], left.time[index[ok]] + right.time[other[ok]]))

        begin = np.where(cell > 0, budgets.searchsorted(low - held, side="right"), 0)
        end = np.where(cell < budgets.size, budgets.searchsorted(high - held, side="left"), budgets.size)
        index, pair = _spread(right.pointer[child, begin], right.pointer[child, end + 1])
        need = right.key[index] - right.base[child[pair]] + held[pair]
        ok = (need > low[pair]) & (need <= high[pair]) & (need >= floor[pair])
        index, pair, need = index[ok], pair[ok], need[ok]
        by = group[pair]
        own = left.key[: left.size].searchsorted(left.base[by] + need, side="right") - 1
        ok = own >= left.pointer[by, 0]
        out.append((need[ok], left.time[own[ok]] + right.time[index[ok]]))

        first = np.flatnonzero((floor > low) & (floor <= high))
        out.append(self.at(right, k, group[first], floor[first]))
        return out


def grouped(columns: list[Ints], waiting: int) -> list[tuple[int, int, Stairs]]:
    """Runs `(F, B, H, t)` between two nodes as groups of equal `F` and `H`: `(F, H, staircase of (B, t))`.

    A forward peak that is no more than the backward one even with the largest cotangent waiting, `waiting`, says nothing and counts as 0.
    """
    f, b, held, time = columns
    if f.size == 1:
        return [(int(f[0]), int(held[0]), (b, time))]
    f = np.where(f + waiting <= b, 0, f)
    order = np.lexsort((held, f))
    f, b, held, time = f[order], b[order], held[order], time[order]
    cuts = np.flatnonzero((f[1:] != f[:-1]) | (held[1:] != held[:-1])) + 1
    return [
        (int(f[a]), int(held[a]), staircase(b[a:z], time[a:z]))
        for a, z in zip([0, *cuts.tolist()], [*cuts.tolist(), f.size])
        if z > a
    ]


def _spread(begin: NDArray[Any], end: NDArray[Any]) -> tuple[Ints, Index]:
    """All integers of the ranges `begin..end-1`, and which range each is of."""
    count = end - begin
    of = np.repeat(np.arange(count.size), count)
    before = np.cumsum(count) - count
    return np.arange(of.size) + (begin - before)[of], of


def envelope(
    sides: Sequence[tuple[Side, int | Ints]],
    right: Buffer,
    k: int,
    known: Stairs,
    *,
    slack: float = 0.0,
    optimistic: bool = False,
) -> list[Stairs]:
    """Points whose Pareto set, together with the staircase `known`, is the envelope of all groups.

    **Arguments:** `sides`, each with how many of its groups take part, or which; `right`, the suffixes; `k`, the waiting cotangent; `slack`, the factor of time that
    may be lost; `optimistic`: then no point is a schedule, but no schedule is faster than the staircase.
    """
    budgets = right.grid
    n = budgets.size
    bounds = [side.bounds(right, groups) for side, groups in sides]
    least = [b.min(axis=0) for b in bounds]
    upper = np.minimum.reduce([x[n + 1 :] for x in least])
    if known[0].size:
        at = known[0].searchsorted(budgets, side="right")
        reached = np.append(np.inf, known[1])[at].astype(np.float32)
        upper = np.minimum(upper, reached)
    limit = np.append(_INF, np.minimum.accumulate(upper))
    goal = limit * np.float32((1 + _MARGIN) / (1 + slack))
    out: list[Stairs] = []
    for (side, groups), bound, lowest in zip(sides, bounds, least):
        which = np.arange(groups) if isinstance(groups, int) else groups
        # goal is infinite where nothing is known yet, and so is the bound of what does not fit.
        columns = np.flatnonzero(lowest[: n + 1] < goal)
        if columns.size:
            group, place = np.nonzero(bound[:, columns] < goal[columns])
            out += side.steps(right, k, which[group], columns[place])
        if slack and optimistic:
            out.append(_floor(bound[:, : n + 1], goal, limit, budgets))
        elif slack:
            # The schedules that `limit` counts on.
            useful = np.flatnonzero((lowest[n + 1 :] <= limit[1:]) & (lowest[n + 1 :] < limit[:-1]))
            if useful.size:
                group = bound[:, n + 1 + useful].argmin(axis=0)
                out.append(side.at(right, k, which[group], budgets[useful]))
    return out


def _floor(bound: Samples, goal: Samples, limit: Samples, budgets: Ints) -> Stairs:
    """Where steps are not evaluated: the cells' lower bounds as points at their beginnings."""
    left_out: Floats = np.where(bound < goal[None, :], _INF, bound).min(axis=0).astype(np.float64)
    cell = np.flatnonzero(left_out < limit * (1 + _MARGIN))
    cell = cell[cell > 0]
    return budgets[cell - 1] + 1, np.floor(left_out[cell] * (1 - _MARGIN)).astype(np.int64)
