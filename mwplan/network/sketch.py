r"""Small random sketches: how far are two arrays apart, from 64 numbers of each.

The entries of an array, as rows of up to 512, are multiplied with 8 fixed vectors of random signs, and the
rows of the result added up in 8 groups, again with random signs: each of the 64 numbers is such a sum over an
eighth of the rows. The squared distance of two sketches is an unbiased estimate of eight times the squared
distance of the arrays, with a relative standard deviation of $\sqrt{2/64} = 0.18$ where they differ in many
rows independently, and of $\sqrt{2/8} = 0.5$ where they differ alike in all, or in one.

A product needs a 64th of the memory of what it reads; signs for every entry would be an array as large. Of an
array of more than a thousand rows the first product's work and memory are saved: about 32 stretches of rows
are added up first, with random signs, into one (at most a 256th of the array; a product of the strided rows
would first copy them), and only every seventh is read (or every eleventh and so on: a prime that does not
divide their number, so that rows from everywhere in the repeating structure of images and batches are among
them): a difference that is confined to a few rows in a row may be missed, one that is in an example, a
channel or an edge is not. **Source:** sign sketches are those of Achlioptas, JCSS 66(4), 2003, and Charikar,
Chen, Farach-Colton, TCS 312(1), 2004; their product is ours.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mwplan.common import trees

SIZE = 64
_VECTORS = 8
_LONGEST = 512
_MANY = 1024  # rows
_STRETCHES = 32
_STRIDES = (7, 11, 13, 17, 19)


def take(tree: Any) -> Float[Array, " 64"]:
    """The sketch of all inexact leaves of `tree`, in float32 or wider. Cost: one pass over them, or over a
    seventh of the large ones."""
    total = jnp.zeros(SIZE, jnp.float32)
    for salt, leaf in enumerate(leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)):
        if leaf.size:
            total = total + _one(leaf, salt)
    return total


def _one(leaf: Array, salt: int) -> Float[Array, " 64"]:
    if jnp.iscomplexobj(leaf):
        leaf = leaf.real + leaf.imag
    flat = leaf.reshape(-1)
    most = min(_LONGEST, max(_VECTORS, leaf.size // SIZE))  # of a small array, shorter rows rather than few
    columns = next(c for c in range(most, 0, -1) if leaf.size % c == 0)
    if columns < most // 8:  # a size without divisors
        columns, flat = most, jnp.pad(flat, (0, -leaf.size % most))
    signs = np.where(_bits(np.arange(columns * _VECTORS, dtype=np.uint32), salt), 1, -1).reshape(
        columns, _VECTORS
    )
    lines = flat.reshape(-1, columns)
    if len(lines) > _MANY:
        lines = _folded(lines, next((p for p in _STRIDES if len(lines) % p), 23), salt)
    rows = jax.lax.dot(
        lines,
        jnp.asarray(signs, lines.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=trees.working_dtype(leaf.dtype),
    )
    index = jnp.arange(rows.shape[0], dtype=jnp.uint32)
    signed = jnp.where(_bits(index, salt + 1)[:, None], rows, -rows)
    padded = jnp.pad(signed, ((0, -len(rows) % _VECTORS), (0, 0)))
    return padded.reshape(-1, SIZE).sum(axis=0)


def _folded(lines: Array, stride: int, salt: int) -> Array:
    """Every `stride`th row, about 32 stretches of them added up with random signs, in float32 or wider: one
    fused loop, which copies nothing but the few rows left.

    All stretches are equally long: padding takes the loop's vector instructions, six times the time.
    """
    dtype = trees.working_dtype(lines.dtype)
    count = -(-len(lines) // stride)
    most = min(_STRETCHES, count // _VECTORS)
    stretches = min(range(most, most * 3 // 4, -1), key=lambda n: count % n)
    length = count // stretches
    signs = np.where(_bits(np.arange(count, dtype=np.uint32), salt + 2), 1, -1)[:, None]

    def part(start: int, stop: int) -> Array:
        rows = lines[start * stride : min(stop * stride, len(lines)) : stride].astype(dtype)
        return rows * jnp.asarray(signs[start:stop], dtype)

    total = functools.reduce(jnp.add, (part(n * length, (n + 1) * length) for n in range(stretches)))
    if rest := count % stretches:
        total = jnp.concatenate([total, part(count - rest, count)])
    tied: Array = trees.tie(total)
    return tied


def _bits(index: Any, salt: int) -> Any:
    """A fixed pseudo-random bit for each `uint32` of `index`."""
    mixed = (index + np.uint32(97 * salt + 1)) * np.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(2246822519)
    return (mixed >> 31) == 0


def discrepancy(truth: Float[Array, " 64"], got: Float[Array, " 64"]) -> Float[Array, ""]:
    """Relative distance `|got - truth| / |truth|`; 0 where both are 0."""
    distance, size = jnp.linalg.norm(got - truth), jnp.linalg.norm(truth)
    return jnp.where(distance == 0, 0.0, distance / size).astype(jnp.float32)
