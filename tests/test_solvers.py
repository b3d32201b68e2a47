"""The frontier and the integer program against exhaustive search and the ledger, on chains small enough to
enumerate."""

from __future__ import annotations

import bisect
import dataclasses
import random
import re
import subprocess
import sys
import time as clock
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mwplan.solvers
from mwplan.common.errors import ArgumentError
from mwplan.plans.ledger import replay, strategies
from mwplan.plans.profiles import InvertOption, LayerProfile, Profile, StoreOption
from mwplan.plans.schedule import Run, RunKind, Status, Strategy
from mwplan.solvers.brute_force import every_cost, every_plan
from mwplan.solvers.frontier import Frontier, Tables, solve_frontier
from mwplan.solvers.integer_program import solve, solve_least_bytes
from mwplan.solvers.pareto import lexicographic, nondominated
from mwplan.solvers.relaxed import lower_bound
from mwplan.solvers.runs import fastest_ns
from tests.chains import random_profile, with_host

profiles = st.builds(
    lambda seed, size, scale: random_profile(random.Random(seed), size, scale=scale),
    st.integers(0, 2**32),
    st.integers(1, 7),
    st.sampled_from([4, 50, 10**6, 2**40]),
)


def pareto(costs: dict[int, int]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for need in sorted(costs):
        if not out or costs[need] < out[-1][1]:
            out.append((need, costs[need]))
    return tuple(out)


def ledgered(profile: Profile, frontier: Frontier, step: int = 1) -> None:
    for need, time in frontier.points[::step]:
        solution = frontier.at(need)
        found = replay(profile, solution.runs or ())
        assert (found.peak_bytes, found.time_ns) == (need, time) == (solution.peak_bytes, solution.time_ns)
        assert found.error <= 1e-4 * (1 + 1e-12)
        assert solution.error == pytest.approx(found.error)


@pytest.mark.parametrize("part", range(8))
def test_frontier_and_integer_program_equal_exhaustive_search_at_every_budget_on_1000_chains(
    part: int,
) -> None:
    rng = random.Random(part)
    for k in range(125):
        profile = random_profile(rng, rng.choice([1, 2, 3, 4, 4, 5, 5, 6]), scale=rng.choice([3, 5, 6]))
        best = pareto(every_cost(profile))
        frontier = solve_frontier(profile)
        assert frontier.points == best
        ledgered(profile, frontier)
        # Between two points nothing changes, so every budget is one of these; the program takes some of them.
        for need, time in best[k % 3 :: 3]:
            solution = solve(profile, need, frontier=frontier, workers=1)
            assert (solution.status, solution.time_ns, solution.peak_bytes) == (Status.OPTIMAL, time, need)
            assert solution.bound_ns == time
            found = replay(profile, solution.runs or ())
            assert (found.peak_bytes, found.time_ns) == (need, time)
        if best[0][0] > 1:
            too_small = solve(profile, best[0][0] - 1, frontier=frontier)
            assert too_small.status is Status.INFEASIBLE
            assert too_small.least_bytes == best[0][0] == frontier.at(best[0][0] - 1).least_bytes


def test_exhaustive_search_is_every_plan_in_the_ledger() -> None:
    rng = random.Random(1)
    for _ in range(60):
        profile = random_profile(rng, rng.randint(1, 3))
        costs: dict[int, int] = {}
        for runs in every_plan(profile):
            found = replay(profile, runs)
            costs[found.peak_bytes] = min(found.time_ns, costs.get(found.peak_bytes, found.time_ns))
        assert pareto(costs) == pareto(every_cost(profile)) == solve_frontier(profile).points


@pytest.mark.parametrize("allowed", [{s} for s in Strategy] + [{Strategy.STORE, s} for s in Strategy])
def test_allowed_strategies(allowed: set[Strategy]) -> None:
    rng = random.Random(2)
    for _ in range(25):
        profile = random_profile(rng, rng.randint(1, 5))
        frontier = solve_frontier(profile, allowed=frozenset(allowed))
        assert frontier.points == pareto(every_cost(profile, allowed=frozenset(allowed)))
        ledgered(profile, frontier)
        if not frontier.points:
            assert frontier.least_bytes is None
            assert frontier.at(10**9).status is Status.INFEASIBLE


@pytest.mark.parametrize("max_error", [0.0, 1e-6, 2e-5, 2.1e-5, 1.0, float("inf")])
def test_max_error_bounds_every_run(max_error: float) -> None:
    rng = random.Random(3)
    for _ in range(25):
        profile = random_profile(rng, rng.randint(1, 5), moonwalks=3)
        frontier = solve_frontier(profile, max_error=max_error)
        assert frontier.points == pareto(every_cost(profile, max_error=max_error))
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
            found = solve_frontier(profile, max_error=max_error, allowed={Strategy.INVERT}, thin=thin)
            assert (found.least_bytes is not None) is feasible
            if feasible:
                assert replay(profile, found.at(10**9).runs or ()).error == pytest.approx(8e-5)
    whole = dataclasses.replace(
        profile,
        layers=(layer,) * 300,
        **{f"{what}_bytes": (1,) * 301 for what in ("activation", "cotangent", "sweep_cotangent")},
    )
    found = solve_frontier(whole, max_error=4.1e-5 * 300**0.5, allowed={Strategy.INVERT}, thin=0.1)
    assert found.least_bytes is not None
    assert (
        solve_frontier(whole, max_error=3.9e-5 * 300**0.5, allowed={Strategy.INVERT}, thin=0.1).least_bytes
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
        for runs in every_plan(profile):
            if levels(runs) <= depth:
                found = replay(profile, runs)
                costs[found.peak_bytes] = min(found.time_ns, costs.get(found.peak_bytes, found.time_ns))
        frontier = solve_frontier(profile, max_recompute_depth=depth)
        assert frontier.points == pareto(costs)
        for need, _ in frontier.points:
            assert levels(frontier.at(need).runs or ()) <= depth


@settings(max_examples=60, deadline=None, derandomize=True)
@given(profiles)
def test_ledger_confirms_all_points_and_more_budget_never_costs_more(profile: Profile) -> None:
    frontier = solve_frontier(profile)
    assert frontier.points
    needs, times = zip(*frontier.points)
    assert list(needs) == sorted(set(needs))
    assert list(times) == sorted(set(times), reverse=True)
    ledgered(profile, frontier, step=max(1, len(needs) // 8))
    gain = frontier.next_gain(needs[0])
    assert gain == ((needs[1] - needs[0], times[0] - times[1]) if len(needs) > 1 else None)
    assert frontier.next_gain(needs[-1]) is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(profiles, st.sampled_from([0.01, 0.1, 0.5]))
def test_thinned_frontier_stays_within_the_loss_it_proves(profile: Profile, thin: float) -> None:
    exact, thinned = solve_frontier(profile), solve_frontier(profile, thin=thin)
    assert thinned.least_bytes == exact.least_bytes
    ledgered(profile, thinned, step=max(1, len(thinned.points) // 8))
    loss = thinned.loss()
    for need, time in exact.points:
        got = thinned.points[bisect.bisect_right(thinned.points, (need, 2**63)) - 1][1]
        assert thinned.bound_ns(need) <= time <= got <= time * (1 + loss) * (1 + 1e-12)
    need = exact.points[len(exact.points) // 2][0]
    solution = solve(profile, need, frontier=thinned, workers=1)
    assert solution.bound_ns <= exact.at(need).time_ns <= solution.time_ns
    assert solution.status is not Status.OPTIMAL or solution.time_ns == exact.at(need).time_ns


def repeated(profile: Profile) -> Profile:
    layer = profile.layers[0]
    n = len(profile) + 1
    return dataclasses.replace(
        profile,
        layers=tuple(dataclasses.replace(layer, name=f"copy{k}") for k in range(n - 1)),
        activation_bytes=(3,) * n,
        cotangent_bytes=(3,) * n,
        sweep_cotangent_bytes=(4,) * n,
    )


def in_a_row(rng: random.Random, before: int, size: int, after: int) -> Profile:
    """`size` equal layers between others."""
    profile = random_profile(rng, before + after + 1, scale=rng.choice([5, 50]))
    counts = {}
    for what in ("activation_bytes", "cotangent_bytes", "sweep_cotangent_bytes"):
        own = getattr(profile, what)
        counts[what] = (
            *own[:before],
            *[own[before]] * size,
            *[own[before]] * (after > 0),
            *own[before + 2 :],
        )
        counts[what] += (own[before],) * (after == 0)
    middle = profile.layers[before : before + 1] * size
    layers = (*profile.layers[:before], *middle, *profile.layers[before + 1 :])
    return dataclasses.replace(profile, layers=layers, **counts)


def test_long_chains_have_their_fastest_schedule() -> None:
    profile = in_a_row(random.Random(4), 0, 200, 0)
    for allowed in (set(Strategy), {Strategy.STORE, Strategy.FRAGMENT, Strategy.VIJP}):
        frontier = solve_frontier(profile, thin=0.02, allowed=allowed)
        assert frontier.points[-1][1] == fastest_ns(profile)
        assert replay(profile, frontier.at(frontier.points[-1][0]).runs or ()).time_ns == fastest_ns(profile)


@pytest.mark.parametrize("piece", [3, 320])
def test_bound_of_long_chains_is_below_every_exact_frontier(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """What bounds chains too long for exact tables, on chains that are not: all cut somewhere, or none of it,
    within the least need too."""
    monkeypatch.setattr("mwplan.solvers.relaxed._PIECE", piece)
    above = 0
    for seed in range(40):
        rng = random.Random(seed)
        before, size, after = rng.randint(0, 3), rng.randint(4, 9), rng.randint(0, 2)
        profile = in_a_row(rng, before, size, after)
        exact = solve_frontier(profile)
        parts = [(0, before, False)] * (before > 0) + [(before, before + size, True)]
        parts += [(before + size, len(profile), False)] * (after > 0)
        need, time = (
            x.tolist()
            for x in lower_bound(profile, parts, max_error=1e-4, allowed=frozenset(Strategy), thin=0.02)
        )
        assert need[0] <= exact.points[0][0]
        for budget, ns in exact.points:
            bound = time[bisect.bisect_right(need, budget) - 1]
            assert bound <= ns
            above += bound > fastest_ns(profile)
    assert above > 40


def test_long_chains_state_a_gap() -> None:
    profile = in_a_row(random.Random(1), 2, 160, 2)
    found = solve_frontier(profile, thin=0.02)
    assert not isinstance(found.tables, Tables)
    budget = 3 * found.points[0][0]
    solution = solve(profile, budget, frontier=found)
    assert solution.runs is not None
    assert fastest_ns(profile) < solution.bound_ns <= solution.time_ns
    assert replay(profile, solution.runs).peak_bytes <= budget


def distinct(profile: Profile, runs: tuple[Run, ...]) -> int:
    """How many different outermost runs there are, written without the solver's help."""
    kept, seen = True, set()
    for run in runs:

        def relative(x: Run, base: int = run.start) -> tuple[object, ...]:
            return (
                x.kind,
                x.start - base,
                x.stop - base,
                x.options,
                tuple(relative(y, base) for y in x.inner),
            )

        at = [
            (
                dataclasses.replace(profile.layers[i], name=""),
                profile.activation_bytes[i + 1],
                profile.cotangent_bytes[i + 1],
                profile.sweep_cotangent_bytes[i + 1],
            )
            for i in range(run.start, run.stop)
        ]
        i = run.start
        start = (
            profile.activation_bytes[i],
            profile.cotangent_bytes[i],
            profile.sweep_cotangent_bytes[i],
            kept,
        )
        seen.add((start, tuple(at), relative(run)))
        last = profile.layers[run.stop - 1]
        kept = run.kind is RunKind.INVERT
        if run.kind is RunKind.STORE:
            kept = next(o for o in last.store if o.name == run.options[0]).keeps_output
        elif run.kind is RunKind.MOONWALK:
            kept = next(o for o in last.moonwalk if o.name == run.options[-1]).keeps_output
    return len(seen)


@pytest.mark.parametrize("part", range(4))
def test_side_conditions_equal_exhaustive_search(part: int) -> None:
    rng = random.Random(part)
    for k in range(15):
        profile = random_profile(rng, 3, scale=4)
        profile = repeated(profile) if k % 2 else profile
        host = 0 if k % 3 else rng.randint(1, 12)
        profile = with_host(rng, profile, scale=4) if host else profile
        plans = [(runs, replay(profile, runs)) for runs in every_plan(profile, host=host > 0)]
        frontier = solve_frontier(profile)
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
        given_ = {
            "pins": pins,
            "forbid": forbid,
            "host_bytes": host,
            "max_distinct_runs": limit,
            "frontier": frontier,
            "workers": 1,
        }
        for budget in [1, *sorted({need for need, _ in good})[::4]]:
            want = min((time for need, time in good if need <= budget), default=None)
            solution = solve(profile, budget, **given_)  # type: ignore[arg-type]
            if want is None:
                assert solution.status is Status.INFEASIBLE
                continue
            assert (solution.status, solution.time_ns, solution.bound_ns) == (Status.OPTIMAL, want, want)
            found = replay(profile, solution.runs or ())
            assert (found.time_ns, found.peak_bytes) == (want, solution.peak_bytes)
            assert found.peak_bytes <= budget
            assert found.host_bytes <= host
            lean = solve_least_bytes(profile, want, **given_)  # type: ignore[arg-type]
            assert lean.status is Status.OPTIMAL
            assert lean.peak_bytes == lean.least_bytes == min(need for need, time in good if time <= want)


def test_the_host_s_memory_is_a_second_budget() -> None:
    """Equal to exhaustive search, and more of it is never slower."""
    rng = random.Random(9)
    for _ in range(12):
        profile = with_host(rng, random_profile(rng, rng.randint(1, 3)))
        plans = [replay(profile, runs) for runs in every_plan(profile, host=True)]
        frontier = solve_frontier(profile)
        needs = sorted({found.peak_bytes for found in plans})
        for budget in (needs[0], *rng.sample(needs, min(3, len(needs)))):
            times = []
            for host in (0, 4, 9, 20, 10**6):
                fits = [x.time_ns for x in plans if x.peak_bytes <= budget and x.host_bytes <= host]
                solution = solve(profile, budget, host_bytes=host, frontier=frontier, workers=1)
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
    away = profile.offloading(1e6, least_bytes=1)
    for layer, before, after in zip(away.layers, away.activation_bytes, away.activation_bytes[1:]):
        for o, store in zip(
            layer.offload, [o for o in layer.store if o.residual_bytes + o.keeps_input + o.keeps_output]
        ):
            kept = store.residual_bytes + store.keeps_input * before + store.keeps_output * after
            assert (o.name, o.host_bytes) == (store.name, kept)
            assert o.forward_ns - store.forward_ns == o.backward_ns - store.backward_ns == 1000 * kept
    assert solve_frontier(away).points == solve_frontier(profile).points
    # Copies that cost next to nothing: the frontier's leanest budget in a fraction of its time.
    profile = profile.offloading(1e15, least_bytes=1)
    frontier = solve_frontier(profile)
    assert frontier.least_bytes is not None
    every = sum(max(o.host_bytes for o in layer.offload) for layer in profile.layers if layer.offload)
    times = [frontier.at(frontier.least_bytes).time_ns]
    for host in (every // 8, every // 2, every):
        solution = solve(profile, frontier.least_bytes, host_bytes=host, frontier=frontier, time_limit_s=20.0)
        found = replay(profile, solution.runs or ())
        assert found.host_bytes <= host
        assert (found.time_ns, found.peak_bytes) == (solution.time_ns, solution.peak_bytes)
        assert solution.bound_ns <= solution.time_ns <= times[-1]
        times.append(solution.time_ns)
    assert times[-1] < times[1] < times[0]


def test_least_bytes_is_the_frontier_the_other_way_round() -> None:
    rng = random.Random(6)
    for _ in range(20):
        profile = random_profile(rng, rng.randint(1, 7))
        frontier = solve_frontier(profile)
        for need, time in frontier.points:
            solution = solve_least_bytes(profile, time, frontier=frontier, workers=1)
            assert (solution.status, solution.peak_bytes) == (Status.OPTIMAL, need)
        assert (
            solve_least_bytes(profile, frontier.points[-1][1] - 1, frontier=frontier).status
            is Status.INFEASIBLE
        )


def test_single_layers_merged_for_all_ends_at_once_equal_the_general_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        profile = random_profile(rng, rng.randint(2, 9), moonwalks=0, inverts=0)
        at_once = solve_frontier(profile, max_recompute_depth=1)
        thinned = solve_frontier(profile, max_recompute_depth=1, thin=0.05)
        ledgered(profile, at_once)
        ledgered(profile, thinned)
        assert all(thinned.bound_ns(need) <= time for need, time in at_once.points)
        assert thinned.least_bytes == at_once.least_bytes
        with monkeypatch.context() as patch:
            patch.setattr("mwplan.solvers.frontier.Tables._is_plain", lambda self: False)
            assert solve_frontier(profile, max_recompute_depth=1).points == at_once.points


def test_slack_gives_the_program_more_runs_and_the_same_optimum() -> None:
    profile = random_profile(random.Random(7), 20)
    frontier = solve_frontier(profile)
    budget = frontier.points[len(frontier.points) // 2][0]
    tight, loose = (solve(profile, budget, frontier=frontier, slack=s) for s in (0.0, 0.05))
    assert tight.status is loose.status is Status.OPTIMAL
    assert tight.time_ns == loose.time_ns
    assert dict(loose.stats)["columns"] > dict(tight.stats)["columns"]


def test_a_second_is_enough_for_an_honest_answer() -> None:
    profile = random_profile(random.Random(8), 30)
    frontier = solve_frontier(profile)
    budget = frontier.points[len(frontier.points) // 3][0]
    solution = solve(profile, budget, frontier=frontier, max_distinct_runs=6, time_limit_s=1.0)
    if solution.status is Status.UNKNOWN:
        assert solution.runs is None
    if solution.runs is not None:
        assert solution.bound_ns <= solution.time_ns
        assert (solution.status is Status.OPTIMAL) == (solution.bound_ns == solution.time_ns)
        assert replay(profile, solution.runs).peak_bytes == solution.peak_bytes <= budget


@pytest.mark.parametrize("condition", ["pins", "max_distinct_runs"])
def test_side_conditions_on_long_chains_give_a_plan_in_time(condition: str) -> None:
    profile = random_profile(random.Random(9), 50, scale=1_000)
    frontier = solve_frontier(profile, thin=0.02)
    need = [n for n, _ in frontier.points]
    budget = (need[0] + need[-1]) // 2
    pins = {25: Strategy.STORE, 26: Strategy.RECOMPUTE} if condition == "pins" else None
    limit = 3 if condition == "max_distinct_runs" else None
    began = clock.process_time()
    solution = solve(
        profile, budget, frontier=frontier, pins=pins, max_distinct_runs=limit, time_limit_s=0.5, workers=1
    )
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


def chain_of(n: int, **changes: int) -> Profile:
    option = StoreOption(
        name="all", residual_bytes=0, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=2
    )
    layer = LayerProfile(name="x", forward_ns=1, store=(dataclasses.replace(option, **changes),))
    counts = (8,) * (n + 1)
    return Profile(
        layers=(layer,) * n, activation_bytes=counts, cotangent_bytes=counts, sweep_cotangent_bytes=counts
    )


@pytest.mark.parametrize(
    "change",
    [
        {"budget_bytes": 0},
        {"budget_bytes": -5},
        {"budget_bytes": 2**63},
        {"budget_bytes": 1.5},
        {"budget_bytes": True},
        {"time_limit_s": 0},
        {"time_limit_s": float("nan")},
        {"workers": 0},
        {"seed": -1},
        {"max_distinct_runs": 0},
        {"pins": {0: Strategy.STORE}},
        {"pins": {4: Strategy.STORE}},
        {"pins": {1: "stored"}},
        {"pins": {1: Strategy.STORE}, "forbid": {1: Strategy.STORE}},
        {"pins": {1: Strategy.VIJP}, "allowed": {Strategy.STORE}},
        {"max_error": -1.0},
        {"max_error": float("nan")},
        {"allowed": set()},
        {"allowed": {"stored"}},
        {"slack": -1.0},
        {"max_recompute_depth": -1},
    ],
)
def test_bad_arguments_are_named(change: dict[str, object]) -> None:
    arguments = {"budget_bytes": 100, **change}
    with pytest.raises(ArgumentError, match=r"`|layer"):
        solve(chain_of(3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "most", "columns", "among"),
    [
        (1, 9, 3, 3),
        (64, 4, 3, 3),
        (65, 10**6, 3, 3),
        (700, 30, 3, 3),
        (700, 2**40, 3, 3),
        (1, 9, 5, 3),
        (300, 3, 5, 100),
        (300, 2**40, 4, 100),
        (400, 30, 6, 2),
    ],
)
def test_nondominated_points_are_those_that_nothing_beats(
    size: int, most: int, columns: int, among: int
) -> None:
    rng = random.Random(size)
    points = [tuple(rng.randint(0, most) for _ in range(columns)) for _ in range(size)]
    # Points of one sum beat none but their equals.
    points += [(*rest, a, b, 2 * most - a - b) for *rest, a, b, _ in points]
    groups = [rng.randint(0, among - 1) for _ in points]
    kept = nondominated([np.array(x) for x in zip(*points)], np.array(groups)).tolist()
    assert [groups[k] for k in kept] == sorted(groups[k] for k in kept)

    def beaten(point: tuple[int, ...], group: int, others: list[int]) -> bool:
        return any(groups[k] == group and all(a <= b for a, b in zip(points[k], point)) for k in others)

    for k, (point, group) in enumerate(zip(points, groups)):
        assert beaten(point, group, [x for x in kept if x != k]) == (k not in kept)


@pytest.mark.parametrize("highs", [(3, 4, 5), (3, 2**40, 4, 3), (2**60, 2, 3), (2, 3, 2**61)])
def test_the_order_is_lexicographic(highs: tuple[int, ...]) -> None:
    """Whether all columns fit one integer or not; equal rows stay in order."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, min(high, 4), 400) * (high // min(high, 4)) for high in highs]
    assert (lexicographic(columns) == np.lexsort(columns[::-1])).all()
    assert lexicographic([x[:0] for x in columns]).size == 0


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
        lean = InvertOption(
            name="lean",
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
            lean,
            name="bits",
            residual_bytes=activation // 32,
            kink=0.0,
            sensitivity=more,
            backward_ns=29 * ns // 10,
        )
        layers.append(LayerProfile(name="x", forward_ns=ns, store=(store,), invert=(lean, bits)))
    counts = (activation,) * (size + 1)
    profile = Profile(
        layers=tuple(layers), activation_bytes=counts, cotangent_bytes=counts, sweep_cotangent_bytes=counts
    )
    exact, thinned = (solve_frontier(profile, thin=thin) for thin in (0.0, 0.01))
    few, many = (sum(len(option) for option, _ in f.tables.candidates._invert) for f in (thinned, exact))
    assert few < many / 2
    used = {name for need, _ in thinned.points for run in thinned.at(need).runs or () for name in run.options}
    assert used == {"all", "lean", "bits"}
    for need, ns in exact.points:
        assert min(t for n, t in thinned.points if n <= need) <= 1.01 * ns
    ledgered(profile, thinned)


def test_bad_frontier_arguments() -> None:
    for change in ({"thin": -0.1}, {"thin": 1.0}, {"max_error": "x"}, {"max_recompute_depth": 1.5}):
        with pytest.raises(ArgumentError, match="`"):
            solve_frontier(chain_of(3), **change)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Profile"):
        solve_frontier("profile")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="frontier"):
        solve(chain_of(3), 100, frontier=solve_frontier(chain_of(2)))


def test_costs_at_the_edge_of_64_bits() -> None:
    with pytest.raises(ArgumentError, match="larger unit"):
        chain_of(3, residual_bytes=2**62, backward_workspace_bytes=2**62)
    with pytest.raises(ArgumentError, match="larger unit"):
        solve_frontier(chain_of(3, residual_bytes=2**61))
    profile = chain_of(3, residual_bytes=2**56, backward_ns=2**55)
    frontier = solve_frontier(profile)
    assert frontier.points == pareto(every_cost(profile))
    solution = solve(profile, 2**63 - 1, frontier=frontier)
    assert (solution.status, solution.time_ns) == (Status.OPTIMAL, frontier.points[-1][1])


def test_a_chain_of_one_layer() -> None:
    profile = chain_of(1)
    frontier = solve_frontier(profile)
    assert frontier.points == ((16, 3),)
    solution = solve(profile, 16)
    assert solution.runs == (Run(kind=RunKind.STORE, start=0, stop=1, options=("all",)),)
    assert solve(profile, 16, pins={1: Strategy.RECOMPUTE}).time_ns == 4


def test_solvers_load_no_ortools_and_import_no_jax() -> None:
    modules = "mwplan.solvers.frontier, mwplan.solvers.integer_program"
    code = f"import sys, {modules}; assert 'ortools' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in Path(mwplan.solvers.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(import|from) jax", path.read_text(), re.MULTILINE), path
