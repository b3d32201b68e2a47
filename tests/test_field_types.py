"""Weakly typed weights and weights of few bits: the network stays what it is, and bytes are the device's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.common import trees
from mwplan.network.chain import boundaries, unstack
from mwplan.network.layer import layer
from mwplan.network.rules import InvertRule, VijpRule
from mwplan.plans.schedule import RunKind
from tests.helpers import alike, relative_error

WIDTH, DEPTH = 32, 6


@dataclass(frozen=True)
class Divide(VijpRule):
    name: str = "divide"

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        return ct_in / (1 + layer.scale)


@dataclass(frozen=True)
class Inverse(InvertRule):
    name: str = "inverse"

    def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
        return y / (1 + layer.scale)


@layer
class Scale:
    """A residual branch that is a product with the weights."""

    scale: Any

    def __call__(self, x: Any) -> Any:
        return x + x * self.scale

    def vijp_rules(self, x: Any) -> list[Any]:
        return [Divide()]

    def invert_rules(self, x: Any) -> list[Any]:
        return [Inverse()]


def loss_of(y: Any) -> Any:
    return jnp.mean(jnp.sin(y.astype(jnp.float32)) ** 2)


def scaled(stacked: bool) -> tuple[mw.Chain, Any]:
    x = jax.random.normal(jax.random.key(0), (16, WIDTH), jnp.bfloat16)
    net = mw.Chain([Scale(jnp.full((WIDTH,), 0.1 + 0.01 * i)) for i in range(DEPTH)])
    return (mw.stack(net, x) if stacked else net), x


def test_stacks_keep_weak_types() -> None:
    plain, x = scaled(False)
    net, _ = scaled(True)
    assert len(net.parts) == 1
    for one in (net, unstack(net), plain):
        assert all(map(trees.is_weak, jax.tree.leaves(one)))
        assert one(x).dtype == jnp.bfloat16
        assert all(s.dtype == jnp.bfloat16 for s in boundaries(one, x))
    strong = jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), plain)
    assert strong(x).dtype == jnp.float32  # the same weights, another network
    mixed = mw.Chain([*plain.layers[:2], *strong.layers[2:]])
    assert mixed(x).dtype == mw.stack(mixed, x)(x).dtype == jnp.float32


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("way", [*RunKind], ids=lambda way: way.name)
def test_weak_types_in_every_run(way: RunKind, stacked: bool) -> None:
    net, x = scaled(stacked)
    options = {RunKind.MOONWALK: "divide", RunKind.INVERT: "inverse"}
    runs = alike(way, options.get(way, "vjp"), DEPTH)
    (_, _), grads = mw.jit(mw.value_and_grad(loss_of, mw.Schedule(runs=runs)))(net, x)
    want = mw.jit(jax.grad(lambda net: loss_of(net(x))))(net)
    assert relative_error(grads, want) < 3e-2  # of bfloat16


@pytest.mark.parametrize("stacked", [False, True])
def test_weak_types_are_profiled(stacked: bool) -> None:
    net, x = scaled(stacked)
    for profile in (mw.profile(net, x, repeats=1), mw.estimate(net, x, device="h100")):
        assert profile.activation_bytes == (16 * WIDTH * 2,) * (DEPTH + 1)
        schedule = mw.plan(profile, mw.frontier(profile, max_error=0.1).points[0][0], max_error=0.1)
        grads = mw.jit(jax.grad(lambda net: loss_of(mw.apply(schedule, net, x))))(net)  # noqa: B023
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
        if not stacked:  # as after an optimizer's update
            mw.apply(schedule, jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), net), x)


def test_weak_inputs_stay_weak() -> None:
    """A network that depends on it: bfloat16 weights meet a number-like input."""
    x = jnp.full((16, WIDTH), 0.5)
    net = mw.Chain([jnp.sin, jnp.cos, Scale(jnp.ones(WIDTH, jnp.bfloat16)), jnp.sin])
    assert net(x).dtype == jnp.bfloat16
    profile = mw.profile(net, x, repeats=1)
    assert profile.activation_bytes == tuple(trees.nbytes(s) for s in boundaries(net, x))
    assert profile.activation_bytes[-1] == 16 * WIDTH * 2
    schedule = mw.plan(profile, mw.frontier(profile, max_error=0.1).points[0][0], max_error=0.1)
    grads = mw.jit(jax.grad(lambda net: loss_of(mw.apply(schedule, net, x))))(net)
    assert relative_error(grads, jax.grad(lambda net: loss_of(net(x)))(net)) < 3e-2


@layer
class Quantised:
    """A product with weights of few bits, scaled."""

    weight: Any
    scale: Any

    def __call__(self, x: Any) -> Any:
        return x @ (self.weight.astype(x.dtype) * self.scale)


FEW = ("int2", "uint2", "int4", "uint4", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "bool")


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("shape", [(64, 48), (3, 5), (7, 11)])
def test_bytes_are_the_devices(name: str, shape: tuple[int, ...]) -> None:
    array = jnp.zeros(shape, name)
    memory = jax.jit(lambda a: a.astype(jnp.float32)).lower(array).compile().memory_analysis()
    assert memory is not None
    assert trees.nbytes(array) == trees.nbytes(trees.struct(array)) == memory.argument_size_in_bytes


@pytest.mark.parametrize("name", ["int4", "uint2", "float8_e4m3fn", "float4_e2m1fn"])
def test_weights_of_few_bits_are_trained_around(name: str) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[4], (32, 64))
    weights = [(jax.random.normal(k, (64, 64)) * 2).astype(jnp.float32) for k in keys[:4]]
    net = mw.Chain(
        [Quantised(jnp.abs(w).astype(name), jnp.full(64, 0.02) * (1 + i)) for i, w in enumerate(weights)]
    )
    profile = mw.profile(net, x, repeats=1)
    step = mw.value_and_grad(loss_of, mw.plan(profile, "1MiB"))
    compiled = mw.jit(step).lower(net, x).compile()
    (_, _), grads = compiled(net, x)
    differentiable = [leaf for leaf in jax.tree.leaves(net) if trees.is_inexact(leaf)]
    want = jax.grad(lambda w: loss_of(trees.with_parameters(net, w)(x)))(differentiable)
    assert relative_error(grads, want) < 1e-5
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == trees.nbytes((net, x))
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert profile.fixed_bytes == pytest.approx(fixed, abs=256)
