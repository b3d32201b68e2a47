"""Side conditions: pins, distinct runs, the host's memory, limits of time."""

from __future__ import annotations

import dataclasses
import random
import time as clock

import pytest

from mwplan.plans.ledger import replay, strategies
from mwplan.plans.schedule import Status, Strategy
from mwplan.solvers.brute_force import every_plan
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.integer_program import solve
from mwplan.solvers.problem import Problem
from tests.chains import random_profile, with_host
from tests.solver_checks import distinct, repeated


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.slow] if part > 1 else []) for part in range(4)]
)
def test_side_conditions_equal_exhaustive_search(part: int) -> None:
    rng = random.Random(part)
    for k in range(15):
        profile = random_profile(rng, 3, scale=4)
        profile = repeated(profile) if k % 2 else profile
        host = 0 if k % 3 else rng.randint(1, 12)
        profile = with_host(rng, profile, scale=4) if host else profile
        plans = [
            (runs, replay(profile, runs)) for runs in every_plan(Problem(profile=profile, host_bytes=host))
        ]
        frontier = solve_frontier(Problem(profile=profile))
        pins = {rng.randint(1, 3): rng.choice(list(Strategy))}
        forbid = {rng.randint(1, 3): rng.choice(list(Strategy))}
        if forbid == pins:
            forbid = {}
        limit = rng.choice([None, 1, 2])
        good = []
        for runs, found in plans:
            used = strategies(profile, runs)
            if any(used[layer - 1] is not s for layer, s in pins.items()):
                continue
            if any(used[layer - 1] is s for layer, s in forbid.items()):
                continue
            if (limit is None or distinct(profile, runs) <= limit) and found.host_bytes <= host:
                good.append((found.peak_bytes, found.time_ns))
        problem = Problem(
            profile=profile,
            pins=pins,
            forbid=forbid,
            host_bytes=host,
            max_distinct_runs=limit,
            workers=1,
        )
        for budget in [1, *sorted({need for need, _ in good})[::4]]:
            want = min((time for need, time in good if need <= budget), default=None)
            solution = solve(problem.within(budget), frontier)
            if want is None:
                assert solution.status is Status.INFEASIBLE
                continue
            assert (solution.status, solution.time_ns, solution.bound_ns) == (Status.OPTIMAL, want, want)
            found = replay(profile, solution.runs or ())
            assert (found.time_ns, found.peak_bytes) == (want, solution.peak_bytes)
            assert found.peak_bytes <= budget
            assert found.host_bytes <= host
            least = solve(dataclasses.replace(problem, limit_ns=want), frontier)
            assert least.status is Status.OPTIMAL
            assert least.peak_bytes == least.least_bytes == min(need for need, time in good if time <= want)


def test_the_host_s_memory_is_a_second_budget() -> None:
    """Equal to exhaustive search, and more of it is never slower."""
    rng = random.Random(9)
    for _ in range(12):
        profile = with_host(rng, random_profile(rng, rng.randint(1, 3)))
        plans = [replay(profile, runs) for runs in every_plan(Problem(profile=profile, host_bytes=1))]
        frontier = solve_frontier(Problem(profile=profile))
        needs = sorted({found.peak_bytes for found in plans})
        for budget in (needs[0], *rng.sample(needs, min(3, len(needs)))):
            times = []
            for host in (0, 4, 9, 20, 10**6):
                fits = [x.time_ns for x in plans if x.peak_bytes <= budget and x.host_bytes <= host]
                solution = solve(
                    Problem(profile=profile, budget_bytes=budget, host_bytes=host, workers=1), frontier
                )
                if not fits:
                    assert (solution.status, solution.least_bytes) == (
                        Status.INFEASIBLE,
                        None if host else frontier.least_bytes,
                    )
                    continue
                assert (solution.status, solution.time_ns, solution.bound_ns) == (
                    Status.OPTIMAL,
                    min(fits),
                    min(fits),
                )
                assert replay(profile, solution.runs or ()).host_bytes <= host
                times.append(solution.time_ns)
            assert times == sorted(times, reverse=True)


def test_offloading_by_hand_and_a_long_chain_with_a_tight_host() -> None:
    profile = random_profile(random.Random(10), 40, moonwalks=0, inverts=0, scale=10**6)
    sent = profile.offloading(1e6, least_bytes=1)
    for layer, before, after in zip(sent.layers, sent.activation_bytes, sent.activation_bytes[1:]):
        for o, store in zip(
            layer.offload, [o for o in layer.store if o.residual_bytes + o.keeps_input + o.keeps_output]
        ):
            kept = store.residual_bytes + store.keeps_input * before + store.keeps_output * after
            assert (o.name, o.host_bytes) == (store.name, kept)
            assert o.forward_ns - store.forward_ns == o.backward_ns - store.backward_ns == 1000 * kept
    assert solve_frontier(Problem(profile=sent)).points == solve_frontier(Problem(profile=profile)).points
    # Copies that cost next to nothing: the frontier's least budget in a fraction of its time.
    profile = profile.offloading(1e15, least_bytes=1)
    frontier = solve_frontier(Problem(profile=profile))
    assert frontier.least_bytes is not None
    every = sum(max(o.host_bytes for o in layer.offload) for layer in profile.layers if layer.offload)
    times = [frontier.at(frontier.least_bytes).time_ns]
    for host in (every // 8, every // 2, every):
        problem = Problem(
            profile=profile, budget_bytes=frontier.least_bytes, host_bytes=host, time_limit_s=90.0
        )
        solution = solve(problem, frontier)
        found = replay(profile, solution.runs or ())
        assert found.host_bytes <= host
        assert (found.time_ns, found.peak_bytes) == (solution.time_ns, solution.peak_bytes)
        assert solution.bound_ns <= solution.time_ns <= times[-1]
        times.append(solution.time_ns)
    assert times[-1] < times[1] < times[0]


def test_a_second_is_enough_for_an_honest_answer() -> None:
    profile = random_profile(random.Random(8), 30)
    frontier = solve_frontier(Problem(profile=profile))
    budget = frontier.points[len(frontier.points) // 3][0]
    problem = Problem(profile=profile, budget_bytes=budget, max_distinct_runs=6, time_limit_s=1.0)
    solution = solve(problem, frontier)
    if solution.status is Status.UNKNOWN:
        assert solution.runs is None
    if solution.runs is not None:
        assert solution.bound_ns <= solution.time_ns
        assert (solution.status is Status.OPTIMAL) == (solution.bound_ns == solution.time_ns)
        assert replay(profile, solution.runs).peak_bytes == solution.peak_bytes <= budget


@pytest.mark.parametrize("condition", ["pins", "max_distinct_runs"])
def test_side_conditions_on_long_chains_give_a_plan_in_time(condition: str) -> None:
    profile = random_profile(random.Random(9), 50, scale=1_000)
    frontier = solve_frontier(Problem(profile=profile, thin=0.02))
    need = [n for n, _ in frontier.points]
    budget = (need[0] + need[-1]) // 2
    pins = {25: Strategy.STORE, 26: Strategy.RECOMPUTE} if condition == "pins" else {}
    limit = 3 if condition == "max_distinct_runs" else None
    began = clock.process_time()
    problem = Problem(
        profile=profile,
        budget_bytes=budget,
        pins=pins,
        max_distinct_runs=limit,
        time_limit_s=0.5,
        workers=1,
    )
    solution = solve(problem, frontier)
    # Half a second, staircases under the side conditions, and a bound as dear as the frontier.
    assert clock.process_time() - began < 10
    assert solution.status in (Status.FEASIBLE, Status.OPTIMAL)
    assert 0 < solution.bound_ns <= solution.time_ns
    found = replay(profile, solution.runs or ())
    assert (found.time_ns, found.peak_bytes) == (solution.time_ns, solution.peak_bytes)
    assert found.peak_bytes <= budget
    if limit:
        assert distinct(profile, solution.runs or ()) <= limit
    else:
        used = strategies(profile, solution.runs or ())
        assert (used[24], used[25]) == (Strategy.STORE, Strategy.RECOMPUTE)
