"""Schedules of few different runs for long stretches of identical layers."""

from __future__ import annotations

import functools

import pytest

from experiments.solver_scaling import deep, identical
from mwplan import planning
from mwplan.ledger import replay
from mwplan.profiles import Profile
from mwplan.schedule import RunKind, Status, Strategy, check_cover, walk
from mwplan.solvers.regular import loops

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
        assert simple.time_ns <= 1.01 * time
        assert loops(simple.runs) <= loops(plain.runs)


def test_where_memory_is_not_scarce_few_loops_cost_nothing() -> None:
    _, frontier = planned("recomputation alone")
    for total, time in frontier.points[3 * len(frontier.points) // 4 :: 6]:
        simple = frontier.at(total)
        assert simple.time_ns <= 1.005 * time
        assert loops(simple.runs) <= 8


def test_a_larger_loss_of_time_allows_fewer_loops() -> None:
    profile, frontier = planned("recomputation alone")
    budget = frontier.points[len(frontier.points) // 2][0]
    strict, few = frontier.at(budget), frontier.at(budget, regular=0.2)
    assert loops(few.runs) < 20 < loops(strict.runs)
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


def test_proved_plans_stay_as_they_are() -> None:
    profile = identical(120, submersive=False)
    frontier = planning.frontier(profile)
    budget = frontier.points[2 * len(frontier.points) // 3][0]
    plan = frontier.at(budget, regular=1.0)
    assert plan.status is Status.OPTIMAL
    assert plan.runs == frontier.at(budget, regular=-1).runs
