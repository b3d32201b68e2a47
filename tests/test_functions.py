"""Any function: cut into pieces, whose chain computes the same; fitted, whose gradient is JAX's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from tests import functions

PyTree = Any


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def assert_gradient(loss: Any, params: PyTree, *args: Any, has_aux: bool = False, most: int = 128) -> mw.Cut:
    """The chain of pieces gives the value and the gradient that JAX gives."""
    found = mw.cut(loss, params, *args, has_aux=has_aux, most=most)
    chain, x, back = found.build(params, *args)
    y, pull = jax.vjp(lambda chain, x: chain(x), chain, x)
    ct = [jnp.ones_like(y[0]), *(_zero(leaf) for leaf in y[1:])]
    got = back(*pull(tuple(ct)))
    assert_same_gradient(got, loss, params, *args, has_aux=has_aux)
    want = loss(params, *args)
    np.testing.assert_allclose(y[0], want[0] if has_aux else want, rtol=1e-12)
    return found


def _zero(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def assert_same_gradient(got: PyTree, loss: Any, params: PyTree, *args: Any, has_aux: bool = False) -> None:
    """`got` is what JAX gives, None where it gives float0."""
    want = jax.grad(loss, has_aux=has_aux, allow_int=True)(params, *args)
    want = want[0] if has_aux else want
    want = jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a, b, rtol=1e-9, atol=1e-9 * float(jnp.abs(b).max()) + 1e-300, err_msg=jax.tree_util.keystr(path)
        )


def assert_fits(
    loss: Any, params: PyTree, *args: Any, share: float, has_aux: bool = False
) -> mw.FittedFunction:
    """Fitted to a share of what JAX's own step takes, the step keeps the budget, and its gradient is
    JAX's."""
    plain = mw.jit(jax.value_and_grad(loss, has_aux=has_aux)).lower(params, *args).compile().memory_analysis()
    fixed = plain.argument_size_in_bytes + plain.output_size_in_bytes
    budget = int(share * (fixed + plain.temp_size_in_bytes))
    fitted = mw.fit_function(loss, params, *args, budget=budget, has_aux=has_aux)
    assert fitted.temporary_bytes + fixed <= budget
    (value, report), grads = fitted.step(params, *args)
    want = loss(params, *args)
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
        assert a.dtype == b.dtype
    assert float(report.worst) < 1e-4
    assert_same_gradient(grads, loss, params, *args, has_aux=has_aux)
    return fitted


def test_mlp_is_cut_between_its_layers_and_fits() -> None:
    params, x, y = functions.mlp(depth=8)
    found = assert_gradient(functions.mlp_loss, params, x, y)
    assert len(found) == 4
    assert all(len(piece.params) == 4 for piece in found.plan.pieces)
    assert len({piece.program for piece in found.plan.pieces[:-1]}) == 1
    fitted = assert_fits(functions.mlp_loss, params, x, y, share=0.8)
    with pytest.raises(mw.ArgumentError, match=r"args\[0\].*compiled for"):
        fitted.step(params, x[:2], y)


def test_transformer_is_cut_between_its_sublayers_and_fits() -> None:
    params, batch = functions.transformer(depth=2)
    found = assert_gradient(functions.transformer_loss, params, batch)
    kinds = [piece.program for piece in found.plan.pieces]
    assert len(kinds) == 2 * 2 + 3
    assert kinds[1] == kinds[3]
    assert kinds[2] == kinds[4]
    assert "blocks" in str(found)
    assert_fits(functions.transformer_loss, params, batch, share=0.5)
