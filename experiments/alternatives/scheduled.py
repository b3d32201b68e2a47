"""Schedules that `mw.apply` runs: what the planner finds, and one strategy wherever it is possible."""

from __future__ import annotations

import functools
import math

import mwplan as mw
from experiments.alternatives.problem import (
    MOST_LOOPS,
    RECOMPUTATION,
    Candidate,
    NotApplicableError,
    Problem,
)
from mwplan import planning
from mwplan.execution.execute import Arrangement
from mwplan.plans import tape
from mwplan.plans.schedule import RunKind, Schedule, Solution, Strategy
from mwplan.solvers import baselines

#: Of schedules with more, this share of the time may be lost for fewer.
LOSS = 1.0


def applied(
    problem: Problem, schedule: Schedule, arrangement: Arrangement = 0, *, stacked: bool = False
) -> Candidate:
    """A schedule of the problem's profile, run by `mw.apply`; `stacked`: on the chain as `mw.stack` makes it,
    which long chains are anyway."""
    unrolled = problem.most_loops == math.inf and not stacked
    count = tape.loops(schedule.runs)
    if count > (math.inf if unrolled else MOST_LOOPS):
        raise NotApplicableError(
            f"a step of about {count} different loops, which takes many minutes to compile"
        )
    chain = problem.chain if unrolled else problem.stacked
    network = functools.partial(mw.apply, schedule, arrangement=arrangement)
    return Candidate(network, chain, schedule, (schedule.runs, arrangement, unrolled))


def _baseline(problem: Problem, solution: Solution, kind: RunKind, what: str) -> Candidate:
    assert solution.runs is not None
    if not any(run.kind is kind for run in solution.runs):
        raise NotApplicableError(f"no layer of this chain {what} within max_error={problem.max_error}")
    return applied(problem, planning.scheduled(problem.profile, solution, problem.max_error))


def invert(problem: Problem, budget: int | None) -> Candidate:
    """Inversion wherever a layer allows it, storing elsewhere."""
    solution = baselines.all_invert(problem.asked)
    return _baseline(problem, solution, RunKind.INVERT, "can be inverted")


def moonwalk(problem: Problem, budget: int | None) -> Candidate:
    """Moonwalk runs as long as the error allows, with the smallest fragments."""
    solution = baselines.all_moonwalk(problem.asked)
    return _baseline(problem, solution, RunKind.MOONWALK, "has a vijp or a fragment")


def fragment(problem: Problem, budget: int | None) -> Candidate:
    """Moonwalk runs with the largest fragments."""
    solution = baselines.all_fragment(problem.asked)
    return _baseline(problem, solution, RunKind.MOONWALK, "has a fragment")


def fastest_within(frontier: mw.Frontier, budget: int | None, *, most_loops: float = math.inf) -> Schedule:
    """The frontier's schedule, or one that loses more time and has no more different loops than that, if
    there is one."""
    at = budget if budget is not None else frontier.points[-1][0]
    schedule = frontier.at(at)
    if tape.loops(schedule.runs) > most_loops:
        return min(schedule, frontier.at(at, regular=LOSS), key=lambda one: tape.loops(one.runs))
    return schedule


def plan(
    problem: Problem, budget: int | None, *, allowed: frozenset[Strategy] = planning.EVERY_STRATEGY
) -> Candidate:
    """The fastest schedule of the allowed strategies that fits; without a budget, the fastest of all."""
    return applied(problem, fastest_within(problem.frontier(allowed), budget, most_loops=problem.most_loops))


def recompute(problem: Problem, budget: int | None) -> Candidate:
    """The fastest schedule of STORE and RECOMPUTE runs that fits."""
    return applied(
        problem, fastest_within(problem.frontier(RECOMPUTATION), budget, most_loops=problem.most_loops)
    )
