"""The operations of a step, one function each: what is executed, timed and traced is the same code.

Each takes the layer as its first argument, arrays after it, and returns arrays; rules are bound by keyword.
Residuals cross from forward to backward as `Residuals`, which hold what is new and look up the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from mwplan.common import trees
from mwplan.network import residuals as res
from mwplan.network import rules
from mwplan.network.chain import as_layer

PyTree = Any


def plain_forward(layer: PyTree, x: PyTree) -> PyTree:
    """`y`: F sweep of RECOMPUTE runs."""
    return layer(x)


def forward(
    layer: PyTree, x: PyTree, *, rule: rules.StoreRule | rules.VijpRule | rules.InvertRule
) -> tuple[PyTree, res.Residuals]:
    """`y` and what `rule` keeps: F sweep of STORE, MOONWALK and INVERT runs."""
    y, kept = rule.forward(layer, x)
    return y, res.split(kept, layer, x, y, res.origins(_kept, rule, layer, x))


def _kept(rule: Any, layer: PyTree, x: PyTree) -> PyTree:
    return rule.forward(layer, x)[1]


def store_rules(layer: PyTree, x: PyTree) -> tuple[rules.StoreRule, ...]:
    """`rules.store_rules`; of `rules.SMALLER` those that keep less than all before them, the layer's input
    counted where it is kept: each has two programs to compile. **Cost:** a trace of each."""
    offered = rules.store_rules(layer, x)
    if not set(rules.SMALLER) <= {*offered}:
        return offered
    one = as_layer(layer, 0)

    def kept(rule: rules.StoreRule) -> int:
        held = jax.eval_shape(functools.partial(forward, rule=rule), one, x)[1]
        return res.new_bytes(held) + trees.nbytes(x if held.keeps_input else ())

    step = max(trees.nbytes(x), trees.nbytes(jax.eval_shape(plain_forward, one, x))) // 64
    least, chosen = kept(rules.VjpStore()), []
    by_size = {}  # of equal ones the last
    for rule in rules.SMALLER:
        try:
            by_size[kept(rule)] = rule
        except TypeError:  # JAX cannot keep complex numbers for `jax.checkpoint`
            continue
    for size, rule in by_size.items():
        if size + step < least:
            chosen.append(rule)
            least = size
    return tuple(rule for rule in offered if rule not in rules.SMALLER or rule in chosen)


def store_backward(
    layer: PyTree, held: res.Residuals, x: PyTree, y: PyTree, ct_out: PyTree, *, rule: rules.StoreRule
) -> tuple[list[Any], PyTree]:
    """`(parameter gradients, ct_in)`. `x`, `y`: None unless the residuals share them."""
    return rule.backward(layer, res.restore(held, layer, x, y, ct_out), ct_out)


def offload_forward(
    layer: PyTree, x: PyTree, *, rule: rules.StoreRule
) -> tuple[PyTree, tuple[res.Residuals, PyTree, PyTree]]:
    """`y`, and in the host's memory what `rule` keeps, the layer's input and output where it keeps them: F
    sweep of OFFLOAD runs."""
    y, held = forward(layer, x, rule=rule)
    return y, _moved(
        (held, x if held.keeps_input else None, y if held.keeps_output else None), jax.memory.Space.Host
    )


def offload_backward(
    layer: PyTree, offloaded: tuple[res.Residuals, PyTree, PyTree], ct_out: PyTree, *, rule: rules.StoreRule
) -> tuple[list[Any], PyTree]:
    """As `store_backward`, from the host's memory."""
    held, x, y = _moved(offloaded, jax.memory.Space.Device)
    return store_backward(layer, held, x, y, ct_out, rule=rule)


def _moved(tree: PyTree, space: Any) -> PyTree:
    """The arrays, but for random keys, in another memory. On a CPU, whose memory is the host's, compiled
    programs copy nothing."""
    return jax.tree.map(lambda leaf: leaf if trees.is_key(leaf) else jax.device_put(leaf, space), tree)


def reverse(
    layer: PyTree, held: res.Residuals, x: PyTree, y: PyTree, ct_out: PyTree, *, rule: rules.VijpRule
) -> tuple[PyTree, PyTree]:
    """R sweep: `(ct_in, fragment)`."""
    return rule.reverse(layer, res.restore(held, layer, x, y, ct_out), ct_out)


def _is_plain(tree: PyTree) -> bool:
    """Whether all leaves of `tree` are floating-point or complex arrays."""
    return all(map(trees.is_inexact, jax.tree.leaves(tree)))


def vijp(layer: PyTree, x: PyTree, ct_in: PyTree, fragment: PyTree, *, rule: rules.VijpRule) -> PyTree:
    """M sweep, first half: `ct_out`; for integers, masks and random keys among the output float0 zeros,
    whatever the rule gives."""
    ct_out = rule.rebuild(layer, x, ct_in, fragment)
    if _is_plain((x, ct_out)):
        return ct_out
    return trees.as_cotangent(ct_out, jax.eval_shape(plain_forward, layer, x))


def advance(layer: PyTree, x: PyTree, ct_out: PyTree, *, last: bool) -> tuple[PyTree, list[Any]]:
    """M sweep, second half: `(y, parameter gradients)`; `y` is None in the `last` layer of a run, which needs
    none.

    Apart from `vijp`, so that `ct_in` is gone before `y` exists; and the gradients before `y`, so that it can
    lie where their workspace was.
    """
    grads = rules.parameter_gradient(layer, x, ct_out)
    if last:
        return None, grads
    x, grads = trees.tie((x, grads))
    return layer(x), grads


def invert_backward(
    layer: PyTree, held: res.Residuals, y: PyTree, ct_out: PyTree, x: PyTree, *, rule: rules.InvertRule
) -> tuple[PyTree, list[Any], PyTree]:
    """`(x, parameter gradients, ct_in)`, with `x` rebuilt from `y` unless it is given."""
    if x is not None:
        return x, *rules.layer_vjp(layer, x, ct_out)
    x, grads, ct_in = rule.backward(layer, y, res.restore(held, layer, None, None, ct_out), ct_out)
    return x, grads, trees.as_cotangent(ct_in, x)


#: Which of an operation's results are parameter gradients: outputs of the step, not temporaries.
GRADIENTS: dict[Callable[..., Any], int] = {
    store_backward: 0,
    offload_backward: 0,
    advance: 1,
    invert_backward: 1,
}


def gradients_of(operation: Callable[..., Any]) -> int | None:
    """Which of the results of `operation`, or of a partial of one, are parameter gradients; None: none."""
    return GRADIENTS.get(getattr(operation, "func", operation))
