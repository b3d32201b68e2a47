"""What is recognised, held against the function by numbers: before it is used."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.functions.piece_chain import Plan
from mwplan.functions.pieces import Piece
from mwplan.network import rules
from mwplan.network.chain import Chain, Stack
from mwplan.profiling.noise import random_cotangent

PyTree = Any
#: How far a layer's output and vjp may be from the function's, in units of the working precision's epsilon,
#: and at most.
EPSILONS, MOST = 1000, 0.05
#: The relative error with which a vijp must invert the vjp; how exact it is beyond that is measured.
INVERTS = 0.1


def problems(plan: Plan, chain: Chain, x: PyTree) -> dict[int, str]:
    """The pieces that are not what they are taken for, and why, at the chain's input `x` (arrays). Of loops
    the first repetition is looked at.

    **Cost:** a forward pass; of each known piece also two vjps and a vijp, compiled once for each kind."""
    found: dict[int, str] = {}
    forward = jax.jit(lambda one, x: one(x))
    last = max((i for i, piece in enumerate(plan.pieces) if piece.layers), default=-1)
    for part, group in zip(chain.parts, plan.groups, strict=True):
        if group.start > last:
            break
        at = x
        stacked = isinstance(part, Stack)
        for j, one in enumerate([part.layer(0, j) for j in range(len(part.block))] if stacked else [part]):
            if isinstance(one, Piece) and one.known is not None:
                why = problem(one.as_written, one, at)
                if why is not None:
                    found[group.start + j] = why
            at = forward(one, at)
        x = forward(part, x) if stacked else at
    return found


def problem(function: Any, layer: Any, x: PyTree) -> str | None:
    """Why `layer`, recognised in `function`, is not the same at `x` (arrays); None where it is."""
    rule = _first(layer, x)
    if rule is not None and rule.check(layer, trees.struct(x)) is not None:
        rule = None
    errors = jax.device_get(_errors(layer, x, _Held(function), rule))
    leaves = [leaf for leaf in jax.tree.leaves(x) if trees.is_inexact(leaf)]
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    allowed = min(EPSILONS * eps, MOST)
    texts = ("its output differs from that of", "its vjp differs from that of", "its vijp does not invert")
    for error, text, most in zip(errors, texts, (allowed, allowed, INVERTS)):
        if not error <= most:
            return f"recognised, but at this input {text} the function's operations by {error:.1e} (relative)"
    return None


def _first(layer: Any, x: PyTree) -> rules.VijpRule | None:
    """The vijp rule that is checked: the first of its own."""
    for one in rules.vijp_rules(layer, trees.struct(x)):
        if isinstance(one, rules.VijpRule) and not isinstance(one, rules.WholeFragment):
            return one
    return None


class _Held:
    """A function, told from others by what it is; a piece's operations are told by its structure."""

    def __init__(self, function: Any) -> None:
        self.function = function
        inner = getattr(function, "__self__", None)
        self.key = jax.tree.structure(inner) if isinstance(inner, Piece) else id(function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _errors(layer: Any, x: PyTree, held: _Held, rule: rules.VijpRule | None) -> list[Any]:
    """Relative distances of output and input vjp, and of what the vijp rebuilds (0 where there is none)."""
    function = layer.as_written if isinstance(layer, Piece) else held.function
    want, pull = jax.vjp(function, x)
    got, own = jax.vjp(lambda x: layer(x), x)
    ct = trees.cast_like(random_cotangent(want, jax.random.key(0)), want)
    (ct_in,), (ct_own,) = pull(ct), own(ct)
    found = [_distance(got, want), _distance(ct_own, ct_in)]
    if rule is None:
        return [*found, jnp.zeros(())]
    _, kept = rule.forward(layer, x)
    _, fragment = rule.reverse(layer, kept, trees.widen(ct))
    # The function's own vjp, not the rule's, is what must be inverted.
    return [*found, _distance(rule.rebuild(layer, x, trees.widen(ct_in), fragment), ct)]


def _distance(a: PyTree, b: PyTree) -> Any:
    pairs = zip(jax.tree.leaves(trees.widen(a)), jax.tree.leaves(trees.widen(b)), strict=True)
    some = [(p, q) for p, q in pairs if trees.is_inexact(q)]
    apart = sum((jnp.sum(jnp.abs(p - q) ** 2) for p, q in some), start=jnp.zeros(()))
    size = sum((jnp.sum(jnp.abs(q) ** 2) for _, q in some), start=jnp.zeros(()))
    return jnp.where(apart == 0, 0.0, jnp.sqrt(apart / size))
