"""Networks as people write them: masks and keys beside the activations, weak types, small dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.network.layer import layer
from mwplan.network.rules import InvertRule, VijpRule
from mwplan.plans.schedule import RunKind
from tests.helpers import alike, relative_error

WIDTH, DEPTH = 16, 8


@dataclass(frozen=True)
class Divide(VijpRule):
    """The vijp of `Masked`; what it gives for the integers is whatever is at hand."""

    name: str = "divide"

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        return ct_in[0] / layer.factor(x[1]), x[1]


@dataclass(frozen=True)
class Inverse(InvertRule):
    name: str = "inverse"

    def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
        return y[0] / layer.factor(y[1]), y[1]


@layer
class Masked:
    """Scales by weights, by a mask, by a whole number and by noise from a key, which all go on."""

    scale: jax.Array

    def factor(self, side: Any) -> jax.Array:
        noise = jax.random.uniform(side["key"], (WIDTH,), minval=0.8, maxval=1.2)
        return self.scale * jnp.where(side["mask"], 1.5, 0.75) * noise * (1 + side["whole"] % 2)

    def __call__(self, x: Any) -> Any:
        return jnp.asarray(x[0] * self.factor(x[1])), x[1]

    def vijp_rules(self, x: Any) -> list[Any]:
        return [Divide()]

    def invert_rules(self, x: Any) -> list[Any]:
        return [Inverse()]


def masked(depth: int = DEPTH) -> tuple[mw.Chain, Any]:
    keys = jax.random.split(jax.random.key(0), depth + 1)
    layers = [Masked(jax.random.uniform(k, (WIDTH,), minval=0.8, maxval=1.2)) for k in keys[1:]]
    side = {"mask": jnp.arange(WIDTH) % 3 == 0, "whole": jnp.arange(WIDTH), "key": jax.random.key(7)}
    return mw.Chain(layers), (jax.random.normal(keys[0], (4, WIDTH)), side)


def loss_of(y: Any) -> Any:
    return jnp.mean(jnp.sin(y[0]) ** 2)


WAYS = {
    "STORE": (RunKind.STORE, "vjp"),
    "RECOMPUTE": (RunKind.RECOMPUTE, "vjp"),
    "FRAGMENT": (RunKind.MOONWALK, "whole"),
    "VIJP": (RunKind.MOONWALK, "divide"),
    "INVERT": (RunKind.INVERT, "inverse"),
    "OFFLOAD": (RunKind.OFFLOAD, "vjp"),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_masks_and_keys_travel(way: str, stacked: bool) -> None:
    net, x = masked()
    net = mw.stack(net, x) if stacked else net
    want = mw.jit(jax.grad(lambda w: loss_of(_with(net, w)(x))))(_weights(net))
    step = mw.jit(mw.value_and_grad(loss_of, mw.Schedule(runs=alike(*WAYS[way], DEPTH))))
    (_, report), grads = step(net, x)
    assert relative_error(grads, want) < 1e-5
    assert not report.discrepancy.size or float(report.worst) < 1e-5


def _weights(net: mw.Chain) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(net) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _with(net: mw.Chain, weights: list[Any]) -> mw.Chain:
    leaves, treedef = jax.tree.flatten(net)
    new = iter(weights)
    return jax.tree.unflatten(
        treedef, [next(new) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf for leaf in leaves]
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_and_keys_are_profiled(stacked: bool) -> None:
    net, x = masked()
    net = mw.stack(net, x) if stacked else net
    profile = mw.profile(net, x, repeats=1)
    one = profile.layers[0]
    assert [option.name for option in one.moonwalk] == ["divide", "whole"]
    assert [option.name for option in one.invert] == ["inverse"]
    assert 0 < one.moonwalk[0].local_error < 1e-6
    assert one.moonwalk[0].growth < 5
    assert profile.cotangent_bytes[0] == 4 * WIDTH * 4
    estimate = mw.estimate(net, x, device="h100")
    assert [option.name for option in estimate.layers[0].invert] == ["inverse"]
    budget = mw.frontier(profile).points[0][0]
    step = mw.jit(mw.value_and_grad(loss_of, mw.plan(profile, budget)))
    (_, _), grads = step(net, x)
    want = jax.grad(lambda w: loss_of(_with(net, w)(x)))(_weights(net))
    assert relative_error(grads, want) < 1e-5


def test_operator_takes_masks_and_keys() -> None:
    net, x = masked(1)
    y, vijp_fn = mw.vijp(net[0], x)
    ct = jax.grad(loss_of, allow_int=True)(y)
    _, vjp = jax.vjp(net[0], x)
    (ct_in,) = vjp(ct)
    back = vijp_fn(ct_in)
    assert relative_error(back[0], ct[0]) < 1e-6
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(back[1]))
    assert mw.fragment_of(net[0], x, ct) == ()
    assert "divide" in str(mw.explain(net[0], x))
