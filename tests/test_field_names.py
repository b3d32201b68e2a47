"""Blocks that differ in a name alone are measured once; those that differ in what they compute are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.network.layer import layer, static
from mwplan.profiling import estimating

WIDTH, DEPTH = 8, 4
X = jnp.ones((4, WIDTH))


@layer
class Named:
    weight: Any
    name: str = static(default="")
    scale: float = static(default=1.0)

    def __call__(self, x: Any) -> Any:
        return x + jnp.tanh(self.scale * (x @ self.weight))


@jax.custom_vjp
def doubled(x: Any) -> Any:
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda kept, ct: (2 * ct,))


@jax.custom_vjp
def doubled_too(x: Any) -> Any:
    return 2 * x


doubled_too.defvjp(lambda x: (2 * x, x), lambda kept, ct: (2 * ct + 0 * kept,))


@layer
class Through:
    weight: Any
    function: Any = static()

    def __call__(self, x: Any) -> Any:
        return self.function(x @ self.weight)


def weight(i: int) -> Any:
    return jax.random.normal(jax.random.key(i), (WIDTH, WIDTH))


NETWORKS = {
    "names": (lambda i: Named(weight(i), f"block{i}"), 1),
    "numbers": (lambda i: Named(weight(i), "block", 1.0 + i), DEPTH),
    "rules of custom vjps": (lambda i: Through(weight(i), (doubled, doubled_too)[i % 2]), 2),
    "functions of one kind": (lambda i: Through(weight(i), lambda x: jnp.sin(x)), 1),
    "own rules": (lambda i: mw.layers.LeakyReLU(0.5 + 0.1 * i), DEPTH),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_measured_once(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # what other tests measured is not known
    make, distinct = NETWORKS[kind]
    counted: list[Any] = []
    priced = estimating.measure_layer

    def counting(*args: Any) -> Any:
        counted.append(args)
        return priced(*args)

    monkeypatch.setattr(estimating, "measure_layer", counting)
    net = mw.Chain([make(i) for i in range(DEPTH)])
    profile = mw.estimate(net, X, device="h100", compiled=False)
    assert len(counted) == distinct
    assert len({id(one) for one in profile.layers}) == distinct


def test_equinox_modules_with_names() -> None:
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):  # type: ignore[misc]
        linear: Any
        name: str = eqx.field(static=True)

        def __call__(self, x: Any) -> Any:
            return jax.nn.gelu(jax.vmap(self.linear)(x))

    keys = jax.random.split(jax.random.key(0), DEPTH)
    net = mw.Chain([Block(eqx.nn.Linear(WIDTH, WIDTH, key=k), f"block{i}") for i, k in enumerate(keys)])
    profile = mw.estimate(net, X, device="h100", compiled=False)
    assert len({id(one) for one in profile.layers}) == 1
    step = mw.jit(mw.value_and_grad(lambda y: jnp.mean(y**2), mw.plan(profile, "1MiB")))
    (_, _), grads = step(net, X)
    want = jax.grad(lambda net: jnp.mean(net(X) ** 2), allow_int=True)(net)
    for got, true in zip(jax.tree.leaves(grads), jax.tree.leaves(want)):
        assert jnp.allclose(got, true, atol=1e-6)
