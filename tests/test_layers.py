"""Every layer and option against `jax.vjp`: one table, crossed with every check. A new layer is a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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

K = jax.random.key


def noise(seed: int, shape: tuple[int, ...]) -> Any:
    """White noise in float32, by NumPy: `jax.random` compiles anew for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def jiggle(layer: Any, scale: float = 0.02, seed: int = 9) -> Any:
    """`layer` with its parameters moved a little: well-conditioned, not special. Bases stay."""
    params = trees.parameters(layer)
    return trees.with_parameters(layer, [p + scale * noise(seed + i, p.shape) for i, p in enumerate(params)])


def causal(layer: Any) -> Any:
    """`layer` with its strongest tap first, as the block recursion wants it."""
    return dataclasses.replace(layer, weight=jnp.roll(layer.weight, -((layer.weight.shape[0] - 1) // 2), 0))


@dataclass(frozen=True)
class Row:
    """A layer to make, the trailing shape of its input, and the option names it must have."""

    make: Callable[[], Any]
    shape: tuple[int, ...]
    options: tuple[str, ...]

    def arrays(self) -> tuple[Any, Any, Any]:
        """The layer, an input with two batch axes, and a cotangent of its output."""
        layer = self.make()
        x = noise(2, (2, 3, *self.shape))
        return layer, x, noise(3, jax.eval_shape(layer, x).shape)


def branch(seed: int, size: int, scale: float = 1.0) -> Any:
    first = ml.Dense(scale * noise(seed, (size, size)), jnp.zeros(size))
    return ml.Sequential((first, ml.Smooth("tanh"), ml.Dense(noise(seed + 9, (size, size)), None)))


def he_conv(cls: Any, shape: tuple[int, ...], *args: Any, **kw: Any) -> Any:
    return cls.he(K(1), *args, **kw).with_basis(jax.ShapeDtypeStruct(shape, jnp.float32))


ROWS = {
    "dense": Row(lambda: jiggle(ml.Dense.init(K(1), 6, 6)), (6,), ("exact", "exact+refine")),
    "dense-tall": Row(lambda: jiggle(ml.Dense.init(K(1), 7, 4)), (7,), ("exact", "exact+refine")),
    "dense-wide": Row(lambda: jiggle(ml.Dense.init(K(1), 4, 7)), (4,), ("null",)),
    "dense-he": Row(lambda: ml.Dense.he(K(1), 16, 16), (16,), ("cokernel_2", "cokernel_10", "cokernel_50")),
    "dense-he-wide": Row(lambda: ml.Dense.he(K(1), 8, 11), (8,), ("null", "cokernel_30", "cokernel_50")),
    "conv1d-same": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4)), (9, 4), ("halo", "halo+refine")),
    "conv1d-valid": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 3, 4, padding="VALID")), (9, 4), ("spectral",)
    ),
    "conv1d-circular": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, padding="CIRCULAR")), (7, 4), ("spectral",)
    ),
    "conv1d-dilated": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, dilation=2)), (11, 4), ("halo",)),
    "conv1d-groups": Row(lambda: jiggle(ml.Conv1D.init(K(1), 6, 4, groups=2)), (8, 6), ("halo",)),
    "conv1d-explicit": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, padding=((2, 0),))), (8, 4), ("halo",)),
    "conv1d-s2-double": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 3, 6, 4, stride=2, padding=1)), (10, 3), ("halo",)
    ),
    "conv1d-s3-dilated": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, 3, stride=3, dilation=2)), (13, 4), ("halo",)
    ),
    "conv1d-he": Row(lambda: he_conv(ml.Conv1D, (12, 6), 6, 6), (12, 6), ("cokernel_10", "cokernel_50")),
    "conv1d-he-wide": Row(lambda: he_conv(ml.Conv1D, (12, 4), 4, 7), (12, 4), ("cokernel_50",)),
    "block-same": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4))), (9, 4), ("block_4", "block_8", "block_16")
    ),
    "block-k4": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 3, 4, padding="VALID"))),
        (12, 4),
        ("block_4", "block_8"),
    ),
    "block-circular": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, padding="CIRCULAR"))), (10, 4), ("block_4",)
    ),
    "block-dilated": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, dilation=2))), (11, 4), ("block_8",)
    ),
    "block-groups": Row(lambda: causal(jiggle(ml.Conv1D.init(K(1), 6, 4, groups=2))), (8, 6), ("block_4",)),
    "block-explicit": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, padding=((2, 0),)))), (8, 4), ("block_4",)
    ),
    "conv2d-same": Row(lambda: jiggle(ml.Conv2D.init(K(1), 3, 3)), (6, 5, 3), ("halo",)),
    "conv2d-1x1": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 4, 3, 1)),
        (3, 4, 4),
        ("pointwise", "pointwise+refine", "spectral"),
    ),
    "conv2d-s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 3, 3, stride=2, padding=1)), (7, 6, 3), ("pointwise", "halo")
    ),
    "conv2d-s2-double": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 3, 6, stride=2, padding=1)), (6, 8, 3), ("halo",)
    ),
    "conv2d-k4s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 5, 4, stride=2, padding="VALID")), (9, 8, 2), ("spectral",)
    ),
    "conv2d-mixed": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 2, (3, 5), stride=(1, 3), padding=((1, 2), (0, 2)))),
        (6, 9, 2),
        ("halo",),
    ),
    "conv2d-circular-s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 4, 3, stride=2, padding="CIRCULAR", groups=2)),
        (6, 8, 2),
        ("spectral",),
    ),
    "conv2d-he": Row(lambda: he_conv(ml.Conv2D, (6, 6, 4), 4, 4), (6, 6, 4), ("cokernel_20",)),
    "conv2d-he-groups": Row(
        lambda: he_conv(ml.Conv2D, (6, 4, 4), 4, 4, groups=2, padding="CIRCULAR"),
        (6, 4, 4),
        ("cokernel_30",),
    ),
    "leaky": Row(lambda: ml.LeakyReLU(0.3), (5,), ("divide",)),
    "maxmin": Row(lambda: ml.MaxMin(), (3, 6), ("undo",)),
    "groupsort": Row(lambda: ml.GroupSort(3), (2, 6), ("undo", "whole_bits")),
    "groupsort-16": Row(lambda: ml.GroupSort(16), (32,), ("undo",)),
    "relu": Row(lambda: ml.ReLU(), (5,), ("whole", "whole_bits")),
    "average": Row(lambda: ml.AveragePool((2, 3)), (5, 6, 2), ("sum",)),
    "max": Row(lambda: ml.MaxPool((2, 2)), (5, 6, 3), ("read", "whole_index")),
    "max-1d": Row(lambda: ml.MaxPool((5,)), (11, 2), ("read",)),
    "flatten": Row(lambda: ml.Flatten(2), (3, 4), ("move",)),
    "reshape": Row(lambda: ml.Reshape((3, 4), (2, 6)), (3, 4), ("move",)),
    "permute": Row(lambda: ml.Permute((2, 0, 1)), (2, 3, 4), ("move",)),
    "space-to-depth": Row(lambda: ml.SpaceToDepth((2, 3)), (4, 6, 2), ("move",)),
    "pad-channels": Row(lambda: ml.PadChannels(2), (3, 4), ("padded",)),
    "orthogonal": Row(lambda: ml.OrthogonalDense.init(K(1), 6, 6), (6,), ("jvp",)),
    "orthogonal-tall": Row(lambda: ml.OrthogonalDense.init(K(1), 6, 4, method="expm"), (6,), ("jvp",)),
    "orthogonal-wide": Row(
        lambda: ml.OrthogonalDense.init(K(1), 4, 6, method="householder"), (4,), ("null",)
    ),
    "orthogonal-conv1d": Row(lambda: ml.OrthogonalConv.init(K(1), 4, 3, dims=1), (7, 4), ("jvp",)),
    "paraunitary-1d": Row(lambda: ml.ParaunitaryConv.init(K(1), 4, 3, 4, dims=1), (7, 4), ("jvp",)),
    "paraunitary-2d": Row(lambda: ml.ParaunitaryConv.init(K(1), 4, 4), (6, 5, 4), ("jvp", "whole_free")),
    "orthogonal-conv2d": Row(lambda: ml.OrthogonalConv.init(K(1), 4, 4), (6, 5, 4), ("jvp", "whole_free")),
    "smooth-gelu": Row(lambda: ml.Smooth("gelu", 0.3), (5,), ("divide", "whole_input")),
    "smooth-softplus": Row(lambda: ml.Smooth("softplus", 0.2), (5,), ("divide", "whole_input")),
    "gelu": Row(lambda: ml.Smooth("gelu"), (5,), ("whole_input",)),
    "tanh": Row(lambda: ml.Smooth("tanh"), (5,), ("whole_input",)),
    "layernorm": Row(lambda: jiggle(ml.LayerNorm.init(None, 7), 0.2), (7,), ("moments",)),
    "rmsnorm": Row(lambda: jiggle(ml.RMSNorm.init(None, 7), 0.2), (7,), ("moments", "whole_input")),
    "coupling": Row(
        lambda: ml.Coupling(branch(1, 4), branch(2, 4)), (8,), ("subtract", "subtract_vjps", "whole_input")
    ),
    "coupling-relu": Row(
        lambda: ml.Coupling(
            ml.Sequential((ml.ReLU(), branch(1, 4))),
            ml.Sequential((branch(2, 4), ml.LeakyReLU(0.2), ml.MaxMin(), branch(3, 4))),
        ),
        (8,),
        ("subtract",),
    ),
    "sequential-pairs": Row(
        lambda: ml.Sequential((ml.Split(), ml.Coupling(branch(1, 4), branch(2, 4)), ml.Concatenate())),
        (8,),
        ("parts",),
    ),
    "sequential-thirds": Row(lambda: ml.Sequential((ml.Split(3), ml.Concatenate())), (4, 6), ("parts",)),
    "residual": Row(lambda: ml.Residual(branch(1, 4, 0.03)), (4,), ("fixed_16", "fixed_32", "whole_input")),
    "sequential": Row(
        lambda: ml.Sequential(
            (jiggle(ml.Dense.init(K(1), 6, 6)), ml.LeakyReLU(0.5), ml.Dense.he(K(2), 6, 6), ml.ReLU())
        ),
        (6,),
        ("parts", "parts.cokernel_50"),
    ),
    "sequential-conv": Row(
        lambda: ml.Sequential(
            (jiggle(ml.Conv2D.init(K(1), 4, 4)), ml.MaxMin(), ml.MaxPool((2, 2)), ml.Flatten(3))
        ),
        (5, 4, 4),
        ("parts",),
    ),
}
OPTIONS = [(name, option) for name, row in ROWS.items() for option in row.options]
# One option of each family of layers and rule by default; the others of each row with the slow tests.
FIRST = {(name.split("-")[0], option.split("_")[0]): (name, option) for name, option in reversed(OPTIONS)}
RULES = [
    pytest.param(*one, marks=() if one in FIRST.values() else pytest.mark.slow)
    for one in {(n, o.split("_")[0]): (n, o) for n, o in reversed(OPTIONS) if "+" not in o}.values()
]


def find(layer: Any, x: Any, option: str) -> rules.VijpRule:
    for rule in rules.vijp_rules(layer, x):
        if rule.name == option:
            assert isinstance(rule, rules.VijpRule), rule
            return rule
    raise AssertionError(f"no option {option}: {rules.vijp_rules(layer, x)}")


@cache
def arrays(name: str) -> tuple[Any, Any, Any]:
    return ROWS[name].arrays()


def case(name: str, option: str) -> tuple[Any, rules.VijpRule, Any, Any]:
    layer, x, ct_out = arrays(name)
    return layer, find(layer, x, option), x, ct_out


def wide(layer: Any) -> Any:
    return trees.with_parameters(layer, [p.astype(jnp.float64) for p in trees.parameters(layer)])


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


# Numbers of the fragment for one example, by hand: 6 examples in a case, 4 bytes a number.
FRAGMENTS = {
    "dense-wide": {"null": 3},
    "dense-he": {"cokernel_2": 1, "cokernel_10": 2, "cokernel_30": 5, "cokernel_50": 8},
    "conv1d-same": {"halo": 2 * 4},
    "conv1d-dilated": {"halo": 4 * 4},
    "conv1d-explicit": {"halo": 2 * 4},
    "conv2d-same": {"halo": (8 * 7 - 6 * 5) * 3},
    "conv2d-s2": {"halo": (9 * 7 - 7 * 6) * 3},  # the last padded column is read by no output
    "conv1d-he": {
        "cokernel_50": 2 * 6 + 2 * 27
    },  # halo; 9 frequencies of a grid of 16, 54 directions, half of them: 27, complex
    "block-same": {"block_4": 5 * 4, "block_8": 3 * 4},
    "block-dilated": {"block_8": 7 * 4},
    "block-k4": {"block_4": 7 * 3},
    "layernorm": {"moments": 2},
    "rmsnorm": {"moments": 1},
    "pad-channels": {"padded": 3 * 2},
    "orthogonal-wide": {"null": 2},
    "relu": {"whole": 5},
}


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
    assert ways == {"products", "nothing", "vjp"}


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
