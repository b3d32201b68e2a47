"""Dense layers and their vijps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan.layers.base import layer
from mwplan.rules import Unavailable, VijpRule
from mwplan.trees import widen


@layer
class Dense:
    """`y = x @ weight + bias` over the last axis."""

    weight: Float[Array, "inner outer"]
    bias: Float[Array, " outer"] | None = None

    @staticmethod
    def init(key: Array, inner: int, outer: int, *, bias: bool = True, dtype: Any = jnp.float32) -> Dense:
        """A semi-orthogonal weight, zero bias: growth 1 for `outer <= inner`."""
        weight = jax.nn.initializers.orthogonal()(key, (inner, outer), dtype)
        return Dense(weight, jnp.zeros((outer,), dtype) if bias else None)

    def __call__(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        """Applies the layer."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The exact vijp for `outer <= inner`."""
        inner, outer = self.weight.shape
        if outer > inner:
            return [Unavailable("exact", f"{inner} inputs do not determine {outer} output cotangents")]
        return [DenseExact()]


@dataclass(frozen=True)
class DenseExact(VijpRule):
    r"""Solves $\bar x = \bar y W^\top$ for $\bar y$.

    With $W$ of full column rank $\bar y = \bar x\, W (W^\top W)^{-1}$: the right factor is formed once a step from a
    Cholesky factor and multiplied, since examples are many and `outer` is small.
    """

    name: str = "exact"

    def rebuild(self, layer: Dense, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`; cost one product of `batch x inner x outer` and a factorisation of `outer^3`."""
        weight = widen(layer.weight)
        factor = jax.scipy.linalg.cho_factor(weight.T @ weight)
        return ct_in @ jax.scipy.linalg.cho_solve(factor, weight.T).T
