"""What functions hold beside their arguments: arrays in another order, other bits of data, stacked copies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mwplan as mw
from mwplan.functions.fit_function import profile_pieces
from mwplan.functions.flat import Gradient, copied_bytes, split
from mwplan.functions.policy import Policy
from mwplan.network.kept import PREFIX
from tests import functions

PyTree = Any


def _recurrent(params: PyTree, x: Any, y: Any) -> Any:
    """A cell in a scan over time, of a batch whose time comes second."""

    def cell(h: Any, x: Any) -> tuple[Any, None]:
        return jnp.tanh(h @ params["a"] + x @ params["b"]), None

    h, _ = jax.lax.scan(cell, jnp.zeros((8, 16)), jnp.swapaxes(x, 0, 1))
    return jnp.mean((h - y) ** 2)


def recurrent() -> tuple[PyTree, Any, Any]:
    params = {"a": jnp.eye(16) / 2, "b": jnp.full((5, 16), 0.1)}
    return params, jnp.sin(jnp.arange(480.0)).reshape(8, 12, 5), jnp.ones((8, 16))


def test_transposed_data_of_a_loop_is_planned_for_and_is_there_once() -> None:
    args = recurrent()
    found = mw.cut(_recurrent, *args)
    flat = split(found, args[0], args[1:])
    assert copied_bytes(found, flat) == args[1].nbytes  # the targets are read by the last piece alone
    profile = profile_pieces(found, *args, device="laptop", progress=False)
    chain, x, _ = found.build(*args)
    alone = mw.estimate(chain, x, device="laptop", wrt_input=found.plan.shares, progress=False)
    assert profile.carried_bytes == alone.carried_bytes + args[1].nbytes
    least = mw.frontier(profile).points[0][0]
    schedule = mw.plan(profile, budget=least)
    text = mw.jit(Gradient(found, False)(schedule)).lower(*flat).compile().as_text()
    # One array with its rows one after the other: no loop has a copy in the order of the argument.
    assert "u32[12,8,5]{2,1,0}" in text
    assert "u32[12,8,5]{2,0,1}" not in text


def test_parameters_stacked_for_a_loop_are_copies_and_so_are_their_gradients() -> None:
    args = functions.mlp(depth=12, batch=64)
    found = mw.cut(functions.mlp_loss, *args)
    looped = found.looped()
    assert any(group.count > 1 for group in looped.plan.groups)
    flat = split(found, args[0], args[1:])
    more = copied_bytes(looped, flat) - copied_bytes(found, flat)
    assert more == 2 * looped.plan.copied_bytes(found.flow.traced.avals)


def test_a_policy_keeps_values_of_pieces_that_hold_data() -> None:
    args = recurrent()
    found = mw.cut(_recurrent, *args)
    profile = profile_pieces(found, *args, device="laptop", progress=False)
    kept = [[one.name for one in layer.store if one.name.startswith(PREFIX)] for layer in profile.layers]
    names = [some[0] if some else "vjp" for some in kept]
    assert any(name != "vjp" for name in names)
    runs = [
        mw.Run(kind=mw.RunKind.STORE, start=i, stop=i + 1, options=(name,)) for i, name in enumerate(names)
    ]
    policy = Policy(cut=found, schedule=mw.Schedule(runs=tuple(runs)), has_aux=False)
    got = jax.jit(jax.grad(policy)).lower(*args).compile()(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.grad(_recurrent)(*args)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
