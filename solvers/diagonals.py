r"""All stretches of one length at once: how the tables of inner schedules are filled.

`T[s, r, e]` depends on shorter stretches only, so those of one length are independent: bounds (`mwplan.solvers.splits`) are taken, what they leave of runs and
cells is evaluated, sorted and thinned for all stretches of a length together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.solvers.pareto import INF, Ints
from mwplan.solvers.splits import LEVELS, MARGIN, Buffer, Pairs, Shifts

Stairs = tuple[Ints, Ints]
Samples = NDArray[np.float32]
_INF = np.float32(np.inf)
#: about so many groups are bounded at once: their bounds should stay in a processor's cache
_GROUPS = 4_000


@dataclass(slots=True)
class Ways:
    """How one stretch may begin: by the groups `pairs`, or by a run that is all of it, of which `known` is the staircase."""

    pairs: Pairs
    known: Stairs


@dataclass(slots=True)
class _Points:
    """Points of many staircases, in pieces."""

    of: list[Ints] = field(default_factory=list)
    need: list[Ints] = field(default_factory=list)
    time: list[Ints] = field(default_factory=list)

    def add(self, of: Any, need: Ints, time: Ints) -> None:
        self.of.append(np.broadcast_to(of, need.shape))
        self.need.append(need)
        self.time.append(time)


def envelopes(
    ways: list[Ways], left: Buffer, right: Buffer, shifts: Shifts, *, slack: float, optimistic: bool
) -> tuple[Ints, Ints, Ints]:
    """The lower envelopes of many stretches' groups (`mwplan.solvers.splits`): their staircases one after the other, as stretch, need, time.

    **Arguments:** `ways`, with their groups' rows in `left`, `right` and `shifts`; `slack`, the factor of time that may be lost at each, but for the least need and, but
    for ties within float32, the least time; `optimistic`: then no point is a schedule, but no schedule is faster than the staircase.
    """
    points = _Points()
    for which, way in enumerate(ways):
        if way.known[0].size:
            points.add(which, *way.known)
    some: list[int] = []
    size = 0
    for which, way in enumerate(ways):
        count = way.pairs.left.size
        if some and size + count > _GROUPS:
            _Cells([ways[k] for k in some], np.array(some), left, right, shifts, slack).add_to(
                points, optimistic
            )
            some, size = [], 0
        if count:
            some.append(which)
            size += count
    if some:
        _Cells([ways[k] for k in some], np.array(some), left, right, shifts, slack).add_to(points, optimistic)
    if not points.of:
        none = np.zeros(0, dtype=np.int64)
        return none, none, none
    return staircases(
        np.concatenate(points.of), np.concatenate(points.need), np.concatenate(points.time), right.span
    )


@dataclass(slots=True)
class _Level:
    """Groups in some intervals of cells each, those of one stretch and one interval of the level before in a row: in `index`, which end with the cells `last`.

    `lower` and `upper` bound each in the interval and at its end; `best`: the smallest upper bounds of a row, the first of each of which `cuts` holds and `part` numbers.
    """

    group: Ints
    stretch: Ints
    index: Ints
    last: Ints
    lower: Samples
    upper: Samples
    best: Samples
    cuts: Ints
    part: Ints
    alive: NDArray[np.bool_]


class _Cells:
    """The groups of many stretches, none without any, in cells: what bounds say of them, in `LEVELS` of finer and finer intervals.

    `limit[w, q]`: what stretch `w` is known to take at the beginning of cell `q`, infinite for the first (there are columns up to the end of the last interval). Below that, but
    for what may be lost, a group is looked at more closely in the end.
    """

    def __init__(
        self, ways: list[Ways], names: Ints, left: Buffer, right: Buffer, shifts: Shifts, slack: float
    ) -> None:
        self.names, self.left, self.right, self.shifts, self.slack = names, left, right, shifts, slack
        self.budgets = budgets = right.grid
        counts = np.array([way.pairs.left.size for way in ways])
        self.pairs = _joined([way.pairs for way in ways])
        self.of = np.repeat(np.arange(len(ways)), counts)
        n = budgets.size
        count = -(-(n + 1) // LEVELS[0])
        self.limit: Samples = np.full((len(ways), count * LEVELS[0] + 1), _INF, dtype=np.float32)
        for row, way in zip(self.limit, ways):
            if way.known[0].size:
                at = way.known[0].searchsorted(budgets, side="right")
                row[1 : n + 1] = np.append(np.inf, way.known[1])[at]
        #: a group left out of an interval takes at least 1 / (1 + slack) of what is known at its beginning, and so in all of its cells
        self.factor = np.float32((1 + MARGIN) / (1 + slack))
        self.levels = [self._coarsest(count)]
        for wider, width in itertools.pairwise(LEVELS):
            self.levels.append(self._finer(self.levels[-1], wider // width, width))

    def _coarsest(self, count: int) -> _Level:
        """All groups in all intervals."""
        pairs, samples = self.pairs, self.right.samples
        rough = self.left.rough[pairs.left]
        columns = self.shifts.rough[pairs.moved]
        rough += samples.ravel().take(pairs.right[:, None] * samples.shape[1] + columns)
        upper = np.full((self.of.size, count), _INF, dtype=np.float32)
        upper[:, :-1] = rough[:, count:]
        group = np.arange(self.of.size)
        index = np.broadcast_to(np.arange(count), upper.shape)
        return self._bounded(group, index, LEVELS[0], rough[:, :count], upper)

    def _finer(self, level: _Level, ratio: int, width: int) -> _Level:
        """Those groups that may matter, where they may, in intervals of `width` cells."""
        entry, place = _places(level.alive)
        group, parent = level.group[entry], level.index[entry, place]
        order = np.argsort(self.of[group] * self.limit.shape[1] + parent, kind="stable")
        group, parent = group[order], parent[order]
        n, pairs, samples = self.budgets.size, self.pairs, self.right.samples
        index = parent[:, None] * ratio + np.arange(ratio)
        last = index * width + (width - 1)
        cells, ends = np.minimum(last, n), np.minimum(last, n - 1) + (n + 1)
        mine, table, rest = self.left.samples.ravel(), self.shifts.table.ravel(), samples.ravel()
        own = pairs.left[group, None] * self.left.samples.shape[1]
        row, shift = pairs.right[group, None] * samples.shape[1], pairs.moved[group, None] * (2 * n + 1)
        lower = mine.take(own + cells) + rest.take(row + table.take(shift + cells))
        upper = mine.take(own + ends) + rest.take(row + table.take(shift + ends))
        lower[index * width > n] = _INF
        upper[last >= n] = _INF
        return self._bounded(group, index, width, lower, upper)

    def _bounded(self, group: Ints, index: Ints, width: int, lower: Samples, upper: Samples) -> _Level:
        """Counts on the upper bounds, and says which groups may matter then."""
        stretch = self.of[group]
        last = index * width + (width - 1)
        key = stretch * self.limit.shape[1] + index[:, 0]
        cuts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: key.size])
        part = np.cumsum(np.bincount(cuts, minlength=key.size)) - 1
        best = upper
        if key.size:
            best = np.minimum.reduceat(upper, cuts, axis=0)
            where = stretch[cuts, None], last[cuts] + 1
            self.limit[where] = np.minimum(self.limit[where], best)
            np.minimum.accumulate(self.limit, axis=1, out=self.limit)
        known = self.limit[stretch[cuts, None], last[cuts] - (width - 1)] * self.factor
        return _Level(group, stretch, index, last, lower, upper, best, cuts, part, lower < known[part])

    def add_to(self, points: _Points, optimistic: bool) -> None:
        """Adds the groups' points that make the envelopes, within what may be lost."""
        cells = self.levels[-1]
        entry, place = _places(cells.alive)
        pairs = self.pairs.take(cells.group[entry])
        names = self.names[cells.stretch[entry]]
        for pair, need, time in pairs.steps(self.left, self.right, cells.last[entry, place]):
            points.add(names[pair], need, time)
        if self.slack and optimistic:
            for level, width in zip(self.levels, LEVELS):
                self._add_floors(points, level, width)
        elif self.slack:
            self._add_sure(points)

    def _add_sure(self, points: _Points) -> None:
        """The schedules that `limit` counts on, and the fastest."""
        chosen, cell = [], []
        for level in self.levels:
            at = level.stretch[level.cuts, None], level.last[level.cuts]
            useful = (level.best < self.limit[at]) & (level.best <= self.limit[at[0], at[1] + 1])
            if level is not self.levels[0]:
                # Where an interval ends the one before it ends too.
                useful[:, -1] = False
            entry, place = _places(level.upper == np.where(useful, level.best, -1)[level.part])
            chosen.append(level.group[entry])
            cell.append(level.last[entry, place])
        self._add_values(points, np.concatenate(chosen), self.budgets[np.concatenate(cell)])
        first = self.levels[0]
        fastest = first.lower[:, -1]
        least = np.minimum.reduceat(fastest, first.cuts)[first.part] * np.float32(1 + MARGIN)
        fast = np.flatnonzero(fastest <= least)
        self._add_values(points, fast, np.full(fast.size, self.right.span - 1))

    def _add_values(self, points: _Points, group: Ints, budget: Ints) -> None:
        need, time = self.pairs.take(group).values(self.left, self.right, budget)
        ok = time < INF
        points.add(self.names[self.of[group[ok]]], need[ok], time[ok])

    def _add_floors(self, points: _Points, level: _Level, width: int) -> None:
        """Where groups are left out: their lower bounds as points at the beginnings of intervals."""
        if not level.group.size:
            return
        bound = np.minimum.reduceat(np.where(level.alive, _INF, level.lower), level.cuts, axis=0)
        stretch, cells = level.stretch[level.cuts, None], level.last[level.cuts] - (width - 1)
        # Nothing is left out of the first cell.
        part, place = np.nonzero((bound < self.limit[stretch, cells] * np.float32(1 + MARGIN)) & (cells > 0))
        time = np.floor(bound[part, place].astype(np.float64) * (1 - MARGIN)).astype(np.int64)
        points.add(self.names[stretch[part, 0]], self.budgets[cells[part, place] - 1] + 1, time)


def _places(which: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """`numpy.nonzero` of a matrix, which is slow for large ones."""
    row, column = np.divmod(np.flatnonzero(which), which.shape[1])
    return row, column


def _joined(pairs: list[Pairs]) -> Pairs:
    return Pairs(
        *(
            np.concatenate([getattr(x, name) for x in pairs])
            for name in ("left", "right", "held", "floor", "moved")
        )
    )


def staircases(of: Ints, need: Ints, time: Ints, span: int) -> tuple[Ints, Ints, Ints]:
    """The Pareto sets of the points of each stretch, in order."""
    order = np.argsort(of * span + need)
    of, need, time = of[order], need[order], time[order]
    if not of.size:
        return of, need, time
    high = int(time.max()) + 1
    if high * (int(of[-1]) + 2) >= 2**62:
        # Ranks decide as well, and are small.
        rank = np.unique(time, return_inverse=True)[1]
        high = of.size + 1
    else:
        rank = time
    # Those of later stretches lie below all earlier ones, so that the running minimum begins anew with each.
    low = rank - of * high
    keep = np.append(True, low[1:] < np.minimum.accumulate(low)[:-1])
    of, need, time = of[keep], need[keep], time[keep]
    last = np.append((of[1:] != of[:-1]) | (need[1:] != need[:-1]), True)
    return of[last], need[last], time[last]


def grouped_all(
    of: Ints, forward: Ints, back: Ints, held: Ints, time: Ints, waiting: int, span: int
) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints]:
    """`mwplan.solvers.splits.grouped` of many: for each group, which of `of` it is from, `F` and `H`; then all their staircases, as group, need, time."""
    forward = np.where(forward + waiting <= back, 0, forward)
    order = np.lexsort((held, forward, of))
    of, forward, back, held, time = (x[order] for x in (of, forward, back, held, time))
    new = (of[1:] != of[:-1]) | (forward[1:] != forward[:-1]) | (held[1:] != held[:-1])
    new = np.append(True, new)[: of.size]
    group, first = np.cumsum(new) - 1, np.flatnonzero(new)
    return of[first], forward[first], held[first], *staircases(group, back, time, span)


def thinned_all(
    of: Ints, need: Ints, time: Ints, loss: float, *, optimistic: bool
) -> tuple[Ints, Ints, Ints]:
    """`mwplan.solvers.pareto.thinned` of each."""
    begins = np.append(True, of[1:] != of[:-1])
    ends = np.append(begins[1:], True)
    least = time[ends][np.cumsum(begins) - 1]
    group = np.floor(np.log(np.maximum(time, 1) / np.maximum(least, 1)) / np.log1p(loss))
    first = begins | np.append(True, group[1:] != group[:-1]) | (least <= 0)
    if not optimistic:
        keep = first | ends
        return of[keep], need[keep], time[keep]
    index = np.flatnonzero(first)
    return of[index], need[index], time[np.append(index[1:], time.size) - 1]
