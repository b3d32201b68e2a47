"""Layers that are not pure, that are wrapped, and that are not trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from mwplan.common import trees
from mwplan.layers import Dense, LeakyReLU
from mwplan.network import rules
from mwplan.network.chain import boundaries
from mwplan.network.layer import layer
from mwplan.plans.schedule import RunKind
from tests.helpers import alike, mean_square, relative_error


def numpy_mask() -> Callable[[Any], Any]:
    rng = np.random.default_rng(0)
    return lambda x: x * (rng.random(x.shape) > 0.3)


def counter() -> Callable[[Any], Any]:
    count = itertools.count(1)
    return lambda x: x * jnp.float32(next(count))


def inner_mask() -> Callable[[Any], Any]:
    rng = np.random.default_rng(0)
    return lambda x: jax.checkpoint(lambda x: jnp.sin(x) * rng.random(x.shape))(x)


def alternating() -> Callable[[Any], Any]:
    count = itertools.count()
    return lambda x: jnp.sin(x) if next(count) % 2 else jnp.cos(x)


@pytest.mark.parametrize("make", [numpy_mask, counter, inner_mask, alternating])
def test_impure_layers_are_refused(make: Any) -> None:
    x = jnp.ones((4, 8))
    net = mw.Chain([jnp.tanh, make(), jnp.sin])
    for call in (
        lambda: mw.profile(net, x, repeats=1),
        lambda: mw.estimate(net, x, device="h100"),
        lambda: jax.grad(lambda x: mw.apply(mw.Schedule(runs=alike(RunKind.STORE, "vjp", 3)), net, x).sum())(
            x
        ),
    ):
        with pytest.raises(mw.ChainError, match=r"layer 2 .* is not the same each time it is traced"):
            call()


def test_pure_layers_are_not() -> None:
    x = jnp.ones((4, 8))
    rng = np.random.default_rng(0)
    mask, other = rng.random((4, 8)), jnp.asarray(rng.random(8))
    key = jax.random.key(0)

    @jax.custom_vjp
    def clipped(x: Any) -> Any:
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -1, 1),))

    def looped(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (c * mask + other, None), x, None, length=3)[0]

    def branching(x: Any) -> Any:
        return jax.lax.cond(x.sum() > 0, lambda x: x * mask, lambda x: x + jnp.nan * other, x)

    net = mw.Chain(
        [
            lambda x: x * mask,
            jax.jit(lambda x: x + other),
            clipped,
            looped,
            branching,
            jax.checkpoint(lambda x: jnp.sin(x) * jax.random.bernoulli(key, 0.5, x.shape)),
            lambda x: jax.pure_callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct(x.shape, x.dtype), x),
            jax.vmap(lambda row: jnp.sort(row) * np.float32(0.5)),
        ]
    )
    assert len(boundaries(net, x)) == 9
    jax.jit(lambda net, x: [s.shape for s in boundaries(net, x)])(net, x)


def test_a_layers_own_error_comes_first() -> None:
    def refuses(x: Any) -> Any:
        raise ValueError("only squares")

    with pytest.raises(mw.ChainError, match=r"ValueError: only squares$"):
        boundaries(mw.Chain([refuses]), jnp.ones((4, 8)))
    with pytest.raises(mw.ChainError, match=r"dot_general.*jax\.vmap"):
        boundaries(mw.Chain([lambda x: x @ jnp.ones((3, 3))]), jnp.ones((4, 8)))


def test_wrapped_modules_keep_rules_and_attributes() -> None:
    import equinox as eqx

    class Both(eqx.Module):
        """A dense layer and an activation in one, with a function and a number among its leaves."""

        dense: Dense
        function: Callable[[Any], Any]
        rate: float

        def __call__(self, x: Any) -> Any:
            return self.dense(x) * self.rate

        def vijp_rules(self, x: Any) -> Any:
            return [Halved(rule) for rule in self.dense.vijp_rules(x) if isinstance(rule, rules.VijpRule)]

        def invert_rules(self, x: Any) -> Any:
            return [Doubled()]

    class Halved(rules.VijpRule):
        def __init__(self, base: Any) -> None:
            self.base, self.name, self.has_fragment = base, base.name, base.has_fragment

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Halved) and self.base == other.base

        def __hash__(self) -> int:
            return hash(self.base)

        def fragment(self, layer: Any, residuals: Any, ct_out: Any) -> Any:
            return self.base.fragment(layer.dense, residuals, ct_out * layer.rate)

        def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
            return self.base.rebuild(layer.dense, x, ct_in, fragment) / layer.rate

    class Doubled(rules.InvertRule):
        name = "doubled"

        def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
            assert layer.rate == 0.5
            return jnp.linalg.solve(layer.dense.weight.T, (y / layer.rate - layer.dense.bias).T).T

    x = jax.random.normal(jax.random.key(1), (4, 8))
    net = mw.Chain([Both(Dense.init(k, 8, 8), jnp.tanh, 0.5) for k in jax.random.split(jax.random.key(0), 4)])
    assert net[0].rate == 0.5
    assert net[0].dense.weight.shape == (8, 8)
    assert not hasattr(net[0], "nothing")
    assert [r.name for r in rules.invert_rules(net[0], x)] == ["doubled"]
    want = jax.grad(lambda net: mean_square(net(x)))(net)
    profile = mw.profile(net, x, repeats=1)
    for kind, options in (
        (RunKind.MOONWALK, profile.layers[0].moonwalk),
        (RunKind.INVERT, profile.layers[0].invert),
    ):
        assert len(options) > (kind is RunKind.MOONWALK)
        step = mw.jit(mw.value_and_grad(mean_square, mw.Schedule(runs=alike(kind, options[0].name, 4))))
        (_, _), grads = step(net, x)
        assert relative_error(grads, want) < 1e-3


@layer
class LowRank:
    """A frozen product and a low-rank update of it."""

    base: Any
    a: Any
    b: Any

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(self.base(x) + x @ self.a @ self.b)


WIDTH = 256


def low_rank(freeze: Callable[[Any], Any], depth: int = 4) -> tuple[mw.Chain, Any]:
    layers = []
    for key in jax.random.split(jax.random.key(0), depth):
        first, second, third = jax.random.split(key, 3)
        dense = Dense.init(first, WIDTH, WIDTH)
        a, b = 0.1 * jax.random.normal(second, (WIDTH, 4)), 0.1 * jax.random.normal(third, (4, WIDTH))
        layers.append(LowRank(freeze(dense), a, b))
    return mw.Chain(layers), jax.random.normal(jax.random.key(9), (64, WIDTH))


@pytest.mark.parametrize("stacked", [False, True])
def test_frozen_weights_cost_nothing(stacked: bool) -> None:
    full, x = low_rank(lambda dense: dense)
    net, _ = low_rank(mw.frozen)
    net = mw.stack(net, x) if stacked else net
    base = sum(trees.nbytes(one.base) for one in full)
    assert trees.nbytes(trees.parameters(net)) == trees.nbytes(full) - base
    profiles = mw.profile(full, x, repeats=1), mw.profile(net, x, repeats=1)
    assert profiles[0].fixed_bytes - profiles[1].fixed_bytes == base  # their gradients
    estimates = [mw.estimate(one, x, device="h100") for one in (full, net)]
    store = [estimate.layers[0].store[-1] for estimate in estimates]
    assert store[1].backward_ns < store[0].backward_ns
    assert not store[1].residual_bytes > store[0].residual_bytes
    params = trees.parameters(net)
    plain = jax.jit(jax.value_and_grad(lambda p, net, x: mean_square(trees.with_parameters(net, p)(x))))
    plain = plain.lower(params, net, x).compile()
    schedule = mw.Schedule(runs=alike(RunKind.STORE, "vjp", 4))
    step = mw.jit(mw.value_and_grad(mean_square, schedule)).lower(net, x).compile()
    (_, _), grads = step(net, x)
    assert relative_error(grads, plain(params, net, x)[1]) < 1e-5
    # Each array that a loop fills starts as one scalar zero, converted: two arrays. A frozen weight's
    # gradient would be 2 * 64 * WIDTH**2 flop more.
    conversions = 2 if stacked else 0
    assert step.cost_analysis()["flops"] <= plain.cost_analysis()["flops"] + conversions
    outputs = step.memory_analysis().output_size_in_bytes
    assert outputs < trees.nbytes(params) + 4096
    if not stacked:
        assert grads[0].base.inner.weight is None
        whole = jax.grad(lambda net: mean_square(mw.apply(schedule, net, x)))(net)
        want = jax.grad(lambda net: mean_square(net(x)))(net)
        assert not jax.tree.leaves(whole)[0].any()
        assert relative_error(whole, want) < 1e-5


def test_frozen_layers_keep_their_rules() -> None:
    dense = [Dense.init(key, 16, 16) for key in jax.random.split(jax.random.key(0), 2)]
    net = mw.Chain(
        [
            mw.frozen(dense[0]),
            LeakyReLU(0.7),
            mw.frozen(dense[1], trained=lambda one: one.bias),
            mw.frozen(LeakyReLU(0.7)),
        ]
    )
    x = jax.random.normal(jax.random.key(1), (8, 16))
    weights = mw.trainable(net)
    assert [leaf.shape for leaf in jax.tree.leaves(weights)] == [(16,)]
    profile = mw.profile(net, x, repeats=1)
    for one in profile.layers:
        assert len(one.moonwalk) > 1
    assert profile.layers[2].parameter_bytes == 64
    names = [rules.vijp_rules(one, x)[0].name for one in net]
    runs = (mw.Run(kind=RunKind.MOONWALK, start=0, stop=4, options=tuple(names)),)
    (_, _), grads = mw.jit(mw.value_and_grad(mean_square, mw.Schedule(runs=runs)))(net, x)
    params = trees.parameters(net)
    want = jax.grad(lambda p: mean_square(trees.with_parameters(net, p)(x)))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(weights)
    assert relative_error(grads, want) < 1e-4
    with pytest.raises(mw.ArgumentError, match="not all of them weights"):
        mw.frozen(dense[0], trained=lambda one: one.weight + 1)


def test_frozen_weights_stay_as_they_are() -> None:
    import optax

    net, x = low_rank(mw.frozen, 2)
    schedule = mw.Schedule(runs=alike(RunKind.STORE, "vjp", 2))
    step, optimizer = mw.value_and_grad(mean_square, schedule), optax.adamw(0.1, weight_decay=0.5)
    state = optimizer.init(mw.trainable(net))
    (_, _), grads = mw.jit(step)(net, x)
    updates, _ = optimizer.update(grads, state, mw.trainable(net))
    moved = optax.apply_updates(mw.trainable(net), updates)
    after = trees.with_parameters(net, jax.tree.leaves(moved))
    states = mw.init_states(optimizer, net)
    (_, _), together, _ = mw.jit(mw.value_and_update(mean_square, schedule, optimizer))(net, states, x)
    for one in (after, together):
        np.testing.assert_array_equal(one[0].base.weight, net[0].base.weight)
        assert not np.array_equal(one[0].a, net[0].a)
    np.testing.assert_allclose(after[1].a, together[1].a, rtol=1e-5, atol=1e-6)
