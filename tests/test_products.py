"""What several products read is written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mwplan.network.products import written_once

SHAPES = {"w": (4, 8), "x": (8, 4), "ct": (8, 4)}
ARGS = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(SHAPES.values())]


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda w, x, ct: jax.vjp(function, w, x)[1](ct)


def turned(w: Any, x: Any, ct: Any) -> Any:
    made = jnp.concatenate([jnp.sin(x), x], axis=1)
    return made.T @ ct, made @ w.T


def gated(w: Any, x: Any) -> Any:
    a, b = jnp.split(x @ w, 2, axis=-1)
    return a * jax.nn.sigmoid(b)


#: Operations, and how many of the arrays that each writes side by side two products read.
OPERATIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "a gated layer's gradient": (gradient(gated), 1),
    "joined in a call": (gradient(lambda w, x: jax.nn.glu(x @ w)), 1),
    "the same, recomputed": (gradient(jax.checkpoint(gated)), 1),
    "within a call": (jax.jit(gradient(gated)), 1),
    "in another shape": (turned, 1),
    "elementwise": (gradient(lambda w, x: jnp.tanh(x @ w[:, :4])), 0),
    "read by one": (gradient(lambda w, x: jnp.tanh(x) @ w[:, :4]), 0),
    "its arguments": (lambda w, x, ct: (x @ w, x.T @ ct), 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_is_behind_a_barrier_of_its_own(name: str) -> None:
    operation, count = OPERATIONS[name]
    once = written_once(operation)
    for one, other in zip(jax.tree.leaves(once(*ARGS)), jax.tree.leaves(operation(*ARGS)), strict=True):
        assert jnp.allclose(one, other, rtol=1e-6)
    assert str(jax.make_jaxpr(once)(*ARGS)).count("optimization_barrier") == count
