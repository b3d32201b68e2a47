r"""Dense layers and their vijps.

Rows multiply from the left: $y = xW + b$ with $W$ of `inner x outer`, so $\bar x = \bar y W^\top$ erases the
part of $\bar y$ in the null space of $W$: nothing where $W$ has full column rank, `outer - inner` directions
of each row where $W$ is wide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mwplan.common.errors import ArgumentError
from mwplan.common.trees import along, widen
from mwplan.layers.linear import LinearRule, Refined, left_inverse, percent_of, rank_problem, times
from mwplan.network.layer import layer
from mwplan.network.rules import InvertRule, Unavailable, VijpRule, full_precision

PERCENTS = (2, 5, 10, 20, 30, 50)
"""The fractions of the numerical cokernel that are offered as options."""


@layer
class Dense:
    """`y = x @ weight + bias` over the last axis.

    `basis`, where there is one, holds the right singular directions of `weight` with the smallest singular
    values, smallest first, as columns: what the `cokernel_*` options keep of the cotangent. The forward pass
    never reads it, so its gradient is zero; its columns are normalised on use, so weight decay does not harm
    it; it may be stale at the price of growth alone (`refresh` renews it).

    >>> layer = mw.layers.Dense.init(jax.random.key(0), 8, 4)
    >>> layer(jnp.ones((2, 8))).shape
    (2, 4)
    """

    weight: Float[Array, "inner outer"]
    bias: Float[Array, " outer"] | None = None
    basis: Float[Array, "outer kept"] | None = None

    @staticmethod
    def init(key: Array, inner: int, outer: int, *, bias: bool = True, dtype: Any = jnp.float32) -> Dense:
        """A semi-orthogonal weight, zero bias: growth 1 for `outer <= inner`."""
        weight = jax.nn.initializers.orthogonal()(key, (inner, outer), dtype)
        return Dense(weight, jnp.zeros((outer,), dtype) if bias else None)

    @staticmethod
    def he(
        key: Array,
        inner: int,
        outer: int,
        *,
        slope: float = 0.0,
        bias: bool = True,
        basis: float = 0.5,
        dtype: Any = jnp.float32,
    ) -> Dense:
        """He initialisation for a leaky ReLU of `slope`, with a basis of `basis * outer` directions.

        Such weights are ill-conditioned: without fragments their vijp loses all digits within a few layers.
        """
        scale = math.sqrt(2.0 / (1.0 + slope**2) / inner)
        weight = (scale * jax.random.normal(key, (inner, outer))).astype(dtype)
        made = Dense(weight, jnp.zeros((outer,), dtype) if bias else None)
        return made.with_basis(basis) if basis else made

    def with_basis(self, fraction: float = 0.5) -> Dense:
        """This layer with a basis of the `fraction` of directions of smallest singular value. One SVD, on the
        host."""
        if not 0 < fraction <= 1:
            raise ArgumentError(f"`fraction={fraction!r}` must be above 0 and at most 1")
        outer = self.weight.shape[1]
        keep = percent_of(max(1, round(100 * fraction)), outer)
        return dataclasses.replace(self, basis=_small_directions(self.weight, keep))

    def refresh(self) -> Dense:
        """This layer with its basis made anew from the present weight; itself where it has none."""
        if self.basis is None:
            return self
        return dataclasses.replace(self, basis=_small_directions(self.weight, self.basis.shape[1]))

    def linear(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        """The layer without its bias."""
        return self._times(x, None)

    def __call__(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        """Applies the layer."""
        return self._times(x, self.bias)

    def _times(self, x: Array, bias: Array | None) -> Array:
        if x.ndim < 1 or x.shape[-1] != self.weight.shape[0]:
            raise ArgumentError(
                f"`x.shape={x.shape}`: this Dense layer takes {self.weight.shape[0]} features on the last "
                "axis"
            )
        return times(x, self.weight, bias)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Exact for `outer <= inner`, with the null-space fragment otherwise; cokernel fragments where there
        is a basis."""
        inner, outer = self.weight.shape
        rules: list[VijpRule | Unavailable] = []
        if outer <= inner:
            rules += [DenseExact(), Refined(DenseExact())]
        else:
            rules.append(
                Unavailable(
                    "exact",
                    f"{inner} inputs do not determine {outer} output cotangents (needs outer <= inner)",
                )
            )
            rules.append(DenseNull())
        if self.basis is None:
            return [*rules, Unavailable("cokernel", "the layer has no basis: see `with_basis`")]
        kept = self.basis.shape[1]
        for percent in PERCENTS:
            count = percent_of(percent, outer)
            if kept < count:
                rules.append(
                    Unavailable(
                        f"cokernel_{percent}",
                        f"needs {count} directions and the basis has {kept}: see `with_basis`",
                    )
                )
            elif outer - count > inner:
                rules.append(
                    Unavailable(
                        f"cokernel_{percent}",
                        f"{count} of {outer} directions are fewer than the {outer - inner} erased",
                    )
                )
            else:
                rules.append(DenseCokernel(percent))
        return rules

    def invert_rules(self, x: Any) -> Sequence[InvertRule]:
        """Solves for the input where `outer >= inner`."""
        inner, outer = self.weight.shape
        return [DenseInverse()] if inner <= outer else []


def _small_directions(weight: Array, count: int) -> Array:
    """Right singular vectors of the `count` smallest singular values, smallest first, as columns."""
    _, _, vt = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=True)
    return jnp.asarray(vt[::-1][:count].T, widen(weight).dtype)


@dataclass(frozen=True)
class DenseExact(LinearRule):
    r"""Solves $\bar x = \bar y W^\top$ for $\bar y$.

    Nothing is erased where $W$ has full column rank (`outer <= inner`): $\bar y = \bar x\,(W^+)^\top$ is the
    only solution. $W^+$ is formed once a step, by LU where $W$ is square and QR otherwise, and multiplied:
    examples are many.

    **Cost:** $2\,batch\,inner\,outer$ flop, as the forward; once a step about $4\,inner\,outer^2$ flop and
    $inner\,outer$ numbers of workspace. No residuals, no fragment.
    **Source:** the operator is arXiv:2402.14212; the form is ours, from linear algebra.
    """

    name: str = "exact"

    def check(self, layer: Dense, x: Any) -> str | None:
        """Full column rank, finite."""
        return rank_problem(layer.weight, "`weight`")

    def rebuild(self, layer: Dense, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`, `*batch outer`."""
        return ct_in @ left_inverse(widen(layer.weight)).T


@dataclass(frozen=True)
class DenseNull(LinearRule):
    r"""A wide layer, `outer > inner`: keeps the cotangent's part in the null space of $W$.

    $\bar x = \bar y W^\top$ erases $\bar y N$ for the orthonormal basis $N$ (`outer x (outer - inner)`) of
    $\{v : Wv = 0\}$. The fragment is $c = \bar y N$ and $\bar y = \bar x (W W^\top)^{-1} W + c N^\top$, the
    first term the part in the row space. With $W^\top = QR$, complete, $Q = [Q_1\ N]$:
    $(WW^\top)^{-1}W = R^{-1} Q_1^\top$. The same factorisation of the same weights serves both sweeps, so $N$
    agrees with itself.

    **Fragment:** `(outer - inner) / outer` of the cotangent. **Cost:** $2\,batch\,outer^2$ flop; once in each
    of the two sweeps a complete QR, about $4\,outer^2\,inner$ flop. **Condition:** full row rank.
    **Source:** ours, from linear algebra.
    """

    name: str = "null"
    has_fragment: bool = True

    def check(self, layer: Dense, x: Any) -> str | None:
        """Full row rank, finite."""
        return rank_problem(np.asarray(layer.weight).T, "`weight`")

    def fragment(self, layer: Dense, residuals: Any, ct_out: Any) -> Any:
        """`ct_out @ N`, `*batch outer-inner`."""
        inner = layer.weight.shape[0]
        q, _ = jnp.linalg.qr(widen(layer.weight).T, mode="complete")
        return ct_out @ q[:, inner:]

    def rebuild(self, layer: Dense, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`, `*batch outer`."""
        inner = layer.weight.shape[0]
        q, r = jnp.linalg.qr(widen(layer.weight).T, mode="complete")
        rows = jax.scipy.linalg.solve_triangular(r[:inner], q[:, :inner].T)
        return jnp.concatenate([ct_in, fragment], -1) @ jnp.concatenate([rows, q[:, inner:].T])


@dataclass(frozen=True)
class DenseCokernel(LinearRule):
    r"""Keeps the cotangent's part in the numerical cokernel: ordinary, ill-conditioned weights, made stable.

    What the input vjp nearly erases are the directions of small singular value. With $Q_2$ (`outer x kept`)
    spanning them, or anything near them, the fragment is $c = \bar y Q_2$, and $\bar y$ is the one solution
    of

    $$\bar y\,[W^\top\ \ \alpha Q_2] = [\bar x\ \ \alpha c],$$

    a dense layer with `kept` more inputs, whose smallest singular value is about the smallest that $Q_2$
    leaves out. It is exact for any $Q_2$ that makes the stacked matrix of full column rank, orthonormal or
    not: a stale basis costs growth and nothing else. $\alpha$, twice the root mean square singular value of
    $W$, makes the solution trust $c$, which is exact, before $\bar x$, which carries the errors of the layers
    before. `outer > inner` is covered where `kept >= outer - inner`.

    **Fragment:** `kept / outer` of the cotangent. **Cost:** $2\,batch\,outer\,(inner + 2\,kept)$ flop in both
    sweeps together, and once a step a QR of `(inner + kept) x outer`. **Source:** ours, from linear algebra.
    """

    percent: int
    has_fragment: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """`cokernel_10` for ten percent."""
        return f"cokernel_{self.percent}"

    def directions(self, layer: Dense) -> Array:
        """The basis's first columns, normalised; no gradient flows there."""
        assert layer.basis is not None
        count = percent_of(self.percent, layer.weight.shape[1])
        basis = jax.lax.stop_gradient(widen(layer.basis[:, :count]))
        unit: Array = basis / jnp.linalg.norm(basis, axis=0, keepdims=True)
        return unit

    def stacked(self, layer: Dense) -> tuple[Array, Array]:
        r"""$[W;\ \alpha Q_2^\top]$ and $\alpha$."""
        weight = jax.lax.stop_gradient(widen(layer.weight))
        alpha = 2 * jnp.linalg.norm(weight) / math.sqrt(min(weight.shape))
        return jnp.concatenate([weight, alpha * self.directions(layer).T]), alpha

    def check(self, layer: Dense, x: Any) -> str | None:
        """Full column rank of the stacked matrix, finite."""
        return rank_problem(self.stacked(layer)[0], "`weight` with its basis")

    def fragment(self, layer: Dense, residuals: Any, ct_out: Any) -> Any:
        """`ct_out @ Q2`, `*batch kept`."""
        return ct_out @ self.directions(layer)

    def rebuild(self, layer: Dense, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`, `*batch outer`."""
        stacked, alpha = self.stacked(layer)
        return jnp.concatenate([ct_in, alpha * fragment], -1) @ left_inverse(stacked).T


@dataclass(frozen=True)
class DenseInverse(InvertRule):
    r"""$x = (y - b)\,W^{+}$ for `outer >= inner`, with $W W^{+} = I$: one product, and a factorisation once a
    step."""

    name: str = "solve"

    def check(self, layer: Dense, x: Any) -> str | None:
        """Full row rank, finite."""
        return rank_problem(np.asarray(layer.weight).T, "`weight`")

    @full_precision
    def inverse(self, layer: Dense, y: Any, kept: Any) -> Any:
        """`*batch inner`, in the dtype of `y`."""
        wide = widen(y) if layer.bias is None else widen(y) - along(widen(layer.bias), y)
        return (wide @ left_inverse(widen(layer.weight).T).T).astype(y.dtype)
