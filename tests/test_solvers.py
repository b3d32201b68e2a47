"""The frontier and the integer program against exhaustive search and the ledger, on chains small enough to
enumerate."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mwplan.plans.ledger import replay
from mwplan.plans.profiles import InvertOption, LayerProfile, Profile, StoreOption
from mwplan.plans.schedule import Run, Status, Strategy
from mwplan.solvers.brute_force import every_cost, every_plan
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.integer_program import solve
from mwplan.solvers.problem import Problem
from tests.chains import random_profile
from tests.solver_checks import ledgered, pareto

profiles = st.builds(
    lambda seed, size, scale: random_profile(random.Random(seed), size, scale=scale),
    st.integers(0, 2**32),
    st.integers(1, 7),
    st.sampled_from([4, 50, 10**6, 2**40]),
)


#: A quarter of the chains by default; all are slow.
PARTS = [pytest.param(part, marks=[pytest.mark.slow] if part > 1 else []) for part in range(8)]


@pytest.mark.parametrize("part", PARTS)
def test_frontier_and_integer_program_equal_exhaustive_search_at_every_budget_on_1000_chains(
    part: int,
) -> None:
    rng = random.Random(part)
    for k in range(125):
        profile = random_profile(rng, rng.choice([1, 2, 3, 4, 4, 5, 5, 6]), scale=rng.choice([3, 5, 6]))
        best = pareto(every_cost(Problem(profile=profile)))
        frontier = solve_frontier(Problem(profile=profile))
        assert frontier.points == best
        ledgered(profile, frontier)
        # Between two points nothing changes, so every budget is one of these; the program takes some of them.
        for need, time in best[k % 3 :: 3]:
            solution = solve(Problem(profile=profile, budget_bytes=need, workers=1), frontier)
            assert (solution.status, solution.time_ns, solution.peak_bytes) == (Status.OPTIMAL, time, need)
            assert solution.bound_ns == time
            found = replay(profile, solution.runs or ())
            assert (found.peak_bytes, found.time_ns) == (need, time)
        if best[0][0] > 1:
            too_small = solve(Problem(profile=profile, budget_bytes=best[0][0] - 1), frontier)
            assert too_small.status is Status.INFEASIBLE
            assert too_small.least_bytes == best[0][0] == frontier.at(best[0][0] - 1).least_bytes


def test_exhaustive_search_is_every_plan_in_the_ledger() -> None:
    rng = random.Random(1)
    for _ in range(60):
        profile = random_profile(rng, rng.randint(1, 3))
        costs: dict[int, int] = {}
        for runs in every_plan(Problem(profile=profile)):
            found = replay(profile, runs)
            costs[found.peak_bytes] = min(found.time_ns, costs.get(found.peak_bytes, found.time_ns))
        assert (
            pareto(costs)
            == pareto(every_cost(Problem(profile=profile)))
            == solve_frontier(Problem(profile=profile)).points
        )


@pytest.mark.parametrize("allowed", [{s} for s in Strategy] + [{Strategy.STORE, s} for s in Strategy])
def test_allowed_strategies(allowed: set[Strategy]) -> None:
    rng = random.Random(2)
    for _ in range(25):
        profile = random_profile(rng, rng.randint(1, 5))
        frontier = solve_frontier(Problem(profile=profile, allowed=frozenset(allowed)))
        assert frontier.points == pareto(every_cost(Problem(profile=profile, allowed=frozenset(allowed))))
        ledgered(profile, frontier)
        if not frontier.points:
            assert frontier.least_bytes is None
            assert frontier.at(10**9).status is Status.INFEASIBLE


@pytest.mark.parametrize("max_error", [0.0, 1e-6, 2e-5, 2.1e-5, 1.0, float("inf")])
def test_max_error_bounds_every_run(max_error: float) -> None:
    rng = random.Random(3)
    for _ in range(25):
        profile = random_profile(rng, rng.randint(1, 5), moonwalks=3)
        frontier = solve_frontier(Problem(profile=profile, max_error=max_error))
        assert frontier.points == pareto(every_cost(Problem(profile=profile, max_error=max_error)))
        for need, _ in frontier.points:
            assert replay(profile, frontier.at(need).runs or ()).error <= max_error * (1 + 1e-12)


def test_invert_runs_share_the_error() -> None:
    """Four layers whose inverses each put 4e-5 into the cotangent: 8e-5 together, in one run or in several,
    fits whole or not at all."""
    inverse = InvertOption(name="i", forward_ns=1, backward_ns=1, sensitivity=4.0, local_error=1e-5)
    store = StoreOption(
        name="s", residual_bytes=0, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=1
    )
    layer = LayerProfile(name="", forward_ns=1, store=(store,), invert=(inverse,))
    bytes_ = (1,) * 5
    profile = Profile(
        layers=(layer,) * 4,
        activation_bytes=bytes_,
        cotangent_bytes=bytes_,
        sweep_cotangent_bytes=bytes_,
    )
    for thin in (0.0, 0.1):
        for max_error, feasible in ((8.1e-5, True), (7.9e-5, False)):
            found = solve_frontier(
                Problem(profile=profile, max_error=max_error, allowed={Strategy.INVERT}, thin=thin)
            )
            assert (found.least_bytes is not None) is feasible
            if feasible:
                assert replay(profile, found.at(10**9).runs or ()).error == pytest.approx(8e-5)
    whole = dataclasses.replace(
        profile,
        layers=(layer,) * 300,
        **{f"{what}_bytes": (1,) * 301 for what in ("activation", "cotangent", "sweep_cotangent")},
    )
    found = solve_frontier(
        Problem(profile=whole, max_error=4.1e-5 * 300**0.5, allowed={Strategy.INVERT}, thin=0.1)
    )
    assert found.least_bytes is not None
    assert (
        solve_frontier(
            Problem(profile=whole, max_error=3.9e-5 * 300**0.5, allowed={Strategy.INVERT}, thin=0.1)
        ).least_bytes
        is None
    )


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_depth_of_recomputation(depth: int) -> None:
    def levels(runs: tuple[Run, ...]) -> int:
        return max((1 + levels(run.inner) if run.inner else 0 for run in runs), default=0)

    rng = random.Random(4)
    for _ in range(20):
        profile = random_profile(rng, 3, scale=5, moonwalks=1, inverts=0)
        costs: dict[int, int] = {}
        for runs in every_plan(Problem(profile=profile)):
            if levels(runs) <= depth:
                found = replay(profile, runs)
                costs[found.peak_bytes] = min(found.time_ns, costs.get(found.peak_bytes, found.time_ns))
        frontier = solve_frontier(Problem(profile=profile, max_recompute_depth=depth))
        assert frontier.points == pareto(costs)
        for need, _ in frontier.points:
            assert levels(frontier.at(need).runs or ()) <= depth


@settings(max_examples=60, deadline=None, derandomize=True)
@given(profiles)
def test_ledger_confirms_all_points_and_more_budget_never_costs_more(profile: Profile) -> None:
    frontier = solve_frontier(Problem(profile=profile))
    assert frontier.points
    needs, times = zip(*frontier.points)
    assert list(needs) == sorted(set(needs))
    assert list(times) == sorted(set(times), reverse=True)
    ledgered(profile, frontier, step=max(1, len(needs) // 8))
    gain = frontier.next_gain(needs[0])
    assert gain == ((needs[1] - needs[0], times[0] - times[1]) if len(needs) > 1 else None)
    assert frontier.next_gain(needs[-1]) is None


def test_least_bytes_is_the_frontier_the_other_way_round() -> None:
    rng = random.Random(6)
    for _ in range(20):
        profile = random_profile(rng, rng.randint(1, 7))
        frontier = solve_frontier(Problem(profile=profile))
        for need, time in frontier.points:
            solution = solve(Problem(profile=profile, limit_ns=time, workers=1), frontier)
            assert (solution.status, solution.peak_bytes) == (Status.OPTIMAL, need)
        too_fast = solve(Problem(profile=profile, limit_ns=frontier.points[-1][1] - 1), frontier)
        assert too_fast.status is Status.INFEASIBLE


def test_slack_gives_the_program_more_runs_and_the_same_optimum() -> None:
    profile = random_profile(random.Random(7), 20)
    frontier = solve_frontier(Problem(profile=profile))
    budget = frontier.points[len(frontier.points) // 2][0]
    problem = Problem(profile=profile, budget_bytes=budget)
    tight, loose = (solve(problem, frontier, slack=s) for s in (0.0, 0.05))
    assert tight.status is loose.status is Status.OPTIMAL
    assert tight.time_ns == loose.time_ns
    assert dict(loose.stats)["columns"] > dict(tight.stats)["columns"]


def test_single_layers_merged_for_all_ends_at_once_equal_the_general_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        profile = random_profile(rng, rng.randint(2, 9), moonwalks=0, inverts=0)
        at_once = solve_frontier(Problem(profile=profile, max_recompute_depth=1))
        thinned = solve_frontier(Problem(profile=profile, max_recompute_depth=1, thin=0.05))
        ledgered(profile, at_once)
        ledgered(profile, thinned)
        assert all(thinned.bound_ns(need) <= time for need, time in at_once.points)
        assert thinned.least_bytes == at_once.least_bytes
        with monkeypatch.context() as patch:
            patch.setattr("mwplan.solvers.single_layers.SingleLayers.apply", lambda self: False)
            assert solve_frontier(Problem(profile=profile, max_recompute_depth=1)).points == at_once.points
