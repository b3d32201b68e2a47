"""Circular convolutions and their transposes, against padding and a VALID convolution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from mwplan import layers as ml
from mwplan.compilers.compiling import compiler_options, temporaries
from mwplan.layers.bilinear import bilinear
from mwplan.layers.circular import Circular
from mwplan.layers.geometry import geometry
from mwplan.network.canonical import canonical

CASES = [
    ((6, 5), (3, 3), (1, 1), 3, 2),
    ((7, 6), (4, 5), (1, 1), 2, 3),
    ((7, 9), (3, 2), (3, 2), 2, 2),
    ((4, 4), (5, 5), (1, 1), 2, 2),  # the taps reach around once
    ((6, 5), (1, 3), (1, 1), 2, 2),
    ((9,), (4,), (2,), 3, 2),
    ((5,), (1,), (1,), 2, 2),
]


def padded(x: Any, w: Any, one: Circular) -> Any:
    names = ("NHC", "HIO", "NHC") if x.ndim == 3 else ("NHWC", "HWIO", "NHWC")
    x = jnp.pad(x, [(0, 0), *one.pads, (0, 0)], mode="wrap")
    stride = (1,) * len(one.pads)
    return lax.conv_general_dilated(x, w, stride, "VALID", rhs_dilation=one.dilation, dimension_numbers=names)


def case(size: Any, kernel: Any, dilation: Any, inner: int, outer: int, examples: int = 4) -> Any:
    g = geometry(size, kernel, (1,) * len(size), "CIRCULAR", dilation)
    rng = np.random.default_rng(0)
    shapes = ((examples, *size, inner), (*kernel, inner, outer), (examples, *size, outer))
    x, w, ct = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return Circular(g.pads, dilation), x, w, ct


def both(one: Circular) -> Any:
    def run(product: Any) -> Any:
        def all_of(x: Any, w: Any, ct: Any) -> Any:
            y, vjp = jax.vjp(product, x, w)
            (y2, moved) = jax.jvp(product, (x, w), (2 * x, w))
            return y, vjp(ct), y2, moved

        return jax.jit(all_of)

    return run(lambda x, w: bilinear(one, x, w)), run(lambda x, w: padded(x, w, one))


@pytest.mark.parametrize("sizes", CASES)
def test_values_and_transposes(sizes: Any) -> None:
    one, *args = case(*sizes)
    mine, its = both(one)
    for got, want in zip(jax.tree.leaves(mine(*args)), jax.tree.leaves(its(*args)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_taps_is_a_sum_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwplan.layers.circular._PART_BYTES", 1)
    monkeypatch.setattr("mwplan.layers.circular._MANY_EXAMPLES", 2)
    one, x, w, ct = case((6, 5), (3, 3), (1, 1), 3, 2)
    got = jax.make_jaxpr(one.to_w)(x, ct)
    assert str(got).count("conv_general_dilated[") == 2
    (want,) = jax.vjp(jax.jit(lambda w: padded(x, w, one)), w)[1](ct)
    np.testing.assert_allclose(jax.jit(one.to_w)(x, ct), want, rtol=1e-4, atol=1e-4)


def test_second_derivatives_and_batches() -> None:
    one, x, w, _ = case((4, 5), (3, 3), (1, 1), 2, 2)
    with jax.enable_x64(True):
        x, w = (jnp.asarray(np.asarray(a), jnp.float64) for a in (x, w))
        check_grads(jax.jit(lambda x, w: bilinear(one, x, w) ** 2), (x, w), 2, rtol=1e-6)
    x = jnp.asarray(np.asarray(x), jnp.float32)
    w = jnp.asarray(np.asarray(w), jnp.float32)

    def gradient(product: Any) -> Any:
        def loss(w: Any, x: Any) -> Any:
            return jnp.sum(product(x[None], w) ** 2)

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, x)

    got, want = gradient(lambda x, w: bilinear(one, x, w)), gradient(lambda x, w: padded(x, w, one))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_half_precision_and_no_examples() -> None:
    one, *args = case((6, 5), (3, 3), (1, 1), 3, 2)
    args = [a.astype(jnp.bfloat16) for a in args]
    mine, its = both(one)
    for got, want in zip(jax.tree.leaves(mine(*args)), jax.tree.leaves(its(*args)), strict=True):
        assert got.dtype == want.dtype
        wide = np.asarray(want, np.float32)
        np.testing.assert_allclose(
            np.asarray(got, np.float32), wide, atol=0.02 * np.abs(wide).max(), rtol=0.02
        )
    one, *args = case((6, 5), (3, 3), (1, 1), 3, 2, examples=0)
    for got, want in zip(jax.tree.leaves(both(one)[0](*args)), jax.tree.leaves(both(one)[1](*args))):
        np.testing.assert_array_equal(got, want)


def test_arrays_of_an_explicit_mesh() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    one, x, w, ct = case((6, 5), (3, 3), (1, 1), 3, 2)
    _, vjp = jax.vjp(jax.jit(lambda w: padded(x, w, one)), w)
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    layer = jax.device_put(ml.Conv2D(w, padding="CIRCULAR"), jax.NamedSharding(mesh, jax.P()))
    got = jax.jit(jax.grad(lambda layer: jnp.sum(layer(placed) * jnp.asarray(np.asarray(ct)))))(layer)
    np.testing.assert_allclose(got.weight, vjp(ct)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is lean is so on CPUs")
def test_memory() -> None:
    """In activations: what padding takes 2.4, 3.5 and 3.5 for. And the residuals are the layer's own
    input."""
    one, x, w, ct = case((16, 16), (3, 3), (1, 1), 32, 32, examples=32)

    def bytes_of(function: Any, *args: Any) -> float:
        lowered = jax.jit(function, compiler_options=compiler_options()).lower(*args)
        return temporaries(lowered.compile()) / x.nbytes

    assert bytes_of(lambda x, w: bilinear(one, x, w), x, w) < 0.5
    assert bytes_of(lambda w, ct: one.to_x(w, ct), w, ct) < 0.5
    assert bytes_of(lambda x, ct: one.to_w(x, ct), x, ct) < 0.8
    layer = ml.Conv2D(w, padding="CIRCULAR")
    kept = jax.eval_shape(lambda layer, x: jax.vjp(lambda layer: layer(x), layer)[1], layer, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= x.size


def test_the_convolutions_within_are_brought_into_the_fast_layout() -> None:
    one, x, w, ct = case((6, 5), (3, 3), (1, 1), 3, 2)

    def step(x: Any, w: Any, ct: Any) -> Any:
        def body(w: Any, _: Any) -> Any:
            return w + jax.vjp(lambda w: bilinear(one, x, w), w)[1](ct)[0], None

        return lax.scan(body, w, None, length=2)[0]

    text = str(jax.make_jaxpr(canonical(step))(x, w, ct))
    assert "bilinear" not in text
    found = text.count("conv_general_dilated[")
    assert found
    assert found == text.count("lhs_spec=(0, 3, 1, 2), rhs_spec=(3, 2, 0, 1)")
    got, want = jax.jit(canonical(step))(x, w, ct), jax.jit(step)(x, w, ct)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
