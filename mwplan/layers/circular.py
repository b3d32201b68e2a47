r"""Circular convolutions of stride 1, without a padded copy of their input.

$y_j = \sum_t x_{(j + dt - lo) \bmod n} W_t$, for each spatial axis. On CPUs this is computed as the
zero-padded convolution, plus a small product of patches at each end of each axis for the wrapped terms.
Its transposes are of the same kind:

- with respect to `x`, the circular convolution of the cotangent with the taps flipped, inputs and outputs
  exchanged, and `lo` and `hi` too;
- with respect to `W`, the sum over some examples at a time: XLA:CPU transposes both operands, which are then
  two copies of some examples only, and stay in its caches.

**Cost:** of 3 x 3 taps and 32 channels on 32 x 16 x 16 positions (jaxlib 0.10.2, one core), beside what JAX
derives from padding and a VALID convolution: workspace 0.3 instead of 2.4 activations (`x` to `y`), 0.3
instead of 3.5 (to `x`) and 0.6 instead of 3.5 (to `W`), in equal, 0.7 and 0.7 of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from mwplan.common import platforms, trees
from mwplan.layers.bilinear import bilinear

# Of the parts of a gradient of taps: the least bytes of input, and the most parts. Of few channels XLA:CPU
# (jaxlib 0.10.2) needs many examples to be fast.
_PART_BYTES, _PARTS = 1 << 18, 8
_FEW_CHANNELS, _MANY_EXAMPLES = 24, 32


def convolve(
    x: Inexact[Array, "examples *size inner"],
    taps: Inexact[Array, "*kernel inner_per_group outer"],
    pads: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Inexact[Array, "examples *out outer"]:
    """`lax.conv_general_dilated`, channels last, in one or two dimensions."""
    dims = taps.ndim - 2
    names = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}[dims]
    return lax.conv_general_dilated(
        x, taps, stride, pads, rhs_dilation=dilation, dimension_numbers=names, feature_group_count=groups
    )


@dataclass(frozen=True)
class Circular:
    """The convolution of `x` (examples, size of each axis, channels) with `taps`, a `BilinearMap`; `pads`:
    `(lo, hi)`, an axis each, none above the size."""

    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def __call__(
        self, x: Inexact[Array, "examples *size inner"], taps: Inexact[Array, "*kernel inner outer"]
    ) -> Inexact[Array, "examples *size outer"]:
        """The convolution."""
        if platforms.platform() != "cpu":
            padded = jnp.pad(x, [(0, 0), *self.pads, (0, 0)], mode="wrap")
            return convolve(padded, taps, ((0, 0),) * len(self.pads), (1,) * len(self.pads), self.dilation)
        y = self._inside(x, taps)
        for edge in self._edges():
            x, y = lax.optimization_barrier((x, y))  # one edge's patches at a time
            at = edge.outputs(y.shape)
            made = y[at].astype(trees.working_dtype(y.dtype)) + edge(x, taps)
            y = lax.dynamic_update_slice(y, made.astype(y.dtype), [one.start for one in at])
        return y

    def to_x(
        self, taps: Inexact[Array, "*kernel inner outer"], ct: Inexact[Array, "examples *size outer"]
    ) -> Inexact[Array, "examples *size inner"]:
        """The cotangent of `x`."""
        dims = len(self.pads)
        flipped = jnp.flip(taps, range(dims)).swapaxes(dims, dims + 1)
        return bilinear(Circular(tuple((hi, lo) for lo, hi in self.pads), self.dilation), ct, flipped)

    def to_w(
        self, x: Inexact[Array, "examples *size inner"], ct: Inexact[Array, "examples *size outer"]
    ) -> Inexact[Array, "*kernel inner outer"]:
        """The cotangent of the taps."""
        kernel = [(lo + hi) // d + 1 for (lo, hi), d in zip(self.pads, self.dilation)]
        taps = jax.ShapeDtypeStruct((*kernel, x.shape[-1], ct.shape[-1]), x.dtype)
        if platforms.platform() != "cpu":
            transposed: Array = trees.transpose(partial(self, x), taps, ct)
            return transposed
        found = jnp.zeros((), x.dtype)
        count = _parts(x, ct.shape[-1])
        for i in range(count):
            # Every `count`-th example: of examples spread over devices, as many on each.
            some, cts = (a.reshape(len(a) // count, count, *a.shape[1:])[:, i] for a in (x, ct))
            found += trees.transpose(partial(self._inside, some), taps, cts)
            x, ct, found = lax.optimization_barrier((x, ct, found))
        for edge in self._edges():
            cts = ct[edge.outputs(ct.shape)].astype(trees.working_dtype(ct.dtype))
            found += trees.transpose(partial(edge, x), taps, cts)
            x, ct, found = lax.optimization_barrier((x, ct, found))
        return found

    def _inside(self, x: Array, taps: Array) -> Array:
        """The convolution with zeros around `x`."""
        return convolve(x, taps, self.pads, (1,) * len(self.pads), self.dilation)

    def _edges(self) -> Iterator[_Edge]:
        for axis, sides in enumerate(self.pads):
            for last, count in enumerate(sides):
                if count:
                    yield _Edge(self.pads, self.dilation, axis, count, bool(last))


@dataclass(frozen=True)
class _Edge:
    """The part of the first (or the `last`) `count` outputs along `axis` that comes from the input's other
    end.

    Along earlier axes the input is padded by zeros, along later ones it is wrapped, so that each corner
    counts once.
    """

    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    axis: int
    count: int
    last: bool

    def outputs(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """The outputs that it is added to, for an output of `shape`."""
        at = [slice(0, n) for n in shape]
        n = shape[self.axis + 1]
        at[self.axis + 1] = slice(n - self.count, n) if self.last else slice(0, self.count)
        return tuple(at)

    def __call__(self, x: Array, taps: Array) -> Array:
        """The sum over those taps alone that reach across, in working precision.

        Of the wrapped positions, numbered from 0, the first outputs see with tap `t` number `j + dt`; the
        last, of the taps from the end, number `j - ds`.
        """
        axis, size = self.axis + 1, x.shape[self.axis + 1]
        used = -(-self.count // self.dilation[self.axis])
        kernel = taps.shape[self.axis]
        begin = kernel - used if self.last else 0
        taps = lax.slice_in_dim(taps, begin, begin + used, axis=self.axis)
        begin = 0 if self.last else size - self.count
        x = lax.slice_in_dim(x, begin, begin + self.count, axis=axis)
        zeros, wrapped = ([(0, 0)] * x.ndim for _ in range(2))
        reach = self.dilation[self.axis] * (used - 1)
        zeros[axis] = (reach, 0) if self.last else (0, reach)
        zeros[1:axis] = self.pads[: self.axis]
        wrapped[axis + 1 : -1] = self.pads[axis:]
        x = jnp.pad(jnp.pad(x, wrapped, mode="wrap"), zeros)
        return _product(x, taps, self.dilation)


def _product(
    x: Inexact[Array, "examples *size inner"],
    taps: Inexact[Array, "*kernel inner outer"],
    dilation: Sequence[int],
) -> Inexact[Array, "examples *out outer"]:
    """A convolution without padding as one product of patches, in working precision."""
    *kernel, _, outer = taps.shape
    out = [n - d * (k - 1) for n, k, d in zip(x.shape[1:], kernel, dilation)]
    starts = itertools.product(*(range(0, d * k, d) for k, d in zip(kernel, dilation)))
    patches = jnp.concatenate(
        [x[(slice(None), *(slice(t, t + m) for t, m in zip(start, out)))] for start in starts], -1
    )
    rows = math.prod(patches.shape[:-1])
    y = lax.dot(
        patches.reshape(rows, patches.shape[-1]),
        taps.reshape(patches.shape[-1], outer),
        preferred_element_type=trees.working_dtype(x.dtype),
    )
    return y.reshape(*patches.shape[:-1], outer)


def _parts(x: Array, outer: int) -> int:
    """The parts of its examples that a gradient of taps is summed over."""
    least = _MANY_EXAMPLES if min(x.shape[-1], outer) < _FEW_CHANNELS else 1
    most = min(_PARTS, trees.nbytes(x) // _PART_BYTES, x.shape[0] // least)
    return max((k for k in range(1, most + 1) if x.shape[0] % k == 0), default=1)
