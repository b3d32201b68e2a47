r"""A few layers before a long stretch of identical ones, with RECOMPUTE runs from the former into the latter.

Schedules of little memory keep next to nothing but a chain's input; a run that had to end where the
identical layers begin would keep one activation more, at every level. So the suffixes `(s, e)` of the `a`
layers before, followed by `n` of the identical ones, have tables too, for the lengths `n` of
`mwplan.solvers.sparse`, as inner schedules and, followed by the whole stretch, at the top level. They begin
with

- a run that ends among the `a` layers or at their end (STORE, MOONWALK, INVERT; RECOMPUTE by
  `mwplan.solvers.tables.Tables`), or
- a RECOMPUTE run over all of them and `m < n` of the identical layers, where `n - m` is such a length too.

**Cost:** at most two merges for each of the `a` layers and each length.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from mwplan.plans.schedule import Run, RunKind
from mwplan.solvers.candidates import Node
from mwplan.solvers.diagonals import NO_POINTS, envelopes, thinned_all
from mwplan.solvers.pareto import NO_STAIRS, Stairs
from mwplan.solvers.reading import inner_runs
from mwplan.solvers.sparse import Family, SparseTables, stairs_at
from mwplan.solvers.splits import Buffer, Pairs, grouped
from mwplan.solvers.tables import Tables


@dataclass(frozen=True, slots=True)
class _Piece:
    """Runs from one node: to `(stop, keeps)` among the layers before, those of `atoms` or RECOMPUTE; or, if
    `into`, RECOMPUTE over so many identical layers too."""

    stop: int
    keeps: bool
    floor: int
    held: int
    stairs: Stairs
    row: int
    atoms: slice | None = None
    into: int = 0


class Approach:
    """The tables. `before`: those of the layers before, without a top level; `body`: those of the identical
    layers, which RECOMPUTE is allowed in."""

    def __init__(self, before: Tables, body: SparseTables) -> None:
        self.before, self.body = before, body
        self.size = before.size
        self.waiting = max(before.waiting, body.waiting)
        self.left = Buffer(body.grid, 256, sheeted=True)
        self.nodes = [(s, e) for s in range(self.size - 1, -1, -1) for e in before.kept_states(s)]
        self.pieces: dict[Node, list[_Piece]] = {node: [] for node in self.nodes}
        #: rows of the suffixes in the body's own buffer, inside RECOMPUTE runs and at the top, by how many of
        #: its layers follow
        self.inner: dict[tuple[int, bool, int], int] = {}
        self.top: dict[tuple[int, bool, int], int] = {}
        for s, e in self.nodes:
            self._add_near(s, e)
        for n in body.lengths:
            if n == body.size and not body.inside:
                break
            for s, e in self.nodes:
                self._merge(s, e, n, body.inner, self.inner)
            for s, e in self.nodes:
                self._add_far(s, e, n)
        for s, e in self.nodes:
            self._merge(s, e, body.size, body.top, self.top)

    # -- pieces

    def _add(
        self, node: Node, stop: int, keeps: bool, floor: int, held: int, stairs: Stairs,
        atoms: slice | None = None, into: int = 0,
    ) -> None:  # fmt: skip
        if not stairs[0].size:
            return
        self.pieces[node].append(_Piece(stop, keeps, floor, held, stairs, self.left.rows, atoms, into))
        of = np.zeros(stairs[0].size, dtype=np.int64)
        self.left.extend(1, of, *stairs, np.array([floor]))

    def _add_near(self, s: int, e: bool) -> None:
        """Runs that end among the layers before, or at their end."""
        c = self.before.candidates
        atoms, low = c.atoms(s, e), 0
        for stop, keeps, high in atoms.groups:
            rows, low = slice(low, high), high
            columns = [x[rows] for x in atoms.costs]
            for floor, held, stairs in grouped(columns, self.waiting):
                self._add((s, e), stop, keeps, floor, held, stairs, atoms=rows)
        peaks = c.recompute_forward_peak(s, e)
        for stop in range(s + 1, self.size + 1):
            need, time = self.before.suffix(0, s, stop, e)
            spent = int(c.forward_sum[stop] - c.forward_sum[s])
            self._add((s, e), stop, False, int(peaks[stop - s - 1]), c.own_bytes(s, e), (need, time + spent))

    def _add_far(self, s: int, e: bool, n: int) -> None:
        """The RECOMPUTE runs over `n` of the identical layers too."""
        c = self.before.candidates
        own = c.own_bytes(s, e)
        need, time = stairs_at(self.body.tables, self.inner[s, e, n])
        spent = int(c.forward_sum[-1] - c.forward_sum[s]) + n * self.body.forward
        floor = max(int(c.recompute_forward_peak(s, e)[-1]), own + self.body.peaks[1])
        self._add((s, e), self.size, False, floor, own, (need, time + spent), into=n)

    # -- tables

    def _choices(self, s: int, e: bool, n: int, family: Family) -> tuple[list[_Piece], Pairs]:
        """The pieces that the layers from `s` on and `n` identical ones may begin with, and the rows of what
        is left."""
        body, top = self.body, family is self.body.top
        known = self.top if top else self.inner
        most = n if top and body.inside else body.longest_within(n)
        pieces, rows = [], []
        for piece in self.pieces[s, e]:
            if piece.into:
                if piece.into > most or family.rows[n - piece.into, 0] < 0:
                    continue
                row = int(family.rows[n - piece.into, 0])
            elif piece.stop == self.size:
                row = int(family.rows[n, int(piece.keeps)])
            else:
                row = known[piece.stop, piece.keeps, n]
            pieces.append(piece)
            rows.append(row)
        columns = np.array(
            [(x.row, row, x.held, x.floor + family.waiting) for x, row in zip(pieces, rows)], dtype=np.int64
        )
        left, right, held, floor = columns.reshape(-1, 4).T.copy()
        return pieces, Pairs(left, right, held, floor, body.shifts.rows(held))

    def _merge(self, s: int, e: bool, n: int, family: Family, rows: dict[tuple[int, bool, int], int]) -> None:
        """Adds the table of one suffix to those of the body, and its row to `rows`."""
        pieces, pairs = self._choices(s, e, n, family)
        tables = self.body.tables
        rows[s, e, n] = tables.rows
        if not pieces:
            tables.extend(1, NO_STAIRS[0], *NO_STAIRS)
            return
        tuning, thin = self.body.tuning, self.body.thin
        slack, loss = thin * tuning.identical_merge_share, thin * tuning.identical_thinning_share
        of = np.zeros(len(pieces), dtype=np.int64)
        found = envelopes(
            of, pairs, NO_POINTS, self.left, tables, self.body.shifts, slack=slack, optimistic=False
        )
        tables.extend(1, *(thinned_all(*found, loss, optimistic=False) if found[0].size else found))

    # -- reading

    def points(self, e: bool) -> Stairs:
        """The staircase of these layers, the identical ones and what follows, from the node with `e`."""
        row = self.top.get((0, e, self.body.size))
        return NO_STAIRS if row is None else stairs_at(self.body.tables, row)

    def read(self, e: bool, budget: int) -> tuple[tuple[Run, ...], bool, int]:
        """The runs over these layers and the identical ones from the node with `e`, with `e` at their end and
        the budget left there."""
        return self._read(0, e, self.body.size, budget, self.body.top)

    def _read(
        self, s: int, e: bool, n: int, budget: int, family: Family
    ) -> tuple[tuple[Run, ...], bool, int]:
        body, first = self.body, self.before.place.first
        known = self.top if family is body.top else self.inner
        out: list[Run] = []
        at = body.first
        while s < self.size:
            need, times = stairs_at(body.tables, known[s, e, n])
            step = int(need.searchsorted(budget, side="right")) - 1
            budget, time = int(need[step]), int(times[step])
            pieces, pairs = self._choices(s, e, n, family)
            needs, times = pairs.values(self.left, body.tables, np.full(len(pieces), budget))
            piece = pieces[int(np.flatnonzero((needs == budget) & (times == time))[0])]
            out.append(self._spell(s, e, piece, budget, first))
            s, e, budget, at = piece.stop, piece.keeps, budget - piece.held, body.first + piece.into
        rest, e, budget = body.rest(at, body.first + n, e, budget, family)
        return (*out, *rest), e, budget

    def _spell(self, s: int, e: bool, piece: _Piece, budget: int, first: int) -> Run:
        """The run of a piece within `budget`."""
        need, times = piece.stairs
        step = int(need.searchsorted(budget, side="right")) - 1
        budget = int(need[step])
        if piece.atoms:
            atoms = self.before.candidates.atoms(s, e)
            good = (atoms.held == piece.held) & (atoms.backward_peak == budget) & (atoms.time == times[step])
            good &= atoms.forward_peak <= max(piece.floor, budget - self.waiting)
            row = piece.atoms.start + int(np.flatnonzero(good[piece.atoms])[0])
            run = self.before.candidates.run(s, e, row)
            return dataclasses.replace(run, start=first + run.start, stop=first + run.stop)
        if piece.into:
            inner = self._read(s, e, piece.into, budget, self.body.inner)[0]
        else:
            inner = inner_runs(self.before, 0, s, piece.stop, e, budget)
        stop = first + piece.stop + piece.into
        return Run(kind=RunKind.RECOMPUTE, start=first + s, stop=stop, inner=inner)
