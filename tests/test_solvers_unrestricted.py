"""Single operations without runs: a lower bound for tiny chains, and what the run structure gives away."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from mwplan.common.errors import ArgumentError
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Status
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.problem import Problem
from mwplan.solvers.unrestricted import solve_unrestricted, steps_of
from tests.chains import random_profile


def plain(profile: Profile) -> Profile:
    """`profile` in the prices the operations know: no savings, no errors, whole fragments copied, one size a
    boundary."""

    def option(o: Any) -> Any:
        zero = {f.name: 0 for f in dataclasses.fields(o) if f.name.endswith("saving_bytes")}
        flags = {"fragment_is_cotangent": False, "local_error": 0.0, "growth": 0.0}
        return dataclasses.replace(o, **zero, **{k: v for k, v in flags.items() if hasattr(o, k)})

    layers = tuple(
        dataclasses.replace(
            layer,
            **{kind: tuple(map(option, getattr(layer, kind))) for kind in ("store", "moonwalk", "invert")},
        )
        for layer in profile.layers
    )
    sizes = profile.activation_bytes
    return dataclasses.replace(profile, layers=layers, cotangent_bytes=sizes, sweep_cotangent_bytes=sizes)


def test_never_above_the_run_space_and_seldom_below() -> None:
    rng = random.Random(4)  # some seeds' chains take minutes to prove
    cases = better = 0
    for _ in range(25):
        profile = plain(random_profile(rng, rng.randint(1, 4), stores=1, moonwalks=1))
        problem = Problem(profile=profile, workers=1)
        frontier = solve_frontier(problem)
        for need, time in frontier.points[:: max(1, len(frontier.points) // 3)]:
            steps = steps_of(frontier.at(need).runs or ()) + 1
            found = solve_unrestricted(problem.within(need), steps)
            assert found.status is Status.OPTIMAL
            assert found.time_ns == found.bound_ns <= time
            assert found.operations.count("loss") == 1
            cases += 1
            better += found.time_ns < time
    assert 0 < better < cases / 5


def test_nothing_fits_no_bytes() -> None:
    profile = plain(random_profile(random.Random(1), 2))
    found = solve_unrestricted(Problem(profile=profile, budget_bytes=1), 6)
    assert (found.status, found.operations) == (Status.INFEASIBLE, ())


@pytest.mark.parametrize("change", [{"budget_bytes": 0}, {"steps": 0}, {"steps": 1.5}])
def test_bad_arguments(change: dict[str, Any]) -> None:
    arguments = {"budget_bytes": 10, "steps": 4, **change}
    steps, profile = arguments.pop("steps"), plain(random_profile(random.Random(1), 1))
    with pytest.raises(ArgumentError, match="`"):
        solve_unrestricted(Problem(profile=profile, **arguments), steps)
