"""Arrays that layers hand on as they are: told from programs, counted once, not stacked by loops."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.layers import layer
from mwplan.network.carried import Carried, handed_on
from mwplan.network.chain import boundaries
from mwplan.profiling.carrying import carrying
from tests.helpers import relative_error

LAYERS, WIDTH = 8, 64


@layer
class Cross:
    """Attends to what is handed on, unless nothing is."""

    query: jax.Array
    out: jax.Array

    def __call__(self, x: Any) -> Any:
        h, encoded = x
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", h @ self.query, encoded))
        return h + jnp.tanh(jnp.einsum("bqk,bkd->bqd", weights, encoded) @ self.out), encoded


@layer
class Masked:
    """A product of what a mask leaves."""

    weight: jax.Array

    def __call__(self, x: Any) -> Any:
        h, mask = x
        return jnp.sin(jnp.where(mask, h, 0) @ self.weight), mask


def cross(key: Any) -> Cross:
    return Cross(*(jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in jax.random.split(key)))


def encode(h: Any) -> Any:
    return h, jnp.tile(jnp.sin(h), (1, 16, 1))


def loss(y: Any) -> Any:
    return jnp.mean(y[0] ** 2)


def network() -> tuple[mw.Chain, Any]:
    """What is handed on is 16 times as large as the rest."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    h = jax.random.normal(jax.random.key(1), (2, 64, WIDTH))
    return mw.Chain(list(map(cross, keys))), (h, jax.random.normal(jax.random.key(2), (2, 1024, WIDTH)))


@functools.cache
def profiled(wrt_input: bool) -> mw.Profile:
    chain, x = network()
    return mw.profile(chain, x, repeats=1, wrt_input=wrt_input)


def least(profile: mw.Profile) -> int:
    found = mw.frontier(profile).least_bytes
    assert found is not None
    return found


def test_what_is_handed_on_is_told_from_programs() -> None:
    x = (jnp.ones((2, 3)), jnp.ones(4), jnp.ones(4))
    chain = mw.Chain(
        [
            lambda x: (x[0] * 1, x[2], x[1]),
            jax.jit(lambda x: (x[1], x[0] + 1)),
            lambda x: (jax.lax.optimization_barrier(x), x[1] + 0),
        ]
    )
    assert [handed_on(one, x) for one in chain] == [(None, 2, 1), (1, None), (0, 1, 2, None)]
    assert handed_on(cross(jax.random.key(0)), network()[1]) == (None, 1)


def test_roots_and_idle_cotangents() -> None:
    x = (jnp.ones((2, 3)), jnp.ones(4), jnp.ones(3, jnp.int32))
    chain = mw.Chain(
        [lambda x: (x[0] + 1, x[1], x[2]), lambda x: (x[2], x[0], x[0] + 1), lambda x: (x[1], x[2] * 2)]
    )
    structs = boundaries(chain, x)
    found = Carried.along(chain, structs, wrt_input=False)
    assert found.roots[1:] == (((1, 0), (0, 1), (0, 2)), ((0, 2), (1, 0), (2, 2)), ((1, 0), (3, 1)))
    assert found.idle == (frozenset({1}), frozenset({1}), frozenset(), frozenset())
    assert not any(Carried.along(chain, structs, wrt_input=True).idle)
    assert found.window(1, 2).throughout() == {}


@pytest.mark.parametrize("wrt_input", [False, True])
def test_predicted_is_what_is_compiled(wrt_input: bool) -> None:
    chain, x = network()
    profile = profiled(wrt_input)
    assert profile.activation_bytes[1:] == (x[0].nbytes,) * LAYERS
    gradient = jax.grad(lambda chain, x: loss(chain(x)), (0, 1) if wrt_input else 0)
    want = jax.jit(gradient)(chain, x)
    with jax.enable_x64(True):
        exact = gradient(*jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (chain, x)))
        own = relative_error(want, exact)
    for budget in (least(profile), 2 * least(profile)):
        plan = mw.plan(profile, budget)
        step = mw.jit(mw.value_and_grad(loss, plan, wrt_input=wrt_input))
        assert mw.temporaries(step.lower(chain, x).compile()) == pytest.approx(plan.peak_bytes, rel=0.02)
        (_, _), grads = step(chain, x)
        assert relative_error(grads, want) < 1e-4
        with jax.enable_x64(True):  # what is made again by other kernels is as near to the truth as JAX's own
            assert relative_error(grads, exact) < max(1e-5, 1.1 * own), own


def test_what_fits_with_checkpoints_around_layers_can_be_planned() -> None:
    chain, x = network()

    def checkpointed(chain: Any, x: Any) -> Any:
        return loss(functools.reduce(lambda x, one: jax.checkpoint(lambda f, x: f(x))(one, x), chain, x))

    peer = mw.temporaries(mw.jit(jax.grad(checkpointed)).lower(chain, x).compile())
    profile = profiled(False)
    assert mw.plan(profile, profile.fixed_bytes + peer).peak_bytes <= peer


@pytest.mark.parametrize("allowed", [{"store"}, {"store", "recompute"}])
def test_loops_do_not_stack_what_is_handed_on(allowed: Any) -> None:
    chain, x = network()
    profile = profiled(False)
    least = mw.frontier(profile, allowed=allowed).least_bytes
    assert least is not None
    plan = mw.plan(profile, least, allowed=allowed)
    stacked = mw.stack(chain, x)
    step = mw.jit(mw.value_and_grad(loss, plan))
    alone = mw.temporaries(step.lower(chain, x).compile())
    assert mw.temporaries(step.lower(stacked, x).compile()) < alone + 2 * x[1].nbytes  # of 8 layers
    want = jax.jit(jax.grad(lambda chain: loss(chain(x))))(stacked)
    assert relative_error(step(stacked, x)[1], want) < 1e-5


def test_tapes_do_not_stack_what_is_handed_on() -> None:
    """Nested recomputation of many layers."""
    keys = jax.random.split(jax.random.key(0), 40)
    chain = mw.Chain([mw.network.chain.Stack.init(cross, jax.random.key(0), len(keys))])
    _, x = network()
    profile = mw.profile(chain, x, repeats=1)
    plan = mw.plan(profile, least(profile), allowed={"store", "recompute"})
    step = mw.jit(mw.value_and_grad(loss, plan))
    # A loop reads a layer's residuals out of its stack; 40 rows of what is handed on would be far more.
    assert mw.temporaries(step.lower(chain, x).compile()) < plan.peak_bytes + 3 * x[1].nbytes
    want = jax.jit(jax.grad(lambda chain: loss(chain(x))))(chain)
    assert relative_error(step(chain, x)[1], want) < 1e-5


def test_what_a_layer_makes_for_later_ones() -> None:
    """Its cotangent adds up from layer to layer."""
    chain, (h, _) = network()
    chain = mw.Chain([jnp.tanh, encode, *chain, lambda x: x[0]])
    profile = mw.profile(chain, h, repeats=1)
    assert profile.activation_bytes[2:-1] == (h.nbytes,) * (LAYERS + 1)
    assert profile.carried_bytes == 2 * 16 * h.nbytes
    want = jax.grad(lambda chain: jnp.mean(chain(h) ** 2))(chain)
    for budget in (least(profile), 2 * least(profile)):
        plan = mw.plan(profile, budget)
        step = mw.jit(mw.value_and_grad(lambda y: jnp.mean(y**2), plan))
        assert mw.temporaries(step.lower(chain, h).compile()) <= 1.02 * plan.peak_bytes
        assert relative_error(step(chain, h)[1], want) < 1e-5


def test_what_passes_few_layers_counts_where_it_passes() -> None:
    """Of 16 blocks with a skip connection of their own, a plan need not keep all."""
    block = [lambda x: (x, x + 1), lambda x: (x[0], jnp.sin(x[1])), lambda x: x[0] + x[1]]
    chain = mw.Chain(block * 16)
    structs = boundaries(chain, jnp.ones((64, 64)))
    assert carrying(chain, structs, wrt_input=False).fixed_bytes == 0
    one = mw.Chain([block[0], *[block[1]] * 8, block[2]])
    assert carrying(one, boundaries(one, jnp.ones((64, 64))), wrt_input=False).fixed_bytes == 0  # the input
    later = mw.Chain([jnp.tanh, *one.layers])
    found = carrying(later, boundaries(later, jnp.ones((64, 64))), wrt_input=False)
    assert found.fixed_bytes == 2 * 64 * 64 * 4


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_are_handed_on(stacked: bool) -> None:
    h = jax.random.normal(jax.random.key(1), (64, 64))
    x = (h, h > -1)
    keys = jax.random.split(jax.random.key(2), 6)
    chain = mw.Chain([Masked(jax.random.normal(key, (64, 64)) / 8) for key in keys])
    chain = mw.stack(chain, x) if stacked else chain
    profile = mw.profile(chain, x, repeats=1)
    assert profile.activation_bytes[1:] == (h.nbytes,) * 6
    want = jax.grad(lambda chain: loss(chain(x)), allow_int=True)(chain)
    for allowed in ({"store"}, {"store", "recompute"}):
        found = mw.frontier(profile, allowed=allowed).least_bytes
        assert found is not None
        step = mw.jit(mw.value_and_grad(loss, mw.plan(profile, found, allowed=allowed)))
        assert relative_error(step(chain, x)[1], want) < 1e-5
