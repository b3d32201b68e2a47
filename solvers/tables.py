r"""Tables of inner schedules: every stretch, every budget, recomputation nested to any depth.

For a stretch `(s, r]`, entered at the node `(s, e)`, let `T[s, r, e]` be the Pareto set of `(need, time)` of
its inner schedules, with `K = C[r]` waiting. With the runs `c` of `mwplan.solvers.candidates` and RECOMPUTE
runs,

    T[s, r, e] = Pareto of  (max(F_c + K, B_c, H_c + n), t_c + t)
                         c from (s, e) to (j, e'),  (n, t) in T[j, r, e'],
                            (max(P_j + K, n1, A[s] + n2), fwd(s, j) + t1 + t2)  (n1, t1) in T[s, j, e],  (n2,
                            t2) in T[j, r, 0],

`P_j` the forward peak of RECOMPUTE `(s, j]`, `T[r, r, .] = {(0, 0)}`, and `A[s]` nothing where `e`. Both
lines are exact because a run's cost depends on `s, e, j, K` alone, and a later run's events see of an earlier
one its held bytes only; so is keeping Pareto sets, because `need` and `time` are non-decreasing in those of
the parts. A RECOMPUTE run that ends its stretch is left out: its inner schedule in its place needs no more
and saves the forward. `mwplan.solvers.top` adds the top level.

The recursion for persistent schedules is that of Beaumont et al. (ACM TOMS 2024); exact bytes, all budgets at
once, nodes `(s, e)`, moonwalk and invert runs are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Strategy
from mwplan.solvers.beginnings import Beginnings, Node
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.diagonals import Pieces, Points, envelopes, thinned_all
from mwplan.solvers.pareto import DONE, NO_STAIRS, Ints, Stairs, staircase
from mwplan.solvers.parts import Place
from mwplan.solvers.single_layers import SingleLayers
from mwplan.solvers.splits import Buffer, Grid, Pairs, Shifts, spaced, with_tail

#: what tells apart stretches that cost the same: layers, `e`, the first boundary's bytes
_Key = tuple[int, bool, tuple[int, int, int]]


@dataclass(slots=True)
class _Level:
    """The schedules that RECOMPUTE runs of one depth may hold: `stairs` by `(s, r, e)`, and once for each of
    the stretches that cost the same; rows of these in the buffers of suffixes, and of RECOMPUTE runs."""

    stairs: dict[tuple[int, int, bool], Stairs] = field(default_factory=dict)
    known: dict[_Key, Stairs] = field(default_factory=dict)
    rows: dict[_Key, int] = field(default_factory=dict)
    again: dict[_Key, int] = field(default_factory=dict)


class Tables:
    """`T[s, r, e]` for all stretches.

    **Arguments:** `candidates`, whose problem says how many levels of RECOMPUTE the schedules may hold;
    `thin`, the loss of time aimed at, 0 for exact tables; `optimistic`, whether the tables are then a bound
    instead of schedules; `place`, where the candidates are of a part of a chain.
    **Raises:** `ArgumentError` where bytes or times are too large to be told apart by row.
    **Cost:** O(L^3) combinations of staircases, each linear in their sizes up to a sort. Equal stretches are
    solved once.
    """

    def __init__(
        self,
        candidates: Candidates,
        *,
        thin: float = 0.0,
        optimistic: bool = False,
        place: Place | None = None,
    ) -> None:
        self.candidates, self.place = candidates, place or Place(whole=candidates.profile)
        self.problem, self.tuning = candidates.problem, candidates.problem.tuning
        self.thin, self.optimistic, self.size = thin, optimistic, candidates.size
        depth = self.problem.max_recompute_depth
        self.depth = depth if Strategy.RECOMPUTE in candidates.allowed else 0
        self.cap = None if place else candidates.fastest_need()
        self.levels = 1 if self.depth is None else self.depth
        self.waiting = int(candidates.cotangent.max())
        candidates.prepare((at, kept) for at in range(self.size) for kept in {False, *self.kept_states(at)})
        self.grid = self._make_grid()
        self.shifts = Shifts(self.grid)
        alone = not candidates.has_moonwalk
        self._merge_share = self.tuning.merge_share_no_moonwalk if alone else self.tuning.merge_share
        # With no limit on depth there is one level, which refers to itself.
        self._levels = [_Level() for _ in range(self.levels)]
        #: how stretches may begin, left by `_fill` for the first top level where that begins alike
        self.begun: Beginnings | None = None
        for level in range(self.levels):
            if level or self.depth is None or not self._fill_at_once():
                self._fill(level)

    def _fill_at_once(self) -> bool:
        """The lowest level, if its runs are all of one layer, and whether they are."""
        nodes = [(start, kept) for start in range(self.size) for kept in self.kept_states(start)]
        singles = SingleLayers(
            self.candidates,
            nodes,
            cap=self.cap,
            thin=self.thin,
            optimistic=self.optimistic,
            span=self.grid.span,
        )
        if not singles.apply():
            return False
        self._levels[0].stairs = singles.stairs()
        return True

    def _make_grid(self) -> Grid:
        """The budgets at which staircases are compared first. Raises as the class says."""
        p, c = self.place.whole, self.candidates
        span = 1 << (p.bytes_bound() - p.fixed_bytes + 1).bit_length()
        if span * (self.size + 2) >= 2**63:
            raise ArgumentError(
                f"`profile` has {self.size} layers and up to {p.bytes_bound()} bytes: their product must "
                "stay below 2^62; state bytes in a larger unit"
            )
        if p.time_bound() >= 2**60:
            raise ArgumentError(
                f"`profile`: schedules may take up to {p.time_bound()} ns, past 2^60: state times in a "
                "larger unit"
            )
        high = self.cap if self.cap is not None else p.bytes_bound() - p.fixed_bytes
        single = [int(c.atoms(at, False).backward_peak.min(initial=high)) for at in range(self.size)]
        least = min(high, max(single))
        budgets = spaced(least // 4, least, high, self._cells())
        if self.place.ends:
            budgets = with_tail(budgets, least, high, self.place.ends)
        return Grid(budgets, span, self.tuning)

    def _cells(self) -> int:
        """How many of these budgets. More take memory for each stretch, fewer take time where points are
        many."""
        if self.size <= self.tuning.cells_layers:
            return self.tuning.cells
        windows = {tuple(self.candidates.layer_class[at : at + 8]) for at in range(1, self.size - 6)}
        many = len(windows) * self.size > self.tuning.many_stretches
        return self.tuning.cells_many if many else self.tuning.cells_few

    # -- what is asked for

    def source(self, level: int) -> int | None:
        """The level whose schedules may stand inside RECOMPUTE runs of `level` (`levels` is the top); None if
        none may."""
        if self.depth is None:
            return 0
        return level - 1 if level > 0 else None

    def kept_states(self, position: int) -> tuple[bool, ...]:
        """The values of `e` that occur at `position`."""
        if position == 0:
            return (False, True) if self.place.first else (True,)
        return (False, True) if self.candidates.kept_nodes[position] else (False,)

    def suffix(self, level: int, start: int, stop: int, kept: bool) -> Stairs:
        """The staircase of the stretch `(start, stop]` from `(start, kept)` inside RECOMPUTE runs of
        `level + 1`."""
        if start == stop:
            return DONE
        return self._levels[level].stairs.get((start, stop, kept), NO_STAIRS)

    def best(
        self,
        of: Ints,
        pairs: Pairs,
        known: Points,
        buffers: tuple[Buffer, Buffer],
        n: int,
        *,
        capped: bool = True,
        share: float = 1.0,
    ) -> Points:
        """The staircases of stretches of `n` layers, as stretch, need, time: of the groups `pairs`, whose
        rows are in `buffers`, or `known`. `capped`: without bytes that gain no time; `share` of the loss."""
        # Short stretches have few points, and their losses would add up over the chain.
        loss = self.thin * share if n >= self.tuning.short_layers else 0.0
        slack = loss * self._merge_share
        of, need, time = envelopes(
            of, pairs, known, *buffers, self.shifts, slack=slack, optimistic=self.optimistic
        )
        if self.cap is not None and capped:
            fits = need <= self.cap
            of, need, time = of[fits], need[fits], time[fits]
        if loss and of.size:
            loss *= self.tuning.thinning_share
            return thinned_all(of, need, time, loss, optimistic=self.optimistic)
        return of, need, time

    # -- filling

    def _fill(self, level: int) -> None:
        """One level, by lengths of stretches."""
        c, here, source = self.candidates, self._levels[level], self.source(level)
        p = c.profile
        boundary = list(zip(p.activation_bytes, p.cotangent_bytes, p.sweep_cotangent_bytes))
        ids: dict[tuple[int, int], int] = {}
        content = [-x for x in c.layer_class]
        room = max(2 * self.size, min(self.size * (self.size + 3), self.tuning.room_rows))
        right = Buffer(self.grid, room)
        starts = Beginnings(c, self.grid, self.shifts, 2 * room)
        # rows[r, e, s] of T[s, r, e]: 0 where s = r, 1 where there is no schedule.
        right.extend(2, np.zeros(1, dtype=np.int64), *DONE)
        rows = np.ones((self.size + 1, 2, self.size + 1), dtype=np.int64)
        rows[np.arange(self.size + 1), :, np.arange(self.size + 1)] = 0
        for n in range(1, self.size + 1):
            content = [
                ids.setdefault((c.layer_class[s + 1], content[s + 1]), len(ids) + 1)
                for s in range(self.size - n + 1)
            ]
            keys = {
                (s, e): (content[s], e, boundary[s])
                for s in range(self.size - n + 1)
                for e in self.kept_states(s)
            }
            # One of those that cost the same, the first.
            new = {key: node for node, key in reversed(keys.items()) if key not in here.known}
            cells = self._solve(level, n, new, starts, right, rows) if new else None
            for (s, e), key in keys.items():
                here.stairs[s, s + n, e] = here.known[key]
                rows[s + n, int(e), s] = here.rows[key]
            if source is None:
                continue
            if new:
                self._add_recompute(level, n, new, starts, cells if source == level else None)
            for (s, e), key in keys.items():
                starts.again[int(e), s, s + n] = here.again[key]
        if source == level:
            self.begun = starts

    def _solve(
        self, level: int, n: int, new: dict[_Key, Node], starts: Beginnings, right: Buffer, rows: Ints
    ) -> Ints:
        """The stretches of `n` layers that are not known yet, and their rows in `right`; returns how many
        points lie in each of its cells."""
        here, nodes = self._levels[level], list(new.values())
        nested = self.source(level) is not None
        starts.read(n, nodes, nested=nested)
        of, need, time = self._merge_all(n, nodes, starts, rows, right, nested=nested)
        first = right.rows
        cells = right.extend(len(nodes), of, need, time)
        cuts = of.searchsorted(np.arange(len(nodes) + 1))
        for k, key in enumerate(new):
            part = slice(cuts[k], cuts[k + 1])
            here.known[key] = (need[part], time[part])
            here.rows[key] = first + k
        return cells

    def _merge_all(
        self, n: int, nodes: list[Node], starts: Beginnings, rows: Ints, right: Buffer, *, nested: bool
    ) -> Points:
        """The recursion for stretches of `n` layers, as stretch, need, time."""
        c, known = self.candidates, Pieces()
        reach, limits = c.reach, []
        for which, (start, kept) in enumerate(nodes):
            stop = start + n
            k = int(c.cotangent[stop])
            atoms, part = c.atoms(start, kept), starts.ending((start, kept), stop)
            if part.stop > part.start:
                f, b, held, time = (x[part] for x in atoms.costs)
                known.add(which, *staircase(np.maximum(np.maximum(f + k, b), held), time, self.tuning))
            limits.append(min(stop - 1, int(reach[start])) if nested else start)
        stops = np.array(nodes)[:, 0] + n
        of, pairs = starts.pairs(nodes, limits, rows[stops], c.cotangent[stops])
        return self.best(of, pairs, known.joined(), (starts.buffer, right), n)

    def _add_recompute(
        self, level: int, n: int, new: dict[_Key, Node], starts: Beginnings, cells: Ints | None
    ) -> None:
        """The RECOMPUTE runs over the same stretches, as rows of `starts`; `cells`, what `_solve` returned
        where they are of the same level."""
        c, here, source = self.candidates, self._levels[level], self.source(level)
        assert source is not None
        inner = [self._levels[source].stairs[s, s + n, e] for s, e in new.values()]
        sums = [int(c.forward_sum[s + n] - c.forward_sum[s]) for s, _ in new.values()]
        floor = [int(c.recompute_forward_peak(s, e)[n - 1]) for s, e in new.values()]
        sizes = [x[0].size for x in inner]
        of = np.repeat(np.arange(len(inner)), sizes)
        need, time = (np.concatenate([x[k] for x in inner]) for k in (0, 1))
        first = starts.buffer.rows
        starts.buffer.extend(len(inner), of, need, time + np.repeat(sums, sizes), np.array(floor), at=cells)
        for k, key in enumerate(new):
            here.again[key] = first + k
