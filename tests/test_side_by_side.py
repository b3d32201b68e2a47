"""Two trainings at once: equal while the plan is safe, planned again once its report says that it no longer
is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mwplan as mw
from mwplan import planning
from mwplan.app import side_by_side
from mwplan.common.errors import InfeasibleError
from mwplan.layers import Dense, LeakyReLU
from mwplan.plans.schedule import Strategy
from mwplan.profiling import measure

MAX_ERROR = 1e-6


def task(rate: float, allowed: frozenset[Strategy], steps: int = 12) -> side_by_side.Task:
    """Orthogonal layers, moved at `rate` by Adam, within ample room."""
    keys = jax.random.split(jax.random.key(0), 10)
    layers: list[Any] = []
    for key in keys[:8]:
        layers += [Dense.init(key, 16, 16), LeakyReLU(0.8)]
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(256, 16)).astype(np.float32) for _ in range(2))

    def budget(profile: mw.Profile, backprop: int) -> int:
        least = planning.frontier(profile, max_error=MAX_ERROR, allowed=allowed).least_bytes
        assert least is not None
        return 5 * least

    return side_by_side.Task(
        chain=mw.Chain(layers),
        loss=lambda y, target: jnp.mean((y - target) ** 2),
        batch=side_by_side.shuffled(x, y, 128, 0),
        steps=steps,
        optimizer=optax.adam(rate),
        budget=budget,
        max_error=MAX_ERROR,
        allowed=allowed,
        checks=(0, steps),
        patience=4,
        repeats=1,
    )


def test_a_plan_that_is_no_longer_safe_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first one run of vijps, since they are made to look cheaper than fragments."""
    measured = measure.profile

    def cheap(*args: Any, **kwargs: Any) -> mw.Profile:
        found = measured(*args, **kwargs)
        layers = []
        for layer in found.layers:
            walks = [
                dataclasses.replace(o, forward_ns=0, reverse_ns=0, rebuild_ns=1000 if o.fragment_bytes else 1)
                for o in layer.moonwalk
            ]
            layers.append(dataclasses.replace(layer, forward_ns=0, moonwalk=tuple(walks)))
        return dataclasses.replace(found, layers=tuple(layers))

    monkeypatch.setattr(measure, "profile", cheap)
    said: list[str] = []
    got = side_by_side.train(task(0.1, frozenset({Strategy.VIJP, Strategy.FRAGMENT})), say=said.append)
    assert got.replans
    assert all(b - a >= 4 for a, b in zip(got.replans, got.replans[1:]))
    assert all(got.discrepancies[step] > MAX_ERROR for step in got.replans)
    assert sum("planning again" in text for text in said) == len(got.replans)
    assert got.fitted.temporary_bytes + got.fitted.schedule.fixed_bytes <= got.budget_bytes
    assert got.planned.losses == pytest.approx(got.plain.losses, rel=0.01)
    assert [one.step for one in got.checks] == [0, 12]
    assert all(one.planned < 1e-4 for one in got.checks)
    assert len(got.plain.seconds) == len(got.planned.seconds) == 12


def test_weights_that_no_plan_is_safe_for_end_the_training() -> None:
    with pytest.raises(InfeasibleError, match=r"after step \d+ no schedule keeps `max_error=1e-06`"):
        side_by_side.train(task(0.3, frozenset({Strategy.VIJP})))


def test_batches_are_whole_and_new_in_each_epoch() -> None:
    x = np.arange(10)
    batch = side_by_side.shuffled(x, x, 3, seed=1)
    epochs = [np.concatenate([batch(3 * epoch + k)[0] for k in range(3)]) for epoch in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(batch(4)[0], side_by_side.shuffled(x, x, 3, seed=1)(4)[1])
