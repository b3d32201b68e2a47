"""Any function: cut into pieces, whose chain computes the same; fitted, whose gradient is JAX's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from mwplan.functions.policy import Policy
from tests import functions

PyTree = Any


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def assert_gradient(
    loss: Any, params: PyTree, *args: Any, has_aux: bool = False, most: int = 128, loops: bool = False
) -> mw.Cut:
    """The chain of pieces gives the value and the gradient that JAX gives."""
    found = mw.cut(loss, params, *args, has_aux=has_aux, most=most)
    found = found.looped() if loops else found

    @jax.jit
    def step(params: PyTree, *args: Any) -> tuple[Any, PyTree]:
        chain, x, back = found.build(params, *args)
        y, pull = jax.vjp(lambda chain, x: chain(x), chain, x)
        return y, back(*pull((jnp.ones_like(y[0]), *(_zero(leaf) for leaf in y[1:]))))

    y, got = step(params, *args)
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
    want = jax.jit(jax.grad(loss, has_aux=has_aux, allow_int=True))(params, *args)
    want = want[0] if has_aux else want
    want = jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        # Some are zero but for rounding: attention does not depend on its keys' biases.
        zero = 1e-14 * largest + 1e-300
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * float(jnp.abs(b).max()) + zero, err_msg=name)


def assert_fits(
    loss: Any, params: PyTree, *args: Any, has_aux: bool = False, measured: bool = False
) -> mw.FittedFunction:
    """Fitted to a budget between the least and the most that a plan would use, the compiled step keeps it,
    and gives the function's value and JAX's gradient. `measured`, or from an estimated profile, which takes
    less time."""
    found = mw.cut(loss, params, *args, has_aux=has_aux)
    chain, x, _ = found.build(params, *args)
    if measured:
        profile = mw.profile(chain, x, repeats=1)
    else:
        profile = mw.estimate(*jax.eval_shape(lambda *both: both, chain, x), device="laptop")
    points = mw.frontier(profile).points
    temporary = points[0][0] + (points[-1][0] - points[0][0]) * 3 // 5 - profile.fixed_bytes
    fitted = mw.fit_function(
        loss,
        params,
        *args,
        has_aux=has_aux,
        profile=profile,
        budget=temporary + fixed_bytes(loss, params, *args),
    )
    assert fitted.temporary_bytes <= temporary
    (value, report), grads = fitted.step(params, *args)
    want = loss(params, *args)
    assert jax.tree.structure(value) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        assert a.dtype == b.dtype
    assert float(report.worst) < 1e-4
    assert_same_gradient(grads, loss, params, *args, has_aux=has_aux)
    return fitted


def fixed_bytes(loss: Any, params: PyTree, *args: Any) -> int:
    """Bytes of arguments and results of the gradient step."""
    arrays = [leaf for leaf in jax.tree.leaves((params, args)) if hasattr(leaf, "dtype")]
    floats = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype") and leaf.dtype.kind == "f"]
    results = jax.tree.leaves(jax.eval_shape(lambda: loss(params, *args)))
    return sum(leaf.nbytes for leaf in (*arrays, *floats)) + sum(r.size * r.dtype.itemsize for r in results)


def test_mlp_is_cut_between_its_layers_and_fits() -> None:
    params, x, y = functions.mlp(depth=8)
    found = assert_gradient(functions.mlp_loss, params, x, y)
    assert len(found) == 4
    assert all(len(piece.params) == 4 for piece in found.plan.pieces)
    assert len({piece.program for piece in found.plan.pieces[:-1]}) == 1
    fitted = assert_fits(functions.mlp_loss, params, x, y, measured=True)
    with pytest.raises(mw.ArgumentError, match=r"args\[0\].*compiled for"):
        fitted.step(params, x[:2], y)
    policy = fitted.policy()
    assert_same_gradient(jax.jit(jax.grad(policy))(params, x, y), functions.mlp_loss, params, x, y)
    assert len(str(policy).splitlines()) >= len(fitted.schedule.runs)
    assert policy.temporary_bytes(params, x, y) > 0


def test_a_plan_in_the_words_of_checkpoint() -> None:
    params, x, y = functions.mlp(depth=16, batch=512)
    found = mw.cut(functions.mlp_loss, params, x, y)
    store = [mw.Run(kind=mw.RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(len(found))]
    inner = mw.Run(kind=mw.RunKind.RECOMPUTE, start=1, stop=3, inner=tuple(store[1:3]))
    outer = mw.Run(kind=mw.RunKind.RECOMPUTE, start=0, stop=4, inner=(store[0], inner, store[3]))
    lean = mw.Run(kind=mw.RunKind.STORE, start=4, stop=5, options=("products",))
    rebuilt = mw.Run(kind=mw.RunKind.MOONWALK, start=5, stop=6, options=("whole",))

    def policy(*runs: mw.Run) -> Policy:
        schedule = mw.Schedule(runs=runs)
        return Policy(cut=found, schedule=schedule, has_aux=False)

    saved = policy(*store)
    mixed = policy(outer, lean, rebuilt, *store[6:])
    for one in (saved, mixed):
        assert_same_gradient(jax.jit(jax.grad(one))(params, x, y), functions.mlp_loss, params, x, y)
    assert mixed.temporary_bytes(params, x, y) < saved.temporary_bytes(params, x, y)
    assert [run.kind for run in mixed.unsaid] == [mw.RunKind.MOONWALK]
    assert "products saved" in str(mixed)


def test_transformer_is_cut_between_its_sublayers_and_fits() -> None:
    params, batch = functions.transformer(depth=2)
    found = assert_gradient(functions.transformer_loss, params, batch)
    kinds = [piece.program for piece in found.plan.pieces]
    assert len(kinds) == 2 * 2 + 3
    assert kinds[1] == kinds[3]
    assert kinds[2] == kinds[4]
    assert "blocks" in str(found)
    assert_fits(functions.transformer_loss, params, batch)


def scalar(x: Any) -> Any:
    return jnp.sum(jnp.sin(x))


def test_scan_over_stacked_layers_is_a_stack() -> None:
    params, batch = functions.transformer(depth=4)
    found = assert_gradient(functions.scanned_loss, functions.scanned(params), batch)
    chain, _, _ = found.build(functions.scanned(params), batch)
    assert [isinstance(part, mw.Stack) for part in chain.parts] == [False, True, False, False]
    assert chain.parts[1].depth == 4
    assert len(found) == len(chain) == 11


def test_pieces_that_repeat_are_looped() -> None:
    params, batch = functions.transformer(depth=5)
    found = assert_gradient(functions.transformer_loss, params, batch, loops=True)
    chain, _, _ = found.build(params, batch)
    assert [len(part) for part in chain.parts if isinstance(part, mw.Stack)] == [10]
    assert len(chain) == len(found) == 13
    copied = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]))
    assert found.plan.copied_bytes(found.flow.traced.avals) == copied


def _scans(params: PyTree, x: Any, keys: Any, memory: Any) -> tuple[Any, Any]:
    """Loops of all kinds: weights in low precision, keys and data by row, what is read in every turn,
    counters, a carry that nothing reads and one that is stopped; and loops that stay whole."""
    weights = jax.tree.map(lambda w: (w * 0.5).astype(jnp.float32), params["w"])
    memory = jnp.tanh(memory @ params["m"])

    def body(carry: Any, row: Any) -> tuple[Any, Any]:
        x, i, _, idle, total = carry
        w, key = row
        noise = jax.random.bernoulli(key, 0.8, x.shape)
        x = x + jnp.tanh(x @ w.astype(x.dtype)) * noise + memory @ params["shared"]
        x = x + jnp.sin(x) @ params["shared"] * (i + 1)
        total = total + jnp.mean(x**2)
        return (x, i + 1, jax.lax.stop_gradient(x.mean(0)), idle, total), None

    first = (x, 0, jnp.zeros(x.shape[1]), jnp.ones(2), 0.0)
    (x, i, seen, idle, total), _ = jax.lax.scan(body, first, (weights, keys))
    x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ params["shared"]), x)
    x, ys = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, params["w"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"], reverse=True)
    return jnp.mean(x) + total + ys.sum(), (i, seen, idle)


def test_scans_of_all_kinds() -> None:
    r = np.random.default_rng(1)
    params = {"w": r.normal(size=(5, 4, 4)), "m": r.normal(size=(3, 4)), "shared": r.normal(size=(4, 4))}
    args = (r.normal(size=(6, 4)), jax.random.split(jax.random.key(0), 5), r.normal(size=(6, 3)))
    params, args = jax.tree.map(jnp.asarray, (params, args))
    found = assert_gradient(_scans, params, *args, has_aux=True)
    chain, _, _ = found.build(params, *args)
    assert [part.depth for part in chain.parts if isinstance(part, mw.Stack)] == [5, 3, 5]
    assert_gradient(_scans, params, *args, has_aux=True, most=2)


def _frozen(params: PyTree, x: Any, key: Any) -> tuple[Any, PyTree]:
    """Integers, keys, frozen arrays, a number and functions among the parameters, dropout, and results of
    every kind."""
    base = jax.lax.stop_gradient(params["base"])
    h = jnp.tanh(x @ (base + params["a"] @ params["b"]))
    for i in range(3):
        h = h * jax.random.bernoulli(jax.random.fold_in(key, i), 0.9, h.shape)
        h = h + params["act"](h @ params["w"][i]) * params["gain"]
    h = h + params["table"][params["steps"]]
    stats = h.mean(0)
    loss = jnp.mean(h**2) + 0.1 * jnp.sum(params["unused_int"])
    return loss, {"stats": stats, "logits": h[:, :2], "x": x, "steps": params["steps"] + 1, "one": 1.0}


def frozen_params(width: int = 8) -> PyTree:
    k = jax.random.split(jax.random.key(0), 4)
    return {
        "base": jax.random.normal(k[0], (width, width)),
        "a": jax.random.normal(k[1], (width, 2)),
        "b": jax.random.normal(k[2], (2, width)),
        "w": jax.random.normal(k[3], (3, width, width)) * 0.3,
        "gain": 0.5,
        "table": jnp.arange(4.0 * width).reshape(4, width),
        "steps": jnp.asarray(1),
        "unused_int": jnp.arange(3),
    }


def test_frozen_arrays_integers_keys_and_results() -> None:
    params, x, key = frozen_params(), jax.random.normal(jax.random.key(5), (6, 8)), jax.random.key(7)

    def loss(params: PyTree, x: Any, key: Any) -> Any:
        return _frozen({**params, "act": jax.nn.silu}, x, key)

    found = assert_gradient(loss, params, x, key, has_aux=True)
    carried = {found.flow.traced.signature.names[v] for v in found.flow.differentiated}
    assert carried == {f"`params['{n}']`" for n in ("a", "b", "gain", "table", "w")}
    chain, inputs, _ = found.build(params, x, key)
    y = chain(inputs)
    signature = found.flow.traced.signature
    arrays = [jnp.asarray(leaf) for leaf in signature.arrays(params, (x, key))]
    value, aux = found.value(y, arrays, found.flow.traced.captured)
    want, want_aux = loss(params, x, key)
    assert jax.tree.structure(aux) == jax.tree.structure(want_aux)
    for a, b in zip(jax.tree.leaves((value, aux)), jax.tree.leaves((want, want_aux))):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_functions_among_the_parameters_are_part_of_the_program() -> None:
    params = {"w": jnp.ones((4, 4)), "act": jnp.tanh}
    found = mw.cut(lambda p, x: scalar(p["act"](x @ p["w"])), params, jnp.ones((2, 4)))
    chain, x, back = found.build(params, jnp.ones((2, 4)))
    grads = back(*jax.grad(lambda c, x: c(x)[0], argnums=(0, 1))(chain, x))
    assert grads["act"] is None
    assert grads["w"].shape == (4, 4)
    with pytest.raises(mw.ArgumentError, match=r"params\['act'\].*part of the program"):
        found.build({**params, "act": jnp.sin}, jnp.ones((2, 4)))


def _custom() -> Any:
    @jax.custom_vjp
    def f(x: Any) -> Any:
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (2 * ct * jnp.cos(x),))
    return f


def _control(params: PyTree, x: Any) -> Any:
    """Branches, loops, rules of one's own, each a whole."""
    x = jax.lax.cond(x.sum() > 0, lambda x: x @ params["a"], lambda x: x - params["a"][0], x)
    x = jax.lax.fori_loop(0, 3, lambda i, v: jnp.sin(v @ params["b"]), x)
    x = jax.checkpoint(lambda x: jnp.tanh(x @ params["a"]))(x)
    x = _custom()(x) + jax.nn.relu(x)
    return jnp.mean(jax.scipy.special.logsumexp(x, axis=-1))


def _complex(params: PyTree, x: Any) -> Any:
    z = jnp.fft.fft(x.astype(complex)) * params["filter"]
    z = jnp.fft.ifft(z @ params["mix"])
    return jnp.mean(jnp.abs(z) ** 2)


def _shared(params: PyTree, x: Any, mask: Any) -> Any:
    """One layer's weights, used by all of them; a mask of floating-point numbers."""
    for _ in range(6):
        x = x + jnp.tanh(x @ params["w"] + params["b"]) * mask + jnp.tanh(x @ params["w"].T) @ params["w"]
    return jnp.mean(x**2)


def _of_parameters_alone(params: PyTree) -> Any:
    x = params["x"]
    for w in params["w"]:
        x = jnp.tanh(x @ w) + jnp.sin(x)
    return jnp.sum(x)


def _asked(params: PyTree, x: Any) -> Any:
    """Callbacks that are pure, of data and of activations: what checks of values are made of."""
    x = jnp.tanh(jax.pure_callback(np.sin, x, x) @ params["w"])
    bad = jax.pure_callback(
        lambda x: np.isnan(x).any(), jax.ShapeDtypeStruct((), bool), jax.lax.stop_gradient(x)
    )
    return jnp.mean(jnp.where(bad, jnp.nan, x @ params["w"]) ** 2)


W = np.random.default_rng(0)
CASES: list[tuple[str, Any, PyTree, tuple[Any, ...]]] = [
    ("control", _control, {"a": W.normal(size=(5, 5)), "b": W.normal(size=(5, 5))}, (W.normal(size=(3, 5)),)),
    (
        "complex", _complex,
        {"filter": W.normal(size=8) + 1j, "mix": W.normal(size=(8, 8)) * (1 - 0.5j)},
        (W.normal(size=(4, 8)),),
    ),
    (
        "shared", _shared, {"w": W.normal(size=(6, 6)), "b": W.normal(size=6)},
        (W.normal(size=(7, 6)), W.normal(size=(7, 1))),
    ),
    (
        "of parameters alone", _of_parameters_alone,
        {"x": W.normal(size=(3, 4)), "w": W.normal(size=(5, 4, 4))}, (),
    ),
    ("pure callbacks", _asked, {"w": W.normal(size=(6, 6))}, (W.normal(size=(7, 6)),)),
    ("the parameter itself", lambda p: p, W.normal(), ()),
    ("an elementwise loss", lambda p, x: p["a"] * x, {"a": W.normal(), "b": W.normal()}, (2.0,)),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "params", "args"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_gradients_of_all_kinds_of_functions(loss: Any, params: PyTree, args: tuple[Any, ...]) -> None:
    params, args = jax.tree.map(jnp.asarray, (params, args))
    assert_gradient(loss, params, *args)
    assert_gradient(loss, params, *args, most=2)


def test_what_many_pieces_read_crosses_the_cuts_once() -> None:
    params, args = {"w": jnp.eye(6), "b": jnp.ones(6)}, (jnp.ones((7, 6)), jnp.ones((7, 1)))
    found = mw.cut(_shared, params, *args)
    assert len(found) >= 4
    chain, x, _ = found.build(params, *args)
    assert all(not layer.params for layer in chain.layers)
    assert len(x) == 3
    assert sum(leaf.dtype == jnp.uint64 for leaf in x) == 1  # the mask, which has no gradient
    assert len({layer.program for layer in chain.layers[2:-1]}) == 1
    assert len({jax.tree.structure(layer) for layer in chain.layers[2:-1]}) == 1


def test_errors_say_what_is_wrong() -> None:
    x, p = jnp.ones((2, 3)), {"w": jnp.ones((3, 3))}
    with pytest.raises(mw.ArgumentError, match=r"float64\[2, 3\].*real scalar"):
        mw.cut(lambda p, x: x @ p["w"], p, x)
    with pytest.raises(mw.ArgumentError, match=r"complex128\[\].*real"):
        mw.cut(lambda p, x: jnp.sum(x @ p["w"] + 1j), p, x)
    with pytest.raises(mw.ArgumentError, match="has_aux"):
        mw.cut(lambda p, x: (jnp.sum(x @ p["w"]), x), p, x)
    with pytest.raises(mw.ArgumentError, match="must return a pair"):
        mw.cut(lambda p, x: jnp.sum(x @ p["w"]), p, x, has_aux=True)
    with pytest.raises(mw.ArgumentError, match="does not depend"):
        mw.cut(lambda p, x: jnp.sum(x), p, x)
    with pytest.raises(mw.ArgumentError, match="does not depend"):
        mw.cut(lambda p, x: jnp.sum(jax.lax.stop_gradient(x @ p["w"])), p, x)
    with pytest.raises(mw.ArgumentError, match=r"jax\.debug\.print"):
        mw.cut(lambda p, x: (jax.debug.print("{}", x), jnp.sum(x @ p["w"]))[1], p, x)
    with pytest.raises(mw.ArgumentError, match="callback"):
        mw.cut(lambda p, x: jnp.sum(jax.experimental.io_callback(np.sin, x, x) @ p["w"]), p, x)
    with pytest.raises(mw.ArgumentError, match=r"jax\.lax\.cond"):
        mw.cut(lambda p, x: jnp.sum(x @ p["w"] if x.sum() > 0 else x), p, x)
    with pytest.raises(mw.ArgumentError, match="most=0"):
        mw.cut(lambda p, x: jnp.sum(x @ p["w"]), p, x, most=0)
    with pytest.raises(mw.ArgumentError, match="not callable"):
        mw.cut(None, p, x)  # type: ignore[arg-type]


def test_checkpoints_of_the_function_are_opened_or_kept() -> None:
    params, x = [jnp.eye(4) * i for i in range(1, 7)], jnp.ones((3, 4))

    def loss(params: PyTree, x: Any) -> Any:
        for a, b in zip(params[::2], params[1::2]):
            x = jax.checkpoint(lambda x, a, b: jnp.tanh(jnp.tanh(x @ a) @ b) + jnp.sin(x))(x, a, b)
        return jnp.mean(x**2)

    opened, kept = mw.cut(loss, params, x), mw.cut(loss, params, x, keep_checkpoints=True)
    assert "remat2" not in {step.primitive.name for step in opened.flow.steps}
    assert [step.primitive.name for step in kept.flow.steps].count("remat2") == 3
    chain, inputs, back = kept.build(params, x)
    grads = back(*jax.grad(lambda c, x: c(x)[0], argnums=(0, 1))(chain, inputs))
    assert_same_gradient(grads, loss, params, x)


def test_what_cannot_be_cut_says_where_most_is_alive() -> None:
    params, x = {"w": jnp.ones((64, 64))}, jnp.ones((64, 64))

    def loss(params: PyTree, x: Any) -> Any:
        return jnp.sum(x @ params["w"])

    found = mw.cut(loss, params, x)
    assert len(found) == 1
    chain, inputs, _ = found.build(params, x)
    profile = mw.estimate(*jax.eval_shape(lambda *both: both, chain, inputs), device="laptop")
    with pytest.raises(mw.InfeasibleError, match=r"could not be cut.*alive within it after `dot_general`"):
        mw.fit_function(loss, params, x, budget=100_000, profile=profile)


def test_a_step_within_a_larger_function() -> None:
    params, x, y = functions.mlp(depth=4)
    chain, inputs, _ = mw.cut(functions.mlp_loss, params, x, y).build(params, x, y)
    profile = mw.estimate(*jax.eval_shape(lambda *both: both, chain, inputs), device="laptop")
    fitted = mw.fit_function(functions.mlp_loss, params, x, y, budget="10MiB", profile=profile)

    @mw.jit
    def train(params: PyTree, xs: Any, ys: Any) -> tuple[PyTree, Any]:
        """Gradients accumulated over several batches, one step of descent."""

        def one(total: PyTree, batch: tuple[Any, Any]) -> tuple[PyTree, Any]:
            (value, _), grads = fitted.value_and_grad(params, *batch)
            return jax.tree.map(jnp.add, total, grads), value

        total, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), (xs, ys))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, total), values

    got, values = train(params, jnp.stack([x, y]), jnp.stack([y, x]))
    grads = [jax.grad(functions.mlp_loss)(params, *batch) for batch in ((x, y), (y, x))]
    want = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b), params, *grads)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(values[0], functions.mlp_loss(params, x, y), rtol=1e-12)
    # Two models at once.
    both = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    (loss, _), _ = mw.jit(jax.vmap(fitted.value_and_grad, (0, None, None)))(both, x, y)
    np.testing.assert_allclose(loss[0], functions.mlp_loss(params, x, y), rtol=1e-12)


def test_names_of_programs_do_not_depend_on_where_they_are_asked_for() -> None:
    """The rule of `jax.nn.relu` calls `jax.nn.relu`: what is said of it must not depend on the stack."""

    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(jax.nn.relu(x @ w) ** 2)

    def names(depth: int) -> list[str]:
        if depth:
            return names(depth - 1)
        found = mw.cut(loss, jnp.ones((8, 8)), jnp.ones((4, 8)))
        return [piece.program.name for piece in found.plan.pieces]

    jax.clear_caches()
    assert names(0) == names(100)


#: In a process of its own: what the tests check of types at each call takes longer than cutting.
LONG = """
import time
from mwplan.functions import cut, tracing
from tests import functions
params, batch = functions.transformer(depth=60)
def trace():
    return tracing.trace(
        functions.transformer_loss, params, (batch,), has_aux=False, keep_checkpoints=False
    )
cut.cut_traced(trace(), most=128)  # JAX's own caches
traced = trace()
start = time.process_time()
found = cut.cut_traced(traced, most=128)
print(len(traced.steps), len(found), time.process_time() - start)
"""


def test_cutting_a_long_program_takes_no_time() -> None:
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, cwd=root, env=env)
    assert run.returncode == 0, run.stderr
    steps, pieces, took = map(float, run.stdout.split())
    assert steps > 4500
    assert 60 < pieces <= 128
    assert took < 5  # on a busy machine; alone it is a third of that
