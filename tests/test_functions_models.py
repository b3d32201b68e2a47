"""Models of other libraries, unmodified: cut, fitted to a budget, with JAX's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from experiments import published
from mwplan.common import trees
from tests import functions, models
from tests.test_functions import PyTree, assert_fits, assert_gradient


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_linen_resnet_with_new_averages() -> None:
    loss, params, args = models.resnet()
    assert_gradient(loss, params, *args, has_aux=True)
    assert_fits(loss, params, *args, has_aux=True)


def test_nnx_decoder_with_tied_embeddings() -> None:
    loss, params, args = models.decoder()
    found = assert_gradient(loss, params, *args, has_aux=True)
    first, last = found.plan.pieces[0], found.plan.pieces[-1]
    assert {*first.params} & {*last.params}  # the embedding, held by both
    fitted = assert_fits(loss, params, *args, has_aux=True)
    (_, state), _ = fitted.step(params, *args)[0]
    assert int(state["calls"][...]) == 1


def test_unet_with_long_skips() -> None:
    loss, params, args = models.unet()
    found = assert_gradient(loss, params, *args)
    assert max(len(piece.crosses) for piece in found.plan.pieces) >= 3
    assert_fits(loss, params, *args)


def test_normalizing_flow() -> None:
    loss, params, args = models.flow()
    found = assert_gradient(loss, params, *args)
    assert len({piece.program for piece in found.plan.pieces[2:-1]}) == 1
    assert_fits(loss, params, *args)


def test_scanned_transformer() -> None:
    params, batch = functions.transformer(depth=4)
    fitted = assert_fits(functions.scanned_loss, functions.scanned(params), batch)
    assert len(fitted.schedule) == 11


def test_equinox_vision_transformer() -> None:
    loss, model, args = models.vit()
    fitted = assert_equinox(loss, model, args)
    assert fitted.cut.plan.pieces[1].program == fitted.cut.plan.pieces[4].program


def assert_equinox(loss: Any, model: Any, args: tuple[Any, ...]) -> Any:
    """As `assert_fits`, with `eqx.filter_value_and_grad` for the truth."""
    chain, x, _ = mw.cut(loss, model, *args).build(model, *args)
    profile = mw.estimate(*jax.eval_shape(lambda *both: both, chain, x), device="laptop")
    fitted = mw.fit_function(loss, model, *args, budget="100MiB", profile=profile)
    (value, _), grads = fitted.step(model, *args)
    want, want_grads = eqx.filter_value_and_grad(loss)(model, *args)
    assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
    for a, b in zip(jax.tree.leaves((value, grads)), jax.tree.leaves((want, want_grads))):
        assert abs(a - b).max() <= 1e-9 * abs(b).max() + 1e-15
    return fitted


def _masked(params: PyTree, x: Any, masks: Any, key: Any) -> Any:
    """Weights with masks, noise and steps, made for all layers at once: a loop forwards, one backwards, and
    layers of their own."""
    scale = jnp.where(masks, jnp.exp(params["scale"])[:, None] * params["w"], 0.0)
    noisy = params["w"] + 0.01 * jax.random.normal(key, params["w"].shape)
    own = [w * mask for w, mask in zip(params["own"], masks)]

    def body(x: Any, row: Any) -> tuple[Any, None]:
        w, mask, step, noisy = row
        return x + jnp.tanh(x @ jnp.where(mask, w, 0)) @ (noisy * mask) / step, None

    rows = (scale, masks, jnp.arange(1.0, 5.0), noisy)
    for reverse in (False, True):
        x, _ = jax.lax.scan(body, x, rows, reverse=reverse)
    for w in own:
        x = jnp.tanh(x @ w) + jnp.sin(x)
    return jnp.mean(x**2)


def test_weights_made_of_parameters_and_data_are_no_activations() -> None:
    r = np.random.default_rng(1)
    params = {"w": r.normal(size=(4, 6, 6)), "scale": r.normal(size=(4, 6)), "own": r.normal(size=(4, 6, 6))}
    params = {**params, "own": [*params["own"]]}
    args = (r.normal(size=(5, 6)), r.normal(size=(4, 6, 6)) > 0, jax.random.key(0))
    params, args = jax.tree.map(jnp.asarray, (params, args))
    found = assert_gradient(_masked, params, *args)
    chain, _, _ = found.build(params, *args)
    assert [part.depth for part in chain.parts if isinstance(part, mw.Stack)] == [4, 4]
    avals = found.flow.traced.avals
    largest = max(
        avals[v].size for piece in found.plan.pieces for v in piece.crosses if v in found.flow.carrying
    )
    assert largest <= 5 * 6  # activations cross the cuts, and no weights


QUICK = ("equinox_lstm", "optax_ctc")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in published.MODELS]
)
def test_published_models(name: str) -> None:
    """As they are: those that are installed. They are fitted by `python -m experiments.functions`."""
    assert published.glue(name) <= 3
    if lacking := published.missing(name):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    case = published.MODELS[name][0]()
    arrays, static = eqx.partition(case.params, trees.is_array)
    assert_gradient(
        lambda arrays, *args: case.loss(eqx.combine(arrays, static), *args),
        arrays,
        *case.args,
        has_aux=case.has_aux,
    )
