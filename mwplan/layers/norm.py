"""LayerNorm and RMSNorm. They erase one or two numbers a row of a cotangent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mwplan.common import trees
from mwplan.common.trees import along, widen
from mwplan.layers.linear import WholeOf
from mwplan.network.layer import layer, lean, static
from mwplan.network.rules import StoreRule, Unavailable, VijpRule


class _Norm:
    """What both share: `centred` or not."""

    scale: Array
    eps: float
    centred: bool = False

    def known(self, number: float, like: Array) -> Array:
        """`number` in the dtype of `like`, computed from the scale; NaN where the scale is NaN.

        It must not be a constant: XLA:CPU writes out a constant that several operations of a step share, one
        number a row, and keeps it from the first of them to the last.
        """
        first = lax.stop_gradient(self.scale).reshape(-1)[0]
        return jnp.where(first == first, number, jnp.nan).astype(like.dtype)

    def mean(self, x: Array) -> Array:
        """The mean of each row."""
        return jnp.sum(x, -1, keepdims=True) * self.known(1 / x.shape[-1], x)

    def normalised(self, x: Array) -> tuple[Array, Array]:
        """The normalised rows and the number that each was divided by, in float32 or wider."""
        x = widen(x)
        if self.centred:
            x = x - self.mean(x)
        size = jnp.sqrt(self.mean(jnp.square(x)) + self.known(self.eps, x))
        return self.divided(x, size), size

    def divided(self, x: Array, size: Array) -> Array:
        """`x / size`, with a 1 that is no constant: see `known`."""
        return x * (self.known(1, size) / size)

    def pull(self, x: Array, ct_out: Array) -> tuple[Array, Array]:
        """`(ct_in, moments)` in float32 or wider: what is erased of each row of `ct_out * scale`."""
        hat, size = self.normalised(x)
        g = widen(ct_out) * along(widen(self.scale), ct_out)
        moments = [self.mean(g)] if self.centred else []
        moments.append(self.mean(g * hat))
        rest = g - moments[-1] * hat
        ct_in = self.divided(rest - moments[0] if self.centred else rest, size)
        return ct_in, jnp.concatenate(moments, -1)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The moments of each row as the fragment."""
        return [Moments(), WholeOf("whole_input", base=Moments())]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """The input alone."""
        return [NormInput()]


@jax.custom_jvp
def _centred(norm: LayerNorm, x: Array) -> Array:
    """The normalised rows, with a derivative of their own: it is its own transpose. The one that JAX derives
    takes three times as long."""
    return norm.normalised(x)[0]


@_centred.defjvp
def _(primals: tuple[LayerNorm, Array], tangents: tuple[LayerNorm, Array]) -> tuple[Array, Array]:
    norm, x = primals
    hat, size = norm.normalised(x)
    # Divided first, and so last on the way back.
    dx = norm.divided(widen(tangents[1]), size)
    return hat, dx - norm.mean(hat * dx) * hat - norm.mean(dx)


@layer
class LayerNorm(_Norm):
    r"""$y = \gamma \hat x + \beta$, $\hat x = (x - \mu)/\sigma$, $\sigma^2 = \mathrm{var}(x) + \epsilon$ over
    the last axis. Statistics in float32 or wider.

    >>> layer = mw.layers.LayerNorm.init(None, 4)
    >>> bool(jnp.allclose(layer(jnp.arange(4.0)).mean(), 0, atol=1e-6))
    True
    """

    scale: Float[Array, " channels"]
    offset: Float[Array, " channels"]
    eps: float = static(default=1e-5)
    centred = True

    @staticmethod
    def init(key: Array | None, channels: int, *, eps: float = 1e-5, dtype: Any = jnp.float32) -> LayerNorm:
        """Scale 1, offset 0; `key` is not used."""
        return LayerNorm(jnp.ones((channels,), dtype), jnp.zeros((channels,), dtype), eps)

    @lean
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Applies the layer."""
        scale, offset = along(widen(self.scale), x), along(widen(self.offset), x)
        y: Array = (_centred(self, x) * scale + offset).astype(x.dtype)
        return y


@layer
class RMSNorm(_Norm):
    r"""$y = \gamma x/\rho$, $\rho^2 = \mathrm{mean}(x^2) + \epsilon$ over the last axis. Statistics in
    float32 or wider.

    >>> layer = mw.layers.RMSNorm.init(None, 4)
    >>> bool(jnp.allclose((layer(jnp.arange(4.0)) ** 2).mean(), 1, atol=1e-5))
    True
    """

    scale: Float[Array, " channels"]
    eps: float = static(default=1e-6)

    @staticmethod
    def init(key: Array | None, channels: int, *, eps: float = 1e-6, dtype: Any = jnp.float32) -> RMSNorm:
        """Scale 1; `key` is not used."""
        return RMSNorm(jnp.ones((channels,), dtype), eps)

    @lean
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Applies the layer."""
        y: Array = (self.normalised(x)[0] * along(widen(self.scale), x)).astype(x.dtype)
        return y


@dataclass(frozen=True)
class NormInput(StoreRule):
    """Keeps the input alone and recomputes the statistics."""

    name: str = "input"

    def forward(self, layer: Any, x: Any) -> tuple[Any, Any]:
        """The output and the input."""
        return layer(x), x

    def backward(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """The gradients of scale (and offset), and `ct_in`."""
        hat, _ = layer.normalised(residuals)
        ct_in, _ = layer.pull(residuals, ct_out)
        wide = widen(ct_out)
        axes = tuple(range(wide.ndim - 1))
        grads = [jnp.sum(wide * hat, axes)] + ([jnp.sum(wide, axes)] if layer.centred else [])
        like = trees.parameters(layer)
        return [g.astype(p.dtype) for g, p in zip(grads, like)], ct_in.astype(ct_out.dtype)


@dataclass(frozen=True)
class Moments(VijpRule):
    r"""LayerNorm: with $g = \gamma \bar y$, $\bar x = (g - a - b \hat x)/\sigma$ erases
    $a = \mathrm{mean}(g)$ and $b = \mathrm{mean}(g \hat x)$ of each row.

    They are the fragment, and $g = \sigma \bar x + a + b \hat x$, $\bar y = g/\gamma$, whatever $\epsilon$.
    RMSNorm is the same without $a$.

    **Fragment:** 2 numbers a row (RMSNorm: 1). **Residuals:** the input, full size but often shared.
    **Condition:** no entry of $\gamma$ is 0.
    **Cost:** two passes and the row statistics. **Growth:** about 1 for $\gamma$ of one size. **Source:**
    ours, from linear algebra.
    """

    name: str = "moments"
    has_fragment: bool = True

    def check(self, layer: Any, x: Any) -> str | None:
        """Finite scale, none of it negligible."""
        scale = np.abs(np.asarray(layer.scale, np.float64))
        if not np.isfinite(scale).all():
            return "`scale` has non-finite entries"
        eps = float(jnp.finfo(widen(layer.scale).dtype).eps)
        if not scale.min(initial=np.inf) > 100 * eps * scale.max(initial=0.0):
            return f"`scale` comes down to {scale.min():.1e}: it erases the cotangent there"
        return None

    def forward(self, layer: Any, x: Any) -> tuple[Any, Any]:
        """The output and the input."""
        return layer(x), x

    def reverse(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in` and the moments, `*batch 2` or `*batch 1`."""
        ct_in, moments = layer.pull(residuals, ct_out)
        return ct_in, moments

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        hat, size = layer.normalised(x)
        g = size * ct_in + fragment[..., -1:] * hat
        if layer.centred:
            g = g + fragment[..., :1]
        return g / along(lax.stop_gradient(widen(layer.scale)), g)
