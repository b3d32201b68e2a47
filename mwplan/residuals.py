"""Splits what a rule keeps into what is new memory and what is there already, and packs it.

A rule's residuals are a pytree. Each array leaf is one of: a parameter of the layer, its input or its output (the same
object: found by identity at trace time, so nothing is guessed), one number throughout whatever the arguments (`jax.vjp` of `jax.nn.relu` keeps zeros
as large as the activation), or new. Only new leaves are held; booleans among them are packed, eight to a
byte (XLA stores a bool as a byte). The rest is looked up or made again when the residuals are restored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan import trees

PyTree = Any


@dataclass(frozen=True)
class _Spec:
    """Where each leaf comes from: `("own", i)`, `("bits", i, shape)`, `("all", number, shape, dtype)`, `("layer" | "input" | "output", i)`; and the treedef."""

    sources: tuple[tuple[Any, ...], ...]
    treedef: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """The new leaves of a rule's residuals, and how to find the others."""

    own: list[Any]
    spec: _Spec = field(metadata={"static": True})

    @property
    def keeps_input(self) -> bool:
        """Whether some leaf is the layer's input."""
        return any(s[0] == "input" for s in self.spec.sources)

    @property
    def keeps_output(self) -> bool:
        """Whether some leaf is the layer's output."""
        return any(s[0] == "output" for s in self.spec.sources)


def split(residuals: PyTree, layer: PyTree, x: PyTree, y: PyTree, numbers: Sequence[Any] = ()) -> Residuals:
    """Keeps of `residuals` what is new beside `layer`, `x` and `y`.

    `numbers`, if there are any: what `constants` says of each leaf. A leaf that appears twice is kept once. Call it where `residuals` was made: identity does not survive a `jit` boundary.
    """
    known: dict[int, tuple[Any, ...]] = {}
    for where, tree in (("output", y), ("input", x), ("layer", layer)):  # later wins: x is y is an input
        known.update({id(leaf): (where, i) for i, leaf in enumerate(jax.tree.leaves(tree))})
    leaves, treedef = jax.tree.flatten(residuals)
    own: list[Any] = []
    sources = []
    for leaf, number in zip(leaves, numbers or [None] * len(leaves), strict=True):
        source = known.get(id(leaf))
        if source is None:
            if number is not None:
                source = ("all", number, jnp.shape(leaf), jnp.result_type(leaf))
            elif jnp.result_type(leaf) == jnp.bool_ and math.prod(jnp.shape(leaf)) > 1:
                source = ("bits", len(own), jnp.shape(leaf))
                own.append(jnp.packbits(leaf))
            else:
                source = ("own", len(own))
                own.append(leaf)
            known[id(leaf)] = source
        sources.append(source)
    return Residuals(own, _Spec(tuple(sources), treedef))


def restore(held: Residuals, layer: PyTree, x: PyTree, y: PyTree) -> PyTree:
    """What `split` took apart. `x` and `y` may be None where no leaf came from them."""
    pools = {"layer": jax.tree.leaves(layer), "input": jax.tree.leaves(x), "output": jax.tree.leaves(y)}
    leaves = []
    for kind, index, *shape in held.spec.sources:
        if kind == "own":
            leaves.append(held.own[index])
        elif kind == "all":
            leaves.append(jnp.full(shape[0], index, shape[1]))
        elif kind == "bits":
            count = math.prod(shape[0])
            bits = jnp.unpackbits(held.own[index], count=count)
            leaves.append(bits.reshape(shape[0]).astype(jnp.bool_))
        else:
            leaves.append(pools[kind][index])
    return jax.tree.unflatten(held.spec.treedef, leaves)


def new_bytes(held: Residuals) -> int:
    """Bytes of the new leaves: what holding them costs."""
    return trees.nbytes(held.own)


def constants(function: Callable[..., Any], *args: PyTree) -> tuple[Any, ...]:
    """For each leaf of what `function(*args)` returns: the number that all its elements are whatever the arrays in `args`, or None.

    Nothing at all, `()`, where an argument has a part that cannot be hashed. **Cost:** one more trace of `function`, once for each structure of `args`.
    """
    leaves, treedef = jax.tree.flatten(args)
    kinds = tuple(
        jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype) if trees.is_array(leaf) else leaf for leaf in leaves
    )
    try:
        # Types tell 1 from 1.0 and True among the leaves that are no arrays; with `jax_enable_x64` numbers are of other precision.
        return _constants(function, treedef, kinds, (*map(type, leaves), jnp.result_type(float)))
    except TypeError:
        return ()


@functools.lru_cache(maxsize=512)
def _constants(
    function: Callable[..., Any], treedef: Any, kinds: tuple[Any, ...], more: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`constants`, remembered; `more`, what else tells calls apart."""
    where = [i for i, kind in enumerate(kinds) if isinstance(kind, jax.ShapeDtypeStruct)]

    def call(arrays: list[Any]) -> list[Any]:
        given = list(kinds)
        for i, array in zip(where, arrays):
            given[i] = array
        return jax.tree.leaves(function(*jax.tree.unflatten(treedef, given)))

    found = jax.make_jaxpr(call)([kinds[i] for i in where])
    return tuple(_number(found.jaxpr, var) for var in found.jaxpr.outvars)


def _number(jaxpr: Jaxpr, var: Any) -> Any:
    """What all elements of a variable are, if that is written in the program."""
    if isinstance(var, Literal):
        return np.asarray(var.val).item() if np.ndim(var.val) == 0 else None
    for eqn in jaxpr.eqns:
        if var not in eqn.outvars:
            continue
        if eqn.primitive.name in ("broadcast_in_dim", "copy", "reshape"):
            return _number(jaxpr, eqn.invars[0])
        if eqn.primitive.name == "convert_element_type":
            number = _number(jaxpr, eqn.invars[0])
            return None if number is None else np.asarray(number, eqn.params["new_dtype"]).item()
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name in ("jit", "pjit") and isinstance(inner, ClosedJaxpr):
            out = inner.jaxpr.outvars[eqn.outvars.index(var)]
            if out in inner.jaxpr.invars:
                return _number(jaxpr, eqn.invars[inner.jaxpr.invars.index(out)])
            return _number(inner.jaxpr, out)
    return None
