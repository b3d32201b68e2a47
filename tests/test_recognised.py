"""Layers recognised in functions that nobody wrote with `mwplan.layers`: rules, gradients, plans, errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from mwplan import layers as ml
from mwplan.common import trees
from mwplan.functions.checking import problem
from mwplan.functions.flat import Gradient, copied_bytes, split
from mwplan.functions.plain import recognised
from mwplan.functions.registry import forget
from mwplan.network import rules
from tests.layer_rows import ROWS, arrays, noise

PyTree = Any
K = jax.random.key

#: Layers whose operations are not recognised, and why.
UNKNOWN = {
    "orthogonal-conv1d": "its product is of frequencies, in the Fourier domain",
    "orthogonal-conv2d": "its product is of frequencies, in the Fourier domain",
    "sequential-thirds": "activations of three arrays",
    "residual": "that its branch is a contraction is not in its operations",
}


@pytest.mark.parametrize("name", ROWS)
def test_every_layer_is_recognised_in_its_own_operations(name: str) -> None:
    """`layer.__call__` in a bare function: a layer with rules of the same kinds."""
    layer, x, _ = arrays(name)
    found, why = recognised(lambda x: layer(x), trees.struct(x))
    if name in UNKNOWN:
        assert found is None
        assert why
        return
    assert found is not None, why
    want, got = (
        {r.has_fragment for r in rules.vijp_rules(one, trees.struct(x)) if isinstance(r, rules.VijpRule)}
        for one in (layer, found)
    )
    assert got >= want or name.startswith(("conv", "dense", "sequential")), (want, got)


NUMBERS = {name.split("-")[0]: name for name in reversed(ROWS) if name not in UNKNOWN}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in NUMBERS.values() else pytest.mark.slow)
        for name in ROWS
        if name not in UNKNOWN
    ],
)
def test_what_is_recognised_is_the_same_in_numbers(name: str) -> None:
    """The same output and vjp, and a vijp that inverts that vjp."""
    layer, x, _ = arrays(name)
    found, why = recognised(lambda x: layer(x), x)
    assert found is not None, why
    assert problem(layer, found, x) is None


def maxmin(x: Any) -> Any:
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], -1)


def norm(x: Any, scale: Any, offset: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + offset


def conv(x: Any, w: Any, layout: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC"), **kw: Any) -> Any:
    return jax.lax.conv_general_dilated(x, w, (1, 1), kw.pop("pad", "SAME"), dimension_numbers=layout, **kw)


def half_coupling(x: Any, which: tuple[int, ...]) -> Any:
    """An additive coupling of one half (its slice written twice), or of both by different branches."""
    a = x[..., :3] + jax.nn.softmax(x[..., 3:] * jnp.tanh(x[..., 3:])) if 0 in which else x[..., :3]
    b = x[..., 3:]
    if 1 in which:
        b = b + jax.nn.gelu((a if 0 in which else x[..., :3]) @ W[:3, :3])
    return jnp.concatenate([a, b], -1)


def swapped_coupling(x: Any, which: int) -> Any:
    """Couplings whose halves change places: after, before, or one sum alone (as the step of a leapfrog)."""
    a, b = jnp.split(x, 2, -1)
    if which == 0:
        a = a + jnp.tanh(b)
        return jnp.concatenate([b + jax.nn.gelu(a @ W[:3, :3]), a], -1)
    if which == 1:
        b = b + jnp.tanh(a)
        return jnp.concatenate([a + jax.nn.gelu(b @ W[:3, :3]), b], -1)
    return jnp.concatenate([b, a + jnp.tanh(b)], -1)


W, B, V = noise(1, (6, 6)) / 3 + jnp.eye(6), noise(2, (6,)), noise(3, (3, 3, 6, 6)) / 20
V = V.at[1, 1].add(jnp.eye(6))
SPELLINGS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "product": (lambda x: x @ W, (4, 6), "Dense"),
    "product and number": (lambda x: x @ W + 1, (4, 6), "Dense"),
    "transposed": (lambda x: jnp.einsum("bc,oc->bo", x, W) + B, (4, 6), "Dense"),
    "heads": (lambda x: jnp.einsum("bc,chk->bhk", x, W.reshape(6, 2, 3)), (4, 6), "Sequential"),
    "heads joined": (lambda x: jnp.einsum("bhk,hko->bo", x, W.reshape(2, 3, 6)), (4, 2, 3), "Sequential"),
    "normalised weight": (lambda x: x @ (W / jnp.linalg.norm(W)), (4, 6), "Dense"),
    "leaky": (lambda x: jax.nn.leaky_relu(x, 0.2), (4, 6), "LeakyReLU"),
    "leaky by maximum": (lambda x: jnp.maximum(x, 0.2 * x), (4, 6), "LeakyReLU"),
    "leaky by factor": (lambda x: x * jnp.where(x < 0, 0.2, 1.0), (4, 6), "LeakyReLU"),
    "leaky by absolute": (lambda x: 0.6 * x + 0.4 * jnp.abs(x), (4, 6), "LeakyReLU"),
    "maxmin": (maxmin, (4, 6), "MaxMin"),
    "sorted pairs": (lambda x: jnp.sort(x.reshape(4, 3, 2), -1).reshape(4, 6), (4, 6), "Sequential"),
    "norm": (lambda x: norm(x, 1 + B**2, B), (4, 6), "LayerNorm"),
    "norm without scale": (lambda x: norm(x, 1.0, 0.0), (4, 6), "LayerNorm"),
    "rms": (lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * B, (4, 6), "RMSNorm"),
    "NCHW": (
        lambda x: conv(x, V.transpose(3, 2, 0, 1), ("NCHW", "OIHW", "NCHW")) + B[:, None, None],
        (2, 6, 5, 5), "Sequential",
    ),
    "padded": (
        lambda x: conv(jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0))), V, pad="VALID"),
        (2, 5, 5, 6), "Conv2D",
    ),
    "wrapped": (
        lambda x: conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"), V, pad="VALID") + B,
        (2, 5, 5, 6), "Conv2D",
    ),
    "mean of windows": (lambda x: x.reshape(2, 2, 2, 2, 2, 6).mean((2, 4)), (2, 4, 4, 6), "AveragePool"),
    "window": (
        lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        (2, 4, 5, 6), "MaxPool",
    ),
    "first half": (lambda x: half_coupling(x, (0,)), (4, 6), "Coupling"),
    "second half": (lambda x: half_coupling(x, (1,)), (4, 6), "Coupling"),
    "halves of two kinds": (lambda x: half_coupling(x, (0, 1)), (4, 6), "Coupling"),
    "swapped": (lambda x: jnp.roll(x, 3, -1), (4, 6), "Swap"),
    "swapped after": (lambda x: swapped_coupling(x, 0), (4, 6), "Sequential"),
    "swapped before": (lambda x: swapped_coupling(x, 1), (4, 6), "Sequential"),
    "swapped halves": (lambda x: swapped_coupling(x, 2), (4, 6), "Sequential"),
    "half tanh": (lambda x: 0.3 * x + 0.7 * jnp.tanh(x), (4, 6), "Smooth"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings(name: str) -> None:
    function, shape, layer = SPELLINGS[name]
    x = noise(5, shape)
    found, why = recognised(function, trees.struct(x))
    assert found is not None, why
    assert type(found).__name__ == layer
    if layer == "Coupling" or "swapped" in name:
        assert problem(function, found, x) is None
        inverses = [one for one in rules.invert_rules(found, x) if isinstance(one, rules.InvertRule)]
        assert inverses
        assert layer != "Coupling" or "CouplingInverse" in {type(one).__name__ for one in inverses}


NOT_LAYERS: dict[str, Any] = {
    "an offset that is no maximum": lambda x: jnp.where(x > 0.1, x, 0.2 * x),
    "a scale of one side": lambda x: jnp.where(x > 0, 2 * x, x),
    "a product of activations": lambda x: x @ x.T,
    "the larger twice": lambda x: jnp.concatenate([jnp.maximum(x[:, :3], x[:, 3:])] * 2, -1),
    "variance of another": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(0) + 1e-3),
    "a half of itself": lambda x: jnp.concatenate([x[:, :3] + jnp.sin(x[:, :3]), x[:, 3:]], -1),
    "a precision": lambda x: jnp.dot(x, W, precision="highest"),
    "a gradient of its own": lambda x: _clipped(x @ W),
}


@jax.custom_vjp
def _clipped(x: Any) -> Any:
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -9e9, 9e9),))


@pytest.mark.parametrize("name", NOT_LAYERS)
def test_what_is_no_layer(name: str) -> None:
    x = trees.struct(noise(5, (4, 6)))
    assert recognised(NOT_LAYERS[name], x)[0] is None
    with pytest.raises(mw.NotSubmersiveError, match="not recognised"):
        mw.vijp(NOT_LAYERS[name], x)


def test_ties_are_found_by_numbers() -> None:
    """At ties the derivative of a maximum is the mean of both branches', which no layer has."""
    assert recognised(maxmin, noise(5, (4, 6)))[0] is not None
    found, why = recognised(maxmin, jnp.zeros((4, 6)))
    assert found is None
    assert "vjp differs" in why
    assert any("vjp differs" in (way.reason or "") for way in mw.explain(maxmin, jnp.zeros((4, 6))).ways)


def lipschitz(depth: int = 3) -> tuple[Any, PyTree, tuple[Any, ...], mw.Chain]:
    """A classifier of orthogonal convolutions and MaxMin: as a function, and as a chain of layers."""
    channels, size = 4, 8
    convs = [ml.Conv2D.init(K(i), channels, channels, padding=1) for i in range(depth)]
    dense = ml.Dense.init(K(99), (size // 2) ** 2 * channels, 10)
    params = {"convs": [(c.weight, c.bias) for c in convs], "w": dense.weight, "b": dense.bias}
    x, y = noise(1, (6, size, size, channels)), jnp.arange(6)

    def cross_entropy(logits: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    def loss(params: PyTree, x: Any) -> Any:
        for w, b in params["convs"]:
            x = maxmin(conv(x, w) + b)
        x = x.reshape(6, size // 2, 2, size // 2, 2, channels).mean((2, 4))
        return cross_entropy(x.reshape(6, -1) @ params["w"] + params["b"])

    pairs = [one for c in convs for one in (c, ml.MaxMin())]
    chain = mw.Chain([*pairs, ml.AveragePool((2, 2)), ml.Flatten(3), dense, cross_entropy])
    return loss, params, (x,), chain


def revnet(depth: int = 3, pairs: bool = True) -> tuple[Any, PyTree, tuple[Any, ...], mw.Chain]:
    """Additive couplings of convolutions, on two arrays or on halves of one."""
    channels, half = 8, 4
    stem = ml.Conv2D.init(K(9), channels, channels)
    convs = [[ml.Conv2D.he(K(2 * i + j), half, half) for j in range(2)] for i in range(depth)]
    params = {
        "stem": (stem.weight, stem.bias), "blocks": [[(c.weight, c.bias) for c in two] for two in convs]
    }  # fmt: skip
    x = noise(1, (4, 6, 6, channels))

    def body(x: Any, w: Any, b: Any) -> Any:
        return conv(jax.nn.relu(x), w) + b

    def loss(params: PyTree, x: Any) -> Any:
        x = conv(x, params["stem"][0]) + params["stem"][1]
        if pairs:
            x1, x2 = jnp.split(x, 2, -1)
            for f, g in params["blocks"]:
                x1 = x1 + body(x2, *f)
                x2 = x2 + body(x1, *g)
            x = jnp.concatenate([x1, x2], -1)
        else:
            for f, g in params["blocks"]:
                x1, x2 = x[..., :half], x[..., half:]
                y1 = x1 + body(x2, *f)
                x = jnp.concatenate([y1, x2 + body(y1, *g)], -1)
        return jnp.mean(x**2)

    blocks = [ml.Coupling(*(ml.Sequential((ml.ReLU(), c)) for c in two)) for two in convs]
    ends = ([ml.Split()], [ml.Concatenate()]) if pairs else ([], [])
    chain = mw.Chain([stem, *ends[0], *blocks, *ends[1], lambda x: jnp.mean(x**2)])
    return loss, params, (x,), chain


NETS = {
    "lipschitz": lipschitz, "revnet": revnet, "revnet of halves": functools.partial(revnet, pairs=False)
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "revnet" else []) for name in NETS]
)
def test_the_plan_of_a_function_is_that_of_its_layers(name: str) -> None:
    """Within 1% of the modelled time at every budget, but for one kernel more in a coupling that keeps masks;
    in as many bytes, but for what the loss, which is no known layer, keeps."""
    loss, params, args, chain = NETS[name]()
    found = mw.cut(loss, params, *args).checked(params, *args)
    assert len(found) == len(chain)
    assert all(piece.layers for piece in found.plan.pieces[:-1]), str(found)
    pieces, x, _ = found.build(params, *args)
    own, other = (
        mw.estimate(one, at, device="laptop", examples=len(args[0]), compiled=False)
        for one, at in ((chain, args[0]), (pieces, x))
    )
    launches = 1100 * sum(isinstance(layer, ml.Coupling) for layer in chain.layers)  # a kernel each, in ns
    least = max(mw.frontier(one).points[0][0] - one.fixed_bytes for one in (own, other))
    for share in (1.0, 1.5, 2.5):
        budgets = [int(least * share) + more + one.fixed_bytes for more, one in ((0, own), (1024, other))]
        plans = [mw.plan(one, budget=budget) for one, budget in zip((own, other), budgets)]
        assert plans[1].time_ns < 1.01 * plans[0].time_ns + launches


def leapfrog(depth: int = 3) -> tuple[Any, PyTree, tuple[Any, ...], None]:
    """Steps in which two arrays change places, an odd number, then such steps of an array's halves."""
    params = {"stem": noise(1, (8, 8)) / 8 + jnp.eye(8), "steps": list(noise(2, (depth + 2, 4, 4)) / 4)}

    def loss(params: PyTree, x: Any) -> Any:
        a, b = jnp.split(x @ params["stem"], 2, -1)
        for w in params["steps"][:depth]:
            a, b = b, a + jnp.tanh(b @ w)
        x = jnp.concatenate([a, b], -1)
        for w in params["steps"][depth:]:
            x = jnp.concatenate([x[:, 4:], x[:, :4] + jnp.tanh(x[:, 4:] @ w)], -1)
        return jnp.mean(x**2)

    return loss, params, (noise(3, (5, 8)),), None


def tied(depth: int = 4) -> tuple[Any, PyTree, tuple[Any, ...], None]:
    """One convolution for all layers."""
    params = [(noise(3, (3, 3, 4, 4)) / 40).at[1, 1].add(jnp.eye(4)), noise(4, (4,))]

    def loss(params: PyTree, x: Any) -> Any:
        for _ in range(depth):
            x = jax.nn.leaky_relu(conv(x, params[0]) + params[1], 0.5)
        return jnp.mean(x**2)

    return loss, params, (noise(5, (4, 9, 9, 4)),), None


def test_large_weights_of_many_layers_cross_the_cuts() -> None:
    """Held by each layer they would have as many gradients."""
    loss, params, args, _ = tied()
    assert "three or more pieces" in mw.cut(loss, params, args[0][:, :3, :3]).reasons()[0]
    found = mw.cut(loss, params, *args)
    more = copied_bytes(found, split(found, params, args))
    assert more == 3 * sum(leaf.nbytes for leaf in params)


WALKS = {**NETS, "leapfrog": leapfrog, "tied": tied}


@pytest.mark.parametrize("name", WALKS)
def test_gradients_of_runs_over_recognised_pieces(name: str) -> None:
    """One moonwalk run, and one inversion, over all recognised pieces: gradients are JAX's, and the report's
    discrepancy is near what the profile predicts."""
    loss, params, args, _ = WALKS[name]()
    found = mw.cut(loss, params, *args)
    count = len(found) - 1
    assert all(piece.layers for piece in found.plan.pieces[:count]), str(found)
    chain, x, _ = found.build(params, *args)
    structs = [x]
    for one in chain.layers:
        structs.append(jax.eval_shape(one, structs[-1]))
    options = []
    for one, at in zip(chain.layers, structs[:-1]):
        usable = [r for r in rules.vijp_rules(one, at) if isinstance(r, rules.VijpRule)]
        options.append(usable[0].name)
    last = mw.Run(kind=mw.RunKind.STORE, start=count, stop=count + 1, options=("vjp",))
    walk = mw.Run(kind=mw.RunKind.MOONWALK, start=0, stop=count, options=tuple(options[:-1]))
    step = mw.jit(Gradient(found, False)(mw.Schedule(runs=(walk, last))))
    (value, report), grads = step(*split(found, params, args))
    want_value, want = jax.value_and_grad(loss)(params, *args)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert float(report.worst) < 1e-4
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


def test_a_function_is_fitted_with_what_is_recognised() -> None:
    """The numbers are looked at first: where they disagree the piece is as it is written, and says so."""
    loss, params, (x,), _ = lipschitz(2)
    found = mw.cut(loss, params, x).checked(params, x)
    assert found.reasons()[:2] == ["Conv2D", "MaxMin"]
    assert "MaxMin" in str(found)
    assert "not recognised: `reduce_max`" in str(found) or "not recognised" in found.reasons()[-1]
    blank = jnp.zeros_like(x)
    wrong = mw.cut(loss, params, blank).checked(params, blank)
    assert "vjp differs" in wrong.reasons()[1]
    fitted = mw.fit_function(loss, params, x, budget="200KiB")
    (_, report), grads = fitted.step(params, x)
    assert float(report.worst) < 1e-4
    want = jax.grad(loss)(params, x)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@ml.layer
class Halved:
    """What the test below teaches: a half of everything."""

    def __call__(self, x: Any) -> Any:
        return x / 2

    def vijp_rules(self, x: Any) -> list[Any]:
        return [Doubled()]


class Doubled(rules.VijpRule):
    name = "double"

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        return 2 * ct_in


class Tripled(Doubled):
    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        return 3 * ct_in


@ml.layer
class Wrong(Halved):
    """A vijp that inverts nothing."""

    def vijp_rules(self, x: Any) -> list[Any]:
        return [Tripled()]


@pytest.mark.parametrize("taught", [Halved(), Wrong()])
def test_one_can_teach_a_layer(taught: Any) -> None:
    """It is believed as far as the numbers agree."""

    @mw.recognises("div")
    def half(y: mw.Operation) -> Any:
        return taught if y.inputs[0].is_input and y.inputs[1].number == 2 else None

    try:
        found, why = recognised(lambda x: jax.nn.leaky_relu(x / 2), noise(1, (3, 4)))
    finally:
        forget(half)
    if isinstance(taught, Wrong):
        assert found is None
        assert "does not invert" in why
    else:
        assert [type(one).__name__ for one in found.layers] == ["Halved", "LeakyReLU"]
    with pytest.raises(mw.ArgumentError, match="names of primitives"):
        mw.recognises()
