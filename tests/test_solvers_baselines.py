"""Baselines: published step counts, rotor's recurrence as a second opinion, heuristics never above the
optimum's bound."""

from __future__ import annotations

import bisect
import random
import warnings

import checkpoint_schedules
import pytest

from mwplan.common.errors import ArgumentError
from mwplan.plans.ledger import replay
from mwplan.plans.schedule import Status, Strategy
from mwplan.solvers import baselines
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.greedy import greedy
from mwplan.solvers.problem import Problem
from mwplan.solvers.rotor import rotor
from tests.chains import random_profile
from tests.solver_checks import unit_chain

RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})


def forward_steps(schedule: checkpoint_schedules.CheckpointSchedule) -> int:
    """Forward steps of a schedule of `checkpoint_schedules`, those that tape included."""
    steps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Mixed says that it goes without Numba
        for action in schedule:
            if isinstance(action, checkpoint_schedules.Forward):
                steps += action.n1 - action.n0
            if isinstance(action, checkpoint_schedules.EndReverse):
                break
    return steps


@pytest.mark.parametrize(("n", "slots"), [(10, 2), (30, 3), (100, 10)])
def test_unit_chains_against_revolve_and_mixed(n: int, slots: int) -> None:
    profile = unit_chain(n)
    ours, theirs = baselines.revolve(Problem(profile=profile), slots), checkpoint_schedules.Revolve(n, slots)
    assert ours.time_ns == forward_steps(theirs)
    mixed = baselines.mixed(Problem(profile=profile), slots)
    assert mixed.time_ns == forward_steps(checkpoint_schedules.MixedCheckpointSchedule(n, slots))
    # The frontier's STORE and RECOMPUTE runs are Mixed's space: at the bytes it uses there is nothing better.
    frontier = solve_frontier(Problem(profile=profile, allowed=RECOMPUTATION))
    assert frontier.at(mixed.peak_bytes).time_ns == mixed.time_ns <= ours.time_ns
    if (n, slots) == (100, 10):
        assert (ours.time_ns, mixed.time_ns) == (322, 237)


def test_rotor_with_a_byte_a_slot_equals_the_frontier_of_recomputation() -> None:
    rng = random.Random(0)
    for _ in range(30):
        profile = random_profile(rng, rng.randint(1, 12))
        frontier = solve_frontier(Problem(profile=profile, allowed=RECOMPUTATION))
        for budget in {n for n, _ in frontier.points[:: max(1, len(frontier.points) // 6)]} | {
            frontier.points[0][0] - 1
        }:
            theirs, ours = rotor(Problem(profile=profile, budget_bytes=budget), budget), frontier.at(budget)
            assert (theirs.runs is None) == (ours.runs is None)
            if theirs.runs is not None:
                assert theirs.time_ns == ours.time_ns
                found = replay(profile, theirs.runs)
                assert found.time_ns == theirs.time_ns
                assert found.peak_bytes <= budget


@pytest.mark.parametrize("size", [10, 30, 100])
def test_equal_to_rotor_with_exact_bytes_at_ten_budgets(size: int) -> None:
    profile = random_profile(random.Random(size), size, scale=3, moonwalks=0, inverts=0)
    frontier = solve_frontier(Problem(profile=profile, allowed=RECOMPUTATION))
    least, most = frontier.points[0][0], frontier.points[-1][0]
    for k in range(10):
        budget = least + (most - least) * k // 9
        exact = rotor(Problem(profile=profile, budget_bytes=budget), budget)
        assert frontier.at(budget).time_ns == exact.time_ns
        found = replay(profile, exact.runs or ())
        assert found.time_ns == exact.time_ns
        assert found.peak_bytes <= budget


@pytest.mark.parametrize("size", [10, 25, 40])
def test_never_above_rotor_and_below_it_somewhere_on_submersive_chains(size: int) -> None:
    profile = random_profile(random.Random(size), size, stores=1, flags=0.0, scale=20)
    recompute, everything = (
        solve_frontier(Problem(profile=profile, allowed=RECOMPUTATION)),
        solve_frontier(Problem(profile=profile)),
    )
    least, most = recompute.points[0][0], recompute.points[-1][0]
    better = 0
    for k in range(10):
        budget = least + (most - least) * k // 9
        problem = Problem(profile=profile, budget_bytes=budget)
        exact, slotted = rotor(problem, budget), rotor(problem, 50)
        assert recompute.at(budget).time_ns == exact.time_ns
        assert slotted.runs is None or slotted.time_ns >= exact.time_ns
        assert everything.at(budget).time_ns <= exact.time_ns
        better += everything.at(budget).time_ns < exact.time_ns
    assert better or everything.points[0][0] < least


def test_heuristics_are_schedules_and_never_beat_the_optimum() -> None:
    rng = random.Random(1)
    for _ in range(40):
        profile = random_profile(rng, rng.randint(1, 12))
        problem = Problem(profile=profile)
        frontier = solve_frontier(problem)

        def best(budget: int, points: tuple[tuple[int, int], ...] = frontier.points) -> int:
            return points[bisect.bisect_right(points, (budget, 2**63)) - 1][1]

        plans = [
            baselines.store_all(problem),
            baselines.recompute_each(problem),
            baselines.chen_sqrt(problem),
            baselines.all_moonwalk(problem),
            baselines.all_fragment(problem),
            baselines.all_invert(problem),
        ]
        plans += [
            greedy(problem.within(need)) for need, _ in frontier.points[:: max(1, len(frontier.points) // 4)]
        ]
        for plan in plans:
            if plan.status is Status.INFEASIBLE:
                assert plan.runs is None
                continue
            found = replay(profile, plan.runs or ())
            assert (plan.peak_bytes, plan.time_ns, plan.error) == (
                found.peak_bytes,
                found.time_ns,
                found.error,
            )
            assert plan.error <= 1e-4 * (1 + 1e-9)
            assert plan.time_ns >= best(plan.peak_bytes)
        budget = frontier.points[len(frontier.points) // 2][0]
        assert baselines.best_recomputation(problem.within(budget)).time_ns >= 0


@pytest.mark.parametrize(("budget", "slots"), [(0, 10), (10, 0), (2**63, 10), (1.5, 10)])
def test_rotor_bad_arguments(budget: int, slots: int) -> None:
    with pytest.raises(ArgumentError, match="`"):
        rotor(Problem(profile=unit_chain(3), budget_bytes=budget), slots)


def test_revolve_needs_a_slot() -> None:
    with pytest.raises(ArgumentError, match="slots"):
        baselines.revolve(Problem(profile=unit_chain(3)), 0)
