r"""What rounding does to a cotangent that is rebuilt: local error and growth of one option, measured.

Along a moonwalk run `err_l^2 = (growth_l * err_{l-1})^2 + local_error_l^2` (docs/accounting.md). Both numbers come from random
cotangents on the layer's present weights, in working precision; seeds are the caller's key.

- **local error**: $|\bar y' - \bar y| / |\bar y|$ with $\bar y'$ rebuilt from the reverse sweep's own $\bar x$ and fragment: the rounding of
  both sweeps, amplified by this one layer.
- **growth**: $\frac{|d J^+| / |d|}{|\bar y| / |\bar x|}$ with $d$ fresh white noise in place of $\bar x$ and no noise in the fragment, which is kept
  exactly: a vijp is linear in the cotangent and the fragment together, so $d J^+$ is the rebuild from $(d, 0)$.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from mwplan import trees
from mwplan.rules import InvertRule, VijpRule, WholeFragment

PyTree = Any


def _norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all inexact leaves together."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)]
    return jnp.sqrt(sum((jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in leaves), start=jnp.zeros(())))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, 0 where both are 0."""
    return jnp.where(a == 0, 0.0, a / b)


def random_cotangent(like: PyTree, key: jax.Array) -> PyTree:
    """White noise in the working precision of each inexact leaf of `like`; float0 zeros for the others are left to `jax.vjp`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, max(1, len(leaves)))
    made = [
        jax.random.normal(k, leaf.shape, trees.working_dtype(leaf.dtype))
        if trees.is_inexact(leaf)
        else jnp.zeros(leaf.shape, jax.dtypes.float0)
        for k, leaf in zip(keys, leaves)
    ]
    return jax.tree.unflatten(treedef, made)


def _vijp_errors(rule: VijpRule, layer: PyTree, x: PyTree, ct_out: PyTree, key: jax.Array) -> jax.Array:
    _, residuals = rule.forward(layer, x)
    ct_in, fragment = rule.reverse(layer, residuals, trees.widen(ct_out))
    # Without the barrier the compiler could cancel reverse against rebuild and report an error that no run has.
    ct_in, fragment, x = jax.lax.optimization_barrier((ct_in, fragment, x))
    back = rule.rebuild(layer, x, ct_in, fragment)
    local = _ratio(_norm(jax.tree.map(jnp.subtract, back, trees.widen(ct_out))), _norm(ct_out))
    noise = random_cotangent(ct_in, key)
    moved = rule.rebuild(layer, x, noise, jax.tree.map(jnp.zeros_like, fragment))
    growth = _ratio(_norm(moved) * _norm(ct_in), _norm(noise) * _norm(ct_out))
    return jnp.stack([local, growth])


def _invert_errors(rule: InvertRule, layer: PyTree, x: PyTree, y: PyTree, key: jax.Array) -> jax.Array:
    back = rule.inverse(layer, y)
    scale = _norm(x)
    local = _ratio(_norm(jax.tree.map(jnp.subtract, trees.widen(back), trees.widen(x))), scale)
    noise = random_cotangent(y, key)
    tangent = jax.tree.map(lambda n, leaf: n.astype(leaf.dtype), noise, y)
    _, moved = jax.jvp(lambda out: rule.inverse(layer, out), (y,), (tangent,))
    growth = _ratio(_norm(moved) * _norm(y), _norm(noise) * scale)
    return jnp.stack([local, growth])


@lru_cache(maxsize=512)
def _compiled(
    function: Callable[..., Any], rule: Any, treedef: Any, fixed: tuple[Any, ...]
) -> Callable[..., Any]:
    """`function` compiled for one rule and one structure of layer; its arrays are arguments, so equal layers share it."""

    def call(arrays: list[Any], *args: Any) -> Any:
        left = iter(arrays)
        leaves = [next(left) if is_array else leaf for is_array, leaf in fixed]
        return function(rule, jax.tree.unflatten(treedef, leaves), *args)

    return jax.jit(call)


def _run(function: Callable[..., Any], rule: Any, layer: PyTree, *args: Any) -> tuple[float, float]:
    leaves, treedef = jax.tree.flatten(layer)
    fixed = tuple((True, None) if trees.is_array(leaf) else (False, leaf) for leaf in leaves)
    arrays = [leaf for leaf in leaves if trees.is_array(leaf)]
    try:
        call = _compiled(function, rule, treedef, fixed)
    except TypeError:  # something in the layer cannot be hashed: compiled for this call alone
        call = _compiled.__wrapped__(function, rule, treedef, fixed)
    local, growth = jax.device_get(call(arrays, *args)).tolist()
    finite = jnp.isfinite(jnp.asarray([local, growth]))
    return (local if finite[0] else float("inf")), (growth if finite[1] else float("inf"))


def measure(
    layer: PyTree, rule: VijpRule, x: PyTree, key: jax.Array, ct_out: PyTree = None
) -> tuple[float, float]:
    """`(local_error, growth)` of one vijp of `layer` at input `x` (arrays) by `rule`; infinity where not finite.

    `ct_out`: the cotangent to rebuild, white noise from `key` by default. Both 0 for `WholeFragment`.
    Compiled once for each rule and structure of layer.
    """
    if isinstance(rule, WholeFragment):
        return 0.0, 0.0
    first, second = jax.random.split(key)
    if ct_out is None:
        ct_out = random_cotangent(jax.eval_shape(layer, x), first)
    return _run(_vijp_errors, rule, layer, x, ct_out, second)


def measure_inverse(layer: PyTree, rule: InvertRule, x: PyTree, key: jax.Array) -> tuple[float, float]:
    """`(local_error, growth)` of the rebuilt activation of one inverse, relative to the activation."""
    return _run(_invert_errors, rule, layer, x, jax.jit(layer)(x), key)


def predict(options: Iterable[tuple[float, float]]) -> list[float]:
    """The predicted error after each layer of a run from its `(local_error, growth)` pairs, input first, from 0 at its start."""
    errors, error = [], 0.0
    for local, growth in options:
        error = ((growth * error) ** 2 + local**2) ** 0.5 if growth * error < 1e150 else float("inf")
        errors.append(error)
    return errors
