"""Every layer and option against `jax.vjp`: one table, crossed with every check. A new layer is a row."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwplan import layers as ml
from mwplan.common import trees
from mwplan.network import operations, residuals, rules
from tests.layer_rows import FIRST, FRAGMENTS, OPTIONS, ROWS, RULES, arrays, case, wide


@partial(jax.jit, static_argnums=(1, 4))
def recovery(layer: Any, rule: rules.VijpRule, x: Any, ct_out: Any, mapped: bool = False) -> Any:
    """Relative distances of `reverse` from `jax.vjp` and of the rebuilt cotangent from the true one; and the
    fragment."""

    def sweeps(x: Any, ct_out: Any) -> Any:
        _, q = rule.forward(layer, x)
        ct_in, fragment = rule.reverse(layer, q, ct_out)
        return ct_in, fragment, rule.rebuild(layer, x, ct_in, fragment)

    ct_in, fragment, rebuilt = (jax.vmap(sweeps) if mapped else sweeps)(x, ct_out)
    _, vjp = jax.vjp(layer, x)
    pairs = ((ct_in, vjp(ct_out)[0]), (rebuilt, ct_out))
    return jnp.stack([jnp.linalg.norm(got - want) / jnp.linalg.norm(want) for got, want in pairs]), fragment


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_recovery(name: str, option: str) -> None:
    """Compiled, in float32: the rebuilt cotangent is the true one, and the fragment has the bytes that its
    shapes state."""
    layer, rule, x, ct_out = case(name, option)
    assert rule.check(layer, trees.struct(x)) is None
    errors, fragment = recovery(layer, rule, x, ct_out)
    assert (np.asarray(errors) < 1e-4).all(), errors
    stated = jax.eval_shape(lambda: rule.reverse(layer, rule.forward(layer, x)[1], ct_out)[1])
    assert trees.struct(fragment) == stated
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fragment))
    assert bool(jax.tree.leaves(fragment)) == rule.has_fragment
    if option in FRAGMENTS.get(name, {}):
        assert trees.nbytes(fragment) == 4 * 6 * FRAGMENTS[name][option]


@pytest.mark.parametrize(("name", "option"), RULES)
def test_vmap_float64(name: str, option: str) -> None:
    """Mapped over the first batch axis, in float64."""
    layer, rule, x, ct_out = case(name, option)
    with jax.enable_x64(True):
        layer, x, ct_out = wide(layer), x.astype(jnp.float64), ct_out.astype(jnp.float64)
        errors = np.asarray(recovery(layer, rule, x, ct_out, mapped=True)[0])
    assert (errors < 1e-10).all(), errors


@pytest.mark.parametrize(("name", "option"), RULES)
def test_bfloat16(name: str, option: str) -> None:
    """With bf16 activations and parameters the sweeps still work in float32, and `reverse` is near the bf16
    vjp."""
    layer, rule, x, ct_out = case(name, option)
    params = [p.astype(jnp.bfloat16) for p in trees.parameters(layer)]
    layer, x = trees.with_parameters(layer, params), x.astype(jnp.bfloat16)

    @jax.jit
    def sweeps(layer: Any, x: Any) -> Any:
        y, q = rule.forward(layer, x)
        ct_in, fragment = rule.reverse(layer, q, ct_out)
        _, vjp = jax.vjp(layer, x)
        return y, ct_in, rule.rebuild(layer, x, ct_in, fragment), vjp(ct_out.astype(y.dtype))[0]

    y, ct_in, rebuilt, plain = sweeps(layer, x)
    assert y.dtype == jnp.bfloat16
    assert ct_in.dtype == rebuilt.dtype == jnp.float32
    scale = float(jnp.linalg.norm(plain.astype(jnp.float32)))
    assert float(jnp.linalg.norm(ct_in - plain)) < 0.1 * scale
    assert float(jnp.linalg.norm(rebuilt - ct_out) / jnp.linalg.norm(ct_out)) < 1e-3


FACTORISATIONS = {
    "lu",
    "geqrf",
    "qr",
    "cholesky",
    "householder_product",
    "triangular_solve",
    "eigh",
    "svd",
    "eig",
}


def linear_algebra(jaxpr: Any) -> list[tuple[Any, ...]]:
    """Every factorisation or triangular solve of a program, with its shapes, calls and loops looked into."""
    found: list[tuple[Any, ...]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in FACTORISATIONS:
            found.append((eqn.primitive.name, *(v.aval.shape for v in eqn.invars)))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += linear_algebra(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize(("name", "option"), RULES)
def test_factorised_once_a_step(name: str, option: str) -> None:
    """Nothing decomposes by singular or eigenvalues in a step, and what is factorised are the weights: the
    same for any number of examples."""
    layer, rule, x, ct_out = case(name, option)

    def passes(layer: Any, x: Any, ct_out: Any) -> list[Any]:
        _, q = rule.forward(layer, x)
        ct_in, fragment = rule.reverse(layer, q, ct_out)
        return [ct_in, rule.rebuild(layer, x, ct_in, fragment)]

    few, many = (linear_algebra(jax.make_jaxpr(passes)(layer, x[:n], ct_out[:n]).jaxpr) for n in (1, 2))
    assert few == many
    assert not {"svd", "eigh", "eig"} & {entry[0] for entry in many}
    factorised = [entry for entry in many if entry[0] in ("lu", "geqrf", "qr", "cholesky")]
    parts = len(layer.layers) if isinstance(layer, ml.Sequential) else 1
    # A null space's basis is needed for the fragment and again for the rebuild; an orthogonal weight is
    # itself made by a solve, in all three operations.
    sweeps = 3 if name.startswith("orthogonal") else 2 if rule.has_fragment else 1
    assert len(factorised) <= parts * sweeps


@pytest.mark.parametrize(("name", "option"), RULES)
def test_gradient(name: str, option: str) -> None:
    """Parameter and input gradients of a full F-R-M pass, residuals packed between the sweeps, equal
    `jax.grad`."""
    layer, rule, x, ct_out = case(name, option)
    with jax.enable_x64(True):
        layer, x, ct_out = wide(layer), x.astype(jnp.float64), ct_out.astype(jnp.float64)

        @jax.jit
        def passes(layer: Any, x: Any) -> Any:
            y, q = rule.forward(layer, x)
            held = residuals.split(q, layer, x, y)
            ct_in, fragment = rule.reverse(layer, residuals.restore(held, layer, x, y), ct_out)
            rebuilt = rule.rebuild(layer, x, ct_in, fragment)
            return rules.parameter_gradient(layer, x, rebuilt), ct_in

        got = passes(layer, x)

        def loss(params: Any, x: Any) -> Any:
            return jnp.sum(trees.with_parameters(layer, params)(x) * ct_out)

        want = jax.jit(jax.grad(loss, argnums=(0, 1)))(trees.parameters(layer), x)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-9 * max(1.0, float(jnp.abs(w).max(initial=0.0))))


@pytest.mark.parametrize("name", ROWS)
def test_store(name: str) -> None:
    """Every store rule gives the gradients of `jax.grad`, and the layer's own first keeps no more than
    `jax.vjp`."""
    layer, x, ct_out = arrays(name)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(trees.with_parameters(layer, params)(x) * ct_out)

    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(trees.parameters(layer), x)
    offered, kept = operations.store_rules(layer, trees.struct(x)), []
    for rule in offered:

        @jax.jit
        def passes(layer: Any, x: Any, rule: rules.StoreRule = rule) -> Any:
            y, q = rule.forward(layer, x)
            held = residuals.split(q, layer, x, y)
            return rule.backward(layer, residuals.restore(held, layer, x, y), ct_out), held

        (grads, ct_in), held = passes(layer, x)
        kept.append(residuals.new_bytes(held))
        for g, w in zip(jax.tree.leaves((grads, ct_in)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, atol=2e-5 * max(1.0, float(jnp.abs(w).max(initial=0.0))))
    assert kept[0] <= kept[-1] or "sequential" in name, dict(zip([r.name for r in offered], kept))


@pytest.mark.parametrize("name", ROWS)
def test_inverse(name: str) -> None:
    """Every inverse gives the input back, and the gradients there; only what says so keeps anything."""
    layer, x, ct_out = arrays(name)
    with jax.enable_x64(True):
        layer, x, ct_out = wide(layer), x.astype(jnp.float64), ct_out.astype(jnp.float64)
        offered = rules.invert_rules(layer, x)
        want = jax.jit(rules.layer_vjp)(layer, x, ct_out) if offered else ()
        for rule in offered:
            if isinstance(rule, rules.Unavailable):
                assert rule.reason
                continue
            reason = rule.check(layer, trees.struct(x))
            if reason is not None:
                continue

            @jax.jit
            def passes(layer: Any, x: Any, rule: rules.InvertRule = rule) -> Any:
                y, kept = rule.forward(layer, x)
                held = residuals.split(kept, layer, x, y)
                kept = residuals.restore(held, layer, None, None)
                return rule.inverse(layer, y, kept), rule.backward(layer, y, kept, ct_out), held

            back, (again, *found), held = passes(layer, x)
            tolerance = 1e-4 if rule.name == "fixed_8" else 1e-8
            np.testing.assert_allclose(back, x, atol=tolerance)
            np.testing.assert_allclose(again, x, atol=tolerance)
            for got, true in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(got, true, atol=1e-7 if rule.name != "fixed_8" else 1e-3)
            assert rule.keeps == bool(residuals.new_bytes(held))
            assert not held.keeps_input
            assert not held.keeps_output


@pytest.mark.parametrize("name", ROWS)
def test_names(name: str) -> None:
    """Names are unique within a layer, rules hash and compare, and unavailable ones say why."""
    layer, x, _ = arrays(name)
    for offered in (rules.vijp_rules(layer, x), rules.store_rules(layer, x), rules.invert_rules(layer, x)):
        assert len({r.name for r in offered}) == len(offered)
        assert len({*offered}) == len(offered)
        assert all(r.reason for r in offered if isinstance(r, rules.Unavailable))
    assert rules.vijp_rules(layer, x) == rules.vijp_rules(layer, trees.struct(x))


def products(jaxpr: Any) -> list[Any]:
    """The products of a jaxpr, those of its inner ones too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(eqn)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(
    ("name", "option"), [one for one in FIRST.values() if "+" not in one[1] and "sequential" not in one[0]]
)
def test_full_precision(name: str, option: str) -> None:
    """Both sweeps multiply float32 operands as they are, on devices too that round them by default.

    Not so a layer's forward pass, which must be the same in every sweep: `Sequential` runs it for what is
    between its parts.
    """
    layer, rule, x, ct_out = case(name, option)
    _, kept = rule.forward(layer, x)
    reverse = jax.make_jaxpr(lambda layer, kept, ct: rule.reverse(layer, kept, ct))(layer, kept, ct_out)
    ct_in, fragment = jax.eval_shape(rule.reverse, layer, kept, ct_out)
    rebuild = jax.make_jaxpr(rule.rebuild)(layer, x, ct_in, fragment)
    for eqn in products(reverse.jaxpr) + products(rebuild.jaxpr):
        assert "HIGHEST" in str(eqn.params["precision"]), eqn


@pytest.mark.parametrize("name", ["dense", "orthogonal", "orthogonal-conv2d", "conv2d-circular-s2"])
def test_inverses_in_full_precision(name: str) -> None:
    layer, x, _ = arrays(name)
    for rule in rules.invert_rules(layer, x):
        if isinstance(rule, rules.InvertRule):
            for eqn in products(jax.make_jaxpr(rule.inverse)(layer, *rule.forward(layer, x)).jaxpr):
                assert "HIGHEST" in str(eqn.params["precision"]), eqn
