"""The operator: it mirrors `jax.vjp`, refuses what it cannot do, and explains; on random shapes and
weights."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mwplan as mw
from mwplan import layers as ml
from mwplan.common.errors import ArgumentError, NotSubmersiveError
from mwplan.common.trees import parameters, with_parameters
from mwplan.network import rules
from mwplan.network.operator import explain, fragment_of, vijp

K = jax.random.key
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)


def noise(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def moved(layer: Any, seed: int, scale: float) -> Any:
    """`layer` with its weights moved by noise of norm about `scale`, and a random bias."""
    fan = int(np.prod(layer.weight.shape[:-1])) + layer.weight.shape[-1]
    return with_parameters(
        layer,
        [p + (scale / fan**0.5 if p.ndim > 1 else 1.0) * noise(seed, p.shape) for p in parameters(layer)],
    )


def check_all(layer: Any, x_shape: tuple[int, ...], seed: int) -> None:
    """Every option but the block recursions, in both precisions, through the operator."""
    offered = rules.vijp_rules(layer, jax.ShapeDtypeStruct(x_shape, jnp.float32))
    names = [r.name for r in offered if isinstance(r, rules.VijpRule) and "block" not in r.name]
    assert names
    for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-10)):
        with jax.enable_x64(dtype == np.float64):
            typed = with_parameters(layer, [p.astype(dtype) for p in parameters(layer)])
            x = noise(seed, x_shape, dtype)
            ct_out = noise(seed + 1, jax.eval_shape(typed, x).shape, dtype)

            @jax.jit
            def rebuilt(layer: Any, x: Any, ct_out: Any) -> list[Any]:
                _, vjp_fn = jax.vjp(layer, x)
                (ct_in,) = vjp_fn(ct_out)
                return [
                    vijp(layer, x, name)[1](ct_in, fragment_of(layer, x, ct_out, name)) - ct_out
                    for name in names
                ]

            size = float(jnp.linalg.norm(ct_out))
            for name, error in zip(names, rebuilt(typed, x, ct_out)):
                assert float(jnp.linalg.norm(error)) <= tolerance * size, name


@EXAMPLES
@given(st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 99))
def test_dense(inner: int, outer: int, batch: list[int], seed: int) -> None:
    check_all(moved(ml.Dense.init(K(seed), inner, outer).with_basis(), seed, 0.3), (*batch, inner), seed)


@EXAMPLES
@given(st.data())
def test_conv1d(data: Any) -> None:
    stride, dilation = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)]))
    kernel = data.draw(st.integers(1, 5))
    groups = data.draw(st.integers(1, 2))
    inner = groups * data.draw(st.integers(1, 3))
    phases = min(stride, kernel) if dilation == 1 else 1
    outer = groups * data.draw(st.integers(1, phases * inner // groups))
    padding = data.draw(st.sampled_from(["SAME", "VALID", 1, ((2, 0),)]))
    size = dilation * (kernel - 1) + data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 99))
    layer = ml.Conv1D.init(
        K(seed), inner, outer, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    check_all(moved(layer, seed, 0.2), (*data.draw(st.sampled_from([(), (2,), (2, 3)])), size, inner), seed)


@EXAMPLES
@given(st.data())
def test_conv2d(data: Any) -> None:
    stride = data.draw(st.integers(1, 2))
    kernel = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)))
    inner = data.draw(st.integers(1, 3))
    outer = data.draw(st.integers(1, min(stride, kernel[0]) * min(stride, kernel[1]) * inner))
    padding = data.draw(st.sampled_from(["SAME", "VALID", 1, "CIRCULAR"]))
    # XLA:CPU (jaxlib 0.10.2) aborts in compiling jax.vjp of a strided convolution with fewer outputs than
    # taps along an axis.
    size = [stride * (k + data.draw(st.integers(1, 4))) for k in kernel]
    seed = data.draw(st.integers(0, 99))
    layer = ml.Conv2D.init(K(seed), inner, outer, kernel, stride=stride, padding=padding)
    check_all(moved(layer, seed, 0.2), (2, *size, inner), seed)


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_elementwise_and_pooling(pairs: int, rows: int, seed: int) -> None:
    shape = (rows, 5, 4, 2 * pairs)
    stages = [ml.MaxMin(), ml.LeakyReLU(0.4), ml.MaxPool((2, 2)), ml.AveragePool((2, 1)), ml.Flatten(3)]
    check_all(ml.Sequential(tuple(stages)), shape, seed)
    check_all(ml.LayerNorm.init(None, 2 * pairs + 1), (rows, 2 * pairs + 1), seed)


def test_mirrors_vjp() -> None:
    """The default option needs no fragment where there is one that needs none; the output is the layer's."""
    layer = ml.Conv2D.init(K(0), 4, 4, stride=2)
    x = noise(1, (2, 8, 8, 4))
    y, vijp_fn = vijp(layer, x)
    want, vjp_fn = jax.vjp(layer, x)
    np.testing.assert_array_equal(y, want)
    ct_out = noise(2, y.shape)
    np.testing.assert_allclose(vijp_fn(*vjp_fn(ct_out)), ct_out, atol=1e-5)
    assert fragment_of(layer, x, ct_out) == ()
    layer = with_parameters(layer, [p.astype(jnp.bfloat16) for p in parameters(layer)])
    half, vijp_fn = vijp(layer, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert vijp_fn(jnp.zeros(x.shape, jnp.bfloat16)).dtype == jnp.float32


def test_whole() -> None:
    """Any function has the whole fragment."""
    x, ct = noise(0, (3,)), noise(1, (3,))
    _, vijp_fn = vijp(jnp.sin, x, "whole")
    np.testing.assert_array_equal(vijp_fn(jnp.zeros(3), fragment_of(jnp.sin, x, ct, "whole")), ct)


SINGULAR = np.diag([1.0, 2.0, 0.0, 1.0]).astype(np.float32)
ILL = np.diag([1.0, 2.0, 1e-7, 1.0]).astype(np.float32)
BROKEN = np.diag([1.0, np.nan, 1.0, 1.0]).astype(np.float32)


@pytest.mark.parametrize(
    ("matrix", "match"),
    [(SINGULAR, "singular"), (ILL, r"singular value \d\.\de-0[78]"), (BROKEN, "non-finite")],
)
@pytest.mark.parametrize("kind", ["dense", "conv1d", "conv2d", "pointwise", "stride", "sequential", "block"])
def test_bad_weights(matrix: np.ndarray, match: str, kind: str) -> None:
    """Singular, ill-conditioned and non-finite weights are refused, by every rule, and `explain` says so."""
    m = jnp.asarray(matrix)
    x = noise(0, (2, 8, 4)) if kind != "conv2d" else noise(0, (2, 5, 6, 4))
    layer: Any = {
        "dense": lambda: ml.Dense(m),
        "conv1d": lambda: ml.Conv1D(jnp.stack([0 * m, m, 0 * m])),
        "conv2d": lambda: ml.Conv2D(m[None, None] * jnp.ones((3, 1, 1, 1)) / 3, stride=(1, 1)),
        "pointwise": lambda: ml.Conv1D(m[None]),
        "stride": lambda: ml.Conv1D(jnp.stack([0 * m, m, 0 * m]), stride=(2,)),
        "sequential": lambda: ml.Sequential((ml.MaxMin(), ml.Dense(m))),
        "block": lambda: ml.Conv1D(jnp.stack([m, 0 * m, 0 * m])),
    }[kind]()
    option = "block_4" if kind == "block" else None
    with pytest.raises(NotSubmersiveError, match=match):
        vijp(layer, x, option)
    told = explain(layer, x)
    assert any(way.reason and re.search(match, way.reason) for way in told.ways)
    usable = [w.option for w in told.ways if w.available and w.strategy in ("VIJP", "FRAGMENT")]
    assert all(name.startswith("whole") for name in usable)


def test_layers_without_a_vijp() -> None:
    x = noise(0, (2, 4))
    with pytest.raises(NotSubmersiveError, match="depends on the data"):
        vijp(ml.ReLU(), x)
    with pytest.raises(NotSubmersiveError, match=r"slope=0\.0"):
        vijp(ml.LeakyReLU(0.0), x)
    with pytest.raises(NotSubmersiveError, match="no vijp rule"):
        vijp(jnp.sin, x)
    with pytest.raises(NotSubmersiveError, match="comes down to"):
        vijp(ml.Smooth("gelu"), x)
    with pytest.raises(NotSubmersiveError, match="do not determine 6 output"):
        vijp(ml.Dense.init(K(0), 4, 6), x, "exact")
    with pytest.raises(NotSubmersiveError, match="no basis"):
        vijp(ml.Dense.init(K(0), 4, 4), x, "cokernel_10")
    with pytest.raises(NotSubmersiveError, match="`scale`"):
        vijp(ml.LayerNorm(jnp.zeros(4), jnp.zeros(4)), x)
    with pytest.raises(ArgumentError, match="none of the options of Dense: exact"):
        vijp(ml.Dense.init(K(0), 4, 4), x, "nonsense")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ml.Dense.init(K(0), 4, 4)(jnp.ones((2, 3))), "takes 4 features"),
        (lambda: ml.Conv2D.init(K(0), 4, 4)(jnp.ones((2, 3, 3))), "4 channels"),
        (lambda: ml.Conv1D.init(K(0), 4, 4, 5, padding="VALID")(jnp.ones((3, 4))), "too small"),
        (lambda: ml.MaxMin()(jnp.ones((2, 3))), "even number"),
        (lambda: ml.GroupSort(4)(jnp.ones((2, 6))), "multiple of 4"),
        (lambda: ml.MaxPool((2, 2))(jnp.ones((3, 1, 2))), "pooling"),
        (lambda: ml.Reshape((2, 3), (5,))(jnp.ones((2, 3))), "differ in size"),
        (lambda: ml.Permute((0, 2))(jnp.ones((2, 3))), "permutation"),
        (lambda: ml.SpaceToDepth((2, 2))(jnp.ones((3, 4, 1))), "multiples"),
        (lambda: ml.Coupling(ml.ReLU(), ml.ReLU())(jnp.ones((2, 3))), "even number"),
        (lambda: ml.Coupling(ml.ReLU(), ml.ReLU())((jnp.ones(2),) * 3), "3 parts"),
        (lambda: ml.Coupling(ml.ReLU(), ml.ReLU())([jnp.ones(2)] * 2), "pair"),
        (lambda: ml.Split(4)(jnp.ones((2, 6))), "multiple of 4"),
        (lambda: ml.Concatenate()(jnp.ones((2, 6))), "tuple of arrays"),
        (lambda: ml.OrthogonalConv.init(K(0), 2, 2)(jnp.ones((2, 2, 2))), "smaller than the kernel"),
        (lambda: ml.ParaunitaryConv.init(K(0), 4, 4, 5)(jnp.ones((2, 6, 3, 4))), "smaller than the kernel"),
        (lambda: ml.ParaunitaryConv.init(K(0), 4, 4)(jnp.ones((2, 6, 6, 3))), "4 channels"),
        (lambda: ml.ParaunitaryConv.init(K(0), 4, 6), "outer <= inner"),
        (lambda: ml.ParaunitaryConv.init(K(0), 4, 4, 1), "at least 2"),
        (lambda: ml.OrthogonalDense.init(K(0), 2, 2, method="svd"), "none of"),
        (lambda: ml.Smooth("relu"), "none of"),
        (lambda: ml.Smooth("gelu", -1.0), "from 0 to 1"),
        (lambda: ml.Conv1D.init(K(0), 4, 4, groups=3), "must divide"),
        (lambda: ml.Conv1D.init(K(0), 4, 4, stride=0), "positive"),
        (lambda: ml.Conv1D.init(K(0), 4, 4, padding=-1), "negative"),
        (lambda: ml.Conv1D.init(K(0), 4, 4, padding="FULL")(jnp.ones((5, 4))), "SAME, VALID, CIRCULAR"),
        (lambda: ml.Dense.init(K(0), 4, 4).with_basis(0.0), "above 0"),
        (lambda: vijp(ml.Dense.init(K(0), 4, 4), jnp.ones((2, 4)))[1](jnp.ones((2, 5))), "shape"),
        (
            lambda: vijp(ml.Dense.init(K(0), 4, 4), jnp.ones((2, 4)))[1](jnp.ones((2, 4)), jnp.ones(3)),
            "fragment",
        ),
        (lambda: vijp(ml.Dense.init(K(0), 3, 4), jnp.ones((2, 3)))[1](jnp.ones((2, 3))), "fragment"),
        (lambda: fragment_of(ml.MaxMin(), jnp.ones((2, 4)), jnp.ones((2, 3))), "ct_out"),
    ],
)
def test_wrong_arguments(call: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        call()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ml.Dense.init(K(0), 4, 3), (0, 4)),
        (ml.Dense.he(K(0), 4, 4), (0, 4)),
        (ml.Conv1D.init(K(0), 4, 4), (0, 6, 4)),
        (ml.Conv2D.init(K(0), 4, 4, stride=2), (0, 6, 6, 4)),
        (ml.OrthogonalConv.init(K(0), 4, 4), (0, 6, 6, 4)),
        (ml.ParaunitaryConv.init(K(0), 4, 4), (0, 6, 6, 4)),
        (ml.MaxMin(), (0, 4)),
        (ml.MaxPool((2, 2)), (0, 4, 4, 2)),
        (ml.LayerNorm.init(None, 4), (0, 4)),
    ],
)
def test_empty_batch(layer: Any, shape: tuple[int, ...]) -> None:
    """A batch of no examples gives cotangents of no examples."""
    x = jnp.zeros(shape)
    for rule in rules.vijp_rules(layer, x):
        if isinstance(rule, rules.VijpRule) and rule.check(layer, x) is None:
            y, vijp_fn = vijp(layer, x, rule.name)
            assert vijp_fn(x, fragment_of(layer, x, y, rule.name)).shape == y.shape


def test_explain() -> None:
    told = explain(ml.MaxMin(), jax.ShapeDtypeStruct((8, 16), jnp.float32))
    ways = {(w.strategy, w.option): w for w in told.ways}
    assert ways["VIJP", "undo"].residual_bytes == 8
    assert ways["VIJP", "undo"].fragment_bytes == 0
    assert ways["FRAGMENT", "whole"].fragment_bytes == told.output_bytes == 512
    assert ways["INVERT", "undo"].available
    assert ways["INVERT", "undo"].residual_bytes == 8
    text = str(told)
    for word in ("MaxMin", "undo", "whole", "RECOMPUTE", "512"):
        assert word in text
    assert "not available" in str(explain(ml.ReLU(), jnp.ones((8, 16))))
    assert "no vijp rule" in str(explain(jnp.sin, jnp.ones(3)))
    assert explain(jnp.sin, jnp.ones(3)).layer == "sin"
    assert "halo" in str(explain(ml.Conv1D.init(K(0), 2, 2), jnp.ones((4, 2))))


def test_layers_that_hold_an_array_twice() -> None:
    """Both branches of a coupling are one object: explained, and differentiated without `jit`, where JAX sees
    that they are."""
    branch = ml.Sequential((ml.Dense.init(K(0), 4, 4), ml.MaxMin()))
    tied, x = ml.Coupling(branch, branch), noise(0, (3, 8))
    assert {w.strategy for w in explain(tied, x).ways if w.available} >= {
        "STORE",
        "VIJP",
        "FRAGMENT",
        "INVERT",
    }
    whole = mw.Run(kind=mw.RunKind.MOONWALK, start=0, stop=1, options=("whole",))
    schedule = mw.Schedule(runs=(whole,))
    wanted = jax.grad(lambda layer: jnp.sum(layer(x) ** 2))(tied)
    got = jax.grad(lambda layer: jnp.sum(mw.apply(schedule, mw.Chain([layer]), x) ** 2))(tied)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_basis_has_no_gradient() -> None:
    """Bases are leaves of the layer that no gradient reaches, and refreshing keeps their shape."""
    x = noise(0, (3, 8, 4))
    for one in ml.with_bases([ml.Conv1D.he(K(0), 4, 4), ml.LeakyReLU(0.5), ml.Dense.he(K(1), 4, 6)], x):
        if not parameters(one):
            continue
        assert one.basis is not None
        grads = jax.grad(lambda layer: jnp.sum(layer(x) ** 2))(one)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads.basis))
        again = ml.refresh([one])[0]
        assert jax.tree.structure(again) == jax.tree.structure(one)
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, one)
