r"""The exact time-memory frontier: every budget at once, recomputation nested to any depth.

For a stretch `(s, r]`, entered at the node `(s, e)`, let `T[s, r, e]` be the Pareto set of `(need, time)` of
its inner schedules, with `K = C[r]` waiting. With the runs `c` of `mwplan.solvers.runs` and RECOMPUTE runs,

    T[s, r, e] = Pareto of  (max(F_c + K, B_c, H_c + n), t_c + t)
                         c from (s, e) to (j, e'),  (n, t) in T[j, r, e'],
                            (max(P_j + K, n1, A[s] + n2), fwd(s, j) + t1 + t2)  (n1, t1) in T[s, j, e],  (n2,
                            t2) in T[j, r, 0],

`P_j` the forward peak of RECOMPUTE `(s, j]`, `T[r, r, .] = {(0, 0)}`, and `A[s]` nothing where `e`. At the
top level `K = 0` and the empty suffix is the turn. Both lines are exact because a run's cost depends on
`s, e, j, K` alone, and a later run's events see of an earlier one its held bytes only; so is keeping Pareto
sets, because `need` and `time` are non-decreasing in those of the parts. A RECOMPUTE run that ends its
stretch is left out: its inner schedule in its place needs no more and saves the forward.

The recursion for persistent schedules is that of Beaumont et al. (ACM TOMS 2024); exact bytes, all budgets at
once, nodes `(s, e)`, moonwalk and invert runs are ours.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Run, RunKind, Solution, Status, Strategy, check_allowed
from mwplan.solvers.approach import Approach
from mwplan.solvers.diagonals import NO_POINTS, Pieces, Points, envelopes, grouped_all, thinned_all
from mwplan.solvers.pareto import INF, Ints, begins, ends, staircase
from mwplan.solvers.runs import (
    ALL_STRATEGIES,
    Candidates,
    check_max_error,
    error_of,
    fastest_ns,
)
from mwplan.solvers.sparse import SparseTables
from mwplan.solvers.splits import Buffer, Pairs, Shifts, grid, grouped, spread, with_tail
from mwplan.solvers.uniform import UniformTables, is_uniform, part, stretches

Stairs = tuple[Ints, Ints]
_NOTHING: Stairs = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
#: stretches shorter than this are never thinned
_SHORT = 4
#: budgets at which staircases are compared first; of long chains, those of few and those of many different
#: stretches
_CELLS, _LONG_CELLS = 384, (1024, 128)
#: rows of tables there is room for from the start, as untouched memory
_ROOM = 100_000
#: shares of the loss aimed at that a merge and the thinning after it may take; a merge in a chain without
#: moonwalk runs, whose labels lose too
_SLACK, _THIN, _SLACK_ALONE = 4.0, 2.0, 6.0
#: and of that, at the top level, where losses would add up along the chain
_TOP = 0.1
#: and in the tables of a bound, which are to prove what these lose: of staircases, and of moonwalk runs
_BOUND, _BOUND_LABEL = 0.5, 0.0625
#: share of the loss aimed at that a moonwalk or invert run may lose for each layer
_LABEL = 0.7
#: from here on chains of identical layers have exact tables of their own
_UNIFORM = 48
#: thinned, in chains of so many layers, stretches of so many identical ones have
_LONG, _STRETCH = 160, 96
#: RECOMPUTE runs go into these from so many layers before
_NEAR = 8
_DONE: Stairs = (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Top:
    """The staircases of the suffixes `(s, r]` of one stretch, by node, and what its runs may be.

    `reach[s]`: up to where a RECOMPUTE run from `s` may go; `closing`: whether it may end the stretch;
    `penalty_ns`: what each run's time has on top.
    """

    candidates: Candidates
    nodes: dict[tuple[int, bool], Stairs]
    reach: Ints
    closing: bool
    penalty_ns: int


@dataclass(slots=True)
class _Stretch:
    """A stretch whose runs are being read: read up to `at`, with `budget` left there."""

    level: int
    start: int
    at: int
    stop: int
    kept: bool
    budget: int
    top: Top | None
    runs: list[Run]


class _Node:
    """STORE, MOONWALK and INVERT runs from one node as groups: `groups`, rows of left row, end, `e'`, `F`,
    `H`, row of `H` in the shifts; forward peaks of RECOMPUTE runs, their `H` and its row."""

    __slots__ = ("groups", "moved", "own", "peaks", "read")

    def __init__(self, own: int, moved: int, peaks: Ints) -> None:
        self.own, self.moved, self.peaks, self.read = own, moved, peaks, 0
        self.groups: Ints = np.zeros((6, 0), dtype=np.int64)


class Tables:
    """`T[s, r, e]` for all stretches; `solve_top` adds the top level.

    **Arguments:** `candidates`; `depth`, how many levels of RECOMPUTE the schedules may hold, None for any;
    `loss`, what `thinned` may lose at each stretch of `_SHORT` layers or more; `optimistic`, whether the
    tables are then a bound instead of schedules. Where the candidates are of a part of the chain `whole`,
    after its first `first` layers: `ends`, the staircases of what follows, without and with its first input
    kept; None where nothing does.
    **Cost:** O(L^3) combinations of staircases, each linear in their sizes up to a sort. Equal stretches are
    solved once.
    """

    def __init__(
        self,
        candidates: Candidates,
        depth: int | None,
        *,
        loss: float = 0.0,
        optimistic: bool = False,
        whole: Profile | None = None,
        first: int = 0,
        ends: tuple[Stairs, Stairs] | None = None,
    ) -> None:
        self.first, self.ends = first, ends
        self.loss, self.optimistic = loss, optimistic
        self.candidates = candidates
        self.size = candidates.size
        self.depth = depth if Strategy.RECOMPUTE in candidates.allowed else 0
        self.cap = None if whole else candidates.fastest_need()
        self.levels = 1 if self.depth is None else self.depth
        p = whole or candidates.profile
        self.span = 1 << (p.bytes_bound() - p.fixed_bytes + 1).bit_length()
        if self.span * (self.size + 2) >= 2**63:
            raise ArgumentError(
                f"`profile` has {self.size} layers and up to {p.bytes_bound()} bytes: their product must "
                "stay below 2^62; "
                "state bytes in a larger unit"
            )
        high = self.cap if self.cap is not None else p.bytes_bound() - p.fixed_bytes
        candidates.prepare((at, kept) for at in range(self.size) for kept in {False, *self.kept_states(at)})
        single = [int(candidates.atoms(at, False).backward_peak.min(initial=high)) for at in range(self.size)]
        least = min(high, max(single))
        self.grid = grid(least // 4, least, high, self._cells())
        if ends:
            self.grid = with_tail(self.grid, least, high, ends)
        self.shifts = Shifts(self.grid)
        self.waiting = int(candidates.cotangent.max())
        self._slack = _SLACK if candidates.has_moonwalk else _SLACK_ALONE
        if p.time_bound() >= 2**60:
            raise ArgumentError(
                f"`profile`: schedules may take up to {p.time_bound()} ns, past 2^60: state times in a "
                "larger unit"
            )
        # stairs[level][(s, r, e)]; with no limit on depth there is one level, which refers to itself.
        self.stairs: list[dict[tuple[int, int, bool], Stairs]] = [{} for _ in range(self.levels)]
        self._memo: list[dict[tuple[Any, ...], Stairs]] = [{} for _ in range(self.levels)]
        self._rows: list[dict[tuple[Any, ...], int]] = [{} for _ in range(self.levels)]
        self._again: list[dict[tuple[Any, ...], int]] = [{} for _ in range(self.levels)]
        #: how stretches may begin, left by `_fill` for the first top level where that begins alike: the
        #: nodes, the rows of RECOMPUTE runs, the buffer
        self._begun: tuple[dict[tuple[int, bool], _Node], Ints, Buffer] | None = None
        for level in range(self.levels):
            if level == 0 and self._is_plain():
                self._fill_plain()
            else:
                self._fill(level)

    def _cells(self) -> int:
        """At how many budgets staircases are compared first. More take memory for each stretch, fewer take
        time where points are many."""
        if self.size <= 400:
            return _CELLS
        windows = {tuple(self.candidates.layer_class[at : at + 8]) for at in range(1, self.size - 6)}
        return _LONG_CELLS[len(windows) * self.size > 50_000]

    def source(self, level: int) -> int | None:
        """The level whose schedules may stand inside RECOMPUTE runs of `level` (`levels` is the top); None if
        none may."""
        if self.depth is None:
            return 0
        return level - 1 if level > 0 else None

    def kept_states(self, position: int) -> tuple[bool, ...]:
        """The values of `e` that occur at `position`."""
        if position == 0:
            return (False, True) if self.first else (True,)
        return (False, True) if self.candidates.kept_nodes[position] else (False,)

    def suffix(self, level: int, start: int, stop: int, kept: bool) -> Stairs:
        """The staircase of the stretch `(start, stop]` from `(start, kept)` inside RECOMPUTE runs of
        `level + 1`."""
        if start == stop:
            return _DONE
        return self.stairs[level].get((start, stop, kept), _NOTHING)

    # -- filling
    # -------------------------------------------------------------------------------------------------

    def _fill(self, level: int) -> None:
        """One level, by lengths of stretches."""
        c, memo, stairs = self.candidates, self._memo[level], self.stairs[level]
        source, reach = self.source(level), c.recompute_reach()
        p = c.profile
        boundary = list(zip(p.activation_bytes, p.cotangent_bytes, p.sweep_cotangent_bytes))
        ids: dict[tuple[int, int], int] = {}
        content = [-x for x in c.layer_class]
        none = np.zeros(0, dtype=np.int64)
        room = max(2 * self.size, min(self.size * (self.size + 3), _ROOM))
        right = Buffer(self.grid, self.span, room)
        left = Buffer(self.grid, self.span, 2 * room, sheeted=True)
        # rows[r, e, s] of T[s, r, e]: 0 where s = r, 1 where there is no schedule; again[e, s, r] of the
        # RECOMPUTE run, 0 where there is none.
        right.extend(2, np.zeros(1, dtype=np.int64), *_DONE)
        left.extend(1, none, none, none)
        rows = np.ones((self.size + 1, 2, self.size + 1), dtype=np.int64)
        again = np.zeros((2, self.size + 1, self.size + 1), dtype=np.int64)
        rows[np.arange(self.size + 1), :, np.arange(self.size + 1)] = 0
        nodes: dict[tuple[int, bool], _Node] = {}
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
            fresh = {key: node for node, key in reversed(keys.items()) if key not in memo}
            news = list(fresh.values())
            if news:
                self._read_atoms(n, news, nodes, None if source is None else again, left)
                found = self._merge_all(n, news, nodes, rows, again, reach, source is not None, left, right)
                of, need, time = found
                first = right.rows
                at = right.extend(len(news), of, need, time)
                cuts = of.searchsorted(np.arange(len(news) + 1))
                for k, (key, _) in enumerate(fresh.items()):
                    part = slice(cuts[k], cuts[k + 1])
                    memo[key] = (need[part], time[part])
                    self._rows[level][key] = first + k
            for (s, e), key in keys.items():
                stairs[s, s + n, e] = memo[key]
                rows[s + n, int(e), s] = self._rows[level][key]
            if source is None:
                continue
            if news:
                inner = [self.stairs[source][s, s + n, e] for s, e in news]
                sums = [int(c.forward_sum[s + n] - c.forward_sum[s]) for s, _ in news]
                floor = [int(c.recompute_forward_peak(s, e)[n - 1]) for s, e in news]
                sizes = [x[0].size for x in inner]
                of = np.repeat(np.arange(len(news)), sizes)
                first = left.rows
                left.extend(
                    len(news),
                    of,
                    np.concatenate([x[0] for x in inner]),
                    np.concatenate([x[1] for x in inner]) + np.repeat(sums, sizes),
                    np.array(floor),
                    at=at if source == level else None,
                )
                for k, key in enumerate(fresh):
                    self._again[level][key] = first + k
            for (s, e), key in keys.items():
                again[int(e), s, s + n] = self._again[level][key]
        if source == level:
            self._begun = nodes, again, left

    def _read_atoms(
        self,
        n: int,
        news: list[tuple[int, bool]],
        nodes: dict[tuple[int, bool], _Node],
        again: Ints | None,
        left: Buffer,
    ) -> None:
        """The STORE, MOONWALK and INVERT runs of less than `n` layers from the given nodes, those that are
        not known yet; without those that a RECOMPUTE run beats, of which `again` has the rows in `left`, if
        there are any."""
        heads: list[tuple[int, ...]] = []
        columns: list[list[Ints]] = []
        for start, kept in news:
            node = nodes.get((start, kept))
            if node is None:
                own = self._own(start, kept)
                moved = int(self.shifts.rows(np.array([own]))[0])
                peaks = self.candidates.recompute_forward_peak(start, kept)
                node = nodes[start, kept] = _Node(own, moved, peaks)
            atoms = self.candidates.atoms(start, kept)
            low = first = atoms.groups[node.read - 1][2] if node.read else 0
            for at, keeps, high in atoms.groups[node.read :]:
                if at - start >= n:
                    break
                heads.append((start, kept, at, keeps, high - low, node.own, int(node.peaks[at - start - 1])))
                node.read += 1
                low = high
            if low > first:
                part = slice(first, low)
                columns.append(
                    [x[part] for x in (atoms.forward_peak, atoms.backward_peak, atoms.held, atoms.time)]
                )
        if not heads:
            return
        start_, kept_, at_, keeps_, sizes, own_, peak_ = np.array(heads, dtype=np.int64).T
        of = np.repeat(np.arange(len(heads)), sizes)
        f, b, held, time = (np.concatenate(x) for x in zip(*columns))
        if again is not None:
            rows = np.where((keeps_ == 0) & (at_ < self.size), again[kept_, start_, at_], 0)[of]
            found = left.key[: left.size].searchsorted(left.base[rows] + b, side="right") - 1
            beaten = (found >= left.pointer[rows, 0]) & (left.time[found] <= time)
            beaten &= (rows > 0) & (held >= own_[of]) & (f >= peak_[of])
            of, f, b, held, time = (x[~beaten] for x in (of, f, b, held, time))
        groups, floor, held, which, need, time = grouped_all(of, f, b, held, time, self.waiting, self.span)
        first = left.rows
        left.extend(groups.size, which, need, time, floor)
        lines = np.array(
            [first + np.arange(groups.size), at_[groups], keeps_[groups], floor, held, self.shifts.rows(held)]
        )
        first_ = np.flatnonzero(begins(start_, kept_))
        cuts = groups.searchsorted(np.append(first_, len(heads))).tolist()
        for k, low, high in zip(first_.tolist(), cuts[:-1], cuts[1:]):
            node = nodes[heads[k][0], bool(heads[k][1])]
            node.groups = np.concatenate([node.groups, lines[:, low:high]], axis=1)

    def _own(self, start: int, kept: bool) -> int:
        return 0 if kept else int(self.candidates.activation[start])

    def _merge_all(
        self,
        n: int,
        news: list[tuple[int, bool]],
        nodes: dict[tuple[int, bool], _Node],
        rows: Ints,
        again: Ints,
        reach: Ints,
        nested: bool,
        left: Buffer,
        right: Buffer,
    ) -> tuple[Ints, Ints, Ints]:
        """The recursion for stretches of `n` layers, as stretch, need, time."""
        c, known = self.candidates, Pieces()
        limits = []
        for which, (start, kept) in enumerate(news):
            stop = start + n
            k = int(c.cotangent[stop])
            node = nodes[start, kept]
            atoms = c.atoms(start, kept)
            low = atoms.groups[node.read - 1][2] if node.read else 0
            ending = [x for x in atoms.groups[node.read : node.read + 2] if x[0] == stop]
            if ending:
                part = slice(low, ending[-1][2])
                peak = np.maximum(atoms.forward_peak[part] + k, atoms.backward_peak[part])
                known.add(which, *staircase(np.maximum(peak, atoms.held[part]), atoms.time[part]))
            limits.append(min(stop - 1, int(reach[start])) if nested else start)
        stops = np.array(news)[:, 0] + n
        of, pairs = self._pairs(
            news, limits, [nodes[x] for x in news], again, rows[stops], c.cotangent[stops]
        )
        return self._best(of, pairs, known.joined(), left, right, n, c)

    @staticmethod
    def _pairs(
        begins: list[tuple[int, bool]],
        limits: list[int],
        nodes: list[_Node],
        again: Ints,
        rows: Ints,
        waiting: Ints,
    ) -> tuple[Ints, Pairs]:
        """The groups that stretches may begin with, and which stretch each is of: RECOMPUTE runs up to
        `limits`, in rows `again`, in order of their ends, and those of the stretches' first `nodes`.
        `rows[k, e, s]`: what is left of stretch `k` from a node on; `waiting`: cotangents."""
        start, kept = np.array(begins, dtype=np.int64).T
        counts = np.maximum(np.array(limits) - start, 0)
        sizes = np.array([node.groups.shape[1] for node in nodes])
        after = np.cumsum(counts + sizes)
        at, which = spread(start + 1, start + 1 + counts)
        own, moved = np.array([(node.own, node.moved) for node in nodes]).T
        peaks = np.concatenate([node.peaks[:count] for node, count in zip(nodes, counts.tolist())])
        runs = (again[kept[which], start[which], at], rows[which, 0, at], own[which], peaks, moved[which])
        lines, ends, keeps, floor, held, shift = np.concatenate([node.groups for node in nodes], axis=1)
        place, which = spread(after - sizes, after)
        table = np.empty((5, int(after[-1])), dtype=np.int64)
        table[:, place] = lines, rows[which, keeps, ends], held, floor, shift
        table[:, spread(after - sizes - counts, after - sizes)[0]] = runs
        of = np.repeat(np.arange(start.size), counts + sizes)
        left, right, holds, floors, shifts = table
        return of, Pairs(left, right, holds, floors + waiting[of], shifts)

    def _is_plain(self) -> bool:
        """Whether the lowest level has runs of one layer only, so that all stretches with one beginning can
        be merged at once."""
        if self.depth is None or self.candidates.profile.time_bound() * (self.size + 2) >= 2**62:
            return False
        atoms = self.candidates.atoms
        return all((atoms(s, e).stop == s + 1).all() for s in range(self.size) for e in self.kept_states(s))

    def _fill_plain(self) -> None:
        """The lowest level, where every run is one layer: `T[s, r, e]` for all `r` at once, keyed by `r` and
        need."""
        c, span, stairs = self.candidates, self.span, self.stairs[0]
        slowest = c.profile.time_bound() + 1
        none = np.zeros(0, dtype=np.int64)
        after = {False: (none, none, none), True: (none, none, none)}
        for start in range(self.size - 1, -1, -1):
            here = {False: (none, none, none), True: (none, none, none)}
            for kept in self.kept_states(start):
                atoms = c.atoms(start, kept)
                parts = []
                for row in range(len(atoms)):
                    stop, need, time = (
                        np.append(first, rest)
                        for first, rest in zip((start + 1, 0, 0), after[bool(atoms.keeps_end[row])])
                    )
                    peak = np.maximum(atoms.forward_peak[row] + c.cotangent[stop], atoms.backward_peak[row])
                    parts.append((stop, np.maximum(peak, need + atoms.held[row]), time + atoms.time[row]))
                if not parts:
                    continue
                stop, need, time = (np.concatenate(x) for x in zip(*parts))
                # Each part is in order already: the sort is a merge.
                order = np.argsort(stop * span + need, kind="stable")
                stop, need, time = stop[order], need[order], time[order]
                # Times of later stops lie below all earlier ones, so that the running minimum begins anew
                # with each.
                best = np.minimum.accumulate(time - stop * slowest)
                keep = np.append(True, time[1:] - stop[1:] * slowest < best[:-1])
                if self.cap is not None:
                    keep &= need <= self.cap
                stop, need, time = stop[keep], need[keep], time[keep]
                last = ends(stop, need)
                here[kept] = self._thinned_plain(start, stop[last], need[last], time[last])
                stop, need, time = here[kept]
                cuts = np.flatnonzero(begins(stop)).tolist()
                for a, z in zip(cuts, [*cuts[1:], stop.size]):
                    if z > a:
                        stairs[start, int(stop[a]), kept] = need[a:z], time[a:z]
            after = here

    def _thinned_plain(self, start: int, stop: Ints, need: Ints, time: Ints) -> tuple[Ints, Ints, Ints]:
        """`thinned` for all stops at once."""
        if not self.loss or not stop.size:
            return stop, need, time
        last = ends(stop)
        least = time[last][np.cumsum(begins(stop)) - 1]
        group = np.floor(np.log(time / np.maximum(least, 1)) / np.log1p(self.loss * _THIN))
        first = begins(stop, group)
        short = (stop - start < _SHORT) | (least <= 0)
        if not self.optimistic:
            keep = first | last | short
            return stop[keep], need[keep], time[keep]
        keep = first | short
        index = np.flatnonzero(keep)
        return stop[keep], need[keep], time[np.append(index[1:], time.size) - 1]

    def solve_top(
        self, candidates: Candidates | None = None, *, closing: bool = False, penalty_ns: int = 0
    ) -> Top:
        """The staircases of all suffixes of the chain at the top level.

        **Arguments:** `candidates`, if other than inside RECOMPUTE runs (layers pinned); `closing`, whether a
        RECOMPUTE run may end the chain, which is never better but may be asked for; `penalty_ns`, added to
        the time of each run of the top level.
        """
        c = candidates or self.candidates
        stop, none = self.size, np.zeros(0, dtype=np.int64)
        nodes: dict[tuple[int, bool], Stairs] = {}
        # Row 2 s + e + 1 for each node; row 0 is empty.
        right = Buffer(self.grid, self.span, 2 * stop + 3)
        right.extend(1, none, none, none)
        rows = np.zeros((1, 2, stop + 1), dtype=np.int64)
        for kept in (False, True):
            turn = np.array([c.turn_bytes(kept)]), np.zeros(1, dtype=np.int64)
            nodes[stop, kept] = need, time = self.ends[kept] if self.ends else turn
            rows[0, int(kept), stop] = right.rows
            right.extend(1, np.zeros(need.size, dtype=np.int64), need, time)
        c.prepare((start, kept) for start in range(stop) for kept in self.kept_states(start))
        top = Top(c, nodes, c.recompute_reach(), closing or self.ends is not None, penalty_ns)
        source = self.source(self.levels)
        plain = c is self.candidates and closing <= (self.ends is not None) and not penalty_ns
        begun = self._begun if plain else None
        if begun:
            every = [(start, kept) for start in range(stop) for kept in self.kept_states(start)]
            self._read_atoms(stop + 1, every, *begun)
            self._begun = None
        for start in range(stop - 1, -1, -1):
            for kept in self.kept_states(start):
                if begun:
                    known, again, left = begun
                    limit, node = self._limit(top, source, start), known[start, kept]
                    of, pairs = self._pairs(
                        [(start, kept)], [limit], [node], again, rows, np.zeros(1, dtype=np.int64)
                    )
                else:
                    pairs, left = self._top_pairs(top, source, start, kept, rows)
                    of = np.zeros(pairs.left.size, dtype=np.int64)
                n = stop - start + (_SHORT if self.ends else 0)
                _, need, time = self._best(of, pairs, NO_POINTS, left, right, n, c, _TOP)
                nodes[start, kept] = need, time
            for kept in self.kept_states(start):
                rows[0, int(kept), start] = right.rows
                need, time = nodes[start, kept]
                right.extend(1, np.zeros(need.size, dtype=np.int64), need, time)
        return top

    def _limit(self, top: Top, source: int | None, start: int) -> int:
        """Up to where a RECOMPUTE run from `start` may go at the top level."""
        if source is None:
            return start
        return min(self.size if top.closing else self.size - 1, int(top.reach[start]))

    def _top_pairs(
        self, top: Top, source: int | None, start: int, kept: bool, rows: Ints
    ) -> tuple[Pairs, Buffer]:
        """How the suffix from one node may begin, and the buffer that the runs are in."""
        c, limit = top.candidates, self._limit(top, source, start)
        ahead = range(start + 1, limit + 1)
        stairs = [] if source is None else [self.suffix(source, start, at, kept) for at in ahead]
        spent = (c.forward_sum[start + 1 : limit + 1] - c.forward_sum[start]).tolist()
        floors = c.recompute_forward_peak(start, kept)[: limit - start].tolist()
        holds = [self._own(start, kept)] * len(stairs)
        to = rows[0, 0, start + 1 : limit + 1].tolist()
        atoms, low = c.atoms(start, kept), 0
        for at, keeps, high in atoms.groups:
            columns = [x[low:high] for x in (atoms.forward_peak, atoms.backward_peak, atoms.held, atoms.time)]
            low = high
            if source is not None and not keeps and at <= limit and c is self.candidates and not top.closing:
                columns = self._undominated(columns, source, start, at, kept)
            for floor, held, found in grouped(columns, self.waiting) if columns[0].size else ():
                stairs.append(found)
                spent.append(0)
                floors.append(floor)
                holds.append(held)
                to.append(int(rows[0, int(keeps), at]))
        sizes = [x[0].size for x in stairs]
        floor_, held_, to_ = (np.array(x, dtype=np.int64) for x in (floors, holds, to))
        left = Buffer(self.grid, self.span, len(stairs), sheeted=True)
        need, time = (np.concatenate([_NOTHING[i], *(x[i] for x in stairs)]) for i in (0, 1))
        spent_ = np.repeat(np.array(spent, dtype=np.int64) + top.penalty_ns, sizes)
        left.extend(len(stairs), np.repeat(np.arange(len(stairs)), sizes), need, time + spent_, floor_)
        return Pairs(np.arange(len(stairs)), to_, held_, floor_, self.shifts.rows(held_)), left

    def _best(
        self,
        of: Ints,
        pairs: Pairs,
        known: Points,
        left: Buffer,
        right: Buffer,
        n: int,
        c: Candidates,
        share: float = 1.0,
    ) -> Points:
        """The staircases of stretches of `n` layers, as stretch, need, time: of the groups `pairs`, or
        `known`."""
        # Short stretches have few points, and their losses would add up over the chain.
        loss = self.loss * share if n >= _SHORT else 0.0
        of, need, time = envelopes(
            of, pairs, known, left, right, self.shifts, slack=loss * self._slack, optimistic=self.optimistic
        )
        if self.cap is not None and c is self.candidates:
            fits = need <= self.cap
            of, need, time = of[fits], need[fits], time[fits]
        if loss and of.size:
            return thinned_all(of, need, time, loss * _THIN, optimistic=self.optimistic)
        return of, need, time

    def _undominated(self, columns: list[Ints], source: int, start: int, stop: int, kept: bool) -> list[Ints]:
        """Those of the runs `(F, B, H, t)` from `(start, kept)` to `(stop, False)` that no RECOMPUTE run
        beats."""
        f, b, held, time = columns
        c = self.candidates
        n, t = self.suffix(source, start, stop, kept)
        if not n.size:
            return columns
        at = np.searchsorted(n, b, side="right") - 1
        forward = int(c.forward_sum[stop] - c.forward_sum[start])
        own = 0 if kept else int(c.activation[start])
        beaten = (at >= 0) & (t[at] + forward <= time) & (held >= own)
        beaten &= f >= int(c.recompute_forward_peak(start, kept)[stop - start - 1])
        return [x[~beaten] for x in columns]

    # -- reading
    # -------------------------------------------------------------------------------------------------

    def runs(self, top: Top, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest schedule of the chain within `budget`, which must hold at least one."""
        return self.read(top, True, budget)[0]

    def read(self, top: Top, kept: bool, budget: int) -> tuple[tuple[Run, ...], bool, int]:
        """As `runs`, of a part of a chain from the node with `kept`; with that of its end and the budget left
        there."""
        return self._read(self.levels, 0, self.size, kept, budget, top)

    def inner_runs(self, level: int, start: int, stop: int, kept: bool, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest inner schedule of `(start, stop]` within `budget`."""
        return self._read(level, start, stop, kept, budget, None)[0]

    def _read(
        self, level: int, start: int, stop: int, kept: bool, budget: int, top: Top | None
    ) -> tuple[tuple[Run, ...], bool, int]:
        first = self.first
        # A stack of stretches instead of calls: schedules may nest as deep as the chain is long.
        stack = [_Stretch(level, start, start, stop, kept, budget, top, [])]
        while True:
            x = stack[-1]
            if x.at < x.stop:
                run, at, keeps, rest, here = self._first_run(x.level, x.at, x.stop, x.kept, x.budget, x.top)
                if run is not None:
                    x.runs.append(
                        dataclasses.replace(run, start=run.start + first, stop=run.stop + first)
                        if first
                        else run
                    )
                else:
                    source = self.source(x.level)
                    assert source is not None
                    stack.append(_Stretch(source, x.at, x.at, at, x.kept, here, None, []))
                x.at, x.kept, x.budget = at, keeps, rest
                continue
            stack.pop()
            if not stack:
                return tuple(x.runs), x.kept, x.budget
            run = Run(kind=RunKind.RECOMPUTE, start=x.start + first, stop=x.stop + first, inner=tuple(x.runs))
            stack[-1].runs.append(run)

    def _first_run(
        self, level: int, start: int, stop: int, kept: bool, budget: int, top: Top | None
    ) -> tuple[Run | None, int, bool, int, int]:
        """A run that begins a fastest schedule within `budget`, where it ends, the next node's `e`, the
        budget left there, and what the schedule needs of `budget`; None for a RECOMPUTE run, whose inner
        schedule may need that much too."""
        c = top.candidates if top else self.candidates
        penalty = top.penalty_ns if top else 0
        k = 0 if top else int(c.cotangent[stop])

        def stairs(at: int, keeps: bool) -> Stairs:
            return top.nodes.get((at, keeps), _NOTHING) if top else self.suffix(level, at, stop, keeps)

        def point(found: Stairs, budget: int) -> tuple[int, int]:
            k = int(found[0].searchsorted(budget, side="right")) - 1
            return (int(found[0][k]), int(found[1][k])) if k >= 0 else (INF, INF)

        # At a point's own need, thinned staircases too give its time exactly; its own run needs all of that,
        # and where merging overlooked one that takes as long and needs less, that one is another point's.
        budget, time = point(stairs(start, kept), budget)
        atoms = c.atoms(start, kept)
        peak = np.maximum(atoms.forward_peak + k, atoms.backward_peak)
        for row in np.flatnonzero((peak <= budget) & (atoms.stop <= stop)):
            at, keeps, held = int(atoms.stop[row]), bool(atoms.keeps_end[row]), int(atoms.held[row])
            need, rest = point(stairs(at, keeps), budget - held)
            if int(atoms.time[row]) + penalty + rest == time and max(int(peak[row]), held + need) == budget:
                return c.run(start, kept, int(row)), at, keeps, budget - held, budget
        source = self.source(level)
        assert source is not None
        own = self._own(start, kept)
        peaks = c.recompute_forward_peak(start, kept)
        limit = stop if top is not None and top.closing else stop - 1
        for at in range(start + 1, limit + 1):
            peak_ = int(peaks[at - start - 1]) + k
            if peak_ > budget:
                break
            inner_need, inner = point(self.suffix(source, start, at, kept), budget)
            need, rest = point(stairs(at, False), budget - own)
            spent = int(c.forward_sum[at] - c.forward_sum[start]) + penalty
            if inner + rest + spent == time and max(peak_, inner_need, own + need) == budget:
                return None, at, False, budget - own, budget
        raise AssertionError("a staircase's point has no run behind it")


class JoinedTables:
    """The top level of a chain in parts, from the last to the first: long stretches of identical layers by
    `mwplan.solvers.sparse`, the rest by `Tables`.

    Each part's staircases end in those of what follows. No run crosses a joint but RECOMPUTE runs into
    identical layers from at most `_NEAR` layers before them (`mwplan.solvers.approach`). `parts` are as
    `mwplan.solvers.uniform.stretches` gives them.
    **Arguments:** as of `solve_frontier`; `thin` must not be 0. **Cost:** the sum of the parts'.
    """

    def __init__(
        self,
        profile: Profile,
        parts: list[tuple[int, int, bool]],
        *,
        max_error: float,
        allowed: frozenset[Strategy],
        thin: float,
    ) -> None:
        self._read: list[Callable[[bool, int], tuple[tuple[Run, ...], bool, int]]] = []
        ends: tuple[Stairs, Stairs] | None = None
        sparse: SparseTables | None = None  # of the part that follows
        for start, stop, uniform in reversed(parts):
            piece = part(profile, start, stop)
            if uniform:
                sparse = SparseTables(
                    piece,
                    max_error=max_error,
                    allowed=allowed,
                    thin=thin,
                    whole=profile,
                    first=start,
                    ends=ends,
                )
                ends = (sparse.points(False), sparse.points(True))
                self._read.insert(0, sparse.read)
            else:
                candidates = Candidates(
                    piece, max_error=max_error, allowed=allowed, loss=thin / 6, of=len(profile)
                )
                tables = Tables(candidates, None, loss=thin / 4, whole=profile, first=start, ends=ends)
                if sparse and sparse.nested and stop - start <= _NEAR:
                    approach = Approach(tables, sparse)
                    ends = (approach.points(False), approach.points(True))
                    self._read[0] = approach.read
                    sparse = None
                    continue
                sparse = None
                top = tables.solve_top()
                ends = (top.nodes.get((0, False), _NOTHING), top.nodes[0, True])
                self._read.insert(0, partial(tables.read, top))
        assert ends is not None
        self._points = ends[True]

    def points(self) -> Stairs:
        """The chain's staircase."""
        return self._points

    def runs(self, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest schedule of the chain within `budget`, which must hold at least one."""
        out: tuple[Run, ...] = ()
        kept = True
        for read in self._read:
            runs, kept, budget = read(kept, budget)
            out += runs
        return out


class Frontier:
    """The Pareto set of `(need, time)` of all schedules of a profile, and the schedules themselves.

    `points`: tuples `(need_bytes, time_ns)` of temporaries and time, need increasing, time decreasing; all of
    them if `thin` is 0.
    """

    def __init__(
        self,
        profile: Profile,
        tables: Tables | UniformTables | JoinedTables,
        *,
        max_error: float,
        allowed: frozenset[Strategy],
        thin: float = 0.0,
    ) -> None:
        self.profile, self.tables, self.thin = profile, tables, thin
        self.max_error, self.allowed = float(max_error), allowed
        self.top: Top | None = None
        if isinstance(tables, Tables):
            self.top = tables.solve_top()
            need, time = self.top.nodes[0, True]
        else:
            need, time = tables.points()
        self.points: tuple[tuple[int, int], ...] = tuple(zip(need.tolist(), time.tolist()))
        self._bound: tuple[tuple[int, int], ...] | None = self.points if thin == 0 else None

    @property
    def least_bytes(self) -> int | None:
        """The least budget that any schedule fits, in bytes of temporaries; None if there is none at any.

        Exact when thinned too, except where chains have long stretches of identical layers: there it is the
        least one found.
        """
        return self.points[0][0] if self.points else None

    @property
    def bound_points(self) -> tuple[tuple[int, int], ...]:
        """Points `(need, time)` such that no schedule within `need` is faster: `points` themselves, or, if
        thinned, a staircase at or below them, from tables whose steps are merged downwards. **Cost:** that of
        the frontier again, once, if thinned.
        """
        if self._bound is None:
            t = self.tables
            if not isinstance(t, Tables):
                from mwplan.solvers.relaxed import lower_bound

                parts = stretches(self.profile, _STRETCH)
                need, time = lower_bound(
                    self.profile, parts, max_error=self.max_error, allowed=self.allowed, thin=self.thin
                )
                self._bound = tuple(zip(need.tolist(), time.tolist()))
                return self._bound
            c = t.candidates
            c = Candidates(
                c.profile,
                max_error=c.max_error,
                allowed=c.allowed,
                loss=c.loss * _BOUND_LABEL,
                optimistic=True,
            )
            lower = Tables(c, t.depth, loss=t.loss * _BOUND, optimistic=True)
            need, time = lower.solve_top().nodes[0, True]
            self._bound = tuple(zip(need.tolist(), time.tolist()))
        return self._bound

    def bound_ns(self, budget_bytes: int) -> int:
        """No schedule within `budget_bytes` is faster than this."""
        k = bisect.bisect_right(self.bound_points, (int(budget_bytes), INF)) - 1
        return self.bound_points[max(k, 0)][1] if self.bound_points else 0

    def loss(self) -> float:
        """The largest relative loss of time at any budget from `least_bytes` on, proved: 0 if exact."""
        budgets = {need for need, _ in self.points} | {need for need, _ in self.bound_points}
        worst = 0.0
        for budget in budgets:
            if budget < self.points[0][0]:
                continue
            k = bisect.bisect_right(self.points, (budget, INF)) - 1
            worst = max(worst, self.points[k][1] / max(1, self.bound_ns(budget)) - 1)
        return worst

    def at(self, budget_bytes: int) -> Solution:
        """The fastest schedule within `budget_bytes` of temporaries; INFEASIBLE, with `least_bytes`, where
        none fits, UNKNOWN where none was found and `least_bytes` is not proved.

        OPTIMAL if the frontier is exact; if thinned, FEASIBLE (unless its bound is reached): the bound is
        that of `bound_points` if they have been asked for before, else what every layer's fastest way takes.
        **Raises:** `ArgumentError` unless `budget_bytes` is an integer. **Cost:** one pass over the
        candidates of each run chosen.
        """
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, (int, np.integer)):
            raise ArgumentError(f"`budget_bytes={budget_bytes!r}` must be an integer")
        k = bisect.bisect_right(self.points, (int(budget_bytes), INF)) - 1
        if k < 0:
            proved = self.thin == 0 or isinstance(self.tables, Tables)
            status = Status.INFEASIBLE if proved else Status.UNKNOWN
            return Solution(status=status, least_bytes=self.least_bytes, solver="frontier")
        need, time = self.points[k]
        if isinstance(self.tables, Tables):
            assert self.top is not None
            runs = self.tables.runs(self.top, need)
        else:
            runs = self.tables.runs(need)
        bound = self.bound_ns(budget_bytes) if self._bound is not None else fastest_ns(self.profile)
        return Solution(
            status=Status.OPTIMAL if bound >= time else Status.FEASIBLE,
            runs=runs,
            time_ns=time,
            peak_bytes=need,
            error=error_of(self.profile, runs),
            bound_ns=bound,
            least_bytes=self.least_bytes,
            solver="frontier",
        )

    def next_gain(self, budget_bytes: int) -> tuple[int, int] | None:
        """What a little more memory buys: `(further bytes, ns saved)` up to the next faster point; None at
        the fastest.

        Below the least budget: the bytes missing, and 0.
        """
        k = bisect.bisect_right(self.points, (int(budget_bytes), INF)) - 1
        if k + 1 >= len(self.points):
            return None
        more = self.points[k + 1][0] - int(budget_bytes)
        return (more, self.points[k][1] - self.points[k + 1][1]) if k >= 0 else (more, 0)


def solve_frontier(
    profile: Profile,
    *,
    max_error: float = 1e-4,
    allowed: Choice = ALL_STRATEGIES,
    thin: float = 0.0,
    max_recompute_depth: int | None = None,
) -> Frontier:
    """The frontier of `profile` under `max_error` with the strategies `allowed`.

    **Arguments:** `thin`, the relative loss of time aimed at, 0 for exact. Inside RECOMPUTE runs a stretch's
    merge may lose a factor `1 + thin`, the thinning after it `1 + thin / 2`; at the top level, where losses
    add up along the chain, a tenth of that; moonwalk and invert runs up to `1 + 0.7 thin` a layer. Beforehand
    no more is proved than these factors multiplied. Measured losses are below `thin`; `Frontier.loss` proves
    a bound for the profile at hand, from finer tables (results/solver_scaling). Least need and least time
    stay exact, unless a chain of `_LONG` layers or more has stretches of `_STRETCH` or more identical ones:
    these are taken by `mwplan.solvers.sparse`, and few runs cross from such a stretch into what lies beside
    it (`JoinedTables`); what is proved then is as `mwplan.solvers.relaxed` says. `max_recompute_depth`, how
    deep RECOMPUTE runs may stand inside one another: 0 for none, None for any.
    **Returns:** a `Frontier`. **Raises:** `ArgumentError`. **Cost:** see `Tables`.
    """
    if not isinstance(profile, Profile):
        raise ArgumentError(f"`profile` must be a `Profile`, got {type(profile).__name__}")
    if isinstance(thin, bool) or not isinstance(thin, (int, float)) or not 0 <= thin < 1:
        raise ArgumentError(
            f"`thin={thin!r}` must be a number from 0 up to 1: the relative loss of time allowed"
        )
    depth = max_recompute_depth
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise ArgumentError(f"`max_recompute_depth={depth!r}` must be None or an integer, at least 0")
    check_max_error(max_error)
    chosen = check_allowed(allowed)
    tables: Tables | UniformTables | JoinedTables
    parts = stretches(profile, _STRETCH) if thin and depth is None and len(profile) >= _LONG else []
    if any(uniform for _, _, uniform in parts):
        tables = JoinedTables(profile, parts, max_error=max_error, allowed=chosen, thin=thin)
    elif not thin and depth is None and len(profile) >= _UNIFORM and is_uniform(profile):
        tables = UniformTables(profile, max_error=max_error, allowed=chosen)
    else:
        candidates = Candidates(profile, max_error=max_error, allowed=chosen, loss=thin * _LABEL)
        tables = Tables(candidates, depth, loss=thin / 4)
    return Frontier(profile, tables, max_error=max_error, allowed=chosen, thin=thin)
