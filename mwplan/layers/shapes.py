"""Layers that move numbers and change none: flatten, reshape, permute, split, concatenate, swap, space to
depth, channel padding.

All act on trailing axes and accept any leading ones. Their transposes are their inverses, so the vijp is the
layer itself applied to the cotangent: exact, no residuals, growth 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.layers.linear import LinearRule
from mwplan.network.layer import layer, static
from mwplan.network.rules import InvertRule, Unavailable, VijpRule


class _Moves:
    """Base of layers that only move numbers: `linear` and `undo`."""

    def linear(self, x: Any) -> Any:
        """The layer itself."""
        raise NotImplementedError

    def __call__(self, x: Any) -> Any:
        """Applies the layer, to an array or, if it is `Concatenate`, to a tuple of them."""
        return self.linear(x)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The layer itself, applied to the cotangent."""
        return [Move()]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Moving back."""
        return [MoveBack(tuple(x.shape))]


@dataclass(frozen=True)
class Move(LinearRule):
    r"""The Jacobian is a permutation $P$: $\bar y = \bar x P$. Nothing is erased or kept, growth 1, local
    error 0."""

    name: str = "move"

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """The layer, applied to the cotangent."""
        return layer.linear(ct_in)


@dataclass(frozen=True)
class MoveBack(InvertRule):
    """The transpose of a permutation is its inverse. `shape`: of one input, of which only trailing axes
    matter; of `Concatenate`, its parts' sizes."""

    shape: tuple[int, ...]
    name: str = "move"

    def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
        """`x`."""
        return layer.undo(y, self.shape)


@layer
class Flatten(_Moves):
    """Joins the last `axes` axes into one.

    >>> mw.layers.Flatten(2)(jnp.ones((5, 2, 3))).shape
    (5, 6)
    """

    axes: int = static(default=3)

    def linear(self, x: Array) -> Array:
        """The layer itself."""
        if x.ndim < self.axes:
            raise ArgumentError(f"`x.shape={x.shape}`: Flatten({self.axes}) needs {self.axes} axes")
        lead = x.shape[: x.ndim - self.axes]
        return x.reshape(*lead, math.prod(x.shape[len(lead) :]))

    def undo(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, for an input of `shape`."""
        return y.reshape(*y.shape[:-1], *shape[len(shape) - self.axes :])


@layer
class Reshape(_Moves):
    """Trailing axes of shape `before` become `after`.

    >>> mw.layers.Reshape((6,), (2, 3))(jnp.ones((5, 6))).shape
    (5, 2, 3)
    """

    before: tuple[int, ...] = static()
    after: tuple[int, ...] = static()

    def linear(self, x: Array) -> Array:
        """The layer itself."""
        if math.prod(self.before) != math.prod(self.after):
            raise ArgumentError(f"`before={self.before}` and `after={self.after}` differ in size")
        lead = x.ndim - len(self.before)
        if lead < 0 or x.shape[lead:] != self.before:
            raise ArgumentError(f"`x.shape={x.shape}`: this Reshape takes trailing axes {self.before}")
        return x.reshape(*x.shape[:lead], *self.after)

    def undo(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The inverse."""
        return y.reshape(*y.shape[: y.ndim - len(self.after)], *self.before)


@layer
class Permute(_Moves):
    """Permutes the trailing axes: axis `a` of the output's trailing axes is axis `order[a]` of the
    input's.

    >>> mw.layers.Permute((1, 0))(jnp.ones((5, 2, 3))).shape
    (5, 3, 2)
    """

    order: tuple[int, ...] = static()

    def linear(self, x: Array) -> Array:
        """The layer itself."""
        return _permute(x, self.order)

    def undo(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The inverse."""
        return _permute(y, tuple(self.order.index(a) for a in range(len(self.order))))


def _permute(x: Array, order: tuple[int, ...]) -> Array:
    lead = x.ndim - len(order)
    if lead < 0 or sorted(order) != list(range(len(order))):
        raise ArgumentError(f"`order={order}` must be a permutation of at most {x.ndim} axes")
    return x.transpose(*range(lead), *(lead + a for a in order))


@layer
class Split(_Moves):
    """The last axis in `parts` equal parts: a tuple of arrays, as `Coupling` takes them.

    >>> [part.shape for part in mw.layers.Split()(jnp.ones((5, 6)))]
    [(5, 3), (5, 3)]
    """

    parts: int = static(default=2)

    def linear(self, x: Array) -> tuple[Array, ...]:
        """The layer itself."""
        if x.ndim < 1 or self.parts < 1 or x.shape[-1] % self.parts:
            raise ArgumentError(
                f"`x.shape={x.shape}`: Split({self.parts}) needs a multiple of {self.parts} channels on the "
                "last axis"
            )
        return tuple(jnp.split(x, self.parts, -1))

    def undo(self, y: Any, shape: tuple[int, ...]) -> Array:
        """The inverse."""
        return jnp.concatenate(y, -1)


@layer
class Concatenate(_Moves):
    """The arrays of a tuple, one after the other along the last axis.

    >>> mw.layers.Concatenate()((jnp.ones((5, 3)), jnp.ones((5, 3)))).shape
    (5, 6)
    """

    def linear(self, x: tuple[Array, ...]) -> Array:
        """The layer itself."""
        if not isinstance(x, tuple) or not x:
            raise ArgumentError(f"`x` must be a tuple of arrays for Concatenate, got {type(x).__name__}")
        return jnp.concatenate(x, -1)

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Splitting."""
        return [MoveBack(tuple(one.shape[-1] for one in x))]

    def undo(self, y: Array, shape: tuple[int, ...]) -> Any:
        """The inverse, for parts of the sizes `shape`."""
        return tuple(jnp.split(y, list(itertools.accumulate(shape))[:-1], -1))


@layer
class Swap(_Moves):
    """Exchanges the halves of the last axis.

    >>> mw.layers.Swap()(jnp.arange(4.0)).tolist()
    [2.0, 3.0, 0.0, 1.0]
    """

    def linear(self, x: Array) -> Array:
        """The layer itself."""
        if x.ndim < 1 or x.shape[-1] % 2:
            raise ArgumentError(
                f"`x.shape={x.shape}`: Swap needs an even number of channels on the last axis"
            )
        half = x.shape[-1] // 2
        return jnp.concatenate([x[..., half:], x[..., :half]], -1)

    def undo(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, which is the layer."""
        return self.linear(y)


@layer
class SpaceToDepth(_Moves):
    """Moves each block of `block` positions, one entry a spatial axis, into the channels: positions first,
    channels last.

    >>> mw.layers.SpaceToDepth()(jnp.ones((5, 4, 4, 3))).shape
    (5, 2, 2, 12)
    """

    block: tuple[int, ...] = static(default=(2, 2))

    def linear(self, x: Array) -> Array:
        """The layer itself."""
        dims = len(self.block)
        lead = x.ndim - dims - 1
        if lead < 0 or any(n % s for n, s in zip(x.shape[lead:-1], self.block)):
            raise ArgumentError(
                f"`x.shape={x.shape}`: the spatial sizes must be multiples of {self.block}, channels last"
            )
        counts = [n // s for n, s in zip(x.shape[lead:-1], self.block)]
        split = x.reshape(
            *x.shape[:lead], *(p for c, s in zip(counts, self.block) for p in (c, s)), x.shape[-1]
        )
        order = (*(2 * a for a in range(dims)), *(2 * a + 1 for a in range(dims)), 2 * dims)
        return _permute(split, order).reshape(*x.shape[:lead], *counts, math.prod(self.block) * x.shape[-1])

    def undo(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The inverse: depth to space."""
        dims = len(self.block)
        lead = y.ndim - dims - 1
        counts = y.shape[lead:-1]
        split = y.reshape(*y.shape[:lead], *counts, *self.block, -1)
        order = (*(p for a in range(dims) for p in (a, dims + a)), 2 * dims)
        return _permute(split, order).reshape(
            *y.shape[:lead], *(c * s for c, s in zip(counts, self.block)), split.shape[-1]
        )


@layer
class PadChannels:
    """Appends `extra` channels of zeros.

    >>> mw.layers.PadChannels(2)(jnp.ones((5, 3))).shape
    (5, 5)
    """

    extra: int = static(default=1)

    def linear(self, x: Array) -> Array:
        """The layer itself."""
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.extra)])

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch more"]:
        """Applies the layer."""
        return self.linear(x)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The cotangent of the padded channels as the fragment."""
        return [PadAppend()]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Cutting off."""
        return [PadCut()]


@dataclass(frozen=True)
class PadAppend(LinearRule):
    """The kept channels are `ct_in`; erased is the cotangent of the padded ones, which is the fragment.
    Growth 1, local error 0."""

    name: str = "padded"
    has_fragment: bool = True

    def fragment(self, layer: PadChannels, residuals: Any, ct_out: Any) -> Any:
        """The last `extra` channels."""
        return trees.widen(ct_out)[..., ct_out.shape[-1] - layer.extra :]

    def rebuild(self, layer: PadChannels, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_in` and the fragment, side by side."""
        return jnp.concatenate([ct_in, fragment], -1)


@dataclass(frozen=True)
class PadCut(InvertRule):
    """Drops the padded channels."""

    name: str = "cut"

    def inverse(self, layer: PadChannels, y: Any, kept: Any) -> Any:
        """`x`."""
        return y[..., : y.shape[-1] - layer.extra]
