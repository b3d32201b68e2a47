r"""All ways to begin a stretch, at once: what `mwplan.solvers.diagonals` compares and evaluates.

The runs from one node `(s, e)` come in groups: the same end `j` and `e'`, the same forward peak `F` and held
bytes `H`. RECOMPUTE runs to `j` are one group (`H = A[s]`), whose staircase is that of the inner schedules
and the forward; of MOONWALK runs, which differ in backward peak and time, a group has a staircase too. For a
stretch that ends at `r` a group is a step function of the budget `b`,

    f_g(b) = left_g(b) + T[j, r, e'](b - H)       for b >= F + K,  infinite below,

whose steps are at those of `left_g`, at `H` plus those of the suffix, and at `F + K`. The lower envelope over
all groups is wanted. A fixed grid of budgets cuts them into cells `(b_{q-1}, b_q]`. With each staircase
sampled at the grid once, `f_g` is bounded from below in a cell (left part and suffix at the cell's end) and
from above at its beginning. Wide intervals of cells come first: of the groups whose bounds there say that
they may matter, narrower ones, at last cells. Only where a group's lower bound is less than `1 / (1 + slack)`
of what the envelope is known to be at the cell's beginning are its steps in the cell evaluated, exactly;
elsewhere the known schedule at the cell's beginning stands for all of the cell, so that the merge loses at
most that factor of time, and nothing if `slack` is 0.

Samples are float32: they only decide what is left out, with a margin above their rounding (`MARGIN`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mwplan.common.errors import ArgumentError
from mwplan.solvers.parallel import each
from mwplan.solvers.pareto import INF, Ints, Stairs, staircase
from mwplan.solvers.tuning import Tuning

Samples = NDArray[np.float32]
Index = NDArray[np.intp]
_Array = TypeVar("_Array", bound=NDArray[Any])
#: ten times what float32 rounds the sum of two samples by: 2^-24 of each, and of the sum
MARGIN = 2e-6
_INF = np.float32(np.inf)


def spaced(low: int, least: int, high: int, cells: int) -> Ints:
    """About `cells` budgets from `low` to `high`, most of them a little above `least`, where frontiers are
    steep."""
    low, least, high = max(1, low), max(2, least), max(3, high)
    below = np.geomspace(low, max(low, least), cells // 12)
    above = least * (1 + np.linspace(0, 0.05, cells // 12))
    far = least * (1 + np.geomspace(0.05, max(0.1, high / least - 1), cells - 2 * (cells // 12)))
    return np.unique(np.concatenate([below, above, far]).astype(np.int64))


def with_tail(budgets: Ints, least: int, high: int, ends: tuple[Stairs, Stairs]) -> Ints:
    """The budgets of a grid, made for stretches that need `least`, with those of stretches that `ends`
    follow, where they need much more."""
    lowest = min((int(need[0]) for need, _ in ends if need.size), default=0)
    if 2 * lowest < 3 * least:
        return budgets
    return np.union1d(budgets, spaced(lowest // 2, lowest, high, budgets.size))


class Grid:
    """The budgets at which staircases are compared first, and how cells between them are taken together.

    Cell `q` is `(budgets[q-1], budgets[q]]`, the first one without beginning, the last, `n`, without end.
    `span`, more than any need, tells rows of a buffer apart. `levels`: so many cells are bounded together, at
    first and where that leaves groups.
    """

    __slots__ = ("budgets", "levels", "sheets", "span", "tuning")

    def __init__(self, budgets: Ints, span: int, tuning: Tuning) -> None:
        self.budgets, self.span, self.tuning, self.levels = budgets, span, tuning, tuning.cell_levels
        n, levels = budgets.size, self.levels
        #: for each of `levels` the columns of samples (`Buffer`) that bound the intervals from below, those
        #: within one interval of the level before in a row, and the numbers of the budgets at their ends, `n`
        #: where there is none. Behind cell `n` samples are infinite: column `n + 1`.
        self.sheets: list[tuple[Index, Index]] = []
        before = -(-(n + 1) // levels[0]) * levels[0]
        for width, wider in zip(levels, (before, *levels)):
            begin = np.arange(0, before, width).reshape(-1, wider // width)
            last = begin + (width - 1)
            ends = np.minimum(last, n)
            self.sheets.append((np.where(begin > n, n + 1, ends), ends))


def longer(old: _Array, rows: int) -> _Array:
    """`old` with room for `rows` rows, the new ones unset."""
    new = np.empty((rows, *old.shape[1:]), dtype=old.dtype)
    new[: len(old)] = old
    return cast(_Array, new)


class Buffer:
    """Staircases of many rows, one after another, each element keyed by `base[row] + need`; and their
    samples.

    `pointer[row, q]`: the first element of the row beyond cell `q - 1`. `samples[row]`: the times at the ends
    of the `n + 1` cells, infinite below `floor`, then infinity; if `sheeted`, `sheets[k][row]` has them in
    the order of `Grid.sheets` instead.
    """

    __slots__ = (
        "base",
        "columns",
        "grid",
        "key",
        "pointer",
        "rows",
        "samples",
        "sheets",
        "size",
        "time",
    )

    def __init__(self, grid: Grid, rows: int, *, sheeted: bool = False) -> None:
        n, points = grid.budgets.size, grid.tuning.room_points * rows
        self.size, self.grid = 0, grid
        #: rows that `extend` has filled
        self.rows = 0
        # What is not touched takes no memory.
        self.key = np.empty(points, dtype=np.int64)
        self.time = np.empty(points, dtype=np.int64)
        self.base = np.zeros(rows, dtype=np.int64)
        self.pointer = np.zeros((rows, n + 2), dtype=np.int32)
        self.samples: Samples = np.empty((0 if sheeted else rows, n + 2), dtype=np.float32)
        self.columns = [lower for lower, _ in grid.sheets] if sheeted else []
        self.sheets: list[Samples] = [np.empty((rows, *x.shape), dtype=np.float32) for x in self.columns]

    def extend(
        self, rows: int, of: Ints, need: Ints, time: Ints, floor: Ints | None = None, at: Ints | None = None
    ) -> Ints:
        """Adds the staircases of the next `rows` rows at once; `of`, in order: the row of each point, from 0;
        `at`, what this returned where it is known already: how many points lie in each cell of each row and
        before, earlier rows included."""
        budgets, size, first = self.grid.budgets, self.size, self.rows
        n, span, together = budgets.size, self.grid.span, self.grid.tuning.rows_together
        if (first + rows + 1) * span >= 2**63:
            raise ArgumentError(
                f"`profile`: {first + rows} stretches are too many for its byte counts: state bytes in a "
                "larger unit"
            )
        if first + rows > self.base.size:
            for name in ("base", "pointer", *([] if self.sheets else ["samples"])):
                setattr(self, name, longer(getattr(self, name), 2 * (first + rows)))
            self.sheets = [longer(x, 2 * (first + rows)) for x in self.sheets]
        end = size + need.size
        if end > self.key.size:
            for name in ("key", "time"):
                setattr(self, name, longer(getattr(self, name), max(end, 2 * self.key.size)))
        base = np.arange(first, first + rows) * span
        self.base[first : first + rows], self.time[size:end] = base, time
        np.add(need, base[of], out=self.key[size:end])
        if at is None:
            cell = of * (n + 1) + budgets.searchsorted(need)
            at = np.cumsum(np.bincount(cell, minlength=rows * (n + 1))).reshape(rows, n + 1)
        begin, short = np.append(0, at[:-1, n]), time.astype(np.float32)

        def fill(some: slice) -> None:
            """Pointers and samples of some of the new rows."""
            here = slice(first + some.start, first + some.stop)
            pointer = self.pointer[here]
            pointer[:, 0] = begin[some] + size
            np.add(at[some], size, out=pointer[:, 1:], casting="same_kind")
            samples = np.full((some.stop - some.start, n + 2), _INF, dtype=np.float32)
            if need.size:
                reached = short.take(at[some] - 1, mode="clip")
                np.copyto(samples[:, : n + 1], reached, where=at[some] > begin[some, None])
            if floor is not None:
                np.copyto(samples[:, :n], _INF, where=budgets < floor[some, None])
            if not self.sheets:
                self.samples[here] = samples
            for sheet, columns in zip(self.sheets, self.columns):
                samples.take(columns, axis=1, out=sheet[here], mode="clip")

        each(fill, [slice(low, min(low + together, rows)) for low in range(0, rows, together)])
        self.size, self.rows = end, first + rows
        return at


class Shifts:
    """Where the samples of suffixes stand when bytes are held to their left: `moves` of each number of held
    bytes, once, as rows of `sheets`: `columns` of it, as `Grid.sheets` has them, those that bound from below
    and those at budgets."""

    __slots__ = ("budgets", "columns", "ends", "high", "known", "low", "sheets")

    def __init__(self, grid: Grid) -> None:
        budgets, columns = grid.budgets, grid.sheets
        self.budgets = budgets
        self.known: dict[int, int] = {}
        n = budgets.size
        #: the cells `(low, high]`
        self.low, self.high = np.append(np.int64(-1), budgets), np.append(budgets, np.int64(2**62))
        #: the budgets at the ends of the intervals of each level, in the order of `sheets`; -1 where there is
        #: none
        self.ends = [np.append(budgets, -1)[ends] for _, ends in columns]
        self.columns = [
            np.concatenate([np.where(lower > n, 2 * n + 1, lower), n + 1 + ends], axis=1)
            for lower, ends in columns
        ]
        self.sheets = [np.empty((64, *x.shape), dtype=np.int16) for x in self.columns]

    def rows(self, held: Ints) -> Ints:
        """The rows of so many bytes held."""
        new = sorted({*held.tolist()} - self.known.keys())
        if new:
            first, end = len(self.known), len(self.known) + len(new)
            if end > len(self.sheets[0]):
                self.sheets = [longer(x, 2 * end) for x in self.sheets]
            table = moves(self.budgets, np.array(new)[:, None])
            for sheet, columns in zip(self.sheets, self.columns):
                sheet[first:end] = table.take(columns, axis=1)
            self.known.update(zip(new, range(first, end)))
        return np.array([self.known[h] for h in held.tolist()], dtype=np.int64)

    def cells(self, moved: Ints, cell: Ints) -> tuple[Ints, Ints]:
        """The first and the last cell of a suffix that what a cell's budgets leave for it may lie in."""
        return self.cell(moved, cell - 1), self._column(moved, cell, 0)

    def cell(self, moved: Ints, budget: Ints) -> Ints:
        """The cell of a suffix that what budget number `budget` leaves for it begins or lies in; -1 counts as
        a budget of 0, `n` as one without limit."""
        n = self.budgets.size
        column = self._column(moved, np.clip(budget, 0, n - 1), 1)
        found = np.where((column > n) | (budget < 0), 0, column + 1)
        cells: Ints = np.where(budget == n, n, found)
        return cells

    def _column(self, moved: Ints, cell: Ints, side: int) -> Ints:
        """One column of `moves` each: at the end of `cell`, from below or from above."""
        sheet = self.sheets[-1]
        _, count, wide = sheet.shape
        ratio = wide // 2
        at = moved * (count * wide) + 2 * cell - cell % ratio + side * ratio
        column: Ints = sheet.ravel().take(at).astype(np.int64)
        return column


@dataclass(frozen=True, slots=True)
class Pairs:
    """Groups by their parts: the rows of `left_g` and of the suffix in two buffers, `H`, `F + K`, and the row
    of `H` in `Shifts`."""

    left: Ints
    right: Ints
    held: Ints
    floor: Ints
    moved: Ints

    def take(self, which: Index | slice) -> Pairs:
        """Some of them."""
        return Pairs(
            self.left[which], self.right[which], self.held[which], self.floor[which], self.moved[which]
        )

    def values(self, left: Buffer, right: Buffer, budget: Ints) -> Stairs:
        """Need and time of the point that each has at or below its budget; `INF` where it has none."""
        own = left.key[: left.size].searchsorted(left.base[self.left] + budget, side="right")
        rest = right.base[self.right] + np.maximum(budget - self.held, -1)
        other = right.key[: right.size].searchsorted(rest, side="right")
        return self._values(left, right, budget, own, other)

    def values_at(self, left: Buffer, right: Buffer, shifts: Shifts, cell: Ints) -> Stairs:
        """As `values`, at the end of a cell each."""
        own = _pointer(left, self.left, cell + 1)
        budget = np.append(right.grid.budgets, right.grid.span - 1)[cell]
        rest = shifts.cell(self.moved, cell)
        ranges = _pointer(right, self.right, rest), _pointer(right, self.right, rest + 1)
        ahead, pair = right.base[self.right] - self.held, np.arange(cell.size)
        other = _beyond(right, ranges, ahead, pair, budget)
        return self._values(left, right, budget, own, other)

    def _values(self, left: Buffer, right: Buffer, budget: Ints, own: Ints, other: Ints) -> Stairs:
        """The points before `own` and `other`."""
        ok = (own > left.pointer[self.left, 0]) & (other > right.pointer[self.right, 0])
        ok &= budget >= self.floor
        own, other = own - 1, other - 1
        need = np.maximum(left.key[own] - left.base[self.left], self.floor)
        np.maximum(need, right.key[other] - right.base[self.right] + self.held, out=need)
        return np.where(ok, need, INF), np.where(ok, left.time[own] + right.time[other], INF)

    def steps(self, left: Buffer, right: Buffer, shifts: Shifts, cell: Ints) -> list[tuple[Ints, Ints, Ints]]:
        """All steps in one cell each: of which pair, need, time."""
        out = []
        low, high = shifts.low[cell], shifts.high[cell]
        begin, end = shifts.cells(self.moved, cell)
        # What budgets in the cell reach ends within these elements of the left part and of the suffix.
        mine = _pointer(left, self.left, cell), _pointer(left, self.left, cell + 1)
        rest = _pointer(right, self.right, begin), _pointer(right, self.right, end + 1)
        base, ahead = left.base[self.left], right.base[self.right] - self.held

        index, pair = spread(*mine)
        need = left.key[index] - base[pair]
        other = _beyond(right, rest, ahead, pair, need)
        ok = (other > right.pointer[self.right, 0][pair]) & (need >= self.floor[pair])
        out.append((pair[ok], need[ok], left.time[index[ok]] + right.time[other[ok] - 1]))

        index, pair = spread(*rest)
        need = right.key[index] - ahead[pair]
        ok = (need > low[pair]) & (need <= high[pair]) & (need >= self.floor[pair])
        index, pair, need = index[ok], pair[ok], need[ok]
        own = _beyond(left, mine, base, pair, need)
        ok = own > left.pointer[self.left, 0][pair]
        out.append((pair[ok], need[ok], left.time[own[ok] - 1] + right.time[index[ok]]))

        first = np.flatnonzero((self.floor > low) & (self.floor <= high))
        floor = self.floor[first]
        own = _beyond(left, mine, base, first, floor)
        other = _beyond(right, rest, ahead, first, floor)
        need, time = self.take(first)._values(left, right, floor, own, other)
        ok = time < INF
        out.append((first[ok], need[ok], time[ok]))
        return out


def _pointer(buffer: Buffer, row: Ints, column: Ints) -> Ints:
    """`pointer[row, column]` of a buffer."""
    return buffer.pointer.ravel().take(row * buffer.pointer.shape[1] + column).astype(np.int64)


def _beyond(buffer: Buffer, ranges: tuple[Ints, Ints], base: Ints, pair: Ints, need: Ints) -> Ints:
    """The first element of the range `pair` with a key of more than its `base` and `need`, its end where
    there is none: all ranges halved together."""
    found = ranges[0][pair]
    active = np.flatnonzero((ranges[0] < ranges[1])[pair])
    of = pair[active]
    low, high, key = found[active], ranges[1][of], base[of] + need[active]
    while active.size:
        middle = (low + high) >> 1
        more = buffer.key[middle] > key
        low, high = np.where(more, low, middle + 1), np.where(more, middle, high)
        found[active] = low
        open_ = np.flatnonzero(low < high)
        active, low, high, key = active[open_], low[open_], high[open_], key[open_]
    return found


def joined(pairs: list[Pairs]) -> Pairs:
    """All of them."""
    return Pairs(
        *(
            np.concatenate([getattr(x, name) for x in pairs])
            for name in ("left", "right", "held", "floor", "moved")
        )
    )


def moves(budgets: Ints, held: int | Ints) -> Index:
    """Columns of a suffix's samples that bound it in each cell, and then at each budget, `held` bytes less
    being left for it; then one that is infinite."""
    n = budgets.size
    less = budgets - held
    ahead = budgets.searchsorted(less, side="left")
    behind = budgets.searchsorted(less, side="right") - 1
    end = np.full((*less.shape[:-1], 1), n)
    # The last column of samples is infinite: no budget of the grid is that small, or nothing is bounded.
    return np.concatenate([ahead, end, np.where(behind < 0, n + 1, behind), end + 1], axis=-1)


def grouped(columns: list[Ints], waiting: int) -> list[tuple[int, int, Stairs]]:
    """Runs `(F, B, H, t)` between two nodes as groups of equal `F` and `H`: `(F, H, staircase of (B, t))`.

    A forward peak that is no more than the backward one even with the largest cotangent waiting, `waiting`,
    says nothing and counts as 0.
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


def spread(begin: NDArray[Any], end: NDArray[Any]) -> tuple[Ints, Index]:
    """All integers of the ranges `begin..end-1`, and which range each is of."""
    count = end - begin
    of = np.repeat(np.arange(count.size), count)
    before = np.cumsum(count) - count
    return np.arange(of.size) + (begin - before)[of], of
