"""Arrays that a chain holds twice, and state that a call changes."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.network.layer import layer
from tests.helpers import relative_error

WORDS, WIDTH = 12, 8


@layer
class Embed:
    table: Any

    def __call__(self, tokens: Any) -> Any:
        return self.table[tokens]


@layer
class Unembed:
    table: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.table.T


TABLE = jax.random.normal(jax.random.key(0), (WORDS, WIDTH))
TOKENS = jnp.arange(10) % WORDS
MIDDLE = mw.layers.Dense.init(jax.random.key(1), WIDTH, WIDTH)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [Embed(TABLE), MIDDLE, Unembed(TABLE)],
        lambda: [MIDDLE, jnp.tanh, MIDDLE],
        lambda: [mw.layers.Sequential((MIDDLE, MIDDLE))],
    ],
)
def test_what_comes_untied_is_said(layers: Any) -> None:
    with pytest.warns(mw.TiedWeightsWarning, match=r"layers\[.*are one array.*fit_function"):
        mw.Chain(layers())


def test_what_is_no_tie() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mw.Chain([Embed(TABLE), MIDDLE, Unembed(jnp.array(TABLE))])
        mw.Chain([mw.frozen(Embed(TABLE)), mw.frozen(Unembed(TABLE))])
        mw.Chain([jnp.tanh] * 3)
        mask = jnp.arange(WIDTH)  # whole numbers are not trained
        mw.Chain([jax.tree_util.Partial(jnp.multiply, mask), jax.tree_util.Partial(jnp.add, mask)])


def tied_loss(params: Any, tokens: Any) -> Any:
    """A chain made of one array within a function of it."""
    y = mw.Chain([Embed(params["table"]), dataclasses.replace(MIDDLE), Unembed(params["table"])])(tokens)
    return -jnp.mean(jax.nn.log_softmax(y)[jnp.arange(len(tokens)), tokens])


def test_what_is_tied_stays_so_in_a_function() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = mw.fit_function(tied_loss, {"table": TABLE}, TOKENS, budget="1MiB")
        _, grads = fitted.step({"table": TABLE}, TOKENS)
        assert relative_error(grads, jax.grad(tied_loss)({"table": TABLE}, TOKENS)) < 1e-5


def test_running_averages_that_would_be_lost_are_refused() -> None:
    """And `mw.fit_function`, which the error names, hands them back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        nnx = pytest.importorskip("flax.nnx")
        from mwplan.adapters.flax import from_nnx

        norm = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (16, WIDTH)) + 1
    net = mw.Chain([MIDDLE, from_nnx(norm)])
    with pytest.raises(mw.MwplanError, match=r"changes its state \(`mean`, `var`\).*fit_function"):
        mw.estimate(net, x, device="h100", compiled=False)
    norm.eval()
    assert len(mw.estimate(mw.Chain([MIDDLE, from_nnx(norm)]), x, device="h100", compiled=False)) == 2
    norm.train()
    graph, params, others = nnx.split(norm, nnx.Param, ...)

    def loss(params: Any, others: Any, x: Any) -> Any:
        module = nnx.merge(graph, params, others)
        y = module(jnp.tanh(x))
        return jnp.mean(y**3), nnx.state(module, nnx.BatchStat)

    fitted = mw.fit_function(loss, params, others, x, budget="1MiB", has_aux=True)
    (_, state), _ = fitted.step(params, others, x)[0]
    assert relative_error(state["mean"].get_value(), 0.01 * jnp.tanh(x).mean(0)) < 1e-3
