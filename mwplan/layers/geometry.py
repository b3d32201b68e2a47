r"""Where a convolution's taps fall: sizes, padding, phases and grids, in any number of dimensions.

Along one axis, $y_j = \sum_t \tilde x_{sj + dt} W_t$ with $\tilde x$ the padded input, stride $s$, dilation
$d$ and $k$ taps; the cotangent of the padded input is $u_i = \sum_{sj + dt = i} \bar y_j W_t^\top$.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from mwplan.common.errors import ArgumentError

Padding = str | tuple[tuple[int, int], ...]
"""`"SAME"`, `"VALID"`, `"CIRCULAR"`, or the numbers of zeros before and after, an axis each."""


@dataclass(frozen=True)
class Geometry:
    """One convolution at one input size; every tuple has an entry per spatial axis."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    circular: bool

    @property
    def reach(self) -> tuple[int, ...]:
        """The distance from an output's first tap to its last."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel))

    @property
    def padded(self) -> tuple[int, ...]:
        """The padded input's size."""
        return tuple(n + lo + hi for n, (lo, hi) in zip(self.size, self.pads))

    @property
    def out(self) -> tuple[int, ...]:
        """The output's size."""
        return tuple((p - r - 1) // s + 1 for p, r, s in zip(self.padded, self.reach, self.stride))

    @property
    def touched(self) -> tuple[int, ...]:
        """The leading part of the padded input that some output reads; the cotangent of the rest is zero."""
        return tuple(s * (m - 1) + r + 1 for s, m, r in zip(self.stride, self.out, self.reach))

    @property
    def grid(self) -> tuple[int, ...]:
        """Frequencies an axis. Circular: `size / stride`. Else room for `out` and the taps' tail, rounded up
        to a fast even size."""
        if self.circular:
            return tuple(n // s for n, s in zip(self.size, self.stride))
        return tuple(fast_size(m + r // s) for m, r, s in zip(self.out, self.reach, self.stride))

    def halo(self) -> list[tuple[int, int, int]]:
        """`(axis, before, after)`: the touched zeros of each axis, as slabs that are whole in the later axes
        and inner in the earlier."""
        found = []
        for axis, ((lo, _), n, t) in enumerate(zip(self.pads, self.size, self.touched)):
            found.append((axis, min(lo, t), max(0, t - lo - n)))
        return found

    @property
    def has_halo(self) -> bool:
        """Whether some output reads the zero padding."""
        return not self.circular and any(before or after for _, before, after in self.halo())


def fast_size(n: int) -> int:
    """The least even number with no prime factor above 5 that is at least `n`."""
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1 and n % 2 == 0:
            return n
        n += 1


def geometry(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Geometry:
    """Resolves `padding` at one input size. Raises `ArgumentError` where no output remains."""
    sizes, reaches = tuple(size), tuple(d * (k - 1) for d, k in zip(dilation, kernel))
    pads: tuple[tuple[int, int], ...]
    if padding == "VALID":
        pads = tuple((0, 0) for _ in sizes)
    elif padding == "SAME":
        totals = [max((-(-n // s) - 1) * s + r + 1 - n, 0) for n, s, r in zip(sizes, stride, reaches)]
        pads = tuple((t // 2, t - t // 2) for t in totals)
    elif padding == "CIRCULAR":
        pads = tuple((r // 2, r - r // 2) for r in reaches)
    elif isinstance(padding, str):
        raise ArgumentError(
            f"`padding={padding!r}` must be SAME, VALID, CIRCULAR or a pair of counts an axis"
        )
    else:
        pads = tuple((int(lo), int(hi)) for lo, hi in padding)
    made = Geometry(sizes, tuple(kernel), tuple(stride), tuple(dilation), pads, padding == "CIRCULAR")
    if any(m < 1 for m in made.out):
        raise ArgumentError(
            f"spatial size {sizes} is too small for kernel {made.kernel} with padding {padding!r}"
        )
    return made


def split_halo(
    u: Inexact[Array, "examples *padded channels"], g: Geometry
) -> tuple[Inexact[Array, "examples *size channels"], tuple[Array, ...]]:
    """Splits the cotangent of the padded input into that of the input and the halo's slabs that are not
    empty."""
    inner = tuple(slice(lo, lo + n) for (lo, _), n in zip(g.pads, g.size))
    ct_in = u[(slice(None), *inner)]
    box = u[(slice(None), *(slice(0, t) for t in g.touched))]
    slabs = []
    for axis, before, after in g.halo():
        length = box.shape[axis + 1]
        if before:
            slabs.append(_cut(box, axis, 0, before))
        if after:
            slabs.append(_cut(box, axis, length - after, length))
        box = _cut(box, axis, before, length - after)
    return ct_in, tuple(slabs)


def join_halo(
    ct_in: Inexact[Array, "examples *size channels"], slabs: Sequence[Array], g: Geometry
) -> Inexact[Array, "examples *touched channels"]:
    """The inverse of `split_halo`, up to the untouched end."""
    ends = tuple(slice(0, max(0, t - lo)) for (lo, _), t in zip(g.pads, g.touched))
    box = ct_in[(slice(None), *ends)]
    left = list(slabs)
    for axis, before, after in reversed(g.halo()):
        last = [left.pop()] if after else []
        first = [left.pop()] if before else []
        box = jnp.concatenate([*first, box, *last], axis + 1)
    return box


def _cut(a: Array, axis: int, start: int, stop: int) -> Array:
    return a[(slice(None),) * (axis + 1) + (slice(start, stop),)]


def phases(
    v: Inexact[Array, "lead *lengths trail"], grid: Sequence[int], stride: Sequence[int]
) -> Inexact[Array, "lead *grid phase trail"]:
    """Splits each spatial axis by its position modulo the stride: zero-padded (or cut) to `grid * stride`.

    The last axis of the result but one counts the phases of all axes together.
    """
    dims = len(grid)
    widths = [n * s for n, s in zip(grid, stride)]
    v = v[(slice(None), *(slice(0, w) for w in widths))]
    v = jnp.pad(v, [(0, 0), *((0, w - have) for w, have in zip(widths, v.shape[1:-1])), (0, 0)])
    lead, trail = v.shape[0], v.shape[-1]
    split = [part for n, s in zip(grid, stride) for part in (n, s)]
    v = v.reshape(lead, *split, trail)
    order = [0, *(1 + 2 * a for a in range(dims)), *(2 + 2 * a for a in range(dims)), 1 + 2 * dims]
    return v.transpose(order).reshape(lead, *grid, math.prod(stride), trail)
