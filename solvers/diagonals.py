r"""All stretches of one length at once: how the tables of inner schedules are filled.

`T[s, r, e]` depends on shorter stretches only, so those of one length are independent: bounds (`mwplan.solvers.splits`) are taken, what they leave of runs and
cells is evaluated, sorted and thinned for all stretches of a length together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.solvers.pareto import INF, Ints
from mwplan.solvers.splits import BLOCK, MARGIN, Buffer, Pairs, Shifts

Stairs = tuple[Ints, Ints]
Samples = NDArray[np.float32]
_INF = np.float32(np.inf)
#: about so many groups are bounded at once: their bounds should stay in a processor's cache
_GROUPS = 1_500


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


class _Cells:
    """The groups of many stretches, none without any, in cells: what bounds say of them.

    `limit[w, q]`: what stretch `w` is known to take at the beginning of cell `q`, infinite for the first (there are columns up to the end of the last block); `goal`: below it, a group is evaluated. Blocks: of cells.
    `rough[p]`: the bounds of group `p` in each block, from below, and at the beginnings of the blocks but the first, from above; `least`: the smallest of each stretch;
    `alive`: which groups may matter in which blocks. Of those (`group`, in order of `stretch` and block, at `cells`), `lower` and `upper` bound in each cell and at its end.
    """

    def __init__(
        self, ways: list[Ways], names: Ints, left: Buffer, right: Buffer, shifts: Shifts, slack: float
    ) -> None:
        self.names, self.left, self.right, self.slack = names, left, right, slack
        self.budgets = budgets = right.grid
        counts = np.array([way.pairs.left.size for way in ways])
        self.pairs = pairs = _joined([way.pairs for way in ways])
        self.of = np.repeat(np.arange(len(ways)), counts)
        self.begins = np.cumsum(counts) - counts
        n, width = budgets.size, right.samples.shape[1]
        self.first = np.arange(0, n + 1, BLOCK)
        blocks = self.first.size
        samples = right.samples.ravel()
        self.rough = left.rough[pairs.left]
        self.rough += samples.take(pairs.right[:, None] * width + shifts.rough[pairs.moved])
        self.least = np.minimum.reduceat(self.rough, self.begins, axis=0)
        self.limit: Samples = np.full((len(ways), blocks * BLOCK + 1), _INF, dtype=np.float32)
        for row, way in zip(self.limit, ways):
            if way.known[0].size:
                at = way.known[0].searchsorted(budgets, side="right")
                row[1 : n + 1] = np.append(np.inf, way.known[1])[at]
        ahead = self.first[1:]
        self.limit[:, ahead] = np.minimum(self.limit[:, ahead], self.least[:, blocks:])
        np.minimum.accumulate(self.limit, axis=1, out=self.limit)
        factor = np.float32((1 + MARGIN) / (1 + slack))
        # A group left out here takes at least 1 / (1 + slack) of what is known at the block's beginning, and so in all of its cells.
        self.alive = self.rough[:, :blocks] < (self.limit[:, self.first] * factor)[self.of]
        self.group, block = _places(self.alive)
        order = np.argsort(self.of[self.group] * blocks + block, kind="stable")
        self.group, block = self.group[order], block[order]
        self.stretch = self.of[self.group]
        self.cells = block[:, None] * BLOCK + np.arange(BLOCK)
        cells = np.minimum(self.cells, n)
        ends = np.minimum(self.cells, n - 1) + (n + 1)
        own = pairs.left[self.group, None] * left.samples.shape[1]
        rest, shift = pairs.right[self.group, None] * width, pairs.moved[self.group, None] * (2 * n + 1)
        mine, table = left.samples.ravel(), shifts.table.ravel()
        self.lower = mine.take(own + cells) + samples.take(rest + table.take(shift + cells))
        self.upper = mine.take(own + ends) + samples.take(rest + table.take(shift + ends))
        self.lower[self.cells > n] = _INF
        self.upper[self.cells >= n] = _INF
        key = self.stretch * blocks + block
        self.cuts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: key.size])
        self.part = np.cumsum(np.bincount(self.cuts, minlength=key.size)) - 1
        if key.size:
            #: the smallest upper bounds in a block
            self.best = np.minimum.reduceat(self.upper, self.cuts, axis=0)
            where = self.stretch[self.cuts, None], self.cells[self.cuts] + 1
            self.limit[where] = np.minimum(self.limit[where], self.best)
            np.minimum.accumulate(self.limit, axis=1, out=self.limit)
        self.goal = self.limit * factor

    def add_to(self, points: _Points, optimistic: bool) -> None:
        """Adds the groups' points that make the envelopes, within what may be lost."""
        good = self.lower < self.goal[self.stretch[:, None], self.cells]
        entry, place = _places(good)
        pairs = self.pairs.take(self.group[entry])
        names = self.names[self.stretch[entry]]
        for pair, need, time in pairs.steps(self.left, self.right, self.cells[entry, place]):
            points.add(names[pair], need, time)
        if self.slack and optimistic:
            self._add_floors(points, good)
        elif self.slack:
            self._add_sure(points)

    def _add_sure(self, points: _Points) -> None:
        """The schedules that `limit` counts on, and the fastest."""
        blocks = self.first.size
        entry = place = np.zeros(0, dtype=np.int64)
        if self.group.size:
            stretch, cells = self.stretch[self.cuts, None], self.cells[self.cuts]
            useful = (self.best < self.limit[stretch, cells]) & (self.best <= self.limit[stretch, cells + 1])
            entry, place = _places(self.upper == np.where(useful, self.best, -1)[self.part])
        ahead = self.first[1:]
        least = self.least[:, blocks:]
        useful = (least < self.limit[:, ahead - 1]) & (least <= self.limit[:, ahead])
        group, block = _places(self.rough[:, blocks:] == np.where(useful, least, -1)[self.of])
        fastest = self.rough[:, blocks - 1]
        fast = np.flatnonzero(fastest <= self.least[self.of, blocks - 1] * np.float32(1 + MARGIN))
        chosen = np.concatenate([self.group[entry], group, fast])
        budget = np.concatenate(
            [
                self.budgets[self.cells[entry, place]],
                self.budgets[ahead[block] - 1],
                np.full(fast.size, self.right.span - 1),
            ]
        )
        need, time = self.pairs.take(chosen).values(self.left, self.right, budget)
        ok = time < INF
        points.add(self.names[self.of[chosen[ok]]], need[ok], time[ok])

    def _add_floors(self, points: _Points, good: NDArray[np.bool_]) -> None:
        """Where groups are not evaluated: their lower bounds as points at the beginnings of blocks and cells."""
        blocks = self.first.size
        out = np.where(self.alive, _INF, self.rough[:, :blocks])
        rough = np.minimum.reduceat(out, self.begins, axis=0)
        stretch, block = np.nonzero(rough < self.limit[:, self.first] * np.float32(1 + MARGIN))
        self._add_floor(points, stretch, self.first[block], rough[stretch, block])
        if self.group.size:
            fine = np.minimum.reduceat(np.where(good, _INF, self.lower), self.cuts, axis=0)
            stretch, cells = self.stretch[self.cuts], self.cells[self.cuts]
            part, place = np.nonzero(fine < self.limit[stretch[:, None], cells] * np.float32(1 + MARGIN))
            self._add_floor(points, stretch[part], cells[part, place], fine[part, place])

    def _add_floor(self, points: _Points, stretch: Ints, cell: Ints, bound: Samples) -> None:
        # Nothing is left out of the first cell.
        keep = cell > 0
        stretch, cell, bound = stretch[keep], cell[keep], bound[keep]
        time = np.floor(bound.astype(np.float64) * (1 - MARGIN)).astype(np.int64)
        points.add(self.names[stretch], self.budgets[cell - 1] + 1, time)


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
