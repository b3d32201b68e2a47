r"""Layers that are orthogonal by construction: their vijp is their jvp, and growth is 1 at any depth.

With $Q^\top Q = I$, $\bar x = \bar y Q^\top$ gives $\bar y = \bar x Q$: the layer itself, without its bias,
applied to the cotangent. **Source:** ours, from linear algebra; the Cayley transform of a convolution in the
Fourier domain is Trockman and Kolter, arXiv:2104.07167.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from mwplan.common.errors import ArgumentError
from mwplan.common.trees import along, transpose, widen
from mwplan.layers.fourier import irfftn, rfftn
from mwplan.layers.linear import LinearRule, WholeOf, times
from mwplan.network.layer import layer, static
from mwplan.network.rules import InvertRule, Unavailable, VijpRule, full_precision

METHODS = ("cayley", "householder", "expm")


def _solve(a: Array, b: Array) -> Array:
    """`a^-1 b` for `a = I + S` with skew `S`: its condition number is that of `I + S`, its eigenvalues at
    least 1 in modulus."""
    solved: Array = jnp.linalg.solve(a, b)
    return solved


@layer
class OrthogonalDense:
    r"""`y = x @ Q[:inner, :outer] + bias` with $Q$ square and orthogonal, made from `raw` by `method`.

    - `cayley`: $S = R - R^\top$, $Q = (I + S)^{-1}(I - S)$; `raw` is $R$, square.
    - `expm`: $Q = e^S$.
    - `householder`: $Q = \prod_i (I - 2 v_i v_i^\top / |v_i|^2)$ over the columns of `raw`, any number of
      them, by the compact form $I - V T V^\top$ with
      $T^{-1} = \mathrm{striu}(V^\top V) + \mathrm{diag}(|v_i|^2)/2$.

    $Q$ is computed in every sweep, about $2 n^3$ flop for $n = \max(inner, outer)$, and is never kept.

    >>> layer = mw.layers.OrthogonalDense.init(jax.random.key(0), 8, 8)
    >>> bool(jnp.allclose(layer.matrix() @ layer.matrix().T, jnp.eye(8), atol=1e-5))
    True
    """

    raw: Float[Array, "size columns"]
    bias: Float[Array, " outer"] | None = None
    inner: int = static(default=0)
    outer: int = static(default=0)
    method: str = static(default="cayley")

    @staticmethod
    def init(
        key: Array,
        inner: int,
        outer: int,
        *,
        method: str = "cayley",
        reflections: int | None = None,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> OrthogonalDense:
        """White `raw`, zero bias. `reflections`: columns of the householder method, all by default."""
        if method not in METHODS:
            raise ArgumentError(f"`method={method!r}` is none of {METHODS}")
        size = max(inner, outer)
        columns = size if method != "householder" or reflections is None else reflections
        raw = (jax.random.normal(key, (size, columns)) / math.sqrt(size)).astype(dtype)
        return OrthogonalDense(raw, jnp.zeros((outer,), dtype) if bias else None, inner, outer, method)

    def matrix(self) -> Float[Array, "size size"]:
        """$Q$, in float32 or wider."""
        raw = widen(self.raw)
        eye = jnp.eye(raw.shape[0], dtype=raw.dtype)
        if self.method == "householder":
            gram = raw.T @ raw
            half = jnp.triu(gram, 1) + jnp.diag(jnp.diag(gram)) / 2
            reflected: Array = eye - raw @ jax.scipy.linalg.solve_triangular(half, raw.T)
            return reflected
        skew = raw - raw.T
        if self.method == "expm":
            rotation: Array = jax.scipy.linalg.expm(skew)
            return rotation
        return _solve(eye + skew, eye - skew)

    def linear(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        """The layer without its bias."""
        return self._times(x, None)

    def __call__(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        """Applies the layer."""
        return self._times(x, self.bias)

    def _times(self, x: Array, bias: Array | None) -> Array:
        if x.ndim < 1 or x.shape[-1] != self.inner:
            raise ArgumentError(
                f"`x.shape={x.shape}`: this OrthogonalDense takes {self.inner} features on the last axis"
            )
        return times(x, self.matrix()[: self.inner, : self.outer].astype(x.dtype), bias)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The jvp; with the rest of the rows as fragment where `outer > inner`."""
        base = OrthogonalJvp() if self.outer <= self.inner else OrthogonalNull()
        return [base, WholeOf("whole_free", base=base)]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """The transpose, for `outer >= inner`."""
        if self.outer < self.inner:
            return [Unavailable("transpose", f"{self.outer} outputs do not determine {self.inner} inputs")]
        return [OrthogonalInverse()]


def _finite(layer: Any) -> str | None:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(layer)]
    return (
        None if all(np.isfinite(leaf).all() for leaf in leaves) else "its parameters have non-finite entries"
    )


@dataclass(frozen=True)
class OrthogonalJvp(LinearRule):
    r"""$\bar y = \bar x Q$: the layer applied to the cotangent. Nothing is erased or kept; cost of a forward;
    growth 1."""

    name: str = "jvp"
    any_weights: ClassVar[bool] = True

    def check(self, layer: Any, x: Any) -> str | None:
        """Finite parameters."""
        return _finite(layer)

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        return widen(layer).linear(ct_in)


@dataclass(frozen=True)
class OrthogonalNull(LinearRule):
    r"""`outer > inner`: the layer is the first rows of $Q$, and the rest, $N^\top$, spans what is erased.

    The fragment is $c = \bar y N$, `(outer - inner) / outer` of the cotangent; $\bar y = [\bar x\ \ c]\,Q$.
    Growth below 1.
    """

    name: str = "null"
    has_fragment: bool = True
    any_weights: ClassVar[bool] = True

    def check(self, layer: OrthogonalDense, x: Any) -> str | None:
        """Finite parameters."""
        return _finite(layer)

    def fragment(self, layer: OrthogonalDense, residuals: Any, ct_out: Any) -> Any:
        """`ct_out @ N`."""
        return ct_out @ layer.matrix()[layer.inner :].T

    def rebuild(self, layer: OrthogonalDense, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        return jnp.concatenate([ct_in, fragment], -1) @ layer.matrix()


@dataclass(frozen=True)
class OrthogonalInverse(InvertRule):
    r"""$x = (y - b)\,Q^\top$, the transposed layer."""

    name: str = "transpose"

    def check(self, layer: OrthogonalDense, x: Any) -> str | None:
        """Finite parameters."""
        return _finite(layer)

    @full_precision
    def inverse(self, layer: OrthogonalDense, y: Any, kept: Any) -> Any:
        """`x`, in the dtype of `y`."""
        wide = widen(y) if layer.bias is None else widen(y) - along(widen(layer.bias), y)
        return (wide @ layer.matrix()[: layer.inner, : layer.outer].T).astype(y.dtype)


class CircularOrthogonal:
    """Base of orthogonal convolutions: circular, stride 1, `inner` channels to the first `outer`. Subclasses
    define `linear`."""

    bias: Array | None
    outer: int

    @property
    def inner(self) -> int:
        """The number of input channels."""
        raise NotImplementedError

    @property
    def dims(self) -> int:
        """The number of spatial axes."""
        raise NotImplementedError

    @property
    def kernel(self) -> tuple[int, ...]:
        """The least spatial size that the layer takes."""
        raise NotImplementedError

    def linear(self, x: Array) -> Array:
        """The layer without its bias."""
        raise NotImplementedError

    def check_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The spatial size of an input of `shape`. Raises `ArgumentError` where the layer does not take
        it."""
        dims, name = self.dims, type(self).__name__
        if len(shape) < dims + 1 or shape[-1] != self.inner:
            raise ArgumentError(
                f"`x.shape={tuple(shape)}`: this {name} takes {dims} spatial axes and {self.inner} channels, "
                "last"
            )
        size = tuple(shape[-1 - dims : -1])
        if any(k > n for k, n in zip(self.kernel, size)):
            raise ArgumentError(f"spatial size {size} is smaller than the kernel {self.kernel}")
        return size

    def __call__(self, x: Array) -> Array:
        """Applies the layer."""
        y = self.linear(x)
        return y if self.bias is None else y + along(self.bias, y)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The jvp."""
        return [OrthogonalJvp(), WholeOf("whole_free", base=OrthogonalJvp())]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """The transpose, for as many outputs as inputs."""
        if self.outer < self.inner:
            return [Unavailable("transpose", f"{self.outer} outputs do not determine {self.inner} inputs")]
        return [OrthogonalConvInverse()]


def check_sizes(inner: int, outer: int, dims: int) -> None:
    """Raises `ArgumentError` where there is no such orthogonal convolution."""
    if outer > inner or dims not in (1, 2):
        raise ArgumentError(
            f"`outer={outer}`, `dims={dims}`: needs outer <= inner={inner}, and 1 or 2 dimensions"
        )


@layer
class OrthogonalConv(CircularOrthogonal):
    r"""A circular convolution of stride 1 in one or two dimensions whose symbol is unitary at every
    frequency: the Cayley transform.

    With $A(\omega)$ the transform of the taps, $S = A - A^H$, $Q(\omega) = (I + S)^{-1}(I - S)$, of which the
    first `outer` columns are used. As a filter it reaches across the whole input, with taps that decay.
    Channels last; `outer <= inner`. For a stride put a `SpaceToDepth` before it.

    **Cost:** transforms of input and output, $8\,inner\,outer$ flop a frequency and example on half the
    frequencies, and a complex solve of `inner` a frequency once a sweep.

    >>> layer = mw.layers.OrthogonalConv.init(jax.random.key(0), 4, 4, dims=1, bias=False)
    >>> x = jax.random.normal(jax.random.key(1), (1, 8, 4))
    >>> bool(jnp.allclose(jnp.linalg.norm(layer(x)), jnp.linalg.norm(x), rtol=1e-4))
    True
    """

    weight: Float[Array, "*kernel inner inner"]
    bias: Float[Array, " outer"] | None = None
    outer: int = static(default=0)

    @staticmethod
    def init(
        key: Array,
        inner: int,
        outer: int,
        kernel: int = 3,
        *,
        dims: int = 2,
        bias: bool = True,
        dtype: Any = jnp.float32,
    ) -> OrthogonalConv:
        """White taps, zero bias."""
        check_sizes(inner, outer, dims)
        shape = (kernel,) * dims + (inner, inner)
        weight = (jax.random.normal(key, shape) / math.sqrt(inner * kernel**dims)).astype(dtype)
        return OrthogonalConv(weight, jnp.zeros((outer,), dtype) if bias else None, outer)

    @property
    def inner(self) -> int:
        """The number of input channels."""
        return self.weight.shape[-1]

    @property
    def dims(self) -> int:
        """The number of spatial axes."""
        return self.weight.ndim - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """The taps along each axis."""
        return self.weight.shape[: self.dims]

    def symbol(self, size: tuple[int, ...]) -> Complex[Array, "*frequencies inner outer"]:
        """$Q$ at every frequency of the half grid for an input of `size`."""
        weight = widen(self.weight)
        a = jnp.fft.rfftn(weight, s=size, axes=range(self.dims))
        skew = a - jnp.conj(jnp.swapaxes(a, -1, -2))
        eye = along(jnp.eye(weight.shape[-1], dtype=skew.dtype), skew)
        return _solve(eye + skew, eye - skew)[..., : self.outer]

    def linear(self, x: Array) -> Array:
        """The layer without its bias."""
        size, dims, inner = self.check_shape(x.shape), self.dims, self.inner
        lead = x.shape[: -1 - dims]
        axes = range(1, dims + 1)
        flat = widen(x).reshape(math.prod(lead), *size, inner)
        hat = jnp.einsum("n...i,...io->n...o", rfftn(flat, size, axes), self.symbol(size))
        return irfftn(hat, size, axes).reshape(*lead, *size, self.outer).astype(x.dtype)


@dataclass(frozen=True)
class OrthogonalConvInverse(InvertRule):
    """The transposed layer."""

    name: str = "transpose"

    def check(self, layer: Any, x: Any) -> str | None:
        """Finite parameters."""
        return _finite(layer)

    @full_precision
    def inverse(self, layer: CircularOrthogonal, y: Any, kept: Any) -> Any:
        """`x`, in the dtype of `y`."""
        wide = widen(y) if layer.bias is None else widen(y) - along(widen(layer.bias), y)
        x = transpose(widen(layer).linear, jax.ShapeDtypeStruct(wide.shape, wide.dtype), wide)
        return x.astype(y.dtype)
