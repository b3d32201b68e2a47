"""Schedules of few different runs for long stretches of identical layers."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest

from experiments.solver_chains import deep, identical
from mwplan import planning
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import (
    Run,
    RunKind,
    Schedule,
    Solution,
    Status,
    Strategy,
    check_cover,
    nesting,
    walk,
)
from mwplan.plans.tape import LOOPS, loops, written_out
from mwplan.solvers import baselines
from mwplan.solvers.problem import Problem
from mwplan.solvers.regular import affordable, simplify

CHAINS = {
    "recomputation alone": functools.partial(identical, 400, submersive=False),
    "with a stem and a head": functools.partial(deep, 200, submersive=False),
    "with moonwalk runs": functools.partial(identical, 200, submersive=True),
}


@functools.cache
def planned(name: str) -> tuple[Profile, planning.Frontier]:
    """The profile, and its thinned frontier."""
    profile = CHAINS[name]()
    return profile, planning.frontier(profile, thin=0.02)


@pytest.mark.parametrize("name", CHAINS)
def test_fewer_loops_in_the_same_bytes_and_nearly_the_time(name: str) -> None:
    """Never worse, at any budget."""
    profile, frontier = planned(name)
    for total, time in frontier.points[:: max(1, len(frontier.points) // 8)]:
        plain = frontier.at(total, regular=-1)
        simple = frontier.at(total)
        assert plain.time_ns == time
        check_cover(simple.runs, 0, len(profile))
        found = replay(profile, simple.runs)
        assert (found.peak_bytes, found.time_ns) == (simple.peak_bytes, simple.time_ns)
        assert simple.total_bytes <= total
        assert simple.error <= 1e-4
        assert simple.time_ns <= (1 + affordable(plain.runs, planning.TUNING.regular_loss)) * time
        assert loops(plain.runs) > 50 or simple.time_ns <= 1.01 * time
        assert loops(simple.runs) <= loops(plain.runs)


def test_where_memory_is_not_scarce_few_loops_cost_nothing() -> None:
    _, frontier = planned("recomputation alone")
    for total, time in frontier.points[3 * len(frontier.points) // 4 :: 6]:
        simple = frontier.at(total)
        assert simple.time_ns <= 1.005 * time
        assert loops(simple.runs) <= LOOPS


def test_a_larger_loss_of_time_allows_fewer_loops() -> None:
    profile, frontier = planned("recomputation alone")
    middle = len(frontier.points) // 2
    strictly = [
        (total, frontier.at(total, regular=-1)) for total, _ in frontier.points[middle - 20 : middle + 20 : 8]
    ]
    budget, strict = max(strictly, key=lambda one: loops(one[1].runs))
    few = frontier.at(budget, regular=0.2)
    assert loops(few.runs) <= LOOPS < 20 < loops(strict.runs)
    assert few.time_ns < 1.2 * strict.time_ns
    assert few.total_bytes <= budget
    assert few.status is Status.FEASIBLE
    assert planning.plan(profile, budget, regular=0.2, frontier=frontier).runs == few.runs


def test_what_is_not_recomputed_stays_so() -> None:
    """Recomputation may not be allowed."""
    profile, _ = planned("with moonwalk runs")
    allowed = frozenset(Strategy) - {Strategy.RECOMPUTE}
    frontier = planning.frontier(profile, thin=0.02, allowed=allowed)
    budget = frontier.points[len(frontier.points) // 2][0]
    runs = frontier.at(budget, regular=1.0).runs
    assert all(run.kind is not RunKind.RECOMPUTE for run in walk(runs))


def test_runs_that_reach_into_a_stretch_from_other_layers() -> None:
    """Only the options that such a run has within the stretch are those of the layer that repeats there."""
    profile = identical(200, submersive=True)
    odd = dataclasses.replace(
        profile.layers[0],
        moonwalk=tuple(dataclasses.replace(o, name=f"odd {o.name}") for o in profile.layers[0].moonwalk),
    )
    profile = dataclasses.replace(profile, layers=(odd, odd, *profile.layers[2:]))
    option = profile.layers[2].moonwalk[0].name
    walked = Run(
        kind=RunKind.MOONWALK, start=0, stop=100, options=(f"odd {option}", f"odd {option}", *[option] * 98)
    )
    stored = [
        Run(kind=RunKind.STORE, start=i, stop=i + 1, options=(profile.layers[i].store[0].name,))
        for i in range(100, 200)
    ]
    lengths = itertools.cycle((3, 5, 7, 4))
    parts, at = [], 100
    while at < 200:
        stop = min(200, at + next(lengths))
        parts.append(
            Run(kind=RunKind.RECOMPUTE, start=at, stop=stop, inner=tuple(stored[at - 100 : stop - 100]))
        )
        at = stop
    runs = (walked, *parts)
    before = replay(profile, runs)
    problem = Problem(profile=profile, budget_bytes=2 * before.peak_bytes, max_error=1.0)
    after = simplify(problem, runs, 0.5)
    assert loops(after) < loops(runs)
    assert replay(profile, after).time_ns <= 1.5 * before.time_ns


def test_proved_plans_stay_as_they_are() -> None:
    profile = identical(120, submersive=False)
    frontier = planning.frontier(profile)
    budget = frontier.points[2 * len(frontier.points) // 3][0]
    plan = frontier.at(budget, regular=1.0)
    assert plan.status is Status.OPTIMAL
    assert plan.runs == frontier.at(budget, regular=-1).runs


def test_recomputation_nested_deeper_than_python_calls() -> None:
    """The least-memory schedule of a deep chain holds a RECOMPUTE run inside another at every layer: it is
    replayed, saved and read all the same."""
    depth = 700
    profile = identical(depth, submersive=False)
    option = profile.layers[0].store[0].name

    def store(at: int) -> Run:
        return Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(option,))

    runs: tuple[Run, ...] = (store(0),)
    for at in range(1, depth):
        runs = (Run(kind=RunKind.RECOMPUTE, start=0, stop=at, inner=runs), store(at))
    schedule = planning.scheduled(
        profile, Solution(status=Status.FEASIBLE, runs=runs, solver="by hand"), max_error=0.0
    )
    assert nesting(runs) == depth - 1
    assert sum(1 for _ in walk(runs)) == 2 * depth - 1
    forward = depth * (depth - 1) // 2
    plain = planning.scheduled(profile, baselines.store_all(Problem(profile=profile)), max_error=0.0)
    assert schedule.time_ns == plain.time_ns + forward * profile.layers[0].forward_ns
    assert written_out(runs) == 3 * depth - 1
    assert loops(runs) == LOOPS
    assert Schedule.from_json(schedule.to_json()) == schedule
