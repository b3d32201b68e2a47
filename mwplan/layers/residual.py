"""Contractive residual blocks, solved by fixed-point iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from mwplan.common.trees import widen
from mwplan.layers.coupling import branch_vjp
from mwplan.layers.linear import WholeOf
from mwplan.network.layer import layer
from mwplan.network.rules import (
    InvertRule,
    Unavailable,
    VijpRule,
)

STEPS = (8, 16, 32)
"""The numbers of fixed-point steps that are offered as options."""


@layer
class Residual:
    """`y = x + branch(x)` for a branch that keeps the shape.

    Submersive and invertible if the branch is a contraction, with a Lipschitz constant below 1. That is not
    checked. The error that remains after a number of steps is part of the measured local error, and too large
    an error forbids the option.

    >>> mw.layers.Residual(jnp.square)(jnp.array([2.0, 3.0]))
    Array([ 6., 12.], dtype=float32)
    """

    branch: Any

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the block."""
        y: Array = x + self.branch(x)
        return y

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Fixed-point iteration with 8, 16 or 32 steps."""
        return [*map(FixedPoint, STEPS), WholeOf("whole_input", base=FixedPoint(STEPS[0]))]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Fixed-point iteration with 8, 16 or 32 steps."""
        return [FixedPointInverse(k) for k in STEPS]


@dataclass(frozen=True)
class FixedPoint(VijpRule):
    r"""$\bar x = \bar y + \bar y\,dF(x)$, solved by $\bar y \leftarrow \bar x - \bar y\,dF(x)$ from
    $\bar y = \bar x$.

    With $\rho$ the norm of $dF(x)$, $k$ steps leave a relative error of at most $\rho^{k+1} (1 + \rho)$, so
    it converges for $\rho < 1$: 16 steps reach $10^{-5}$ for $\rho = 0.5$, and 1e-2 for 0.75. Growth is at
    most $(1 + \rho)/(1 - \rho)$.

    **Residuals:** the input, often shared. **Cost:** a forward of the branch and $k$ of its input vjps.
    **Source:** ours; for the forward, i-ResNet, arXiv:1811.00995.
    """

    steps: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """`fixed_16` for 16 steps."""
        return f"fixed_{self.steps}"

    def forward(self, layer: Residual, x: Any) -> tuple[Any, Any]:
        """The output and the input."""
        return layer(x), x

    def reverse(self, layer: Residual, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`."""
        _, vjp = branch_vjp(layer.branch, widen(residuals))
        ct_out = widen(ct_out)
        return ct_out + vjp(ct_out)[0], ()

    def rebuild(self, layer: Residual, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        _, vjp = branch_vjp(layer.branch, widen(x))
        return jax.lax.fori_loop(0, self.steps, lambda _, ct: ct_in - vjp(ct)[0], ct_in)


@dataclass(frozen=True)
class FixedPointInverse(InvertRule):
    r"""$x \leftarrow y - F(x)$ from $x = y$: i-ResNet's inversion, arXiv:1811.00995.

    With $\rho < 1$ the Lipschitz constant of $F$, $k$ steps leave
    $|x_k - x| \le \rho^k |F(y) - F(x)| \le \rho^{k+1} |F(x)|$, measured with rounding as the local error;
    growth is at most $(1 + \rho)/(1 - \rho)$. **Cost:** $k$ forwards of the branch. Workspace: that of one,
    and an activation.
    """

    steps: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """`fixed_16` for 16 steps."""
        return f"fixed_{self.steps}"

    def inverse(self, layer: Residual, y: Any, kept: Any) -> Any:
        """`x`."""
        return jax.lax.fori_loop(0, self.steps, lambda _, x: y - layer.branch(x), y)
