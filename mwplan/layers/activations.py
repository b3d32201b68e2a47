"""Elementwise and order activations, and their vijps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan.layers.base import layer, static
from mwplan.rules import StoreRule, Unavailable, VijpRule


@layer
class LeakyReLU:
    """`x` where positive, `slope * x` elsewhere."""

    slope: float = static(default=0.5)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation."""
        return jnp.where(x > 0, x, x * self.slope)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Division by the derivative, for slopes away from zero."""
        if abs(self.slope) < 1e-3:
            return [Unavailable("divide", f"slope {self.slope} erases the cotangent where x <= 0")]
        return [LeakyDivide()]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """One bit an element."""
        return [LeakyBits()]


@dataclass(frozen=True)
class LeakyBits(StoreRule):
    """Keeps the sign of the input: one bit an element."""

    name: str = "bits"

    def forward(self, layer: LeakyReLU, x: Any) -> tuple[Any, Any]:
        """The activation, and where the input was positive."""
        return layer(x), x > 0

    def backward(self, layer: LeakyReLU, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent times the derivative."""
        return [], jnp.where(residuals, ct_out, ct_out * layer.slope)


@dataclass(frozen=True)
class LeakyDivide(VijpRule):
    """Divides by the derivative: 1 bit an element, no fragment."""

    name: str = "divide"

    def forward(self, layer: LeakyReLU, x: Any) -> tuple[Any, Any]:
        """The activation, and where the input was positive."""
        return layer(x), x > 0

    def reverse(self, layer: LeakyReLU, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The cotangent times the derivative."""
        return jnp.where(residuals, ct_out, ct_out * layer.slope), ()

    def rebuild(self, layer: LeakyReLU, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_in` over the derivative at `x`."""
        return jnp.where(x > 0, ct_in, ct_in / layer.slope)
