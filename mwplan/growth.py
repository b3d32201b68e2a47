r"""What rounding does to a cotangent that is rebuilt: local error and growth of one option, measured.

Along a moonwalk run `err_l^2 = (growth_l * err_{l-1})^2 + local_error_l^2` (docs/accounting.md). Both numbers come from random
cotangents on the layer's present weights, in working precision; seeds are the caller's key.

- **local error**: $|\bar y' - \bar y| / |\bar y|$ with $\bar y'$ rebuilt from the reverse sweep's own $\bar x$ and fragment: the rounding of
  both sweeps, amplified by this one layer.
- **growth**: $\frac{|d J^+| / |d|}{|\bar y| / |\bar x|}$ with $d$ fresh white noise in place of $\bar x$ and no noise in the fragment, which is kept
  exactly: a vijp is linear in the cotangent and the fragment together, so $d J^+$ is the rebuild from $(d, 0)$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from mwplan import trees
from mwplan.rules import InvertRule, VijpRule, WholeFragment, parameter_gradient

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


def _output(rule: None, layer: PyTree, x: PyTree) -> PyTree:
    return layer(x)


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


def _call(function: Callable[..., Any], rule: Any, layer: PyTree, *args: Any) -> Any:
    """`function(rule, layer, *args)`, compiled."""
    leaves, treedef = jax.tree.flatten(layer)
    fixed = tuple((True, None) if trees.is_array(leaf) else (False, leaf) for leaf in leaves)
    arrays = [leaf for leaf in leaves if trees.is_array(leaf)]
    try:
        call = _compiled(function, rule, treedef, fixed)
    except TypeError:  # something in the layer cannot be hashed: compiled for this call alone
        call = _compiled.__wrapped__(function, rule, treedef, fixed)
    return call(arrays, *args)


def _finite(value: Any) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def _run(function: Callable[..., Any], rule: Any, layer: PyTree, *args: Any) -> tuple[float, float]:
    local, growth = jax.device_get(_call(function, rule, layer, *args))
    return _finite(local), _finite(growth)


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
    return _run(_invert_errors, rule, layer, x, _call(_output, None, layer, x), key)


def predict(options: Iterable[tuple[float, float]]) -> list[float]:
    """The predicted error after each layer of a run from its `(local_error, growth)` pairs, input first, from 0 at its start."""
    errors, error = [], 0.0
    for local, growth in options:
        error = ((growth * error) ** 2 + local**2) ** 0.5 if growth * error < 1e150 else float("inf")
        errors.append(error)
    return errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One moonwalk run, followed layer by layer from its input.

    `predicted`, `measured`: relative error of each layer's rebuilt output cotangent; `growth`, `local_error`: of each layer's option;
    `gradient`: relative error of all parameter gradients together, `worst_gradient`: of the worst layer's.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    growth: tuple[float, ...]
    local_error: tuple[float, ...]
    gradient: float
    worst_gradient: float


def _forward(rule: VijpRule, layer: PyTree, x: PyTree) -> Any:
    return rule.forward(layer, x)


def _reverse(rule: VijpRule, layer: PyTree, residuals: Any, ct_out: PyTree) -> Any:
    return rule.reverse(layer, residuals, ct_out)


def _rebuild(rule: VijpRule, layer: PyTree, x: PyTree, ct_in: PyTree, fragment: PyTree) -> Any:
    return rule.rebuild(layer, x, ct_in, fragment)


def _gradients(rule: Any, layer: PyTree, x: PyTree, true: PyTree, rebuilt: PyTree) -> Any:
    """`(error of the cotangent, its norm, error of the parameter gradient, its norm)`, absolute."""
    wants, gots = parameter_gradient(layer, x, true), parameter_gradient(layer, x, rebuilt)
    pairs = ((true, rebuilt), (wants, gots))
    return [norm for a, b in pairs for norm in (_norm(jax.tree.map(jnp.subtract, b, a)), _norm(a))]


def follow(
    layers: Sequence[PyTree], options: Sequence[VijpRule], x: PyTree, ct_out: PyTree, key: jax.Array
) -> Followed:
    """Takes `layers` through one moonwalk run, an operation at a time, and compares it with what R knew and with the prediction.

    `ct_out`: the cotangent at the run's end, white noise from `key` where None. Holds every activation and cotangent: for study, not for use.
    """
    xs, kept = [x], []
    for one, rule in zip(layers, options, strict=True):
        y, residuals = _call(_forward, rule, one, xs[-1])
        xs.append(y)
        kept.append(residuals)
    ct = trees.widen(random_cotangent(xs[-1], key) if ct_out is None else ct_out)
    cts, fragments = [ct], []
    for one, rule, residuals in zip(reversed(layers), reversed(options), reversed(kept)):
        ct, fragment = _call(_reverse, rule, one, residuals, ct)
        cts.append(ct)
        fragments.append(fragment)
    cts, fragments = cts[::-1], fragments[::-1]
    rows, pairs = [], []
    for i, (one, rule) in enumerate(zip(layers, options)):
        ct = _call(_rebuild, rule, one, xs[i], ct, fragments[i])
        rows.append([float(v) for v in _call(_gradients, None, one, xs[i], cts[i + 1], ct)])
        pairs.append(measure(one, rule, xs[i], jax.random.fold_in(key, i), cts[i + 1]))
    total = math.sqrt(sum(row[3] ** 2 for row in rows))
    return Followed(
        predicted=tuple(predict(pairs)),
        measured=tuple(_finite(e / n) if n else 0.0 for e, n, _, _ in rows),
        growth=tuple(g for _, g in pairs),
        local_error=tuple(e for e, _ in pairs),
        gradient=_finite(math.sqrt(sum(row[2] ** 2 for row in rows)) / total) if total else 0.0,
        worst_gradient=max((_finite(e / n) for _, _, e, n in rows if n), default=0.0),
    )
