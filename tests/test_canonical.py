"""Convolutions brought into XLA:CPU's fast layout, wherever they stand in a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwplan.network.canonical import canonical

CANONICAL = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def block(x: Any, w: Any) -> Any:
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(y) + x


def plain(w: Any, x: Any) -> Any:
    return block(block(x, w[0]), w[1])


def loop(w: Any, x: Any) -> Any:
    return lax.scan(lambda x, one: (block(x, one), None), x, w)[0]


def checkpointed(w: Any, x: Any) -> Any:
    return lax.scan(lambda x, one: (jax.checkpoint(block)(x, one), None), x, w)[0]


def branches(w: Any, x: Any) -> Any:
    return lax.cond(jnp.sum(x) > 0, lambda x: block(x, w[0]), lambda x: block(x, w[1]), x)


@jax.custom_jvp
def _custom(x: Any, w: Any) -> Any:
    return block(x, w)


@_custom.defjvp
def _custom_jvp(primals: Any, tangents: Any) -> Any:
    return jax.jvp(block, primals, tangents)


def custom(w: Any, x: Any) -> Any:
    return _custom(x, w[0])


def convolutions(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is lax.conv_general_dilated_p:
            yield eqn.params["dimension_numbers"]
        for value in eqn.params.values():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from convolutions(inner)


@pytest.mark.parametrize("network", [plain, loop, checkpointed, branches, custom])
def test_every_convolution_is_found_and_none_changes_its_value(network: Callable[..., Any]) -> None:
    w = 0.1 * jax.random.normal(jax.random.key(0), (2, 3, 3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    step = jax.value_and_grad(lambda w: jnp.sum(network(w, x) ** 2))
    before = list(convolutions(jax.make_jaxpr(step)(w).jaxpr))
    after = list(convolutions(jax.make_jaxpr(canonical(step))(w).jaxpr))
    assert any(names != CANONICAL for names in before)
    assert len(after) == len(before)
    assert all(names == CANONICAL for names in after)
    want, got = jax.jit(step)(w), jax.jit(canonical(step))(w)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-4)
