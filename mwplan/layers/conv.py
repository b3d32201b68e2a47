r"""Convolutions in one and two dimensions: the layers. Their vijps are in `spectral`, `pointwise` and
`block`.

Channels last: `*batch *space channels`. Any stride, dilation, number of groups, and zero or circular padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mwplan.common import platforms, trees
from mwplan.common.errors import ArgumentError
from mwplan.layers import block, pointwise, spectral
from mwplan.layers.bilinear import bilinear
from mwplan.layers.circular import Circular, convolve
from mwplan.layers.geometry import Geometry, Padding, geometry
from mwplan.layers.linear import cast, times
from mwplan.network.layer import layer, static
from mwplan.network.rules import InvertRule, Unavailable, VijpRule


class _Conv:
    """Base of `Conv1D` and `Conv2D`; `dims` spatial axes."""

    weight: Array
    bias: Array | None
    basis: spectral.Basis | None
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int

    @property
    def dims(self) -> int:
        """The number of spatial axes."""
        return self.weight.ndim - 2

    def geometry(self, shape: Sequence[int]) -> Geometry:
        """Where the taps fall for an input of `shape`. Raises `ArgumentError` where the layer does not take
        it."""
        channels = self.weight.shape[-2] * self.groups
        if len(shape) < self.dims + 1 or shape[-1] != channels:
            raise ArgumentError(
                f"`x.shape={tuple(shape)}`: this {type(self).__name__} takes {self.dims} spatial axes and "
                f"{channels} channels, last"
            )
        return geometry(
            shape[-1 - self.dims : -1],
            self.weight.shape[: self.dims],
            self.stride,
            self.padding,
            self.dilation,
        )

    def pad(self, x: Array, g: Geometry) -> Array:
        """The padded input, for one leading axis."""
        widths = [(0, 0), *g.pads, (0, 0)]
        return jnp.pad(x, widths, mode="wrap" if g.circular else "constant")

    def valid(self, padded: Array) -> Array:
        """The convolution of an input that is padded already, for one leading axis; no bias."""
        return self._convolve(padded, ((0, 0),) * self.dims)

    def _convolve(self, x: Array, pads: Sequence[tuple[int, int]]) -> Array:
        kernel = self.weight.shape[0]
        # XLA:CPU (jaxlib 0.10.2) is up to ten times slower without any padding: a row of zeros is added, and
        # its output cut off.
        slow = not any(map(any, pads)) and kernel > 1 and self.dims == 2 and platforms.platform() == "cpu"
        pads = ((0, 1), *pads[1:]) if slow else pads
        y = convolve(x, cast(self.weight, x.dtype), pads, self.stride, self.dilation, self.groups)
        return y[:, : (x.shape[1] - self.dilation[0] * (kernel - 1) - 1) // self.stride[0] + 1] if slow else y

    def _without_copy(self, g: Geometry) -> bool:
        """Whether it is a `Circular`, which needs no padded copy of its input."""
        plain = set(self.stride) == {1} and self.groups == 1
        return g.circular and plain and all(r <= n for r, n in zip(g.reach, g.size))

    def linear(self, x: Array) -> Array:
        """The layer without its bias, any leading axes."""
        g = self.geometry(x.shape)
        if self._is_product(g, x):
            return self._product(x, None)
        lead = x.shape[: -1 - self.dims]
        flat = cast(x, jnp.result_type(x, self.weight)).reshape(math.prod(lead), *x.shape[len(lead) :])
        if not g.circular:
            y = self._convolve(flat, g.pads)
        elif self._without_copy(g) and not trees.explicitly_sharded((flat, self.weight)):
            y = bilinear(Circular(g.pads, self.dilation), flat, cast(self.weight, flat.dtype))
        else:
            y = self.valid(self.pad(flat, g))
        return y.reshape(*lead, *y.shape[1:])

    def __call__(self, x: Array) -> Array:
        """Applies the layer."""
        if self._is_product(self.geometry(x.shape), x):
            return self._product(x, self.bias)
        y = self.linear(x)
        return y if self.bias is None else y + trees.along(self.bias, y)

    def _is_product(self, g: Geometry, x: Array) -> bool:
        """Whether the layer is one product of matrices. XLA:CPU (jaxlib 0.10.2) takes four times as long for
        the weight's gradient of a convolution with one tap; TPUs compute products as convolutions."""
        if platforms.platform() == "tpu":
            return False
        single = math.prod((*g.kernel, *self.stride, self.groups)) == 1 and not any(map(any, g.pads))
        return single and not trees.explicitly_sharded((x, self.weight))

    def _product(self, x: Array, bias: Array | None) -> Array:
        x = cast(x, jnp.result_type(x, self.weight))
        return times(x, cast(self.weight, x.dtype).reshape(self.weight.shape[-2:]), bias)

    def with_basis(self, x: Any, fraction: float = 0.5) -> Self:
        """This layer with a basis for the `cokernel_*` options, for inputs like `x` (array or struct). An SVD
        a frequency."""
        if not 0 < fraction <= 1:
            raise ArgumentError(f"`fraction={fraction!r}` must be above 0 and at most 1")
        basis = spectral.make_basis(self, self.geometry(x.shape), fraction)
        return dataclasses.replace(self, basis=basis)  # type: ignore[type-var]

    def refresh(self) -> Self:
        """This layer with its basis made anew from the present weight; itself where it has none."""
        if self.basis is None:
            return self
        return dataclasses.replace(self, basis=spectral.renew_basis(self, self.basis))  # type: ignore[type-var]

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The pointwise, the spectral, the block and the cokernel rules, as the shapes allow."""
        g = self.geometry(x.shape)
        return [*pointwise.rules(self, g), *spectral.rules(self, g), *block.rules(self, g)]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Circular convolutions can be inverted in the Fourier domain."""
        return spectral.invert_rules(self, self.geometry(x.shape), x)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _delta(
    key: Array, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], inner: int, outer: int
) -> Array:
    """Delta-orthogonal taps: a semi-orthogonal matrix over the centre taps, one for each phase of the stride,
    zero elsewhere."""
    one = any(d > 1 for d in dilation)
    width = [1 if one else min(k, s) for k, s in zip(kernel, stride)]
    matrix = jax.nn.initializers.orthogonal()(key, (math.prod(width) * inner, outer))
    start = [(k - w) // 2 for k, w in zip(kernel, width)]
    pads = [(a, k - w - a) for a, k, w in zip(start, kernel, width)]
    return jnp.pad(matrix.reshape(*width, inner, outer), [*pads, (0, 0), (0, 0)])


Convolution = TypeVar("Convolution", bound="_Conv")


def _make(
    cls: Callable[..., Convolution],
    key: Array,
    inner: int,
    outer: int,
    kernel: tuple[int, ...],
    he: float | None,
    stride: tuple[int, ...],
    padding: Padding,
    dilation: tuple[int, ...],
    groups: int,
    bias: bool,
    dtype: Any,
) -> Convolution:
    if inner % groups or outer % groups:
        raise ArgumentError(f"`groups={groups}` must divide both {inner} inputs and {outer} outputs")
    if he is None:
        keys = jax.random.split(key, groups)
        taps = [
            _delta(k, tuple(kernel), tuple(stride), tuple(dilation), inner // groups, outer // groups)
            for k in keys
        ]
        weight = jnp.concatenate(taps, -1)
    else:
        fan = math.prod(kernel) * inner // groups
        scale = math.sqrt(2.0 / (1.0 + he**2) / fan)
        weight = scale * jax.random.normal(key, (*kernel, inner // groups, outer))
    b = jnp.zeros((outer,), dtype) if bias else None
    return cls(weight.astype(dtype), b, None, stride, padding, dilation, groups)


def _tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    made = (value,) * dims if isinstance(value, int | np.integer) else tuple(value)
    if len(made) != dims or any(v < 1 for v in made):
        raise ArgumentError(f"`{value!r}` must be a positive number, or {dims} of them")
    return made


def _padding(value: Any, dims: int) -> Padding:
    if isinstance(value, str):
        return value.upper()
    pairs = (
        ((value, value),) * dims if isinstance(value, int) else tuple((int(lo), int(hi)) for lo, hi in value)
    )
    if len(pairs) != dims or any(lo < 0 or hi < 0 for lo, hi in pairs):
        raise ArgumentError(
            f"`padding={value!r}` must be a name, a count, or {dims} pairs of counts, none negative"
        )
    return pairs


@layer
class Conv1D(_Conv):
    """A convolution over one spatial axis: `*batch space inner` to `*batch space' outer`.

    `basis`: the directions that the `cokernel_*` options keep, see `with_basis`; its gradient is zero.

    >>> layer = mw.layers.Conv1D.init(jax.random.key(0), 3, 8, stride=2)
    >>> layer(jnp.ones((2, 16, 3))).shape
    (2, 8, 8)
    """

    weight: Float[Array, "kernel inner_per_group outer"]
    bias: Float[Array, " outer"] | None = None
    basis: spectral.Basis | None = None
    stride: tuple[int, ...] = static(default=(1,))
    padding: Padding = static(default="SAME")
    dilation: tuple[int, ...] = static(default=(1,))
    groups: int = static(default=1)

    @staticmethod
    def init(
        key: Array,
        inner: int,
        outer: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: str | int | Sequence[tuple[int, int]] = "SAME",
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> Conv1D:
        """Delta-orthogonal taps, zero bias: every singular value is 1 at every frequency."""
        return _make(
            Conv1D, key, inner, outer, _tuple(kernel, 1), None, _tuple(stride, 1), _padding(padding, 1),
            _tuple(dilation, 1), groups, bias, dtype,
        )  # fmt: skip

    @staticmethod
    def he(
        key: Array,
        inner: int,
        outer: int,
        kernel: int = 3,
        *,
        slope: float = 0.0,
        stride: int = 1,
        padding: str | int | Sequence[tuple[int, int]] = "SAME",
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> Conv1D:
        """He initialisation for a leaky ReLU of `slope`: ill-conditioned, so give it a basis
        (`with_basis`)."""
        return _make(
            Conv1D, key, inner, outer, _tuple(kernel, 1), slope, _tuple(stride, 1), _padding(padding, 1),
            _tuple(dilation, 1), groups, bias, dtype,
        )  # fmt: skip


@layer
class Conv2D(_Conv):
    """A convolution over two spatial axes: `*batch height width inner` to `*batch height' width' outer`.

    `basis`: the directions that the `cokernel_*` options keep, see `with_basis`; its gradient is zero.

    >>> layer = mw.layers.Conv2D.init(jax.random.key(0), 3, 8, (3, 5), padding="VALID")
    >>> layer(jnp.ones((2, 8, 8, 3))).shape
    (2, 6, 4, 8)
    """

    weight: Float[Array, "kernel_h kernel_w inner_per_group outer"]
    bias: Float[Array, " outer"] | None = None
    basis: spectral.Basis | None = None
    stride: tuple[int, ...] = static(default=(1, 1))
    padding: Padding = static(default="SAME")
    dilation: tuple[int, ...] = static(default=(1, 1))
    groups: int = static(default=1)

    @staticmethod
    def init(
        key: Array,
        inner: int,
        outer: int,
        kernel: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | Sequence[tuple[int, int]] = "SAME",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> Conv2D:
        """Delta-orthogonal taps, zero bias: every singular value is 1 at every frequency."""
        return _make(
            Conv2D, key, inner, outer, _tuple(kernel, 2), None, _tuple(stride, 2), _padding(padding, 2),
            _tuple(dilation, 2), groups, bias, dtype,
        )  # fmt: skip

    @staticmethod
    def he(
        key: Array,
        inner: int,
        outer: int,
        kernel: int | tuple[int, int] = 3,
        *,
        slope: float = 0.0,
        stride: int | tuple[int, int] = 1,
        padding: str | int | Sequence[tuple[int, int]] = "SAME",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> Conv2D:
        """He initialisation for a leaky ReLU of `slope`: ill-conditioned, so give it a basis
        (`with_basis`)."""
        return _make(
            Conv2D, key, inner, outer, _tuple(kernel, 2), slope, _tuple(stride, 2), _padding(padding, 2),
            _tuple(dilation, 2), groups, bias, dtype,
        )  # fmt: skip
