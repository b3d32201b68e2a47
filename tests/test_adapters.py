"""Networks of Equinox and Flax in a chain, planned and run."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from tests.helpers import mean_square, relative_error, segments, store_all


def equinox_chain(key: jax.Array) -> mw.Chain:
    import equinox as eqx

    return mw.Chain([eqx.nn.Linear(8, 8, key=key), eqx.nn.MLP(8, 8, 16, 1, key=key), eqx.nn.Lambda(jnp.tanh)])


def linen_chain(key: jax.Array) -> mw.Chain:
    from flax import linen

    from mwplan.adapters.flax import from_linen

    dense = linen.Dense(8)
    return mw.Chain(
        [
            from_linen(dense, dense.init(key, jnp.ones(8))),
            jnp.tanh,
            from_linen(dense, dense.init(key, jnp.ones(8))),
        ]
    )


def nnx_chain(key: jax.Array) -> mw.Chain:
    from flax import nnx

    from mwplan.adapters.flax import from_nnx

    return mw.Chain(
        [from_nnx(nnx.Linear(8, 8, rngs=nnx.Rngs(0))), nnx.relu, from_nnx(nnx.Linear(8, 8, rngs=nnx.Rngs(1)))]
    )


@pytest.mark.parametrize("make", [equinox_chain, linen_chain, nnx_chain])
def test_modules_are_layers(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the libraries' own, on import
        chain = make(jax.random.key(0))
    x = jnp.linspace(-1, 1, 8)
    want = jax.grad(lambda c: mean_square(c(x)))(chain)
    for runs in (store_all(chain), segments(chain, 2)):
        got = mw.jit(jax.grad(lambda c: mean_square(mw.apply(mw.Schedule(runs=runs), c, x))))(chain)  # noqa: B023
        assert relative_error(got, want) < 1e-5
    profile = mw.profile(chain, x, repeats=1)
    plan = mw.plan(profile, "1MiB")
    (_, _), grads = mw.jit(mw.value_and_grad(mean_square, plan))(chain, x)
    assert relative_error(grads, want) < 1e-5


def test_state_that_a_call_changes_is_dropped() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flax import nnx

        from mwplan.adapters.flax import from_nnx

        rngs = nnx.Rngs(0)
        modules = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        norm, dropout = map(from_nnx, modules)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    y, z = norm(x), dropout(x)
    assert jnp.array_equal(norm(x), y)
    assert jnp.array_equal(dropout(x), z)
    assert not modules[0].mean.get_value().any()  # nothing reached the modules
    for module in modules:
        module(x)  # nor does this reach the layers
    assert not jax.tree.leaves(norm.state["mean"])[0].any()
    assert jnp.array_equal(dropout(x), z)
    chain = mw.Chain([norm, dropout, jnp.tanh])
    profile = mw.profile(chain, x, repeats=1)
    (_, _), grads = mw.jit(mw.value_and_grad(mean_square, mw.plan(profile, "1MiB")))(chain, x)
    want = jax.grad(lambda c: mean_square(c(x)), allow_int=True)(chain)
    assert relative_error(grads, [g for g in jax.tree.leaves(want) if g.dtype != jax.dtypes.float0]) < 1e-5
