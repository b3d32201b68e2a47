"""From a staircase's point to the runs behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mwplan.plans.schedule import Run, RunKind, shifted
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.pareto import INF, Stairs
from mwplan.solvers.tables import Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Suffixes:
    """The staircases of the suffixes of one stretch, and what its runs may be.

    `stairs(at, e)`: what is left from a node on; `waiting`: the cotangent beside it; `limit`: up to where
    RECOMPUTE runs may go, by schedules of level `source`; `penalty_ns`: what each run's time has on top.
    """

    candidates: Candidates
    stairs: Callable[[int, bool], Stairs]
    waiting: int
    limit: int
    source: int | None
    penalty_ns: int = 0


@dataclass(slots=True)
class _Stretch:
    """A stretch whose runs are being read: read up to `at`, with `budget` left there."""

    suffixes: Suffixes
    start: int
    at: int
    stop: int
    kept: bool
    budget: int
    runs: list[Run] = field(default_factory=list)


def inner_suffixes(tables: Tables, level: int, stop: int) -> Suffixes:
    """Those of a stretch that ends at `stop`, inside RECOMPUTE runs of `level + 1`."""
    return Suffixes(
        candidates=tables.candidates,
        stairs=lambda at, kept: tables.suffix(level, at, stop, kept),
        waiting=int(tables.candidates.cotangent[stop]),
        limit=stop - 1,
        source=tables.source(level),
    )


def inner_runs(tables: Tables, level: int, start: int, stop: int, kept: bool, budget: int) -> tuple[Run, ...]:
    """The runs of the fastest inner schedule of `(start, stop]` within `budget`."""
    return read(tables, inner_suffixes(tables, level, stop), start, stop, kept, budget)[0]


def read(
    tables: Tables, suffixes: Suffixes, start: int, stop: int, kept: bool, budget: int
) -> tuple[tuple[Run, ...], bool, int]:
    """The runs of the fastest schedule of `(start, stop]` from `(start, kept)` within `budget`, which must
    hold at least one; with `e` at its end and the budget left there. **Cost:** one pass over the candidates
    of each run."""
    # A stack of stretches instead of calls: schedules may nest as deep as the chain is long.
    stack = [_Stretch(suffixes, start, start, stop, kept, budget)]
    first = tables.place.first
    while True:
        x = stack[-1]
        if x.at < x.stop:
            run, at, keeps, rest, here = _first_run(tables, x)
            if run is not None:
                x.runs.append(shifted(run, first) if first else run)
            else:
                source = x.suffixes.source
                assert source is not None
                stack.append(_Stretch(inner_suffixes(tables, source, at), x.at, x.at, at, x.kept, here))
            x.at, x.kept, x.budget = at, keeps, rest
            continue
        stack.pop()
        if not stack:
            return tuple(x.runs), x.kept, x.budget
        run = Run(kind=RunKind.RECOMPUTE, start=x.start + first, stop=x.stop + first, inner=tuple(x.runs))
        stack[-1].runs.append(run)


def _point(found: Stairs, budget: int) -> tuple[int, int]:
    """Need and time of the last point within `budget`."""
    k = int(found[0].searchsorted(budget, side="right")) - 1
    return (int(found[0][k]), int(found[1][k])) if k >= 0 else (INF, INF)


def _first_run(tables: Tables, x: _Stretch) -> tuple[Run | None, int, bool, int, int]:
    """A run that begins a fastest schedule of what is left of `x`, where it ends, the next node's `e`, the
    budget left there, and what the schedule needs of the budget; None for a RECOMPUTE run, whose inner
    schedule may need that much too."""
    s, start, kept = x.suffixes, x.at, x.kept
    c, k, penalty, stairs = s.candidates, s.waiting, s.penalty_ns, s.stairs
    # At a point's own need, thinned staircases too give its time exactly; its own run needs all of that, and
    # where merging overlooked one that takes as long and needs less, that one is another point's.
    budget, time = _point(stairs(start, kept), x.budget)
    atoms = c.atoms(start, kept)
    peak = np.maximum(atoms.forward_peak + k, atoms.backward_peak)
    for row in np.flatnonzero((peak <= budget) & (atoms.stop <= x.stop)):
        at, keeps, held = int(atoms.stop[row]), bool(atoms.keeps_end[row]), int(atoms.held[row])
        need, rest = _point(stairs(at, keeps), budget - held)
        if int(atoms.time[row]) + penalty + rest == time and max(int(peak[row]), held + need) == budget:
            return c.run(start, kept, int(row)), at, keeps, budget - held, budget
    assert s.source is not None
    own = c.own_bytes(start, kept)
    peaks = c.recompute_forward_peak(start, kept)
    for at in range(start + 1, s.limit + 1):
        peak_ = int(peaks[at - start - 1]) + k
        if peak_ > budget:
            break
        inner_need, inner = _point(tables.suffix(s.source, start, at, kept), budget)
        need, rest = _point(stairs(at, False), budget - own)
        spent = int(c.forward_sum[at] - c.forward_sum[start]) + penalty
        if inner + rest + spent == time and max(peak_, inner_need, own + need) == budget:
            return None, at, False, budget - own, budget
    raise AssertionError("a staircase's point has no run behind it")
