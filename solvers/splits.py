r"""All ways to begin a stretch, at once: what `mwplan.solvers.diagonals` compares and evaluates.

The runs from one node `(s, e)` come in groups: the same end `j` and `e'`, the same forward peak `F` and held bytes `H`. RECOMPUTE runs to `j` are
one group (`H = A[s]`), whose staircase is that of the inner schedules and the forward; of MOONWALK runs, which differ in backward peak and
time, a group has a staircase too. For a stretch that ends at `r` a group is a step function of the budget `b`,

    f_g(b) = left_g(b) + T[j, r, e'](b - H)       for b >= F + K,  infinite below,

whose steps are at those of `left_g`, at `H` plus those of the suffix, and at `F + K`. The lower envelope over all groups is wanted. A fixed grid of
budgets cuts them into cells `(b_{q-1}, b_q]`. With each staircase sampled at the grid once, `f_g` is bounded from below in a cell (left part and
suffix at the cell's end) and from above at its beginning. Wide intervals of cells come first: of the groups whose bounds there say that they may matter, narrower ones, at last cells. Only where a group's lower bound is less than
`1 / (1 + slack)` of what the envelope is known to be at the cell's beginning are its steps in the cell evaluated, exactly; elsewhere the known
schedule at the cell's beginning stands for all of the cell, so that the merge loses at most that factor of time, and nothing if `slack` is 0.

Samples are float32: they only decide what is left out, with a margin above their rounding (`MARGIN`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mwplan.errors import ArgumentError
from mwplan.solvers.pareto import INF, Ints, staircase

Stairs = tuple[Ints, Ints]
Samples = NDArray[np.float32]
Index = NDArray[np.intp]
_Array = TypeVar("_Array", bound=NDArray[Any])
MARGIN = 2e-6
#: so many cells are bounded together, at first and where that leaves groups; each number divides the one before
LEVELS = (16, 4, 1)
_INF = np.float32(np.inf)


def grid(low: int, least: int, high: int, cells: int) -> Ints:
    """About `cells` budgets from `low` to `high`, most of them a little above `least`, where frontiers are steep."""
    low, least, high = max(1, low), max(2, least), max(3, high)
    below = np.geomspace(low, max(low, least), cells // 12)
    above = least * (1 + np.linspace(0, 0.05, cells // 12))
    far = least * (1 + np.geomspace(0.05, max(0.1, high / least - 1), cells - 2 * (cells // 12)))
    return np.unique(np.concatenate([below, above, far]).astype(np.int64))


def with_tail(budgets: Ints, least: int, high: int, ends: tuple[Stairs, Stairs]) -> Ints:
    """The budgets of a grid, made for stretches that need `least`, with those of stretches that `ends` follow, where they need much more."""
    lowest = min((int(need[0]) for need, _ in ends if need.size), default=0)
    if 2 * lowest < 3 * least:
        return budgets
    return np.union1d(budgets, grid(lowest // 2, lowest, high, budgets.size))


def rough_columns(n: int) -> Index:
    """With a grid of `n` budgets, the columns of sided samples at the ends of the widest intervals of `LEVELS`, the last of which ends with cell `n`; then those at the
    beginnings of all of these but the first."""
    first = np.arange(0, n + 1, LEVELS[0])
    return np.concatenate([np.minimum(first + LEVELS[0] - 1, n), n + first[1:]])


def longer(old: _Array, rows: int) -> _Array:
    """`old` with room for `rows` rows, the new ones unset."""
    new = np.empty((rows, *old.shape[1:]), dtype=old.dtype)
    new[: len(old)] = old
    return cast(_Array, new)


class Buffer:
    """Staircases of many rows, one after another, each element keyed by `base[row] + need`; and their samples.

    Cell `q` is `(grid[q-1], grid[q]]`, the first one without beginning, the last, `n`, without end. `pointer[row, q]`: the first element of the row
    beyond cell `q - 1`. `samples[row]`: the times at the ends of the `n + 1` cells, then infinity, if not `sided`; else those, infinite below
    `floor`, then the times at the `n` budgets, infinite below `floor + waiting`, the largest `K`. `rough[row]`, if sided: those samples that `rough_columns` names.
    """

    __slots__ = (
        "base",
        "grid",
        "key",
        "pointer",
        "rough",
        "rows",
        "samples",
        "sided",
        "size",
        "span",
        "time",
        "waiting",
    )

    def __init__(self, budgets: Ints, span: int, rows: int, *, sided: bool = False, waiting: int = 0) -> None:
        n = budgets.size
        self.size, self.grid, self.span, self.sided, self.waiting = 0, budgets, span, sided, waiting
        #: rows that `extend` has filled
        self.rows = 0
        self.key = np.empty(64, dtype=np.int64)
        self.time = np.empty(64, dtype=np.int64)
        self.base = np.zeros(rows, dtype=np.int64)
        self.pointer = np.zeros((rows, n + 2), dtype=np.int32)
        self.samples: Samples = np.empty((rows, 2 * n + 1 if sided else n + 2), dtype=np.float32)
        self.rough: Samples = np.empty((rows if sided else 0, rough_columns(n).size), dtype=np.float32)

    def extend(
        self, rows: int, of: Ints, need: Ints, time: Ints, floor: Ints | None = None, at: Ints | None = None
    ) -> Ints:
        """Adds the staircases of the next `rows` rows at once; `of`, in order: the row of each point, from 0; `at`, what this returned where it is known already: how
        many points lie at or below each budget of each row and in earlier rows."""
        n, size, first = self.grid.size, self.size, self.rows
        if (first + rows + 1) * self.span >= 2**63:
            raise ArgumentError(
                f"`profile`: {first + rows} stretches are too many for its byte counts: state bytes in a larger unit"
            )
        if first + rows > self.base.size:
            for name in ("base", "pointer", "samples", *(["rough"] if self.sided else [])):
                setattr(self, name, longer(getattr(self, name), 2 * (first + rows)))
        end = size + need.size
        if end > self.key.size:
            for name in ("key", "time"):
                setattr(self, name, longer(getattr(self, name), max(end, 2 * self.key.size)))
        base = np.arange(first, first + rows) * self.span
        key = need + base[of]
        self.base[first : first + rows], self.key[size:end], self.time[size:end] = base, key, time
        begin = key.searchsorted(base)
        stop = np.append(begin[1:], need.size)
        if at is None:
            at = key.searchsorted((base[:, None] + self.grid).ravel(), side="right").reshape(rows, n)
        pointer = self.pointer[first : first + rows]
        pointer[:, 0], pointer[:, 1:-1], pointer[:, -1] = begin + size, at + size, stop + size
        samples = self.samples[first : first + rows]
        samples[:] = _INF
        if need.size:
            values = time.astype(np.float32)
            reached = np.where(at > begin[:, None], values[at - 1], _INF)
            samples[:, n] = np.where(stop > begin, values[stop - 1], _INF)
            samples[:, :n] = reached
            if self.sided:
                samples[:, n + 1 :] = reached
                if floor is not None:
                    samples[:, :n][self.grid < floor[:, None]] = _INF
                    samples[:, n + 1 :][self.grid < (floor + self.waiting)[:, None]] = _INF
        if self.sided:
            self.rough[first : first + rows] = samples[:, rough_columns(n)]
        self.size, self.rows = end, first + rows
        return at


class Shifts:
    """Where the samples of suffixes stand when bytes are held to their left: `moves` of each number of held bytes, once, as rows of `table`; `rough`: the columns that
    `rough_columns` names."""

    __slots__ = ("budgets", "known", "rough", "table")

    def __init__(self, budgets: Ints) -> None:
        self.budgets = budgets
        self.known: dict[int, int] = {}
        self.table = np.empty((64, 2 * budgets.size + 1), dtype=np.int16)
        self.rough = np.empty((64, rough_columns(budgets.size).size), dtype=np.int16)

    def rows(self, held: Ints) -> Ints:
        """The rows of so many bytes held."""
        new = sorted({*held.tolist()} - self.known.keys())
        if new:
            first, end = len(self.known), len(self.known) + len(new)
            if end > len(self.table):
                self.table, self.rough = longer(self.table, 2 * end), longer(self.rough, 2 * end)
            self.table[first:end] = moves(self.budgets, np.array(new)[:, None])
            self.rough[first:end] = self.table[first:end, rough_columns(self.budgets.size)]
            self.known.update(zip(new, range(first, end)))
        return np.array([self.known[h] for h in held.tolist()], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Groups by their parts: the rows of `left_g` and of the suffix in two buffers, `H`, `F + K`, and the row of `H` in `Shifts`."""

    left: Ints
    right: Ints
    held: Ints
    floor: Ints
    moved: Ints

    def take(self, which: Index) -> Pairs:
        """Some of them."""
        return Pairs(
            self.left[which], self.right[which], self.held[which], self.floor[which], self.moved[which]
        )

    def values(self, left: Buffer, right: Buffer, budget: Ints) -> Stairs:
        """Need and time of the point that each has at or below its budget; `INF` where it has none."""
        own = left.key[: left.size].searchsorted(left.base[self.left] + budget, side="right") - 1
        rest = budget - self.held
        other = right.key[: right.size].searchsorted(right.base[self.right] + rest, side="right") - 1
        ok = (own >= left.pointer[self.left, 0]) & (other >= right.pointer[self.right, 0])
        ok &= (rest >= 0) & (budget >= self.floor)
        need = np.maximum(left.key[own] - left.base[self.left], self.floor)
        np.maximum(need, right.key[other] - right.base[self.right] + self.held, out=need)
        return np.where(ok, need, INF), np.where(ok, left.time[own] + right.time[other], INF)

    def steps(self, left: Buffer, right: Buffer, cell: Ints) -> list[tuple[Ints, Ints, Ints]]:
        """All steps in one cell each: of which pair, need, time."""
        budgets, out = right.grid, []
        none, most = np.int64(-1), np.int64(2**62)
        low = np.where(cell > 0, budgets[np.maximum(cell, 1) - 1], none)
        high = np.where(cell < budgets.size, budgets[np.minimum(cell, budgets.size - 1)], most)

        index, pair = _spread(left.pointer[self.left, cell], left.pointer[self.left, cell + 1])
        need = left.key[index] - left.base[self.left[pair]]
        rest = need - self.held[pair]
        to = self.right[pair]
        other = right.key[: right.size].searchsorted(right.base[to] + rest, side="right") - 1
        ok = (other >= right.pointer[to, 0]) & (rest >= 0) & (need >= self.floor[pair])
        out.append((pair[ok], need[ok], left.time[index[ok]] + right.time[other[ok]]))

        begin = np.where(cell > 0, budgets.searchsorted(low - self.held, side="right"), 0)
        end = np.where(cell < budgets.size, budgets.searchsorted(high - self.held, side="left"), budgets.size)
        index, pair = _spread(right.pointer[self.right, begin], right.pointer[self.right, end + 1])
        need = right.key[index] - right.base[self.right[pair]] + self.held[pair]
        ok = (need > low[pair]) & (need <= high[pair]) & (need >= self.floor[pair])
        index, pair, need = index[ok], pair[ok], need[ok]
        by = self.left[pair]
        own = left.key[: left.size].searchsorted(left.base[by] + need, side="right") - 1
        ok = own >= left.pointer[by, 0]
        out.append((pair[ok], need[ok], left.time[own[ok]] + right.time[index[ok]]))

        first = np.flatnonzero((self.floor > low) & (self.floor <= high))
        need, time = self.take(first).values(left, right, self.floor[first])
        ok = time < INF
        out.append((first[ok], need[ok], time[ok]))
        return out


def moves(budgets: Ints, held: int | Ints) -> Index:
    """Columns of a suffix's samples that bound it in each cell, and then at each budget, `held` bytes less being left for it."""
    n = budgets.size
    less = budgets - held
    ahead = budgets.searchsorted(less, side="left")
    behind = budgets.searchsorted(less, side="right") - 1
    end = np.full((*less.shape[:-1], 1), n)
    # The last column of samples is infinite: no budget of the grid is that small.
    return np.concatenate([ahead, end, np.where(behind < 0, n + 1, behind)], axis=-1)


def grouped(columns: list[Ints], waiting: int) -> list[tuple[int, int, Stairs]]:
    """Runs `(F, B, H, t)` between two nodes as groups of equal `F` and `H`: `(F, H, staircase of (B, t))`.

    A forward peak that is no more than the backward one even with the largest cotangent waiting, `waiting`, says nothing and counts as 0.
    """
    f, b, held, time = columns
    if f.size == 1:
        return [(int(f[0]), int(held[0]), (b, time))]
    f = np.where(f + waiting <= b, 0, f)
    if f.size and (f == f[0]).all() and (held == held[0]).all():
        return [(int(f[0]), int(held[0]), staircase(b, time))]
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
