r"""All stretches of one length at once: how the tables of inner schedules are filled.

`T[s, r, e]` depends on shorter stretches only, so those of one length are independent. Bounds (`mwplan.solvers.splits`) are taken stretch by stretch, as
large arrays anyway; what they leave of runs and cells is evaluated, sorted and thinned for all stretches of a length together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.solvers.pareto import INF, Ints
from mwplan.solvers.splits import MARGIN, Buffer, Pairs, floor_points

Stairs = tuple[Ints, Ints]
Samples = NDArray[np.float32]
_INF = np.float32(np.inf)


@dataclass(slots=True)
class Ways:
    """How one stretch may begin: `pairs` (its first `shared` ones hold the same, and `moved` is theirs), `rest` the moves of the others."""

    pairs: Pairs
    shared: int
    moved: NDArray[np.intp]
    rest: NDArray[np.intp]
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
    ways: list[Ways], left: Buffer, right: Buffer, *, slack: float, optimistic: bool
) -> tuple[Ints, Ints, Ints]:
    """The lower envelopes of many stretches' groups (`mwplan.solvers.splits`): their staircases one after the other, as stretch, need, time.

    **Arguments:** `ways`, with their groups' rows in `left` and `right`; `slack`, the factor of time that may be lost at each, but for the least need and, but for
    ties within float32, the least time; `optimistic`: then no point is a schedule, but no schedule is faster than the staircase.
    """
    budgets = right.grid
    n, width = budgets.size, right.samples.shape[1]
    flat = right.samples.ravel()
    chosen: list[Pairs] = []
    cells: list[Ints] = []
    counts: list[int] = []
    sure: list[Pairs] = []
    sure_at: list[Ints] = []
    sure_of: list[Ints] = []
    points = _Points()
    for which, way in enumerate(ways):
        if way.known[0].size:
            points.add(which, *way.known)
        pairs, shared = way.pairs, way.shared
        if not pairs.left.size:
            counts.append(0)
            continue
        bound: Samples = left.samples[pairs.left]
        if shared:
            bound[:shared] += right.samples[pairs.right[:shared]].take(way.moved, axis=1)
        if shared < pairs.left.size:
            bound[shared:] += flat.take(way.rest + pairs.right[shared:, None] * width)
        lowest = bound.min(axis=0)
        upper = lowest[n + 1 :]
        if way.known[0].size:
            at = way.known[0].searchsorted(budgets, side="right")
            upper = np.minimum(upper, np.append(np.inf, way.known[1])[at].astype(np.float32))
        limit = np.append(_INF, np.minimum.accumulate(upper))
        goal = limit * np.float32((1 + MARGIN) / (1 + slack))
        columns = np.flatnonzero(lowest[: n + 1] < goal)
        group, place = np.nonzero(bound[:, columns] < goal[columns])
        counts.append(group.size)
        chosen.append(pairs.take(group))
        cells.append(columns[place])
        if slack and optimistic:
            points.add(which, *floor_points(bound[:, : n + 1], goal, limit, budgets))
        elif slack:
            # The schedules that `limit` counts on, and the fastest.
            useful = np.flatnonzero((lowest[n + 1 :] <= limit[1:]) & (lowest[n + 1 :] < limit[:-1]))
            fastest = np.flatnonzero(bound[:, n] <= lowest[n] * np.float32(1 + MARGIN))
            sure.append(pairs.take(np.append(bound[:, n + 1 + useful].argmin(axis=0), fastest)))
            sure_at.append(np.append(budgets[useful], np.full(fastest.size, right.span - 1)))
            sure_of.append(np.full(useful.size + fastest.size, which))
    if chosen:
        of = np.repeat(np.arange(len(ways)), counts)
        cell = np.concatenate(cells)
        for pair, need, time in _joined(chosen).steps(left, right, cell):
            points.add(of[pair], need, time)
    if sure:
        need, time = _joined(sure).values(left, right, np.concatenate(sure_at))
        ok = time < INF
        points.add(np.concatenate(sure_of)[ok], need[ok], time[ok])
    if not points.of:
        none = np.zeros(0, dtype=np.int64)
        return none, none, none
    return staircases(
        np.concatenate(points.of), np.concatenate(points.need), np.concatenate(points.time), right.span
    )


def _joined(pairs: list[Pairs]) -> Pairs:
    return Pairs(
        *(np.concatenate([getattr(x, name) for x in pairs]) for name in ("left", "right", "held", "floor"))
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
