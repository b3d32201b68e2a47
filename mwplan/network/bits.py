"""Small indices, masks among them, in few bits.

Which ones share a byte depends on the platform. Usually those that follow one another in memory. A TPU's
memory has tiles: a last axis of eight would be padded to 128, and one axis for all would be copied into
another order. There they lie apart, along an axis whose division costs no padding, so that packing is
arithmetic between slices and fuses with what makes the indices; where no axis saves bytes nothing is packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from mwplan.common import platforms, tiles


def bits_for(count: int) -> int:
    """Bits of an index below `count`, of those that fill a byte evenly: 0, 1, 2, 4, 8; 16 and 32 beyond."""
    return next(b for b in (0, 1, 2, 4, 8, 16, 32) if count <= 1 << b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How indices of one `shape` are packed, each in so many `bits`: along `axis`, or, where that is None,
    one after another.

    >>> from mwplan.network.bits import Packing
    >>> mask = jnp.arange(24).reshape(4, 6) % 5 == 0
    >>> packing = Packing.of(mask.shape, 2)
    >>> packed = packing.pack(mask)
    >>> packed.shape, bool(jnp.all(packing.unpack(packed) == mask))
    ((3,), True)
    """

    shape: tuple[int, ...]
    bits: int
    axis: int | None = None

    @classmethod
    def of(cls, shape: Sequence[int], count: int) -> Packing:
        """That of indices below `count`, for the platform that the program is being traced for."""
        shape, bits = tuple(shape), bits_for(count)
        if platforms.platform() != "tpu" or not 0 < bits < 8 or not math.prod(shape):
            return cls(shape=shape, bits=bits)
        axis = _axis(shape, 8 // bits)
        return cls(shape=shape, bits=8 if axis is None else bits, axis=axis)

    @property
    def worth(self) -> bool:
        """Whether packed indices take less memory than one a byte."""
        return self.bits < 8 and math.prod(self.shape) > 1

    @property
    def each(self) -> int:
        """How many share a byte."""
        return 8 // self.bits

    def pack(self, index: Integer[Array, "*shape"] | Bool[Array, "*shape"]) -> Array:
        """The packed indices, unsigned."""
        if self.bits >= 8:
            return index.astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[self.bits])
        if self.bits == 0:
            return jnp.zeros((0,), jnp.uint8)
        parts = self._apart(index.astype(jnp.uint8))
        shifts = self._shifts(parts)
        return jnp.sum(parts << shifts, axis=-1 if self.axis is None else self.axis, dtype=jnp.uint8)

    def unpack(self, packed: Array) -> Integer[Array, "*shape"]:
        """The inverse of `pack`, as int32."""
        if self.bits >= 8:
            return packed.astype(jnp.int32)
        if self.bits == 0:
            return jnp.zeros(self.shape, jnp.int32)
        mask = jnp.uint8((1 << self.bits) - 1)
        if self.axis is not None:
            # Not as a broadcast: XLA:TPU would write that out.
            slices = [(packed >> jnp.uint8(k * self.bits)) & mask for k in range(self.each)]
            whole = jnp.concatenate(slices, self.axis)
            return jax.lax.slice_in_dim(whole, 0, self.shape[self.axis], axis=self.axis).astype(jnp.int32)
        parts = jnp.expand_dims(packed, -1)
        flat: Array = ((parts >> self._shifts(parts)) & mask).ravel()[: math.prod(self.shape)]
        return flat.reshape(self.shape).astype(jnp.int32)

    def _apart(self, index: Array) -> Array:
        """With those that share a byte along an axis of their own: last, or before the axis that is
        divided."""
        if self.axis is None:
            return jnp.pad(index.ravel(), (0, -index.size % self.each)).reshape(-1, self.each)
        length = self.shape[self.axis]
        more = [(0, -length % self.each) if axis == self.axis else (0, 0) for axis in range(index.ndim)]
        return jnp.pad(index, more).reshape(self._divided())

    def _divided(self) -> tuple[int, ...]:
        """`shape` with the axis divided."""
        assert self.axis is not None
        rest = -(-self.shape[self.axis] // self.each)
        return (*self.shape[: self.axis], self.each, rest, *self.shape[self.axis + 1 :])

    def _shifts(self, parts: Array) -> Array:
        """Where in a byte the parts lie, along their axis."""
        shifts = jnp.arange(self.each, dtype=jnp.uint8) * jnp.uint8(self.bits)
        axis = parts.ndim - 1 if self.axis is None else self.axis
        return jnp.expand_dims(shifts, [one for one in range(parts.ndim) if one != axis])


def _axis(shape: tuple[int, ...], each: int) -> int | None:
    """The axis along which packing leaves the fewest bytes, of equal ones the first that lies along no tile;
    the first axis, of a batch that devices may share, only where no other saves any; None where none does.
    The order of axes in memory is taken to be that of what is packed."""
    order = tiles.order(shape)
    tiled = {axis % len(shape) for axis in order}

    def left(axis: int) -> int:
        return tiles.padded_along([-(-n // each) if k == axis else n for k, n in enumerate(shape)], order, 8)

    saving = [axis for axis in range(len(shape)) if left(axis) < tiles.padded_along(shape, order, 8)]
    return min(saving, key=lambda axis: (axis == 0, left(axis), axis in tiled), default=None)
