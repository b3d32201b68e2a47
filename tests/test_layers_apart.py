"""What single layers promise beyond the checks that all go through (`test_layers`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from mwplan import layers as ml
from mwplan.common import trees
from mwplan.layers.standard import STANDARD
from mwplan.network import operations, residuals, rules
from tests.layer_rows import K, noise, wide


def test_couplings_of_parts_that_differ() -> None:
    """A pair need not be of equal halves; pairs stay pairs, and everything is as `jax.vjp` has it."""
    to, back = ml.Dense.he(K(1), 6, 4), ml.Dense.he(K(2), 4, 6)
    layer = ml.Coupling(ml.Sequential((ml.ReLU(), to)), ml.Sequential((ml.Smooth("tanh"), back)))
    with jax.enable_x64(True):
        layer = wide(layer)
        x, ct_out = (
            (jnp.asarray(noise(k, (3, 4)), float), jnp.asarray(noise(k + 1, (3, 6)), float)) for k in (2, 4)
        )
        y, vjp = jax.vjp(lambda net, x: net(x), layer, x)
        grads, ct_in = vjp(ct_out)
        for rule in rules.vijp_rules(layer, x):
            assert isinstance(rule, rules.VijpRule)
            got, fragment = rule.reverse(layer, rule.forward(layer, x)[1], ct_out)
            rebuilt = rule.rebuild(layer, x, got, fragment)
            for one, other in zip(
                jax.tree.leaves((got, rebuilt)), jax.tree.leaves((ct_in, ct_out)), strict=True
            ):
                np.testing.assert_allclose(one, other, atol=1e-12)
        for inverse in rules.invert_rules(layer, x):
            assert isinstance(inverse, rules.InvertRule)
            found = inverse.backward(layer, y, inverse.forward(layer, x)[1], ct_out)
            want = (x, trees.parameters(grads), ct_in)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-12)
    assert jax.tree.structure(y) == jax.tree.structure(x)


def test_products_over_several_axes_add_their_bias_in_place() -> None:
    """A convolution with one tap and a dense layer over several axes: nothing but the output, and as
    `jax.lax` has it."""
    x = noise(0, (64, 16, 16, 8))
    weight, bias = noise(1, (1, 1, 8, 8)), noise(2, (8,))
    want = (
        jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + bias
    )
    for layer in (ml.Conv2D(weight, bias), ml.Dense(weight[0, 0], bias)):
        compiled = mw.jit(lambda x, layer=layer: layer(x)).lower(x).compile()
        np.testing.assert_allclose(compiled(x), want, atol=1e-5)
        if jax.default_backend() == "cpu":
            assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 100


def _size_of_kept(f: Callable[[Any], Any], x: Any) -> int:
    """How many arrays as large as `x` a backward pass of `f` keeps."""
    pull = jax.eval_shape(lambda x: jax.vjp(f, x)[1], x)
    return sum(leaf.size for leaf in jax.tree.leaves(pull)) // x.size


@pytest.mark.parametrize("norm", [ml.LayerNorm, ml.RMSNorm])
def test_norms_keep_their_input_alone(norm: Any) -> None:
    """And what is as small as the scale."""
    assert _size_of_kept(lambda x: norm.init(None, 32)(x), noise(0, (64, 32))) == 1


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "softplus"])
def test_smooth_activations_keep_one_array_and_are_those_of_jax(kind: str) -> None:
    """Within a module too, where no rule of their own is asked; and differentiable again, forwards too."""
    own = ml.Smooth(kind)
    theirs = {
        "gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": partial(jax.nn.gelu, approximate=True)
    }.get(kind) or getattr(jax.nn, kind)  # fmt: skip
    x = 4 * noise(0, (64, 32))
    assert _size_of_kept(own, x) == 1 < _size_of_kept(theirs, x)
    np.testing.assert_allclose(own(x), theirs(x), atol=1e-6, rtol=1e-6)
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64).ravel()
        for order in (jax.grad, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.grad(f))):
            got, want = (jax.vmap(order(f))(wide) for f in (own, theirs))
            np.testing.assert_allclose(got, want, atol=1e-12)
    half = x.astype(jnp.bfloat16)
    want = theirs(half.astype(jnp.float32))
    assert own(half).dtype == jnp.bfloat16
    np.testing.assert_allclose(own(half).astype(jnp.float32), want, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "softplus", "tanh", "sigmoid"])
def test_no_point_of_a_smooth_activation_is_lost_on_the_way_back(kind: str) -> None:
    """However the compiler rounds near the solution: one point in a hundred was off by 1e-5."""
    layer = ml.Smooth(kind, 0.3)
    (rule,) = layer.invert_rules(jnp.ones(1))
    assert isinstance(rule, rules.InvertRule)
    back = jax.jit(lambda y: rule.inverse(layer, y, None))
    x = np.linspace(-6, 6, 20_001)
    np.testing.assert_allclose(back(layer(jnp.asarray(x, jnp.float32))), x, atol=3e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(back(layer(jnp.asarray(x))), x, atol=1e-13)


def test_what_any_layer_may_keep() -> None:
    """Without rules of its own: products alone, and nothing, where that saves more than an activation."""
    wide, narrow = noise(0, (16, 64)), noise(1, (64, 16))
    x = noise(2, (32, 16))

    def names(layer: Any) -> list[str]:
        return [rule.name for rule in operations.store_rules(layer, trees.struct(x))]

    block = jax.tree_util.Partial(
        lambda wide, narrow, x: jnp.tanh(jax.nn.gelu(x @ wide)) @ narrow, wide, narrow
    )
    assert names(block) == ["products", "nothing", "vjp"]
    assert names(jnp.sin) == ["vjp"]  # keeps its cosine: one activation
    assert names(partial(jax.nn.gelu, approximate=False)) == ["nothing", "vjp"]
    assert names(lambda x: x @ noise(3, (16, 16))) == ["vjp"]
    assert names(ml.LayerNorm.init(None, 16)) == ["input", "vjp"]
    kept = {
        rule.name: residuals.new_bytes(jax.eval_shape(partial(operations.forward, rule=rule), block, x)[1])
        for rule in operations.store_rules(block, x)
    }
    assert kept["nothing"] == 0
    assert kept["products"] == 32 * 64 * 4 < kept["vjp"]
    ways = {way.option for way in mw.explain(block, x).ways if way.strategy == "STORE"}
    assert ways == {"products", "nothing", "vjp", "parts"}  # recognised as a `Sequential`


def test_parts_without_rules_keep_what_jax_keeps() -> None:
    """A ReLU the signs of its input, packed, not the input."""
    block = ml.Sequential((ml.Dense.init(K(0), 16, 16), jax.tree_util.Partial(jax.nn.relu)))
    rule, x = rules.store_rules(block, trees.struct(noise(0, (32, 16))))[0], noise(0, (32, 16))
    assert rule.name == "parts"
    held = jax.eval_shape(partial(operations.forward, rule=rule), block, x)[1]
    assert residuals.new_bytes(held) == x.size // 8


@pytest.mark.parametrize("function", STANDARD, ids=lambda function: function.__name__)
def test_known_activations_are_layers_with_rules(function: Any) -> None:
    """A chain takes JAX's functions for what they are: the same values and derivatives, 0, large numbers and
    NaN included."""
    x = jnp.array([-90.0, -2.0, -1e-3, 0.0, 0.7, 3.0, 90.0, jnp.nan])
    (known,) = mw.Chain([function]).layers
    assert known == STANDARD[function]
    np.testing.assert_array_equal(known(x), function(x))
    wanted, got = (jax.vjp(one, x)[1](jnp.ones(8))[0][:-1] for one in (function, known))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    rule, *_ = rules.store_rules(known, x)
    y, kept = rule.forward(known, x)
    np.testing.assert_array_equal(y, function(x))
    np.testing.assert_allclose(rule.backward(known, kept, jnp.ones(8))[1][:-1], wanted, rtol=1e-6, atol=1e-7)


def test_other_functions_stay_functions() -> None:
    halved = partial(jax.nn.gelu, approximate=False)
    assert [type(one).__name__ for one in mw.Chain([jnp.sin, halved, jax.nn.relu6])] == ["Function"] * 3
