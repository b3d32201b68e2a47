"""Small indices in the fewest bits."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

from mwplan.common import trees


def bits_for(count: int) -> int:
    """Bits of an index below `count`, of those that fill a byte evenly: 0, 1, 2, 4, 8; 16 and 32 beyond."""
    return next(b for b in (0, 1, 2, 4, 8, 16, 32) if count <= 1 << b)


def pack(index: Integer[Array, "*shape"], count: int) -> Array:
    """Indices below `count`, flattened, as few bytes as `bits_for` allows."""
    bits = bits_for(count)
    if bits >= 8:
        return index.ravel().astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits])
    if bits == 0:
        return jnp.zeros((0,), jnp.uint8)
    each = 8 // bits
    flat = index.ravel().astype(jnp.uint8)
    flat = jnp.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    shifts = jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(bits)
    return jnp.sum(flat << trees.along(shifts, flat), axis=-1, dtype=jnp.uint8)


def unpack(packed: UInt8[Array, " bytes"], count: int, shape: tuple[int, ...]) -> Integer[Array, "*shape"]:
    """The inverse of `pack`, as int32."""
    bits = bits_for(count)
    if bits >= 8:
        return packed.reshape(shape).astype(jnp.int32)
    if bits == 0:
        return jnp.zeros(shape, jnp.int32)
    each = 8 // bits
    shifts = jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(bits)
    flat = (packed[:, None] >> shifts[None]) & jnp.uint8((1 << bits) - 1)
    values: Array = flat.ravel()[: math.prod(shape)].reshape(shape).astype(jnp.int32)
    return values
