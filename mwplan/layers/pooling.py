"""Average and max pooling over windows that do not overlap, in any number of dimensions, channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mwplan.common.errors import ArgumentError
from mwplan.common.trees import along, widen
from mwplan.layers.linear import InputShape, LinearRule, WholeOf
from mwplan.network.bits import Packing
from mwplan.network.layer import layer, static
from mwplan.network.rules import StoreRule, Unavailable, VijpRule


def _windows(
    x: Float[Array, "*batch_space channels"], window: tuple[int, ...]
) -> Float[Array, "*batch_out window channels"]:
    """Each window's members along the last axis but one; what is left over at the end of an axis is cut
    off."""
    dims = len(window)
    if x.ndim < dims + 1 or any(n < w for n, w in zip(x.shape[-1 - dims : -1], window)):
        raise ArgumentError(
            f"`x.shape={x.shape}`: pooling over {window} needs as many spatial axes, as long, and channels "
            "last"
        )
    lead, space, channels = x.shape[: -1 - dims], x.shape[-1 - dims : -1], x.shape[-1]
    counts = [n // w for n, w in zip(space, window)]
    b = len(lead)
    x = x[(*(slice(None),) * b, *(slice(0, c * w) for c, w in zip(counts, window)))]
    x = x.reshape(*lead, *(part for c, w in zip(counts, window) for part in (c, w)), channels)
    order = [
        *range(b),
        *(b + 2 * a for a in range(dims)),
        *(b + 1 + 2 * a for a in range(dims)),
        b + 2 * dims,
    ]
    return x.transpose(order).reshape(*lead, *counts, math.prod(window), channels)


def _spread(members: Array, window: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The transpose of `_windows`: members back in place, zeros where they were cut off."""
    dims = len(window)
    lead, space, channels = shape[: -1 - dims], shape[-1 - dims : -1], shape[-1]
    counts = [n // w for n, w in zip(space, window)]
    b = len(lead)
    x = members.reshape(*lead, *counts, *window, channels)
    order = [*range(b), *(b + a + o for a in range(dims) for o in (0, dims)), b + 2 * dims]
    x = x.transpose(order).reshape(*lead, *(c * w for c, w in zip(counts, window)), channels)
    pads = [(0, 0)] * b + [(0, n - c * w) for n, c, w in zip(space, counts, window)] + [(0, 0)]
    return jnp.pad(x, pads)


@layer
class AveragePool:
    """The mean of each window of `window` positions, one entry a spatial axis; stride equal to the window.

    >>> mw.layers.AveragePool((2,))(jnp.array([[1.0], [3.0], [5.0], [7.0]])).ravel()
    Array([2., 6.], dtype=float32)
    """

    window: tuple[int, ...] = static(default=(2, 2))

    def linear(self, x: Float[Array, "*batch_space channels"]) -> Float[Array, "*batch_out channels"]:
        """The layer itself."""
        return jnp.mean(_windows(x, self.window), axis=-2)

    def __call__(self, x: Float[Array, "*batch_space channels"]) -> Float[Array, "*batch_out channels"]:
        """Applies the pooling."""
        return self.linear(x)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The sum over each window."""
        return [AverageSum()]


@dataclass(frozen=True)
class AverageSum(LinearRule):
    r"""$\bar x = \bar y / w$ at each of the $w$ members of a window, so $\bar y = \sum \bar x$ over the
    window.

    Nothing is erased or kept. **Cost:** one pass. Of noise in $\bar x$ only the window's mean survives:
    growth is below 1 relative to white noise, exactly 1 in the signal. **Source:** ours.
    """

    name: str = "sum"

    def rebuild(self, layer: AveragePool, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        return jnp.sum(_windows(ct_in, layer.window), axis=-2)


@layer
class MaxPool:
    """The largest of each window of `window` positions, the first of equals; stride equal to the window.

    >>> mw.layers.MaxPool((2,))(jnp.array([[1.0], [3.0], [5.0], [7.0]])).ravel()
    Array([3., 7.], dtype=float32)
    """

    window: tuple[int, ...] = static(default=(2, 2))

    def argmax(self, x: Float[Array, "*batch_space channels"]) -> Int[Array, "*batch_out 1 channels"]:
        """Which member of each window is the largest."""
        return jnp.argmax(_windows(x, self.window), axis=-2, keepdims=True)

    def __call__(self, x: Float[Array, "*batch_space channels"]) -> Float[Array, "*batch_out channels"]:
        """Applies the pooling."""
        return jnp.take_along_axis(_windows(x, self.window), self.argmax(x), axis=-2)[..., 0, :]

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Reading at the largest member."""
        return [MaxPoolRead(), WholeOf("whole_index", base=MaxPoolRead())]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """The index in the fewest bits."""
        return [MaxPoolIndex()]


@dataclass(frozen=True)
class MaxPoolIndex(StoreRule):
    """Keeps the index of each window's largest member: 2 bits for windows of 4, 4 up to 16, 8 up to 256."""

    name: str = "index"

    def forward(self, layer: MaxPool, x: Any) -> tuple[Any, Any]:
        """The pooling and the packed indices."""
        index = layer.argmax(x)
        packing = Packing.of(index.shape, math.prod(layer.window))
        return layer(x), (packing.pack(index), InputShape.of(x))

    def backward(self, layer: MaxPool, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; each cotangent at its window's largest member."""
        packed, was = residuals
        count = math.prod(layer.window)
        index = Packing.of(ct_out.shape, count).unpack(packed)
        index = index[..., None, :]
        hot = index == along(jnp.arange(count)[:, None], index)
        members = jnp.where(hot, ct_out[..., None, :], jnp.zeros((), ct_out.dtype))
        return [], _spread(members, layer.window, was.shape)


@dataclass(frozen=True)
class MaxPoolRead(VijpRule):
    r"""$\bar x$ is $\bar y$ at each window's largest member and zero elsewhere: the vijp reads it there.

    Nothing is erased. **Residuals:** the index in the fewest bits. **Cost:** one pass. **Growth:** at most 1,
    local error 0.
    **Source:** ours.
    """

    name: str = "read"

    def forward(self, layer: MaxPool, x: Any) -> tuple[Any, Any]:
        """The pooling and the packed indices."""
        return MaxPoolIndex().forward(layer, x)

    def reverse(self, layer: MaxPool, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """Each cotangent at its window's largest member."""
        _, ct_in = MaxPoolIndex().backward(layer, residuals, widen(ct_out))
        return ct_in, ()

    def rebuild(self, layer: MaxPool, x: Any, ct_in: Any, fragment: Any) -> Any:
        """The cotangent at the largest member of each window of `x`."""
        return jnp.take_along_axis(_windows(ct_in, layer.window), layer.argmax(x), axis=-2)[..., 0, :]
