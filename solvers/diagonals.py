r"""All stretches of one length at once: how the tables of inner schedules are filled.

`T[s, r, e]` depends on shorter stretches only, so those of one length are independent: bounds
(`mwplan.solvers.splits`) are taken, what they leave of runs and cells is evaluated, sorted and thinned for
all stretches of a length together.
"""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.solvers.parallel import each, parts
from mwplan.solvers.pareto import INF, Ints, begins, ends, lexicographic
from mwplan.solvers.splits import MARGIN, Buffer, Pairs, Shifts

#: points of many staircases, one after the other: of which, need, time
Points = tuple[Ints, Ints, Ints]
NO_POINTS: Points = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
Samples = NDArray[np.float32]
_INF = np.float32(np.inf)


@dataclass(slots=True)
class Pieces:
    """Points of many staircases, in pieces."""

    of: list[Ints] = field(default_factory=list)
    need: list[Ints] = field(default_factory=list)
    time: list[Ints] = field(default_factory=list)

    def add(self, of: Any, need: Ints, time: Ints) -> None:
        """Adds points of one staircase or of several."""
        self.of.append(np.broadcast_to(of, need.shape))
        self.need.append(need)
        self.time.append(time)

    def joined(self) -> Points:
        """All of them, as stretch, need, time."""
        if not self.of:
            return NO_POINTS
        return np.concatenate(self.of), np.concatenate(self.need), np.concatenate(self.time)


def envelopes(
    of: Ints,
    pairs: Pairs,
    known: Points,
    left: Buffer,
    right: Buffer,
    shifts: Shifts,
    *,
    slack: float,
    optimistic: bool,
) -> Points:
    """The lower envelopes of many stretches' groups (`mwplan.solvers.splits`): their staircases one after the
    other, as stretch, need, time.

    **Arguments:** `of`, in order: the stretch of each of the groups `pairs`, whose rows are in `left`,
    `right` and `shifts`; `known`, staircases of runs that are all of a stretch, as they are returned;
    `slack`, the factor of time that may be lost at each, but for the least need and, but for ties within
    float32, the least time; `optimistic`: then no point is a schedule, but no schedule is faster than the
    staircase.
    """
    if not of.size:
        return staircases(*known, right.grid.span)
    # Cut between stretches, each time at or before where parts of one size would begin.
    tuning = right.grid.tuning
    number = parts(of.size, tuning.groups_most, tuning.groups_least)
    first = np.flatnonzero(begins(of))
    cuts = first[np.unique(first.searchsorted(np.arange(number) * of.size // number, side="right") - 1)]
    chunks = [slice(*x) for x in itertools.pairwise([*cuts.tolist(), of.size])]
    # What is known of stretches without groups goes with those before.
    ends = known[0].searchsorted(of[cuts[1:]]).tolist()
    beside = [slice(*x) for x in itertools.pairwise([0, *ends, known[0].size])]

    def envelope(which: tuple[slice, slice]) -> Points:
        some, part = which
        mine = known[0][part], known[1][part], known[2][part]
        points = Pieces([mine[0]], [mine[1]], [mine[2]])
        _Cells(of[some], pairs.take(some), mine, left, right, shifts, slack).add_to(points, optimistic)
        return staircases(*points.joined(), right.grid.span)

    of_, need, time = zip(*each(envelope, list(zip(chunks, beside))))
    return np.concatenate(of_), np.concatenate(need), np.concatenate(time)


class _Scratch(threading.local):
    """Arrays of one thread that are used again and again: the system takes longer to hand out new memory
    than is worked on it."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], NDArray[Any]] = {}

    def array(self, name: str, number: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array of that shape, with whatever numbers; the next of this name and number has the same
        memory."""
        size = math.prod(shape)
        found = self._arrays.get((name, number))
        if found is None or found.size < size:
            found = self._arrays[name, number] = np.empty(size, dtype)
        return found[:size].reshape(shape)


_scratch = _Scratch()


@dataclass(slots=True)
class _Level:
    """Groups in some intervals of cells each: those of one interval of the level before, `parent`, in a row.
    Those of one stretch and `parent` follow each other: a part.

    `lower` bounds each in the intervals. `cuts` holds the first of each part and `part` numbers them;
    `stretch` and `last` are theirs: the stretch and the last cells of the intervals. `upper` bounds at the
    ends of intervals those that are the least by `lower` in one, `of` says which; `best`: the smallest of
    these of each part.
    """

    group: Ints
    parent: Ints
    lower: Samples
    of: Ints
    upper: Samples
    best: Samples
    cuts: Ints
    part: Ints
    stretch: Ints
    last: Ints
    alive: NDArray[np.bool_]


class _Cells:
    """The groups of many stretches in cells: what bounds say of them, in `Grid.levels` of finer and finer
    intervals.

    `limit[w, q]`: what stretch `w` is known to take at the beginning of cell `q`, infinite for the first
    (there are columns up to the end of the last interval). Below that, but for what may be lost, a group is
    looked at more closely in the end.
    """

    def __init__(
        self,
        of: Ints,
        pairs: Pairs,
        known: Points,
        left: Buffer,
        right: Buffer,
        shifts: Shifts,
        slack: float,
    ) -> None:
        self.left, self.right, self.shifts, self.slack = left, right, shifts, slack
        self.pairs, budgets = pairs, right.grid.budgets
        new = begins(of)
        #: names of the stretches, which are numbered from 0 here
        self.names, self.of = of[new], np.cumsum(new) - 1
        count, self.widths = left.columns[0].shape[1], right.grid.levels
        width = count * self.widths[0] + 1
        self.limit: Samples = np.full((self.names.size, width), _INF, dtype=np.float32)
        cuts = known[0].searchsorted([self.names, self.names + 1]).T.tolist() if known[0].size else []
        for row, (begin, end) in zip(self.limit, cuts):
            if end > begin:
                at = known[1][begin:end].searchsorted(budgets, side="right")
                row[1 : budgets.size + 1] = np.append(np.inf, known[2][begin:end])[at]
        #: a group left out of an interval takes at least 1 / (1 + slack) of what is known at its beginning,
        #: and so in all of its cells
        self.factor = np.float32((1 + MARGIN) / (1 + slack))
        group = np.arange(self.of.size)
        self.levels = [self._level(0, group, np.zeros_like(group))]
        for number in range(1, len(self.widths)):
            self.levels.append(self._level(number, *self._left_over(self.levels[-1])))

    @staticmethod
    def _left_over(level: _Level) -> tuple[Ints, Ints]:
        """The groups that may matter, and the numbers of the intervals where they may, those of one stretch
        and interval together."""
        # Group by group within each column.
        size, ratio = level.alive.shape
        which = np.flatnonzero(level.alive.T)
        column = which // max(1, size)
        which -= column * size
        return level.group[which], level.parent[which] * ratio + column

    def _bounds(self, number: int, side: int, group: Ints, parent: Ints) -> Samples:
        """Bounds of `group` in the intervals of level `number` within `parent`: from below (`side` 0), or at
        their ends from above (1). There until the next of the same kind."""
        pairs, samples = self.pairs, self.right.samples
        sheet, shift = self.left.sheets[number], self.shifts.sheets[number]
        _, count, ratio = sheet.shape
        size = (group.size, ratio)
        # All indices are in range; asked to clip or to wrap them, `take` writes to its place at once, and
        # wraps single ones faster.
        bounds = _scratch.array("bounds", 2 * number + side, size, np.float32)
        sheet.reshape(-1, ratio).take(pairs.left[group] * count + parent, axis=0, out=bounds, mode="clip")
        columns = _scratch.array("columns", 0, size, shift.dtype)
        row = (pairs.moved[group] * count + parent) * 2 + side
        shift.reshape(-1, ratio).take(row, axis=0, out=columns, mode="clip")
        index = _scratch.array("index", 0, size, np.intp)
        np.add(columns, (pairs.right[group] * samples.shape[1])[:, None], out=index)
        suffix = _scratch.array("suffix", 0, size, np.float32)
        samples.ravel().take(index, out=suffix, mode="wrap")
        bounds += suffix
        if side:
            np.copyto(bounds, _INF, where=self.shifts.ends[number][parent] < pairs.floor[group, None])
        return bounds

    def _level(self, number: int, group: Ints, parent: Ints) -> _Level:
        """Bounds `group` in the intervals of level `number` that are within `parent`, counts on the upper
        bounds, and says which groups may matter then."""
        width = self.widths[number]
        _, count, ratio = self.left.sheets[number].shape
        lower = self._bounds(number, 0, group, parent)

        stretch = self.of[group]
        key = stretch * count + parent
        new = begins(key)
        cuts, part = np.flatnonzero(new), np.cumsum(new) - 1
        stretch = stretch[cuts]
        last = (parent[cuts, None] * ratio + np.arange(1, ratio + 1)) * width - 1
        own = _scratch.array("known", 0, lower.shape, np.float32)
        alive = _scratch.array("alive", number, lower.shape, np.bool_)
        best = np.full(last.shape, _INF, dtype=np.float32)
        of, upper = part[:0], lower[:0]
        if key.size:
            # Upper bounds of those that are the least from below are hardly worse than those of all.
            least = np.minimum.reduceat(lower, cuts, axis=0) * np.float32(1 + MARGIN)
            least.take(part, axis=0, out=own, mode="clip")
            of = np.flatnonzero(np.less(lower, own, out=alive)) // ratio
            of = of[begins(of)]
        if of.size:
            upper = self._bounds(number, 1, group[of], parent[of])
            first = np.flatnonzero(begins(part[of]))
            best[part[of[first]]] = np.minimum.reduceat(upper, first, axis=0)
            where = stretch[:, None], last + 1
            self.limit[where] = np.minimum(self.limit[where], best)
            np.minimum.accumulate(self.limit, axis=1, out=self.limit)
        known = self.limit[stretch[:, None], last - (width - 1)] * self.factor
        known.take(part, axis=0, out=own, mode="clip")
        np.less(lower, own, out=alive)
        return _Level(group, parent, lower, of, upper, best, cuts, part, stretch, last, alive)

    def add_to(self, points: Pieces, optimistic: bool) -> None:
        """Adds the groups' points that make the envelopes, within what may be lost."""
        group, cell = self._left_over(self.levels[-1])
        pairs, names = self.pairs.take(group), self.names[self.of[group]]
        for pair, need, time in pairs.steps(self.left, self.right, self.shifts, cell):
            points.add(names[pair], need, time)
        if self.slack and optimistic:
            for level, width in zip(self.levels, self.widths):
                self._add_floors(points, level, width)
        elif self.slack:
            self._add_sure(points)

    def _add_sure(self, points: Pieces) -> None:
        """The schedules that `limit` counts on, and the fastest."""
        chosen, cell = [], []
        for level in self.levels:
            if not level.group.size:
                continue
            at = level.stretch[:, None], level.last
            useful = (level.best < self.limit[at]) & (level.best <= self.limit[at[0], at[1] + 1])
            if level is not self.levels[0]:
                # Where an interval ends the one before it ends too.
                useful[:, -1] = False
            asked = np.where(useful, level.best, -1).take(level.part[level.of], axis=0)
            entry, place = np.divmod(np.flatnonzero(level.upper == asked), asked.shape[1])
            entry = level.of[entry]
            chosen.append(level.group[entry])
            cell.append(level.last[level.part[entry], place])
        first = self.levels[0]
        fastest = first.lower[:, -1]
        least = np.minimum.reduceat(fastest, first.cuts)[first.part] * np.float32(1 + MARGIN)
        fast = np.flatnonzero(fastest <= least)
        chosen.append(fast)
        cell.append(np.full(fast.size, self.right.grid.budgets.size))
        group = np.concatenate(chosen)
        need, time = self.pairs.take(group).values_at(
            self.left, self.right, self.shifts, np.concatenate(cell)
        )
        ok = time < INF
        points.add(self.names[self.of[group[ok]]], need[ok], time[ok])

    def _add_floors(self, points: Pieces, level: _Level, width: int) -> None:
        """Where groups are left out: their lower bounds as points at the beginnings of intervals."""
        if not level.group.size:
            return
        bound = np.minimum.reduceat(np.where(level.alive, _INF, level.lower), level.cuts, axis=0)
        stretch, cells = level.stretch[:, None], level.last - (width - 1)
        # Nothing is left out of the first cell.
        limit = self.limit[stretch, cells] * np.float32(1 + MARGIN)
        part, place = np.nonzero((bound < limit) & (cells > 0))
        time = np.floor(bound[part, place].astype(np.float64) * (1 - MARGIN)).astype(np.int64)
        points.add(self.names[level.stretch[part]], self.right.grid.budgets[cells[part, place] - 1] + 1, time)


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
    last = ends(of, need)
    return of[last], need[last], time[last]


def grouped_all(
    of: Ints, forward: Ints, back: Ints, held: Ints, time: Ints, waiting: int, span: int
) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints]:
    """`mwplan.solvers.splits.grouped` of many: for each group, which of `of` it is from, `F` and `H`; then
    all their staircases, as group, need, time."""
    forward = np.where(forward + waiting <= back, 0, forward)
    order = lexicographic((of, forward, held))
    of, forward, back, held, time = (x[order] for x in (of, forward, back, held, time))
    new = begins(of, forward, held)
    group, first = np.cumsum(new) - 1, np.flatnonzero(new)
    return of[first], forward[first], held[first], *staircases(group, back, time, span)


def thinned_all(
    of: Ints, need: Ints, time: Ints, loss: float, *, optimistic: bool
) -> tuple[Ints, Ints, Ints]:
    """`mwplan.solvers.pareto.thinned` of each."""
    new, last = begins(of), ends(of)
    least = time[last][np.cumsum(new) - 1]
    group = np.floor(np.log(np.maximum(time, 1) / np.maximum(least, 1)) / np.log1p(loss))
    first = begins(of, group) | (least <= 0)
    if not optimistic:
        keep = first | last
        return of[keep], need[keep], time[keep]
    index = np.flatnonzero(first)
    return of[index], need[index], time[np.append(index[1:], time.size) - 1]
