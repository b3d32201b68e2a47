"""Baselines: published step counts, rotor's recurrence as a second opinion, heuristics never above the
optimum's bound."""

from __future__ import annotations

import bisect
import random
import warnings

import checkpoint_schedules
import pytest

from experiments.solver_scaling import deep
from mwplan import planning
from mwplan.common.errors import ArgumentError, InfeasibleError
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import LayerProfile, Profile, StoreOption
from mwplan.plans.schedule import Run, Status, Strategy
from mwplan.solvers import baselines
from mwplan.solvers.frontier import JoinedTables, Tables, solve_frontier
from mwplan.solvers.rotor import rotor
from mwplan.solvers.runs import ALL_STRATEGIES, Candidates
from mwplan.solvers.sparse import SparseTables, lengths
from mwplan.solvers.uniform import UniformTables, is_uniform, stretches
from tests.chains import random_profile
from tests.test_solvers import repeated

RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})


def unit_chain(n: int) -> Profile:
    """Steps of cost 1, activations of 1 byte, cotangents free: the time of a schedule is its number of
    forward steps."""
    option = StoreOption(
        name="x", residual_bytes=0, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=0
    )
    layer = LayerProfile(name="step", forward_ns=1, store=(option,))
    return Profile(
        layers=(layer,) * n,
        activation_bytes=(1,) * (n + 1),
        cotangent_bytes=(0,) * (n + 1),
        sweep_cotangent_bytes=(0,) * (n + 1),
    )


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
    ours, theirs = baselines.revolve(profile, slots), checkpoint_schedules.Revolve(n, slots)
    assert ours.time_ns == forward_steps(theirs)
    mixed = baselines.mixed(profile, slots)
    assert mixed.time_ns == forward_steps(checkpoint_schedules.MixedCheckpointSchedule(n, slots))
    # The frontier's STORE and RECOMPUTE runs are Mixed's space: at the bytes it uses there is nothing better.
    frontier = solve_frontier(profile, allowed=RECOMPUTATION)
    assert frontier.at(mixed.peak_bytes).time_ns == mixed.time_ns <= ours.time_ns
    if (n, slots) == (100, 10):
        assert (ours.time_ns, mixed.time_ns) == (322, 237)


def test_rotor_with_a_byte_a_slot_equals_the_frontier_of_recomputation() -> None:
    rng = random.Random(0)
    for _ in range(30):
        profile = random_profile(rng, rng.randint(1, 12))
        frontier = solve_frontier(profile, allowed=RECOMPUTATION)
        for budget in {n for n, _ in frontier.points[:: max(1, len(frontier.points) // 6)]} | {
            frontier.points[0][0] - 1
        }:
            theirs, ours = rotor(profile, budget, budget), frontier.at(budget)
            assert (theirs.runs is None) == (ours.runs is None)
            if theirs.runs is not None:
                assert theirs.time_ns == ours.time_ns
                found = replay(profile, theirs.runs)
                assert found.time_ns == theirs.time_ns
                assert found.peak_bytes <= budget


@pytest.mark.parametrize("size", [10, 30, 100])
def test_equal_to_rotor_with_exact_bytes_at_ten_budgets(size: int) -> None:
    profile = random_profile(random.Random(size), size, scale=3, moonwalks=0, inverts=0)
    frontier = solve_frontier(profile, allowed=RECOMPUTATION)
    least, most = frontier.points[0][0], frontier.points[-1][0]
    for k in range(10):
        budget = least + (most - least) * k // 9
        exact = rotor(profile, budget, budget)
        assert frontier.at(budget).time_ns == exact.time_ns
        found = replay(profile, exact.runs or ())
        assert found.time_ns == exact.time_ns
        assert found.peak_bytes <= budget


@pytest.mark.parametrize("size", [10, 25, 40])
def test_never_above_rotor_and_below_it_somewhere_on_submersive_chains(size: int) -> None:
    profile = random_profile(random.Random(size), size, stores=1, flags=0.0, scale=20)
    recompute, everything = solve_frontier(profile, allowed=RECOMPUTATION), solve_frontier(profile)
    least, most = recompute.points[0][0], recompute.points[-1][0]
    better = 0
    for k in range(10):
        budget = least + (most - least) * k // 9
        exact, slotted = rotor(profile, budget, budget), rotor(profile, budget, 50)
        assert recompute.at(budget).time_ns == exact.time_ns
        assert slotted.runs is None or slotted.time_ns >= exact.time_ns
        assert everything.at(budget).time_ns <= exact.time_ns
        better += everything.at(budget).time_ns < exact.time_ns
    assert better or everything.points[0][0] < least


def test_heuristics_are_schedules_and_never_beat_the_optimum() -> None:
    rng = random.Random(1)
    for _ in range(40):
        profile = random_profile(rng, rng.randint(1, 12))
        frontier = solve_frontier(profile)

        def best(budget: int, points: tuple[tuple[int, int], ...] = frontier.points) -> int:
            return points[bisect.bisect_right(points, (budget, 2**63)) - 1][1]

        plans = [
            baselines.store_all(profile),
            baselines.recompute_each(profile),
            baselines.chen_sqrt(profile),
            baselines.all_moonwalk(profile),
            baselines.all_fragment(profile),
            baselines.all_invert(profile),
        ]
        plans += [
            baselines.greedy(profile, need)
            for need, _ in frontier.points[:: max(1, len(frontier.points) // 4)]
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
        assert baselines.best_recomputation(profile, budget).time_ns >= 0


@pytest.mark.parametrize(("budget", "slots"), [(0, 10), (10, 0), (2**63, 10), (1.5, 10)])
def test_rotor_bad_arguments(budget: int, slots: int) -> None:
    with pytest.raises(ArgumentError, match="`"):
        rotor(unit_chain(3), budget, slots)


def test_revolve_needs_a_slot() -> None:
    with pytest.raises(ArgumentError, match="slots"):
        baselines.revolve(unit_chain(3), 0)


def test_identical_layers_by_length_equal_the_general_tables() -> None:
    rng = random.Random(2)
    for _ in range(40):
        size = rng.randint(1, 9)
        profile = repeated(random_profile(rng, size))
        assert is_uniform(profile)
        uniform = UniformTables(profile, max_error=1e-4, allowed=ALL_STRATEGIES)
        frontier = solve_frontier(profile)
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
    exact = UniformTables(profile, max_error=1e-4, allowed=ALL_STRATEGIES).points()
    tables = SparseTables(profile, max_error=1e-4, allowed=ALL_STRATEGIES, thin=0.01)
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
    for allowed in (ALL_STRATEGIES, RECOMPUTATION):
        tables = JoinedTables(profile, parts, max_error=1e-4, allowed=allowed, thin=0.01)
        needs, times = tables.points()
        exact = Tables(Candidates(profile, allowed=allowed), None).solve_top().nodes[0, True]
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
    general = Tables(Candidates(profile, allowed=RECOMPUTATION), None, loss=0.0025).solve_top()
    best_needs, best_times = general.nodes[0, True]
    parts = stretches(profile, 96)
    tables = JoinedTables(profile, parts, max_error=1e-4, allowed=RECOMPUTATION, thin=0.02)
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
    frontier = solve_frontier(profile, thin=0.02)
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
    frontier = solve_frontier(profile, thin=0.01)
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
    frontier = solve_frontier(unit_chain(600), thin=0.05)
    assert max(depth(frontier.at(need).runs or ()) for need, _ in frontier.points[:5]) < 200


def test_schedules_may_nest_as_deep_as_a_chain_is_long() -> None:
    size = 450
    tables = UniformTables(unit_chain(size), max_error=1e-4, allowed=RECOMPUTATION)
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
