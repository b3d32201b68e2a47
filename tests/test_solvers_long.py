"""Long chains: identical layers by their lengths, and stretches of them between others."""

from __future__ import annotations

import random

import pytest

from experiments.solver_chains import deep
from mwplan import planning
from mwplan.common.errors import InfeasibleError
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Run, Status, Strategy
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.joined import JoinedTables
from mwplan.solvers.parts import is_uniform, stretches
from mwplan.solvers.problem import EVERY_STRATEGY, Problem
from mwplan.solvers.sparse import SparseTables, lengths
from mwplan.solvers.tables import Tables
from mwplan.solvers.top import Top
from mwplan.solvers.uniform import UniformTables
from tests.chains import random_profile
from tests.solver_checks import repeated, unit_chain

RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})


def test_identical_layers_by_length_equal_the_general_tables() -> None:
    rng = random.Random(2)
    for _ in range(40):
        size = rng.randint(1, 9)
        profile = repeated(random_profile(rng, size))
        assert is_uniform(profile)
        uniform = UniformTables(Problem(profile=profile))
        frontier = solve_frontier(Problem(profile=profile))
        assert tuple(zip(*(x.tolist() for x in uniform.points()))) == frontier.points
        for need, time in frontier.points:
            found = replay(profile, uniform.runs(need))
            assert (found.peak_bytes, found.time_ns) == (need, time)


@pytest.mark.parametrize("seed", range(6))
def test_few_lengths_lose_little_and_keep_the_ledgers_word(seed: int) -> None:
    rng = random.Random(seed)
    profile = repeated(
        random_profile(rng, rng.choice([70, 97, 111]), stores=2, moonwalks=seed % 3, inverts=seed % 2)
    )
    exact = UniformTables(Problem(profile=profile)).points()
    tables = SparseTables(Problem(profile=profile, thin=0.01))
    needs, times = tables.points()
    for need, time in list(zip(needs.tolist(), times.tolist()))[:: max(1, len(needs) // 8)]:
        found = replay(profile, tables.runs(need))
        assert (found.peak_bytes, found.time_ns) == (need, time)
    assert times[-1] == exact[1][-1]
    budget = exact[0][exact[0] >= needs[0]]
    got = times[needs.searchsorted(budget, side="right") - 1]
    best = exact[1][exact[0].searchsorted(budget, side="right") - 1]
    assert (got >= best).all()
    assert (got <= 1.02 * best).all()
    assert needs[0] <= exact[0][0] + 2 * profile.activation_bytes[0]


@pytest.mark.parametrize("size", [1, 64, 65, 127, 1000, 9_999, 10_000])
def test_lengths_with_tables_leave_lengths_with_tables(size: int) -> None:
    found = lengths(size)
    assert found[-1] == size
    assert len(found) <= 64 + 32 * max(0, size.bit_length() - 6) + 14
    known = {0, *found}
    # From each of them a stretch of a power of two of layers leads to another: what is kept layer by layer
    # can be kept in these steps.
    assert all(any(n - (1 << k) in known for k in range(14)) for n in found)


def joined(rng: random.Random, *sizes: int) -> Profile:
    """Random layers and long stretches of identical ones by turns, so many of each."""
    parts = []
    for k, size in enumerate(sizes):
        made = random_profile(
            rng, size, stores=2, moonwalks=rng.randint(0, 2), inverts=rng.randint(0, 1), flags=0.4
        )
        parts.append(repeated(made) if k % 2 else made)

    def row(what: str) -> tuple[int, ...]:
        # A joint has the bytes of the identical layers' boundaries.
        rows = [getattr(part, f"{what}_bytes") for part in parts]
        out: tuple[int, ...] = rows[0] if len(rows) == 1 else rows[0][:-1]
        for k, x in enumerate(rows[1:], 1):
            out += x if k % 2 else x[1:-1] if k < len(rows) - 1 else x[1:]
        return out

    return Profile(
        layers=tuple(layer for part in parts for layer in part.layers),
        activation_bytes=row("activation"),
        cotangent_bytes=row("cotangent"),
        sweep_cotangent_bytes=row("sweep_cotangent"),
    )


def test_stretches_of_identical_layers_are_found() -> None:
    profile = joined(random.Random(0), 3, 40, 2, 50, 1)
    assert stretches(profile, 30) == [
        (0, 3, False), (3, 43, True), (43, 45, False), (45, 95, True), (95, 96, False)
    ]  # fmt: skip
    assert stretches(profile, 45) == [(0, 45, False), (45, 95, True), (95, 96, False)]
    assert stretches(unit_chain(5), 5) == [(0, 5, True)]
    assert stretches(unit_chain(5), 6) == [(0, 5, False)]


@pytest.mark.parametrize("seed", range(8))
def test_identical_layers_between_others_keep_the_ledgers_word(seed: int) -> None:
    rng = random.Random(seed)
    sizes = ((2, 40, 3), (1, 20, 2, 24, 2), (4, 45), (1, 37, 1))[seed % 4]
    profile = joined(rng, *sizes)
    parts = stretches(profile, 20)
    assert [x[2] for x in parts] == [k % 2 == 1 for k in range(len(sizes))]
    for allowed in (EVERY_STRATEGY, RECOMPUTATION):
        tables = JoinedTables(Problem(profile=profile, allowed=allowed, thin=0.01), parts)
        needs, times = tables.points()
        exact = Top(Tables(Candidates(Problem(profile=profile, allowed=allowed)))).stairs()
        for need, time in list(zip(needs.tolist(), times.tolist()))[:: max(1, len(needs) // 12)]:
            found = replay(profile, tables.runs(need))
            assert (found.peak_bytes, found.time_ns) == (need, time)
            assert found.error <= 1e-4 * (1 + 1e-12)
            assert time >= exact[1][exact[0].searchsorted(need, side="right") - 1]
        # What is lost is two activations or so, and little time where there are as many.
        for budget in (2 * int(exact[0][0]), 4 * int(exact[0][0]), int(needs[-1])):
            got = times[needs.searchsorted(budget, side="right") - 1]
            assert needs[0] <= budget
            assert got <= 1.03 * exact[1][exact[0].searchsorted(budget, side="right") - 1]


def test_recomputation_reaches_from_the_layers_before_into_identical_ones() -> None:
    """Without such runs the joint's activation is kept: a fifth more time at twice the least bytes."""
    profile = deep(100, submersive=False)
    problem = Problem(profile=profile, allowed=RECOMPUTATION, thin=0.02)
    best_needs, best_times = Top(Tables(Candidates(problem), thin=0.01)).stairs()
    parts = stretches(profile, 96)
    tables = JoinedTables(problem, parts)
    needs, times = tables.points()
    for share in (1.5, 2.0, 3.0):
        budget = int(share * best_needs[0])
        best = best_times[best_needs.searchsorted(budget, side="right") - 1]
        step = needs.searchsorted(budget, side="right") - 1
        assert times[step] <= 1.02 * best
        runs = tables.runs(int(needs[step]))
        found = replay(profile, runs)
        assert (found.peak_bytes, found.time_ns) == (needs[step], times[step])
        assert any(run.start < 2 < run.stop for run in runs)


def test_deep_networks_are_planned_in_seconds() -> None:
    profile = joined(random.Random(1), 2, 512, 3)
    frontier = solve_frontier(Problem(profile=profile, thin=0.02))
    assert isinstance(frontier.tables, JoinedTables)
    budget = frontier.points[len(frontier.points) // 3][0]
    solution = frontier.at(budget)
    assert solution.status is Status.FEASIBLE
    assert 0 < solution.bound_ns < solution.time_ns
    assert frontier.at(frontier.points[0][0] - 1).status is Status.UNKNOWN
    plan = planning.plan(profile, budget + profile.fixed_bytes)
    assert (plan.time_ns, plan.status) == (solution.time_ns, Status.FEASIBLE)
    with pytest.raises(InfeasibleError, match="smaller one may exist"):
        planning.plan(profile, frontier.points[0][0] - 1, frontier=planning.frontier(profile, thin=0.02))


def test_long_chains_of_identical_layers() -> None:
    profile = unit_chain(300)
    frontier = solve_frontier(Problem(profile=profile, thin=0.01))
    for need, time in frontier.points[:: max(1, len(frontier.points) // 10)]:
        solution = frontier.at(need)
        found = replay(profile, solution.runs or ())
        assert (found.peak_bytes, found.time_ns) == (need, time)
        assert solution.status is Status.FEASIBLE or time == solution.bound_ns
        assert solution.bound_ns == 300
    assert frontier.at(1).status is Status.UNKNOWN
    assert frontier.points[-1] == (300, 300)  # x_1 to x_299, and x_300 at the turn


def depth(runs: tuple[Run, ...]) -> int:
    return max((1 + depth(run.inner) for run in runs if run.inner), default=0)


def test_long_thinned_chains_do_not_nest_as_deep_as_they_are_long() -> None:
    frontier = solve_frontier(Problem(profile=unit_chain(600), thin=0.05))
    assert max(depth(frontier.at(need).runs or ()) for need, _ in frontier.points[:5]) < 200


def test_schedules_may_nest_as_deep_as_a_chain_is_long() -> None:
    size = 450
    tables = UniformTables(Problem(profile=unit_chain(size), allowed=RECOMPUTATION))
    need, times = tables.points()
    runs = tables.runs(int(need[0]))
    levels, spent, left = 0, 0, [(run, 1) for run in runs]
    while left:
        run, level = left.pop()
        levels = max(levels, level)
        spent += run.stop - run.start
        left += [(inner, level + 1) for inner in run.inner]
    assert levels > 400
    assert spent == int(times[0])
