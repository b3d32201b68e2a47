"""A scan whose stacked outputs do not exist before it begins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mwplan.common import trees

PyTree = Any


def scan(
    step: Callable[[PyTree, Any, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    rows: PyTree,
    count: int,
    *,
    reverse: bool = False,
) -> tuple[PyTree, PyTree]:
    """`carry, row = step(carry, i, rows[i])` for `i = 0 .. count - 1` (`reverse`: from the last); returns the
    last carry and the rows, stacked.

    As `lax.scan`, but for when the memory of what it stacks is taken: `lax.scan` makes it out of nothing, so
    that a compiler may do so at the very start of the program, and does. Here it is made from a number that
    is not there before the carry is.
    """
    # Flat, because the structure of what a step keeps (a derived backward function) is another object at each
    # trace.
    traced: list[Any] = []

    # Traced once, for its shapes and for the loop: loops stand within loops, and each level would double the
    # work.
    @functools.partial(jax.jit, inline=True)
    def flat(carry: PyTree, i: Any) -> tuple[PyTree, list[Any]]:
        carry, found = step(carry, i, row(rows, i))
        leaves, treedef = jax.tree.flatten(found)
        traced[:] = [treedef]
        return carry, leaves

    # Within `jax.shard_map` a loop's state keeps one type: what a step makes vary from device to device
    # varies from the start.
    while True:
        after, structs = jax.eval_shape(flat, carry, jax.ShapeDtypeStruct((), jnp.int32))
        axes = [trees.varying_axes(leaf) for leaf in jax.tree.leaves(after)]
        leaves, treedef = jax.tree.flatten(carry)
        loose = [
            trees.is_weak(now) and not trees.is_weak(then)
            for then, now in zip(jax.tree.leaves(after), leaves, strict=True)
        ]
        if all(then <= trees.varying_axes(now) for then, now in zip(axes, leaves)) and not any(loose):
            break
        leaves = [trees.vary(now, then) for then, now in zip(axes, leaves)]
        # Nor does it cease to be weakly typed: as with `lax.scan`, it is not so from the start.
        leaves = [lax.convert_element_type(a, a.dtype) if weak else a for a, weak in zip(leaves, loose)]
        carry = jax.tree.unflatten(treedef, leaves)
    carry, zero = _after(carry)
    out = [trees.vary(_filled((count, *s.shape), s.dtype, zero), trees.varying_axes(s)) for s in structs]

    def body(k: Any, state: Any) -> Any:
        carry, out = state
        i = jnp.asarray(count - 1 - k if reverse else k, jnp.int32)
        carry, found = flat(carry, i)
        return carry, put(out, found, i)

    carry, out = lax.fori_loop(0, count, body, (carry, out))
    out = [trees.typed_like(rows, s) for rows, s in zip(out, structs)]
    return carry, jax.tree.unflatten(traced[0], out)


def empty(size: int, dtype: Any, carry: PyTree) -> tuple[PyTree, Any]:
    """`carry`, and an array of zeros that does not exist before it."""
    carry, zero = _after(carry)
    return carry, _filled((size,), dtype, zero)


def row(rows: PyTree, i: Any) -> PyTree:
    """`rows[i]` of every array, `i` from 0 (negative ones are not looked for: that costs a kernel)."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False, allow_negative_indices=False), rows
    )


def put(rows: PyTree, new: PyTree, i: Any) -> PyTree:
    """`rows` with `new`, in their dtypes, for `rows[i]`."""
    return jax.tree.map(
        lambda old, one: lax.dynamic_update_index_in_dim(
            old, one if trees.is_key(old) else one.astype(old.dtype), i, 0, allow_negative_indices=False
        ),
        rows,
        new,
    )


def _filled(shape: tuple[int, ...], dtype: Any, zero: Any) -> Any:
    """Zeros (typed keys of zeros) made of `zero`."""
    return (
        jnp.full(shape, zero, dtype)
        if trees.is_key(jax.ShapeDtypeStruct(shape, dtype))
        else jnp.broadcast_to(zero.astype(dtype), shape)
    )


def _after(tree: PyTree) -> tuple[PyTree, Any]:
    """The same arrays, and a zero that is not known before them."""
    leaves, treedef = jax.tree.flatten(tree)
    *leaves, zero = lax.optimization_barrier([*leaves, jnp.zeros((), jnp.uint8)])
    return jax.tree.unflatten(treedef, leaves), zero
