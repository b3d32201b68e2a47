"""Real transforms over spatial axes, also of no examples (which XLA:CPU's transform does not survive)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def rfftn(
    v: Float[Array, "lead *size trail"], grid: Sequence[int], axes: Sequence[int]
) -> Complex[Array, "lead *half trail"]:
    """The half spectrum of `v`, zero-padded to `grid` along `axes`."""
    if v.size:
        return jnp.fft.rfftn(v, s=grid, axes=axes)
    return jnp.zeros(_with(v.shape, axes, [*grid[:-1], grid[-1] // 2 + 1]), jnp.result_type(v, jnp.complex64))


def irfftn(
    v: Complex[Array, "lead *half trail"], grid: Sequence[int], axes: Sequence[int]
) -> Float[Array, "lead *grid trail"]:
    """The inverse of `rfftn`."""
    if v.size:
        return jnp.fft.irfftn(v, s=grid, axes=axes)
    return jnp.zeros(_with(v.shape, axes, grid), v.real.dtype)


def _with(shape: tuple[int, ...], axes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    made = list(shape)
    for axis, size in zip(axes, sizes):
        made[axis] = size
    return tuple(made)
