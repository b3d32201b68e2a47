"""Networks of Equinox and Flax in a chain, planned and run."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
        norm, dropout = from_nnx(modules[0], drop_state=True), from_nnx(modules[1])
    x = jax.random.normal(jax.random.key(0), (4, 8))
    y, z = norm(x), dropout(x)
    assert jnp.array_equal(norm(x), y)
    assert jnp.array_equal(dropout(x), z)
    assert not modules[0].mean.get_value().any()  # nothing reached the modules
    for module in modules:
        module(x)  # nor does this reach the layers
    assert not norm.module().mean.get_value().any()
    assert jnp.array_equal(dropout(x), z)
    chain = mw.Chain([norm, dropout, jnp.tanh])
    profile = mw.profile(chain, x, repeats=1)
    (_, _), grads = mw.jit(mw.value_and_grad(mean_square, mw.plan(profile, "1MiB")))(chain, x)
    want = jax.grad(lambda c: mean_square(c(x)), allow_int=True)(chain)
    assert relative_error(grads, [g for g in jax.tree.leaves(want) if g.dtype != jax.dtypes.float0]) < 1e-5


def test_what_is_no_parameter_is_not_trained() -> None:
    """Running averages: no gradient, no weight decay, whatever the optimizer; keys: leaves that may
    change."""
    import equinox as eqx
    import optax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flax import linen, nnx

        from mwplan.adapters.flax import from_linen, from_nnx

        x = jax.random.normal(jax.random.key(0), (16, 8))
        norm, dropout = linen.BatchNorm(use_running_average=True), linen.Dropout(0.5, deterministic=False)
        variables = norm.init(jax.random.key(1), x)
        variables = {**variables, "batch_stats": jax.tree.map(lambda a: a + 0.25, variables["batch_stats"])}
        fixed = from_linen(norm, {**variables, "consts": {"c": jnp.array([1 + 2j, 3.0])}})
        assert len(jax.tree.leaves(eqx.filter(fixed, eqx.is_inexact_array))) == 2
        np.testing.assert_array_equal(fixed.variables["consts"]["c"], [1 + 2j, 3.0])
        other = nnx.BatchNorm(8, use_running_average=True, rngs=nnx.Rngs(0))
        net = mw.Chain(
            [
                from_linen(norm, variables),
                from_linen(dropout, {}, rngs={"dropout": jax.random.key(2)}),
                from_linen(dropout, {}, rngs={"dropout": jax.random.key(3)}),
                from_nnx(other),
            ]
        )
        np.testing.assert_array_equal(net[0](x), norm.apply(variables, x))
        want = dropout.apply({}, x, rngs={"dropout": jax.random.key(2)})
        np.testing.assert_array_equal(net[1](x), want)
    assert len(jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))) == 4
    schedule = mw.plan(mw.profile(net, x, repeats=1), "1MiB")
    step = mw.jit(mw.value_and_grad(lambda y: jnp.mean(y**3), schedule))
    (_, _), grads = step(net, x)
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    weights = eqx.filter(net, eqx.is_inexact_array)
    updates, _ = optimizer.update(grads, optimizer.init(weights), weights)
    after = eqx.apply_updates(net, updates)
    assert not np.array_equal(after[0].params["scale"], net[0].params["scale"])
    for name, value in variables["batch_stats"].items():
        np.testing.assert_array_equal(after[0].variables["batch_stats"][name], value)
    assert not after[3].module().mean.get_value().any()
    assert not np.array_equal(after[3].module().scale.get_value(), other.scale.get_value())
    again = mw.Chain(
        [net[0], dataclasses.replace(net[1], rngs={"dropout": jax.random.key(9)}), *net.layers[2:]]
    )
    step(again, x)
    assert step._cache_size() == 1
    with pytest.raises(mw.ArgumentError, match="keys go into `rngs`"):
        from_linen(dropout, {}, mask=x)
