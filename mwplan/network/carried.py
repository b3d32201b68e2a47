"""Arrays that layers hand on as they are: masks, keys, an encoder's output, whatever later layers need.

A leaf of a layer's output that is a leaf of its input, the same array, is no new memory. Where it came into
being is its *root*: `(position, leaf)`. That is told from each layer's program, so nothing is guessed; a copy
is another array.

The cotangent of an array that is handed on from the chain's input, and so that of the input alone, is *idle*
where nobody asks for the input's gradient: it is not computed at all. In a cotangent's tree None stands for
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.network.canonical import CALLS
from mwplan.network.chain import Chain, Stack, one_block
from mwplan.network.rules import StoreRule, VjpStore

PyTree = Any
Root = tuple[int, int]
#: What `handed_on` found, for structures and shapes.
Known = dict[tuple[Any, ...], tuple[int | None, ...]]


def handed_on(one: PyTree, x: PyTree, known: Known | None = None) -> tuple[int | None, ...]:
    """For each leaf of `one(x)`, the leaf of `x` that it is, or None. `one`, `x`: arrays or shapes.

    **Cost:** one trace; none for layers of the structure and shapes of an earlier one with the same `known`,
    where what is found is written. It holds the layers' functions, and the arrays in them: its owner is to
    let go of it.
    """
    leaves, treedef = jax.tree.flatten((trees.struct(one), trees.struct(x)))
    args = (treedef, tuple(leaves), len(jax.tree.leaves(x)))
    if known is None:
        return _handed_on(*args)
    try:
        if args not in known:
            known[args] = _handed_on(*args)
    except TypeError:  # a structure that cannot be hashed
        return _handed_on(*args)
    remembered: tuple[int | None, ...] = known[args]
    return remembered


def _handed_on(treedef: Any, leaves: tuple[Any, ...], count: int) -> tuple[int | None, ...]:
    def call(*arrays: Any) -> list[Any]:
        one, x = jax.tree.unflatten(treedef, arrays)
        return jax.tree.leaves(one(x))

    jaxpr = jax.make_jaxpr(call)(*leaves).jaxpr
    first = len(leaves) - count
    found = (_argument(jaxpr, var) for var in jaxpr.outvars)
    return tuple(None if at is None or at < first else at - first for at in found)


def _argument(jaxpr: Jaxpr, var: Any) -> int | None:
    """Which of the program's arguments a variable is."""
    if isinstance(var, Literal):
        return None
    if var in jaxpr.invars:
        return jaxpr.invars.index(var)
    for eqn in jaxpr.eqns:
        if var not in eqn.outvars:
            continue
        at = eqn.outvars.index(var)
        if eqn.primitive.name == "optimization_barrier":
            return _argument(jaxpr, eqn.invars[at])
        inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        within = _argument(inner, inner.outvars[at]) if isinstance(inner, Jaxpr) else None
        return None if within is None else _argument(jaxpr, eqn.invars[within])
    return None


@dataclass(frozen=True)
class Carried:
    """What is handed on along a chain: for each position, the root of each leaf, and which leaves have an
    idle cotangent."""

    roots: tuple[tuple[Root, ...], ...]
    idle: tuple[frozenset[int], ...]

    @classmethod
    def along(cls, chain: Chain, structs: Sequence[PyTree], *, wrt_input: bool) -> Carried:
        """Of a chain whose boundaries are `structs`; `wrt_input`, whether anybody asks for the gradient of
        its input."""
        leaves = [jax.tree.leaves(struct) for struct in structs]
        roots: list[tuple[Root, ...]] = [tuple((0, k) for k in range(len(leaves[0])))]
        known: Known = {}
        for part in chain.parts:
            block = one_block(part) if isinstance(part, Stack) else (part,)
            at = len(roots) - 1
            kept = [handed_on(one, structs[at + j], known) for j, one in enumerate(block)]
            for _ in range(part.depth if isinstance(part, Stack) else 1):
                for one in kept:
                    position, before = len(roots), roots[-1]
                    now = ((position, k) if i is None else before[i] for k, i in enumerate(one))
                    roots.append(tuple(now))
        further = {root for some in roots[1:] for root in some if root[0] == 0}
        idle = [
            frozenset(
                k
                for k, root in enumerate(some)
                if not wrt_input and root in further and trees.is_inexact(leaves[i][k])
            )
            for i, some in enumerate(roots)
        ]
        return cls(tuple(roots), tuple(idle))

    def window(self, start: int, stop: int) -> Carried:
        """From one position to another."""
        return Carried(self.roots[start : stop + 1], self.idle[start : stop + 1])

    def throughout(self) -> dict[Root, int]:
        """The roots of the leaves that are the same leaf, and the same array, at the first and at the last
        position, and which leaf."""
        first, last = self.roots[0], self.roots[-1]
        return {root: k for k, root in enumerate(first) if k < len(last) and last[k] == root}

    def without(self, x: PyTree, position: int, roots: dict[Root, int]) -> PyTree:
        """`x`, of this position, with None for the leaves of these roots."""
        leaves, treedef = jax.tree.flatten(x)
        some = zip(leaves, self.roots[position], strict=True)
        return jax.tree.unflatten(treedef, [None if root in roots else leaf for leaf, root in some])

    def with_(self, x: PyTree, position: int, roots: dict[Root, int], values: Sequence[Any]) -> PyTree:
        """What `without` took from, with the leaves `values` of the first position."""
        leaves, treedef = jax.tree.flatten(x, is_leaf=lambda leaf: leaf is None)
        some = zip(leaves, self.roots[position], strict=True)
        whole = [values[roots[root]] if root in roots else leaf for leaf, root in some]
        return jax.tree.unflatten(treedef, whole)

    def dropped(self, ct: PyTree, position: int) -> PyTree:
        """A cotangent without what is idle in it."""
        return dropped(ct, self.idle[position])

    def filled(self, ct: PyTree, position: int, struct: PyTree) -> PyTree:
        """A cotangent with zeros where it is idle; `struct`, the shapes of the activation."""
        if not self.idle[position]:
            return ct
        leaves, treedef = jax.tree.flatten(ct, is_leaf=lambda leaf: leaf is None)
        shapes = jax.tree.leaves(struct)
        whole = [_zeros(shapes[k]) if k in self.idle[position] else leaf for k, leaf in enumerate(leaves)]
        return jax.tree.unflatten(treedef, whole)

    def store(self, rule: StoreRule, position: int, before: PyTree, after: PyTree) -> StoreRule:
        """`rule` of the layer that makes `x_position`, of shape `after` from `before`, for cotangents
        without what is idle."""
        return wanted(rule, self.idle[position - 1], self.idle[position], before, after)


def wanted(rule: StoreRule, idle: frozenset[int], missing: frozenset[int], x: PyTree, y: PyTree) -> StoreRule:
    """`rule` of a layer from `x` to `y`, shapes, without the cotangents of the input's leaves `idle` and of
    the output's leaves `missing`."""
    if not idle and not missing:
        return rule
    leaves = jax.tree.leaves(y)
    shapes = tuple((k, leaves[k].shape, str(leaves[k].dtype)) for k in sorted(missing))
    return Wanted(rule.name, rule, idle, shapes, jax.tree.structure(x))


def dropped(ct: PyTree, idle: frozenset[int]) -> PyTree:
    """A cotangent with None for the leaves `idle`."""
    if not idle:
        return ct
    leaves, treedef = jax.tree.flatten(ct, is_leaf=lambda leaf: leaf is None)
    return jax.tree.unflatten(treedef, [None if k in idle else leaf for k, leaf in enumerate(leaves)])


def _zeros(struct: Any) -> Any:
    return jnp.zeros(struct.shape, struct.dtype)


@dataclass(frozen=True)
class Wanted(StoreRule):
    """`rule`, without the cotangents of the input's leaves `idle`; those of the output's `missing`, `(leaf,
    shape, dtype)`, are not given, and count as zeros.

    What `jax.vjp` keeps is then what the other cotangents need.
    """

    name: str
    rule: StoreRule
    idle: frozenset[int]
    missing: tuple[tuple[int, tuple[int, ...], str], ...]
    treedef: Any

    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """As the rule's; of `VjpStore` with respect to what is wanted."""
        if not isinstance(self.rule, VjpStore):
            return self.rule.forward(layer, x)
        leaves = jax.tree.leaves(x)

        def call(params: list[Any], wanted: list[Any]) -> PyTree:
            given = iter(wanted)
            whole = [leaf if k in self.idle else next(given) for k, leaf in enumerate(leaves)]
            return trees.with_parameters(layer, params)(jax.tree.unflatten(self.treedef, whole))

        kept = call if self.rule.policy is None else jax.checkpoint(call, policy=self.rule.policy)
        wanted = [leaf for k, leaf in enumerate(leaves) if k not in self.idle]
        y, vjp = jax.vjp(kept, trees.parameters(layer), wanted)
        return y, vjp

    def backward(self, layer: PyTree, residuals: PyTree, ct_out: PyTree) -> tuple[list[Any], PyTree]:
        """As the rule's, None for what is idle."""
        leaves, treedef = jax.tree.flatten(ct_out, is_leaf=lambda leaf: leaf is None)
        for k, shape, dtype in self.missing:
            leaves[k] = jnp.zeros(shape, dtype)
        ct_out = jax.tree.unflatten(treedef, leaves)
        if not isinstance(self.rule, VjpStore):
            params, ct_in = self.rule.backward(layer, residuals, ct_out)
            return params, dropped(ct_in, self.idle)
        params, wanted = residuals(ct_out)
        given = iter(wanted)
        whole = [None if k in self.idle else next(given) for k in range(self.treedef.num_leaves)]
        return params, jax.tree.unflatten(self.treedef, whole)
