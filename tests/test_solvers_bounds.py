"""What thinned frontiers lose and prove, and bounds of chains too long for exact tables."""

from __future__ import annotations

import bisect
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mwplan.plans.ledger import replay
from mwplan.plans.profiles import InvertOption, LayerProfile, Profile, StoreOption
from mwplan.plans.schedule import Status, Strategy
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.integer_program import solve
from mwplan.solvers.predictions import fastest_ns
from mwplan.solvers.problem import Problem
from mwplan.solvers.relaxed import lower_bound
from mwplan.solvers.top import Top
from mwplan.solvers.tuning import TUNING
from tests.chains import random_profile
from tests.solver_checks import in_a_row, ledgered

profiles = st.builds(
    lambda seed, size, scale: random_profile(random.Random(seed), size, scale=scale),
    st.integers(0, 2**32),
    st.integers(1, 7),
    st.sampled_from([4, 50, 10**6, 2**40]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(profiles, st.sampled_from([0.01, 0.1, 0.5]))
def test_thinned_frontier_stays_within_the_loss_it_proves(profile: Profile, thin: float) -> None:
    exact, thinned = (
        solve_frontier(Problem(profile=profile)),
        solve_frontier(Problem(profile=profile, thin=thin)),
    )
    assert thinned.least_bytes == exact.least_bytes
    ledgered(profile, thinned, step=max(1, len(thinned.points) // 8))
    loss = thinned.loss()
    for need, time in exact.points:
        got = thinned.points[bisect.bisect_right(thinned.points, (need, 2**63)) - 1][1]
        assert thinned.bound_ns(need) <= time <= got <= time * (1 + loss) * (1 + 1e-12)
    need = exact.points[len(exact.points) // 2][0]
    solution = solve(Problem(profile=profile, budget_bytes=need, workers=1), thinned)
    assert solution.bound_ns <= exact.at(need).time_ns <= solution.time_ns
    assert solution.status is not Status.OPTIMAL or solution.time_ns == exact.at(need).time_ns


def test_long_chains_have_their_fastest_schedule() -> None:
    profile = in_a_row(random.Random(4), 0, 200, 0)
    for allowed in (set(Strategy), {Strategy.STORE, Strategy.FRAGMENT, Strategy.VIJP}):
        frontier = solve_frontier(Problem(profile=profile, thin=0.02, allowed=allowed))
        assert frontier.points[-1][1] == fastest_ns(profile)
        assert replay(profile, frontier.at(frontier.points[-1][0]).runs or ()).time_ns == fastest_ns(profile)


@pytest.mark.parametrize("piece", [3, 320])
def test_bound_of_long_chains_is_below_every_exact_frontier(piece: int) -> None:
    """What bounds chains too long for exact tables, on chains that are not: all cut somewhere, or none of it,
    within the least need too."""
    above = 0
    for seed in range(40):
        rng = random.Random(seed)
        before, size, after = rng.randint(0, 3), rng.randint(4, 9), rng.randint(0, 2)
        profile = in_a_row(rng, before, size, after)
        exact = solve_frontier(Problem(profile=profile))
        parts = [(0, before, False)] * (before > 0) + [(before, before + size, True)]
        parts += [(before + size, len(profile), False)] * (after > 0)
        tuning = dataclasses.replace(TUNING, bound_piece=piece)
        problem = Problem(profile=profile, thin=0.02, tuning=tuning)
        need, time = (x.tolist() for x in lower_bound(problem, parts))
        assert need[0] <= exact.points[0][0]
        for budget, ns in exact.points:
            bound = time[bisect.bisect_right(need, budget) - 1]
            assert bound <= ns
            above += bound > fastest_ns(profile)
    assert above > 40


def test_long_chains_state_a_gap() -> None:
    profile = in_a_row(random.Random(1), 2, 160, 2)
    found = solve_frontier(Problem(profile=profile, thin=0.02))
    assert not isinstance(found.tables, Top)
    budget = 3 * found.points[0][0]
    solution = solve(Problem(profile=profile, budget_bytes=budget), found)
    assert solution.runs is not None
    assert fastest_ns(profile) < solution.bound_ns <= solution.time_ns
    assert replay(profile, solution.runs).peak_bytes <= budget


def test_thinned_invert_runs_lose_little_and_are_few() -> None:
    """Of layers with two inverses, one of which keeps more and errs less, many choices take about the same
    time."""
    size, activation, rng = 20, 1 << 20, random.Random(0)
    layers = []
    for _ in range(size):
        more = 1 + 0.1 * rng.random()
        ns = int(10**6 * more)
        store = StoreOption(
            name="all",
            residual_bytes=3 * activation,
            keeps_input=False,
            keeps_output=False,
            forward_ns=ns,
            backward_ns=2 * ns,
        )
        small = InvertOption(
            name="small",
            residual_bytes=0,
            forward_ns=ns,
            backward_ns=3 * ns,
            local_error=6e-8 * more,
            growth=1.02 * more**0.2,
            sensitivity=2 * more,
            gradient_sensitivity=more,
            kink=1e-6 * more,
        )
        bits = dataclasses.replace(
            small,
            name="bits",
            residual_bytes=activation // 32,
            kink=0.0,
            sensitivity=more,
            backward_ns=29 * ns // 10,
        )
        layers.append(LayerProfile(name="x", forward_ns=ns, store=(store,), invert=(small, bits)))
    counts = (activation,) * (size + 1)
    profile = Profile(
        layers=tuple(layers), activation_bytes=counts, cotangent_bytes=counts, sweep_cotangent_bytes=counts
    )
    exact, thinned = (solve_frontier(Problem(profile=profile, thin=thin)) for thin in (0.0, 0.01))
    few, many = (
        sum(len(option) for option, _ in f.tables.candidates.inverts.labels) for f in (thinned, exact)
    )
    assert few < many / 2
    used = {name for need, _ in thinned.points for run in thinned.at(need).runs or () for name in run.options}
    assert used == {"all", "small", "bits"}
    for need, ns in exact.points:
        assert min(t for n, t in thinned.points if n <= need) <= 1.01 * ns
    ledgered(profile, thinned)
