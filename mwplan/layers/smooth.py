"""Smooth activations. Monotone ones whose derivative is bounded away from zero have a vijp; all have store
rules that keep one array."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mwplan.common.errors import ArgumentError
from mwplan.common.trees import widen
from mwplan.layers.linear import WholeOf
from mwplan.network.layer import layer, lean, static
from mwplan.network.rules import InvertRule, OutputStore, StoreRule, Unavailable, VijpRule


def _gelu(x: Array) -> Array:
    """By `erf`: correct to 1e-6 for inputs up to 12 in float32, and faster than by `erfc`, which has a
    smaller relative error near 0."""
    wide = widen(x)
    y: Array = (0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)
    return y


_softplus = jax.custom_jvp(jax.nn.softplus)
_softplus.defjvp(lambda x, dx: (_softplus(*x), dx[0] * jax.nn.sigmoid(x[0])))

# Name: the function, and bounds below and above of its derivative (outward from the true extrema). JAX's tanh
# and sigmoid keep the output alone.
_KINDS: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "gelu": (lean(_gelu), -0.13, 1.13),
    "gelu_tanh": (lean(lambda x: jax.nn.gelu(x, approximate=True)), -0.131, 1.131),
    "silu": (lean(jax.nn.silu), -0.1, 1.1),
    "softplus": (lean(_softplus), 0.0, 1.0),
    "tanh": (jnp.tanh, 0.0, 1.0),
    "sigmoid": (jax.nn.sigmoid, 0.0, 0.25),
}


@layer
class Smooth:
    """`slope * x + (1 - slope) * f(x)`, elementwise, with `f` one of gelu, gelu_tanh, silu, softplus, tanh,
    sigmoid.

    `slope=0` is `f` itself. A derivative of at least `c > 0` everywhere, which a slope of 0.2 gives each of
    them, makes it submersive and invertible.

    >>> mw.layers.Smooth("tanh", slope=0.2)(jnp.zeros(2))
    Array([0., 0.], dtype=float32)
    """

    kind: str = static(default="gelu")
    slope: float = static(default=0.0)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ArgumentError(f"`kind={self.kind!r}` is none of {', '.join(_KINDS)}")
        if not 0 <= self.slope <= 1:
            raise ArgumentError(f"`slope={self.slope!r}` must be from 0 to 1")

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation."""
        f = _KINDS[self.kind][0]
        return f(x) if self.slope == 0 else self.slope * x + (1 - self.slope) * f(x)

    def derivative(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The derivative at `x`, in float32 or wider."""
        x = widen(x)
        slope: Array = jax.jvp(self.__call__, (x,), (jnp.ones_like(x),))[1]
        return slope

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of the derivative below and above."""
        _, low, high = _KINDS[self.kind]
        return self.slope + (1 - self.slope) * low, self.slope + (1 - self.slope) * high

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Division by the derivative, where it is bounded away from zero; the whole fragment with the input
        as residual."""
        low = self.bounds[0]
        if low < 1e-3:
            reason = (
                f"the derivative of {self.kind} with slope {self.slope} comes down to {low:.3f} (needs 0.001)"
            )
            return [Unavailable("divide", reason), WholeOf("whole_input", base=SmoothDivide())]
        return [SmoothDivide(), WholeOf("whole_input", base=SmoothDivide())]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """Of tanh and sigmoid the input alone; or the output alone, where the derivative is a function of it.
        The others keep one array."""
        if self.kind not in ("tanh", "sigmoid"):
            return []
        return [SmoothInput()] if self.slope else [SmoothOutput(), SmoothInput()]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Newton's method, where the derivative is bounded away from zero."""
        low = self.bounds[0]
        if low < 1e-3:
            return [
                Unavailable(
                    "newton", f"the derivative comes down to {low:.3f}: not monotone enough to invert"
                )
            ]
        return [SmoothInverse()]


@dataclass(frozen=True)
class SmoothInput(StoreRule):
    """Keeps the input, which a neighbour often keeps already; recomputes the derivative."""

    name: str = "input"

    def forward(self, layer: Smooth, x: Any) -> tuple[Any, Any]:
        """The activation and its input."""
        return layer(x), x

    def backward(self, layer: Smooth, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent times the derivative."""
        return [], (widen(ct_out) * layer.derivative(residuals)).astype(ct_out.dtype)


@dataclass(frozen=True)
class SmoothOutput(OutputStore):
    """Keeps the output: `tanh' = 1 - y^2`, `sigmoid' = y (1 - y)`."""

    def backward(self, layer: Smooth, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent times the derivative."""
        y = residuals
        return [], ct_out * ((1 - y) * (1 + y) if layer.kind == "tanh" else y * (1 - y))


@dataclass(frozen=True)
class SmoothDivide(VijpRule):
    r"""Divides by the derivative at `x`: nothing is erased where $|f'| \ge c > 0$.

    **Residuals:** the input, full size but often shared. **Cost:** two evaluations of the derivative.
    **Growth:** at most $\max f' / c$. **Source:** ours.
    """

    name: str = "divide"

    def forward(self, layer: Smooth, x: Any) -> tuple[Any, Any]:
        """The activation and its input."""
        return layer(x), x

    def reverse(self, layer: Smooth, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The cotangent times the derivative."""
        return widen(ct_out) * layer.derivative(residuals), ()

    def rebuild(self, layer: Smooth, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_in` over the derivative."""
        return ct_in / layer.derivative(x)


@dataclass(frozen=True)
class SmoothInverse(InvertRule):
    r"""Solves $f(x) = y$ elementwise by Newton's method inside a bracket, 24 steps, bisecting where a step
    would leave it.

    The bracket comes from the bounds of the derivative: $x$ lies between $(y - f(0))/c$ and $(y - f(0))/C$.
    """

    name: str = "newton"

    def inverse(self, layer: Smooth, y: Any, kept: Any) -> Any:
        """`x`, in the dtype of `y`."""
        wide = widen(y)
        low, high = layer.bounds
        rounding = 8 * float(jnp.finfo(wide.dtype).eps) / low
        rise = wide - layer(jnp.zeros((), wide.dtype))
        ends = rise / low, rise / high

        def step(_: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, left, right = state
            excess = layer(x) - wide
            left, right = jnp.where(excess <= 0, x, left), jnp.where(excess > 0, x, right)
            moved = x - excess / layer.derivative(x)
            # A compiler may compute `excess` twice and round it otherwise: at the solution, where only its
            # sign's noise is left, a step across the end that was just set must not send `x` away again.
            slack = rounding * (jnp.abs(x) + jnp.abs(wide))
            inside = (moved >= left - slack) & (moved <= right + slack)
            return jnp.where(inside, moved, (left + right) / 2), left, right

        left, right = jnp.minimum(*ends), jnp.maximum(*ends)
        x, _, _ = jax.lax.fori_loop(0, 24, step, ((left + right) / 2, left, right))
        return x.astype(y.dtype)
