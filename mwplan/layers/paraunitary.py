"""Orthogonal convolutions with few taps: paraunitary filter banks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan.common.errors import ArgumentError
from mwplan.common.trees import widen
from mwplan.layers.conv import Conv1D, Conv2D
from mwplan.layers.orthogonal import CircularOrthogonal, check_sizes
from mwplan.network.layer import layer, static


@layer
class ParaunitaryConv(CircularOrthogonal):
    r"""A circular convolution of stride 1 in one or two dimensions, orthogonal by construction, with `taps`
    taps an axis.

    Its symbol is $K(z) = Q_0 D(z_1) Q_1 D(z_1) \cdots Q_m$, where $D(z) = \mathrm{diag}(I, z I)$ shifts the
    second half of the channels by one position along an axis, `taps - 1` times along each axis in turn, and
    the $Q_i$ are orthogonal: unitary at every frequency, as each factor is. Each $Q_i$ is a product of
    Householder reflections $I - 2 v v^\top / |v|^2$, so nothing is solved or factored, and rounding does not
    accumulate. `outer <= inner`: the first `outer` columns.

    **Cost:** that of `Conv2D` with circular padding, and once a sweep the kernel: $2 r c^2$ flop for each
    $Q_i$ of $r$ reflections, and as many small products as factors. Against `OrthogonalConv`, whose filters
    reach across the whole input, it needs no transforms.
    **Source:** lossless systems are products of such factors (Vaidyanathan, 1993); as layers of networks: Li
    et al., arXiv:1911.00937; Su et al., arXiv:2106.09121. Shifts of half the channels between products of
    reflections are our choice among the parametrisations.

    >>> layer = mw.layers.ParaunitaryConv.init(jax.random.key(0), 4, 4, dims=1, bias=False)
    >>> x = jax.random.normal(jax.random.key(1), (1, 8, 4))
    >>> bool(jnp.allclose(jnp.linalg.norm(layer(x)), jnp.linalg.norm(x), rtol=1e-4))
    True
    """

    raw: Float[Array, "factors reflections inner"]
    bias: Float[Array, " outer"] | None = None
    outer: int = static(default=0)
    taps: int = static(default=3)

    @staticmethod
    def init(
        key: Array,
        inner: int,
        outer: int,
        kernel: int = 3,
        *,
        dims: int = 2,
        reflections: int = 8,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> ParaunitaryConv:
        """White reflections, at most `inner` of them, zero bias."""
        check_sizes(inner, outer, dims)
        if kernel < 2 or reflections < 1:
            raise ArgumentError(
                f"`kernel={kernel}` must be at least 2 and `reflections={reflections}` at least 1"
            )
        shape = (dims * (kernel - 1) + 1, min(reflections, inner), inner)
        raw = jax.random.normal(key, shape).astype(dtype)
        return ParaunitaryConv(raw, jnp.zeros((outer,), dtype) if bias else None, outer, kernel)

    @property
    def inner(self) -> int:
        """The number of input channels."""
        return self.raw.shape[-1]

    @property
    def dims(self) -> int:
        """The number of spatial axes."""
        return (self.raw.shape[0] - 1) // (self.taps - 1)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The taps along each axis."""
        return (self.taps,) * self.dims

    def matrices(self) -> Float[Array, "factors inner inner"]:
        """The $Q_i$, in float32 or wider."""
        raw = widen(self.raw)
        made = jnp.broadcast_to(jnp.eye(self.inner, dtype=raw.dtype), (raw.shape[0], self.inner, self.inner))
        for at in range(raw.shape[1]):
            v = raw[:, at]
            v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
            # Sums, not products of matrices: these are rounded alike on every device.
            along = jnp.sum(made * v[:, None, :], -1, keepdims=True)
            made = made - 2 * along * v[:, None, :]
        return made

    def weight(self) -> Float[Array, "*kernel inner outer"]:
        """The taps of $K$, in float32 or wider."""
        first, *others = self.matrices()
        kernel, half = first.reshape(*(1,) * self.dims, self.inner, self.inner), self.inner // 2
        for at, matrix in enumerate(others):
            axis = at // (self.taps - 1)
            before, after = ([(0, 0)] * kernel.ndim for _ in range(2))
            before[axis], after[axis] = (1, 0), (0, 1)
            shifted = [jnp.pad(kernel[..., :half], after), jnp.pad(kernel[..., half:], before)]
            kernel = jnp.einsum("...ab,bc->...ac", jnp.concatenate(shifted, -1), matrix, precision="highest")
        taps: Array = kernel[..., : self.outer]
        return taps

    def linear(self, x: Array) -> Array:
        """The layer without its bias."""
        self.check_shape(x.shape)
        # Checkpointed: what leads to the kernel is no larger than the parameters, but there is more of it.
        weight = jax.checkpoint(ParaunitaryConv.weight)(self).astype(x.dtype)
        one = Conv1D(weight, padding="CIRCULAR") if self.dims == 1 else Conv2D(weight, padding="CIRCULAR")
        return one.linear(x)
