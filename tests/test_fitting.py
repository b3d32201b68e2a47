"""From a budget to a compiled step that keeps it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import planning
from mwplan.common.sizes import show_bytes
from mwplan.fitting import fitting, search, tuning
from mwplan.fitting.fitted import Fitted
from mwplan.layers import Dense
from mwplan.plans.packing import Buffer, Workspace
from mwplan.plans.schedule import Run, RunKind, Schedule, Solution, Strategy
from tests.compilers import GAPS_ON_NEWEST
from tests.helpers import mean_square, relative_error, store_all, tanh, with_round_times


def network() -> mw.Chain:
    """products and sin: activations of one size, and a frontier of many budgets."""
    keys = jax.random.split(jax.random.key(0), 6)
    return mw.Chain([layer for key in keys for layer in (Dense.init(key, 32, 32), tanh)])


@pytest.fixture(scope="module")
def profile() -> mw.Profile:
    return with_round_times(mw.profile(network(), jnp.ones((512, 32)), repeats=1))


def bare(profile: mw.Profile, allowed: frozenset[Strategy] = planning.EVERY_STRATEGY) -> mw.Frontier:
    """The frontier, no fragmentation predicted."""
    return mw.frontier(dataclasses.replace(profile, workspaces=()), allowed=allowed)


def inverting_is_free(profile: mw.Profile) -> mw.Profile:
    """`profile`, with other times."""
    layers = (
        dataclasses.replace(one, invert=tuple(dataclasses.replace(o, backward_ns=1) for o in one.invert))
        for one in profile.layers
    )
    return dataclasses.replace(profile, layers=tuple(layers))


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
    assert 3 < str(found).count("\n") + 1 < 8
    assert found.plain_bytes is not None
    assert found.plain_bytes > found.temporary_bytes
    assert f"plain `jax.grad` takes {show_bytes(found.plain_bytes)}" in str(found)
    assert "compiled step of 12 layers" in str(found)


@GAPS_ON_NEWEST
def test_the_least_budget_is_kept_to_the_byte(profile: mw.Profile) -> None:
    """Arrays alone are not all that a step takes: the tables of pointers beside them are predicted too, and
    not much too large."""
    chain, x = network(), jnp.ones((512, 32))
    frontier = mw.frontier(profile)
    for total, _ in (frontier.points[0], frontier.points[-1]):
        schedule = frontier.at(total)
        arrays = mw.replay(profile, schedule.runs).peak_bytes
        got = mw.temporaries(mw.jit(mw.value_and_grad(mean_square, schedule)).lower(chain, x).compile())
        assert arrays < got <= schedule.peak_bytes <= arrays + 1024 * len(chain)
        assert schedule.total_bytes <= total
    assert frontier.at(frontier.least_bytes or 0).total_bytes == frontier.least_bytes


def test_an_unknown_arrangement_is_refused(profile: mw.Profile) -> None:
    chain, x = network(), jnp.ones((512, 32))
    schedule = mw.frontier(profile).at(1 << 40)
    for wrong in (1, True, "loose"):
        with pytest.raises(mw.ArgumentError, match=r"`arrangement=.*` must be 0"):
            mw.apply(schedule, chain, x, arrangement=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("way", "share"), [(mw.UNTIED, 0.8), (mw.LOOSE, 0.9)])
def test_an_untied_step_has_the_same_gradient_and_still_recomputes(way: int, share: float) -> None:
    """Without barriers around operations, or around residuals, those around recomputed stretches are left:
    less memory than plain backpropagation, in a loop and out of it."""
    chain, x = network(), jax.random.normal(jax.random.key(0), (512, 32))
    store = [Run(kind=RunKind.STORE, start=at, stop=at + 1, options=("vjp",)) for at in range(12)]
    parts = [
        Run(kind=RunKind.RECOMPUTE, start=at, stop=at + 4, inner=tuple(store[at : at + 4])) for at in (0, 4)
    ]
    schedule = Schedule(runs=(*parts, *store[8:]))
    for net in (chain, mw.stack(chain, x)):
        untied = mw.jit(mw.value_and_grad(mean_square, schedule, arrangement=way)).lower(net, x)
        plain = mw.jit(jax.grad(lambda net: mean_square(net(x)))).lower(net).compile()
        (_, _), grads = untied.compile()(net, x)
        assert relative_error(grads, plain(net)) < 1e-5
        assert mw.temporaries(untied.compile()) < share * mw.temporaries(plain)
        applied = jax.grad(lambda net: mean_square(mw.apply(schedule, net, x, arrangement=way)))
        assert relative_error(mw.jit(applied)(net), grads) < 1e-6


def test_smaller_schedules_are_tried_until_one_fits(
    profile: mw.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, x = network(), jnp.ones((512, 32))
    real, asked = search.temporaries, []

    def pessimist(compiled: object) -> int:
        asked.append(real(compiled))
        return 1 << 40 if len(asked) < 3 else asked[-1]

    monkeypatch.setattr(search, "temporaries", pessimist)
    told: list[str] = []
    total = mw.frontier(profile).points[-1][0] + 3 * x.nbytes
    found = mw.fit(mean_square, chain, x, budget=total, profile=profile, say=told.append)
    assert len(found.attempts) == 3 == len(told)
    assert "within" in told[-1]
    sizes = [attempt.predicted_bytes for attempt in found.attempts]
    assert sizes == sorted(sizes, reverse=True)
    says = r"^a plan \(store .*\), predicted .*: compiled, .* above the .* that the budget leaves"
    assert re.search(says, told[0])
    monkeypatch.setattr(search, "temporaries", lambda compiled: 1 << 40)
    asked = (
        r"^`budget='[\d_]+ B'` \([\d_]+ bytes\): of the \d+ programs that were compiled none fits.*raise.*"
        r"Plain `jax.grad` needs"
    )
    with pytest.raises(mw.InfeasibleError, match=asked):
        mw.fit(mean_square, chain, x, budget=f"{total} B", profile=profile, max_attempts=2)


@GAPS_ON_NEWEST
def test_fragmentation_that_is_only_predicted_costs_nothing(
    profile: mw.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan sets the fastest schedule aside for fragmentation, and says so; `fit` compiles it and finds
    none."""
    chain, x = network(), jnp.ones((512, 32))
    frontier = mw.frontier(profile)
    budget = frontier.points[-2][0] + x.nbytes
    fastest = frontier.solved.at(budget - frontier.always_bytes)

    def packed_bytes(self: planning.Frontier, solution: Solution) -> int:
        gap = solution.runs == fastest.runs and self.profile.workspaces
        return self.profile.table_bytes + solution.peak_bytes + (budget if gap else 0)

    monkeypatch.setattr(planning.Frontier, "_packed_bytes", packed_bytes)
    workspace = Workspace(total_bytes=1, buffers=(Buffer(1, 0, 0),))
    foreseen = dataclasses.replace(profile, workspaces=(workspace,))
    plan = mw.plan(foreseen, budget)
    assert plan.runs != fastest.runs
    assert "was set aside, for its predicted fragmentation" in str(plan)
    found = mw.fit(mean_square, chain, x, budget=budget, profile=foreseen)
    assert found.schedule.runs == fastest.runs
    assert len(found.attempts) == 1


def test_a_quicker_plan_is_looked_for_where_fragmentation_costs_time(
    profile: mw.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fragmentation is predicted of all but the smallest schedule; only the fastest has any, and little: the
    next on the frontier does. It is not called optimal."""
    chain, x = network(), jnp.ones((512, 32))
    frontier = mw.frontier(profile)
    assert frontier.least_bytes is not None
    budget = frontier.points[-1][0]
    fastest, least = (bare(profile).at(total) for total in (budget, frontier.least_bytes))
    real, asked = search.temporaries, []

    def packed_bytes(self: planning.Frontier, solution: Solution) -> int:
        gap = solution.peak_bytes != frontier.solved.least_bytes and self.profile.workspaces
        return self.profile.table_bytes + solution.peak_bytes + (budget if gap else 0)

    def at_first_above(compiled: object) -> int:
        asked.append(real(compiled))
        return budget - profile.fixed_bytes + 1 if len(asked) == 1 else asked[-1]

    monkeypatch.setattr(planning.Frontier, "_packed_bytes", packed_bytes)
    monkeypatch.setattr(
        planning.Frontier, "tuning", dataclasses.replace(planning.TUNING, smaller_points=1000)
    )
    monkeypatch.setattr(search, "temporaries", at_first_above)
    workspace = Workspace(total_bytes=1, buffers=(Buffer(1, 0, 0),))
    found = mw.fit(
        mean_square, chain, x, budget=budget, profile=dataclasses.replace(profile, workspaces=(workspace,))
    )
    plan = found.schedule
    assert fastest.time_ns < plan.time_ns < least.time_ns
    assert [one.predicted_bytes for one in found.attempts[:2]] == [fastest.peak_bytes, least.peak_bytes]
    assert found.attempts[-1].predicted_bytes == plan.peak_bytes
    assert plan.bound_ns <= fastest.time_ns
    assert plan.status is mw.Status.FEASIBLE
    assert "was compiled: for fragmentation it needs 1 B more" in str(plan)


@GAPS_ON_NEWEST
def test_fewer_strategies_may_fit_where_all_do_not(
    profile: mw.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, x = network(), jnp.ones((512, 32))
    cheap = dataclasses.replace(inverting_is_free(profile), workspaces=())
    every, fewer = mw.frontier(cheap), mw.frontier(cheap, allowed=planning.NARROWER[-1])
    budget = next(total for total, ns in fewer.points if every.at(total).time_ns < ns)
    real, asked = search.temporaries, []

    def at_first_above(compiled: object) -> int:
        asked.append(real(compiled))
        return 1 << 40 if len(asked) == 1 else asked[-1]

    monkeypatch.setattr(search, "temporaries", at_first_above)
    found = mw.fit(mean_square, chain, x, budget=budget, profile=cheap, max_attempts=1)
    assert len(found.attempts) == 2
    assert found.schedule.runs == fewer.at(budget).runs
    assert found.schedule.status is mw.Status.FEASIBLE


def test_budgets_that_nothing_fits(profile: mw.Profile) -> None:
    chain, x = network(), jnp.ones((512, 32))
    with pytest.raises(mw.InfeasibleError, match=r"of the .* programs that were compiled none fits"):
        mw.fit(mean_square, chain, x, budget=profile.fixed_bytes + 1, profile=profile)
    with pytest.raises(mw.ArgumentError, match="max_attempts"):
        mw.fit(mean_square, chain, x, budget="1GiB", profile=profile, max_attempts=0)


@pytest.mark.parametrize(
    ("loss", "args", "has_aux", "says"),
    [
        (mean_square, (1.0, 2.0), False, "2 `args`"),
        (lambda y: y, (), False, r"float32\[512, 32\].*one floating-point number"),
        (lambda y: (y.mean(), y), (), False, "tuple of 2.*has_aux"),
        (mean_square, (), True, r"float32\[\].*pair"),
        (lambda y: (y.mean(), y, y), (), True, "tuple of 3.*pair"),
        ("mean", (), False, "str"),
    ],
)
def test_a_bad_loss_fails_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, loss: Any, args: tuple[Any, ...], has_aux: bool, says: str
) -> None:
    monkeypatch.setattr(fitting.measure, "profile", lambda *_: pytest.fail("measured"))
    with pytest.raises(mw.ArgumentError, match=f"(?s)`loss`.*{says}"):
        mw.fit(loss, network(), jnp.ones((512, 32)), *args, budget="1GiB", has_aux=has_aux)


def test_a_loss_without_its_pair() -> None:
    chain, x = network(), jnp.ones((2, 32))
    step = mw.value_and_grad(mean_square, Schedule(runs=store_all(chain)), has_aux=True)
    with pytest.raises(mw.ArgumentError, match=r"`loss` returned float32\[\].*pair"):
        step(chain, x)


def test_tuning_times_the_plans_of_fewer_strategies(
    profile: mw.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of fewer strategies are run beside that of all, and the one that is really the fastest is
    kept."""
    chain, x = network(), jax.random.normal(jax.random.key(0), (512, 32))
    cheap = inverting_is_free(profile)  # the plan of all strategies inverts, and would be wrong to
    frontier = mw.frontier(cheap)
    assert frontier.least_bytes is not None
    budget = 2 * frontier.least_bytes
    told: list[str] = []
    timed: list[int] = []
    tried: set[tuple[str, int]] = set()

    def last(found: list[Fitted], *args: Any) -> Fitted:
        timed.append(len(found))
        assert len({(one.schedule.runs, one.arrangement) for one in found}) == len(found)
        tried.update((one.schedule.solver, one.arrangement) for one in found)
        return fastest(found, *args)

    fastest = tuning.fastest
    monkeypatch.setattr(tuning, "fastest", last)
    found = mw.fit(mean_square, chain, x, budget=budget, profile=cheap, tune=2, say=told.append)
    assert timed
    assert timed[0] >= 2
    assert found.temporary_bytes + profile.fixed_bytes <= budget
    assert any(f"{timed[0]} plans timed" in text for text in told)
    assert {mw.UNTIED, mw.LOOSE} <= {arrangement for _, arrangement in tried}
    mw.fit(mean_square, chain, x, budget=2 * frontier.points[-1][0], profile=cheap, tune=1)
    assert ("store_all", mw.UNTIED) in tried


def test_the_quickest_is_told_from_rounds_of_different_speed() -> None:
    """A slow moment hits whoever runs then: by their sums the second would win."""
    assert tuning.quickest([[1.0, 1.0, 9.0], [1.2, 1.1, 8.0], [1.2, 5.0, 9.5]]) == 0


def test_a_profile_of_something_else_is_refused(profile: mw.Profile) -> None:
    x = jnp.ones((256, 32))
    with pytest.raises(mw.ScheduleMismatchError, match=r"input of 64.00 KiB and `x` has 32.00 KiB"):
        mw.fit(mean_square, network(), x, budget="1GiB", profile=profile)
    other = mw.Chain([*network().layers, tanh])
    with pytest.raises(mw.ScheduleMismatchError, match="another chain"):
        mw.fit(mean_square, other, jnp.ones((512, 32)), budget="1GiB", profile=profile)


def test_tuning_within_a_few_strategies() -> None:
    """Sets of which nothing is left are none."""
    chain, x = mw.Chain([Dense.init(jax.random.key(0), 8, 8)]), jnp.ones((64, 8))
    found = mw.fit(mean_square, chain, x, budget="1MiB", allowed={"vijp", "fragment"}, tune=1)
    assert set(found.schedule.strategies) <= {Strategy.VIJP, Strategy.FRAGMENT}
