"""A long chain in parts, from the last to the first: stretches of identical layers, and what lies between."""

from __future__ import annotations

from collections.abc import Callable

from mwplan.plans.schedule import Run
from mwplan.solvers.approach import Approach
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.pareto import Stairs
from mwplan.solvers.parts import Place, part
from mwplan.solvers.problem import Problem
from mwplan.solvers.sparse import SparseTables
from mwplan.solvers.tables import Tables
from mwplan.solvers.top import Top

_Read = Callable[[bool, int], tuple[tuple[Run, ...], bool, int]]


class JoinedTables:
    """The top level of a chain in parts: long stretches of identical layers by `mwplan.solvers.sparse`, the
    rest by `mwplan.solvers.tables`.

    Each part's staircases end in those of what follows. No run crosses a joint but RECOMPUTE runs into
    identical layers from at most `Tuning.near_layers` layers before them (`mwplan.solvers.approach`).
    **Arguments:** `problem`, whose `thin` must not be 0; `parts`, as `mwplan.solvers.parts.stretches` gives
    them. **Cost:** the sum of the parts'.
    """

    def __init__(self, problem: Problem, parts: list[tuple[int, int, bool]]) -> None:
        self._read: list[_Read] = []
        profile, tuning = problem.profile, problem.tuning
        ends: tuple[Stairs, Stairs] | None = None
        sparse: SparseTables | None = None  # of the part that follows
        for start, stop, uniform in reversed(parts):
            place = Place(whole=profile, first=start, ends=ends)
            here = problem.of(part(profile, start, stop))
            if uniform:
                sparse = SparseTables(here, place)
                ends = (sparse.points(False), sparse.points(True))
                self._read.insert(0, sparse.read)
                continue
            loss = problem.thin * tuning.identical_label_share
            candidates = Candidates(here, loss=loss, whole=len(profile))
            tables = Tables(candidates, thin=problem.thin, place=place)
            if sparse and sparse.nested and stop - start <= tuning.near_layers:
                approach = Approach(tables, sparse)
                ends = (approach.points(False), approach.points(True))
                self._read[0] = approach.read
            else:
                top = Top(tables)
                ends = (top.stairs(False), top.stairs(True))
                self._read.insert(0, top.read)
            sparse = None
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
