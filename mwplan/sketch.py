"""Small random sketches: how far are two arrays apart, from 64 numbers of each.

A sketch is a sum of all entries with fixed pseudo-random signs, spread over 64 buckets (a count sketch): the squared distance of
two sketches is an unbiased estimate of the squared distance of the arrays, with a relative standard deviation of
sqrt(2/64) = 0.18.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan import trees

SIZE = 64


def take(tree: Any) -> Float[Array, " 64"]:
    """The sketch of all inexact leaves of `tree`, in float32 or wider. Cost: one pass, fused into what made them."""
    total = jnp.zeros(SIZE, jnp.float32)
    for salt, leaf in enumerate(leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)):
        flat = leaf.astype(trees.working_dtype(leaf.dtype)).reshape(-1)
        if jnp.iscomplexobj(flat):
            flat = flat.real + flat.imag
        mixed = jnp.arange(flat.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(salt * 97 + 1)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
        signed = jnp.where((mixed >> 31) == 0, flat, -flat)
        padded = jnp.pad(signed, (0, -flat.size % SIZE))
        total = total + padded.reshape(-1, SIZE).sum(axis=0)
    return total


def discrepancy(truth: Float[Array, " 64"], got: Float[Array, " 64"]) -> Float[Array, ""]:
    """Relative distance `|got - truth| / |truth|`; 0 where both are 0."""
    distance, size = jnp.linalg.norm(got - truth), jnp.linalg.norm(truth)
    return jnp.where(distance == 0, 0.0, distance / size).astype(jnp.float32)
