"""The runs that stretches may begin with, as rows of a buffer: what merges compare."""

from __future__ import annotations

import numpy as np

from mwplan.solvers.candidates import Candidates
from mwplan.solvers.diagonals import grouped_all
from mwplan.solvers.pareto import Ints, begins
from mwplan.solvers.splits import Buffer, Grid, Pairs, Shifts, spread

Node = tuple[int, bool]


class _Start:
    """STORE, MOONWALK and INVERT runs from one node as groups: `groups`, rows of left row, end, `e'`, `F`,
    `H`, row of `H` in the shifts; those of the first `read` groups of its atoms. `peaks`: forward peaks of
    RECOMPUTE runs; `own`: their `H`, `moved` its row."""

    __slots__ = ("groups", "moved", "own", "peaks", "read")

    def __init__(self, own: int, moved: int, peaks: Ints) -> None:
        self.own, self.moved, self.peaks, self.read = own, moved, peaks, 0
        self.groups: Ints = np.zeros((6, 0), dtype=np.int64)


class Beginnings:
    """The runs from all nodes, read by length.

    `buffer` has their staircases; `again[e, s, r]` is the row of the RECOMPUTE run over `(s, r]`, 0 where
    there is none. `waiting`: the largest cotangent.
    """

    def __init__(self, candidates: Candidates, grid: Grid, shifts: Shifts, rows: int) -> None:
        none = np.zeros(0, dtype=np.int64)
        size = candidates.size
        self.candidates, self.grid, self.shifts = candidates, grid, shifts
        self.waiting = int(candidates.cotangent.max())
        self.buffer = Buffer(grid, rows, sheeted=True)
        self.buffer.extend(1, none, none, none)
        self.again = np.zeros((2, size + 1, size + 1), dtype=np.int64)
        self._starts: dict[Node, _Start] = {}

    def _start(self, node: Node) -> _Start:
        found = self._starts.get(node)
        if found is None:
            own = self.candidates.own_bytes(*node)
            moved = int(self.shifts.rows(np.array([own]))[0])
            found = self._starts[node] = _Start(own, moved, self.candidates.recompute_forward_peak(*node))
        return found

    def read(self, n: int, nodes: list[Node], *, nested: bool) -> None:
        """The STORE, MOONWALK and INVERT runs of less than `n` layers from the given nodes, those that are
        not known yet; without those that a RECOMPUTE run beats, if they may be `nested` in such."""
        heads: list[tuple[int, ...]] = []
        columns: list[list[Ints]] = []
        for start, kept in nodes:
            mine, atoms = self._start((start, kept)), self.candidates.atoms(start, kept)
            low = first = atoms.groups[mine.read - 1][2] if mine.read else 0
            for at, keeps, high in atoms.groups[mine.read :]:
                if at - start >= n:
                    break
                heads.append((start, kept, at, keeps, high - low, mine.own, int(mine.peaks[at - start - 1])))
                mine.read += 1
                low = high
            if low > first:
                columns.append([x[first:low] for x in atoms.costs])
        if not heads:
            return
        start_, kept_, at_, keeps_, sizes, own_, peak_ = np.array(heads, dtype=np.int64).T
        of = np.repeat(np.arange(len(heads)), sizes)
        f, b, held, time = (np.concatenate(x) for x in zip(*columns))
        if nested:
            size = self.candidates.size
            rows = np.where((keeps_ == 0) & (at_ < size), self.again[kept_, start_, at_], 0)[of]
            left = self.buffer
            found = left.key[: left.size].searchsorted(left.base[rows] + b, side="right") - 1
            beaten = (found >= left.pointer[rows, 0]) & (left.time[found] <= time)
            beaten &= (rows > 0) & (held >= own_[of]) & (f >= peak_[of])
            of, f, b, held, time = (x[~beaten] for x in (of, f, b, held, time))
        span = self.grid.span
        groups, floor, held, which, need, time = grouped_all(of, f, b, held, time, self.waiting, span)
        first = self.buffer.rows
        self.buffer.extend(groups.size, which, need, time, floor)
        lines = np.array(
            [first + np.arange(groups.size), at_[groups], keeps_[groups], floor, held, self.shifts.rows(held)]
        )
        first_ = np.flatnonzero(begins(start_, kept_))
        cuts = groups.searchsorted(np.append(first_, len(heads))).tolist()
        for k, low, high in zip(first_.tolist(), cuts[:-1], cuts[1:]):
            mine = self._starts[heads[k][0], bool(heads[k][1])]
            mine.groups = np.concatenate([mine.groups, lines[:, low:high]], axis=1)

    def ending(self, node: Node, stop: int) -> slice:
        """The rows of the node's atoms that are of all of the stretch up to `stop`, the next to be read."""
        mine, atoms = self._starts[node], self.candidates.atoms(*node)
        low = atoms.groups[mine.read - 1][2] if mine.read else 0
        some = [x for x in atoms.groups[mine.read : mine.read + 2] if x[0] == stop]
        return slice(low, some[-1][2] if some else low)

    def pairs(self, nodes: list[Node], limits: list[int], rows: Ints, waiting: Ints) -> tuple[Ints, Pairs]:
        """The groups that stretches from `nodes` may begin with, and which stretch each is of: RECOMPUTE runs
        up to `limits` in order of their ends, and the runs that have been read. `rows[k, e, s]`: what is left
        of stretch `k` from a node on; `waiting`: cotangents."""
        starts = [self._starts[x] for x in nodes]
        start, kept = np.array(nodes, dtype=np.int64).T
        counts = np.maximum(np.array(limits) - start, 0)
        sizes = np.array([x.groups.shape[1] for x in starts])
        after = np.cumsum(counts + sizes)
        at, which = spread(start + 1, start + 1 + counts)
        own, moved = np.array([(x.own, x.moved) for x in starts]).T
        peaks = np.concatenate([x.peaks[:count] for x, count in zip(starts, counts.tolist())])
        runs = (
            self.again[kept[which], start[which], at],
            rows[which, 0, at],
            own[which],
            peaks,
            moved[which],
        )
        lines, ends, keeps, floor, held, shift = np.concatenate([x.groups for x in starts], axis=1)
        place, which = spread(after - sizes, after)
        table = np.empty((5, int(after[-1])), dtype=np.int64)
        table[:, place] = lines, rows[which, keeps, ends], held, floor, shift
        table[:, spread(after - sizes - counts, after - sizes)[0]] = runs
        of = np.repeat(np.arange(start.size), counts + sizes)
        left, right, holds, floors, shifts = table
        return of, Pairs(left, right, holds, floors + waiting[of], shifts)
