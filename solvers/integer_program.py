r"""The fastest schedule with proof, under side conditions that the frontier does not know.

`mwplan.solvers.program` is the integer program, over the runs that `mwplan.solvers.columns` leaves: those in
schedules of time at most a threshold. Thresholds grow until an optimum lies at or below one or time is up.
Without side conditions the first one holds. Before them there is a schedule already
(`mwplan.solvers.incumbents`). Side conditions narrow the runs (`pins`, `forbid`) before the staircases of the
filter are computed, so that the bounds stay tight.
"""

from __future__ import annotations

import dataclasses
import time as clock

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Solution, Status
from mwplan.solvers.columns import Filter
from mwplan.solvers.conditions import Conditioned
from mwplan.solvers.frontier import Frontier
from mwplan.solvers.incumbents import incumbent
from mwplan.solvers.pareto import INF, value_at
from mwplan.solvers.predictions import error_of, fastest_ns
from mwplan.solvers.problem import Problem
from mwplan.solvers.program import Limits, solve_columns

_NAME = "integer_program"
#: above any need
_MOST_BYTES = (2**63 - 1) // 4


def solve(problem: Problem, frontier: Frontier | None = None, *, slack: float = 0.0) -> Solution:
    """The fastest schedule within `budget_bytes`, or the one of least bytes within `limit_ns`, with proof.

    **Arguments:** `problem`, which must give one of the two; its `time_limit_s` is that of the integer
    program, after the frontier and the staircases under the side conditions; `frontier`, of the same profile
    and options, if known; `slack`, how far above the frontier's optimum (relative) runs are still given to
    the integer program.
    **Returns:** a `Solution`. OPTIMAL: proved. FEASIBLE: time was up; `bound_ns` is what was proved, or
    `least_bytes` where bytes are asked for. INFEASIBLE: proved, with `least_bytes` where it is known.
    UNKNOWN: time was up before any schedule was found.
    **Raises:** `ArgumentError`.
    **Cost:** the frontier, if not given; then the filtered program, typically well below a second.

    ```python
    solution = solve(Problem(profile=profile, budget_bytes=2**30, pins={1: "store"}))
    least = solve(Problem(profile=profile, limit_ns=solution.time_ns))
    ```
    """
    if (problem.budget_bytes is None) == (problem.limit_ns is None):
        raise ArgumentError("`problem` must give either `budget_bytes` or `limit_ns`")
    if not 0 <= slack <= 10:
        raise ArgumentError(f"`slack={slack!r}` must be a number from 0 to 10")
    asked = Conditioned.make(problem, frontier)
    if asked.top is None:
        return _by_frontier(asked.frontier, problem)
    return _Search(asked, slack).solve()


def _by_frontier(frontier: Frontier, problem: Problem) -> Solution:
    """The frontier's own answer in either direction."""
    thin = frontier.problem.thin
    if problem.limit_ns is None:
        if thin:
            frontier.bound_ns(problem.budget)  # which `at` then states
        return frontier.at(problem.budget)
    fits = [need for need, time in frontier.points if time <= problem.limit_ns]
    if not fits:
        return Solution(status=Status.UNKNOWN if thin else Status.INFEASIBLE, solver="frontier")
    if thin:
        return dataclasses.replace(frontier.at(fits[0]), status=Status.FEASIBLE, least_bytes=None)
    return dataclasses.replace(frontier.at(fits[0]), least_bytes=fits[0])


class _Search:
    """Thresholds on the objective, time or bytes, growing from `base`, what the staircases say, to `last`;
    `best` is the best schedule so far, and none is below `bound`."""

    def __init__(self, asked: Conditioned, slack: float) -> None:
        problem = asked.problem
        self.asked, self.problem, self.slack = asked, problem, slack
        self.began = clock.monotonic()
        self.deadline = self.began + problem.time_limit_s
        self.need, self.time = asked.staircases.stairs()
        #: thinned staircases are schedules, not bounds
        self.thin = bool(asked.frontier.problem.thin)
        # What a limited memory of the host leaves is not known before.
        self.least = int(self.need[0]) if self.need.size and not asked.host_bytes else None
        self.stats: dict[str, float] = {"solves": 0.0}
        self.best: Solution | None = None
        self.base = self.last = self.bound = 0

    def solve(self) -> Solution:
        """Grows the threshold until the program's optimum lies at or below it."""
        if not self._begin():
            least = None if self.problem.budget_bytes is None else self.least
            return Solution(status=Status.INFEASIBLE, least_bytes=least, solver=_NAME)
        runs = Filter(self.asked)
        thresholds = self._thresholds()
        for theta in thresholds:
            goal = INF if self.best is None else self._value(self.best)
            if self.best is not None:
                theta = min(theta, max(goal, thresholds[0]))
            limits = self._limits(theta)
            columns = runs.columns(limits.budget, limits.theta, self.deadline)
            if columns is None:
                break
            outcome = solve_columns(self.asked, columns, limits, self.stats)
            self.stats["solves"] += 1
            if outcome.runs is not None and self._value(outcome) < goal:
                self.best = outcome
            if outcome.status is Status.OPTIMAL:
                assert self.best is not None
                # The best below the threshold; all schedules that the filter left out lie above it.
                self.bound = self._value(self.best)
                break
            if outcome.status is not Status.INFEASIBLE:
                self.bound = max(self.bound, min(outcome.bound_ns, theta + 1))
                break
            self.bound = max(self.bound, theta + 1)
            if self.thin and (theta >= self.last or (self.best is not None and theta >= goal)):
                break
            if theta >= self.last:
                least = None if self.asked.limited else self.least
                return Solution(status=Status.INFEASIBLE, least_bytes=least, solver=_NAME)
        return self._answer()

    def _begin(self) -> bool:
        """Base, last threshold and a first schedule; False where nothing fits."""
        if self.problem.limit_ns is None:
            budget = self.problem.budget
            self.base = value_at(self.need, self.time, budget)
            if self.base >= INF:
                return False
            self.last = INF if self.asked.limited else self.base + int(self.base * self.slack)
            self.best = incumbent(self.asked, budget, self.deadline)
        else:
            fits = np.flatnonzero(self.time <= self.problem.limit_ns)
            if not fits.size:
                return False
            self.base, self.last = int(self.need[fits[0]]), _MOST_BYTES
        self.bound = self.base
        return True

    def _thresholds(self) -> list[int]:
        slacks = sorted({self.slack, *self.problem.tuning.thresholds})
        grown = [self.base + int(self.base * s) for s in slacks if s >= self.slack]
        return [min(self.last, theta) for theta in grown] + [self.last]

    def _value(self, solution: Solution) -> int:
        return solution.time_ns if self.problem.limit_ns is None else solution.peak_bytes

    def _limits(self, theta: int) -> Limits:
        if self.problem.limit_ns is None:
            budget, time, least_bytes = self.problem.budget, theta, False
        else:
            budget, time, least_bytes = theta, int(self.problem.limit_ns), True
        return Limits(budget=budget, theta=time, least_bytes=least_bytes, deadline=self.deadline)

    def _proved(self) -> int:
        """The bound, where thinned staircases do not prove it."""
        frontier, limit = self.asked.frontier, self.problem.limit_ns
        if not self.thin:
            return self.bound
        if self.asked.host_bytes:
            # The frontier knows no OFFLOAD runs.
            return min(self.bound, fastest_ns(self.problem.profile)) if limit is None else 0
        if limit is None:
            return min(self.bound, frontier.bound_ns(self.problem.budget))
        return min([self.bound, *[n for n, t in frontier.bound_points if t <= limit][:1]])

    def _answer(self) -> Solution:
        self.stats["seconds"] = clock.monotonic() - self.began
        stats = tuple(sorted(self.stats.items()))
        best, fastest = self.best, self.problem.limit_ns is None
        if best is None:
            known = self.bound if fastest and not self.thin else 0
            return Solution(
                status=Status.UNKNOWN, bound_ns=known, least_bytes=self.least, solver=_NAME, stats=stats
            )
        bound = self._proved()
        return Solution(
            status=Status.OPTIMAL if bound >= self._value(best) else Status.FEASIBLE,
            runs=best.runs,
            time_ns=best.time_ns,
            peak_bytes=best.peak_bytes,
            error=error_of(self.problem.profile, best.runs or ()),
            bound_ns=bound if fastest else best.time_ns,
            least_bytes=self.least if fastest else bound,
            solver=_NAME,
            stats=stats,
        )
