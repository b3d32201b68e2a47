"""Fitted functions in their users' training loops: jit, loops, donation, optax, scaling, meshes, keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mwplan as mw
from tests import functions
from tests.helpers import relative_error

PyTree = Any


def estimated(loss: Any, params: PyTree, *args: Any) -> mw.Profile:
    chain, x, _ = mw.cut(loss, params, *args).build(params, *args)
    return mw.estimate(*jax.eval_shape(lambda *both: both, chain, x), device="laptop")


def fit(loss: Any, params: PyTree, *args: Any, budget: str = "10MiB") -> mw.FittedFunction:
    return mw.fit_function(loss, params, *args, budget=budget, profile=estimated(loss, params, *args))


def assert_close(got: PyTree, want: PyTree, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


@pytest.fixture(scope="module")
def fitted() -> mw.FittedFunction:
    return fit(functions.mlp_loss, *functions.mlp(depth=4, batch=512))


def test_a_compiled_step_says_where_it_does_not_belong(fitted: mw.FittedFunction) -> None:
    params, x, y = functions.mlp(depth=4, batch=512)
    both = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    for transformed, given in (
        (jax.jit(fitted.step), params),
        (jax.vmap(fitted.step, (0, None, None)), both),
    ):
        with pytest.raises(mw.ArgumentError, match=r"value_and_grad.*mw\.jit"):
            transformed(given, x, y)
    with pytest.raises(mw.ArgumentError, match=r"value_and_grad.*mw\.jit"):
        jax.grad(lambda p: fitted.step(p, x, y)[0][0])(params)


def test_donated_parameters_make_room_for_the_new_ones(fitted: mw.FittedFunction) -> None:
    params, x, y = functions.mlp(depth=4, batch=512)

    def train(params: PyTree, x: Any, y: Any) -> tuple[PyTree, Any]:
        (value, _), grads = fitted.value_and_grad(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    kept, given = (
        mw.jit(train, donate_argnums=donated).lower(params, x, y).compile() for donated in ((), (0,))
    )
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    memory = [one.memory_analysis() for one in (kept, given)]
    assert memory[0].alias_size_in_bytes == 0
    assert memory[1].alias_size_in_bytes == nbytes
    assert memory[1].temp_size_in_bytes <= memory[0].temp_size_in_bytes + nbytes // 2
    want, _ = kept(params, x, y)
    own = jax.tree.map(jnp.copy, params)
    assert_close(given(own, x, y)[0], want)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own))


def test_gradients_are_taken_up_by_optax(fitted: mw.FittedFunction) -> None:
    """Over several steps, by `optax.MultiSteps`, as JAX's are."""
    start, x, y = functions.mlp(depth=4, batch=512)
    optimizer = optax.MultiSteps(optax.sgd(0.1), 2)
    update = jax.jit(optimizer.update)

    def trained(grad: Any) -> PyTree:
        params, state = start, optimizer.init(start)
        for _ in range(4):
            updates, state = update(grad(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    reference = jax.jit(jax.grad(functions.mlp_loss))
    assert_close(
        trained(lambda params: fitted.step(params, x, y)[1]), trained(lambda params: reference(params, x, y))
    )


def test_a_scaled_loss_in_half_precision() -> None:
    """Gradients in the parameters' precision, those of JAX; what overflows is not hidden."""
    params, x, y = functions.mlp(depth=4, batch=64)

    def loss(params: PyTree, x: Any, y: Any, scale: Any) -> Any:
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x, y))
        return functions.mlp_loss(*half).astype(jnp.float32) * scale

    scale = jnp.float32(1024.0)
    step = fit(loss, params, x, y, scale)
    (value, _), grads = step.step(params, x, y, scale)
    want_value, want = jax.jit(jax.value_and_grad(loss))(params, x, y, scale)
    np.testing.assert_allclose(value, want_value, rtol=1e-2)
    assert_close(grads, want, 2e-2)
    _, grads = step.step(params, x, y, jnp.float32(jnp.inf))
    assert not any(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_keys_integers_and_booleans_among_the_parameters() -> None:
    """They have no gradient (None), may change from step to step, and optimizers leave them out."""
    params, x, y = functions.mlp(depth=3, batch=64)
    both = {
        "w": params,
        "key": jax.random.key(0),
        "old": jax.random.PRNGKey(1),
        "n": 3,
        "on": jnp.array(True),
    }

    def loss(both: PyTree, x: Any, y: Any) -> Any:
        key = jax.random.fold_in(both["key"], both["n"])
        x = x * jax.random.bernoulli(key, 0.9, x.shape) * jax.random.bernoulli(both["old"], 0.9, x.shape)
        return jnp.where(both["on"], functions.mlp_loss(both["w"], x, y), 0.0)

    step = fit(loss, both, x, y)
    for key in (0, 5):
        given = {**both, "key": jax.random.key(key)}
        (value, _), grads = step.step(given, x, y)
        want_value, want = jax.value_and_grad(lambda w, given=given: loss({**given, "w": w}, x, y))(params)
        np.testing.assert_allclose(value, want_value, rtol=1e-5)
        assert_close(grads["w"], want)
        assert [grads[name] for name in ("key", "old", "n", "on")] == [None] * 4
    # As Equinox's users do.
    trainable = jax.tree.map(lambda g, p: None if g is None else p, grads, both, is_leaf=lambda g: g is None)
    optimizer = optax.adam(1e-3)
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)


#: On two devices: the batch spread, the parameters whole; in the two kinds of axes; and a loss that cannot.
MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import mwplan as mw
from tests import functions
params, x, y = functions.mlp(depth=3, batch=512)
want = jax.grad(functions.mlp_loss)(params, x, y)
alone = mw.fit_function(functions.mlp_loss, params, x[:256], y[:256], budget="10MiB")
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    spread, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    given = (jax.device_put(params, whole), *jax.device_put((x, y), spread))
    fitted = mw.fit_function(functions.mlp_loss, *given, budget="10MiB")
    (_, report), grads = fitted.step(*given)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    assert fitted.profile.fixed_bytes == alone.profile.fixed_bytes
    assert fitted.profile.activation_bytes == alone.profile.activation_bytes
    assert fitted.temporary_bytes < 1.2 * fitted.attempts[-1].predicted_bytes, str(fitted)
try:
    mw.fit_function(functions.mlp_loss, given[0], given[1], jax.device_put(y, whole), budget="10MiB")
except mw.ArgumentError as error:
    assert "shard_map" in str(error), error
else:
    raise AssertionError("a batch of which one array is spread")
"""


def test_batches_on_a_mesh() -> None:
    root = Path(__file__).parent.parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, cwd=root, env=env)
    assert run.returncode == 0, run.stderr[-3000:]


def test_what_the_loss_writes_into_its_arguments_and_does_not_return_is_named() -> None:
    """Running averages of a module of Flax NNX, which is a tree that can be written to."""
    model, x = nnx.BatchNorm(4, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (64, 4))

    def loss(model: nnx.BatchNorm, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(model(x)) ** 2)

    def whole(model: nnx.BatchNorm, x: jax.Array) -> Any:
        return loss(model, x), nnx.state(model, nnx.BatchStat)

    says = r"changes `params.mean.value`, `params.var.value` and does not return it.*has_aux=True"
    with pytest.warns(UserWarning, match=says):
        mw.cut(loss, model, x)
    fitted = mw.fit_function(whole, model, x, budget="1MiB", has_aux=True)
    ((_, averages), report), grads = fitted.step(model, x)
    nnx.update(model, averages)
    assert relative_error(model.mean[...], 0.01 * jnp.mean(x, 0)) < 1e-5
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    assert str(report).endswith("to rounding: nothing was rebuilt")
    assert "the budget has room for it, no plan is needed" in str(fitted)
