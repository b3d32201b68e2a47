"""Splits what a rule keeps into what is new memory and what is there already, and packs it.

A rule's residuals are a pytree. Each array leaf is one of: a parameter of the layer, its input or its output (the same
object: found by identity at trace time, so nothing is guessed), or new. Only new leaves are held; booleans among them are packed, eight to a
byte (XLA stores a bool as a byte). The rest is looked up again when the residuals are restored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mwplan import trees

PyTree = Any


@dataclass(frozen=True)
class _Spec:
    """Where each leaf comes from: `("own", i)`, `("bits", i, shape)`, `("layer" | "input" | "output", i)`; and the treedef."""

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


def split(residuals: PyTree, layer: PyTree, x: PyTree, y: PyTree) -> Residuals:
    """Keeps of `residuals` what is new beside `layer`, `x` and `y`.

    A leaf that appears twice is kept once. Call it where `residuals` was made: identity does not survive a `jit` boundary.
    """
    known: dict[int, tuple[Any, ...]] = {}
    for where, tree in (("output", y), ("input", x), ("layer", layer)):  # later wins: x is y is an input
        known.update({id(leaf): (where, i) for i, leaf in enumerate(jax.tree.leaves(tree))})
    leaves, treedef = jax.tree.flatten(residuals)
    own: list[Any] = []
    sources = []
    for leaf in leaves:
        source = known.get(id(leaf))
        if source is None:
            if jnp.result_type(leaf) == jnp.bool_ and math.prod(jnp.shape(leaf)) > 1:
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
