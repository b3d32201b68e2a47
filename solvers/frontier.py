"""The exact time-memory frontier: every budget at once, and the fastest schedule at each.

`mwplan.solvers.tables` says how it is found and why it is exact.
"""

from __future__ import annotations

import bisect

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Solution, Status
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.joined import JoinedTables
from mwplan.solvers.pareto import INF
from mwplan.solvers.parts import is_uniform, stretches
from mwplan.solvers.predictions import error_of, fastest_ns
from mwplan.solvers.problem import Problem
from mwplan.solvers.relaxed import lower_bound
from mwplan.solvers.tables import Tables
from mwplan.solvers.top import Top
from mwplan.solvers.uniform import UniformTables


class Frontier:
    """The Pareto set of `(need, time)` of all schedules of a problem, and the schedules themselves.

    `points`: tuples `(need_bytes, time_ns)` of temporaries and time, need increasing, time decreasing; all of
    them if the problem is not `thin`. `problem`: what it is of, without budget and side conditions.
    """

    def __init__(self, problem: Problem, tables: Top | UniformTables | JoinedTables) -> None:
        self.problem, self.tables = problem.unconditional(), tables
        #: the tables of all suffixes, where there are any
        self.top = tables if isinstance(tables, Top) else None
        need, time = tables.stairs() if isinstance(tables, Top) else tables.points()
        self.points: tuple[tuple[int, int], ...] = tuple(zip(need.tolist(), time.tolist()))
        self._bound: tuple[tuple[int, int], ...] | None = None if problem.thin else self.points

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
            problem, tuning = self.problem, self.problem.tuning
            if self.top is None:
                parts = stretches(problem.profile, tuning.stretch_layers)
                need, time = lower_bound(problem, parts)
            else:
                tables = self.top.tables
                loss = tables.candidates.loss * tuning.bound_label_share
                candidates = Candidates(problem, loss=loss, optimistic=True)
                thin = tables.thin * tuning.bound_share
                need, time = Top(Tables(candidates, thin=thin, optimistic=True)).stairs()
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
            proved = not self.problem.thin or self.top is not None
            status = Status.INFEASIBLE if proved else Status.UNKNOWN
            return Solution(status=status, least_bytes=self.least_bytes, solver="frontier")
        need, time = self.points[k]
        runs, profile = self.tables.runs(need), self.problem.profile
        bound = self.bound_ns(budget_bytes) if self._bound is not None else fastest_ns(profile)
        return Solution(
            status=Status.OPTIMAL if bound >= time else Status.FEASIBLE,
            runs=runs,
            time_ns=time,
            peak_bytes=need,
            error=error_of(profile, runs),
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


def solve_frontier(problem: Problem) -> Frontier:
    """The frontier of a problem without side conditions, whatever its budget.

    `Problem.thin` is the relative loss of time aimed at, 0 for exact. Inside RECOMPUTE runs a stretch's merge
    may lose a factor `1 + thin`, the thinning after it `1 + thin / 2`; at the top level, where losses add up
    along the chain, a tenth of that; moonwalk and invert runs up to `1 + 0.7 thin` a layer (`Tuning`).
    Beforehand no more is proved than these factors multiplied. Measured losses are below `thin`;
    `Frontier.loss` proves a bound for the profile at hand, from finer tables (results/solver_scaling). Least
    need and least time stay exact, unless a chain of `Tuning.long_layers` layers or more has stretches of
    `Tuning.stretch_layers` or more identical ones: these are taken by `mwplan.solvers.sparse`, and few runs
    cross from such a stretch into what lies beside it (`mwplan.solvers.joined`); what is proved then is as
    `mwplan.solvers.relaxed` says.
    **Returns:** a `Frontier`. **Raises:** `ArgumentError` on side conditions, which it does not know.
    **Cost:** see `mwplan.solvers.tables.Tables`.

    ```python
    solution = solve_frontier(Problem(profile=profile)).at(2**30)
    ```
    """
    if problem.has_conditions:
        raise ArgumentError(
            "`problem` has side conditions (`pins`, `forbid`, `host_bytes` or `max_distinct_runs`), which a "
            "frontier does not know: use `integer_program.solve`, or `problem.unconditional()`"
        )
    profile, thin, tuning = problem.profile, problem.thin, problem.tuning
    plain, size = problem.max_recompute_depth is None, len(profile)
    long = thin and plain and size >= tuning.long_layers
    parts = stretches(profile, tuning.stretch_layers) if long else []
    if any(uniform for _, _, uniform in parts):
        return Frontier(problem, JoinedTables(problem, parts))
    if not thin and plain and size >= tuning.uniform_layers and is_uniform(profile):
        return Frontier(problem, UniformTables(problem))
    return general_frontier(problem)


def general_frontier(problem: Problem) -> Frontier:
    """The frontier by the tables of all stretches, which side conditions can be looked up in, however many
    layers are identical."""
    problem = problem.unconditional()
    candidates = Candidates(problem, loss=problem.thin * problem.tuning.label_share)
    return Frontier(problem, Top(Tables(candidates, thin=problem.thin)))
