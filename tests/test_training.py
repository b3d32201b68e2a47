"""Training plans again where the runs' report says that the weights have outgrown the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import execute, measure, training
from mwplan.schedule import RunKind


def test_a_report_above_the_tolerance_plans_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an epoch at most, from a profile of the weights as they are then; and it is said."""
    value_and_grad, profile = execute.value_and_grad, measure.profile
    profiled: list[mw.Profile] = []

    def alarmed(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        step = value_and_grad(*args, **kwargs)

        def call(*inputs: Any) -> Any:
            (value, _), grads = step(*inputs)
            return (value, mw.Report(jnp.ones(1), ((0, 1, RunKind.MOONWALK),))), grads

        return call

    def once(*args: Any, **kwargs: Any) -> mw.Profile:
        profiled.append(profiled[0] if profiled else profile(*args, **(kwargs | {"repeats": 1})))
        return profiled[-1]

    monkeypatch.setattr(execute, "value_and_grad", alarmed)
    monkeypatch.setattr(measure, "profile", once)
    told: list[str] = []
    config = training.TrainConfig(batch=512, epochs=1, depth=1)
    result = training.train(config, lambda *args: None, told.append)
    assert result.replans == (0,)
    assert len(result.discrepancies) > 1
    assert len(profiled) == 2
    assert any("step 0" in text and "planning again" in text for text in told)
