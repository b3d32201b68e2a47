"""From a budget to a compiled step that keeps it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import fitting
from mwplan.layers import Dense
from tests.helpers import mean_square, relative_error, with_round_times


def network() -> mw.Chain:
    """Products and tanh: activations of one size, and a frontier of many budgets."""
    keys = jax.random.split(jax.random.key(0), 6)
    return mw.Chain([layer for key in keys for layer in (Dense.init(key, 32, 32), jnp.tanh)])


@pytest.fixture(scope="module")
def profile() -> mw.Profile:
    return with_round_times(mw.profile(network(), jnp.ones((512, 32)), repeats=1))


def test_the_compiled_step_keeps_the_budget(profile: mw.Profile) -> None:
    chain, x = network(), jax.random.normal(jax.random.key(0), (512, 32))
    frontier = mw.frontier(profile)
    assert frontier.least_bytes is not None
    budget = (2 * frontier.least_bytes + frontier.points[-1][0]) // 3
    found = mw.fit(mean_square, chain, x, budget=budget, profile=profile)
    assert profile.fixed_bytes + found.temporary_bytes <= budget == found.schedule.budget_bytes
    (_, report), grads = found.step(chain, x)
    assert relative_error(grads, jax.grad(lambda c: mean_square(c(x)))(chain)) < 1e-4
    assert float(report.worst) < 1e-4
    assert found.attempts[-1].measured_bytes == found.temporary_bytes


def test_leaner_schedules_are_tried_until_one_fits(
    profile: mw.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, x = network(), jnp.ones((512, 32))
    real, asked = fitting.temporaries, []

    def pessimist(compiled: object) -> int:
        asked.append(real(compiled))
        return 1 << 40 if len(asked) < 3 else asked[-1]

    monkeypatch.setattr(fitting, "temporaries", pessimist)
    told: list[str] = []
    total = mw.frontier(profile).points[-1][0] + 3 * x.nbytes
    found = mw.fit(mean_square, chain, x, budget=total, profile=profile, say=told.append)
    assert len(found.attempts) == 3 == len(told) + 1
    sizes = [attempt.predicted_bytes for attempt in found.attempts]
    assert sizes == sorted(sizes, reverse=True)
    assert "trying a leaner one" in told[0]
    monkeypatch.setattr(fitting, "temporaries", lambda compiled: 1 << 40)
    with pytest.raises(mw.InfeasibleError, match=r"of the 2 that were compiled none does.*raise the budget"):
        mw.fit(mean_square, chain, x, budget=total, profile=profile, max_attempts=2)


def test_budgets_that_nothing_fits(profile: mw.Profile) -> None:
    chain, x = network(), jnp.ones((512, 32))
    with pytest.raises(mw.InfeasibleError, match="leanest schedule needs"):
        mw.fit(mean_square, chain, x, budget=profile.fixed_bytes + 1, profile=profile)
    with pytest.raises(mw.ArgumentError, match="max_attempts"):
        mw.fit(mean_square, chain, x, budget="1GiB", profile=profile, max_attempts=0)
