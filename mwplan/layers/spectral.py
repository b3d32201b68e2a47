r"""The spectral vijp of convolutions: one small solve a frequency, any stride, with the halo of the padding
as fragment.

**Derivation.** Split the cotangent $u$ of the padded input by its position modulo the stride: with
$dt = s b_t + r_t$,

$$u^{(r)}_a = \sum_{t : r_t = r} \bar y_{a - b_t} W_t^\top,$$

for each phase $r$ a full convolution of $\bar y$ with its own taps. On a grid of at least $m + \max b$
frequencies an axis nothing wraps, so with $A_r(\omega) = \sum_{t : r_t = r} W_t e^{-i \omega b_t}$ and the
phases stacked,

$$\hat u(\omega) = \hat{\bar y}(\omega)\, A(\omega)^\top, \qquad$$
$$A(\omega): s^d\,inner \times outer\ \text{(of one group)}.$$

Where $A(\omega)$ has full column rank at every frequency of the grid, $\hat{\bar y} = \hat u\,(A^+)^\top$ and
$\bar y$ is the start of the inverse transform. What is erased is the cotangent of the zero padding, which the
input's cotangent does not show: the **halo**, kept as the fragment. VALID and circular convolutions have none
(circular: the grid is `size / stride` exactly, and the wrapping is wanted).

**Cost** of a vijp: transforms of $u$ and $\bar y$, and $8\,inner\,outer\,s^d$ flop a frequency and example on
half the frequencies, so about $4 s^d / k^d$ times the multiplications of a forward; once a step, a complex
left inverse a frequency. Workspace: about three times the padded cotangent, and the inverses. All of it
parallel: no recursion. **Source:** the operator is arXiv:2402.14212; this form is ours, from linear algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from mwplan.common import trees
from mwplan.layers.dense import PERCENTS
from mwplan.layers.fourier import irfftn, rfftn
from mwplan.layers.geometry import Geometry, join_halo, phases, split_halo
from mwplan.layers.linear import (
    InputShape,
    LinearRule,
    Refined,
    left_inverse,
    no_examples,
    percent_of,
    rank_problem,
)
from mwplan.network.rules import InvertRule, Unavailable, VijpRule, full_precision


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Basis:
    """Directions of small singular value at every frequency of a grid, and those values: the numerical
    cokernel of a convolution.

    `vectors`: real and imaginary parts, smallest singular value first. Not trained: its gradient is zero, its
    vectors are normalised on use and its values only ordered, so weight decay does not harm it.
    """

    vectors: Float[Array, "2 *frequencies groups outer kept"]
    values: Float[Array, "*frequencies groups kept"]
    geometry: Geometry = field(metadata={"static": True})


@partial(jax.jit, static_argnums=(1, 2))
def symbol(weight: Array, g: Geometry, groups: int) -> Complex[Array, "*frequencies groups rows outer"]:
    """$A$ at every frequency of the half grid; `rows` counts phases and then channels of the group."""
    dims = len(g.size)
    wide = trees.widen(weight)
    interior = [(0, 0, d - 1) for d in g.dilation]
    wide = jax.lax.pad(wide, jnp.zeros((), wide.dtype), [*interior, (0, 0, 0), (0, 0, 0)])
    inner, outer = wide.shape[-2:]
    taps = phases(wide.reshape(1, *wide.shape[:dims], inner * outer), g.grid, g.stride)[0]
    a = jnp.fft.rfftn(taps, axes=range(dims))
    a = a.reshape(*a.shape[:dims], math.prod(g.stride) * inner, groups, outer // groups)
    return jnp.moveaxis(a, -2, -3)


def transform_in(
    u: Float[Array, "examples *lengths channels"], g: Geometry, groups: int
) -> Complex[Array, "examples *frequencies groups rows"]:
    """The transform of the input's side, phases stacked."""
    dims = len(g.size)
    v = rfftn(phases(u, g.grid, g.stride), g.grid, range(1, dims + 1))
    v = v.reshape(*v.shape[:-1], groups, v.shape[-1] // groups)
    return jnp.moveaxis(v, -3, -2).reshape(*v.shape[: dims + 1], groups, -1)


def transform_out(
    v: Float[Array, "examples *out channels"], g: Geometry, groups: int
) -> Complex[Array, "examples *frequencies groups outer"]:
    """The transform of the output's side."""
    dims = len(g.size)
    v = rfftn(v, g.grid, range(1, dims + 1))
    return v.reshape(*v.shape[:-1], groups, -1)


def back_out(
    v: Complex[Array, "examples *frequencies groups outer"], g: Geometry
) -> Float[Array, "examples *out channels"]:
    """The inverse of `transform_out`."""
    dims = len(g.size)
    v = v.reshape(*v.shape[:-2], -1)
    full = irfftn(v, g.grid, range(1, dims + 1))
    return full[(slice(None), *(slice(0, m) for m in g.out))]


def flatten_batch(a: Array, dims: int) -> Array:
    """One leading axis for all batch axes."""
    lead = a.shape[: a.ndim - dims - 1]
    return a.reshape(math.prod(lead), *a.shape[len(lead) :])


def rules(layer: Any, g: Geometry) -> list[VijpRule | Unavailable]:
    """The spectral rules, where the shapes allow them."""
    found: list[VijpRule | Unavailable] = []
    inner, outer = layer.weight.shape[-2], layer.weight.shape[-1] // layer.groups
    rows = math.prod(g.stride) * inner
    base = SpectralHalo() if g.has_halo else Spectral()
    if g.circular and any(n % s for n, s in zip(g.size, g.stride)):
        return [
            Unavailable(
                base.name, f"a circular convolution needs strides {g.stride} that divide the sizes {g.size}"
            )
        ]
    if g.circular and any(r >= n for n, r in zip(g.size, g.reach)):
        return [
            Unavailable(
                base.name, f"the taps of a circular convolution reach around the input: sizes {g.size}"
            )
        ]
    if outer <= rows:
        found += [base, Refined(base)]
    else:
        reason = (
            f"{rows} inputs a frequency (stride^d * channels) "
            f"do not determine {outer} output channels a group"
        )
        found.append(Unavailable(base.name, reason))
    if layer.basis is None:
        return [*found, Unavailable("cokernel", "the layer has no basis: see `with_basis`")]
    for percent in PERCENTS:
        name = f"cokernel_{percent}"
        if layer.basis.geometry != g:
            found.append(
                Unavailable(
                    name, f"the basis is for inputs of size {layer.basis.geometry.size}, not {g.size}"
                )
            )
        elif _count(percent, layer.basis, outer) > layer.basis.values.size:
            found.append(
                Unavailable(
                    name, f"the basis holds {layer.basis.values.shape[-1]} directions a frequency, too few"
                )
            )
        elif percent * outer < 100 * (outer - rows):
            found.append(
                Unavailable(name, f"fewer than the {outer - rows} of {outer} directions that are erased")
            )
        else:
            found.append(SpectralCokernel(percent))
    return found


def _join(layer: Any, x: Any, ct_in: Array, slabs: Any) -> tuple[Array, Geometry, tuple[int, ...]]:
    """The cotangent of the padded input (circular: aligned with the first tap), for one leading axis."""
    g = layer.geometry(x.shape)
    dims = layer.dims
    flat = flatten_batch(ct_in, dims)
    if g.circular:
        u = jnp.roll(flat, [lo for lo, _ in g.pads], range(1, dims + 1))
    else:
        u = join_halo(flat, [flatten_batch(s, dims) for s in slabs], g)
    return u, g, ct_in.shape[: -1 - dims]


def reverse_halo(layer: Any, residuals: InputShape, ct_out: Array) -> tuple[Array, tuple[Array, ...]]:
    """`ct_in` and the halo, from the input vjp of the convolution of the padded input."""
    g = layer.geometry(residuals.shape)
    dims = layer.dims
    wide = trees.widen(ct_out)
    lead = wide.shape[: -1 - dims]
    flat = flatten_batch(wide, dims)
    padded = jax.ShapeDtypeStruct((flat.shape[0], *g.padded, residuals.shape[-1]), flat.dtype)
    u = trees.transpose(trees.widen(layer).valid, padded, flat)
    ct_in, slabs = split_halo(u, g)
    return ct_in.reshape(residuals.shape), tuple(s.reshape(*lead, *s.shape[1:]) for s in slabs)


@dataclass(frozen=True)
class Spectral(LinearRule):
    """A convolution without zero padding: nothing is erased. See the module's derivation."""

    name: str = "spectral"

    def check(self, layer: Any, x: Any) -> str | None:
        """Full column rank at every frequency, finite."""
        g = layer.geometry(x.shape)
        return rank_problem(
            symbol(layer.weight, g, layer.groups), f"`weight` at some frequency of the grid {g.grid}"
        )

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        if not ct_in.size:
            return no_examples(layer, x, ct_in)
        u, g, lead = _join(layer, x, ct_in, fragment)
        inverse = left_inverse(symbol(layer.weight, g, layer.groups))
        ct_hat = jnp.einsum("n...i,...oi->n...o", transform_in(u, g, layer.groups), inverse)
        return back_out(ct_hat, g).reshape(*lead, *g.out, -1)


@dataclass(frozen=True)
class SpectralHalo(Spectral):
    r"""A zero-padded convolution: the halo is the fragment, about $2p/n$ of the activation per spatial axis.
    See the module's derivation."""

    name: str = "halo"
    has_fragment: bool = True

    def reverse(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in` and the halo's slabs."""
        return reverse_halo(layer, residuals, ct_out)


def _vectors(basis: Basis) -> Complex[Array, "*frequencies groups outer kept"]:
    """The normalised directions."""
    v = jax.lax.stop_gradient(trees.widen(basis.vectors))
    v = jax.lax.complex(v[0], v[1])
    unit: Array = v / jnp.linalg.norm(v, axis=-2, keepdims=True)
    return unit


def _count(percent: int, basis: Basis, outer: int) -> int:
    """Complex numbers that a fraction stands for: out of `outer` at each frequency and group."""
    return percent_of(percent, basis.values.size // basis.values.shape[-1] * outer)


@dataclass(frozen=True)
class SpectralCokernel(LinearRule):
    r"""The halo, and the directions of smallest singular value over all frequencies together.

    As `DenseCokernel`, a frequency at a time: with $v_1, v_2, \ldots$ the kept directions of a frequency
    (columns of $V$), the fragment is $c = \hat{\bar y} \bar V$, and $\hat{\bar y}$ the solution of
    $\hat{\bar y}\,[A^\top\ \ \alpha \bar V] = [\hat u\ \ \alpha c]$. Which directions are kept is decided
    over the whole grid: the `percent` of all (frequency, direction) pairs with the smallest singular values.
    How many a frequency has varies, and directions that are not kept enter as zero columns, so shapes are
    static. It is exact for any basis that makes the stack of full column rank.

    **Fragment:** the halo, and `percent` of $4 \cdot 2$ bytes for each channel and frequency of the half
    grid: that share of the cotangent on the padded grid. **Cost:** as spectral, with `kept` more rows in the
    solve, and a transform of $\bar y$ in the reverse sweep.
    **Source:** ours, from linear algebra.
    """

    percent: int
    has_fragment: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """`cokernel_10` for ten percent."""
        return f"cokernel_{self.percent}"

    def chosen(self, layer: Any) -> Array:
        """Positions of the kept directions among all (frequency, group, direction), flattened."""
        basis = layer.basis
        count = _count(self.percent, basis, layer.weight.shape[-1] // layer.groups)
        _, index = jax.lax.top_k(-jax.lax.stop_gradient(basis.values).ravel(), count)
        return index

    def stacked(self, layer: Any, g: Geometry) -> tuple[Array, Array]:
        r"""$[A;\ \alpha V^H]$ with zero rows for what is not kept, and $\alpha$."""
        a = symbol(jax.lax.stop_gradient(layer.weight), g, layer.groups)
        alpha = 2 * jnp.sqrt(jnp.sum(jnp.abs(a) ** 2) / (a.size / max(a.shape[-2:])))
        mask = jnp.zeros(layer.basis.values.size, a.real.dtype).at[self.chosen(layer)].set(1)
        v = _vectors(layer.basis) * mask.reshape(layer.basis.values.shape)[..., None, :]
        return jnp.concatenate([a, alpha * jnp.conj(jnp.swapaxes(v, -1, -2)).astype(a.dtype)], -2), alpha

    def check(self, layer: Any, x: Any) -> str | None:
        """Full column rank of the stack at every frequency, finite."""
        g = layer.geometry(x.shape)
        stacked, _ = jax.jit(lambda one: self.stacked(one, g))(layer)
        return rank_problem(stacked, f"`weight` with its basis at some frequency of the grid {g.grid}")

    def reverse(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`, and the halo's slabs with the kept coefficients, real parts and then imaginary parts."""
        g = layer.geometry(residuals.shape)
        ct_in, slabs = (
            reverse_halo(layer, residuals, ct_out)
            if not g.circular
            else super().reverse(layer, residuals, ct_out)
        )
        wide = trees.widen(ct_out)
        ct_hat = transform_out(flatten_batch(wide, layer.dims), g, layer.groups)
        c = jnp.einsum("n...o,...or->n...r", ct_hat, jnp.conj(_vectors(layer.basis)).astype(ct_hat.dtype))
        kept = c.reshape(c.shape[0], layer.basis.values.size)[:, self.chosen(layer)]
        pair = jnp.concatenate([kept.real, kept.imag], -1)
        return ct_in, (slabs, pair.reshape(*wide.shape[: -1 - layer.dims], pair.shape[-1]))

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        if not ct_in.size:
            return no_examples(layer, x, ct_in)
        slabs, pair = fragment
        u, g, lead = _join(layer, x, ct_in, slabs)
        u_hat = transform_in(u, g, layer.groups)
        stacked, alpha = self.stacked(layer, g)
        pair = pair.reshape(u_hat.shape[0], 2, -1)
        c = jnp.zeros((u_hat.shape[0], layer.basis.values.size), u_hat.dtype)
        c = c.at[:, self.chosen(layer)].set(alpha * jax.lax.complex(pair[:, 0], pair[:, 1]))
        rows = jnp.concatenate([u_hat, c.reshape(*u_hat.shape[:-1], -1)], -1)
        ct_hat = jnp.einsum("n...i,...oi->n...o", rows, left_inverse(stacked))
        return back_out(ct_hat, g).reshape(*lead, *g.out, -1)


def make_basis(layer: Any, g: Geometry, fraction: float) -> Basis:
    """The directions of smallest singular value, `fraction` of them at each frequency. On the host."""
    outer = layer.weight.shape[-1] // layer.groups
    kept = percent_of(max(1, round(100 * fraction)), outer)
    return _small_directions(layer, g, kept)


def renew_basis(layer: Any, basis: Basis) -> Basis:
    """The same from the present weight."""
    return _small_directions(layer, basis.geometry, basis.values.shape[-1])


def _small_directions(layer: Any, g: Geometry, kept: int) -> Basis:
    a = np.asarray(symbol(layer.weight, g, layer.groups))
    _, s, vh = np.linalg.svd(a, full_matrices=True)
    outer = a.shape[-1]
    s = np.concatenate([s, np.zeros((*s.shape[:-1], outer - s.shape[-1]), s.dtype)], -1)
    v = np.conj(np.swapaxes(vh[..., ::-1, :][..., :kept, :], -1, -2))
    dtype = trees.working_dtype(layer.weight.dtype)
    vectors = jnp.asarray(np.stack([v.real, v.imag]), dtype)
    return Basis(vectors, jnp.asarray(s[..., ::-1][..., :kept], dtype), g)


def invert_rules(layer: Any, g: Geometry, x: Any) -> list[InvertRule | Unavailable]:
    """The spectral inverse, where the shapes allow it."""
    inner, outer = layer.weight.shape[-2], layer.weight.shape[-1] // layer.groups
    if not g.circular:
        return [
            Unavailable(
                "spectral", "only circular convolutions are inverted; this one is zero-padded or VALID"
            )
        ]
    if any(n % s for n, s in zip(g.size, g.stride)) or any(r >= n for n, r in zip(g.size, g.reach)):
        return [
            Unavailable(
                "spectral",
                f"strides {g.stride} must divide the sizes {g.size}, and the taps not reach around",
            )
        ]
    if math.prod(g.stride) * inner > outer:
        return [
            Unavailable(
                "spectral",
                f"{outer} outputs a frequency do not determine {math.prod(g.stride) * inner} inputs",
            )
        ]
    return [SpectralInverse(g)]


@dataclass(frozen=True)
class SpectralInverse(InvertRule):
    r"""$\hat y = \hat x\,\overline{A}$ at every frequency, solved for $\hat x$: circular convolutions with
    $outer \ge s^d\,inner$."""

    geometry: Geometry
    name: str = "spectral"

    def check(self, layer: Any, x: Any) -> str | None:
        """Full row rank at every frequency, finite."""
        a = np.swapaxes(np.asarray(symbol(layer.weight, self.geometry, layer.groups)), -1, -2)
        return rank_problem(a, f"`weight` at some frequency of the grid {self.geometry.grid}")

    @full_precision
    def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
        """`x`, in the dtype of `y`."""
        g, dims, groups = self.geometry, layer.dims, layer.groups
        wide = (
            trees.widen(y) if layer.bias is None else trees.widen(y) - trees.along(trees.widen(layer.bias), y)
        )
        y_hat = transform_out(flatten_batch(wide, dims), g, groups)
        a = jnp.swapaxes(jnp.conj(symbol(layer.weight, g, groups)), -1, -2)
        x_hat = jnp.einsum("n...o,...io->n...i", y_hat, left_inverse(a))
        x_hat = x_hat.reshape(*x_hat.shape[: dims + 1], groups, math.prod(g.stride), -1)
        x_hat = jnp.moveaxis(x_hat, -2, -3)
        v = irfftn(x_hat, g.grid, range(1, dims + 1))
        v = v.reshape(v.shape[0], *g.grid, *g.stride, -1)
        order = [0, *(axis for a in range(dims) for axis in (1 + a, 1 + dims + a)), 1 + 2 * dims]
        v = v.transpose(order).reshape(v.shape[0], *g.size, -1)
        v = jnp.roll(v, [-lo for lo, _ in g.pads], range(1, dims + 1))
        return v.reshape(*y.shape[: -1 - dims], *v.shape[1:]).astype(y.dtype)
