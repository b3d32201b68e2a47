r"""Long chains of identical layers, thinned: tables at few lengths, equal runs taken together.

As in `mwplan.solvers.uniform` a stretch is known by its number of layers `n` and `e`. Tables are made at
lengths of `D = Tuning.length_bits` binary digits only: all up to `2^D`, every second up to twice that, and so
on; and at the chain's own length, with its lowest digits gone one after the other. A stretch begins with

- one run, or the same run `p = 2^i` times, of `d` layers together, wherever `n - d` is such a length again.
  If a run has the staircase `m(b)` (of inner schedules and forward, or one step) and holds `H`, then `p` of
  them have `m_p(b) = m_{p/2}(b) + m_{p/2}(b - H p / 2)` and hold `H p`.

Every point is a schedule. What is lost: splits between these lengths, RECOMPUTE runs of all but less than one
layer in `R = Tuning.recompute_share` of their stretch (if any of them could be, schedules would nest as deep
as the chain is long; like this a nest is at most about `R (1 + log(L / R))` deep), moonwalk and invert runs
of more than `Tuning.longest_run` layers or other lengths, one after the other only of `2^i` or `3 2^i`
layers, those that others beat but for a factor `1 + Tuning.identical_run_share thin` in each of their costs,
and what merging and thinning lose at each table (`Tuning.identical_merge_share` and
`identical_thinning_share` of `thin`). What does not fit is UNKNOWN, not INFEASIBLE; `mwplan.solvers.relaxed`
bounds from below what these tables take; losses measured against exact tables, and how far the least-memory
schedule is from the least bytes, are in results/solver_scaling.

**Cost:** O(2^D log L) merges of O(2^D log L) groups.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Run, RunKind, Strategy
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.diagonals import NO_POINTS, envelopes, thinned_all
from mwplan.solvers.pareto import DONE, Ints, Stairs, begins, nondominated, thinned
from mwplan.solvers.parts import Place, repeated
from mwplan.solvers.problem import Problem
from mwplan.solvers.splits import Buffer, Grid, Pairs, Shifts, grouped, joined, spaced, with_tail
from mwplan.solvers.tuning import TUNING, Tuning


@dataclass(frozen=True, slots=True)
class _Piece:
    """Runs of `layers` layers together, from a node with `e` to one with `keeps`: one RECOMPUTE run or one of
    `atoms`, the rows of `Candidates.atoms`, or two pieces one after the other, by number. `floor`, `held` and
    `stairs`: as of a group of `mwplan.solvers.splits`."""

    layers: int
    keeps: bool
    floor: int
    held: int
    stairs: Stairs
    atoms: slice | None = None
    halves: tuple[int, int] | None = None


def lengths(size: int, tuning: Tuning = TUNING) -> list[int]:
    """The lengths up to `size` at which there are tables, and `size` itself."""
    bits = tuning.length_bits
    found = set(range(1, min(size, 1 << bits) + 1))
    step = 2
    while step << (bits - 1) < size:
        found.update(range(step << (bits - 1), min(size, step << bits) + 1, step))
        step *= 2
    left = size
    while left not in found:
        found.add(left)
        left -= left & -left
    return sorted(found)


def stairs_at(buffer: Buffer, row: int) -> Stairs:
    """The staircase in a row of a buffer."""
    part = slice(int(buffer.pointer[row, 0]), int(buffer.pointer[row, -1]))
    return buffer.key[part] - buffer.base[row], buffer.time[part]


@dataclass(frozen=True, slots=True)
class Family:
    """The tables of all lengths, inside RECOMPUTE runs or at the top level: `rows[n, e]` in the buffer of
    all, -1 where there are none; `waiting`, the cotangent beside them."""

    rows: Ints
    waiting: int


class SparseTables:
    """The tables. `candidates` are those of a chain of at most `Tuning.longest_run + 1` layers.

    **Arguments:** `problem`, of identical layers, whose `thin` must not be 0; `place`, where they are a part
    of a chain; `bound`: tables at all lengths, with all runs, merged and thinned downwards; not schedules
    then, but a bound (`mwplan.solvers.relaxed`). **Cost** then: O(L^2) groups.
    """

    def __init__(self, problem: Problem, place: Place | None = None, *, bound: bool = False) -> None:
        self.problem, self.tuning, self.bound = problem, problem.tuning, bound
        profile, self.thin = problem.profile, problem.thin
        self.size, self.place = len(profile), place or Place(whole=profile)
        self.first, ends = self.place.first, self.place.ends
        #: whether something follows
        self.inside = ends is not None
        self.nested = Strategy.RECOMPUTE in problem.strategies
        most = self.size if bound else min(self.size, self.tuning.longest_run)
        self.candidates = Candidates(
            problem.of(repeated(profile, most + 1)),
            loss=self.thin * self.tuning.identical_label_share,
            optimistic=bound,
            whole=1 if bound else len(self.place.whole),
        )
        self.candidates.prepare([(0, True), (1, False)])
        self.activation, self.waiting = int(profile.activation_bytes[0]), int(profile.cotangent_bytes[0])
        layer = profile.layers[0]
        self.forward = layer.forward_ns
        peak = layer.forward_workspace_bytes + self.activation
        #: forward peak of RECOMPUTE runs without x_s: of one layer, and of more
        self.peaks = (peak, peak + self.activation)
        self.both = bool(self.candidates.kept_nodes[1:].any())
        self.lengths = list(range(1, self.size + 1)) if bound else lengths(self.size, self.tuning)
        self.grid = self._make_grid()
        self.shifts = Shifts(self.grid)
        #: pieces, each in the row of its number of `_left` as soon as a merge asks for it, and the numbers of
        #: those from either node
        self.pieces: list[_Piece] = []
        self._from: dict[bool, list[int]] = {False: [], True: []}
        self._left = Buffer(self.grid, 512, sheeted=True)
        #: of the pieces in `_left` from either node: number, `held`, `floor`, row of shifts, `layers`,
        #: `keeps`, from which stretch length on they are used, and whether up to any
        self._costs = {e: np.zeros((8, 0), dtype=np.int64) for e in (False, True)}
        none = np.full((self.size + 1, 2), -1)
        self.inner, self.top = Family(none, self.waiting), Family(none.copy(), 0)
        #: the tables of both
        self.tables = Buffer(self.grid, 4 * len(self.lengths) + 4)
        turns = ends or (self._turn(False), self._turn(True))
        for family, stairs in ((self.inner, (DONE, DONE)), (self.top, turns)):
            for e in (0, 1):
                family.rows[0, e] = self.tables.rows
                self.tables.extend(1, np.zeros(stairs[e][0].size, dtype=np.int64), *stairs[e])
        self._fill()

    def _make_grid(self) -> Grid:
        """The budgets at which staircases are compared first."""
        profile, whole, ends = self.problem.profile, self.place.whole, self.place.ends
        high = whole.bytes_bound() - whole.fixed_bytes
        span = 1 << (high + 1).bit_length()
        if span * (2 * len(self.lengths) + 2) >= 2**63:
            raise ArgumentError(
                f"`profile` has {self.size} layers and up to {profile.bytes_bound()} bytes: too many for its "
                "tables; state bytes in a larger unit"
            )
        least = 2 * (self.activation + self.waiting) + profile.layers[0].forward_workspace_bytes
        budgets = spaced(least // 2, least, high, self.tuning.cells_identical)
        if ends:
            budgets = with_tail(budgets, least, high, ends)
        return Grid(budgets, span, self.tuning)

    def _fill(self) -> None:
        """The tables of all lengths."""
        last = 0
        for n in self.lengths:
            self._add_atoms(n)
            # The top level is one length behind: merges are many and small, so they are done together.
            nested = self.nested and (n < self.size or self.inside)
            self._merge([(self.inner, n)] * nested + [(self.top, last)] * (last > 0))
            if nested:
                self._add_recompute(n)
            last = n
        self._merge([(self.top, self.size)])

    def _turn(self, e: bool) -> Stairs:
        return np.array([self.candidates.turn_bytes(e)]), np.zeros(1, dtype=np.int64)

    # -- pieces

    def _add(self, e: bool, piece: _Piece) -> int:
        self.pieces.append(piece)
        self._from[e].append(len(self.pieces) - 1)
        return len(self.pieces) - 1

    def _make_ready(self) -> None:
        """Rows and costs of the pieces that have none yet."""
        new = self.pieces[self._left.rows :]
        if not new:
            return
        of = np.repeat(np.arange(len(new)), [piece.stairs[0].size for piece in new])
        need, time = (np.concatenate([piece.stairs[k] for piece in new]) for k in (0, 1))
        self._left.extend(len(new), of, need, time, np.array([piece.floor for piece in new]))
        for e, costs in self._costs.items():
            numbers = self._from[e][costs.shape[1] :]
            some = [self.pieces[number] for number in numbers]
            held = np.array([piece.held for piece in some], dtype=np.int64)
            columns = [
                numbers,
                held,
                [piece.floor for piece in some],
                self.shifts.rows(held),
                [piece.layers for piece in some],
                [piece.keeps for piece in some],
                # Where there are tables at all lengths, runs are repeated one by one.
                [(1 << self.tuning.length_bits) + 1 if piece.halves else 0 for piece in some],
                [bool(piece.halves or piece.atoms) for piece in some],
            ]
            self._costs[e] = np.concatenate([costs, np.array(columns, dtype=np.int64)], axis=1)

    def _add_repeated(self, same: dict[bool, _Piece]) -> None:
        """Pieces that are one run from either node, or from one of them, and the run `p = 2, 4, ...` times,
        as far as the chain goes."""
        numbers = {e: self._add(e, piece) for e, piece in same.items()}
        while same and not self.bound:
            twice: dict[bool, _Piece] = {}
            for e, first in same.items():
                second = same.get(first.keeps)
                if second is None or 2 * first.layers > self.size:
                    continue
                need, time = self._sum(first, second)
                twice[e] = _Piece(
                    2 * first.layers,
                    second.keeps,
                    max(first.floor, second.floor + first.held),
                    first.held + second.held,
                    thinned(need, time, self._thinning(), optimistic=False),
                    halves=(numbers[e], numbers[first.keeps]),
                )
            numbers = {e: self._add(e, piece) for e, piece in twice.items()}
            same = twice

    @staticmethod
    def _sum(first: _Piece, second: _Piece) -> Stairs:
        """`first(b) + second(b - H)`."""
        budget = np.sort(np.concatenate([first.stairs[0], second.stairs[0] + first.held]))
        one = first.stairs[0].searchsorted(budget, side="right") - 1
        two = second.stairs[0].searchsorted(budget - first.held, side="right") - 1
        ok = (one >= 0) & (two >= 0)
        budget, time = budget[ok], first.stairs[1][one[ok]] + second.stairs[1][two[ok]]
        # Never slower with more.
        faster = begins(time)
        return budget[faster], time[faster]

    def _add_atoms(self, n: int) -> None:
        """STORE, MOONWALK and INVERT runs of `n` layers."""
        same: dict[tuple[RunKind, tuple[str, ...]], dict[bool, _Piece]] = {}
        for e in (False, True):
            start = 0 if e else 1
            if start + n > len(self.candidates.profile):
                continue
            atoms = self.candidates.atoms(start, e)
            low = 0
            for stop, keeps, high in atoms.groups:
                rows, low = slice(low, high), high
                if stop - start != n:
                    continue
                columns = atoms.costs
                if n == 1:
                    # The same option from a kept input and from another one may alternate.
                    for row in range(rows.start, rows.stop):
                        f, _, held, _ = (int(x[row]) for x in columns)
                        one = slice(row, row + 1)
                        piece = _Piece(n, keeps, f, held, (atoms.backward_peak[one], atoms.time[one]), one)
                        run = self.candidates.run(start, e, row)
                        same.setdefault((run.kind, run.options), {})[e] = piece
                    continue
                columns = [x[rows] for x in columns]
                for f, held, stairs in grouped(columns if self.bound else self._few(columns), self.waiting):
                    piece = _Piece(n, keeps, f, held, stairs, rows)
                    if n // (n & -n) <= 3:
                        self._add_repeated({e: piece})
                    else:
                        self._add(e, piece)
        for pieces in same.values():
            self._add_repeated(pieces)

    def _few(self, columns: list[Ints]) -> list[Ints]:
        """Of runs `(F, B, H, t)` of one length: those that no other beats by steps of a factor
        `1 + Tuning.identical_run_share thin` in each."""
        f, b, held, time = columns
        steps = [np.where(f + self.waiting <= b, 0, f), b, held, time]
        step = np.log1p(self.tuning.identical_run_share * self.thin)
        rough = [np.floor(np.log(np.maximum(x, 1)) / step).astype(np.int64) for x in steps]
        # Of those that count as one, the fastest.
        first = np.argsort(time, kind="stable")
        kept = first[nondominated([x[first] for x in rough], tuning=self.tuning)]
        return [x[kept] for x in columns]

    def _add_recompute(self, n: int) -> None:
        """RECOMPUTE runs of `n` layers."""
        same = {}
        for e in (False, True):
            need, time = self._stairs(self.inner, n, e)
            if need.size:
                own = 0 if e else self.activation
                stairs = need, time + n * self.forward
                same[e] = _Piece(n, False, own + self.peaks[n > 1], own, stairs)
        self._add_repeated(same)

    # -- tables

    def _stairs(self, family: Family, n: int, e: bool) -> Stairs:
        return stairs_at(self.tables, int(family.rows[n, int(e)]))

    def _choices(self, n: int, e: bool, family: Family) -> Pairs:
        """The pieces that a stretch of `n` layers may begin with, and the rows of what is left."""
        # A RECOMPUTE run may end the part, but neither the chain nor the RECOMPUTE run it stands in.
        longest = n if family is self.top and self.inside else n - 1 if self.bound else self.longest_within(n)
        number, held, floor, moved, layers, keeps, least, most = self._costs[e]
        rest = family.rows[np.maximum(n - layers, 0), keeps]
        which = np.flatnonzero(
            (layers <= n) & (rest >= 0) & (least <= n) & (layers <= np.where(most, n, longest))
        )
        return Pairs(number[which], rest[which], held[which], floor[which] + family.waiting, moved[which])

    def longest_within(self, n: int) -> int:
        """Up to how many of `n` layers a RECOMPUTE run takes that begins a schedule of them."""
        return n - max(1, n // self.tuning.recompute_share)

    def _thinning(self) -> float:
        """What thinning may lose."""
        return self.thin * self.tuning.identical_thinning_share

    def _nodes(self, n: int, family: Family) -> tuple[bool, ...]:
        """The nodes that a stretch of `n` layers may begin with."""
        if family is self.inner:
            return False, True
        # The part's own start may be any node that the layers before it lead to, but for the chain's start.
        may = (bool(self.first), True) if n == self.size else (True, self.both)
        return tuple(e for e in (False, True) if may[e])

    def _merge(self, asked: list[tuple[Family, int]]) -> None:
        """Makes the tables of `n` layers of each family asked for; from nodes that there are not, empty
        ones."""
        self._make_ready()
        apart: dict[tuple[float, float], list[tuple[Family, int]]] = {}
        for family, n in asked:
            many = n >= 4 or (family is self.top and self.inside)
            share = (self.tuning.top_share if self.bound and family is self.top else 1.0) * many
            slack = share * self.thin * self.tuning.identical_merge_share
            apart.setdefault((slack, share * self._thinning()), []).append((family, n))
        for (slack, loss), some in apart.items():
            first, choices, of = self.tables.rows, [], []
            for k, (family, n) in enumerate(some):
                family.rows[n] = first + 2 * k, first + 2 * k + 1
                for e in self._nodes(n, family):
                    choices.append(self._choices(n, e, family))
                    of.append(np.full(choices[-1].left.size, 2 * k + e))
            found = envelopes(
                np.concatenate(of), joined(choices), NO_POINTS, self._left, self.tables, self.shifts,
                slack=slack, optimistic=self.bound,
            )  # fmt: skip
            if loss and found[0].size:
                found = thinned_all(*found, loss, optimistic=self.bound)
            self.tables.extend(2 * len(some), *found)

    # -- reading

    def points(self, e: bool = True) -> Stairs:
        """The staircase of the chain, or of this part and what follows, from the node with `e`."""
        return self._stairs(self.top, self.size, e)

    def runs(self, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest schedule of the chain within `budget`, which must hold at least one."""
        return self.read(True, budget)[0]

    def read(self, e: bool, budget: int) -> tuple[tuple[Run, ...], bool, int]:
        """As `runs`, of a part of a chain from the node with `e`; with `e` at its end and the budget left
        there."""
        return self.rest(self.first, self.first + self.size, e, budget, self.top)

    def rest(
        self, at: int, stop: int, e: bool, budget: int, family: Family
    ) -> tuple[tuple[Run, ...], bool, int]:
        """As `read`, from one position of the chain to another, inside RECOMPUTE runs or not (`family`)."""
        out: list[Run] = []
        while at < stop:
            need, times = self._stairs(family, stop - at, e)
            step = int(need.searchsorted(budget, side="right")) - 1
            budget, time = int(need[step]), int(times[step])
            pairs = self._choices(stop - at, e, family)
            # The point's own piece needs all of its budget; one that needs less may take as long, where
            # merging overlooked it.
            needs, times = pairs.values(self._left, self.tables, np.full(pairs.left.size, budget))
            number = int(pairs.left[np.flatnonzero((needs == budget) & (times == time))[0]])
            piece = self.pieces[number]
            self._spell(at, e, number, budget, out)
            at, e, budget = at + piece.layers, piece.keeps, budget - piece.held
        return tuple(out), e, budget

    def _spell(self, at: int, e: bool, number: int, budget: int, out: list[Run]) -> None:
        """Appends the runs of one piece within `budget`."""
        piece = self.pieces[number]
        need, times = piece.stairs
        step = int(need.searchsorted(budget, side="right")) - 1
        budget = int(need[step])
        if piece.halves:
            first, second = piece.halves
            one = self.pieces[first]
            self._spell(at, e, first, budget, out)
            self._spell(at + one.layers, one.keeps, second, budget - one.held, out)
        elif piece.atoms:
            start = 0 if e else 1
            atoms = self.candidates.atoms(start, e)
            good = (atoms.held == piece.held) & (atoms.backward_peak == budget) & (atoms.time == times[step])
            good &= atoms.forward_peak <= max(piece.floor, budget - self.waiting)
            row = piece.atoms.start + int(np.flatnonzero(good[piece.atoms])[0])
            out.append(
                dataclasses.replace(self.candidates.run(start, e, row), start=at, stop=at + piece.layers)
            )
        else:
            stop = at + piece.layers
            inner = self.rest(at, stop, e, budget, self.inner)[0]
            out.append(Run(kind=RunKind.RECOMPUTE, start=at, stop=stop, inner=inner))
